"""Tool calls in each form: written by a template, read back from the answer, and nothing is read that is not a call."""

import json
import random
import re

from medicalgpt.data.encoding import EncodingError, encode_chat
from medicalgpt.models.templating import Template, TemplateError, stop_token_ids, tool_format_of
from medicalgpt.models.tool_formats import TOOL_FORMATS
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import GenerationRequest, Sampling
from template import TEMPLATES, _turns, apply_template, get_template
from tests.helpers import chat, read_json, run_here, run_program, save_model, write_jsonl
from tests.templates import CORE, TOKENIZERS, assistant, byte_level, official, text_of, tool, user
from tests.tiny import tiny_tokenizer

import pytest
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "查剂量 of a <drug>",
            "parameters": {
                "type": "object",
                "properties": {
                    **dict.fromkeys(("drug", "备注", "text"), {"type": "string"}),
                    "plan": {"type": "object"},
                },
            },
        },
    }
    for name in ("look_up", "查_号-2.b")
]
NAMES = {tool["function"]["name"] for tool in TOOLS}


def call(name: str = "look_up", **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = {
    "chinese": call(drug="阿司匹林", 备注="每日一次，😷"),
    "nested": call(plan={"days": [1, 2.5, True, None, {}], "": []}, text=""),
    "quotes and lines": call(text="one\n\ntwo\t\"three\" 'four' \\ \\n {five} %} {{ six }}"),
    "no arguments": call("查_号-2.b"),
    "marks in the text": call(text='</tool_call> [TOOL_CALLS] [] Action: x\nAction Input: {} look_up\n{} {"name":'),
}
TURNS = {
    **{shape: ("", [each]) for shape, each in CALLS.items()},
    "text and a call": ("One moment.\n\n请稍等。", [CALLS["chinese"]]),
    "two calls": ("", [CALLS["nested"], CALLS["no arguments"]]),
    "text and three calls": ("Look:", [CALLS["quotes and lines"], CALLS["chinese"], CALLS["nested"]]),
}
ONE_CALL = ("llama3", "glm4")

# Every template with its own form, and some of those that take any with each.
WRITTEN = [(name, template.tool_format) for name, template in TEMPLATES.items() if template.tool_format]
FAMILY_ONLY = {"qwen3_5": "qwen3_5_nothink", "deepseek3": "deepseek3"}
COMMON = [form for form in TOOL_FORMATS if form not in FAMILY_ONLY]
WRITTEN += [(name, form) for name in ("chatml", "vicuna", "alpaca") for form in COMMON]
WRITTEN = list(dict.fromkeys(WRITTEN))
ROUND_TRIPS = [
    (name, form, turn, kind)
    for name, form in WRITTEN
    for turn in TURNS
    for kind in ("byte_like_qwen", "metaspace", "marks_are_special")
    if turn.startswith("text and") or (name in (*CORE, *FAMILY_ONLY.values()) and kind == "byte_like_qwen")
    if kind == "byte_like_qwen" or name in (*CORE, *FAMILY_ONLY.values())
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in ("byte_like_qwen", "metaspace"):
        TOKENIZERS[kind]().save_pretrained(root / kind)
    tokenizer = TOKENIZERS["byte_like_qwen"]()
    marks = sorted({mark for form in ("qwen", "mistral", "deepseek3") for mark in TOOL_FORMATS[form].marks})
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.save_pretrained(root / "marks_are_special")
    return root


@pytest.fixture
def load(folders):
    return lambda kind="byte_like_qwen": AutoTokenizer.from_pretrained(folders / kind)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return AutoModelForCausalLM.from_pretrained(save_model(folder, TOKENIZERS["metaspace"](), context=8000))


def answer_to(model, tokenizer, messages, stop, tools=TOOLS):
    """What the engine makes of the tokens that a conversation trains for its last turn."""
    model.generation_config.eos_token_id = stop_token_ids(tokenizer, stop)
    sample = encode_chat(tokenizer, chat(messages, tools))[-1]
    ids = [label for label in sample.labels if label != -100]
    pieces = []
    row = ChatEngine(model, tokenizer).begin(
        GenerationRequest(sample.input_ids, Sampling(max_new_tokens=4000), tools, on_text=pieces.append)
    )
    for token in ids:
        row.add(token)
    assert row.answer.finish_reason == "stop"
    # A stream shows the text and nothing of the calls.
    assert "".join(pieces) == row.answer.text
    return row.answer


def written(tokenizer, messages, stop: tuple[str, ...]) -> str:
    """The supervised text of the last turn without its end."""
    sample = encode_chat(tokenizer, chat(messages, TOOLS))[-1]
    *ids, end = [label for label in sample.labels if label != -100]
    assert tokenizer.convert_ids_to_tokens(end) in stop
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def calling(name: str, content: str, calls: list[dict]) -> dict:
    """An answer as the template wants it: Qwen3.5's prompt opens the thoughts, so that there have to be some."""
    return assistant(content, tool_calls=calls, **({"reasoning_content": "想"} if name == "qwen3_5" else {}))


def without_thoughts(text: str) -> str:
    return re.sub(r"^(<think>\s*|想\n)</think>", "", text).strip()


# From calls to text and back.


@pytest.mark.parametrize(("name", "form", "turn", "kind"), ROUND_TRIPS)
def test_what_a_template_writes_is_read_back(load, model, name, form, turn, kind):
    tokenizer = load(kind)
    stop = apply_template(tokenizer, name, tool_format=form)
    content, calls = TURNS[turn]
    messages = [user("Dose?"), calling(name, content, calls)]
    if len(calls) > 1 and form in ONE_CALL:
        with pytest.raises(EncodingError, match=f"message 2 has {len(calls)} tool calls"):
            written(tokenizer, messages, stop)
        return
    text, found = tool_format_of(tokenizer).parse(written(tokenizer, messages, stop), TOOLS)
    assert found == calls
    assert without_thoughts(text) == content
    answer = answer_to(model, tokenizer, messages, stop)
    assert list(answer.tool_calls) == calls
    assert without_thoughts(answer.text) == content


@pytest.mark.parametrize(("name", "form"), WRITTEN)
def test_results_and_list_are_rendered(load, name, form):
    tokenizer = load()
    apply_template(tokenizer, name, tool_format=form)
    messages = [user("Dose?"), assistant("", tool_calls=[CALLS["chinese"]]), tool("100 毫克"), assistant("So.")]
    text = text_of(tokenizer, messages, TOOLS)
    assert text.index("查剂量 of a <drug>") < text.index("阿司匹林") < text.index("100 毫克") < text.index("So.")
    assert text_of(tokenizer, messages).count("查剂量") == 0


@pytest.mark.parametrize("form", ["default", "qwen", "mistral"])
def test_results_that_follow_each_other_share_a_turn(load, form):
    tokenizer = load()
    apply_template(tokenizer, "chatml", tool_format=form)
    messages = [user("Dose?"), assistant("", tool_calls=TURNS["two calls"][1]), tool("1"), tool("2")]
    text = text_of(tokenizer, messages, TOOLS)
    last = text.rpartition("<|im_start|>user\n")[2]
    expected = {
        "default": "Observation: 1\nObservation: 2",
        "qwen": "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>",
        "mistral": '[TOOL_RESULTS] {"content": "1"}[/TOOL_RESULTS]\n[TOOL_RESULTS] {"content": "2"}[/TOOL_RESULTS]',
    }
    assert last == expected[form] + "<|im_end|>\n"


WRITTEN_BY_HAND = {
    "default": 'Action: look_up\nAction Input: {"drug": "阿司匹林"}',
    "qwen": '<tool_call>\n{"name": "look_up", "arguments": {"drug": "阿司匹林"}}\n</tool_call>',
    "llama3": '{"name": "look_up", "parameters": {"drug": "阿司匹林"}}',
    "glm4": 'look_up\n{"drug": "阿司匹林"}',
    "mistral": '[TOOL_CALLS] [{"name": "look_up", "arguments": {"drug": "阿司匹林"}}]',
    "qwen3_5": ("<tool_call>\n<function=look_up>\n<parameter=drug>\n阿司匹林\n</parameter>\n</function>\n</tool_call>"),
    "deepseek3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n"
        '```json\n{"drug": "阿司匹林"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
}


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_text_of_a_call(load, form):
    tokenizer = load()
    stop = apply_template(tokenizer, FAMILY_ONLY.get(form, "chatml"), tool_format=form)
    text = written(tokenizer, [user("?"), assistant("Look:", tool_calls=[call(drug="阿司匹林")])], stop)
    assert text == "Look:" + {"qwen3_5": "\n\n", "deepseek3": ""}.get(form, "\n") + WRITTEN_BY_HAND[form]
    assert TOOL_FORMATS[form].parse(text, TOOLS) == ("Look:", [call(drug="阿司匹林")])


def test_marks_of_deepseek3_are_those_that_it_writes(load):
    """A mark that were left out would be hidden in served text where it is a special token."""
    tokenizer = load()
    apply_template(tokenizer, "deepseek3")
    messages = [user("?"), assistant("", tool_calls=[call()]), tool("1"), assistant("So.")]
    written_marks = re.findall("<｜tool[^｜]*｜>", text_of(tokenizer, messages, TOOLS))
    assert set(written_marks) == set(TOOL_FORMATS["deepseek3"].marks)


# Qwen3.5's form has no types: they come from the tool's schema.

TYPES = {
    "word": {"type": "string"},
    "count": {"type": "integer"},
    "dose": {"type": "number"},
    "now": {"type": "boolean"},
    "days": {"type": "array", "items": {"type": "integer"}},
    "plan": {"type": "object"},
    "nothing": {"type": "null"},
    "word_or_null": {"type": ["string", "null"]},
    "count_or_null": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "word_or_count": {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    "word_or_days": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/days"}]},
    "choice": {"enum": ["once", 2]},
    "count_choice": {"enum": [1, 2]},
    "reference": {"$ref": "#/$defs/plan"},
    "all_of": {"allOf": [{"$ref": "#/$defs/plan"}]},
    "circle": {"$ref": "#/properties/circle"},
    "nowhere": {"$ref": "#/$defs/nowhere/at/all"},
    "untyped": {"description": "anything"},
    "unknown_type": {"type": "date"},
}
TYPED = [
    {
        "type": "function",
        "function": {
            "name": "typed",
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": TYPES,
                "$defs": {"plan": {"type": "object"}, "days": {"type": "array"}},
            },
        },
    }
]
VALUES = [
    *[("word", text) for text in ("5", "true", "None", "null", "", " x ", "\n", "\n\na\n\n", '"q"', "{}", "[1]")],
    *[
        ("word", text)
        for text in ("1\n2", '\\n"', "<b>粗</b>", "</function>", "</tool_call><tool_call>", "<think>", "😷")
    ],
    *[("count", number) for number in (0, -3, 10**30)],
    *[("dose", number) for number in (1, 2.5, 1e20, -1e-7)],
    *[("now", True), ("now", False), ("nothing", None)],
    *[("days", []), ("days", [1, 2.5, "a", None, True, [{}]])],
    *[("plan", {}), ("plan", {"药": {"a": [True, None, "True"]}, "": "</tool_call>\n"})],
    *[("word_or_null", "x"), ("word_or_null", None), ("count_or_null", 1), ("count_or_null", None)],
    *[("word_or_count", "once"), ("word_or_count", 2), ("word_or_count", "None"), ("word_or_days", [1])],
    *[("choice", "once"), ("choice", 2), ("count_choice", 1), ("reference", {"a": 1}), ("all_of", {"a": 1})],
    # Parameters that may be left out are given as null, whatever their type.
    *[("count", None), ("now", None), ("plan", None)],
    *[(key, text) for key in ("circle", "nowhere", "untyped", "not in the schema") for text in ("5", "{}", "None")],
    ("unknown_type", "2026-01-01"),
]


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_nothink", "deepseek3"])
@pytest.mark.parametrize(("key", "value"), VALUES, ids=[f"{key}-{json.dumps(value)}" for key, value in VALUES])
def test_values_of_each_type_come_back(load, name, key, value):
    tokenizer = load()
    stop = apply_template(tokenizer, name)
    calls = [call("typed", **{key: value}), call("typed", **{"word": "x", key: value}), call("typed")]
    text = written(tokenizer, [user("?"), calling(name, "", calls)], stop)
    parsed, found = tool_format_of(tokenizer).parse(text, TYPED)
    assert json.dumps(found) == json.dumps(calls)
    assert without_thoughts(parsed) == ""


def parse_value(key: str, text: str, tools=TYPED):
    text = f"<tool_call>\n<function=typed>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n</tool_call>"
    beside, (found,) = TOOL_FORMATS["qwen3_5"].parse(text, tools)
    assert beside == ""
    return found["function"]["arguments"][key]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        *[("now", "true", True), ("now", "True", True), ("now", " false\n", False), ("nothing", "null", None)],
        *[("days", "[\n  1,\n  2\n]", [1, 2]), ("plan", ' {"a": 1} ', {"a": 1}), ("count", "5.0", 5.0)],
        *[("word_or_null", "null", None), ("word_or_count", "5", 5), ("word_or_count", '"5"', '"5"')],
    ],
)
def test_other_spellings_of_values(key, text, value):
    assert json.dumps(parse_value(key, text)) == json.dumps(value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *[("count", text) for text in ("five", "2.5", "5 mg", "1e400", "", " ", "True", '"5"', "[5]", "05")],
        ("count", "1" * 5000),
        *[("dose", text) for text in ("NaN", "Infinity", "1e999", "1,5", "一")],
        *[("now", text) for text in ("yes", "1", "TRUE", "true false")],
        *[("days", text) for text in ("1, 2", "[1", "{}", "(1, 2)", "[" * 100_000)],
        *[("plan", text) for text in ("{'a': 1}", "[]", '{"a": 1}}', '{"a": "\\ud800"}')],
        *[("count_choice", "one"), ("nothing", "0"), ("unknown_type", "5")],
    ],
)
def test_value_that_is_none_of_its_type_stays_text(key, text):
    assert parse_value(key, text) == text


