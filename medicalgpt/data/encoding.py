"""From converted rows to token ids and labels.

The tokenizer's chat template renders every conversation, here and in serving, so the two cannot differ. Each row is
checked while it is encoded: the ids before an answer are the ids that serving would send as the prompt, the answer and
its turn end are supervised, and the entire row fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medicalgpt.models.templating import special_tokens_in

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """Token ids of one sequence and its labels: the id where a token is supervised, -100 where not."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and of two answers to it, each with its turn end."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, up to the start of the answer."""

    prompt_ids: list[int]


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
    thoughts of earlier turns: a turn that later ones change becomes a separate sample, with the prompt that serving
    gives.

    Args:
        tokenizer: with a chat template that marks assistant text by `{% generation %}`.
        row: `messages` in OpenAI form, ending with the assistant, and `tools` in OpenAI form or None. A turn of the
            assistant with `train` False is context only.
        max_length: in tokens; a longer sequence is refused, never truncated.
        train_on_inputs: supervise the prompts too, each in one sample only.
        mask_history: supervise the last turn only.

    Raises:
        EncodingError: too long, refused by the template, or an answer whose first characters merge with the last token
            of the prompt.
    """
    trained = [message.get("train", True) for message in row["messages"]]
    # `train` is for us; a template must not see it.
    messages = [{name: item for name, item in message.items() if name != "train"} for message in row["messages"]]
    tools = row["tools"]
    refuse_special_tokens(tokenizer, messages, tools)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = [turn for turn in (turns[-1:] if mask_history else turns) if trained[turn]]
    if not chosen:
        raise EncodingError("its last answer is not to be trained on", "Remove the row, or omit --mask_history")
    try:
        prompts = {turn: _render(tokenizer, messages[:turn], tools, add_generation_prompt=True) for turn in chosen}
        texts = {turn: _render_to_turn_end(tokenizer, messages[: turn + 1], tools) for turn in chosen}
    except TemplateError as error:
        raise EncodingError(
            f"the chat template refuses it: {error}", "Fix the row, or choose another --template_name"
        ) from error
    _refuse_unsaid(messages, texts)
    samples: list[Sample] = []
    for group in _stable_groups(chosen, prompts, texts):
        ids, spans = _encode_rendered(tokenizer, messages[: group[-1] + 1], tools, max_length)
        spans = dict(zip(turns, spans, strict=False))
        for turn in group:
            _check_prompt(texts[turn], prompts[turn], spans[turn][2])
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


def encode_preference(
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    *,
    max_length: int | None = None,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
) -> list[Pair]:
    """Encode a prompt and two answers to it; both answers follow the same ids, those that serving would send.

    Args:
        tokenizer: with a chat template that marks assistant text by `{% generation %}`.
        row: `messages` and `tools` of the prompt, `chosen` and `rejected`, an assistant message each.
        max_length: maximum number of tokens of the prompt with either answer; nothing is ever truncated.
        max_source_length: maximum number of tokens of the prompt.
        max_target_length: maximum number of tokens of an answer, including its turn end.

    Returns:
        One pair.

    Raises:
        EncodingError: as `encode_chat`, or answers that become the same tokens or need different prompts.
    """
    answers, prompts = [], []
    for name in ("chosen", "rejected"):
        chat = {"messages": [*row["messages"], row[name]], "tools": row["tools"]}
        try:
            (sample,) = encode_chat(tokenizer, chat, mask_history=True)
            # What a template writes after the turn end is not part of the pair.
            ((start, end),) = _spans([label != IGNORED for label in sample.labels])
            _refuse_too_long(end, max_length)
        except EncodingError as error:
            raise EncodingError(f"the {name} answer: {error.reason}", error.remedy, error.too_long) from error
        prompts.append(sample.input_ids[:start])
        answers.append(sample.input_ids[start:end])
        for what, count, limit, flag in (
            ("prompt", start, max_source_length, "--max_source_length"),
            (f"{name} answer", end - start, max_target_length, "--max_target_length"),
        ):
            if limit is not None and count > limit:
                raise EncodingError(
                    f"the {what} has {count} tokens, more than {flag} {limit}",
                    f"Raise {flag}, shorten the row, or skip it with --skip_long_rows True",
                    too_long=True,
                )
    if prompts[0] != prompts[1]:
        raise EncodingError(
            "the template writes different prompts before the chosen and the rejected answer",
            "Give both answers a reasoning, or neither",
        )
    if answers[0] == answers[1]:
        raise EncodingError("both answers become the same tokens", "Remove the row, or make the answers differ")
    return [Pair(prompts[0], *answers)]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], *, max_length: int | None = None
) -> list[Prompt]:
    """Encode a prompt as serving would send it.

    Args:
        tokenizer: with a chat template.
        row: `messages` and `tools` of the prompt.
        max_length: in tokens; a longer prompt is refused, never truncated.

    Returns:
        One prompt.

    Raises:
        EncodingError: too long, refused by the template, or a text that contains a special token.
    """
    refuse_special_tokens(tokenizer, row["messages"], row["tools"])
    try:
        ids = tokenizer.apply_chat_template(
            row["messages"],
            tools=row["tools"],
            add_generation_prompt=True,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},
        )
    except TemplateError as error:
        raise EncodingError(
            f"the chat template refuses it: {error}", "Fix the row, or choose another --template_name"
        ) from error
    if max_length is not None and len(ids) > max_length:
        raise EncodingError(
            f"a prompt of {len(ids)} tokens, longer than the {max_length} that leave room for the answer",
            "Raise --model_max_length, shorten the row, or skip it with --skip_long_rows True",
            too_long=True,
        )
    return [Prompt(list(ids))]


