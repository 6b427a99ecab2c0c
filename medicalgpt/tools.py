"""How a chat model is told of its tools, writes its calls of them, and has the calls read back from its text.

    text, calls = TOOL_FORMATS["qwen"].parse(answer, names=["look_up"])

Each form is a set of Jinja fragments, which template.py puts into chat templates, and a function that finds the calls
in an answer. What is not a whole and well-formed call stays text.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

# Where calls stand in a text, and the calls: (start, end, calls).
Found = tuple[int, int, list[dict[str, Any]]]


@dataclass(frozen=True)
class ToolFormat:
    """One form of tool use.

    Attributes:
        name: the value of --tool_format.
        tool_list: Jinja for the list of `tools`, part of the system text.
        calls: Jinja for `message.tool_calls`; `content` is the text before them, `number` the message's position.
        result: Jinja for one tool `message`, part of a user turn.
        marks: strings that the form is made of. A vocabulary may have them as special tokens.
        find: finds the calls of an answer, in order.
    """

    name: str
    tool_list: str
    calls: str
    result: str
    marks: tuple[str, ...]
    find: Callable[[str], list[Found]]

    @property
    def macros(self) -> str:
        """The fragments as Jinja macros: a template that only calls them takes any tool form."""
        return (
            f"{{%- macro tool_list(tools) %}}{self.tool_list}{{%- endmacro %}}\n"
            f"{{%- macro tool_calls(message, content, number) %}}{self.calls}{{%- endmacro %}}\n"
            f"{{%- macro tool_result(message) %}}{self.result}{{%- endmacro %}}\n"
        )

    def parse(self, text: str, names: Collection[str] | None = None) -> tuple[str, list[dict[str, Any]]]:
        """Read the calls out of an answer. A call inside of the model's thoughts (before `</think>`) is none.

        Args:
            text: the answer without its turn end.
            names: the tools that were offered; a call of another one stays text. Unset: any name.

        Returns:
            The text beside the calls, and the calls as `{"type": "function", "function": {"name": str, "arguments":
            dict}}`, with an "id" where the model wrote one. Without any call, the text is as it was.
        """
        at = _end_of_thoughts(text)
        pieces, calls, offset = [text[:at]], [], at
        for start, end, found in self.find(text[offset:]):
            if names is None or all(call["function"]["name"] in names for call in found):
                # The line break before a call belongs to the form.
                pieces.append(text[at : offset + start].removesuffix("\n"))
                calls += found
                at = offset + end
        beside = "".join((*pieces, text[at:]))
        return ("" if calls and beside.isspace() else beside), calls


def tool_names(tools: Collection[Any]) -> list[str]:
    """Names of tools that are given as JSON schemas or as Python functions."""
    return [
        tool.get("function", tool).get("name", "") if isinstance(tool, dict) else getattr(tool, "__name__", "")
        for tool in tools
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _end_of_thoughts(text: str) -> int:
    """Where the answer itself begins. A prompt may have opened the thoughts, so that only their end is in the text."""
    end = text.find("</think>")
    if end >= 0:
        return end + len("</think>")
    return len(text) if text.lstrip().startswith("<think>") else 0


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _json(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at a position, white space before it aside, and where it ends; (None, at) if there is none."""
    try:
        value, end = _DECODER.raw_decode(text, _skip_space(text, at))
        # Half of a surrogate pair is a string in Python, but can neither be written nor sent.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None, at
    return value, end


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _to_call(name: Any, arguments: Any, call_id: Any = None) -> dict[str, Any] | None:
    """A call in OpenAI form, or None if this is none."""
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call_id, **call} if isinstance(call_id, str) else call


def _from_object(value: Any, key: str) -> dict[str, Any] | None:
    """The call that an object says, with its arguments under `key`, or None if it says none."""
    if not isinstance(value, dict) or not {"name", key} <= set(value) <= {"name", key, "id", "type"}:
        return None
    return _to_call(value["name"], value[key], value.get("id")) if value.get("type", "function") == "function" else None


def _find_tagged(text: str) -> list[Found]:
    """`<tool_call>` JSON `</tool_call>`, anywhere."""
    opening, closing = "<tool_call>", "</tool_call>"
    found, at = [], 0
    while (start := text.find(opening, at)) >= 0:
        value, end = _json(text, start + len(opening))
        call, end = _from_object(value, "arguments"), _skip_space(text, end)
        if call and text.startswith(closing, end):
            found.append((start, end + len(closing), [call]))
        else:
            # What stands inside of a broken call is part of it.
            end = text.find(closing, start)
            if end < 0:
                break
        at = end + len(closing)
    return found


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
    """Calls without marks around them: each begins a line, and nothing but calls follows up to the end of the text.

    call_at: reads a call at a position and says where it ends, or (None, ...).
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


# ---------------------------------------------------------------------------------------------------------------------
# Writing. Every Jinja tag trims the white space before it, so the layout of the fragments is not rendered.
# ---------------------------------------------------------------------------------------------------------------------

_ARGUMENTS = "(call.arguments if call.arguments is string else call.arguments | tojson)"

_ONE_CALL = r"""
{%- if message.tool_calls and message.tool_calls | length > 1 %}
    {{- raise_exception('message ' ~ number ~ ' has ' ~ message.tool_calls | length
        ~ ' tool calls: the tool form FORM makes one per turn') }}
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
    find=_find_tagged,
)

# Of Llama 3.1 (https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1), which makes one call per turn and
# drops text beside a call; here the text is kept, a line before the call.
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
)

TOOL_FORMATS: dict[str, ToolFormat] = {form.name: form for form in (_DEFAULT, _QWEN, _LLAMA3, _GLM4, _MISTRAL)}
