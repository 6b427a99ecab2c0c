"""Rows as users write them, in each shape that a conversation can have, for the tests of masks and prompts."""

import json

from medicalgpt.formats.conversion import to_messages
from template import TEMPLATES, apply_template
from tests.templates import CORE, NO_SYSTEM, NO_TOOLS, THINKING, TOKENIZERS

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

TOOL = {
    "name": "look_up",
    "description": "the dose of a drug, 查剂量",
    "parameters": {"type": "object", "properties": {"drug": {"type": "string"}}, "required": ["drug"]},
}
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"drug": "阿司匹林"}}\n</tool_call>'
CALLS = {
    "qwen": CALL,
    "default": 'Action: look_up\nAction Input: {"drug": "阿司匹林"}',
    "llama3": '{"name": "look_up", "parameters": {"drug": "阿司匹林"}}',
    "glm4": 'look_up\n{"drug": "阿司匹林"}',
    "mistral": '[TOOL_CALLS] [{"name": "look_up", "arguments": {"drug": "阿司匹林"}}]',
    "qwen3_5": "<tool_call>\n<function=look_up>\n<parameter=drug>\n阿司匹林\n</parameter>\n</function>\n</tool_call>",
    "deepseek3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n"
        '```json\n{"drug": "阿司匹林"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    ),
}
NO_THOUGHT = "<think>\n\n</think>\n\n"


def sharegpt(*turns: str, **columns) -> dict:
    """A row whose turns alternate between the user and the assistant."""
    names = ("human", "gpt")
    return {"conversations": [{"from": names[n % 2], "value": text} for n, text in enumerate(turns)], **columns}


TOOL_TURNS = [
    {"from": "human", "value": "Dose?"},
    {"from": "function_call", "value": json.dumps({"name": "look_up", "arguments": {"drug": "阿司匹林"}})},
    {"from": "observation", "value": '{"mg": 100}'},
    {"from": "gpt", "value": "100 mg 一天。"},
]

# shape -> row, the assistant's texts as most templates render them.
ROWS = {
    "one turn": ({"instruction": "I have a headache.", "output": "Drink water. 多喝水。"}, ["Drink water. 多喝水。"]),
    "many turns": (
        sharegpt("你好", "你好！", "3 drugs?", "1. a\n\n2. b", "Why?", "(so)"),
        ["你好！", "1. a\n\n2. b", "(so)"],
    ),
    "history": (
        {"instruction": "Why?", "input": "In short.", "output": "So.", "history": [["Hi", "Hello."]]},
        ["Hello.", "So."],
    ),
    "system": (sharegpt("Hi", "What hurts?", system="你是医生。"), ["What hurts?"]),
    "tools": ({"conversations": TOOL_TURNS, "tools": json.dumps([TOOL])}, [CALL, "100 mg 一天。"]),
    "tools, system, many turns": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                *TOOL_TURNS,
                {"from": "human", "value": "谢谢"},
                {"from": "gpt", "value": "Welcome."},
            ],
            "tools": json.dumps([TOOL]),
        },
        [CALL, "100 mg 一天。", "Welcome."],
    ),
    "thinking": (
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello.", "reasoning_content": "a greeting"},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "Sleep.", "reasoning_content": "想一想"},
            ]
        },
        ["<think>\na greeting\n</think>\n\nHello.", "<think>\n想一想\n</think>\n\nSleep."],
    ),
    "thinking in the text": (
        sharegpt("Hi", "<think>\na greeting\n</think>\n\nHello.", "And?", "<think>\n想一想\n</think>\n\nSleep."),
        ["<think>\na greeting\n</think>\n\nHello.", "<think>\n想一想\n</think>\n\nSleep."],
    ),
}


def takes(name: str, shape: str) -> bool:
    """Whether a template has a place for all that a row holds."""
    return not (
        ("tools" in shape and name in NO_TOOLS)
        or ("system" in shape and name in NO_SYSTEM)
        or (shape == "thinking" and name not in THINKING)
    )


# Their prompts begin the thoughts, or end them: the line breaks of an answer that does otherwise join those of the
# prompt, and such rows are refused (see test_sf_14).
MELTS = [("qwen3_5", shape) for shape in ROWS if not shape.startswith("thinking")]
MELTS += [("qwen3_5_nothink", shape) for shape in ROWS if shape.startswith("thinking")]
PAIRS = [(name, shape) for name in TEMPLATES for shape in ROWS if takes(name, shape) and (name, shape) not in MELTS]
REFUSED = [(name, shape) for name in TEMPLATES for shape in ROWS if not takes(name, shape)]
KINDS = ["byte_without_bos", "byte_like_qwen", "byte_adds_bos", "metaspace"]
in_every_shape = pytest.mark.parametrize(("name", "shape"), PAIRS)
# Some families with every tokenizer, the others with the one that joins most over the borders of turns.
IN_EVERY_SHAPE_AND_KIND = [
    (name, shape, kind) for name, shape in PAIRS for kind in (KINDS if name in CORE else ["metaspace"])
]
in_every_shape_and_kind = pytest.mark.parametrize(("name", "shape", "kind"), IN_EVERY_SHAPE_AND_KIND)


def expected_answers(name: str, shape: str) -> list[str]:
    """The assistant's texts, each as the template `name` writes it in the turn that it is trained in."""
    texts = [CALLS[TEMPLATES[name].tool_format] if text == CALL else text for text in ROWS[shape][1]]
    if name == "qwen3" and not shape.startswith("thinking"):
        # Each turn is trained as the last one, which always has a block for thoughts.
        texts = [NO_THOUGHT + text for text in texts]
    return texts


def thoughts_and_answer(text: str) -> tuple[str, str]:
    """What a supervised text says, however its family sets it. The prompt may have opened the thoughts."""
    thoughts, _, answer = text.strip().removeprefix("<think>").rpartition("</think>")
    return thoughts.strip(), answer.strip()


def conversation(shape: str) -> tuple[list[dict], list[dict] | None]:
    """Messages and tools of a row."""
    row = to_messages(ROWS[shape][0])
    return row["messages"], row["tools"]


def turns_of(messages: list[dict]) -> list[int]:
    """Positions of the assistant's turns."""
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def saved_tokenizers(root) -> dict[str, str]:
    """Folders of the tokenizers in `KINDS`, so that each test can load its own copy."""
    for kind in KINDS:
        TOKENIZERS[kind]().save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in KINDS}


def load(folder: str, name: str, system_prompt: str | None = None) -> tuple[PreTrainedTokenizerBase, str]:
    """A tokenizer with the template `name`, and its turn end."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, apply_template(tokenizer, name, system_prompt)[0]


def turn_end_ids(tokenizer: PreTrainedTokenizerBase, name: str) -> set[int]:
    """The tokens that may end a turn: GLM-4 ends a call of a tool with another one than an answer."""
    ends = [tokenizer.eos_token, *(token for token in TEMPLATES[name].stop if token in TEMPLATES[name].tokens)]
    return set(tokenizer.convert_tokens_to_ids(ends))


def supervised_runs(labels: list[int]) -> list[tuple[int, list[int]]]:
    """(first position, ids) of each run of supervised labels."""
    runs: list[tuple[int, list[int]]] = []
    for position, label in enumerate(labels):
        if label == -100:
            continue
        if position == 0 or labels[position - 1] == -100:
            runs.append((position, []))
        runs[-1][1].append(label)
    return runs
