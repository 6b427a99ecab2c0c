"""Every template with every kind of tokenizer: what is supervised, what inference sees, and what is refused."""

import re

from medicalgpt.models.templating import EOS, stop_token_ids
from template import TEMPLATES, apply_template, get_template
from tests.templates import (
    CASES,
    CORE,
    LLAMA3_TOKENS,
    NO_SYSTEM,
    NO_TOOLS,
    SUPPORTED,
    SYSTEM,
    THINKING,
    TOKENIZERS,
    TOOL,
    assistant,
    byte_level,
    call,
    expected_spans,
    ids_and_spans,
    official,
    repeats_bos,
    text_of,
    tool,
    user,
)

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, ByT5Tokenizer

WITH_TOKENIZERS = [
    (name, kind) for name in TEMPLATES for kind in TOKENIZERS if name in CORE or kind in ("byte_adds_bos", "metaspace")
]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folders of the tokenizers, built once: every test loads its own copy."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind, build in TOKENIZERS.items():
        build().save_pretrained(root / kind)
    return root


@pytest.fixture
def load(saved):
    return lambda kind: AutoTokenizer.from_pretrained(saved / kind)


@pytest.fixture
def plain(load):
    return load("byte_without_bos")


# What is supervised, and what inference sees.


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("name", "case"), SUPPORTED)
def test_supervised_text_is_the_answer_and_its_turn_end(load, kind, name, case):
    tokenizer = load(kind)
    end = {"llama3": "<|eot_id|>", "vicuna": tokenizer.eos_token, "alpaca": tokenizer.eos_token}.get(name, "<|im_end|>")
    messages, tools = CASES[case][:2]
    stop = apply_template(tokenizer, name)
    _, spans = ids_and_spans(tokenizer, messages, tools)
    texts = [text for _, text in spans]
    if name == "vicuna":  # the space after "ASSISTANT:" is part of the answer's first token
        texts = [text.removeprefix(" ") for text in texts]
    assert texts == [text + end for text in expected_spans(name, case)]
    assert stop[0] == end == tokenizer.eos_token


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("name", "case"), SUPPORTED)
def test_ids_before_each_answer_are_the_inference_prompt(load, kind, name, case):
    tokenizer = load(kind)
    messages, tools = CASES[case][:2]
    apply_template(tokenizer, name)
    ids, spans = ids_and_spans(tokenizer, messages, tools)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(spans) == len(turns)
    for turn, (start, _) in zip(turns, spans, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:turn], tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert ids[:start] == prompt, f"turn {turn}"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_qwen3_without_thinking_has_the_empty_block_in_the_prompt(load, kind):
    tokenizer = load(kind)
    apply_template(tokenizer, "qwen3")
    messages = CASES["one_turn"][0]
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    ids, [(start, text)] = ids_and_spans(tokenizer, messages, enable_thinking=False)
    assert text == messages[1]["content"] + "<|im_end|>"
    assert ids[:start] == prompt
    assert text_of(tokenizer, messages[:1], add_generation_prompt=True, enable_thinking=False).endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize(("name", "kind"), WITH_TOKENIZERS)
def test_text_begins_with_the_bos_that_plain_text_gets(load, kind, name):
    tokenizer = load(kind)
    adds = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    apply_template(tokenizer, name)
    ids = ids_and_spans(tokenizer, CASES["many_turns"][0])[0]
    opens_turns = "bos_opens_turns" in kind and "<|im_start|>" in get_template(name).tokens
    if opens_turns:
        assert ids[0] == tokenizer.bos_token_id and ids[1] != tokenizer.bos_token_id
    else:
        assert (ids[0] == tokenizer.bos_token_id) == adds
        assert tokenizer.bos_token_id not in ids[1:2]
        # Some families write it at the head of each round.
        later = ids[1:].count(tokenizer.bos_token_id)
        assert later == 0 or repeats_bos(name)


# The text itself.


def test_vicuna_text(load):
    tokenizer = load("metaspace")
    apply_template(tokenizer, "vicuna")
    messages = [user("Hi"), assistant("Hello."), user("And?")]
    assert text_of(tokenizer, messages, add_generation_prompt=True) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: Hi ASSISTANT: Hello.</s>USER: And? ASSISTANT:"
    )
    assert text_of(tokenizer, [SYSTEM, *messages[:2]]) == f"<s>{SYSTEM['content']} USER: Hi ASSISTANT: Hello.</s>"
    assert text_of(tokenizer, [{"role": "system", "content": ""}, user("Hi")]) == "<s>USER: Hi "


