"""Common sets of conversations, mathematics and multiple choice: a table; one entry, one published shape."""

import re
from collections.abc import Mapping
from typing import Any

from medicalgpt.formats.medical_sets import is_huatuo_sft
from medicalgpt.formats.shapes import SKIP, Preset, Row, are_texts, choice_row, is_transcript
from medicalgpt.formats.turns import are_turns, parse_transcript
from medicalgpt.readers.problems import RowError


def _ultrachat(row: Row, kind: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(row["data"])]}


def _belle(row: Row, kind: str) -> dict[str, Any]:
    return {"messages": [*parse_transcript(row["instruction"]), {"role": "assistant", "content": row["output"]}]}


def _math(row: Row, kind: str) -> dict[str, Any]:
    if kind == "task":
        return {"question": row["problem"], "answer": row["answer"], "solution": row["solution"]}
    if row.get("messages"):
        # OpenR1-Math: the problem with the answer of a reasoning model.
        return {"messages": row["messages"]}
    # Problems of DeepScaleR may have an empty solution.
    return {"question": row["problem"], "answer": row["solution"] or row["answer"]}


def _squad(row: Row, kind: str) -> dict[str, Any]:
    if not row["answers"]["text"]:
        raise RowError("there is no answer in the text", SKIP, row)
    return {"question": f"{row['context']}\n\n{row['question']}", "answer": row["answers"]["text"][0]}


def _gemini(row: Row, kind: str) -> dict[str, Any]:
    system = row.get("systemInstruction") or row.get("system_instruction") or {}
    texts = [part["text"] for part in system.get("parts", ())]
    return {"messages": [*({"role": "system", "content": text} for text in texts), *row["contents"]]}


def _guanaco(row: Row, kind: str) -> dict[str, Any]:
    return {"messages": parse_transcript(row["text"])}


def _dapo(row: Row, kind: str) -> dict[str, Any]:
    return {"messages": row["prompt"], "answer": row["reward_model"]["ground_truth"]}


def _is_dapo(row: Row) -> bool:
    return isinstance(row["reward_model"], Mapping) and row["reward_model"].get("ground_truth") is not None


def _options_in_columns(row: Row, kind: str) -> dict[str, Any]:
    options = {letter: row[letter] for letter in "ABCDE" if letter in row}
    return choice_row(row, options, row.get("answer", row.get("Answer")), explanation=row.get("explanation"))