@pytest.mark.parametrize(
    "parameters",
    [
        *[None, [], "x", {}, {"properties": None}, {"properties": []}, {"properties": {"a": None}}],
        *[{"properties": {"a": {"type": 1}}}, {"properties": {"a": {"$ref": 1}}}, {"properties": {"a": {"anyOf": {}}}}],
        *[{"properties": {"a": {"anyOf": 5}}}, {"properties": {"a": {"type": [{}]}}}],
    ],
)
def test_values_stay_text_without_a_schema(parameters):
    assert parse_value("a", "5", None) == "5"
    assert parse_value("a", "5", [{"name": "typed"}]) == "5"
    assert parse_value("a", "5", [{"name": "typed", "parameters": parameters}]) == "5"


def test_types_of_a_python_function():
    text = "<tool_call>\n<function=weigh>\n<parameter=days>\n3\n</parameter>\n<parameter=drug>\n3\n</parameter>\n"
    found = TOOL_FORMATS["qwen3_5"].parse(text + "</function>\n</tool_call>", [weigh])[1]
    assert found == [call("weigh", days=3, drug="3")]


@pytest.mark.parametrize(
    "arguments",
    [
        *[{"text": "a</parameter>b"}, {"text": "<parameter=drug>"}, {"plan": {"a": "</parameter>"}}],
        *[{"a>b": 1}, {"a\nb": 1}],
    ],
)
def test_arguments_that_could_not_be_read_back_are_not_written(load, arguments):
    tokenizer = load()
    stop = apply_template(tokenizer, "qwen3_5_nothink")
    with pytest.raises(EncodingError, match="(?s)a call of look_up has the argument .* could not be read back"):
        written(tokenizer, [user("?"), assistant("", tool_calls=[call(**arguments)])], stop)