def test_alpaca_text(load):
    tokenizer = load("metaspace")
    apply_template(tokenizer, "alpaca")
    messages = [user("Hi"), assistant("Hello."), user("And?")]
    assert text_of(tokenizer, messages, add_generation_prompt=True) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHi\n\n### Response:\nHello.</s>\n\n### Instruction:\nAnd?\n\n### Response:\n"
    )


def test_chatml_has_no_default_system(plain):
    apply_template(plain, "chatml")
    assert text_of(plain, [user("Hi"), assistant("Hello.")]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    )


@pytest.mark.parametrize("name", ["chatml", "vicuna", "alpaca"])
def test_tools_are_listed_with_chinese_unescaped(plain, name):
    apply_template(plain, name)
    text = text_of(plain, *CASES["parallel_tools"][:2])
    assert '"description": "the \\"dose\\" of a drug, 查剂量 <mg>"' in text
    if name == "chatml":
        results = "<tool_response>\n100 mg\n</tool_response>\n<tool_response>\n200 mg\n</tool_response>"
    else:
        results = "Observation: 100 mg\nObservation: 200 mg"
    assert results in text


OFFICIAL_PROBES = {
    "one_turn": (CASES["one_turn"][0], {}),
    "prompt": (CASES["one_turn"][0][:1], {"add_generation_prompt": True}),
    "prompt_without_thinking": (CASES["one_turn"][0][:1], {"add_generation_prompt": True, "enable_thinking": False}),
    "many_turns": (CASES["many_turns"][0], {}),
    "many_turns_prompt": (CASES["many_turns"][0][:-1], {"add_generation_prompt": True}),
    "system": (CASES["system"][0], {}),
    "empty_system": ([{"role": "system", "content": ""}, *CASES["system"][0][1:]], {}),
    "system_later": ([user("Hi"), SYSTEM, user("Hi"), assistant("Hello.")], {}),
    "spaces": ([user("  Hi \n"), assistant(" Hello. \n")], {}),
    "two_users": ([user("a"), user("b"), assistant("c"), assistant("d")], {}),
}
OFFICIAL_TOOL_PROBES = {
    "tools": (
        [user("Dose?"), assistant("", tool_calls=[call({"drug": "阿司匹林"})]), tool("100 mg")],
        {"tools": [TOOL]},
    ),
    "tools_system": ([SYSTEM, user("Dose?")], {"tools": [TOOL, TOOL], "add_generation_prompt": True}),
    "tools_answered": (
        [
            SYSTEM,
            user("Dose?"),
            assistant("", tool_calls=[call({"drug": "阿司匹林", "days": [1, 2.5, True, None]})]),
            tool('{"dose": "100 毫克"}'),
            assistant("Take it."),
            user("Thanks"),
            assistant("Bye."),
        ],
        {"tools": [TOOL]},
    ),
    "flat_call": (
        [user("Dose?"), assistant("", tool_calls=[{"name": "look_up", "arguments": {"drug": "x"}}]), tool("1")],
        {"tools": [TOOL]},
    ),
}
HERMES_PROBES = {
    "text_and_calls": (
        [
            user("Dose?"),
            assistant("Look:", tool_calls=[call({"drug": "a"}), call({"drug": "b"})]),
            tool("1"),
            tool("2"),
        ],
        {"tools": [TOOL], "add_generation_prompt": True},
    ),
    "tools_empty_system": ([{"role": "system", "content": ""}, user("Dose?")], {"tools": [TOOL]}),
}
QWEN3_PROBES = {
    "thinking": (CASES["thinking"][0], {"tools": [TOOL]}),
    "thinking_inline": (CASES["thinking_inline"][0], {}),
    "thinking_prompt": (CASES["thinking"][0][:-1], {"tools": [TOOL], "add_generation_prompt": True}),
    "tool_response_as_user": (
        [
            user("Dose?"),
            assistant("", reasoning_content="look", tool_calls=[call({"drug": "x"})]),
            user("<tool_response>\n100 mg\n</tool_response>"),
            assistant("Take it.", reasoning_content="clear"),
        ],
        {},
    ),
    "only_assistant": ([assistant("Hello.", reasoning_content="greet")], {}),
    "leading_newlines": ([user("Hi"), assistant("\n\nHello.")], {}),
}
ORACLE = [
    *(("qwen", "qwen2_5", probe) for probe in (OFFICIAL_PROBES | OFFICIAL_TOOL_PROBES | HERMES_PROBES).items()),
    *(
        ("qwen3", "qwen3", probe)
        for probe in (OFFICIAL_PROBES | OFFICIAL_TOOL_PROBES | HERMES_PROBES | QWEN3_PROBES).items()
    ),
    *(("llama3", "llama3", probe) for probe in OFFICIAL_PROBES.items()),
]


