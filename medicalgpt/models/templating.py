"""Install a chat template in a tokenizer, and check that it renders what training and serving need."""

import itertools
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

from medicalgpt.errors import UserError
from medicalgpt.models.tool_formats import TOOL_FORMATS, ToolFormat

import jinja2
from loguru import logger
from transformers import PreTrainedTokenizerBase

EOS = "{eos_token}"  # as Template.stop[0]: the turn ends with the tokenizer's eos_token
BOS = "{bos_token}"  # in a part of `_turns`: the tokenizer's BOS, if it puts one before plain text

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_COMMON_FORMS = ", ".join(name for name, form in TOOL_FORMATS.items() if not form.family_only)


class TemplateError(UserError, ValueError):
    """A chat template that is unknown, does not fit the tokenizer, or cannot be trained on."""


@dataclass(frozen=True)
class Template:
    """A chat template and what it requires.

    name: the value of --template_name.
    jinja: the source, with generation markers.
    stop: strings that end generation, each a single token. The first is the turn end, or `EOS`; the others apply if the
        vocabulary has them.
    source: where the official form is published.
    tokens: strings that must be single tokens of the vocabulary.
    tool_format: the name in `TOOL_FORMATS` of the format of its calls; None if it takes no tools or has a format of its
        own, so that calls stay text. Pass it with hand-written Jinja; templates made by `_turns` set it themselves and
        take any other format too.
    """

    name: str
    jinja: str
    stop: tuple[str, ...]
    source: str
    tokens: tuple[str, ...] = ()
    tool_format: str | None = None

    def __post_init__(self):
        for name, form in TOOL_FORMATS.items():
            if self.jinja.startswith(form.macros):
                object.__setattr__(self, "tool_format", name)

    def with_tools(self, tool_format: str | None) -> str:
        """The Jinja source with another tool format; None keeps its own. Raises TemplateError if it has no choice."""
        if tool_format in (None, self.tool_format):
            return self.jinja
        own = TOOL_FORMATS[self.tool_format].macros if self.tool_format else None
        if not own or not self.jinja.startswith(own):
            has = f"has the tool format of its family, {self.tool_format}" if self.tool_format else "has none to choose"
            raise TemplateError(f"the template {self.name} {has}: leave out --tool_format {tool_format}")
        if get_tool_format(tool_format).family_only:
            raise TemplateError(
                f"the template {self.name} is not of the family that has the tool format {tool_format}: "
                f"leave out --tool_format {tool_format}, or use one of {_COMMON_FORMS}"
            )
        return get_tool_format(tool_format).macros + self.jinja.removeprefix(own)


REFUSE_TOOLS = r"""
{%- if tools %}
    {{- raise_exception('tools were given, but ' ~ $reason) }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.tool_calls %}
        {{- raise_exception('message ' ~ loop.index ~ ' uses a tool, but ' ~ $reason) }}
    {%- endif %}
{%- endfor %}
"""


def _literal(value: str | bool | dict | None) -> str:
    """`value` as a Jinja literal on one line; in a string, `{eos_token}`, `{bos_token}` and `{round}` as variables.

    Non-ASCII characters are not escaped: Jinja would read the surrogate pairs of JSON's escapes as two characters.
    """
    if value is None:
        return "none"
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    pieces = [piece for piece in re.split(r"(\{(?:eos_token|bos_token|round)\})", value) if piece]
    names = {EOS: "eos_token", BOS: "bos_token", "{round}": "count.round"}
    written = [names.get(piece) or json.dumps(piece, ensure_ascii=False) for piece in pieces or [""]]
    return "(" + " ~ ".join(written) + ")"


def fill(jinja: str, **parts: str | bool | None) -> str:
    """Jinja source with each `$name` replaced by the part of that name, as a Jinja literal."""
    return string.Template(jinja).substitute({key: _literal(value) for key, value in parts.items()})


def get_tool_format(name: str) -> ToolFormat:
    """The tool format called `name`. Raises TemplateError with the known names if there is none."""
    if name not in TOOL_FORMATS:
        raise TemplateError(f"there is no tool format called {name!r}: use one of {_COMMON_FORMS}")
    return TOOL_FORMATS[name]


