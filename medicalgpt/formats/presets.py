"""Data sets that people train on: how their rows become rows of common names. A table; one entry, one published shape.

The common names are `question`, `input`, `answer`, `reasoning`, `explanation`, `options`, `system`, `history`,
`messages`, `text`, `chosen` and `rejected`. docs/datasets.md shows the table; a test compares them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from medicalgpt.formats.choices import answer_letters, parse_options, read_cop, written_options
from medicalgpt.formats.turns import parse_transcript
from medicalgpt.readers.problems import RowError

Row = Mapping[str, Any]
SKIP = "Skip and count such rows: --skip_bad_rows True."


@dataclass(frozen=True)
class Preset:
    """The shape of one data set.

    Attributes:
        name: of `--preset`.
        source: where it is published.
        license: what its authors say, for a person to check.
        kinds: what it can be trained as: `text`, `chat`, `preference`, `task`.
        needs: fields that every row has and that are read.
        marks: fields that every row has, by which the set is known, and that are not read.
        columns: the field under each common name; fields that are not in `needs` may be missing.
        convert: instead of `columns`: takes a row and the kind, returns a row of common names.
        uses: further fields that are read, or that would mean something else in other sets.
        check: a closer look, where the fields alone could be those of another set.
        by_shape: whether rows are recognised; False if many sets have the same shape.
    """

    name: str
    source: str
    license: str
    kinds: tuple[str, ...]
    needs: tuple[str, ...]
    columns: dict[str, str] = field(default_factory=dict)
    convert: Callable[[Row, str], dict[str, Any]] | None = None
    uses: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    check: Callable[[Row], bool] | None = None
    by_shape: bool = True

    @cached_property
    def fields(self) -> frozenset[str]:
        """All fields of a row that the preset reads."""
        return frozenset((*self.needs, *self.columns.values(), *self.uses))

    def rename(self, row: Row, kind: str) -> dict[str, Any]:
        """The row under common names.

        Raises:
            RowError: the row has not the shape of the set, or what it says cannot be trained.
        """
        if missing := [name for name in self.needs if name not in row]:
            raise RowError(
                f"no field `{missing[0]}`, which rows of {self.name} have",
                "Choose another --preset, or omit it: shapes are recognised.",
                row,
            )
        if self.convert:
            try:
                return self.convert(row, kind)
            except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
                # RowError is a ValueError as well.
                if isinstance(error, RowError):
                    raise
                raise RowError(f"rows of {self.name} do not look like this ({error!r})", SKIP, row) from error
        return {name: row[column] for name, column in self.columns.items() if column in row}


def _choice(row: Row, options: Any, answer: Any, *, explanation: Any = None, first: int = 0) -> dict[str, Any]:
    """Question, options and the letters of the correct ones.

    Raises:
        RowError: the answer is none of the options.
    """
    found = parse_options(options)
    letters = answer_letters(answer, found, first=first)
    if letters is None:
        raise RowError(f"the answer {answer!r} is none of the options", SKIP, found)
    question = row.get("question", row.get("Question"))
    return {"question": question, "options": found, "answer": letters, "explanation": explanation}


def _medqa(row: Row, kind: str) -> dict[str, Any]:
    found = _choice(row, row["options"], row["answer_idx"])
    text = row.get("answer")
    if isinstance(text, str) and text.strip() and answer_letters(text, found["options"]) not in (None, found["answer"]):
        raise RowError(f"`answer_idx` {row['answer_idx']} and `answer` are different options", SKIP, text)
    return found


MEDMCQA_OPTIONS = ("opa", "opb", "opc", "opd")


def _ultrachat(row: Row, kind: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(row["data"])]}


def _medmcqa(first: int) -> Callable[[Row, str], dict[str, Any]]:
    def convert(row: Row, kind: str) -> dict[str, Any]:
        options = [row[name] for name in MEDMCQA_OPTIONS]
        number = read_cop(row["cop"], len(options), first)
        if isinstance(number, int) and not first <= number < first + 4:
            raise RowError(f"`cop` is {number}: no option of four, counted from {first}", SKIP, number)
        return _choice(row, options, number, explanation=row.get("exp"), first=first)

    return convert


def _pubmedqa(row: Row, kind: str) -> dict[str, Any]:
    context = row["context"]
    texts = context.get("contexts") if isinstance(context, Mapping) else context
    texts = texts if isinstance(texts, list) else [texts]
    decision, reply = row.get("final_decision"), row["long_answer"]
    question = "\n".join(map(str, texts)) + f"\n\n{row['question']}"
    if kind == "task":
        if not decision:
            raise RowError("no `final_decision`", SKIP, row)
        return {"question": question, "answer": decision, "explanation": reply}
    return {"question": question, "answer": f"{decision}\n{reply}" if decision else reply}


def _medreason(row: Row, kind: str) -> dict[str, Any]:
    common = {"question": row["question"], "answer": row["answer"], "reasoning": row["reasoning"]}
    if not str(row.get("options") or "").strip():
        return common
    common["options"] = parse_options(row["options"])
    # Answers are an option's text, some with an explanation after it.
    text, _, explanation = str(row["answer"]).partition("Explanation:")
    letters = answer_letters(text.strip(), common["options"]) or answer_letters(
        text.strip().rstrip("."), common["options"]
    )
    if letters:
        common |= {"answer": letters, "explanation": explanation.strip() or None}
    return common


def _m23k(row: Row, kind: str) -> dict[str, Any]:
    if kind == "chat":
        return {
            "question": row["prompt"],
            "reasoning": row["reasoning"],
            "answer": row["distilled_answer_string"],
        }
    letter = row.get("answer_letter")
    # Prompts hold their options already.
    options = written_options(row["prompt"]) or {}
    common = {"question": row["prompt"], "answer": letter or row.get("answer_string")}
    return {**common, "options": options} if letter in options else common


def _first_of_lists(row: Row, kind: str) -> dict[str, Any]:
    """Of the wordings of a question, each a text or a list, and of its answers, the first."""
    question, answer = row["questions"], row["answers"]
    while isinstance(question, list) and question:
        question = question[0]
    while isinstance(answer, list) and answer:
        answer = answer[0]
    return {"question": question, "answer": answer}


_ASKS, _REPLIES = re.compile(r"^\s*问\s*[:：]\s*"), re.compile(r"^\s*答\s*[:：]\s*")


def _huatuo_sft(row: Row, kind: str) -> dict[str, Any]:
    messages = []
    for text in row["data"]:
        role = "user" if _ASKS.match(text) else "assistant" if _REPLIES.match(text) else None
        if role is None:
            raise RowError("a text of `data` begins with neither 问： nor 答：", SKIP, text)
        messages.append({"role": role, "content": (_ASKS if role == "user" else _REPLIES).sub("", text)})
    return {"messages": messages}


def _is_texts(row: Row) -> bool:
    data = row["data"]
    return isinstance(data, list) and len(data) > 1 and all(isinstance(text, str) for text in data)


def _is_huatuo_sft(row: Row) -> bool:
    data = row["data"]
    return _is_texts(row) and _ASKS.match(data[0]) is not None


def _cmedqa(row: Row, kind: str) -> dict[str, Any]:
    if not row["positive"] or (kind == "preference" and not row["negative"]):
        raise RowError("no answer in `positive` or `negative`", SKIP, row)
    if kind == "preference":
        return {"question": row["query"], "chosen": row["positive"][0], "rejected": row["negative"][0]}
    return {"question": row["query"], "answer": row["positive"][0]}


def _kto(row: Row, kind: str) -> dict[str, Any]:
    answer = next(name for name in ("completion", "response") if name in row)
    if row["label"] is not True:
        raise RowError("`label` is false: the answer is a bad example, and would be trained as a good one", SKIP, row)
    return {"question": row["prompt"], "answer": row[answer]}


def _is_kto(row: Row) -> bool:
    return isinstance(row["label"], bool) and bool({"completion", "response"} & set(row))


def _belle(row: Row, kind: str) -> dict[str, Any]:
    return {"messages": [*parse_transcript(row["instruction"]), {"role": "assistant", "content": row["output"]}]}


def _is_transcript(name: str) -> Callable[[Row], bool]:
    return lambda row: parse_transcript(row[name]) is not None


def _ultrafeedback(row: Row, kind: str) -> dict[str, Any]:
    return {"chosen": row["chosen"], "rejected": row["rejected"]}


def _is_ultrafeedback(row: Row) -> bool:
    """Both conversations begin with the prompt, which is there once more."""
    for name in ("chosen", "rejected"):
        turns = row[name]
        if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, Mapping) for turn in turns):
            return False
        if row["prompt"] not in [turn.get("content", turn.get("value")) for turn in turns[:-1]]:
            return False
    return True


def _hh_rlhf(row: Row, kind: str) -> dict[str, Any]:
    return {name: parse_transcript(row[name]) for name in ("chosen", "rejected")}


def _steer_prompt(text: Any) -> Any:
    """HelpSteer's prompts of several turns as a list of them."""
    if not isinstance(text, str) or "<extra_id_1>" not in text:
        return text
    first, *rest = text.split("<extra_id_1>")
    turns = [{"role": "user", "content": first.strip()}]
    for part in rest:
        role, _, content = part.partition("\n")
        turns.append({"role": role.strip().lower(), "content": content.strip()})
    return turns


