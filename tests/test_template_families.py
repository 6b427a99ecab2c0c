"""Every named template beside the form that its family has published: the text, its tokens, and what is supervised."""

import re
from pathlib import Path

from medicalgpt.data.encoding import encode_chat
from medicalgpt.models.templating import EOS
from template import TEMPLATES, apply_template, get_template
from tests.templates import (
    SYSTEM,
    TOOL,
    assistant,
    byte_level,
    call,
    ids_and_spans,
    metaspace,
    official,
    text_of,
    tool,
    user,
)

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

DOCS = Path(__file__).resolve().parents[1] / "docs"
every_template = pytest.mark.parametrize("name", TEMPLATES)

# Families with marks that no other text has need a tokenizer that knows these marks.
KINDS = {
    "byte": lambda tokens: byte_level(None, False, eos="</s>", tokens=tokens),
    "byte_adds_bos": lambda tokens: byte_level("<s>", True, eos="</s>", tokens=tokens),
    "byte_like_qwen": lambda tokens: byte_level(None, False, eos="</s>", tokens=tokens, like_qwen=True),
    "metaspace": lambda tokens: metaspace("first", tokens=tokens),
    "metaspace_legacy": lambda tokens: metaspace("always", tokens=tokens),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A fresh tokenizer of a kind that has the tokens of a template."""
    root, built = tmp_path_factory.mktemp("families"), {}

    def load(name: str, kind: str = "byte_adds_bos") -> PreTrainedTokenizerBase:
        template = get_template(name)
        stops = [text for text in template.stop if text != EOS]
        tokens = tuple(dict.fromkeys(["<s>", "</s>", *template.tokens, *stops, "<think>", "</think>"]))
        if (kind, tokens) not in built:
            built[kind, tokens] = root / str(len(built))
            KINDS[kind](list(tokens)).save_pretrained(built[kind, tokens])
        return AutoTokenizer.from_pretrained(built[kind, tokens])

    return load


def rendered(tokenizer, jinja: str, messages: list[dict], **kwargs) -> str | None:
    """The text that a template gives, None where it refuses."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=jinja, **kwargs)
    except Exception as error:
        assert not isinstance(error, AssertionError)
        return None


# Each template's text, written by hand from the family's own page (`source`): two turns, the last answer and its end.
# `|` stands where the prompt of the last answer ends; BOS is <s>, EOS is </s>.

TURNS = [user("你好"), assistant("你好！"), user("3 drugs?"), assistant("Rest.")]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
CODER = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n你好\n\n### Response:\n你好！</s>\n\n### Instruction:\n3 drugs?\n\n### Response:\n¦Rest.</s>\n\n"
)
CHATML = (
    "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n你好！<|im_end|>\n"
    "<|im_start|>user\n3 drugs?<|im_end|>\n<|im_start|>assistant\n¦Rest.<|im_end|>\n"
)
QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
LLAMA2 = "你好 [/INST] 你好！ </s><s>[INST] 3 drugs? [/INST]¦ Rest. </s>"
TEXTS = {
    "chatml": CHATML,
    "qwen": QWEN_SYSTEM + CHATML,
    "qwen3": CHATML.replace("¦", "¦<think>\n\n</think>\n\n"),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\n你好<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n你好！<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n3 drugs?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n¦Rest.<|eot_id|>"
    ),
    "vicuna": VICUNA + "USER: 你好 ASSISTANT: 你好！</s>USER: 3 drugs? ASSISTANT:¦ Rest.</s>",
    "alpaca": ALPACA,
    "base": "你好\n你好！</s>3 drugs?\n¦Rest.</s>",
    "mistral": "<s>[INST] 你好[/INST] 你好！</s>[INST] 3 drugs?[/INST]¦ Rest.</s>",
    "glm4": "[gMASK]<sop><|user|>\n你好<|assistant|>\n你好！<|user|>\n3 drugs?<|assistant|>¦\nRest.<|user|>",
    "gemma": (
        "<s><start_of_turn>user\n你好<end_of_turn>\n<start_of_turn>model\n你好！<end_of_turn>\n"
        "<start_of_turn>user\n3 drugs?<end_of_turn>\n<start_of_turn>model\n¦Rest.<end_of_turn>\n"
    ),
    "phi3": (
        "<|user|>\n你好<|end|>\n<|assistant|>\n你好！<|end|>\n"
        "<|user|>\n3 drugs?<|end|>\n<|assistant|>\n¦Rest.<|end|>\n<|endoftext|>"
    ),
    "llama2": "<s>[INST] " + LLAMA2,
    "llama2-zh": "<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\n" + LLAMA2,
    "deepseek3": (
        "<s><｜User｜>你好<｜Assistant｜>你好！<｜end▁of▁sentence｜>"
        "<｜User｜>3 drugs?<｜Assistant｜>¦Rest.<｜end▁of▁sentence｜>"
    ),
    "qwen3_nothink": CHATML,
    # Answers without thoughts: Qwen3.5 gives them to the prompt with an empty think block.
    "qwen3_5": CHATML.replace("¦", "<think>\n\n</think>\n\n¦"),
    "qwen3_5_nothink": CHATML.replace("¦", "<think>\n\n</think>\n\n¦"),
    "qwen2_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + CHATML,
    "baichuan": "<reserved_102>你好<reserved_103>你好！</s><reserved_102>3 drugs?<reserved_103>¦Rest.</s>",
    "baichuan2": "<reserved_106>你好<reserved_107>你好！<reserved_106>3 drugs?<reserved_107>¦Rest.</s>",
    "ziya": "<human>:你好\n<bot>:你好！</s>\n<human>:3 drugs?\n<bot>:¦Rest.</s>\n",
    "linly": "User: 你好\nBot: 你好！</s>\nUser: 3 drugs?\nBot:¦ Rest.</s>\n",
    "chatglm": "[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：3 drugs?\n答：[gMASK]<sop>¦Rest.<eop>",
    "chatglm2": "[gMASK]sop[Round 1]\n\n问：你好\n\n答：你好！\n\n[Round 2]\n\n问：3 drugs?\n\n答：¦Rest.</s>",
    "chatglm3": "[gMASK]sop<|user|>\n 你好<|assistant|>\n 你好！<|user|>\n 3 drugs?<|assistant|>¦\n Rest.<|user|>",
    "phoenix": (HUMAN + "\n\nHuman: <s>你好</s>Assistant: <s>你好！</s>Human: <s>3 drugs?</s>Assistant: <s>¦Rest.</s>"),
    "belle": "Human: 你好\n\nBelle: 你好！</s>\n\nHuman: 3 drugs?\n\nBelle:¦ Rest.</s>\n\n",
    "aquila": HUMAN + "###Human: 你好###Assistant: 你好！###Human: 3 drugs?###Assistant:¦ Rest.</s>",
    "intern": "<s><|User|>:你好<eoh>\n<|Bot|>:你好！<eoa>\n<|User|>:3 drugs?<eoh>\n<|Bot|>:¦Rest.<eoa>\n",
    "intern2": "<s>" + CHATML,
    "starchat": (
        "<|system|>\n<|end|>\n<|user|>\n你好<|end|>\n<|assistant|>\n你好！<|end|>\n"
        "<|user|>\n3 drugs?<|end|>\n<|assistant|>¦\nRest.<|end|>\n"
    ),
    "xverse": "Human: 你好\n\nAssistant: 你好！</s>Human: 3 drugs?\n\nAssistant:¦ Rest.</s>",
    "deepseek": "<s>User: 你好\n\nAssistant: 你好！</s>User: 3 drugs?\n\nAssistant:¦ Rest.</s>",
    "deepseekcoder": (
        f"<s>{CODER}### Instruction:\n你好\n### Response:\n你好！\n<|EOT|>\n"
        "### Instruction:\n3 drugs?\n### Response:\n¦Rest.\n<|EOT|>\n"
    ),
    "yi": CHATML,
    "orion": "<s>Human: 你好\n\nAssistant: </s>你好！</s>Human: 3 drugs?\n\nAssistant: </s>¦Rest.</s>",
    "cohere": (
        "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>你好<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>你好！<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>3 drugs?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>¦Rest.<|END_OF_TURN_TOKEN|>"
    ),
}