@pytest.mark.parametrize("between", ["", "\n", "\n\n"])
@pytest.mark.parametrize("form", ["qwen", "qwen3_5", "deepseek3"])
def test_white_space_between_calls_belongs_to_the_form(form, between):
    one, gap = WRITTEN_BY_HAND[form], TOOL_FORMATS[form].gap
    assert TOOL_FORMATS[form].parse(f"a{gap}{one}{between}{one}", TOOLS) == ("a", [call(drug="阿司匹林")] * 2)


# From text to calls.

ACCEPTED = {
    "default": [
        'Action:look_up\nAction Input:{"drug": "阿司匹林"}\n\n',
        'Action: look_up \nAction Input:\n{\n  "drug": "阿司匹林"\n}',
    ],
    "qwen": ['<tool_call>{"arguments": {"drug": "阿司匹林"}, "name": "look_up"}</tool_call>'],
    "llama3": [
        '{"type": "function", "name": "look_up", "parameters": {"drug": "阿司匹林"}}',
        ' {\n"name": "look_up",\n"parameters": {"drug": "\\u963f\\u53f8\\u5339\\u6797"}\n}\n',
    ],
    "glm4": ['look_up\n{"drug":"阿司匹林"}\n'],
    "mistral": ['[TOOL_CALLS][{"name": "look_up", "arguments": {"drug": "阿司匹林"}}]'],
    "qwen3_5": [
        "<tool_call><function=look_up><parameter=drug>阿司匹林</parameter></function></tool_call>",
        "<tool_call>\n<function=look_up>\n\n<parameter=drug>\n阿司匹林</parameter>\n\n</function>\n\n</tool_call>",
    ],
    "deepseek3": [
        "<｜tool▁calls▁begin｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n"
        '```json\n{\n  "drug": "阿司匹林"\n}\n```\n<｜tool▁call▁end｜>\n<｜tool▁calls▁end｜>'
    ],
}