@pytest.mark.parametrize(
    ("name", "published", "probe"), [pytest.param(n, p, probe, id=f"{n}-{probe[0]}") for n, p, probe in ORACLE]
)
def test_text_agrees_with_the_published_template(load, name, published, probe):
    tokenizer = load("byte_adds_bos")
    messages, kwargs = probe[1]
    expected = text_of(tokenizer, messages, chat_template=official(published), **kwargs)
    assert text_of(tokenizer, messages, chat_template=get_template(name).jinja, **kwargs) == expected
    assert len(expected) > 10


@pytest.mark.parametrize("probe", [probe for probe in OFFICIAL_TOOL_PROBES if probe != "flat_call"])
def test_llama3_tools_agree_with_llama_3_1_but_for_the_date(load, probe):
    tokenizer = load("byte_adds_bos")
    messages, kwargs = OFFICIAL_TOOL_PROBES[probe]
    expected = text_of(tokenizer, messages, chat_template=official("llama3_1"), **kwargs)
    undated = re.sub(r"Cutting Knowledge Date: .*\nToday Date: .*\n\n", "", expected)
    assert undated != expected
    assert text_of(tokenizer, messages, chat_template=get_template("llama3").jinja, **kwargs) == undated


# What a template refuses.

REFUSED = {
    "unknown role": ([user("Hi"), {"role": "gpt", "content": "Hello."}], 'message 2 has the unknown role "gpt"'),
    "no role": ([{"content": "Hi"}], 'message 1 has the unknown role ""'),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], r"message 1 \(user\) has no content"),
    "no content": ([user("Hi"), assistant(None)], r"message 2 \(assistant\) has no content"),
}


@pytest.mark.parametrize("refused", REFUSED)
@pytest.mark.parametrize("name", TEMPLATES)
def test_bad_messages_are_refused(plain, name, refused):
    apply_template(plain, name)
    messages, message = REFUSED[refused]
    with pytest.raises(Exception, match=message):
        text_of(plain, messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_is_rendered_or_refused_and_never_lost(plain, name):
    apply_template(plain, name)
    thoughtful = [user("Hi"), assistant("Hello.", reasoning_content="a greeting")]
    if name in THINKING:
        assert "a greeting" in text_of(plain, thoughtful)
    else:
        with pytest.raises(Exception, match="message 2 has reasoning_content"):
            text_of(plain, thoughtful)
    text_of(plain, [user("Hi"), assistant("Hello.", reasoning_content=None)])


@pytest.mark.parametrize("name", ["vicuna", "alpaca"])
def test_late_system_message_is_refused_without_a_marker_for_it(plain, name):
    apply_template(plain, name)
    with pytest.raises(Exception, match="message 2 is a system message"):
        text_of(plain, [user("Hi"), SYSTEM])


def test_llama3_refuses_what_its_tool_form_cannot_say(plain):
    apply_template(plain, "llama3")
    with pytest.raises(Exception, match="message 2 has 2 tool calls"):
        text_of(plain, *CASES["parallel_tools"][:2])
    with pytest.raises(Exception, match="no user message"):
        text_of(plain, [SYSTEM], [TOOL])


# Names, tokens, stops.


def test_unknown_name_gives_the_near_ones(plain):
    with pytest.raises(ValueError, match="'vicunna'.*did you mean vicuna"):
        get_template("vicunna")
    with pytest.raises(ValueError, match="did you mean .*qwen"):
        apply_template(plain, "Qwen-2")
    with pytest.raises(ValueError, match=f"known are: {', '.join(TEMPLATES)}"):
        get_template("xyzzy")


def test_missing_tokens_are_named_with_the_templates_that_work():
    tokenizer = byte_level("<s>", True, eos="</s>", tokens=["<s>", "</s>", "<|im_end|>", *LLAMA3_TOKENS])
    with pytest.raises(ValueError) as error:
        apply_template(tokenizer, "qwen")
    needs, _, works = str(error.value).partition("single tokens")
    assert "<|im_start|>" in needs and "<|im_end|>" not in needs
    works = works.rpartition("one of: ")[2].split(", ")
    assert {"llama3", "vicuna", "alpaca"} <= set(works) and not {"chatml", "qwen", "qwen3"} & set(works)


@pytest.mark.parametrize("name", ["vicuna", "alpaca"])
def test_text_template_needs_an_eos(name):
    tokenizer = byte_level(None, False, eos=None)
    with pytest.raises(ValueError, match=f"{name} needs an eos_token"):
        apply_template(tokenizer, name)
    assert tokenizer.chat_template is None and tokenizer.eos_token is None


def test_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="ByT5Tokenizer.*fast tokenizer"):
        apply_template(ByT5Tokenizer(), "vicuna")


