"""Tool calls in each form: written by a template, read back from the answer, and nothing read that is no call."""

import json
import random
import re

from medicalgpt.chat import ChatEngine, Sampling
from medicalgpt.encoding import EncodingError, encode_chat
from medicalgpt.tools import TOOL_FORMATS, tool_names
from template import (
    TEMPLATES,
    Template,
    TemplateError,
    _turns,
    apply_template,
    get_template,
    stop_token_ids,
    tool_format_of,
)
from tests.helpers import chat, read_json, run_here, save_model, write_jsonl
from tests.test_template import CORE, TOKENIZERS, assistant, byte_level, official, text_of, tool, user
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
            "parameters": {"type": "object", "properties": {"drug": {"type": "string"}}},
        },
    }
    for name in ("look_up", "查_号-2.b")
]
NAMES = tool_names(TOOLS)


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
WRITTEN += [(name, form) for name in ("chatml", "vicuna", "alpaca") for form in TOOL_FORMATS]
WRITTEN = list(dict.fromkeys(WRITTEN))
ROUND_TRIPS = [
    (name, form, turn, kind)
    for name, form in WRITTEN
    for turn in TURNS
    for kind in ("byte_like_qwen", "metaspace", "marks_are_special")
    if turn.startswith("text and") or (name in CORE and kind == "byte_like_qwen")
    if kind == "byte_like_qwen" or name in CORE
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in ("byte_like_qwen", "metaspace"):
        TOKENIZERS[kind]().save_pretrained(root / kind)
    tokenizer = TOKENIZERS["byte_like_qwen"]()
    marks = sorted({mark for form in ("qwen", "mistral") for mark in TOOL_FORMATS[form].marks})
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
    reply = ChatEngine(model, tokenizer)._reply_to(sample.input_ids, Sampling(max_new_tokens=4000), tools)
    for token in ids:
        reply.add(token)
    answer = reply.answer()
    assert answer.finish_reason == "stop"
    return answer


def written(tokenizer, messages, stop: tuple[str, ...]) -> str:
    """The supervised text of the last turn without its end."""
    sample = encode_chat(tokenizer, chat(messages, TOOLS))[-1]
    text = tokenizer.decode([label for label in sample.labels if label != -100], clean_up_tokenization_spaces=False)
    return text.removesuffix(next(end for end in stop if text.endswith(end)))


def without_thoughts(text: str) -> str:
    return re.sub(r"<think>\s*</think>", "", text).strip()


# From calls to text and back.


@pytest.mark.parametrize(("name", "form", "turn", "kind"), ROUND_TRIPS)
def test_what_a_template_writes_is_read_back(load, model, name, form, turn, kind):
    tokenizer = load(kind)
    stop = apply_template(tokenizer, name, tool_format=form)
    content, calls = TURNS[turn]
    messages = [user("Dose?"), assistant(content, tool_calls=calls)]
    if len(calls) > 1 and form in ONE_CALL:
        with pytest.raises(EncodingError, match=f"message 2 has {len(calls)} tool calls"):
            written(tokenizer, messages, stop)
        return
    text, found = tool_format_of(tokenizer).parse(written(tokenizer, messages, stop), NAMES)
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
}


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_text_of_a_call(load, form):
    tokenizer = load()
    apply_template(tokenizer, "chatml", tool_format=form)
    text = written(tokenizer, [user("?"), assistant("Look:", tool_calls=[call(drug="阿司匹林")])], ("<|im_end|>",))
    assert text == "Look:\n" + WRITTEN_BY_HAND[form]


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
}


@pytest.mark.parametrize(
    ("form", "text"),
    [(form, text) for form, texts in ACCEPTED.items() for text in (*texts, WRITTEN_BY_HAND[form])],
)
def test_other_spellings_of_a_call(form, text):
    expected = [call(drug="阿司匹林")]
    assert TOOL_FORMATS[form].parse(text, NAMES) == ("", expected)
    assert TOOL_FORMATS[form].parse(text) == ("", expected)
    assert TOOL_FORMATS[form].parse(f"1\n\n{text}") == ("1\n", expected)
    thoughts = "<think>\nSo?\n</think>\n\n"
    assert TOOL_FORMATS[form].parse(thoughts + text) == (thoughts[:-1], expected)
    # A prompt that ends with <think> leaves only the end of the thoughts to the answer.
    assert TOOL_FORMATS[form].parse(thoughts[7:] + text) == (thoughts[7:-1], expected)


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
    "in the thoughts": "<think>\n" + "\n".join(WRITTEN_BY_HAND.values()) + "\n</think>\n\nNo.",
    "at the end of the thoughts": f"<think>\n{WRITTEN_BY_HAND['llama3']}\n</think>",
    "in thoughts without end": f"<think>\nSo:\n{WRITTEN_BY_HAND['glm4']}",
    "in thoughts that the prompt opened": f"{WRITTEN_BY_HAND['qwen']}</think>No.",
}