@pytest.mark.parametrize(
    ("form", "text"),
    [(form, text) for form, texts in ACCEPTED.items() for text in (*texts, WRITTEN_BY_HAND[form])],
)
def test_other_spellings_of_a_call(form, text):
    expected = [call(drug="阿司匹林")]
    assert TOOL_FORMATS[form].parse(text, TOOLS) == ("", expected)
    assert TOOL_FORMATS[form].parse(text) == ("", expected)
    gap = TOOL_FORMATS[form].gap
    assert TOOL_FORMATS[form].parse(f"1\n\n{text}") == ("1\n\n".removesuffix(gap), expected)
    thoughts = "<think>\nSo?\n</think>\n\n"
    assert TOOL_FORMATS[form].parse(thoughts + text) == (thoughts.removesuffix(gap), expected)
    # A prompt that ends with <think> leaves only the end of the thoughts to the answer.
    assert TOOL_FORMATS[form].parse(thoughts[7:] + text) == (thoughts[7:].removesuffix(gap), expected)


def test_id_of_a_call_is_kept():
    text = '[TOOL_CALLS] [{"name": "look_up", "arguments": {}, "id": "abcde1234"}]'
    assert TOOL_FORMATS["mistral"].parse(text) == ("", [{"id": "abcde1234", **call()}])


def test_text_after_a_marked_call_is_kept():
    text = f"a\n{WRITTEN_BY_HAND['qwen']}\nb\n{WRITTEN_BY_HAND['qwen']} c"
    assert TOOL_FORMATS["qwen"].parse(text) == ("a\nb c", [call(drug="阿司匹林")] * 2)
    assert TOOL_FORMATS["mistral"].parse(f"a\n{WRITTEN_BY_HAND['mistral']}\nb") == ("a\nb", [call(drug="阿司匹林")])