# Conversations that distinguish templates, with the strings that show that a template renders them at all.
_ANSWER = "Drink water. 多喝水。"
_SYSTEM = {"role": "system", "content": "Be brief. 简短。"}
_USER = {"role": "user", "content": "I have a headache."}
_ASSISTANT = {"role": "assistant", "content": _ANSWER}
_SECOND = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Sleep well."}]
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "查 a drug <b>",
        "parameters": {"type": "object", "properties": {"drug": {"type": "string"}}, "required": ["drug"]},
    },
}
_CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"drug": "阿司匹林"}}}
_TOOL_USE = [
    _USER,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "100 mg"},
    _ASSISTANT,
]
# Mistral's published templates require an id of nine characters.
_CALLING = {"role": "assistant", "content": "", "tool_calls": [{**_CALL, "id": "abcde1234"}]}
_THINKING = [
    _USER,
    {"role": "assistant", "content": "Rest.", "reasoning_content": "first thought"},
    _SECOND[0],
    {"role": "assistant", "content": "Sleep well.", "reasoning_content": "second thought"},
]
_THINKING_INLINE = [
    _USER,
    {"role": "assistant", "content": "<think>\nfirst thought\n</think>\n\nRest."},
    _SECOND[0],
    {"role": "assistant", "content": "<think>\nsecond thought\n</think>\n\nSleep well."},
]
_CONVERSATIONS = ([_USER, _ASSISTANT], [_SYSTEM, _USER, _ASSISTANT], [_USER, _ASSISTANT, *_SECOND])
PROBES: list[tuple[list[dict], dict, tuple[str, ...]]] = [
    *((conversation, {}, ()) for conversation in _CONVERSATIONS),
    ([_USER], {"add_generation_prompt": True}, ()),
    ([_USER, _ASSISTANT, _USER], {"add_generation_prompt": True, "enable_thinking": False}, ()),
    (_TOOL_USE, {"tools": [_TOOL]}, ("look_up", "100 mg")),
    ([_SYSTEM, *_TOOL_USE, *_SECOND], {"tools": [_TOOL]}, ("look_up", "100 mg")),
    (_THINKING, {}, ("second thought",)),
    (_THINKING_INLINE, {}, ("second thought",)),
]

REFUSALS = (jinja2.TemplateError, TypeError, KeyError, ValueError)


