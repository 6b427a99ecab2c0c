"""How tools are listed for a chat model, how it writes tool calls, and how the calls are parsed from its text.

    text, calls = TOOL_FORMATS["qwen"].parse(answer, tools)

Each format is a set of Jinja fragments, which template.py puts into chat templates, and a function that finds the calls
in an answer. Anything but a complete and well-formed call stays text.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import get_json_schema

# The position of calls in a text, and the calls: (start, end, calls).
Found = tuple[int, int, list[dict[str, Any]]]


@dataclass(frozen=True)
class AnyText:
    """A place in a call for any text up to its end.

    Attributes:
        end: what the text ends with; it occurs nowhere else in it.
        without: strings that do not occur in the text before.
    """

    end: str
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Maybe:
    """Parts of a call that may be left out, or, if they `repeat`, come any number of times."""

    parts: tuple[Any, ...]
    repeats: bool = False


@dataclass(frozen=True)
class CallShape:
    """How calls are written, exactly, for answers that are held to it while they are generated.

    Attributes:
        parts: of a call to a tool with this name and JSON schema of arguments, in order: text as it stands, a schema (a
            dict, or a bool) for a JSON value of it, `AnyText`, `Maybe`.
        begin, end: before the first call, after the last one.
        between: between two calls; None if a turn has one call.
        trigger: what the first call begins with, if it occurs in no other text; None if a call has no such mark.
        head: finds the beginning of a call in a text, up to its arguments, which are a JSON object; group 1 is the
            name. None if the arguments are written in another way.
    """

    parts: Callable[[str, Any], list[Any]]
    begin: str = ""
    between: str | None = None
    end: str = ""
    trigger: str | None = None
    head: re.Pattern[str] | None = None


@dataclass(frozen=True)
class ToolFormat:
    """One format of tool calls.

    Attributes:
        name: the value of --tool_format.
        tool_list: Jinja for the list of `tools`, part of the system text.
        calls: Jinja for `message.tool_calls`; `content` is the text before them, `number` the message's position.
        result: Jinja for one tool `message`, part of a user turn.
        marks: strings that delimit calls. A vocabulary may have them as special tokens.
        find: finds the calls of an answer, in order.
        shape: how exactly a call is written.
        opening: what every call begins with, after white space; None if a call may begin with anything.
        gap: what separates the text of an answer from its calls.
        typed: whether the text shows the type of an argument; if not, it follows from the tool's JSON schema.
        family_only: whether it belongs to one model family and its templates.
    """

    name: str
    tool_list: str
    calls: str
    result: str
    marks: tuple[str, ...]
    find: Callable[[str], list[Found]]
    shape: CallShape
    opening: str | None = None
    gap: str = "\n"
    typed: bool = True
    family_only: bool = False

    @property
    def macros(self) -> str:
        """The fragments as Jinja macros: a template that only calls them takes any tool format."""
        return (
            f"{{%- macro tool_list(tools) %}}{self.tool_list}{{%- endmacro %}}\n"
            f"{{%- macro tool_calls(message, content, number) %}}{self.calls}{{%- endmacro %}}\n"
            f"{{%- macro tool_result(message) %}}{self.result}{{%- endmacro %}}\n"
        )

    def safe_length(self, text: str, known: int = 0) -> int:
        """Characters of a streamed answer that are certain to be text and not part of a call, whatever follows.

        Args:
            known: what was returned for the beginning of the same answer, which is not searched again.
        """
        if self.opening is None:
            return 0
        end = text.find(self.opening, known)
        if end < 0:
            end = len(text) - partial_match_length(text[known:], self.opening)
        return known + len(text[known:end].rstrip())

    def parse(self, text: str, tools: Sequence[Any] | None = None) -> tuple[str, list[dict[str, Any]]]:
        """Parse the calls of an answer. Calls in the model's reasoning (before `</think>`) do not count.

        The caller checks whether the tool accepts the arguments. If the format has no types, those of the tool's JSON
        schema are used; a value that does not match its type, or has none, stays text.

        Args:
            text: the answer without its turn end.
            tools: the tools offered, as JSON schemas or Python functions; a call of any other stays text. Unset: any
                name.

        Returns:
            The text without the calls, and the calls as `{"type": "function", "function": {"name": str, "arguments":
            dict}}`, with an "id" where the model wrote one. Without a call, the text is unchanged.
        """
        schemas = None if tools is None else _schemas(tools)
        at = end_of_thoughts(text)
        pieces, calls, offset = [text[:at]], [], at
        for start, end, found in self.find(text[offset:]):
            if schemas is None or all(call["function"]["name"] in schemas for call in found):
                before = text[at : offset + start]
                # Between calls, white space belongs to the format.
                pieces.append("" if calls and before.isspace() else before.removesuffix(self.gap))
                if schemas and not self.typed:
                    for call in found:
                        _read_arguments(call["function"], schemas)
                calls += found
                at = offset + end
        rest = "".join((*pieces, text[at:]))
        return ("" if calls and rest.isspace() else rest), calls


def partial_match_length(text: str, wanted: str) -> int:
    """Length of the longest proper prefix of `wanted` that a text ends with."""
    return next((length for length in range(len(wanted) - 1, 0, -1) if text.endswith(wanted[:length])), 0)


def _schemas(tools: Sequence[Any]) -> dict[str, Any]:
    """The names of tools, and the JSON schema of each one's parameters."""
    described = [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools]
    functions = [tool.get("function", tool) for tool in described]
    return {function.get("name", ""): function.get("parameters") for function in functions}