JSON = '{"drug": "x"}'
NO_CALLS = {
    "nothing": "",
    "words": "Take 100 mg. 多喝水。",
    "no JSON": "<tool_call>\nlook_up(drug)\n</tool_call>",
    "not closed": '<tool_call>\n{"name": "look_up", "arguments": {}}\n',
    "not opened": '{"name": "look_up", "arguments": {}}\n</tool_call>',
    "text in the mark": '<tool_call>{"name": "look_up", "arguments": {}} now </tool_call>',
    "call in a broken call": f'<tool_call>{{"name": "a", {WRITTEN_BY_HAND["qwen"]}',
    "python": "<tool_call>{'name': 'look_up', 'arguments': {}}</tool_call>",
    "no name": '<tool_call>{"arguments": {}}</tool_call>',
    "empty name": '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    "name is a number": '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
    "no arguments": '<tool_call>{"name": "look_up"}</tool_call>',
    "arguments are a string": '<tool_call>{"name": "look_up", "arguments": "{}"}</tool_call>',
    "arguments are a list": '<tool_call>{"name": "look_up", "arguments": [1]}</tool_call>',
    "arguments are null": '<tool_call>{"name": "look_up", "arguments": null}</tool_call>',
    "unknown key": '<tool_call>{"name": "look_up", "arguments": {}, "when": 1}</tool_call>',
    "other type": '{"name": "look_up", "parameters": {}, "type": "example"}',
    "NaN": '<tool_call>{"name": "look_up", "arguments": {"x": NaN}}</tool_call>',
    "infinite number": '<tool_call>{"name": "look_up", "arguments": {"x": 1e999}}</tool_call>',
    "half a character": '<tool_call>{"name": "look_up", "arguments": {"x": "\\ud800"}}</tool_call>',
    "deep": "<tool_call>" + '{"name": "look_up", "arguments": {"x": ' + "[" * 100_000,
    "long number": '<tool_call>{"name": "look_up", "arguments": {"x": ' + "1" * 5000 + "}}</tool_call>",
    "a broken one in a list": '[TOOL_CALLS] [{"name": "look_up", "arguments": {}}, {"name": "look_up"}]',
    "empty list": "[TOOL_CALLS] []",
    "list not closed": '[TOOL_CALLS] [{"name": "look_up", "arguments": {}}',
    "object in place of the list": '[TOOL_CALLS] {"name": "look_up", "arguments": {}}',
    "no input": "Action: look_up",
    "input in words": "Action: look_up\nAction Input: aspirin",
    "input is a list": "Action: look_up\nAction Input: []",
    "words after the input": f"Action: look_up\nAction Input: {JSON}\nObservation: 100 mg",
    "no action": f"Action:\nAction Input: {JSON}",
    "action within a line": f"The form is Action: look_up\nAction Input: {JSON}",
    "object with another key": '{"name": "look_up", "arguments": {}}',
    "words after the object": '{"name": "look_up", "parameters": {}}\nIs that right?',
    "words before the object": 'I would write {"name": "look_up", "parameters": {}}',
    "object in a fence": '```json\n{"name": "look_up", "parameters": {}}\n```',
    "object in a list": '[\n{"name": "look_up", "parameters": {}}\n]',
    "two objects on a line": '{"name": "look_up", "parameters": {}} {"name": "look_up", "parameters": {}}',
    "name without object": "look_up\n",
    "name and list": "look_up\n[1]",
    "name and words": "look_up\n{drug}",
    "name, object and words": f"look_up\n{JSON} done",
    "name at the end of a line": f"call look_up\n{JSON}",
    "no function": "<tool_call>\n<parameter=drug>\nx\n</parameter>\n</tool_call>",
    "function not closed": "<tool_call>\n<function=look_up>\n<parameter=drug>\nx\n</parameter>\n</tool_call>",
    "function closed otherwise": "<tool_call>\n<function=look_up>\n<function/>\n</tool_call>",
    "function without call": "<function=look_up>\n<parameter=drug>\nx\n</parameter>\n</function>",
    "function without name": "<tool_call>\n<function=>\n</function>\n</tool_call>",
    "call not closed": "<tool_call>\n<function=look_up>\n</function>",
    "value not closed": "<tool_call>\n<function=look_up>\n<parameter=drug>\nx\n</function>\n</tool_call>",
    "first value not closed": "<tool_call>\n<function=look_up>\n<parameter=drug>\nx\n<parameter=text>\ny\n</parameter>"
    "\n</function>\n</tool_call>",
    "key twice": "<tool_call>\n<function=look_up>\n<parameter=drug>\nx\n</parameter>\n<parameter=drug>\ny\n</parameter>"
    "\n</function>\n</tool_call>",
    "words after a value": "<tool_call>\n<function=look_up>\n<parameter=drug>\nx\n</parameter>, so\n</function>"
    "\n</tool_call>",
    "JSON in a function": f"<tool_call>\n<function=look_up>\n{JSON}\n</function>\n</tool_call>",
    "call in a broken function": f"<tool_call>\n<function=look_up>\n{WRITTEN_BY_HAND['qwen3_5']}",
    "marks around nothing": "<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>",
    "no end mark": WRITTEN_BY_HAND["deepseek3"].removesuffix("<｜tool▁calls▁end｜>"),
    "no mark of the list": WRITTEN_BY_HAND["deepseek3"].removeprefix("<｜tool▁calls▁begin｜>"),
    "block not closed": WRITTEN_BY_HAND["deepseek3"].replace("\n```<", "<"),
    "no block": WRITTEN_BY_HAND["deepseek3"].replace("```json\n", ""),
    "arguments in a block are a list": WRITTEN_BY_HAND["deepseek3"].replace('{"drug": "阿司匹林"}', "[]"),
    "other type in a block": WRITTEN_BY_HAND["deepseek3"].replace("function", "example"),
    "second of two broken": WRITTEN_BY_HAND["deepseek3"].replace(
        "<｜tool▁calls▁end｜>", "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n<｜tool▁calls▁end｜>"
    ),
    "in the thoughts": "<think>\n" + "\n".join(WRITTEN_BY_HAND.values()) + "\n</think>\n\nNo.",
    "at the end of the thoughts": f"<think>\n{WRITTEN_BY_HAND['llama3']}\n</think>",
    "in thoughts without end": f"<think>\nSo:\n{WRITTEN_BY_HAND['glm4']}",
    "in thoughts that the prompt opened": f"{WRITTEN_BY_HAND['qwen']}</think>No.",
}