def test_trimmed_offsets_are_refused_where_they_would_empty_the_mask(plain):
    plain.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    with pytest.raises(ValueError, match="must not trim offsets"):
        apply_template(plain, "vicuna")
    assert plain.chat_template is None


def test_stops_are_the_turn_end_then_what_the_vocabulary_has(load):
    tokenizer = load("metaspace")
    stop = apply_template(tokenizer, "qwen")
    assert stop == ("<|im_end|>", "<|endoftext|>", "</s>")
    assert tokenizer.eos_token == "<|im_end|>"
    assert stop_token_ids(tokenizer, stop) == tokenizer.convert_tokens_to_ids(list(stop))
    assert apply_template(load("metaspace"), "vicuna") == ("</s>",)


def test_stop_token_ids_adds_the_eos_and_refuses_strings_of_many_tokens(plain):
    assert stop_token_ids(plain, ["<|im_end|>"]) == plain.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    with pytest.raises(ValueError, match="'USER:', '<|nothing|>'"):
        stop_token_ids(plain, ["<|im_end|>", "USER:", "<|nothing|>"])


def test_what_the_best_known_families_take():
    assert not any(map(repeats_bos, CORE))
    assert "qwen3" in THINKING and THINKING.isdisjoint({"chatml", "qwen", "llama3", "vicuna", "alpaca"})
    assert NO_SYSTEM.isdisjoint(CORE) and NO_TOOLS.isdisjoint(CORE)
    assert not [name for name in NO_TOOLS if get_template(name).tool_format]


def test_table_is_consistent():
    for name, template in TEMPLATES.items():
        assert name == template.name and template.source.startswith("https://")
        assert template.stop[0] == EOS or template.stop[0] in template.tokens


# The tokenizer's own template.


@pytest.mark.parametrize(
    ("name", "published", "kind"),
    [
        ("qwen", "qwen2_5", "byte_like_qwen"),
        ("qwen3", "qwen3", "byte_like_qwen"),
        ("llama3", "llama3", "byte_adds_bos"),
        ("llama3", "llama3", "byte_has_bos_adds_none"),
    ],
)
def test_published_template_is_recognised_by_behaviour(load, name, published, kind):
    tokenizer = load(kind)
    tokenizer.chat_template = official(published)
    before = [text_of(tokenizer, messages, **kwargs) for messages, kwargs in OFFICIAL_PROBES.values()]
    stop = apply_template(tokenizer)
    assert stop[0] == get_template(name).stop[0]
    assert f'"template": "{name}"' in tokenizer.chat_template
    assert [text_of(tokenizer, messages, **kwargs) for messages, kwargs in OFFICIAL_PROBES.values()] == before
    assert ids_and_spans(tokenizer, CASES["one_turn"][0])[1]


def test_minimal_chatml_without_tools_is_recognised(plain):
    plain.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    apply_template(plain)
    assert '"template": "chatml"' in plain.chat_template


def test_unrecognised_template_is_refused_with_the_names(plain):
    own = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    plain.chat_template = own
    with pytest.raises(ValueError) as error:
        apply_template(plain)
    assert "no {% generation %} markers" in str(error.value)
    assert str(error.value).endswith(f"--template_name: {', '.join(TEMPLATES)}")
    assert plain.chat_template == own


