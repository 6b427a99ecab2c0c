"""From converted rows to token ids and labels.

The tokenizer's chat template renders every conversation, here and in serving, so the two cannot differ. The ids before
an answer are the ids that serving would send as the prompt, the answer follows them as in generation and is supervised
up to its turn end, and the entire row fits.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from medicalgpt.data.images import Picture, parts_of, pictures_of, write_image_tokens
from medicalgpt.models.templating import is_trusted, special_tokens_in
from medicalgpt.models.vision import ImageTokens
from medicalgpt.readers.problems import shorten

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

IGNORED = -100
# The remedy for a row that is too long, where nothing is known of the model's positions.
MAKE_ROOM = "Raise --model_max_length, or shorten the row"


@dataclass(frozen=True)
class Sample:
    """Token ids of one sequence and its labels: the id where a token is supervised, -100 where not."""

    input_ids: list[int]
    labels: list[int]

    @property
    def tokens(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class ImageSample(Sample):
    """A `Sample` with the paths of its images, in their order; none for a sample of text alone."""

    pictures: list[str] = field(default_factory=list)


class ShortenedSamples(list[Sample]):
    """The samples of a conversation that keeps only its first exchanges; the entire one has `tokens` tokens."""

    def __init__(self, samples: list[Sample], tokens: int):
        super().__init__(samples)
        self.tokens = tokens


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and of two answers to it, each with its turn end."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def tokens(self) -> int:
        """With the longer answer."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, up to the start of the answer."""

    prompt_ids: list[int]

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids)


class EncodingError(ValueError):
    """A row that cannot be encoded.

    Attributes:
        reason, remedy: as in `data.Problem`.
        too_long: whether that is the reason.
        tokens: of the entire row, if it is too long; 0 if that is not known.
    """

    def __init__(self, reason: str, remedy: str, too_long: bool = False, tokens: int = 0):
        super().__init__(reason)
        self.reason, self.remedy, self.too_long, self.tokens = reason, remedy, too_long, tokens


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    row: dict[str, Any],
    *,
    max_length: int | None = None,
    train_on_inputs: bool = False,
    mask_history: bool = False,
    shorten_rows: bool = False,
    images: ImageTokens | None = None,
) -> list[Sample]:
    """Encode one conversation; only assistant text and its turn end are supervised, each turn once.

    Every prompt has the ids that serving sends, and its answer is encoded apart from it, as in generation. One sample
    has all turns whose prompts are, id by id, the beginning of it. Another turn becomes a separate sample: templates of
    thinking models drop the thoughts of earlier turns, and the first characters of an answer may become one token with
    the prompt before it once the answer is history.

    Args:
        tokenizer: with a chat template that marks assistant text by `{% generation %}`.
        row: `messages` in OpenAI form, ending with the assistant, and `tools` in OpenAI form or None. A turn of the
            assistant with `train` False is context for later ones and is not supervised.
        max_length: in tokens; a longer sequence is refused, and no answer is ever truncated.
        train_on_inputs: supervise the prompts too, each in one sample only.
        mask_history: supervise the last turn only.
        shorten_rows: of a conversation that is too long, encode the first exchanges that fit, each whole: from a
            question to the answer before the next one. With `mask_history` such a row is still refused, since its end
            is what it was to train.
        images: how the row's `images` become tokens, which are never supervised; None if rows have none.

    Returns:
        The samples in the order of their turns, as `ShortenedSamples` if exchanges were left out; `ImageSample`s with
        `images`.

    Raises:
        EncodingError: too long, refused by the template, or no turn to be trained.
    """
    messages, tools = row["messages"], row["tools"]
    refuse_special_tokens(tokenizer, messages, tools)
    encode = partial(_encode_turns, tokenizer, tools=tools, train_on_inputs=train_on_inputs, mask_history=mask_history)
    pictures = pictures_of(row)
    finish = partial(_with_pictures, pictures=pictures, images=images) if images else list
    if pictures:
        messages = write_image_tokens(messages, pictures, images)
    samples = encode(messages)
    tokens = _longest(samples)
    if max_length is None or tokens <= max_length:
        return finish(samples)
    if shorten_rows and not mask_history and (kept := _first_exchanges(encode, messages, max_length)):
        return ShortenedSamples(finish(kept), tokens)
    raise _too_long(tokens, max_length, sum(images.count(each.width, each.height) for each in pictures))


