"""From converted rows to token ids and labels.

The chat template of the tokenizer renders every conversation, here as in serving, so the two cannot differ. Each row
is checked while it is encoded: the ids before an answer are the ids that serving would send as the prompt, the answer
and its turn end are supervised, and the whole row fits.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from medicalgpt.data import LoadedData, Problem

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """Token ids of one sequence and its labels: the id where a token is supervised, -100 where not."""

    input_ids: list[int]
    labels: list[int]


class EncodingError(ValueError):
    """A row that cannot be encoded; `reason` and `remedy` as in `data.Problem`, `too_long` if that is the reason."""

    def __init__(self, reason: str, remedy: str, too_long: bool = False):
        super().__init__(reason)
        self.reason, self.remedy, self.too_long = reason, remedy, too_long


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    *,
    max_length: int | None = None,
    train_on_inputs: bool = False,
    mask_history: bool = False,
) -> list[Sample]:
    """Encode one conversation; only assistant text and its turn end are supervised, each turn once.

    One sample, where the template renders each turn the same whatever follows. Templates of thinking models drop the
    thoughts of earlier turns: a turn that later ones change becomes a sample of its own, with the prompt that serving
    gives.

    Args:
        tokenizer: with a chat template that marks assistant text by `{% generation %}`.
        row: `messages` in OpenAI form, ending with the assistant, and `tools` in OpenAI form or None.
        max_length: in tokens; a longer sequence is refused, never cut.
        train_on_inputs: supervise the prompts too, each in one sample only.
        mask_history: supervise the last turn only.

    Raises:
        EncodingError: too long, refused by the template, or an answer whose first characters melt into the last token
            of the prompt.
    """
    messages, tools = row["messages"], row["tools"]
    _refuse_special_tokens(tokenizer, messages)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        prompts = {turn: _render(tokenizer, messages[:turn], tools, add_generation_prompt=True) for turn in turns}
        texts = {turn: _render(tokenizer, messages[: turn + 1], tools) for turn in turns}
    except TemplateError as error:
        raise EncodingError(
            f"the chat template refuses it: {error}", "Mend the row, or choose another --template_name"
        ) from error
    samples: list[Sample] = []
    for group in _stable_groups(turns[-1:] if mask_history else turns, prompts, texts):
        ids, spans = _encode_rendered(tokenizer, messages[: group[-1] + 1], tools, max_length)
        spans = dict(zip(turns, spans, strict=False))
        for turn in group:
            if spans[turn][2] != len(prompts[turn]):
                raise EncodingError(
                    "the first characters of an answer form one token with the end of the prompt, so that no model "
                    "could produce them in serving",
                    "Remove the white space at the start of the answer",
                )
        labels, before = [IGNORED] * len(ids), 0
        for turn, (start, end, _) in spans.items():
            if turn in group:
                first = before if train_on_inputs else start
                labels[first:end] = ids[first:end]
            before = end
        if train_on_inputs:
            labels[before:] = ids[before:]
        samples.append(Sample(ids, labels))
    return samples


def _stable_groups(turns: Sequence[int], prompts: dict[int, str], texts: dict[int, str]) -> list[list[int]]:
    """Turns that can share a sample: in the text up to the last of them, each stands as it does when it is answered."""
    groups: list[list[int]] = []
    left = list(turns)
    while left:
        text = texts[left[-1]]
        group = [turn for turn in left[:-1] if text.startswith(prompts[turn]) and text.startswith(texts[turn])]
        groups.append([*group, left[-1]])
        left = [turn for turn in left[:-1] if turn not in group]
    return groups[::-1]


def _refuse_special_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]]) -> None:
    """A text that spells a special token would be read as that token: as the end of a turn in the middle of it, say."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for number, message in enumerate(messages, start=1):
        if found := [token for token in special if token in (message.get("content") or "")]:
            raise EncodingError(
                f"turn {number} holds {', '.join(found)}, which this tokenizer reads as a special token",
                "Take it out of the text, or write it in another way",
            )


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence, tools: Sequence | None, **options: Any) -> str:
    return tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options)