def _helpsteer(row: Row, kind: str) -> dict[str, Any]:
    return {"question": _steer_prompt(row["prompt"]), "answer": row["response"]}


def _steer_pair(prompt: str, answers: tuple[str, str], strength: str) -> Callable[[Row, str], dict[str, Any]]:
    """Negative: the first answer is better; positive: the second."""

    def convert(row: Row, kind: str) -> dict[str, Any]:
        value = row[strength]
        if not isinstance(value, int | float) or value == 0:
            raise RowError(f"`{strength}` is {value!r}: neither answer is better", SKIP, row)
        better, worse = answers if value < 0 else answers[::-1]
        return {"question": _steer_prompt(row[prompt]), "chosen": row[better], "rejected": row[worse]}

    return convert


def _math(row: Row, kind: str) -> dict[str, Any]:
    if kind == "task":
        return {"question": row["problem"], "answer": row["answer"], "solution": row["solution"]}
    return {"question": row["problem"], "answer": row["solution"]}


def _dapo(row: Row, kind: str) -> dict[str, Any]:
    return {"messages": row["prompt"], "answer": row["reward_model"]["ground_truth"]}


def _is_dapo(row: Row) -> bool:
    return isinstance(row["reward_model"], Mapping) and row["reward_model"].get("ground_truth") is not None