@every_template
def test_text_and_prompt(load, name):
    tokenizer, jinja = load(name), get_template(name).jinja
    prompt, answer = TEXTS[name].split("¦")
    assert rendered(tokenizer, jinja, TURNS) == prompt + answer
    thinking = {"enable_thinking": False} if name.startswith("qwen3_5") else {}
    assert rendered(tokenizer, jinja, TURNS[:-1], add_generation_prompt=True, **thinking) == prompt


def test_every_template_has_its_text():
    assert list(TEXTS) == list(TEMPLATES)


@every_template
def test_turn_end_is_the_first_stop_and_source_is_a_page(name):
    template = get_template(name)
    answer = TEXTS[name].split("¦")[1].removesuffix("<|endoftext|>") if name == "phi3" else TEXTS[name].split("¦")[1]
    assert answer.rstrip().endswith("</s>" if template.stop[0] == EOS else template.stop[0])
    assert template.source.startswith("https://")


# A system message, by hand as well: where it stands, or that it is refused.

SYSTEMS = {
    **dict.fromkeys(["chatml", "qwen", "qwen3", "qwen3_nothink", "yi"], "<|im_start|>system\nBe brief.<|im_end|>\n"),
    **dict.fromkeys(["qwen3_5", "qwen3_5_nothink", "qwen2_vl"], "<|im_start|>system\nBe brief.<|im_end|>\n"),
    "intern2": "<s><|im_start|>system\nBe brief.<|im_end|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>",
    "vicuna": "Be brief. USER: Hi",
    "alpaca": "Be brief.\n\n### Instruction:\nHi",
    "base": "Be brief.\n\nHi\n",
    "mistral": "<s>[INST] Be brief.\n\nHi[/INST]",
    "glm4": "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi",
    "chatglm3": "[gMASK]sop<|system|>\n Be brief.<|user|>\n Hi",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi",
    "starchat": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
    "llama2-zh": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
    "deepseek3": "<s>Be brief.<｜User｜>Hi",
    "deepseek": "<s>Be brief.\n\nUser: Hi",
    "deepseekcoder": "<s>Be brief.### Instruction:\nHi",
    "baichuan2": "Be brief.<reserved_106>Hi",
    "linly": "Be brief.\nUser: Hi",
    "belle": "Be brief.\n\nHuman: Hi",
    "phoenix": "Be brief.Human: <s>Hi",
    "aquila": "Be brief.###Human: Hi",
    "cohere": "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>",
}
WITHOUT_SYSTEM = {"baichuan", "ziya", "chatglm", "chatglm2", "intern", "xverse", "orion"}
WITHOUT_TOOLS = WITHOUT_SYSTEM | {"chatglm3"}
THINKING = {"qwen3", "qwen3_5", "qwen3_5_nothink", "deepseek3"}