def test_set_of_templates_is_refused(plain):
    plain.chat_template = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    with pytest.raises(ValueError, match=r"a set of templates \(default, tool_use\)"):
        apply_template(plain)


def test_no_template_at_all_is_refused_with_the_names(plain):
    with pytest.raises(ValueError, match=f"no chat template: .*--template_name with one of: {', '.join(TEMPLATES)}"):
        apply_template(plain)


OWN = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    "{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}{{- '\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def test_own_template_with_markers_is_kept(plain):
    plain.eos_token = "<|im_end|>"
    plain.chat_template = OWN
    assert apply_template(plain) == ("<|im_end|>",)
    assert plain.chat_template == OWN


def test_own_template_keeps_its_text_and_sets_the_turn_end(plain):
    plain.chat_template = OWN
    before = text_of(plain, CASES["many_turns"][0])
    assert apply_template(plain) == ("<|im_end|>", "<|endoftext|>")
    assert plain.eos_token == "<|im_end|>"
    assert text_of(plain, CASES["many_turns"][0]) == before
    assert apply_template(plain) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    ("kind", "own", "start"),
    [
        ("byte_adds_bos", OWN, "<s><|im_start|>"),
        ("byte_adds_bos", "{{- bos_token }}" + OWN, "<s><|im_start|>"),
        ("byte_adds_bos", "{{- '<s>' }}" + OWN, "<s><|im_start|>"),
        ("byte_adds_bos", "{{- '<s>' + bos_token }}" + OWN, "<s><|im_start|>"),
        ("byte_has_bos_adds_none", OWN, "<|im_start|>"),
        ("byte_has_bos_adds_none", "{{- bos_token }}" + OWN, "<s><|im_start|>"),
    ],
)
def test_bos_of_an_own_template(load, kind, own, start):
    tokenizer = load(kind)
    tokenizer.chat_template = own
    for _ in range(2):
        apply_template(tokenizer)
        assert text_of(tokenizer, CASES["one_turn"][0]).startswith(start)


def test_own_template_that_writes_two_bos_is_refused(load):
    tokenizer = load("byte_adds_bos")
    tokenizer.chat_template = "{{- '<s><s>' }}" + OWN
    with pytest.raises(ValueError, match="two BOS tokens"):
        apply_template(tokenizer)