def _encode_rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    max_length: int | None,
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Token ids, and of each assistant turn (first token, token after the last, character where it begins)."""
    encoded = tokenizer.apply_chat_template(
        list(messages),
        tools=tools,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        # A text beyond the tokenizer's own limit is measured below; its warning would only alarm.
        tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
    )
    ids, mask, offsets = encoded["input_ids"], encoded["assistant_masks"], encoded["offset_mapping"]
    if max_length is not None and len(ids) > max_length:
        raise EncodingError(
            f"{len(ids)} tokens, longer than the {max_length} that fit",
            "Raise --model_max_length, shorten the row, or leave it out with --skip_long_rows True",
            too_long=True,
        )
    return list(ids), [(start, end, offsets[start][0]) for start, end in _spans(mask)]


def _spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of ones as (start, end). Turns of the assistant never touch: a user or tool turn stands between."""
    spans, start = [], None
    for position, bit in enumerate([*mask, 0]):
        if bit and start is None:
            start = position
        elif not bit and start is not None:
            spans.append((start, position))
            start = None
    return spans


def render_prompts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], count: int) -> list[list[int]]:
    """Token ids of the first prompts of up to `count` rows, spread evenly over them, as serving would render them."""
    step = max(1, len(rows) // max(count, 1))
    prompts = []
    for row in rows[::step][:count]:
        first = next(number for number, message in enumerate(row["messages"]) if message["role"] == "assistant")
        prompts.append(
            tokenizer.apply_chat_template(
                row["messages"][:first], tools=row["tools"], add_generation_prompt=True, return_dict=False
            )
        )
    return prompts


def document_starts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], count: int) -> list[list[int]]:
    """Token ids of the first quarter of up to `count` documents, for the model to go on with."""
    starts = []
    for row in rows[:count]:
        ids = tokenizer(row["text"][: max(8, len(row["text"]) // 4)], verbose=False)["input_ids"]
        starts.append(ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids)
    return starts


def encode_document(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], *, block_size: int, end: bool = True
) -> list[Sample]:
    """Encode one document for pretraining, its end token included, in pieces of at most `block_size` tokens.

    No token is lost: a document longer than a block goes on in the next piece.

    Args:
        tokenizer: adds its own BOS if it wants one.
        row: the document as `text`.
        block_size: tokens of a piece at the most.
        end: append the end-of-text token.
    """
    ids = tokenizer(row["text"], add_special_tokens=True, verbose=False)["input_ids"]
    if end and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    return [Sample(ids[at : at + block_size], ids[at : at + block_size]) for at in range(0, len(ids), block_size)]


def encode_rows(
    data: LoadedData, side: str, encode: Callable[[dict[str, Any]], list[Sample]], num_proc: int | None = None
) -> Dataset:
    """Encode all rows of one side to `input_ids` and `labels`; rows that fail join `data.problems`.

    Args:
        data: converted rows; `LoadedData.settle` says what becomes of those that cannot be encoded.
        side: `train` or `validation`.
        encode: takes a row, returns samples, raises `EncodingError`.
        num_proc: processes; worth it for many thousand rows.

    Returns:
        Columns `input_ids`, `labels` and `place`; a row may give several samples.
    """
    rows = getattr(data, side)
    if not rows:
        # Every row is a problem already; the caller reports them.
        return Dataset.from_dict({"input_ids": [], "labels": [], "place": []})

    def encode_batch(batch: dict[str, list]) -> dict[str, list]:
        columns: dict[str, list] = {"input_ids": [], "labels": [], "place": [], "problem": []}
        for text in batch["row"]:
            row = json.loads(text)
            try:
                samples, problem = encode(row), ""
            except EncodingError as error:
                problem = json.dumps([error.reason, error.remedy + ".", error.too_long], ensure_ascii=False)
                samples = [Sample([], [])]
            for sample in samples:
                columns["input_ids"].append(sample.input_ids)
                columns["labels"].append(sample.labels)
                columns["place"].append(row["place"])
                columns["problem"].append(problem)
        return columns

    dataset = Dataset.from_dict({"row": [json.dumps(row, ensure_ascii=False) for row in rows]})
    dataset = dataset.map(
        encode_batch, batched=True, remove_columns=["row"], num_proc=num_proc, desc=f"tokenizing {side}"
    )
    for place, text in zip(dataset["place"], dataset["problem"], strict=True):
        if text:
            reason, remedy, too_long = json.loads(text)
            data.problems.append(Problem(place, reason, remedy, kind="too long" if too_long else "unusable"))
    dataset = dataset.filter(lambda problem: not problem, input_columns="problem")
    return dataset.remove_columns("problem")