@every_template
def test_system_message(load, name):
    tokenizer = load(name)
    apply_template(tokenizer, name)
    messages = [{"role": "system", "content": "Be brief."}, user("Hi")]
    if name in WITHOUT_SYSTEM:
        with pytest.raises(Exception, match="system message, for which this template has no place"):
            text_of(tokenizer, messages)
        with pytest.raises(ValueError, match="no place"):
            apply_template(tokenizer, name, system_prompt="Be brief.")
    else:
        assert rendered(tokenizer, get_template(name).jinja, messages).startswith(SYSTEMS[name])


def test_every_template_with_a_place_for_a_system_message_has_its_text():
    assert set(SYSTEMS) == set(TEMPLATES) - WITHOUT_SYSTEM


@every_template
def test_second_system_message_is_kept_or_refused(load, name):
    messages = [user("Hi"), assistant("Hello."), {"role": "system", "content": "Be brief."}, user("So?")]
    text = rendered(load(name), get_template(name).jinja, messages)
    assert text is None or "Be brief." in text


@every_template
def test_system_prompt_of_ones_own_keeps_the_marks(load, name):
    """In MedicalGPT it replaces the marks that stand around the default."""
    if name in WITHOUT_SYSTEM:
        return
    tokenizer = load(name)
    apply_template(tokenizer, name, system_prompt="Be brief.")
    expected = rendered(tokenizer, get_template(name).jinja, [{"role": "system", "content": "Be brief."}, user("Hi")])
    assert text_of(tokenizer, [user("Hi")]).removeprefix("<s>") == expected.removeprefix("<s>")
    assert SYSTEMS[name].removeprefix("<s>") in expected


