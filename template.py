"""Named chat templates, and the one function that installs them into a tokenizer.

Text is rendered by `tokenizer.apply_chat_template` alone, in training and in serving. This file holds the Jinja
sources, each with `{% generation %}` markers around exactly the assistant's text and the token that ends its turn, so
that the loss mask needs no search for answers in the token ids.

    from template import apply_template, stop_token_ids

    stop = apply_template(tokenizer, "qwen")                # or no name: the tokenizer's own template
    model.generation_config.eos_token_id = stop_token_ids(tokenizer, stop)

All templates take the roles system, user, assistant and tool, `tools=`, `message.tool_calls` in the form of OpenAI
(arguments a dict or a JSON string) and `add_generation_prompt`. Contents are strings. What a template has no place for
(an unknown role, content in parts, reasoning where the family does not think) stops with an error and is not left out.

To add a template: one entry in `TEMPLATES`. A family that writes each turn as opening + content + closing needs one
call of `_turns`; others bring their own Jinja. `{% generation %}` must stand outside macros: transformers finds its
place in the text only there.
"""

import difflib
import itertools
import json
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass

from medicalgpt.errors import UserError

import jinja2
from loguru import logger
from transformers import PreTrainedTokenizerBase

EOS = "{eos_token}"  # as Template.stop[0]: the turn ends with whatever token the tokenizer calls eos_token


class TemplateError(UserError, ValueError):
    """A chat template that is unknown, does not suit the tokenizer, or could not be trained on."""


@dataclass(frozen=True)
class Template:
    """A chat template and what has to hold for it to work.

    name: the value of --template_name.
    jinja: the source, with generation markers.
    stop: strings that end generation, each one token. The first is the turn end, or `EOS`; the others count where the
        vocabulary has them.
    source: where the official form is published.
    tokens: strings that must be single tokens of the vocabulary.
    """

    name: str
    jinja: str
    stop: tuple[str, ...]
    source: str
    tokens: tuple[str, ...] = ()


# Fragments of Jinja shared by the templates. Every tag trims the whitespace before it, so their layout is not rendered.