GENERAL_SETS = (
    Preset(
        "alpaca",
        "tatsu-lab/alpaca, shibing624/medical, BELLE",
        "CC BY-NC 4.0 (Stanford Alpaca); GPL-3.0, research (BELLE); see its page",
        ("chat",),
        ("instruction", "output"),
        {
            "question": "instruction",
            "input": "input",
            "answer": "output",
            "system": "system",
            "history": "history",
        },
        by_shape=False,
    ),
    Preset(
        "belle-multiturn",
        "BelleGroup/multiturn_chat_0.8M",
        "GPL-3.0; research, not commercial",
        ("chat",),
        ("instruction", "output"),
        convert=_belle,
        uses=("input",),
        check=is_transcript("instruction"),
    ),
    Preset(
        "guanaco",
        "timdettmers/openassistant-guanaco",
        "see its page",
        ("chat",),
        ("text",),
        convert=_guanaco,
        check=is_transcript("text"),
    ),
    Preset(
        "gemini",
        "tuning files of Gemini",
        "your own data",
        ("chat",),
        ("contents",),
        convert=_gemini,
        uses=("systemInstruction", "system_instruction"),
        check=lambda row: are_turns(row["contents"]),
    ),
    Preset(
        "dolly",
        "databricks/databricks-dolly-15k",
        "CC BY-SA 3.0",
        ("chat",),
        ("instruction", "context", "response"),
        {"question": "instruction", "input": "context", "answer": "response"},
    ),
    Preset(
        "openorca",
        "Open-Orca/OpenOrca",
        "MIT",
        ("chat",),
        ("system_prompt", "question", "response"),
        {"system": "system_prompt", "question": "question", "answer": "response"},
    ),
    Preset(
        "firefly",
        "YeungNLP/firefly-train-1.1M",
        "see its page",
        ("chat",),
        ("input", "target"),
        {"question": "input", "answer": "target"},
        marks=("kind",),
    ),
    Preset(
        "advertisegen",
        "shibing624/AdvertiseGen",
        "CC BY 4.0 (copy); see its page (authors)",
        ("chat",),
        ("content", "summary"),
        {"question": "content", "answer": "summary"},
    ),
    Preset(
        "qa-zh",
        "medical corpora of 问 and 答",
        "see its page",
        ("chat", "task"),
        ("问", "答"),
        {"question": "问", "answer": "答"},
    ),
    Preset(
        "deepseek-r1-distill-zh",
        "Congliu/Chinese-DeepSeek-R1-Distill-data-110k",
        "see its page",
        ("chat",),
        ("input", "reasoning_content", "content"),
        {"question": "input", "reasoning": "reasoning_content", "answer": "content"},
    ),
    Preset(
        "squad",
        "rajpurkar/squad, hfl/cmrc2018",
        "CC BY-SA 4.0",
        ("chat",),
        ("context", "question", "answers"),
        convert=_squad,
        check=lambda row: isinstance(row["answers"], Mapping) and isinstance(row["answers"].get("text"), list),
    ),
    Preset(
        "sharegpt",
        "ShareGPT exports, OpenHermes, HuatuoGPT2-SFT-GPT4-140K",
        "see its page; Apache-2.0 (HuatuoGPT2)",
        ("chat",),
        ("conversations",),
        {"messages": "conversations", "system": "system", "tools": "tools"},
        by_shape=False,
    ),
    Preset(
        "ultrachat",
        "stingning/ultrachat",
        "MIT",
        ("chat",),
        ("data",),
        convert=_ultrachat,
        check=lambda row: are_texts(row["data"]) and not is_huatuo_sft(row),
    ),
    Preset(
        "gsm8k",
        "openai/gsm8k",
        "MIT",
        ("chat", "task"),
        ("question", "answer"),
        {"question": "question", "answer": "answer"},
        check=lambda row: isinstance(row["answer"], str) and re.search(r"\n####\s*\S+\s*$", row["answer"]) is not None,
    ),
    Preset(
        "math",
        "HuggingFaceH4/MATH-500, agentica-org/DeepScaleR-Preview-Dataset, open-r1/OpenR1-Math-220k",
        "MIT (DeepScaleR); Apache-2.0 (OpenR1-Math); see its page",
        ("chat", "task"),
        ("problem", "solution", "answer"),
        convert=_math,
        uses=("messages",),
    ),
    Preset(
        "dapo",
        "BytedTsinghua-SIA/DAPO-Math-17k, rows of verl",
        "Apache-2.0",
        ("task",),
        ("prompt", "reward_model"),
        convert=_dapo,
        check=_is_dapo,
    ),
    Preset(
        "mmlu",
        "cais/mmlu",
        "MIT",
        ("chat", "task"),
        ("question", "choices", "answer"),
        convert=lambda row, kind: choice_row(row, row["choices"], row["answer"]),
        check=lambda row: isinstance(row["choices"], list),
    ),
    Preset(
        "ceval",
        "ceval/ceval-exam",
        "CC BY-NC-SA 4.0",
        ("chat", "task"),
        ("question", "A", "B", "C", "D", "answer"),
        convert=_options_in_columns,
        uses=("E", "explanation"),
    ),
    Preset(
        "cmmlu",
        "haonan-li/cmmlu",
        "CC BY-NC 4.0 (hub); CC BY-NC-SA 4.0 (authors)",
        ("chat", "task"),
        ("Question", "A", "B", "C", "D", "Answer"),
        convert=_options_in_columns,
        uses=("E",),
    ),
)
