"""Sets that people train medical models on: a table; one entry, one published shape."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from medicalgpt.formats.choices import answer_letters, parse_options, read_cop, written_options
from medicalgpt.formats.shapes import SKIP, Preset, Row, are_texts, choice_row
from medicalgpt.readers.problems import RowError


def _medqa(row: Row, kind: str) -> dict[str, Any]:
    found = choice_row(row, row["options"], row["answer_idx"])
    text = row.get("answer")
    if isinstance(text, str) and text.strip() and answer_letters(text, found["options"]) not in (None, found["answer"]):
        raise RowError(f"`answer_idx` {row['answer_idx']} and `answer` are different options", SKIP, text)
    return found


MEDMCQA_OPTIONS = ("opa", "opb", "opc", "opd")


def _medmcqa(first: int) -> Callable[[Row, str], dict[str, Any]]:
    def convert(row: Row, kind: str) -> dict[str, Any]:
        options = [row[name] for name in MEDMCQA_OPTIONS]
        number = read_cop(row["cop"], len(options), first)
        if isinstance(number, int) and not first <= number < first + 4:
            raise RowError(f"`cop` is {number}: no option of four, counted from {first}", SKIP, number)
        return choice_row(row, options, number, explanation=row.get("exp"), first=first)

    return convert


def _pubmedqa(row: Row, kind: str) -> dict[str, Any]:
    context = row["context"]
    texts = context.get("contexts") if isinstance(context, Mapping) else context
    return _pubmedqa_row(kind, row["question"], texts, row.get("final_decision"), row["long_answer"])


def _pubmedqa_original(row: Row, kind: str) -> dict[str, Any]:
    return _pubmedqa_row(kind, row["QUESTION"], row["CONTEXTS"], row.get("final_decision"), row["LONG_ANSWER"])


def _pubmedqa_row(kind: str, question: str, texts: Any, decision: str | None, reply: str) -> dict[str, Any]:
    texts = texts if isinstance(texts, list) else [texts]
    question = "\n".join(map(str, texts)) + f"\n\n{question}"
    if kind == "task":
        if not decision:
            raise RowError("no `final_decision`", SKIP, question)
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


def _cmb_clin(row: Row, kind: str) -> dict[str, Any]:
    """The case, then its questions as turns, as the authors ask them."""
    messages = []
    for pair in row["QA_pairs"]:
        messages.append({"role": "user", "content": pair["question"]})
        messages.append({"role": "assistant", "content": pair.get("solution") or pair.get("answer")})
    messages[0]["content"] = f"{row['description']}\n\n{messages[0]['content']}"
    return {"messages": messages}


_SPEAKER = re.compile(r"\s*(?:(patient|病人|患者)|(?:doctor|医生))\s*[:：]\s*", re.IGNORECASE)


def _meddialog(row: Row, kind: str) -> dict[str, Any]:
    messages = []
    for text in row["utterances"]:
        speaker = _SPEAKER.match(text)
        if speaker is None:
            raise RowError("a text of `utterances` begins with neither patient: nor doctor:", SKIP, text)
        messages.append({"role": "user" if speaker[1] else "assistant", "content": text[speaker.end() :]})
    return {"messages": messages}


_ASKS, _REPLIES = re.compile(r"^\s*问\s*[:：]\s*"), re.compile(r"^\s*答\s*[:：]\s*")


def _huatuo_sft(row: Row, kind: str) -> dict[str, Any]:
    messages = []
    for text in row["data"]:
        role = "user" if _ASKS.match(text) else "assistant" if _REPLIES.match(text) else None
        if role is None:
            raise RowError("a text of `data` begins with neither 问： nor 答：", SKIP, text)
        messages.append({"role": role, "content": (_ASKS if role == "user" else _REPLIES).sub("", text)})
    return {"messages": messages}


def is_huatuo_sft(row: Row) -> bool:
    data = row["data"]
    return are_texts(data) and _ASKS.match(data[0]) is not None


def _cmedqa(row: Row, kind: str) -> dict[str, Any]:
    if not row["positive"] or (kind == "preference" and not row["negative"]):
        raise RowError("no answer in `positive` or `negative`", SKIP, row)
    if kind == "preference":
        return {"question": row["query"], "chosen": row["positive"][0], "rejected": row["negative"][0]}
    return {"question": row["query"], "answer": row["positive"][0]}


MEDICAL_SETS = (
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
        check=is_huatuo_sft,
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
        "pubmedqa-original",
        "pubmedqa.github.io (ori_pqal.json)",
        "MIT",
        ("chat", "task"),
        ("QUESTION", "CONTEXTS", "LONG_ANSWER"),
        convert=_pubmedqa_original,
        uses=("final_decision",),
    ),
    Preset(
        "cmb",
        "FreedomIntelligence/CMB (CMB-Exam)",
        "Apache-2.0",
        ("chat", "task"),
        ("question", "option", "answer"),
        convert=lambda row, kind: choice_row(row, row["option"], row["answer"], explanation=row.get("explanation")),
        uses=("explanation",),
    ),
    Preset(
        "cmb-clin",
        "FreedomIntelligence/CMB (CMB-Clin)",
        "Apache-2.0",
        ("chat",),
        ("description", "QA_pairs"),
        convert=_cmb_clin,
        check=lambda row: isinstance(row["QA_pairs"], list),
    ),
    Preset(
        "meddialog",
        "UCSD26/medical_dialog (processed)",
        "see its page",
        ("chat",),
        ("utterances",),
        convert=_meddialog,
        check=lambda row: are_texts(row["utterances"]) and _SPEAKER.match(row["utterances"][0]) is not None,
    ),
    Preset(
        "cmexam",
        "williamliujl/CMExam, fzkuji/CMExam",
        "Apache-2.0 (copy); see its page (authors)",
        ("chat", "task"),
        ("Question", "Options", "Answer"),
        convert=lambda row, kind: choice_row(row, row["Options"], row["Answer"], explanation=row.get("Explanation")),
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