BROKEN = {
    "turn end outside": (
        OWN.replace("m.content + '<|im_end|>' }}{%- endgeneration %}", "m.content }}{%- endgeneration %}<|im_end|>"),
        "must end with one special token",
    ),
    "ordinary token as turn end": (
        OWN.replace("m.content + '<|im_end|>' }}", "m.content + '#' }}"),
        "one special token",
    ),
    "line break inside": (
        OWN.replace("'<|im_end|>' }}{%- endgeneration %}{{- '\n' }}", "'<|im_end|>\n' }}{%- endgeneration %}"),
        "nothing after it",
    ),
    "header inside": (
        OWN.replace("{{- '<|im_start|>assistant\n' }}{%- generation %}", "{%- generation %}<|im_start|>assistant\n"),
        "the supervised text is '<|im_start|>assistant",
    ),
    "user supervised": (
        OWN.replace("{%- else %}", "{%- else %}{%- generation %}").replace(
            "'<|im_end|>\n' }}{%- endif %}", "'<|im_end|>\n' }}{%- endgeneration %}{%- endif %}"
        ),
        "supervised",
    ),
    "last turn only": (
        OWN.replace(
            "{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}",
            "{%- if loop.last %}{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}"
            "{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}",
        ),
        "2 assistant turns gave 1 supervised spans",
    ),
    "empty block": (
        OWN.replace(
            "{%- generation %}{{- m.content + '<|im_end|>' }}", "{{- m.content + '<|im_end|>' }}{%- generation %}"
        ),
        "gave 0 supervised spans",
    ),
    "inside a macro": (
        "{%- macro say(m) %}{{- '<|im_start|>assistant\n' }}{%- generation %}{{- m.content + '<|im_end|>' }}"
        "{%- endgeneration %}{%- endmacro %}"
        + OWN.replace(
            "{{- '<|im_start|>assistant\n' }}{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}",
            "{{- say(m) }}",
        ),
        "the supervised text is",
    ),
    "other prompt": (
        OWN.replace(
            "add_generation_prompt %}{{- '<|im_start|>assistant\n'", "add_generation_prompt %}{{- '<|im_start|>'"
        ),
        "training and inference disagree",
    ),
    "no prompt": (OWN.partition("{%- if add_generation_prompt")[0], "training and inference disagree"),
    "syntax": (OWN.replace("{%- endfor %}", ""), "cannot be used"),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_broken_own_template_is_refused_and_the_tokenizer_left_alone(plain, defect):
    template, message = BROKEN[defect]
    assert template != OWN
    plain.chat_template = template
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        apply_template(plain, system_prompt="Be kind.")
    assert "--template_name: " in str(error.value)
    assert plain.chat_template == template and plain.eos_token == "<|endoftext|>"


# The default system prompt.

PROMPTS = {
    "words": "Be kind.",
    "quotes": """She said "no" and 'yes' \\ and \\n stayed.""",
    "lines": "one\n\ntwo\ttabs\r\n  three",
    "chinese": "你是医生，请用中文回答。😷",
    "jinja": "{{ messages }} {% generation %} %} #} {# {%- set medicalgpt = {} %}",
}


@pytest.mark.parametrize(
    ("name", "prompt"),
    [(name, prompt) for name in TEMPLATES for prompt in PROMPTS if name in CORE or prompt == "jinja"],
)
def test_baked_system_prompt_reads_like_a_system_message(load, tmp_path, name, prompt):
    tokenizer = load("byte_adds_bos")
    text = PROMPTS[prompt]
    if name in NO_SYSTEM:
        with pytest.raises(ValueError, match="has no place"):
            apply_template(tokenizer, name, system_prompt=text)
        return
    messages, tools = CASES["tools" if get_template(name).tool_format else "many_turns"][:2]
    apply_template(tokenizer, name)
    expected = text_of(tokenizer, [{"role": "system", "content": text}, *messages], tools)
    own_system = text_of(tokenizer, [SYSTEM, *messages], tools)

    stop = apply_template(tokenizer, name, system_prompt=text)
    baked = tokenizer.chat_template
    assert text_of(tokenizer, messages, tools) == expected
    assert text_of(tokenizer, [SYSTEM, *messages], tools) == own_system
    assert text.strip() in expected
    answers = sum(message["role"] == "assistant" for message in messages)
    assert len(ids_and_spans(tokenizer, messages, tools)[1]) == answers

    for arguments in ({}, {"name": name}, {"system_prompt": text}, {"name": name, "system_prompt": text}):
        assert apply_template(tokenizer, **arguments) == stop
        assert tokenizer.chat_template == baked

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == baked and again.eos_token == stop[0]
    assert apply_template(again) == stop
    assert text_of(again, messages, tools) == expected


@pytest.mark.parametrize(("name", "kind"), WITH_TOKENIZERS)
def test_applying_again_changes_nothing(load, tmp_path, kind, name):
    tokenizer = load(kind)
    stop = apply_template(tokenizer, name, system_prompt=None if name in NO_SYSTEM else "Be kind.")
    installed = tokenizer.chat_template
    ids = ids_and_spans(tokenizer, CASES["one_turn"][0])[0]
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for arguments in ({}, {"name": name}, {}):
        assert apply_template(again, **arguments) == stop
        assert again.chat_template == installed and again.eos_token == stop[0]
    assert ids_and_spans(again, CASES["one_turn"][0])[0] == ids


def test_another_system_prompt_replaces_the_first(plain):
    apply_template(plain, "qwen", system_prompt="first")
    apply_template(plain, system_prompt="second")
    text = text_of(plain, [user("Hi")])
    assert "<|im_start|>system\nsecond<|im_end|>" in text and "first" not in text


@pytest.mark.parametrize("empty", [None, ""])
def test_no_system_prompt_leaves_the_default_of_the_family(plain, empty):
    apply_template(plain, "qwen", system_prompt=empty)
    assert "You are Qwen, created by Alibaba Cloud." in text_of(plain, [user("Hi")])


def test_system_prompt_goes_into_an_own_template(plain):
    plain.chat_template = OWN
    apply_template(plain, system_prompt="Be kind.")
    assert text_of(plain, [user("Hi")]) == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert apply_template(plain) == ("<|im_end|>", "<|endoftext|>")
    assert text_of(plain, [user("Hi")]).count("Be kind.") == 1