def test_the_five_of_qwen_differ(load):
    names = ["qwen", "qwen3", "qwen3_nothink", "qwen3_5", "qwen3_5_nothink"]
    messages = [user("Hi"), assistant("", tool_calls=[call({"drug": "x"})]), tool("1")]
    texts = set()
    for name in names:
        tokenizer = load(name)
        apply_template(tokenizer, name, system_prompt="Be brief.")
        prompt = text_of(tokenizer, messages, [TOOL], add_generation_prompt=True)
        texts.add((prompt, text_of(tokenizer, TURNS)))
        assert text_of(tokenizer, [user("Hi")]) == (
            "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        )
        assert text_of(tokenizer, [user("Hi")], add_generation_prompt=True).count("<|im_start|>") == 3
    # Qwen2.5 and Qwen3's models that do not think differ in the default only.
    assert len(texts) == 4 and len({TEXTS[name] for name in names}) == 4
    assert get_template("qwen3_5").jinja != get_template("qwen3_5_nothink").jinja


# What is supervised, and what serving sends.


def rows(name: str) -> list[dict]:
    """Conversations that the template takes, each ending with an answer."""
    thought = {"reasoning_content": "drink first"} if name == "qwen3_5" else {}
    answer = assistant("Drink water. 多喝水。", **thought)
    conversations = [
        ([user("I have a headache."), answer], None),
        ([user("你好"), assistant("你好！", **thought), user("And then?"), answer, user("So?"), answer], None),
    ]
    if name not in WITHOUT_SYSTEM:
        conversations.append(([SYSTEM, user("Hi"), assistant("Hello.", **thought), user("So?"), answer], None))
    if name not in WITHOUT_TOOLS:
        calling = assistant("", tool_calls=[call({"drug": "阿司匹林"})], **thought)
        conversations.append(([SYSTEM, user("Dose?"), calling, tool("100 mg"), answer, user("Thanks"), answer], [TOOL]))
    return [{"messages": messages, "tools": tools} for messages, tools in conversations]


@every_kind
@every_template
def test_supervised_ids_follow_the_prompt_of_serving(load, name, kind):
    tokenizer = load(name, kind)
    stop = apply_template(tokenizer, name)
    for row in rows(name):
        samples = encode_chat(tokenizer, row)
        prompts, answers = [], []
        for sample in samples:
            start = 0
            while start < len(sample.labels):
                if sample.labels[start] == -100:
                    start += 1
                    continue
                end = next((i for i in range(start, len(sample.labels)) if sample.labels[i] == -100), None)
                prompts.append(sample.input_ids[:start])
                answers.append(sample.labels[start:end])
                start = end or len(sample.labels)
        turns = [number for number, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        expected = [
            tokenizer.apply_chat_template(
                row["messages"][:turn], tools=row["tools"], add_generation_prompt=True, return_dict=False
            )
            for turn in turns
        ]
        assert prompts == expected
        for turn, answer in zip(turns, answers, strict=True):
            message = row["messages"][turn]
            end = "<|observation|>" if name == "glm4" and message.get("tool_calls") else stop[0]
            assert answer.index(tokenizer.convert_tokens_to_ids(end)) == len(answer) - 1
            text = tokenizer.decode(answer, clean_up_tokenization_spaces=False)
            assert message["content"] in text and ("look_up" in text) == bool(message.get("tool_calls"))


@every_template
def test_bos_is_that_of_the_tokenizer(load, name):
    """As many as the published form has (Llama 2: one for each question), or none."""
    tokenizer = load(name)
    apply_template(tokenizer, name)
    ids = ids_and_spans(tokenizer, TURNS)[0]
    # Phoenix writes <s> around each text.
    marks = {"llama2": 2, "llama2-zh": 2, "phoenix": 5}.get(name, 1)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == marks
    without = load(name, "byte_like_qwen")
    apply_template(without, name)
    assert text_of(without, TURNS).count("<s>") == (4 if name == "phoenix" else 0)


@every_template
def test_tools_are_rendered_or_refused(load, name):
    tokenizer = load(name)
    apply_template(tokenizer, name)
    messages = [user("Dose?"), assistant("", tool_calls=[call({"drug": "阿司匹林"})]), tool("100 mg")]
    if name in WITHOUT_TOOLS:
        for given in ((messages[:1], [TOOL]), (messages[:2], None), ([*messages[:1], messages[2]], None)):
            with pytest.raises(Exception, match="no place for tools|take turns"):
                text_of(tokenizer, *given)
    else:
        text = text_of(tokenizer, messages, [TOOL], add_generation_prompt=True)
        assert "查剂量 <mg>" in text and "阿司匹林" in text and "100 mg" in text


@every_template
def test_reasoning_is_rendered_or_refused(load, name):
    tokenizer = load(name)
    apply_template(tokenizer, name)
    messages = [user("Hi"), assistant("Hello.", reasoning_content="a greeting")]
    if name in THINKING:
        assert "<think>\na greeting\n</think>\n\nHello." in text_of(tokenizer, messages)
    else:
        with pytest.raises(Exception, match="message 2 has reasoning_content"):
            text_of(tokenizer, messages)


# Families whose published form is Python code that puts ids together: the same ids, from pieces encoded one by one.


def pieces(tokenizer, *texts: str) -> list[int]:
    return [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("baichuan", ["<reserved_102>", "你好", "<reserved_103>", "你好！", "</s>", "<reserved_102>", "3 drugs?"]),
        ("baichuan2", ["<reserved_106>", "你好", "<reserved_107>", "你好！", "<reserved_106>", "3 drugs?"]),
        ("chatglm", ["[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：3 drugs?\n答：", "[gMASK]"]),
        ("chatglm2", ["[gMASK]", "sop"]),
        ("orion", ["<s>", "Human: 你好\n\nAssistant: ", "</s>", "你好！", "</s>", "Human: 3 drugs?\n\nAssistant: "]),
    ],
)
def test_ids_of_families_that_put_ids_together(load, name, parts):
    tokenizer = load(name, "byte_like_qwen")
    last = {
        "baichuan": "<reserved_103>",
        "baichuan2": "<reserved_107>",
        "chatglm": "<sop>",
        "chatglm2": "[Round 1]\n\n问：你好\n\n答：你好！\n\n[Round 2]\n\n问：3 drugs?\n\n答：",
        "orion": "</s>",
    }[name]
    prompt = tokenizer.apply_chat_template(
        TURNS[:-1],
        chat_template=get_template(name).jinja,
        add_generation_prompt=True,
        return_dict=False,
        **({"bos_token": "<s>"} if name == "orion" else {}),
    )
    assert prompt == pieces(tokenizer, *parts, last)


def test_chatglm_writes_no_round_for_a_single_question(load):
    text = rendered(load("chatglm"), get_template("chatglm").jinja, [user("Hi"), assistant("Hello.")])
    assert text == "Hi[gMASK]<sop>Hello.<eop>"


# Families whose published form is a Jinja template, from the data files of TRL.

LONG = [user("Hi"), assistant("Hello."), user("So?")]
CONVERSATIONS = {
    "one turn": ([user("I have a headache."), assistant("Drink water. 多喝水。")], {}),
    "prompt": ([user("I have a headache.")], {"add_generation_prompt": True}),
    "prompt, thinking": ([user("Hi")], {"add_generation_prompt": True, "enable_thinking": True}),
    "prompt, no thinking": ([user("Hi")], {"add_generation_prompt": True, "enable_thinking": False}),
    "turns": (TURNS, {}),
    "turns, prompt": (LONG, {"add_generation_prompt": True}),
    "system": ([SYSTEM, *TURNS], {}),
    "system, prompt": ([SYSTEM, *LONG], {"add_generation_prompt": True}),
    "empty system": ([{"role": "system", "content": ""}, *TURNS], {}),
    "later system": ([*TURNS, SYSTEM, *TURNS], {}),
    "spaces": ([user("  Hi \n"), assistant(" Hello. \n")], {}),
    "two users": ([user("a"), user("b"), assistant("c")], {}),
    "tool list": ([SYSTEM, user("Dose?")], {"tools": [TOOL, TOOL], "add_generation_prompt": True}),
    "tool use": (
        [
            user("Dose?"),
            assistant("", tool_calls=[call({"drug": "阿司匹林", "days": [1, 2.5], "now": True})]),
            tool("100 mg"),
        ],
        {"tools": [TOOL], "add_generation_prompt": True},
    ),
    "tool use, answered": (
        [SYSTEM, user("Dose?"), assistant("", tool_calls=[call({"drug": "x"})]), tool("1"), assistant("One."), *TURNS],
        {"tools": [TOOL]},
    ),
    "text and two calls": (
        [
            user("Dose?"),
            assistant("Look:", tool_calls=[call({"drug": "a"}), call({"drug": "b"})]),
            tool("1"),
            tool("2"),
            assistant("Both."),
        ],
        {"tools": [TOOL]},
    ),
    "arguments as text": (
        [user("Dose?"), assistant("", tool_calls=[call('{"drug": "x"}')]), tool("1"), assistant("One.")],
        {},
    ),
    "thinking": (
        [
            user("Hi"),
            assistant("Hello.", reasoning_content="a greeting"),
            user("So?"),
            assistant("So.", reasoning_content="think"),
        ],
        {},
    ),
    "thinking, prompt": (
        [user("Hi"), assistant("Hello.", reasoning_content="a greeting"), user("So?")],
        {"add_generation_prompt": True},
    ),
    "thinking in the text": (
        [
            user("Hi"),
            assistant("<think>\na greeting\n</think>\n\nHello."),
            user("So?"),
            assistant("<think>\nthink\n</think>\n\nSo."),
        ],
        {},
    ),
    "thinking and tools": (
        [
            user("Dose?"),
            assistant("", reasoning_content="look", tool_calls=[call({"drug": "x"})]),
            tool("1"),
            assistant("One.", reasoning_content="so be it"),
        ],
        {"tools": [TOOL]},
    ),
}
OFFICIAL = [
    ("qwen", "qwen2_5"),
    ("qwen3", "qwen3"),
    ("qwen3_nothink", "qwen3_instruct_2507"),
    ("qwen3_5", "qwen3_5_think"),
    ("qwen3_5_nothink", "qwen3_5_nothink"),
    ("qwen2_vl", "qwen2_5_vl"),
    ("llama3", "llama3"),
    ("gemma", "gemma"),
    ("gemma", "gemma3"),
    ("phi3", "phi3"),
    ("phi3", "phi3_5"),
    ("cohere", "cohere"),
    ("deepseek3", "deepseekv3"),
]
# Where they part. "lost": the published form leaves something out, which ours keeps or refuses.
TOOLS = ["tool list", "tool use", "tool use, answered", "text and two calls", "arguments as text", "thinking and tools"]
LOSES_REASONING = dict.fromkeys(["thinking", "thinking, prompt", "thinking and tools"], "lost: ours refuses reasoning")
LOSES_TOOLS = dict.fromkeys(TOOLS, "lost: ours keeps tools")
REFUSES_TOOLS = dict.fromkeys(TOOLS, "refused: ours takes tools")
TAKES_TURNS = {"two users": "refused: ours takes two users"}
DIFFERENCES = {
    "qwen2_5": {**LOSES_REASONING, "arguments as text": "written as a string: ours writes the object"},
    "qwen3_instruct_2507": LOSES_REASONING,
    "qwen3_5_think": {},
    "qwen3_5_nothink": {},
    "qwen2_5_vl": {**LOSES_TOOLS, **LOSES_REASONING},
    # The tools of Llama 3.1 are compared in test_template.py.
    "llama3": {**LOSES_TOOLS, **LOSES_REASONING, "text and two calls": "lost: ours refuses two calls in a turn"},
    "gemma": {
        **REFUSES_TOOLS,
        **LOSES_REASONING,
        **TAKES_TURNS,
        **dict.fromkeys(["system", "system, prompt", "empty system"], "refused: ours does as Gemma 3"),
    },
    "gemma3": {
        **REFUSES_TOOLS,
        **LOSES_REASONING,
        **TAKES_TURNS,
        "tool list": "lost: ours keeps tools",
        "empty system": "two line breaks for no text",
    },
    "phi3": {**LOSES_TOOLS, **LOSES_REASONING},
    "phi3_5": {**LOSES_TOOLS, **LOSES_REASONING, "empty system": "left out: ours writes the empty turn, as phi3"},
    "cohere": {
        **REFUSES_TOOLS,
        **LOSES_REASONING,
        **TAKES_TURNS,
        "tool list": "lost: ours keeps tools",
        "later system": "refused: ours takes it",
    },
    # TRL's file is that of DeepSeek-R1, whose prompts open the thoughts; the test below compares with V3's prompt.
    "deepseekv3": {
        "tool list": "lost: ours keeps tools",
        **dict.fromkeys(TOOLS[1:4] + TOOLS[5:], "refused: ours takes arguments as an object"),
        **dict.fromkeys(["thinking", "thinking in the text"], "lost: ours keeps the thoughts of the last turn"),
    },
}


def published(file: str) -> str:
    jinja = official(file)
    return jinja.replace("<｜Assistant｜><think>\\n", "<｜Assistant｜>") if file == "deepseekv3" else jinja


def test_deepseek_r1_opens_the_thoughts_in_the_prompt_and_v3_does_not():
    assert official("deepseekv3").count("<｜Assistant｜><think>\\n") == 1


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(("name", "file"), OFFICIAL, ids=[file for _, file in OFFICIAL])
def test_text_and_ids_of_the_published_jinja(load, name, file, conversation):
    tokenizer = load(name, "byte_adds_bos")
    tokenizer.eos_token = "<|endoftext|>" if name == "phi3" else tokenizer.eos_token
    messages, kwargs = CONVERSATIONS[conversation]
    theirs = rendered(tokenizer, published(file), messages, **kwargs)
    ours = rendered(tokenizer, get_template(name).jinja, messages, **kwargs)
    difference = DIFFERENCES.get(file, {}).get(conversation)
    if difference is None:
        assert ours == theirs
        if theirs is not None:
            ids = [
                tokenizer.apply_chat_template(messages, chat_template=jinja, return_dict=False, **kwargs)
                for jinja in (published(file), get_template(name).jinja)
            ]
            assert ids[0] == ids[1] and len(ids[0]) >= 5
    else:
        assert ours != theirs or ours is theirs is None, "they agree by now"
        assert difference.startswith("refused") == (theirs is None) or ours is theirs is None
        assert "ours refuses" not in difference or ours is None
        assert not re.search("ours (keeps|takes|does|writes)", difference) or ours is not None or theirs is None


def test_deepseek3_keeps_the_thoughts_that_are_trained_and_drops_earlier_ones(load):
    tokenizer = load("deepseek3")
    messages, _ = CONVERSATIONS["thinking in the text"]
    theirs = rendered(tokenizer, published("deepseekv3"), messages)
    ours = rendered(tokenizer, get_template("deepseek3").jinja, messages)
    answer = "<｜Assistant｜><think>\nthink\n</think>\n\nSo.<｜end▁of▁sentence｜>"
    assert ours == theirs.replace("<｜Assistant｜>\n\nSo.<｜end▁of▁sentence｜>", answer)
    assert ours.endswith(answer) and "greeting" not in ours


@pytest.mark.parametrize("file", ["gemma", "gemma3", "phi3", "phi3_5", "cohere"])
def test_tools_are_lost_or_refused_by_the_published_jinja(load, file):
    name = {"gemma3": "gemma", "phi3_5": "phi3"}.get(file, file)
    theirs = rendered(load(name), published(file), *CONVERSATIONS["tool use"][:1], tools=[TOOL])
    assert theirs is None or "look_up" not in theirs


def test_parallel_calls_and_results_of_deepseek3(load):
    calls = [call('{"drug": "a"}'), call('{"drug": "b"}')]
    messages = [user("Dose?"), assistant("Look:", tool_calls=calls), tool("1"), tool("2"), assistant("Both.")]
    text = rendered(load("deepseek3"), get_template("deepseek3").jinja, messages)
    assert text == rendered(load("deepseek3"), published("deepseekv3"), messages)
    assert text == (
        "<s><｜User｜>Dose?<｜Assistant｜>Look:<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n```json\n{"drug": "a"}\n```<｜tool▁call▁end｜>\n'
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n```json\n{"drug": "b"}\n```<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>1<｜tool▁output▁end｜>"
        "<｜tool▁output▁begin｜>2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>Both.<｜end▁of▁sentence｜>"
    )


# Published forms that TRL does not ship, by hand.


def test_mistral_puts_system_text_and_tools_at_the_last_question(load):
    text = rendered(
        load("mistral"),
        get_template("mistral").jinja,
        [{"role": "system", "content": "Be brief."}, user("Hi"), assistant(" Hello. "), user("Dose?")],
        tools=[{"type": "function", "function": {"name": "look_up", "parameters": {}}}],
    )
    assert text == (
        "<s>[INST] Hi[/INST] Hello.</s>"
        '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "look_up", "parameters": {}}}][/AVAILABLE_TOOLS]'
        "[INST] Be brief.\n\nDose?[/INST]"
    )


def test_mistral_calls_have_no_space_before_them(load):
    messages = [user("Dose?"), assistant("", tool_calls=[call({"drug": "x"})])]
    text = rendered(load("mistral"), get_template("mistral").jinja, messages)
    assert text == '<s>[INST] Dose?[/INST][TOOL_CALLS] [{"name": "look_up", "arguments": {"drug": "x"}}]</s>'


def test_glm4_tools_and_turn_ends(load):
    tokenizer = load("glm4")
    apply_template(tokenizer, "glm4")
    messages = [
        user("Dose?"),
        assistant("", tool_calls=[call({"drug": "x"})]),
        tool("100 mg"),
        assistant("100 mg."),
        user("Thanks"),
        assistant("Bye."),
    ]
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    text = text_of(tokenizer, messages, tools)
    assert text == (
        "<s>[gMASK]<sop><|system|>\n你是一个名为 ChatGLM 的人工智能助手。"
        "你是基于智谱AI训练的语言模型 GLM-4 模型开发的，你的任务是针对用户的问题和要求提供适当的答复和支持。"
        "\n\n# 可用工具\n\n## look_up\n\n"
        '{\n    "name": "look_up"\n}\n在调用上述函数时，请使用 Json 格式表示调用的参数。'
        '<|user|>\nDose?<|assistant|>look_up\n{"drug": "x"}<|observation|>\n100 mg<|assistant|>\n100 mg.'
        "<|user|>\nThanks<|assistant|>\nBye.<|user|>"
    )
    spans = [text for _, text in ids_and_spans(tokenizer, messages, tools)[1]]
    assert spans == ['look_up\n{"drug": "x"}<|observation|>', "\n100 mg.<|user|>", "\nBye.<|user|>"]


def test_glm_refuses_turns_that_it_cannot_close(load):
    with pytest.raises(Exception, match=r"message 2 \(assistant\) is followed by assistant"):
        text_of(load("glm4"), [user("a"), assistant("b"), assistant("c")], chat_template=get_template("glm4").jinja)


@pytest.mark.parametrize("name", ["gemma", "llama2", "llama2-zh", "mistral"])
def test_system_text_without_a_question_is_refused(load, name):
    messages = [{"role": "system", "content": "Be brief."}, assistant("Hello.")]
    with pytest.raises(Exception, match="user message"):
        text_of(load(name), messages, chat_template=get_template(name).jinja)


# Thinking.


@pytest.mark.parametrize("kind", ["byte", "byte_like_qwen"])
@pytest.mark.parametrize(("name", "thinks"), [("qwen3_5", True), ("qwen3_5_nothink", False)])
def test_qwen3_5_supervises_what_comes_after_its_prompts(load, name, thinks, kind):
    tokenizer = load(name, kind)
    apply_template(tokenizer, name)
    question = [user("Hi")]
    for reasoning in ("a greeting", ""):
        messages = [*question, assistant("Hello.", reasoning_content=reasoning)]
        ids, [(start, text)] = ids_and_spans(tokenizer, messages)
        prompts = {
            mode: tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False, **kwargs)
            for mode, kwargs in {
                None: {},
                True: {"enable_thinking": True},
                False: {"enable_thinking": False},
            }.items()
        }
        assert prompts[None] == prompts[thinks] != prompts[not thinks]
        assert ids[:start] == prompts[bool(reasoning)]
        assert text == ("a greeting\n</think>\n\n" if reasoning else "") + "Hello.<|im_end|>"