def _with_pictures(samples: list[Sample], pictures: Sequence[Picture], images: ImageTokens) -> list[ImageSample]:
    """The samples with the images that each holds, the tokens of which are not supervised.

    Raises:
        EncodingError: the template does not write them all.
    """
    pad, start, _ = images.ids
    finished = []
    for sample in samples:
        # Texts hold no such tokens, and a sample begins with the first turn.
        own = pictures[: sample.input_ids.count(start)]
        if sample.input_ids.count(pad) != sum(images.count(each.width, each.height) for each in own):
            raise EncodingError("the chat template leaves out an image", "Choose another --template_name")
        labels = [
            IGNORED if token in images.ids else label
            for token, label in zip(sample.input_ids, sample.labels, strict=True)
        ]
        finished.append(ImageSample(sample.input_ids, labels, [each.path for each in own]))
    return finished


def _longest(samples: Sequence[Sample]) -> int:
    return max(sample.tokens for sample in samples)


def _first_exchanges(
    encode: Callable[[Sequence[dict[str, Any]]], list[Sample]], messages: Sequence[dict[str, Any]], max_length: int
) -> list[Sample]:
    """The samples of as many exchanges from the beginning as fit; none if the first is too long or trains nothing."""
    ends = [
        number
        for number, message in enumerate(messages)
        if number and message["role"] in ("system", "user") and messages[number - 1]["role"] == "assistant"
    ]
    is_trained = [message["role"] == "assistant" and message.get("train", True) for message in messages]
    ends = [end for end in ends if any(is_trained[:end])]
    # More exchanges have more tokens, so the last that fits can be bisected.
    count = bisect_left(ends, True, key=lambda end: _longest(encode(messages[:end])) > max_length)
    return encode(messages[: ends[count - 1]]) if count else []


def _encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    *,
    tools: Sequence[dict[str, Any]] | None,
    train_on_inputs: bool,
    mask_history: bool,
) -> list[Sample]:
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [turn for turn in (turns[-1:] if mask_history else turns) if messages[turn].get("train", True)]
    if not trained:
        remedy = "Remove the row, or omit --mask_history" if mask_history else "Remove the row"
        raise EncodingError(f"its {'last' if mask_history else 'every'} answer is not to be trained on", remedy)
    # `train` is for us; a template must not see it.
    messages = [{name: item for name, item in message.items() if name != "train"} for message in messages]
    # With the prompts, also the one before a last answer that is context only; it ends where the answer begins.
    ends = [*trained, *turns[-1:]] if train_on_inputs and turns[-1] not in trained else trained
    try:
        rendered = {turn: _render_turn(tokenizer, messages, tools, turn) for turn in ends}
    except TemplateError as error:
        raise EncodingError(
            f"the chat template refuses it: {error}", "Fix the row, or choose another --template_name"
        ) from error
    _refuse_unsaid(messages, rendered)
    for turn in ends:
        _check_prompt(rendered[turn])
    samples: list[Sample] = []
    left = list(ends)
    while left:
        last = rendered[left[-1]]
        encoded = encode_apart(tokenizer, last.text, last.start)
        group = [turn for turn in left[:-1] if _continues(tokenizer, encoded, last.text, rendered[turn])] + left[-1:]
        supervised, prompts, before = [], [], 0
        for turn, span in zip(turns, last.spans, strict=False):
            start, end = map(encoded.token_at, span)
            prompts.append((before, start))
            if turn in group:
                supervised += prompts if train_on_inputs else []
                supervised += [(start, end)] if turn in trained else []
            if turn in ends:
                # Prompts of other turns are supervised with the next one.
                prompts = []
            before = end
        ids = encoded.ids if left[-1] in trained else encoded.ids[: encoded.token_at(last.start)]
        if train_on_inputs and left[-1] in trained:
            supervised.append((before, len(ids)))
        labels = [IGNORED] * len(ids)
        for start, end in supervised:
            labels[start:end] = ids[start:end]
        samples.append(Sample(ids, labels))
        left = [turn for turn in left if turn not in group]
    return samples[::-1]


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
        except EncodingError as error:
            raise EncodingError(f"the {name} answer: {error.reason}", error.remedy) from error
        # What a template writes after the turn end is not part of the pair.
        ((start, end),) = _spans([label != IGNORED for label in sample.labels])
        prompts.append(sample.input_ids[:start])
        answers.append(sample.input_ids[start:end])
    tokens = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    for name, prompt, answer in zip(("chosen", "rejected"), prompts, answers, strict=True):
        if max_length is not None and len(prompt) + len(answer) > max_length:
            error = _too_long(len(prompt) + len(answer), max_length)
            raise EncodingError(f"the {name} answer: {error.reason}", error.remedy, too_long=True, tokens=tokens)
        for what, count, limit, flag in (
            ("prompt", len(prompt), max_source_length, "--max_source_length"),
            (f"{name} answer", len(answer), max_target_length, "--max_target_length"),
        ):
            if limit is not None and count > limit:
                raise EncodingError(
                    f"the {what} has {count} tokens, more than {flag} {limit}",
                    f"Raise {flag}, or shorten the row",
                    too_long=True,
                    tokens=tokens,
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
            MAKE_ROOM,
            too_long=True,
            tokens=len(ids),
        )
    return [Prompt(list(ids))]