def render_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **kwargs) -> str | None:
    """The text of a conversation, or None if the template refuses it."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except REFUSALS:
        return None


def special_tokens_in(
    tokenizer: PreTrainedTokenizerBase, value: Any, stop_ids: Set[int] = frozenset(), *, trusted: bool = False
) -> list[str]:
    """The special tokens contained in the texts of a value, which a tokenizer would read as, say, the end of a turn.

    Besides the tokens that the tokenizer flags as special these are the added tokens that its chat template writes and
    those that end an answer: many tokenizers do not flag them, and read them all the same. Unflagged tokens that
    delimit a thought do not count: answers have them, and prompts name them to ask for that format.

    Args:
        value: a text, or what JSON can hold; names of fields are searched too.
        stop_ids: further tokens that end an answer.
        trusted: the text is an answer, or what the operator wrote (a system prompt, tools): unflagged tokens that
            delimit tools, calls and their results do not count there. In the text of a user, a tool or a document they
            would pass for a call or a result.

    Returns:
        Each token once, in the order of the texts.
    """
    pattern = _special_token_patterns(tokenizer, frozenset(stop_ids))[trusted]
    return list(dict.fromkeys(token for text in _texts(value) for token in pattern.findall(text)))


def is_trusted(role: str | None) -> bool:
    """Whether turns of this role may hold marks of calls, see `special_tokens_in`."""
    return role in ("assistant", "system", "developer")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(name)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif value is not None and not isinstance(value, bool | int | float):
        yield str(value)


# The patterns of each tokenizer, with what they were made of: a row must not cost a look at the entire vocabulary.
_patterns: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, tuple[re.Pattern, re.Pattern]]] = WeakKeyDictionary()
_REASONING_MARK = re.compile(r"think|thought|reason", re.IGNORECASE)
_LOOKS_LIKE_A_MARK = re.compile(r"[^\w\s].*\w.*[^\w\s]")


def _special_token_patterns(
    tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]
) -> tuple[re.Pattern, re.Pattern]:
    """What is refused in any text, and what is refused in a trusted one."""
    made_of = (tokenizer.chat_template, len(tokenizer), tuple(tokenizer.all_special_tokens), stop_ids)
    if _patterns.get(tokenizer, (None,))[0] != made_of:
        tokens, marks = _special_tokens(tokenizer, stop_ids)
        _patterns[tokenizer] = made_of, (_any_of(tokens | marks), _any_of(tokens))
    return _patterns[tokenizer][1]


def _any_of(tokens: Set[str]) -> re.Pattern:
    # Without any token, a pattern that never matches.
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _special_tokens(tokenizer: PreTrainedTokenizerBase, stop_ids: Set[int]) -> tuple[set[str], set[str]]:
    """Tokens that no text may hold, and the marks of tools and calls that trusted texts may."""
    template = tokenizer.chat_template or ""
    # Rendered as well, since a template may put a token together, as in '<|' + role + '|>'. The stops are in the facts.
    written = [template if isinstance(template, str) else " ".join(template.values())]
    written += [render_text(tokenizer, messages, **kwargs) or "" for messages, kwargs, _ in PROBES] if template else []
    marks_of_calls = {mark for form in TOOL_FORMATS.values() for mark in form.marks}
    tokens, marks = set(), set()
    for token_id, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        # Added tokens may also be ordinary words or line breaks, which a template may hold.
        delimits = _LOOKS_LIKE_A_MARK.fullmatch(text) and not _REASONING_MARK.search(text)
        if text and token.special:
            tokens.add(text)
        elif text and delimits and (token_id in stop_ids or any(text in part for part in written)):
            (marks if text in marks_of_calls else tokens).add(text)
    return tokens, marks


def _is_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == text


def _missing(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[str]:
    missing = [token for token in template.tokens if not _is_token(tokenizer, token)]
    return missing + (["an eos_token"] if template.stop[0] == EOS and tokenizer.eos_token is None else [])


def usable_templates(tokenizer: PreTrainedTokenizerBase, catalogue: Mapping[str, Template]) -> str:
    """Names of the templates in the catalogue whose tokens the vocabulary has, as text."""
    names = [name for name, template in catalogue.items() if not _missing(tokenizer, template)]
    return ", ".join(names) or "none until the tokenizer gets an eos_token"


def _recognise(tokenizer: PreTrainedTokenizerBase, catalogue: Mapping[str, Template]) -> Template | None:
    """The first template of the catalogue that writes the same text as the tokenizer's own, apart from the BOS.

    Probes that the own template refuses, or whose tools or reasoning it does not render, do not count.
    """
    own = [render_text(tokenizer, messages, bos_token="", **kwargs) for messages, kwargs, _ in PROBES]
    if own[0] is None:
        return None
    for template in catalogue.values():
        if _missing(tokenizer, template):
            continue
        for (messages, kwargs, marks), text in zip(PROBES, own, strict=True):
            if text is None or any(mark not in text for mark in marks):
                continue
            ours = render_text(tokenizer, messages, bos_token="", chat_template=template.jinja, **kwargs)
            # GLM's published templates end with the last answer: the token of the next role ends its turn.
            if ours is None or text not in (ours, ours.removesuffix(template.stop[0])):
                break
        else:
            return template
    return None


# apply_template records what it installed in the first two lines of the template: the first sets the facts, the second
# uses them.
_FACTS = "{%- set medicalgpt = "
_BAKE_SYSTEM = (
    "{%- if medicalgpt.system and messages[0].role != 'system' %}"
    "{%- set messages = [{'role': 'system', 'content': medicalgpt.system}] + messages %}{%- endif %}"
)


# Contents in parts become one text each, with the tokens of an image where it is.
_IMAGE_PARTS = r"""{%- set turns = namespace(all=[]) %}
{%- for message in messages %}
    {%- if message.content is string or not message.content %}
        {%- set turns.all = turns.all + [message] %}
    {%- else %}
        {%- set text %}
            {%- for part in message.content %}
                {%- if part.type in ('image', 'image_url') %}
                    {{- $image }}
                {%- elif part.type == 'text' %}
                    {{- part.text }}
                {%- else %}
                    {{- raise_exception('a part of the type ' ~ part.type ~ ' cannot be shown to the model') }}
                {%- endif %}
            {%- endfor %}
        {%- endset %}
        {%- set turns.all = turns.all + [dict(message, content=text)] %}
    {%- endif %}
{%- endfor %}
{%- set messages = turns.all %}
"""


def with_image_parts(tokenizer: PreTrainedTokenizerBase, image: str) -> str:
    """The chat template of a tokenizer, such that it writes contents in parts too, as programs with images send them.

    Args:
        image: what is written for an image.
    """
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    as_text = [{"role": "user", "content": f"{image}What?"}]
    template = tokenizer.chat_template
    if render_text(tokenizer, question) == render_text(tokenizer, as_text):
        return template
    facts, body = _split(template)
    head = template.removesuffix(body) if facts else ""
    return head + fill(_IMAGE_PARTS, image=image) + body


def _split(chat_template: str) -> tuple[dict, str]:
    """The facts that apply_template wrote into a template ({} if it did not) and the template without them."""
    if not chat_template.startswith(_FACTS):
        return {}, chat_template
    facts, _, body = chat_template.split("\n", 2)
    return json.loads(facts.removeprefix(_FACTS).removesuffix(" %}")), body


def _fix_bos(tokenizer: PreTrainedTokenizerBase, body: str, keep: bool) -> str:
    """`body` with exactly the BOS that the tokenizer puts before plain text, since apply_chat_template adds none.

    keep: keep a BOS that the template writes although the tokenizer would not, as some published chat models need it.
    """
    if tokenizer.bos_token is None:
        return body
    text = render_text(tokenizer, [_USER], chat_template=body)
    without = render_text(tokenizer, [_USER], chat_template=body, bos_token="")
    if text is None or without is None:
        return body
    writes = text != without
    adds = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    # A template may spell out its BOS, or begin each turn with the tokenizer's BOS.
    wants = not without.startswith(tokenizer.bos_token) and (adds or (keep and writes))
    if writes == wants:
        return body
    return ("{{- bos_token }}" if wants else "{%- set bos_token = '' %}") + body


def _spans(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[list[int], list[tuple[int, int, str]]]:
    """Token ids of a conversation and its supervised spans: (first position, position after the last, text)."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    batch = tokenizer.apply_chat_template(
        messages,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    spans = []
    for supervised, run in itertools.groupby(range(len(batch["input_ids"])), key=batch["assistant_masks"].__getitem__):
        if supervised:
            positions = list(run)
            offsets = [batch["offset_mapping"][position] for position in positions]
            start, end = min(o[0] for o in offsets), max(o[1] for o in offsets)
            spans.append((positions[0], positions[-1] + 1, text[start:end]))
    return batch["input_ids"], spans