def test_qwen3_5_refuses_arguments_that_it_cannot_take_apart(load):
    tokenizer = load("qwen3_5")
    apply_template(tokenizer, "qwen3_5")
    with pytest.raises(Exception, match="a call of look_up has its arguments as a string"):
        text_of(tokenizer, CONVERSATIONS["arguments as text"][0])


# Recognition.

RECOGNISED = [
    ("qwen", "qwen2_5"),
    ("qwen3", "qwen3"),
    # The same text as that of the model without thoughts.
    ("chatml", "qwen3_instruct_2507"),
    ("qwen3_5", "qwen3_5_think"),
    ("qwen3_5_nothink", "qwen3_5_nothink"),
    ("qwen2_vl", "qwen2_5_vl"),
    ("chatml", "qwen3_vl"),
    ("llama3", "llama3"),
    ("gemma", "gemma"),
    ("gemma", "gemma3"),
    ("phi3", "phi3"),
    ("phi3", "phi3_5"),
    ("cohere", "cohere"),
    ("deepseek3", "deepseekv3"),
]


@pytest.mark.parametrize(("name", "file"), RECOGNISED, ids=[file for _, file in RECOGNISED])
def test_published_jinja_is_recognised_and_gets_markers(load, name, file):
    tokenizer = load(name, "byte_adds_bos" if "bos_token" in published(file) else "byte")
    tokenizer.eos_token = "<|endoftext|>" if name == "phi3" else tokenizer.eos_token
    tokenizer.chat_template = published(file)
    before = text_of(tokenizer, TURNS)
    stop = apply_template(tokenizer)
    assert stop[0] == get_template(name).stop[0]
    assert f'"template": "{name}"' in tokenizer.chat_template
    assert text_of(tokenizer, TURNS) == before
    assert ids_and_spans(tokenizer, TURNS)[1]