def _refuse_unsaid(messages: Sequence[dict[str, Any]], rendered: "dict[int, _Rendered]") -> None:
    """Raises EncodingError if the template silently drops a system turn, or the reasoning of an answer."""
    for turn, text in ((turn, each.answered) for turn, each in rendered.items()):
        for number, message in enumerate(messages[: turn + 1]):
            said = message["content"] if message["role"] == "system" else ""
            what, remedy = f"turn {number + 1} (system)", "Write it into the user's turn, or remove it"
            if number == turn and message.get("reasoning_content"):
                said, what = message["reasoning_content"], f"the reasoning of turn {number + 1}"
                remedy = "Use the --template_name of a thinking model (qwen3), or remove the reasoning"
            if said.strip() not in text:
                raise EncodingError(f"the chat template leaves out {what}", remedy)


@dataclass(frozen=True)
class _Rendered:
    """A conversation up to a turn of the assistant.

    Attributes:
        prompt: what serving would send to get this turn.
        text: the prompt, the turn, and what the template writes after it at the end of a conversation.
        spans: the turns of the assistant in the text, each with its turn end: (first character, after the last).
    """

    prompt: str
    text: str
    spans: list[tuple[int, int]]

    @property
    def start(self) -> int:
        """Where the turn begins in the text."""
        return self.spans[-1][0]

    @property
    def answered(self) -> str:
        """The text without what follows the turn end, which is not there when more turns follow."""
        return self.text[: self.spans[-1][1]]


def _render_turn(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Sequence | None, turn: int
) -> _Rendered:
    prompt = tokenizer.apply_chat_template(
        list(messages[:turn]), tools=tools, tokenize=False, add_generation_prompt=True
    )
    return _Rendered(prompt, *_render_marked(tokenizer, messages[: turn + 1], tools))


def _render_marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Sequence | None
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where its assistant turns are in it."""
    (text,), (marked,) = render_jinja_template(
        [list(messages)],
        tools=tools,
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    spans: list[tuple[int, int]] = []
    for start, end in marked:
        # A template may mark a turn in several pieces. Turns are never adjacent: a user or tool turn is between them.
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        elif start < end:
            spans.append((start, end))
    return text, spans


def _check_prompt(turn: _Rendered) -> None:
    """Raises EncodingError if the supervised part is not what serving would have the model generate."""
    prompt = turn.prompt
    if turn.text.startswith(prompt) and turn.start == len(prompt):
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
        f"the template writes {shorten(turn.text[: turn.start][-40:])!r} before this answer, and "
        f"{shorten(prompt[-40:])!r} in serving",
        "Choose another --template_name, or change the answer",
    )


@dataclass(frozen=True)
class EncodedText:
    """Token ids of a text and the characters that each stands for: (first, after the last)."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def token_at(self, character: int) -> int:
        """The first token that begins at this character or later."""
        return bisect_left(self.offsets, character, key=lambda offset: offset[0])


def encode_apart(tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> EncodedText:
    """Encode a rendered text whose answer begins at the character `start`, as serving and generation do.

    The ids before `start` are those of the prompt alone, even if the tokenizer would join characters over that border.
    """
    encoded = _encode_text(tokenizer, text)
    if _begins_with_prompt(tokenizer, encoded, text, start):
        return encoded
    prompt, answer = _encode_text(tokenizer, text[:start]), _encode_continuation(tokenizer, text[start:])
    return EncodedText(
        prompt.ids + answer.ids,
        prompt.offsets + [(first + start, after + start) for first, after in answer.offsets],
    )


def encode_answered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None
) -> list[int]:
    """Token ids of a conversation that ends with an answer, up to its turn end; its template marks assistant text.

    Raises:
        EncodingError: refused by the template.
    """
    try:
        text, spans = _render_marked(tokenizer, messages, tools)
    except TemplateError as error:
        raise EncodingError(f"the chat template refuses it: {error}", "Fix the row") from error
    start, end = spans[-1]
    return encode_apart(tokenizer, text[:end], start).ids


