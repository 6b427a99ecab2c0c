"""Questions about documents: which passage answers them, which are held out, and rows that train citing with GRPO."""

import json
import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.files import write_atomically
from medicalgpt.formats.citations import UNKNOWN, draw_tag, mark
from medicalgpt.formats.terms import SENTENCE, language_of, normalize
from medicalgpt.rag.grounding import Source, build_sources, write_question
from medicalgpt.rag.retrieval import Collection, Passage

from loguru import logger


@dataclass(frozen=True)
class Question:
    """A row of --questions. `file` is None if the files have no answer; otherwise `evidence` is a quotation from it."""

    question: str
    language: str
    file: str | None
    page: int | None = None
    evidence: str = ""

    def answered_by(self, passage: Passage) -> bool:
        same_page = self.page is None or passage.page == self.page
        return Path(passage.file).name == self.file and same_page and normalize(self.evidence) in passage.normalized


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the half that is only measured on: no setting is chosen by it, no row made of it.

    It depends on the question's text alone, so that it stays so when questions are added.
    """
    return sha256(question.encode()).digest()[-1] % 2 == 1


def write_tasks(
    path: str, questions: Sequence[Question], collection: Collection, num_passages: int, with_replies: bool = False
) -> None:
    """Write a row for each question that is not held out: the prompt of chatpdf.py, and what its answer may cite.

    `citations` of a row has the `tag` of the marks, the `passages` and their `places`, and `supporting`, the numbers of
    those that answer the question; none if the files do not, or if the right passage was not retrieved. With replies,
    each row also has a turn of the assistant, see `write_reply`, and so trains a model that never cites.

    Raises:
        UserError: the file exists or is not a .jsonl file, or there is nothing to write.
    """
    if Path(path).suffix != ".jsonl" or Path(path).exists():
        raise UserError(f"--make_tasks {path} must be a .jsonl file that does not exist. Choose another name.")
    rows = []
    for number, question in enumerate(questions):
        if is_held_out(question.question) or not (found := collection.search(question.question)).order:
            continue
        # Repeatable: what a model learns from is not secret.
        chooser = random.Random(number)
        sources = build_sources(collection, found, num_passages, 0)
        # The first one is right more often than not, and citing it without reading must not pay.
        chooser.shuffle(sources)
        right = {n for n, passage in enumerate(collection.passages) if question.file and question.answered_by(passage)}
        texts = [text for source in sources for text in (source.place, source.text)]
        tag = draw_tag([question.question, *texts], chooser)
        citations = describe_citations(sources, right, tag)
        prompt = [{"role": "user", "content": write_question(question.question, sources, tag)}]
        if with_replies:
            prompt.append({"role": "assistant", "content": write_reply(question, citations)})
        rows.append({"messages": prompt, "language": question.language, "citations": citations})
    if not rows:
        raise UserError("--make_tasks: no question finds a passage, or all are held out. Add questions to --questions.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    answered = sum(bool(row["citations"]["supporting"]) for row in rows)
    held = sum(is_held_out(question.question) for question in questions)
    logger.info(
        f"{path}: {len(rows)} rows, {answered} with an answer in their passages and {len(rows) - answered} to refuse; "
        f"{held} questions are held out for --evaluate"
    )


def describe_citations(sources: Sequence[Source], right: Set[int], tag: str) -> dict[str, Any]:
    """What a reply may cite, as the reward `citations` reads it. `right` are the passages that answer the question."""
    return {
        "tag": tag,
        "places": [source.place for source in sources],
        "passages": [source.text for source in sources],
        "supporting": [n for n, source in enumerate(sources, start=1) if right.intersection(source.passages)],
    }


def write_reply(question: Question, citations: Mapping[str, Any]) -> str:
    """The sentences of the evidence, each with the mark of the first passage that has it; otherwise the refusal."""
    if not citations["supporting"]:
        return UNKNOWN[language_of(question.question)]
    here = mark(citations["tag"], citations["supporting"][0])
    space = "" if question.language == "zh" else " "
    return space.join(f"{match[0].strip()}{space}{here}" for match in SENTENCE.finditer(question.evidence.strip()))