def _check(tokenizer: PreTrainedTokenizerBase, turn_end: str | None) -> str:
    """Check on probe conversations that the installed template can be trained on, and return its turn end.

    turn_end: what every supervised span must end with; None takes it from the first span.
    Raises TemplateError that names the defect.
    """
    for conversation in _CONVERSATIONS:
        if conversation is not _CONVERSATIONS[0] and render_text(tokenizer, conversation) is None:
            continue
        ids, spans = _spans(tokenizer, conversation)
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            raise TemplateError(f"the text begins with two BOS tokens ({tokenizer.bos_token})")
        answers = [message["content"] for message in conversation if message["role"] == "assistant"]
        if len(spans) != len(answers):
            raise TemplateError(
                f"{len(answers)} assistant turns gave {len(spans)} supervised spans: the {{% generation %}} block must "
                "enclose each turn's answer, outside macros, and the tokenizer's post-processor must not trim offsets"
            )
        whole = render_text(tokenizer, conversation)
        ends = [n for n, message in enumerate(conversation, start=1) if message["role"] == "assistant"]
        if not all(whole.startswith(render_text(tokenizer, conversation[:end])) for end in ends):
            # If later turns change earlier ones, each answer is trained as the last one of its text.
            answers, spans = answers[-1:], spans[-1:]
        for number, (answer, (_, after, text)) in enumerate(zip(answers, spans, strict=True), start=1):
            before, found, end = text.partition(answer)
            if not found or re.sub(r"<think>\s*</think>", "", before).strip():
                raise TemplateError(f"the supervised text is {text!r}, where it should be {answer!r} and the turn end")
            if not end and number < len(answers) and tokenizer.convert_ids_to_tokens(ids[after]) != turn_end:
                continue  # a family that closes the last turn only: each turn is then trained as the last
            last = tokenizer.convert_ids_to_tokens(ids[after - 1])
            turn_end = turn_end or last
            if last != turn_end or end.lstrip() != turn_end or ids[after - 1] not in tokenizer.added_tokens_decoder:
                raise TemplateError(
                    f"the supervised text is {text!r}: it must end with one special token that ends the turn"
                    f"{f' ({turn_end})' if turn_end in tokenizer.get_added_vocab() else ''}, and nothing after it"
                )
        prompt, thoughtless = (
            tokenizer.apply_chat_template(conversation[:-1], add_generation_prompt=True, return_dict=False, **kwargs)
            for kwargs in ({}, {"enable_thinking": False})
        )
        # The answers have no reasoning, which some thinking models give only to the prompt without thinking.
        if ids[: spans[-1][0]] not in (prompt, thoughtless):
            raise TemplateError(
                "training and inference disagree: the text before the answer is "
                f"{tokenizer.decode(ids[: spans[-1][0]])!r} in training, {tokenizer.decode(prompt)!r} in inference"
            )
    return turn_end