def tool_names(tools: Sequence[Any]) -> set[str]:
    """The names of tools, which are JSON schemas or Python functions."""
    return set(_schemas(tools))


def end_of_thoughts(text: str) -> int:
    """Where the answer begins. If the prompt opened the reasoning, only its end is in the text."""
    end = text.find("</think>")
    if end >= 0:
        return end + len("</think>")
    return len(text) if text.lstrip().startswith("<think>") else 0


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _json(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at a position, after white space, and where it ends; (None, at) if there is none."""
    try:
        value, end = _DECODER.raw_decode(text, _skip_space(text, at))
        # Python accepts half a surrogate pair and 1e999, which cannot be encoded again.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None, at
    return value, end


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _to_call(name: Any, arguments: Any, call_id: Any = None) -> dict[str, Any] | None:
    """A call in OpenAI format, or None if this is not a call."""
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call_id, **call} if isinstance(call_id, str) else call


def _from_object(value: Any, key: str) -> dict[str, Any] | None:
    """The call in a JSON object with its arguments under `key`, or None if it is not a call."""
    if not isinstance(value, dict) or not {"name", key} <= set(value) <= {"name", key, "id", "type"}:
        return None
    return _to_call(value["name"], value[key], value.get("id")) if value.get("type", "function") == "function" else None


def _find_between(
    text: str, opening: str, closing: str, calls_at: Callable[[str, int], tuple[list[dict[str, Any]], int]]
) -> list[Found]:
    """Calls between two marks, anywhere.

    opening, closing: the marks as regular expressions.
    calls_at: parses the calls after an opening mark and returns where they end, or ([], ...).
    """
    opens, closes = re.compile(opening), re.compile(closing)
    found, at = [], 0
    while begin := opens.search(text, at):
        calls, end = calls_at(text, begin.end())
        close = closes.match(text, _skip_space(text, end))
        if calls and close:
            found.append((begin.start(), close.end(), calls))
        else:
            # Everything in a malformed call is part of it.
            close = closes.search(text, begin.end())
            if not close:
                break
        at = close.end()
    return found


def _tagged_at(text: str, at: int) -> tuple[list[dict[str, Any]], int]:
    """`{"name": ..., "arguments": {...}}`"""
    value, end = _json(text, at)
    call = _from_object(value, "arguments")
    return [call] if call else [], end


def _xml_at(text: str, at: int) -> tuple[list[dict[str, Any]], int]:
    """`<function=name>`, a `<parameter=key>` ... `</parameter>` for each argument, and `</function>`.

    Values are text. The marks of parameters end a value, so a value that contains one makes the call malformed.
    """
    opening = re.compile(r"\s*<function=([^>\n]+)>\s*").match(text, at)
    if not opening:
        return [], at
    arguments, at = {}, opening.end()
    while parameter := re.compile(r"<parameter=([^>\n]*)>(.*?)</parameter>\s*", re.DOTALL).match(text, at):
        key, value = parameter.groups()
        if key in arguments or "<parameter=" in value:
            return [], at
        arguments[key] = value.removeprefix("\n").removesuffix("\n")
        at = parameter.end()
    closing = "</function>"
    call = _to_call(opening[1], arguments) if text.startswith(closing, at) else None
    return [call] if call else [], at + len(closing)


def _deepseek(mark: str) -> str:
    """One of DeepSeek's marks as a regular expression: tokenizers with ▁ for the space decode it as one."""
    return f"<｜tool▁{mark}｜>".replace("▁", "[▁ ]")


def _fenced_at(text: str, at: int) -> tuple[list[dict[str, Any]], int]:
    """Calls, each between DeepSeek's marks: `function`, the name, and the arguments as a block of JSON."""
    opening = re.compile(rf"\s*{_deepseek('call▁begin')}function{_deepseek('sep')}([^\n]+)\n```json\n")
    closing = re.compile(rf"\s*```\s*{_deepseek('call▁end')}")
    calls = []
    while begin := opening.match(text, at):
        value, at = _json(text, begin.end())
        call, end = _to_call(begin[1].strip(), value), closing.match(text, at)
        if not call or not end:
            return [], at
        calls.append(call)
        at = end.end()
    return calls, at


def _find_listed(text: str) -> list[Found]:
    """`[TOOL_CALLS]` and a JSON list of calls."""
    mark = "[TOOL_CALLS]"
    start = text.find(mark)
    if start < 0:
        return []
    value, end = _json(text, start + len(mark))
    calls = [_from_object(item, "arguments") for item in value] if isinstance(value, list) else []
    return [(start, end, calls)] if calls and all(calls) else []


def _find_at_end(text: str, call_at: Callable[[str, int], tuple[dict[str, Any] | None, int]]) -> list[Found]:
    """Calls without markers: each begins a line, and only calls follow up to the end of the text.

    call_at: parses a call at a position and returns where it ends, or (None, ...).
    """
    # Templates that end the prompt without a space have one before the answer.
    for line in re.finditer("^[ \t]*", text, re.MULTILINE):
        found, start = [], line.end()
        while start < len(text):
            call, end = call_at(text, start)
            after = _skip_space(text, end)
            if call is None or (after < len(text) and "\n" not in text[end:after]):
                break
            found.append((start if found else line.start(), after, [call]))
            start = after
        else:
            return found
    return []


def _action_at(text: str, at: int) -> tuple[dict[str, Any] | None, int]:
    """`Action: name` and, on the next line, `Action Input: {...}`."""
    lines = re.compile(r"Action:([^\n]*)\nAction Input:").match(text, at)
    if not lines:
        return None, at
    value, end = _json(text, lines.end())
    return _to_call(lines[1].strip(), value), end


def _object_at(text: str, at: int) -> tuple[dict[str, Any] | None, int]:
    """`{"name": ..., "parameters": {...}}`"""
    value, end = _json(text, at) if text.startswith("{", at) else (None, at)
    return _from_object(value, "parameters"), end


def _name_and_object_at(text: str, at: int) -> tuple[dict[str, Any] | None, int]:
    """A name alone on its line, and a JSON object on the next."""
    line = re.compile(r"([\w.\-]+)\n(?=\{)").match(text, at)
    if not line:
        return None, at
    value, end = _json(text, line.end())
    return _to_call(line[1], value), end


# Python's constants, as Jinja writes a value by itself.
_PYTHON = {"True": True, "False": False, "None": None}


def _read_arguments(function: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Convert the arguments of a call, all of them text, to the types in the tool's schema; changed in place."""
    schema = schemas[function["name"]]
    properties = schema.get("properties") if isinstance(schema, dict) else None
    for key, text in function["arguments"].items():
        expected = properties.get(key) if isinstance(properties, dict) else None
        function["arguments"][key] = _read_value(text, _types(expected, schema, set()))


def _read_value(text: str, types: set[str]) -> Any:
    """A value of one of the JSON `types`, or the text unchanged.

    If text is one of several types, the others come first. Null is accepted for all types but text, since models write
    it for optional parameters.
    """
    if not types - {"string"}:
        return text
    words = text.strip()
    value, end = (_PYTHON[words], len(words)) if words in _PYTHON else _json(words, 0)
    wanted = types - {"string"} if "string" in types else types | {"null"}
    return value if words and end == len(words) and _types_of(value) & wanted else text


def _types_of(value: Any) -> set[str]:
    """The types of a JSON value, as JSON schema names them."""
    if isinstance(value, float):
        return {"number", "integer"} if value.is_integer() else {"number"}
    names = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object", type(None): "null"}
    return {names[type(value)]} | ({"number"} if type(value) is int else set())


def _types(schema: Any, root: Any, seen: set[str]) -> set[str]:
    """The JSON types that a schema allows; empty if it names none.

    root: the schema that its references point into. seen: references that were followed already.
    """
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    if isinstance(named, str | list):
        return {name for name in ([named] if isinstance(named, str) else named) if isinstance(name, str)}
    if isinstance(schema.get("enum"), list):
        return set().union(*map(_types_of, schema["enum"]))
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        seen.add(reference)
        target = root
        for key in reference.removeprefix("#/").split("/"):
            target = target.get(key) if isinstance(target, dict) else None
        return _types(target, root, seen)
    lists = [schema.get(key) for key in ("anyOf", "oneOf", "allOf")]
    choices = [each for choices in lists if isinstance(choices, list) for each in choices]
    return set().union(*(_types(each, root, seen) for each in choices))


def _object_parts(name: str, key: str, schema: Any) -> list[Any]:
    """`{"name": ..., KEY: {...}}`"""
    return [f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": ', schema, "}"]


def _xml_parts(name: str, schema: Any) -> list[Any]:
    """Arguments one by one, those that the schema does not require at the model's choice."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    required = schema.get("required", []) if isinstance(schema, dict) else []
    close = "\n</parameter>\n"
    free = [AnyText(close, ("<parameter=", "</parameter>"))]
    parts: list[Any] = [f"<tool_call>\n<function={name}>\n"]
    for key, expected in (properties or {}).items():
        types = _types(expected, schema, set())
        typed = types and "string" not in types
        own = (f"<parameter={key}>\n", *([{**_definitions(schema), **expected}, close] if typed else free))
        parts += own if key in required else [Maybe(own)]
    if not properties:
        parts.append(Maybe(("<parameter=", AnyText(">\n", (">", "\n", "<")), *free), repeats=True))
    return [*parts, "</function>\n</tool_call>"]


def _definitions(schema: dict[str, Any]) -> dict[str, Any]:
    """What the references in a schema point to."""
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


_NAME_AND_ARGUMENTS = r'\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"arguments"\s*:\s*(?=\{)'

_ARGUMENTS = "(call.arguments if call.arguments is string else call.arguments | tojson)"

_ONE_CALL = r"""
{%- if message.tool_calls and message.tool_calls | length > 1 %}
    {{- raise_exception('message ' ~ number ~ ' has ' ~ message.tool_calls | length
        ~ ' tool calls: the tool format FORM makes one per turn') }}
{%- endif %}
"""

_EACH_CALL = r"""
{%- for call in message.tool_calls or [] %}
    {%- set call = call.function or call %}
    {{- '\n' if content or not loop.first }}
"""

_DEFAULT = ToolFormat(
    name="default",
    tool_list=r"""
{{- 'These tools can be used:' }}
{%- for tool in tools %}
    {{- '\n' }}{{- (tool.function or tool) | tojson }}
{%- endfor %}
{{- '\n\nTo use a tool, write two lines with its name and its arguments as a JSON object, ' }}
{{- 'two such lines for each use, and nothing after them:\n' }}
{{- 'Action: <tool name>\nAction Input: <JSON object>\n\n' }}
{{- 'The result then comes after "Observation:".' }}
""",
    calls=_EACH_CALL + "{{- 'Action: ' ~ call.name ~ '\\nAction Input: ' ~ " + _ARGUMENTS + " }}{%- endfor %}",
    result="{{- 'Observation: ' ~ message.content }}",
    marks=("Action:", "Action Input:", "Observation:"),
    find=lambda text: _find_at_end(text, _action_at),
    shape=CallShape(
        lambda name, schema: [f"Action: {name}\nAction Input: ", schema],
        between="\n",
        head=re.compile(r"^Action:[ \t]*([^\n]*?)[ \t]*\nAction Input:\s*(?=\{)", re.MULTILINE),
    ),
    opening="Action:",
)

# Of Qwen2.5 and Qwen3, as Hermes made it (https://github.com/NousResearch/Hermes-Function-Calling).
_QWEN = ToolFormat(
    name="qwen",
    tool_list=r"""
{{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
{%- for tool in tools %}
    {{- '\n' }}{{- tool | tojson }}
{%- endfor %}
{{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
{{- '<tool_call></tool_call> XML tags:\n<tool_call>\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
""",
    calls=_EACH_CALL
    + "{{- '<tool_call>\\n{\"name\": ' ~ call.name | tojson ~ ', \"arguments\": ' ~ "
    + _ARGUMENTS
    + " ~ '}\\n</tool_call>' }}{%- endfor %}",
    result=r"{{- '<tool_response>\n' ~ message.content ~ '\n</tool_response>' }}",
    marks=("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    find=lambda text: _find_between(text, "<tool_call>", "</tool_call>", _tagged_at),
    shape=CallShape(
        lambda name, schema: ["<tool_call>\n", *_object_parts(name, "arguments", schema), "\n</tool_call>"],
        between="\n",
        trigger="<tool_call>",
        head=re.compile(r"<tool_call>\s*" + _NAME_AND_ARGUMENTS),
    ),
    opening="<tool_call>",
)

# Of Llama 3.1 (https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1), which makes one call per turn and
# drops text next to a call; here the text is kept, on a line before the call.
_LLAMA3 = ToolFormat(
    name="llama3",
    tool_list=r"""
{{- 'Given the following functions, please respond with a JSON for a function call ' }}
{{- 'with its proper arguments that best answers the given prompt.\n\n' }}
{{- 'Respond in the format {"name": function name, "parameters": ' }}
{{- 'dictionary of argument name and its value}.Do not use variables.' }}
{%- for tool in tools %}
    {{- '\n\n' }}{{- tool | tojson(indent=4) }}
{%- endfor %}
""",
    calls=_ONE_CALL.replace("FORM", "llama3")
    + _EACH_CALL
    + "{{- '{\"name\": ' ~ call.name | tojson ~ ', \"parameters\": ' ~ "
    + _ARGUMENTS
    + " ~ '}' }}{%- endfor %}",
    result="{{- message.content | tojson }}",
    marks=('{"name":', '"parameters":'),
    find=lambda text: _find_at_end(text, _object_at),
    shape=CallShape(
        lambda name, schema: _object_parts(name, "parameters", schema),
        head=re.compile(_NAME_AND_ARGUMENTS.replace("arguments", "parameters")),
    ),
    opening="{",
)

# Of GLM-4 (https://github.com/THUDM/GLM-4), which makes one call per turn.
_GLM4 = ToolFormat(
    name="glm4",
    tool_list=r"""
{{- '# 可用工具' }}
{%- for tool in tools %}
    {%- set tool = tool.function or tool %}
    {{- '\n\n## ' ~ tool.name ~ '\n\n' ~ tool | tojson(indent=4) }}
    {{- '\n在调用上述函数时，请使用 Json 格式表示调用的参数。' }}
{%- endfor %}
""",
    calls=_ONE_CALL.replace("FORM", "glm4") + _EACH_CALL + "{{- call.name ~ '\\n' ~ " + _ARGUMENTS + " }}{%- endfor %}",
    result="{{- message.content }}",
    marks=("{", "}"),
    find=lambda text: _find_at_end(text, _name_and_object_at),
    shape=CallShape(
        lambda name, schema: [f"{name}\n", schema],
        head=re.compile(r"^([\w.\-]+)\n(?=\{)", re.MULTILINE),
    ),
)

# Of Mistral 7B v0.3 (https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.3), without the ids of calls.
_MISTRAL = ToolFormat(
    name="mistral",
    tool_list="{{- '[AVAILABLE_TOOLS] ' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' }}",
    calls=r"""
{%- if message.tool_calls %}
    {{- '\n' if content }}
    {{- '[TOOL_CALLS] [' }}
    {%- for call in message.tool_calls %}
        {%- set call = call.function or call %}
        {{- ', ' if not loop.first }}
        {{- '{"name": ' ~ call.name | tojson ~ ', "arguments": ' ~ ARGUMENTS ~ '}' }}
    {%- endfor %}
    {{- ']' }}
{%- endif %}
""".replace("ARGUMENTS", _ARGUMENTS),
    result="{{- '[TOOL_RESULTS] {\"content\": ' ~ message.content | tojson ~ '}[/TOOL_RESULTS]' }}",
    marks=("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    find=_find_listed,
    shape=CallShape(
        lambda name, schema: _object_parts(name, "arguments", schema),
        begin="[TOOL_CALLS] [",
        between=", ",
        end="]",
        trigger="[TOOL_CALLS]",
        head=re.compile(r"(?:\[TOOL_CALLS\]\s*\[|,)\s*" + _NAME_AND_ARGUMENTS),
    ),
    opening="[TOOL_CALLS]",
)

# Of Qwen3.5 (https://huggingface.co/Qwen/Qwen3.5-4B), which writes each argument separately: text unquoted, lists and
# objects as JSON, the rest as in Python.
_QWEN3_5 = ToolFormat(
    name="qwen3_5",
    tool_list=r"""
{{- '# Tools\n\nYou have access to the following functions:\n\n<tools>' }}
{%- for tool in tools %}
    {{- '\n' }}{{- tool | tojson }}
{%- endfor %}
{{- '\n</tools>\n\n' }}
{{- 'If you choose to call a function ONLY reply in the following format with NO suffix:\n\n' }}
{{- '<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n' }}
{{- '<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\n' }}
{{- 'multiple lines\n</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n' }}
{{- '- Function calls MUST follow the specified format: an inner <function=...></function> block ' }}
{{- 'must be nested within <tool_call></tool_call> XML tags\n- Required parameters MUST be specified\n' }}
{{- '- You may provide optional reasoning for your function call in natural language ' }}
{{- 'BEFORE the function call, but NOT after\n- If there is no function call available, ' }}
{{- 'answer the question like normal with your current knowledge ' }}
{{- 'and do not tell the user about function calls\n</IMPORTANT>' }}
""",
    calls=r"""
{%- for call in message.tool_calls or [] %}
    {%- set call = call.function or call %}
    {{- ('\n\n' if content else '') if loop.first else '\n' }}
    {{- '<tool_call>\n<function=' ~ call.name ~ '>\n' }}
    {%- if call.arguments is string %}
        {{- raise_exception('a call of ' ~ call.name ~ ' has its arguments as a string: '
            ~ 'Qwen3.5 writes each one by itself, so give them as an object') }}
    {%- endif %}
    {%- for key, value in (call.arguments or {}) | items %}
        {%- set lists = value is mapping or (value is sequence and value is not string) %}
        {%- set written = value | tojson if lists else value | string %}
        {%- if '>' in key or '\n' in key or '<parameter=' in written or '</parameter>' in written %}
            {{- raise_exception('a call of ' ~ call.name ~ ' has the argument "' ~ key
                ~ '", which could not be read back: Qwen3.5 has no place for > or a line break in its name, '
                ~ 'or for <parameter= or </parameter> in its value') }}
        {%- endif %}
        {{- '<parameter=' ~ key ~ '>\n' ~ written ~ '\n</parameter>\n' }}
    {%- endfor %}
    {{- '</function>\n</tool_call>' }}
{%- endfor %}
""",
    result=r"{{- '<tool_response>\n' ~ message.content | trim ~ '\n</tool_response>' }}",
    marks=_QWEN.marks,
    find=lambda text: _find_between(text, "<tool_call>", "</tool_call>", _xml_at),
    shape=CallShape(_xml_parts, between="\n", trigger="<tool_call>"),
    opening="<tool_call>",
    gap="\n\n",
    typed=False,
    family_only=True,
)

# Of DeepSeek-V3 (https://huggingface.co/deepseek-ai/DeepSeek-V3), which publishes no list of tools.
_DEEPSEEK3 = ToolFormat(
    name="deepseek3",
    tool_list=r"""
{{- '## Tools\n\nYou can call these tools:\n' }}
{%- for tool in tools %}
    {{- '\n' }}{{- tool | tojson }}
{%- endfor %}
{{- '\n\nA call has the name of the tool and its arguments as a JSON object:\n\n' }}
{{- '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```' }}
{{- '<｜tool▁call▁end｜><｜tool▁calls▁end｜>' }}
""",
    calls=r"""
{%- for call in message.tool_calls or [] %}
    {%- set call = call.function or call %}
    {{- '<｜tool▁calls▁begin｜>' if loop.first else '\n' }}
    {{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' ~ call.name ~ '\n```json\n' }}
    {{- WRITTEN }}
    {{- '\n```<｜tool▁call▁end｜>' }}{{- '<｜tool▁calls▁end｜>' if loop.last }}
{%- endfor %}
""".replace("WRITTEN", _ARGUMENTS),
    result="{{- '<｜tool▁output▁begin｜>' ~ message.content ~ '<｜tool▁output▁end｜>' }}",
    marks=(
        *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
        *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
        "<｜tool▁sep｜>",
    ),
    find=lambda text: _find_between(text, _deepseek("calls▁begin"), _deepseek("calls▁end"), _fenced_at),
    shape=CallShape(
        lambda name, schema: [
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
            schema,
            "\n```<｜tool▁call▁end｜>",
        ],
        begin="<｜tool▁calls▁begin｜>",
        between="\n",
        end="<｜tool▁calls▁end｜>",
        trigger="<｜tool▁calls▁begin｜>",
        head=re.compile(rf"{_deepseek('call▁begin')}function{_deepseek('sep')}([^\n]+)\n```json\n(?=\{{)"),
    ),
    opening="<｜tool",
    gap="",
    family_only=True,
)

TOOL_FORMATS: dict[str, ToolFormat] = {
    form.name: form for form in (_DEFAULT, _QWEN, _LLAMA3, _GLM4, _MISTRAL, _QWEN3_5, _DEEPSEEK3)
}