def _options_in_columns(row: Row, kind: str) -> dict[str, Any]:
    options = {letter: row[letter] for letter in "ABCDE" if letter in row}
    return _choice(row, options, row.get("answer", row.get("Answer")), explanation=row.get("explanation"))


MEDICAL = (
    Preset(
        "medical-o1",
        "FreedomIntelligence/medical-o1-reasoning-SFT",
        "Apache-2.0",
        ("chat",),
        ("Question", "Complex_CoT", "Response"),
        {"question": "Question", "reasoning": "Complex_CoT", "answer": "Response"},
    ),
    Preset(
        "medical-o1-verifiable",
        "FreedomIntelligence/medical-o1-verifiable-problem",
        "Apache-2.0",
        ("chat", "task"),
        ("Open-ended Verifiable Question", "Ground-True Answer"),
        {"question": "Open-ended Verifiable Question", "answer": "Ground-True Answer"},
    ),
    Preset(
        "medical-r1-distill",
        "FreedomIntelligence/Medical-R1-Distill-Data",
        "Apache-2.0",
        ("chat",),
        ("question", "reasoning (reasoning_content)", "response (content)"),
        {
            "question": "question",
            "reasoning": "reasoning (reasoning_content)",
            "answer": "response (content)",
        },
    ),
    Preset(
        "huatuo-encyclopedia",
        "FreedomIntelligence/huatuo_encyclopedia_qa, huatuo_knowledge_graph_qa",
        "Apache-2.0",
        ("chat",),
        ("questions", "answers"),
        convert=_first_of_lists,
    ),
    Preset(
        "huatuo-lite",
        "FreedomIntelligence/Huatuo26M-Lite",
        "Apache-2.0",
        ("chat",),
        ("question", "answer"),
        {"question": "question", "answer": "answer"},
        uses=("label",),
        marks=("related_diseases",),
    ),
    Preset(
        "huatuo-sft",
        "FreedomIntelligence/HuatuoGPT-sft-data-v1",
        "Apache-2.0",
        ("chat",),
        ("data",),
        convert=_huatuo_sft,
        check=_is_huatuo_sft,
    ),
    Preset(
        "cmtmedqa",
        "Suprit/CMtMedQA",
        "MIT",
        ("chat",),
        ("instruction", "output", "history"),
        {"question": "instruction", "input": "input", "answer": "output", "history": "history"},
        by_shape=False,
    ),
    Preset(
        "disc-medllm",
        "Flmc/DISC-Med-SFT",
        "Apache-2.0; parts derive from MedDialog and cMedQA",
        ("chat",),
        ("conversation",),
        {"messages": "conversation"},
        marks=("_id", "source"),
    ),
    Preset(
        "promptcblue",
        "michael-wzhu/PromptCBLUE on GitHub (CBLUE)",
        "research, not commercial",
        ("chat",),
        ("input", "target"),
        {"question": "input", "answer": "target"},
        marks=("answer_choices",),
    ),
    Preset(
        "cmedqa",
        "C-MTEB/CMedQAv2-reranking (cMedQA2)",
        "research, not commercial",
        ("chat", "preference"),
        ("query", "positive", "negative"),
        convert=_cmedqa,
        check=lambda row: isinstance(row["positive"], list) and isinstance(row["negative"], list),
    ),
    Preset(
        "chinese-medical-dialogue",
        "Toyhom/Chinese-medical-dialogue-data",
        "MIT",
        ("chat",),
        ("title", "ask", "answer"),
        {"question": "title", "input": "ask", "answer": "answer"},
    ),
    Preset(
        "medqa",
        "GBaker/MedQA-USMLE-4-options, bigbio/med_qa",
        "CC BY 4.0 (copy); MIT (authors)",
        ("chat", "task"),
        ("question", "options", "answer_idx"),
        convert=_medqa,
        uses=("answer",),
    ),
    Preset(
        "medmcqa",
        "openlifescienceai/medmcqa",
        "Apache-2.0",
        ("chat", "task"),
        ("question", *MEDMCQA_OPTIONS, "cop"),
        convert=_medmcqa(first=0),
        uses=("exp",),
    ),
    Preset(
        "medmcqa-original",
        "medmcqa.github.io",
        "Apache-2.0",
        ("chat", "task"),
        ("question", *MEDMCQA_OPTIONS, "cop"),
        convert=_medmcqa(first=1),
        uses=("exp",),
        by_shape=False,
    ),
    Preset(
        "pubmedqa",
        "qiaojin/PubMedQA",
        "MIT",
        ("chat", "task"),
        ("question", "context", "long_answer"),
        convert=_pubmedqa,
        uses=("final_decision",),
    ),
    Preset(
        "cmb",
        "FreedomIntelligence/CMB (CMB-Exam)",
        "Apache-2.0",
        ("chat", "task"),
        ("question", "option", "answer"),
        convert=lambda row, kind: _choice(row, row["option"], row["answer"], explanation=row.get("explanation")),
        uses=("explanation",),
    ),
    Preset(
        "cmexam",
        "williamliujl/CMExam, fzkuji/CMExam",
        "Apache-2.0 (copy); see its page (authors)",
        ("chat", "task"),
        ("Question", "Options", "Answer"),
        convert=lambda row, kind: _choice(row, row["Options"], row["Answer"], explanation=row.get("Explanation")),
        uses=("Explanation",),
    ),
    Preset(
        "medreason",
        "UCSC-VLAA/MedReason",
        "see its page",
        ("chat", "task"),
        ("question", "answer", "reasoning"),
        convert=_medreason,
        uses=("options",),
        marks=("dataset_name",),
    ),
    Preset(
        "m23k",
        "UCSC-VLAA/m23k-tokenized",
        "see its page",
        ("chat", "task"),
        ("prompt", "reasoning", "distilled_answer_string"),
        convert=_m23k,
        uses=("question", "answer_letter", "answer_string", "answer_idx"),
    ),
)