@pytest.mark.parametrize("form", TOOL_FORMATS)
@pytest.mark.parametrize("text", NO_CALLS.values(), ids=NO_CALLS)
def test_what_is_no_call_stays_text(form, text):
    assert TOOL_FORMATS[form].parse(text, TOOLS) == (text, [])


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_call_of_a_tool_that_was_not_offered_stays_text(form):
    text = WRITTEN_BY_HAND[form].replace("look_up", "erase_all")
    assert TOOL_FORMATS[form].parse(text, TOOLS) == (text, [])
    assert TOOL_FORMATS[form].parse(text)[1] == [call("erase_all", drug="阿司匹林")]


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_beginnings_and_damaged_texts(load, form):
    """An answer that was cut or garbled gives the calls that are whole, or none, and never an error."""
    tokenizer = load()
    stop = apply_template(tokenizer, FAMILY_ONLY.get(form, "chatml"), tool_format=form)
    content, calls = TURNS["text and a call" if form in ONE_CALL else "text and three calls"]
    whole = written(tokenizer, [user("?"), assistant(content, tool_calls=calls)], stop)
    parse = TOOL_FORMATS[form].parse
    for end in range(len(whole)):
        text, found = parse(whole[:end], TOOLS)
        assert found == calls[: len(found)] and len(found) < len(calls)
        assert text == whole[:end] or found
    draw = random.Random(0)
    for _ in range(1000):
        text = list(whole)
        for _ in range(draw.randint(1, 4)):
            text[draw.randrange(len(text))] = draw.choice(["", "{", "}", '"', "\n", "<tool_call>", "]", "\ud83d", "好"])
        beside, found = parse("".join(text), TOOLS)
        assert all(each["function"]["name"] in NAMES for each in found)
        assert all(isinstance(each["function"]["arguments"], dict) for each in found)
        assert found or beside == "".join(text)


def weigh(drug: str, days: int):
    """Weigh.

    Args:
        drug: which one.
        days: how many.
    """


@pytest.mark.parametrize("tools", [[{"name": "flat"}], [TOOLS[0], {"name": "flat"}], [weigh, {"name": "flat"}]])
def test_tools_in_each_form(tools):
    parse = TOOL_FORMATS["glm4"].parse
    for name, offered in {"flat": True, "look_up": TOOLS[0] in tools, "weigh": weigh in tools}.items():
        assert bool(parse(f"{name}\n{{}}", tools)[1]) == offered


# The form of a template.


@pytest.mark.parametrize("name", TEMPLATES)
def test_declared_form_is_the_one_that_reads_the_template(load, name):
    """Also without the facts that apply_template leaves, as for templates of other makers."""
    tokenizer = load()
    declared = get_template(name).tool_format
    turn_end = apply_template(tokenizer, name)[0]
    assert tool_format_of(tokenizer) is TOOL_FORMATS.get(declared)
    tokenizer.chat_template, tokenizer.eos_token = get_template(name).jinja, turn_end
    assert tool_format_of(tokenizer) is TOOL_FORMATS.get(declared)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *[("chatml", "qwen"), ("qwen", "qwen"), ("qwen3", "qwen"), ("llama3", "llama3"), ("vicuna", "default")],
        *[("qwen3_5", "qwen3_5"), ("qwen3_5_nothink", "qwen3_5"), ("deepseek3", "deepseek3")],
    ],
)
def test_forms_of_the_best_known_families(name, form):
    assert get_template(name).tool_format == form


