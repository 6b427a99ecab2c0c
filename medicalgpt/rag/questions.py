"""Questions about documents with known answers: what `chatpdf.py --evaluate` reads, judges and reports."""

import dataclasses
import random
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.evaluation.citations import check_answer, show_answer
from medicalgpt.formats.terms import language_of
from medicalgpt.rag.grounding import PROMPT, UNKNOWN, MarkedSource, Source, ask_from, build_sources, frame, mark_sources
from medicalgpt.rag.retrieval import Collection, Passage, normalize
from medicalgpt.readers.problems import Problem, format_problems
from medicalgpt.readers.sources import read_rows


@dataclass(frozen=True)
class Question:
    """A row of --questions. `file` is None if the files have no answer; otherwise `evidence` is a quotation from it."""

    question: str
    language: str
    file: str | None
    page: int | None = None
    evidence: str = ""
    answer: str | None = None

    def answered_by(self, passage: Passage) -> bool:
        same_page = self.page is None or passage.page == self.page
        return Path(passage.file).name == self.file and same_page and normalize(self.evidence) in passage.normalized


def read_questions(path: Path, encoding: str | None = None) -> list[Question]:
    """Raises UserError if there is no such file or rows are broken, naming all of them."""
    if not path.is_file() or path.suffix != ".jsonl":
        raise UserError(f"--questions {path} must be an existing .jsonl file (looked in {Path.cwd()}).")
    questions, problems = [], []
    for row in read_rows(path, encoding=encoding):
        if isinstance(row, Problem):
            problems.append(row)
            continue
        value = row.value if isinstance(row.value, dict) else {}
        kept = {field.name: value[field.name] for field in dataclasses.fields(Question) if field.name in value}
        if not all(isinstance(kept.get(name), str) for name in ("question", "language")) or "file" not in kept:
            problems.append(Problem(row.place, "no question, language and file", "See data/rag/questions.jsonl."))
        elif kept["file"] and not kept.get("evidence"):
            problems.append(Problem(row.place, "no evidence", "Quote the passage of the file that has the answer."))
        else:
            questions.append(Question(**kept))
    if problems or not questions:
        raise UserError(f"--questions {path} cannot be used:\n{format_problems(problems) or '  it has no rows'}")
    return questions


def judge_answer(answer: str, sources: Sequence[MarkedSource], right: Set[int], language: str) -> dict[str, Any]:
    """What `--output_file` says about an answer.

    Args:
        right: indexes of the passages that have the evidence.
    """
    checked = check_answer(answer, sources)
    return {
        "answer_given": show_answer(checked, language),
        "sources": [source.place for source in sources],
        "cited": checked.cited,
        "invented": checked.invented,
        "citations": sum(1 for _ in checked.citations),
        "not_found": [
            {"statement": each.text, "source": number, "missing": missing}
            for each, number, missing in checked.unfounded
        ],
        "uncited": [each.text for each in checked.uncited],
        "cited_right": any(
            right.intersection(sources[number - 1].passages) for number, missing in checked.citations if not missing
        ),
    }


def measures(rows: list[dict[str, Any]], language: str) -> dict[str, float]:
    """Measures for the questions in one language; shares are from 0 to 1.

    A hit is a passage of the correct file and page that contains the evidence. MRR is the mean of 1 / its rank, or 0
    if it is not found at all.
    """
    rows = [row for row in rows if row["language"] == language]
    groups = {
        "answerable": [row for row in rows if row["file"]],
        "unanswerable": [row for row in rows if not row["file"]],
        "answers": [row for row in rows if "answer_given" in row],
    }
    unknown = UNKNOWN[language]
    groups["citing"] = [row for row in groups["answers"] if row["cited"] or row["invented"]]
    citations = sum(row["citations"] for row in groups["answers"])

    def share(group: str, is_so: Callable[[dict[str, Any]], float]) -> float:
        return sum(map(is_so, groups[group])) / len(groups[group])

    numbers: dict[str, float] = {f"questions, {group}": len(groups[group]) for group in ("answerable", "unanswerable")}
    if groups["answerable"]:
        numbers["hit@1"] = share("answerable", lambda row: row["rank"] == 1)
        numbers["hit@5"] = share("answerable", lambda row: (row["rank"] or 6) <= 5)
        numbers["MRR"] = share("answerable", lambda row: 1 / row["rank"] if row["rank"] else 0)
        numbers["answerable, wrongly refused"] = share("answerable", lambda row: not row["asked"])
    if groups["unanswerable"]:
        numbers["unanswerable, refused"] = share("unanswerable", lambda row: not row["asked"])
    if groups["answers"]:
        if groups["unanswerable"]:
            refused = share("unanswerable", lambda row: not row["asked"] or unknown in row["answer_given"])
            numbers["unanswerable, refused, model included"] = refused
        numbers["answers that cite"] = share("answers", lambda row: bool(row["cited"] or row["invented"]))
        numbers["answers that cite a correct passage"] = share("answers", lambda row: row["cited_right"])
    if groups["citing"]:
        numbers["of those that cite: all citations exist"] = share("citing", lambda row: not row["invented"])
    if citations:
        lacking = sum(len(row["not_found"]) for row in groups["answers"])
        numbers["citations whose source has the statement"] = 1 - lacking / citations
    return numbers


def make_tasks(
    collection: Collection, questions: Sequence[Question], num_passages: int, neighbours: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows for GRPO with the reward `citation`: prompts with the passages that a search finds.

    A question with an answer makes two rows: one in which a passage has it, among others at random places, and one
    without that passage, to which "not in the documents" is the right reply. A question without an answer makes one.
    """
    rng, rows = random.Random(seed), []
    for question in questions:
        found = collection.search(question.question)
        right = {n for n, each in enumerate(collection.passages) if question.file and question.answered_by(each)}
        wrong = dataclasses.replace(found, order=[n for n in found.order if n not in right])
        others = [
            source
            for source in build_sources(collection, wrong, num_passages, neighbours)
            if not right.intersection(source.passages)
        ]
        if right:
            best = next((n for n in found.order if n in right), min(right))
            (gold,) = build_sources(collection, dataclasses.replace(found, order=[best]), 1, neighbours)
            shown = others[: num_passages - 1]
            shown.insert(rng.randrange(len(shown) + 1), gold)
            rows.append(_task(question, shown, right, rng))
        if others:
            rows.append(_task(question, others, frozenset(), rng))
    rng.shuffle(rows)
    return rows


def _task(question: Question, sources: Sequence[Source], right: Set[int], rng: random.Random) -> dict[str, Any]:
    marked = mark_sources(sources, "\n".join([question.question, *PROMPT.values()]), rng)
    passages = "\n\n".join(map(frame, marked))
    supporting = [source.mark for source in marked if right.intersection(source.passages)]
    row = {
        "messages": [{"role": "user", "content": ask_from(question.question, passages, marked[0].mark)}],
        "passages": [{"mark": each.mark, "heading": each.heading, "text": each.text} for each in marked],
        "supporting": supporting,
        "refusal": UNKNOWN[language_of(question.question)],
        "language": question.language,
    }
    return row | ({"answer": question.answer} if supporting and question.answer else {})