GENERAL = (
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
        check=_is_transcript("instruction"),
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
        check=lambda row: _is_texts(row) and not _is_huatuo_sft(row),
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
        "HuggingFaceH4/MATH-500, agentica-org/DeepScaleR-Preview-Dataset",
        "MIT (DeepScaleR); see its page",
        ("chat", "task"),
        ("problem", "solution", "answer"),
        convert=_math,
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
        convert=lambda row, kind: _choice(row, row["choices"], row["answer"]),
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
    Preset(
        "ultrafeedback",
        "HuggingFaceH4/ultrafeedback_binarized",
        "MIT",
        ("preference",),
        ("prompt", "chosen", "rejected"),
        convert=_ultrafeedback,
        uses=("messages",),
        check=_is_ultrafeedback,
    ),
    Preset(
        "hh-rlhf",
        "Anthropic/hh-rlhf",
        "MIT",
        ("preference",),
        ("chosen", "rejected"),
        convert=_hh_rlhf,
        check=lambda row: _is_transcript("chosen")(row) and _is_transcript("rejected")(row),
    ),
    Preset(
        "kto",
        "trl-lib/kto-mix-14k",
        "see its page",
        ("chat",),
        ("prompt", "label"),
        convert=_kto,
        uses=("completion", "response"),
        check=_is_kto,
    ),
    Preset(
        "helpsteer3",
        "nvidia/HelpSteer3 (preference)",
        "CC BY 4.0",
        ("preference",),
        ("context", "response1", "response2", "overall_preference"),
        convert=_steer_pair("context", ("response1", "response2"), "overall_preference"),
    ),
    Preset(
        "helpsteer2-preference",
        "nvidia/HelpSteer2 (preference)",
        "CC BY 4.0",
        ("preference",),
        ("prompt", "response_1", "response_2", "preference_strength"),
        convert=_steer_pair("prompt", ("response_1", "response_2"), "preference_strength"),
    ),
    Preset(
        "helpsteer",
        "nvidia/HelpSteer, nvidia/HelpSteer2",
        "CC BY 4.0",
        ("chat",),
        ("prompt", "response"),
        convert=_helpsteer,
        marks=("helpfulness", "correctness"),
    ),
)

PRESETS = {preset.name: preset for preset in (*MEDICAL, *GENERAL)}


def recognise(row: Row) -> Preset | None:
    """The preset whose shape the row has; of several, the one that reads most of its fields."""
    return next((preset for preset in _possible(frozenset(row)) if preset.check is None or preset.check(row)), None)


@lru_cache(maxsize=1_000)
def _possible(names: frozenset[str]) -> tuple[Preset, ...]:
    """The presets that rows with these fields may have, the closest first. Rows of a file have few sets of fields."""
    found = [preset for preset in PRESETS.values() if preset.by_shape and names.issuperset(preset.needs + preset.marks)]
    return tuple(sorted(found, key=lambda preset: -len(preset.needs + preset.marks)))