def _read_tool_format(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tool format in which the tokenizer's template writes a call: the one that parses it. None if none does."""
    prompt = render_text(tokenizer, [_USER], tools=[_TOOL], add_generation_prompt=True)
    text = render_text(tokenizer, [_USER, _CALLING], tools=[_TOOL])
    if prompt is None or text is None or not text.startswith(prompt):
        return None
    marks = {mark for form in TOOL_FORMATS.values() for mark in form.marks}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    # The turn ends with the first special token; some families write more after it.
    ends = "|".join(map(re.escape, special - marks)) or "$"
    answer = re.split(ends, text.removeprefix(prompt))[0]
    for form in TOOL_FORMATS.values():
        if [call["function"] for call in form.parse(answer, [_TOOL])[1]] == [_CALL["function"]]:
            return form.name
    return None


def _unknown_marks(tokenizer: PreTrainedTokenizerBase, tool_format: str | None) -> str:
    """The marks of a tool format that the tokenizer would encode as its unknown token."""
    marks = TOOL_FORMATS[tool_format].marks if tool_format and tokenizer.unk_token_id is not None else ()
    return ", ".join(
        mark for mark in marks if tokenizer.unk_token_id in tokenizer.encode(mark, add_special_tokens=False)
    )


def tool_format_of(tokenizer: PreTrainedTokenizerBase) -> ToolFormat | None:
    """The tool format of the tokenizer's chat template, whose `parse` reads its answers; None if there is none."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    facts, _ = _split(tokenizer.chat_template)
    # For templates that apply_template did not install, an example shows it.
    name = facts["tool_format"] if "tool_format" in facts else _read_tool_format(tokenizer)
    return TOOL_FORMATS.get(name)


def _require_tokens(tokenizer: PreTrainedTokenizerBase, template: Template, catalogue: Mapping[str, Template]) -> None:
    """Raises TemplateError if the vocabulary lacks tokens that a template needs."""
    if missing := _missing(tokenizer, template):
        raise TemplateError(
            f"the template {template.name} needs {', '.join(missing)}, which this tokenizer does not have as "
            f"single tokens: add them, or use --template_name with one of: {usable_templates(tokenizer, catalogue)}"
        )


def _own_template(
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Mapping[str, Template],
    facts: dict,
    body: str,
    tool_format: str | None,
) -> Template | None:
    """The shipped template that writes the same text as the tokenizer's own; None where its own can be trained on.

    facts, body: the own template as `_split` returns it.

    Raises TemplateError if it has none, or one without generation markers that no shipped template replaces.
    """
    own = tokenizer.chat_template
    if not own:
        raise TemplateError(
            "the tokenizer has no chat template: pass --template_name with one of: "
            f"{usable_templates(tokenizer, catalogue)}"
        )
    if GENERATION.search(body):
        return catalogue.get(facts.get("template")) if tool_format not in (None, facts.get("tool_format")) else None
    template = _recognise(tokenizer, catalogue)
    if template is None:
        if isinstance(own, dict):
            defect = f"it is a set of templates ({', '.join(own)}), where training needs one"
        else:
            defect = "it has no {% generation %} markers, which separate answers from prompts"
        raise TemplateError(f"{defect}, and none of the shipped templates writes the same text")
    logger.info("the tokenizer's own chat template is {}: installed with markers for training", template.name)
    return template


def install_template(
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None,
    catalogue: Mapping[str, Template],
    system_prompt: str | None,
    tool_format: str | None,
) -> tuple[str, ...]:
    """Install `template`, or prepare the tokenizer's own if it is None; return the stop strings, turn end first.

    catalogue: the shipped templates by name, among which the tokenizer's own is looked up.
    system_prompt: of conversations without one; None keeps the one that the tokenizer's template has.

    Raises any of `REFUSALS`; the tokenizer may then be changed.
    """
    own = tokenizer.chat_template
    facts, body = _split(own) if isinstance(own, str) else ({}, "")
    writes_bos = False
    if template is not None:
        _require_tokens(tokenizer, template, catalogue)
    else:
        template = _own_template(tokenizer, catalogue, facts, body, tool_format)
        writes_bos = render_text(tokenizer, [_USER]) != render_text(tokenizer, [_USER], bos_token="")

    system = system_prompt or facts.get("system", "")
    expected, extra, form = None, (), facts.get("tool_format")
    if template:
        expected, extra = template.stop[0], template.stop[1:]
        kept = form if template.name == facts.get("template") else None
        form = tool_format or kept or template.tool_format
        body = template.with_tools(form)
        if unknown := _unknown_marks(tokenizer, form):
            reason = f"the vocabulary has no tokens for {unknown}, of which the tool format {form} is made"
            if tool_format:
                raise TemplateError(f"--tool_format {tool_format} cannot be used: {reason}")
            form, body = None, fill(REFUSE_TOOLS, reason=reason) + body
    fixed = _fix_bos(tokenizer, body, keep=writes_bos)
    if fixed != body and not template:
        logger.info("the tokenizer's own chat template now has exactly the BOS that the tokenizer adds to plain text")
    tokenizer.chat_template = fixed
    turn_end = _check(tokenizer, tokenizer.eos_token if expected == EOS else expected)
    if not template and "tool_format" not in facts:
        form = _read_tool_format(tokenizer)
    if tool_format not in (None, form):
        raise TemplateError(
            f"it has {f'the tool format {form}' if form else 'no known tool format'}, which --tool_format "
            f"{tool_format} cannot change: leave the flag out"
        )
    if not template and not facts and not system and fixed == body and turn_end == tokenizer.eos_token:
        tokenizer.chat_template = own
        return (turn_end,)

    extra = [text for text in extra if _is_token(tokenizer, text)]
    stop = list(dict.fromkeys([turn_end, *extra, *facts.get("stop", ()), tokenizer.eos_token or turn_end]))
    label = template.name if template else facts.get("template", "own")
    tokenizer.chat_template = "\n".join(
        (
            _FACTS + _literal({"template": label, "stop": stop, "system": system, "tool_format": form or ""}) + " %}",
            _BAKE_SYSTEM,
            fixed,
        )
    )
    tokenizer.eos_token = turn_end
    _check(tokenizer, turn_end)
    return tuple(stop)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, stop: Iterable[str]) -> list[int]:
    """Ids for `generation_config.eos_token_id`: those of `stop` in order (turn end first), then the tokenizer's EOS.

    Raises TemplateError if a stop string is not one token of the vocabulary, as generation could not stop at it.
    """
    stop = list(stop)
    if broken := [text for text in stop if not _is_token(tokenizer, text)]:
        raise TemplateError(
            f"{', '.join(map(repr, broken))}: not one token of this tokenizer, so generation cannot stop there"
        )
    ids = tokenizer.convert_tokens_to_ids(stop)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ids))


def reply_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: Iterable[int]) -> str:
    """The text of a generated reply: up to its first stop token, without special tokens.

    Not every tokenizer flags its stop tokens as special, and some flag `<think>`, which is part of the reply.
    """
    stops = set(stop_ids)
    tags = set(tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<answer>", "</answer>"]))
    hidden = set(tokenizer.all_special_ids) - (tags - {tokenizer.unk_token_id})
    kept = [token for token in takewhile(lambda token: token not in stops, ids) if token not in hidden]
    return tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