def _continues(tokenizer: PreTrainedTokenizerBase, encoded: EncodedText, text: str, turn: _Rendered) -> bool:
    """Whether a conversation begins with an earlier turn and its prompt, both as text and in the ids of the prompt."""
    return (
        text.startswith(turn.prompt)
        and text.startswith(turn.answered)
        and _begins_with_prompt(tokenizer, encoded, text, turn.start)
    )


def _begins_with_prompt(tokenizer: PreTrainedTokenizerBase, encoded: EncodedText, text: str, end: int) -> bool:
    """Whether the first ids of an encoded text are those of its first `end` characters alone."""
    at = encoded.token_at(end)
    if at and encoded.offsets[at - 1][1] > end:
        return False
    # Tokenizers split a text at added tokens before anything else, so what precedes the last of them is the same.
    added = _added_ids(tokenizer)
    last = next((number for number in range(at - 1, -1, -1) if encoded.ids[number] in added), None)
    first = 0 if last is None else encoded.offsets[last][0]
    return encoded.ids[last or 0 : at] == _encode_text(tokenizer, text[first:end]).ids


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> EncodedText:
    """As `apply_chat_template` encodes what it has rendered."""
    # The length is checked elsewhere; the tokenizer's own warning would only confuse.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return EncodedText(encoded["input_ids"], encoded["offset_mapping"])


def _encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> EncodedText:
    """Encode a text that continues another: without the space that some tokenizers put before a text."""
    if not tokenizer.convert_ids_to_tokens(_encode_text(tokenizer, "x").ids)[0].startswith(("▁", "Ġ")):
        return _encode_text(tokenizer, text)
    for before in ("\n", "0", "。"):
        encoded = _encode_text(tokenizer, before + text)
        at = encoded.token_at(1)
        if encoded.offsets[at - 1][1] <= 1 and encoded.ids[:at] == _encode_text(tokenizer, before).ids:
            return EncodedText(encoded.ids[at:], [(first - 1, after - 1) for first, after in encoded.offsets[at:]])
    return _encode_text(tokenizer, text)


# The ids of each tokenizer's added tokens, with its size.
_added: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, frozenset[int]]] = WeakKeyDictionary()


def _added_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    size = len(tokenizer)
    if _added.get(tokenizer, (None,))[0] != size:
        _added[tokenizer] = size, frozenset(tokenizer.added_tokens_decoder)
    return _added[tokenizer][1]


def refuse_special_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None
) -> None:
    """Raises EncodingError if a text contains a special token, such as the end of a turn in the middle of it."""
    texts = [
        (f"turn {number}", message, is_trusted(message["role"])) for number, message in enumerate(messages, start=1)
    ]
    for where, value, trusted in [*texts, ("the column `tools`", tools or [], True)]:
        if found := special_tokens_in(tokenizer, value, trusted=trusted):
            raise EncodingError(
                f"{where} holds {', '.join(found)}, which this tokenizer reads as a special token",
                "Remove it from the text, or write it differently",
            )


def _too_long(tokens: int, max_length: int, of_images: int = 0) -> EncodingError:
    share = f" ({of_images} of them of images; --image_max_pixels lowers that)" if of_images else ""
    return EncodingError(
        f"{tokens} tokens{share}, longer than the {max_length} that fit",
        MAKE_ROOM,
        too_long=True,
        tokens=tokens,
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


def render_prompts(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    count: int,
    images: ImageTokens | None = None,
) -> list[list[int]]:
    """Token ids of the first prompts of up to `count` rows, spread evenly over them, as serving would render them.

    Args:
        images: how images become tokens, if rows have any.
    """
    return [
        tokenizer.apply_chat_template(
            write_image_tokens(messages, pictures_of(row), images) if images else messages,
            tools=row["tools"],
            add_generation_prompt=True,
            return_dict=False,
        )
        for row, messages in _first_prompts(rows, count)
    ]


def prompt_pictures(rows: Sequence[dict[str, Any]], count: int) -> list[list[Picture]]:
    """The images of each prompt that `render_prompts` renders."""
    return [
        pictures_of(row)[: sum(part["type"] == "image" for each in messages for part in parts_of(each["content"]))]
        for row, messages in _first_prompts(rows, count)
    ]


def _first_prompts(rows: Sequence[dict[str, Any]], count: int) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Up to `count` rows, each with the messages before its first answer."""
    step = max(1, len(rows) // max(count, 1))
    for row in rows[::step][:count]:
        turns = [number for number, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        # Rows of preferences and tasks have their answers outside of the prompt, which may have several turns.
        first = len(row["messages"]) if {"chosen", "columns"} & set(row) or not turns else turns[0]
        yield row, row["messages"][:first]


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