def test_glm_is_recognised_though_its_published_form_leaves_the_last_turn_open(load):
    tokenizer = load("glm4")
    tokenizer.chat_template = (
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    before = text_of(tokenizer, TURNS)
    assert apply_template(tokenizer)[0] == "<|user|>"
    assert '"template": "glm4"' in tokenizer.chat_template
    assert text_of(tokenizer, TURNS).removeprefix("<s>") == before + "<|user|>"


def test_answers_of_the_history_keep_their_end_in_the_span_unless_none_is_written(load):
    """Else all turns but the last would be trained without their end, in one sample with it."""
    tokenizer = load("chatml")
    own = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ m.content }}{% if loop.last %}<|im_end|>{% endif %}{% endgeneration %}END{{ '\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer.chat_template = own.replace("END", "{% if not loop.last %}<|im_end|>{% endif %}")
    with pytest.raises(ValueError, match="must end with one special token"):
        apply_template(tokenizer)
    tokenizer.chat_template = own.replace("END", "")
    assert apply_template(tokenizer)[0] == "<|im_end|>"


# The pages.


@pytest.mark.parametrize("page", ["templates.md", "templates_zh.md"])
def test_table_lists_every_template(page):
    text = re.split(r"^## (?:Tools|工具)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)[0]
    listed = re.findall(r"^\| `([^`]+)` \|.*$", text, re.MULTILINE)
    assert listed == list(TEMPLATES)
    for name, template in TEMPLATES.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        end = "EOS" if template.stop[0] == EOS else template.stop[0].replace("|", "\\|")
        assert f"| `{end}` |" in row or f"| {end} |" in row, name
        assert template.source in row