@pytest.mark.parametrize(
    ("published", "form"),
    [
        *[("qwen2_5", "qwen"), ("qwen3", "qwen"), ("llama3_1", "llama3")],
        *[("qwen3_5_think", "qwen3_5"), ("qwen3_5_nothink", "qwen3_5")],
    ],
)
def test_form_of_a_published_template(load, published, form):
    tokenizer = load()
    tokenizer.chat_template = official(published)
    tokenizer.eos_token = "<|eot_id|>" if form == "llama3" else "<|im_end|>"
    assert tool_format_of(tokenizer).name == form


def test_no_form_without_a_template_or_tools(load):
    tokenizer = load()
    tokenizer.chat_template = None
    assert tool_format_of(tokenizer) is None
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    assert tool_format_of(tokenizer) is None
    tokenizer.chat_template = official("llama3")
    assert tool_format_of(tokenizer) is None


def test_form_stays_until_another_is_asked_for(load, tmp_path):
    tokenizer = load()
    stop = apply_template(tokenizer, "vicuna", "Be kind.", "mistral")
    installed = tokenizer.chat_template
    for _ in range(2):
        for arguments in ({}, {"name": "vicuna"}, {"tool_format": "mistral"}, {"system_prompt": "Be kind."}):
            assert apply_template(tokenizer, **arguments) == stop
            assert tokenizer.chat_template == installed
            assert tool_format_of(tokenizer).name == "mistral"
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert '"tool_format": "mistral"' in tokenizer.chat_template.split("\n")[0]
    assert apply_template(tokenizer, tool_format="glm4") == stop
    assert tool_format_of(tokenizer).name == "glm4" and "[TOOL_CALLS]" not in tokenizer.chat_template
    assert "Be kind." in text_of(tokenizer, [user("Hi")])
    apply_template(tokenizer, "alpaca")
    assert tool_format_of(tokenizer).name == "default"


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen3_5", "qwen3_5_nothink", "deepseek3"])
def test_family_with_a_form_of_its_own_takes_no_other(load, name):
    tokenizer = load()
    own = get_template(name).tool_format
    apply_template(tokenizer, name, tool_format=own)
    installed = tokenizer.chat_template
    for arguments in ({"name": name}, {}):
        with pytest.raises(TemplateError, match=f"template {name} has the tool format of its family, {own}: leave out"):
            apply_template(tokenizer, tool_format="mistral", **arguments)
    assert tokenizer.chat_template == installed


@pytest.mark.parametrize("form", FAMILY_ONLY)
@pytest.mark.parametrize("name", TEMPLATES)
def test_form_of_one_family_is_refused_by_others(load, name, form):
    tokenizer = load()
    if get_template(name).tool_format == form:
        apply_template(tokenizer, name, tool_format=form)
    else:
        with pytest.raises(TemplateError, match=f"the template {name} .*: leave out --tool_format {form}"):
            apply_template(tokenizer, name, tool_format=form)


def test_refused_form_of_a_family_names_those_that_can_be_had(load):
    with pytest.raises(TemplateError, match="qwen3_5, or use one of default, qwen, llama3, glm4, mistral$"):
        apply_template(load(), "chatml", tool_format="qwen3_5")


def test_help_lists_the_forms_that_can_be_had():
    text = " ".join(run_program("supervised_finetuning.py", "--help").stdout.split())
    assert f"tool calls: {', '.join(COMMON)}. " in text


def test_own_template_takes_no_other_form(load):
    tokenizer = load()
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = own = get_template("qwen").jinja
    with pytest.raises(TemplateError, match="it has the tool format qwen, which --tool_format mistral cannot change"):
        apply_template(tokenizer, tool_format="mistral")
    assert tokenizer.chat_template == own
    apply_template(tokenizer, tool_format="qwen")
    assert tool_format_of(tokenizer).name == "qwen"
    apply_template(tokenizer, system_prompt="Be kind.")
    assert '"tool_format": "qwen"' in tokenizer.chat_template.split("\n")[0]


def test_unknown_form_is_refused_with_the_known_ones(load):
    with pytest.raises(
        TemplateError, match="no tool format called 'hermes': use one of default, qwen, llama3, glm4, m"
    ):
        apply_template(load(), "vicuna", tool_format="hermes")


def test_template_without_a_place_for_tools(load):
    plain = Template("plain", _turns(("Q: ", "\n"), ("A: ", "\n"), tool_format=None), ("<|endoftext|>",), "https://x")
    assert plain.tool_format is None
    with pytest.raises(TemplateError, match="the template plain has none to choose: leave out --tool_format qwen"):
        plain.with_tools("qwen")
    tokenizer = load()
    tokenizer.chat_template = plain.jinja
    assert tool_format_of(tokenizer) is None
    assert text_of(tokenizer, [user("Hi"), assistant("Hello.")]) == "Q: Hi\nA: Hello.<|endoftext|>\n"
    with pytest.raises(Exception, match="tools were given, but this template has no place for tools"):
        text_of(tokenizer, [user("Hi")], TOOLS)
    with pytest.raises(Exception, match="message 2 uses a tool, but"):
        text_of(tokenizer, [user("Hi"), assistant("", tool_calls=[call()])])