@pytest.mark.parametrize("form", TOOL_FORMATS)
@pytest.mark.parametrize("text", NO_CALLS.values(), ids=NO_CALLS)
def test_what_is_no_call_stays_text(form, text):
    assert TOOL_FORMATS[form].parse(text, NAMES) == (text, [])


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_call_of_a_tool_that_was_not_offered_stays_text(form):
    text = WRITTEN_BY_HAND[form].replace("look_up", "erase_all")
    assert TOOL_FORMATS[form].parse(text, NAMES) == (text, [])
    assert TOOL_FORMATS[form].parse(text)[1] == [call("erase_all", drug="阿司匹林")]


@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_beginnings_and_damaged_texts(load, form):
    """An answer that was cut or garbled gives the calls that are whole, or none, and never an error."""
    tokenizer = load()
    apply_template(tokenizer, "chatml", tool_format=form)
    content, calls = TURNS["text and a call" if form in ONE_CALL else "text and three calls"]
    whole = written(tokenizer, [user("?"), assistant(content, tool_calls=calls)], ("<|im_end|>",))
    parse = TOOL_FORMATS[form].parse
    for end in range(len(whole)):
        text, found = parse(whole[:end], NAMES)
        assert found == calls[: len(found)] and len(found) < len(calls)
        assert text == whole[:end] or found
    draw = random.Random(0)
    for _ in range(1000):
        text = list(whole)
        for _ in range(draw.randint(1, 4)):
            text[draw.randrange(len(text))] = draw.choice(["", "{", "}", '"', "\n", "<tool_call>", "]", "\ud83d", "好"])
        beside, found = parse("".join(text), NAMES)
        assert all(each["function"]["name"] in NAMES for each in found)
        assert all(isinstance(each["function"]["arguments"], dict) for each in found)
        assert found or beside == "".join(text)


def test_names_of_tools_in_each_form():
    def weigh(drug: str): ...

    assert tool_names([TOOLS[0], {"name": "flat"}, weigh]) == ["look_up", "flat", "weigh"]


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
    [("chatml", "qwen"), ("qwen", "qwen"), ("qwen3", "qwen"), ("llama3", "llama3"), ("vicuna", "default")],
)
def test_forms_of_the_best_known_families(name, form):
    assert get_template(name).tool_format == form


@pytest.mark.parametrize(("published", "form"), [("qwen2_5", "qwen"), ("qwen3", "qwen"), ("llama3_1", "llama3")])
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


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_family_with_a_form_of_its_own_takes_no_other(load, name):
    tokenizer = load()
    own = get_template(name).tool_format
    apply_template(tokenizer, name, tool_format=own)
    installed = tokenizer.chat_template
    for arguments in ({"name": name}, {}):
        with pytest.raises(TemplateError, match=f"template {name} has the tool form of its family, {own}: leave out"):
            apply_template(tokenizer, tool_format="mistral", **arguments)
    assert tokenizer.chat_template == installed


def test_own_template_takes_no_other_form(load):
    tokenizer = load()
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = own = get_template("qwen").jinja
    with pytest.raises(TemplateError, match="it has the tool form qwen, which --tool_format mistral cannot change"):
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
    with engine.stream([user("Dose?")], tools=offered) as stream:
        assert "".join(stream).startswith("[TOOL_CALLS]")
    assert stream.answer == answer
    assert engine.batch([[user("Dose?")]] * 2, tools=[offered, None])[0] == answer

    questions = write_jsonl(tmp_path / "q.jsonl", [{"conversations": turns[:1], "tools": tools}])
    run_here(
        "inference.py",
        *("--model_name_or_path", tmp_path / "out", "--data_file", questions, "--output_file", tmp_path / "a.jsonl"),
    )
    (row,) = read_json(tmp_path / "a.jsonl")
    assert (row["response"], row["tool_calls"]) == ("", expected)