def _refuse_unsaid(messages: Sequence[dict[str, Any]], texts: dict[int, str]) -> None:
    """Raises EncodingError if the template silently drops a system turn, or the reasoning of an answer."""
    for turn, text in texts.items():
        for number, message in enumerate(messages[: turn + 1]):
            said = message["content"] if message["role"] == "system" else ""
            what, remedy = f"turn {number + 1} (system)", "Write it into the user's turn, or remove it"
            if number == turn and message.get("reasoning_content"):
                said, what = message["reasoning_content"], f"the reasoning of turn {number + 1}"
                remedy = "Use the --template_name of a thinking model (qwen3), or remove the reasoning"
            if said.strip() not in text:
                raise EncodingError(f"the chat template leaves out {what}", remedy)


def _stable_groups(turns: Sequence[int], prompts: dict[int, str], texts: dict[int, str]) -> list[list[int]]:
    """Turns that can share a sample: in the text up to the last of them, each is the same as when it is answered."""
    groups: list[list[int]] = []
    left = list(turns)
    while left:
        text = texts[left[-1]]
        group = [turn for turn in left[:-1] if text.startswith(prompts[turn]) and text.startswith(texts[turn])]
        groups.append([*group, left[-1]])
        left = [turn for turn in left[:-1] if turn not in group]
    return groups[::-1]


def _check_prompt(text: str, prompt: str, start: int) -> None:
    """Raises EncodingError if the supervised part of `text`, from `start` on, is not what serving would generate."""
    if text.startswith(prompt) and start == len(prompt):
        return
    if "<think>" in prompt[-30:]:
        thinks = "</think>" not in prompt[-30:]
        raise EncodingError(
            f"the template's prompt in serving {'opens' if thinks else 'has closed'} a thought, and this answer "
            f"{'begins without one' if thinks else 'holds one'}, so that it would be trained after another prompt",
            "Choose the template's form without thinking (…_nothink), or give the answer its reasoning"
            if thinks
            else "Choose the template's form with thinking, or remove the reasoning",
        )
    raise EncodingError(
        "the first characters of an answer form one token with the end of the prompt, so that no model could generate "
        "them in serving",
        "Remove the white space at the start of the answer, or begin it with another character",
    )


def refuse_special_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None
) -> None:
    """Raises EncodingError if a text contains a special token, such as the end of a turn in the middle of it."""
    texts = [(f"turn {number}", message) for number, message in enumerate(messages, start=1)]
    for where, value in [*texts, ("the column `tools`", tools or [])]:
        if found := special_tokens_in(tokenizer, value):
            raise EncodingError(
                f"{where} holds {', '.join(found)}, which this tokenizer reads as a special token",
                "Remove it from the text, or write it differently",
            )


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence, tools: Sequence | None, **options: Any) -> str:
    return tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **options)


def _render_to_turn_end(tokenizer: PreTrainedTokenizerBase, messages: Sequence, tools: Sequence | None) -> str:
    """The text up to the last turn's end. What a template writes after that is not there when more turns follow."""
    (text,), (spans,) = render_jinja_template(
        [list(messages)],
        tools=tools,
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return text[: spans[-1][1]]


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
        # The length is checked below; the tokenizer's own warning would only confuse.
        tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
    )
    ids, mask, offsets = encoded["input_ids"], encoded["assistant_masks"], encoded["offset_mapping"]
    _refuse_too_long(len(ids), max_length)
    return list(ids), [(start, end, offsets[start][0]) for start, end in _spans(mask)]


def _refuse_too_long(length: int, max_length: int | None) -> None:
    if max_length is not None and length > max_length:
        raise EncodingError(
            f"{length} tokens, longer than the {max_length} that fit",
            "Raise --model_max_length, shorten the row, or skip it with --skip_long_rows True",
            too_long=True,
        )


def _spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of ones as (start, end). Turns of the assistant are never adjacent: a user or tool turn is between them."""
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
        turns = [number for number, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        # Rows of preferences and tasks have their answers outside of the prompt, which may have several turns.
        first = len(row["messages"]) if {"chosen", "columns"} & set(row) or not turns else turns[0]
        prompts.append(
            tokenizer.apply_chat_template(
                row["messages"][:first], tools=row["tools"], add_generation_prompt=True, return_dict=False
            )
        )
    return prompts


def document_starts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], count: int) -> list[list[int]]:
    """Token ids of the first quarter of up to `count` documents, for the model to continue."""
    starts = []
    for row in rows[:count]:
        ids = tokenizer(row["text"][: max(8, len(row["text"]) // 4)], verbose=False)["input_ids"]
        starts.append(ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids)
    return starts


def encode_document(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], *, block_size: int, end: bool = True
) -> list[Sample]:
    """Encode one document for pretraining, with its end token, in pieces of at most `block_size` tokens.

    No token is lost: a document longer than a block continues in the next piece.

    Args:
        tokenizer: adds its own BOS if it has one.
        row: the document as `text`.
        block_size: maximum number of tokens of a piece.
        end: append the end-of-text token.
    """
    ids = tokenizer(row["text"], add_special_tokens=True, verbose=False)["input_ids"]
    if end and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    return [Sample(ids[at : at + block_size], ids[at : at + block_size]) for at in range(0, len(ids), block_size)]