def test_marks_never_become_the_token_for_unknown_text():
    tokenizer = byte_level(None, False)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    model = vocabulary["model"]
    model["vocab"] = {token: n for token, n in model["vocab"].items() if "<" not in token or token.startswith("<|")}
    model["vocab"] |= {"<unk>": max(model["vocab"].values()) + 1}
    model["merges"] = [pair for pair in model["merges"] if "<" not in "".join(pair)]
    model["unk_token"] = "<unk>"
    tokenizer = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(vocabulary)),
        eos_token="<|endoftext|>",
        unk_token="<unk>",
    )
    assert tokenizer.unk_token_id in tokenizer.encode("<tool_call>", add_special_tokens=False)
    with pytest.raises(
        TemplateError, match="--tool_format qwen cannot be used: the vocabulary has no tokens for <tool"
    ):
        apply_template(tokenizer, "vicuna", tool_format="qwen")
    apply_template(tokenizer, "vicuna")
    assert tool_format_of(tokenizer).name == "default"
    for _ in range(2):
        apply_template(tokenizer, "chatml")
        assert tool_format_of(tokenizer) is None
        assert text_of(tokenizer, [user("Hi"), assistant("Hello.")]).startswith("<|im_start|>user\nHi<|im_end|>")
        with pytest.raises(Exception, match="tools were given, but the vocabulary has no tokens for <tools>"):
            text_of(tokenizer, [user("Hi")], TOOLS)


# From training to serving.


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_calls_are_read_only_where_tools_were_offered(load, model, tools):
    tokenizer = load("marks_are_special")
    stop = apply_template(tokenizer, "chatml", tool_format="default")
    messages = [user("?"), assistant(WRITTEN_BY_HAND["default"])]
    answer = answer_to(model, tokenizer, messages, stop, tools)
    if tools:
        assert (answer.text, list(answer.tool_calls)) == ("", [call(drug="阿司匹林")])
    else:
        assert (answer.text, answer.tool_calls) == (WRITTEN_BY_HAND["default"], ())


def test_trained_call_is_served_as_a_call(tmp_path):
    """--tool_format at the training is enough: the engine, the stream and inference.py read the calls by themselves."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = None, "<|endoftext|>"
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in TOOL_FORMATS["mistral"].marks])
    save_model(tmp_path / "model", tokenizer)
    wanted = {"name": "look_up", "arguments": {"药": "x"}}
    tools = [{"name": "look_up"}]
    turns = [{"from": "human", "value": "Dose?"}, {"from": "function_call", "value": json.dumps(wanted)}]
    turns += [{"from": "observation", "value": "1"}, {"from": "gpt", "value": "One."}]
    write_jsonl(tmp_path / "data" / "rows.jsonl", [{"conversations": turns, "tools": json.dumps(tools)}])
    run_here(
        "supervised_finetuning.py",
        *("--model_name_or_path", tmp_path / "model", "--train_file_dir", tmp_path / "data"),
        *("--output_dir", tmp_path / "out", "--template_name", "chatml", "--tool_format", "mistral"),
        *("--use_peft", "False", "--learning_rate", 1e-2, "--max_steps", 80, "--logging_steps", 40),
        *("--save_strategy", "no", "--sample_prompts", 0, "--lr_scheduler_type", "constant"),
    )
    engine = ChatEngine.from_pretrained(str(tmp_path / "out"))
    offered = [{"type": "function", "function": tool} for tool in tools]
    expected = [{"type": "function", "function": wanted}]
    answer = engine.chat([user("Dose?")], tools=offered)
    assert (answer.text, list(answer.tool_calls), answer.finish_reason) == ("", expected, "stop")
    after = engine.chat(
        [user("Dose?"), assistant(answer.text, tool_calls=list(answer.tool_calls)), tool("1")], tools=offered
    )
    assert (after.text, after.tool_calls) == ("One.", ())
    with engine.stream(engine.request([user("Dose?")], tools=offered)) as stream:
        assert list(stream) == []
    assert stream.answer == answer
    assert engine.batch([engine.prompt_ids([user("Dose?")], offered)] * 2, tools=[offered, None])[0] == answer

    questions = write_jsonl(tmp_path / "q.jsonl", [{"conversations": turns[:1], "tools": tools}])
    run_here(
        "inference.py",
        *("--model_name_or_path", tmp_path / "out", "--data_file", questions, "--output_file", tmp_path / "a.jsonl"),
    )
    (row,) = read_json(tmp_path / "a.jsonl")
    assert (row["response"], row["tool_calls"]) == ("", expected)