_CHECK = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('message ' ~ loop.index ~ ' has the unknown role "' ~ message.role
            ~ '": use system, user, assistant or tool') }}
    {%- endif %}
    {%- if message.content is not string and (message.content or not message.tool_calls) %}
        {{- raise_exception('message ' ~ loop.index ~ ' (' ~ message.role
            ~ ') has no content, or content that is not a string') }}
    {%- endif %}
{%- endfor %}
"""

_NO_REASONING = """\
{%- for message in messages %}
    {%- if message.reasoning_content %}
        {{- raise_exception('message ' ~ loop.index ~ ' has reasoning_content, which this template cannot render: '
            ~ 'use the template qwen3, or write the reasoning into content') }}
    {%- endif %}
{%- endfor %}
"""

# The tool forms of Qwen2.5 and Qwen3, which are those of Hermes.
_TOOL_LIST = r"""
{{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
{%- for tool in tools %}
    {{- '\n' }}{{- tool | tojson }}
{%- endfor %}
{{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
{{- '<tool_call></tool_call> XML tags:\n<tool_call>\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
"""

_TOOL_CALLS = r"""
{%- for call in message.tool_calls or [] %}
    {%- set call = call.function or call %}
    {{- '\n' if content or not loop.first }}
    {{- '<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' }}
    {{- call.arguments if call.arguments is string else call.arguments | tojson }}
    {{- '}\n</tool_call>' }}
{%- endfor %}
"""

# Results that follow each other share one user turn.
_TOOL_RESULT = r"""
{{- $user_open if loop.first or loop.previtem.role != 'tool' else '\n' }}
{{- '<tool_response>\n' ~ message.content ~ '\n</tool_response>' }}
{{- $user_close if loop.last or loop.nextitem.role != 'tool' }}
"""

_TURNS = (
    _CHECK
    + _NO_REASONING
    + r"""
{%- set system = messages[0].content if messages[0].role == 'system' else $default_system %}
{%- if tools or system or (system is not none and $system_open) %}
    {{- $system_open }}{{- system or '' }}
    {%- if tools %}
        {{- '\n\n' if system is not none }}"""
    + _TOOL_LIST
    + r"""
    {%- endif %}
    {{- $system_close }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {%- if not $system_open %}
            {{- raise_exception('message ' ~ loop.index
                ~ ' is a system message: this template takes one only as the first') }}
        {%- endif %}
        {{- $system_open ~ message.content ~ $system_close }}
    {%- elif message.role == 'user' %}
        {{- $user_open ~ message.content ~ $user_close }}
    {%- elif message.role == 'tool' %}"""
    + _TOOL_RESULT
    + r"""
    {%- elif message.role == 'assistant' %}
        {%- set content = (message.content or '').removeprefix($lead) %}
        {{- $assistant_open }}
        {%- generation %}
            {{- $lead }}{{- content }}"""
    + _TOOL_CALLS
    + r"""
            {{- $end }}
        {%- endgeneration %}
        {{- $assistant_close }}
    {%- endif %}
{%- endfor %}
{{- $assistant_open if add_generation_prompt }}
"""
)


def _literal(value: str | dict | None) -> str:
    """`value` as a Jinja literal on one line, `EOS` as the variable eos_token.

    Characters beyond ASCII stay as they are: Jinja would read the surrogate pairs of JSON's escapes as two broken ones.
    """
    if value is None:
        return "none"
    return "eos_token" if value == EOS else json.dumps(value, ensure_ascii=False)


def _fill(jinja: str, **parts: str | None) -> str:
    return string.Template(jinja).substitute({key: _literal(value) for key, value in parts.items()})


def _turns(
    user: tuple[str, str],
    assistant: tuple[str, str],
    end: str = EOS,
    system: tuple[str, str] = ("", ""),
    default_system: str | None = None,
    lead: str = "",
) -> str:
    """Jinja for a family that writes each turn as (opening, closing) around its content.

    `end` is the turn end, `assistant[1]` what follows it, outside the supervised span. `lead` stands between the
    assistant's opening and its text and belongs to the span: a space, as tokenizers glue it to the first word. `system`
    with an empty opening allows a system message in first place only.
    """
    return _fill(
        _TURNS,
        system_open=system[0],
        system_close=system[1],
        default_system=default_system,
        user_open=user[0],
        user_close=user[1],
        assistant_open=assistant[0],
        assistant_close=assistant[1],
        lead=lead,
        end=end,
    )


_CHATML = {
    "system": ("<|im_start|>system\n", "<|im_end|>\n"),
    "user": ("<|im_start|>user\n", "<|im_end|>\n"),
    "assistant": ("<|im_start|>assistant\n", "\n"),
    "end": "<|im_end|>",
}

# Reasoning is shown only after the last question that a person asked; the last turn always has a think block, maybe
# empty. It belongs to the supervised span, except an empty one under enable_thinking=False: there the prompt holds it.
_QWEN3 = _fill(
    _CHECK
    + r"""
{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- if tools or system is not none %}
    {{- '<|im_start|>system\n' }}{{- system or '' }}
    {%- if tools %}
        {{- '\n\n' if system is not none }}"""
    + _TOOL_LIST
    + r"""
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set no_thinking = enable_thinking is defined and enable_thinking is false %}
{%- set question = namespace(last=messages | length - 1) %}
{%- for message in messages %}
    {%- set result = message.role == 'user' and message.content.startswith('<tool_response>')
        and message.content.endswith('</tool_response>') %}
    {%- if message.role == 'user' and not result %}
        {%- set question.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}"""
    + _TOOL_RESULT
    + r"""
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- set thinks = loop.index0 > question.last and (loop.last or reasoning) %}
        {%- set prefilled = thinks and no_thinking and not reasoning %}
        {{- '<|im_start|>assistant\n' }}
        {{- '<think>\n\n</think>\n\n' if prefilled }}
        {%- generation %}
            {{- '<think>\n' ~ reasoning.strip('\n') ~ '\n</think>\n\n' if thinks and not prefilled }}
            {{- content.lstrip('\n') if thinks else content }}"""
    + _TOOL_CALLS
    + r"""
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {{- '<think>\n\n</think>\n\n' if no_thinking }}
{%- endif %}
""",
    user_open="<|im_start|>user\n",
    user_close="<|im_end|>\n",
)

# Llama 3, with the tool form of Llama 3.1 (custom tools as JSON in the first user message). The lines of 3.1 that name
# the day are left out in every case: text that changes with the date cannot be the same in training and in serving.
# The published form has one call per turn and drops text beside a call; here the text is kept, a line before the call.
_LLAMA3 = (
    _CHECK
    + _NO_REASONING
    + r"""
{{- bos_token }}
{%- set shown = namespace(tools=not tools) %}
{%- if tools and messages[0].role != 'system' %}
    {{- '<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = (message.content or '') | trim %}
    {%- if message.role == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {%- if message.tool_calls and message.tool_calls | length > 1 %}
            {{- raise_exception('message ' ~ loop.index ~ ' has ' ~ message.tool_calls | length
                ~ ' tool calls: Llama 3 makes one per turn') }}
        {%- endif %}
        {%- generation %}
            {{- content }}
            {%- for call in message.tool_calls or [] %}
                {%- set call = call.function or call %}
                {{- '\n' if content }}
                {{- '{"name": "' ~ call.name ~ '", "parameters": ' }}
                {{- call.arguments if call.arguments is string else call.arguments | tojson }}
                {{- '}' }}
            {%- endfor %}
            {{- '<|eot_id|>' }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' ~ message.content | tojson ~ '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' }}
        {{- 'Environment: ipython\n' if tools and loop.first and message.role == 'system' }}
        {%- if message.role == 'user' and not shown.tools %}
            {{- 'Given the following functions, please respond with a JSON for a function call ' }}
            {{- 'with its proper arguments that best answers the given prompt.\n\n' }}
            {{- 'Respond in the format {"name": function name, "parameters": ' }}
            {{- 'dictionary of argument name and its value}.Do not use variables.\n\n' }}
            {%- for tool in tools %}
                {{- tool | tojson(indent=4) }}{{- '\n\n' }}
            {%- endfor %}
            {%- set shown.tools = true %}
        {%- endif %}
        {{- content ~ '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if not shown.tools %}
    {{- raise_exception('tools were given, but no user message, which is where Llama 3 reads them') }}
{%- endif %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}
"""
)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            name="chatml",
            jinja=_turns(**_CHATML),
            stop=("<|im_end|>", "<|endoftext|>"),
            source="https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md",
            tokens=("<|im_start|>", "<|im_end|>"),
        ),
        Template(
            name="qwen",
            jinja=_turns(
                **_CHATML,
                default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
            ),
            stop=("<|im_end|>", "<|endoftext|>"),
            source="https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/tokenizer_config.json",
            tokens=("<|im_start|>", "<|im_end|>"),
        ),
        Template(
            name="qwen3",
            jinja=_QWEN3,
            stop=("<|im_end|>", "<|endoftext|>"),
            source="https://huggingface.co/Qwen/Qwen3-8B/blob/main/tokenizer_config.json",
            tokens=("<|im_start|>", "<|im_end|>"),
        ),
        Template(
            name="llama3",
            jinja=_LLAMA3,
            stop=("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
            source="https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1",
            tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ),
        Template(
            name="vicuna",
            jinja=_turns(
                system=("", " "),
                user=("USER: ", " "),
                assistant=("ASSISTANT:", ""),
                lead=" ",
                default_system=(
                    "A chat between a curious user and an artificial intelligence assistant. "
                    "The assistant gives helpful, detailed, and polite answers to the user's questions."
                ),
            ),
            stop=(EOS,),
            source="https://github.com/lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md",
        ),
        # Published for one turn; further turns repeat the two blocks. The line break after "### Response:" is that of
        # Alpaca-LoRA and MedicalGPT: without it tokenizers may join the colon and the first word of the answer.
        Template(
            name="alpaca",
            jinja=_turns(
                system=("", "\n\n"),
                user=("### Instruction:\n", "\n\n"),
                assistant=("### Response:\n", "\n\n"),
                default_system=(
                    "Below is an instruction that describes a task. "
                    "Write a response that appropriately completes the request."
                ),
            ),
            stop=(EOS,),
            source="https://github.com/tatsu-lab/stanford_alpaca#data-release",
        ),
    )
}


def get_template(name: str) -> Template:
    """The template called `name`. Raises TemplateError that names the nearest ones when there is none."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    near = difflib.get_close_matches(name.lower(), TEMPLATES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(TEMPLATES)}"
    raise TemplateError(f"there is no chat template called {name!r}: {hint}")


# Conversations that tell templates apart. Each has the strings that show that a template renders it at all.
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
_PROBES: list[tuple[list[dict], dict, tuple[str, ...]]] = [
    *((conversation, {}, ()) for conversation in _CONVERSATIONS),
    ([_USER], {"add_generation_prompt": True}, ()),
    ([_USER, _ASSISTANT, _USER], {"add_generation_prompt": True, "enable_thinking": False}, ()),
    (_TOOL_USE, {"tools": [_TOOL]}, ("look_up", "100 mg")),
    ([_SYSTEM, *_TOOL_USE, *_SECOND], {"tools": [_TOOL]}, ("look_up", "100 mg")),
    (_THINKING, {}, ("second thought",)),
    (_THINKING_INLINE, {}, ("second thought",)),
]

_REFUSALS = (jinja2.TemplateError, TypeError, KeyError, ValueError)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **kwargs) -> str | None:
    """The text of a conversation, or None where the template refuses it."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except _REFUSALS:
        return None


def _is_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == text


def _missing(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[str]:
    missing = [token for token in template.tokens if not _is_token(tokenizer, token)]
    return missing + (["an eos_token"] if template.stop[0] == EOS and tokenizer.eos_token is None else [])


def _usable(tokenizer: PreTrainedTokenizerBase) -> str:
    names = [name for name, template in TEMPLATES.items() if not _missing(tokenizer, template)]
    return ", ".join(names) or "none until the tokenizer gets an eos_token"


def _recognise(tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The first of `TEMPLATES` that writes the same text as the tokenizer's own template, the BOS aside.

    A probe that the own template refuses, or whose tools or reasoning it leaves out, decides nothing.
    """
    own = [_render(tokenizer, messages, bos_token="", **kwargs) for messages, kwargs, _ in _PROBES]
    if own[0] is None:
        return None
    for template in TEMPLATES.values():
        if _missing(tokenizer, template):
            continue
        for (messages, kwargs, marks), text in zip(_PROBES, own, strict=True):
            if text is None or any(mark not in text for mark in marks):
                continue
            if text != _render(tokenizer, messages, bos_token="", chat_template=template.jinja, **kwargs):
                break
        else:
            return template
    return None


# What apply_template adds stands in the first two lines of the installed template, so that it can be read back: the
# first holds the facts, the second uses them.
_FACTS = "{%- set medicalgpt = "
_BAKE_SYSTEM = (
    "{%- if medicalgpt.system and messages[0].role != 'system' %}"
    "{%- set messages = [{'role': 'system', 'content': medicalgpt.system}] + messages %}{%- endif %}"
)


def _split(chat_template: str) -> tuple[dict, str]:
    """The facts that apply_template wrote into a template ({} if it did not) and the template without them."""
    if not chat_template.startswith(_FACTS):
        return {}, chat_template
    facts, _, body = chat_template.split("\n", 2)
    return json.loads(facts.removeprefix(_FACTS).removesuffix(" %}")), body


def _fix_bos(tokenizer: PreTrainedTokenizerBase, body: str, keep: bool) -> str:
    """`body` with exactly the BOS that the tokenizer puts before plain text, since apply_chat_template adds none.

    keep: leave a BOS that the template writes although the tokenizer would not, as some published chat models want it.
    """
    if tokenizer.bos_token is None:
        return body
    text = _render(tokenizer, [_USER], chat_template=body)
    without = _render(tokenizer, [_USER], chat_template=body, bos_token="")
    if text is None or without is None:
        return body
    writes = text != without
    adds = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    # A template may spell its BOS out, or open each turn with the token that the tokenizer calls BOS.
    wants = not without.startswith(tokenizer.bos_token) and (adds or (keep and writes))
    if writes == wants:
        return body
    return ("{{- bos_token }}" if wants else "{%- set bos_token = '' %}") + body


def _spans(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[list[int], list[tuple[int, int, str]]]:
    """Token ids of a conversation and its supervised runs: (first position, position after the last, text)."""
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
    """Proves on probe conversations that the installed template can be trained on, and returns its turn end.

    turn_end: what every supervised run must end with; None to read it off the first run.
    Raises TemplateError that names the defect.
    """
    for conversation in _CONVERSATIONS:
        if conversation is not _CONVERSATIONS[0] and _render(tokenizer, conversation) is None:
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
        for answer, (_, after, text) in zip(answers, spans, strict=True):
            before, found, end = text.partition(answer)
            if not found or re.sub(r"<think>\s*</think>", "", before).strip():
                raise TemplateError(f"the supervised text is {text!r}, where it should be {answer!r} and the turn end")
            last = tokenizer.convert_ids_to_tokens(ids[after - 1])
            turn_end = turn_end or last
            if last != turn_end or end != turn_end or ids[after - 1] not in tokenizer.added_tokens_decoder:
                raise TemplateError(
                    f"the supervised text is {text!r}: it must end with one special token that ends the turn"
                    f"{f' ({turn_end})' if turn_end in tokenizer.get_added_vocab() else ''}, and nothing after it"
                )
        prompt = tokenizer.apply_chat_template(conversation[:-1], add_generation_prompt=True, return_dict=False)
        if ids[: spans[-1][0]] != prompt:
            raise TemplateError(
                "training and inference disagree: the text before the answer is "
                f"{tokenizer.decode(ids[: spans[-1][0]])!r} in training, {tokenizer.decode(prompt)!r} in inference"
            )
    return turn_end


def apply_template(
    tokenizer: PreTrainedTokenizerBase, name: str | None = None, system_prompt: str | None = None
) -> tuple[str, ...]:
    """Installs a chat template into `tokenizer`, checks it, and returns the stop strings, the turn end first.

    name: one of `TEMPLATES`. None takes the tokenizer's own template: kept if it has generation markers, else replaced
        by the shipped one that writes the same text.
    system_prompt: becomes the default of conversations without a system message, also over a family's own default. It
        is part of the template from then on and saved with it, until another one is given. None and "" leave the
        default as it is (for qwen its own sentence); to have no system text, give a system message with empty content.

    Sets `tokenizer.chat_template`, and `tokenizer.eos_token` to the turn end. The text begins with the BOS that the
    tokenizer puts before plain text, once, or with none where it puts none. Only a tokenizer's own template may write
    one where the tokenizer does not: some chat models were published so. Applying again changes nothing.

    Raises TemplateError, and leaves the tokenizer as it was, if the name is unknown, the vocabulary lacks tokens, no
    template is there or recognised, or training on the template would go wrong.
    """
    if not tokenizer.is_fast:
        raise TemplateError(
            f"{type(tokenizer).__name__} gives no token offsets, which the loss mask needs: use a fast tokenizer"
        )
    previous = tokenizer.chat_template, tokenizer.eos_token
    try:
        return _install(tokenizer, name, system_prompt)
    except _REFUSALS as error:
        tokenizer.chat_template, tokenizer.eos_token = previous
        if name is None and previous[0]:
            error = (
                f"the tokenizer's own chat template cannot be used: {error}\nUse --template_name: {_usable(tokenizer)}"
            )
        raise TemplateError(str(error)) from None


def _install(tokenizer: PreTrainedTokenizerBase, name: str | None, system_prompt: str | None) -> tuple[str, ...]:
    own = tokenizer.chat_template
    facts, body = _split(own) if isinstance(own, str) else ({}, "")
    template, writes_bos = None, False
    if name is not None:
        template = get_template(name)
        if missing := _missing(tokenizer, template):
            raise TemplateError(
                f"the template {name} needs {', '.join(missing)}, which this tokenizer does not have as single tokens: "
                f"add them, or use --template_name with one of: {_usable(tokenizer)}"
            )
    elif not own:
        raise TemplateError(f"the tokenizer has no chat template: give --template_name one of: {_usable(tokenizer)}")
    else:
        writes_bos = _render(tokenizer, [_USER]) != _render(tokenizer, [_USER], bos_token="")
        if not re.search(r"\{%-?\s*generation\s*-?%\}", body):
            template = _recognise(tokenizer)
            if template is None:
                if isinstance(own, dict):
                    defect = f"it is a set of templates ({', '.join(own)}), where training needs one"
                else:
                    defect = "it has no {% generation %} markers, which tell answers from prompts"
                raise TemplateError(f"{defect}, and none of the shipped templates writes the same text")
            logger.info("the tokenizer's own chat template is {}: installed with markers for training", template.name)

    system = system_prompt or facts.get("system", "")
    body, expected, extra = (template.jinja, template.stop[0], template.stop[1:]) if template else (body, None, ())
    fixed = _fix_bos(tokenizer, body, keep=writes_bos)
    if fixed != body and not template:
        logger.info("the tokenizer's own chat template is given exactly the BOS that the tokenizer adds to plain text")
    tokenizer.chat_template = fixed
    turn_end = _check(tokenizer, tokenizer.eos_token if expected == EOS else expected)
    if not template and not facts and not system and fixed == body and turn_end == tokenizer.eos_token:
        tokenizer.chat_template = own
        return (turn_end,)

    extra = [text for text in extra if _is_token(tokenizer, text)]
    stop = list(dict.fromkeys([turn_end, *extra, *facts.get("stop", ()), tokenizer.eos_token or turn_end]))
    label = template.name if template else facts.get("template", "own")
    tokenizer.chat_template = "\n".join(
        (_FACTS + _literal({"template": label, "stop": stop, "system": system}) + " %}", _BAKE_SYSTEM, fixed)
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


def is_prefix_preserving(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the text up to an assistant turn's end stays the same when more turns follow.

    False for qwen3, which takes the reasoning out of earlier turns: a conversation of several turns then trains on text
    that inference showed in another form, unless each turn becomes an example of its own.
    """
    for messages, kwargs, _ in _PROBES:
        text = _render(tokenizer, messages, **kwargs)
        for end, message in enumerate(messages[:-1], start=1):
            if text is None or message["role"] != "assistant":
                continue
            earlier = _render(tokenizer, messages[:end], **(kwargs | {"add_generation_prompt": False}))
            if earlier is not None and not text.startswith(earlier):
                return False
    return True
