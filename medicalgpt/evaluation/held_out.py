"""Held-out documents, questions, preference pairs and tasks, read and checked."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medicalgpt.data import formats, sources
from medicalgpt.errors import UserError

# Prompts of preferences, and tasks, whose answers are kept to be shown.
PROMPT_EXAMPLES = 8
TASK_EXAMPLES = 6


@dataclass(frozen=True)
class Question:
    """One chat row: the turns up to the last answer, and that answer.

    `required` is set for prompts of preferences: a good answer holds at least one string of each of these groups.
    `columns` is set for tasks: what rewards judge a reply by.
    """

    place: str
    category: str
    messages: list[dict[str, Any]]
    tools: list | None
    reference: str
    required: list[list[str]] | None = None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PreferencePair:
    """One row of preferences, as `data.to_preference` gives it."""

    place: str
    category: str
    row: dict[str, Any]


@dataclass(frozen=True)
class HeldOut:
    """What the models are measured on. The lists of indices say what is asked first and whose answers are kept."""

    documents: list[str] | None = None
    end_of_document: str | None = None
    questions: list[Question] | None = None
    question_order: list[int] = field(default_factory=list)
    question_examples: list[int] = field(default_factory=list)
    pairs: list[PreferencePair] | None = None
    prompts: list[Question] = field(default_factory=list)
    prompt_order: list[int] = field(default_factory=list)
    prompt_examples: list[int] = field(default_factory=list)
    tasks: list[Question] | None = None
    task_order: list[int] = field(default_factory=list)
    task_examples: list[int] = field(default_factory=list)


def read_documents(place: str, document_unit: str) -> tuple[list[str], list[Path]]:
    """Return the held-out documents at `place` and their files.

    In a folder, held-out files are those whose name begins with validation, valid, val, dev, eval or test.

    Raises:
        UserError: no such file, no held-out file, or rows that are no documents (all of them, by file:line).
    """
    files = sources.find_files(place)
    if not Path(place).is_file():
        files = [file for file in files if sources.HELD_OUT_NAME.match(file.name)]
        if not files:
            raise UserError(
                f"--text_file_dir {place} holds no held-out file. Name one validation.jsonl or validation.txt, or give "
                "a file instead of the folder."
            )
    documents, problems = [], []
    for file in files:
        for row in sources.read_rows(file, document_unit):
            if isinstance(row, sources.Problem):
                problems.append(row)
                continue
            try:
                documents.append(formats.to_text(row.value)["text"])
            except sources.RowError as error:
                problems.append(sources.Problem(row.place, error.reason, error.remedy, error.value))
    _refuse(problems)
    if not documents:
        raise UserError(f"--text_file_dir {place}: the held-out files are empty ({', '.join(map(str, files))}).")
    return documents, files


def read_questions(file: str, ignore_fields: str = "") -> tuple[list[Question], dict[str, int]]:
    """Return the questions of a chat file, and the rows that cannot be scored, counted by reason.

    Raises:
        UserError: rows that are no conversations with a final answer (all of them, by file:line).
    """
    ignore = frozenset(filter(None, ignore_fields.replace(" ", "").split(",")))
    questions, problems, left_out = [], [], {}
    for path in sources.find_files(file):
        for row in sources.read_rows(path):
            if isinstance(row, sources.Problem):
                problems.append(row)
                continue
            try:
                prompt = formats.to_prompt(row.value, ignore)
                if prompt["reference"] is None:
                    raise sources.RowError("no answer to compare with", "End the row with the assistant's turn.")
            except sources.RowError as error:
                problems.append(sources.Problem(row.place, error.reason, error.remedy, error.value))
                continue
            if not prompt["reference"].strip():
                left_out["the answer is a tool call"] = left_out.get("the answer is a tool call", 0) + 1
                continue
            category = row.value.get("category")
            questions.append(
                Question(
                    row.place,
                    "no category" if category is None else str(category),
                    prompt["messages"],
                    prompt["tools"],
                    prompt["reference"],
                )
            )
    _refuse(problems)
    if not questions:
        raise UserError(f"--chat_file {file} holds no question that can be scored.")
    return questions, left_out


def read_preferences(file: str, ignore_fields: str = "") -> tuple[list[PreferencePair], list[Question]]:
    """Return the pairs of a preference file, and its prompts, each once.

    Raises:
        UserError: rows that are no preferences, or say it in another form (all of them, by file:line).
    """
    ignore = frozenset(filter(None, ignore_fields.replace(" ", "").split(",")))
    pairs, prompts, problems = [], {}, []
    for path in sources.find_files(file):
        for row in sources.read_rows(path):
            if isinstance(row, sources.Problem):
                problems.append(row)
                continue
            try:
                pair = formats.to_preference(row.value, ignore)
                required = _required_strings(row.value)
            except sources.RowError as error:
                problems.append(sources.Problem(row.place, error.reason, error.remedy, error.value))
                continue
            pairs.append(PreferencePair(row.place, str(row.value.get("category", "no category")), pair))
            asked = json.dumps([pair["messages"], pair["tools"]], ensure_ascii=False, sort_keys=True)
            language = str(row.value.get("language", "no language"))
            reference = pair["chosen"].get("content") or ""
            question = Question(row.place, language, pair["messages"], pair["tools"], reference, required)
            # Of the rows of a prompt, the first that says what is required counts.
            if asked not in prompts or (required and not prompts[asked].required):
                prompts[asked] = question
    _refuse(problems)
    if not pairs:
        raise UserError(f"--preference_file {file} holds no pairs.")
    return pairs, list(prompts.values())


def _required_strings(row: dict[str, Any]) -> list[list[str]] | None:
    """Raises RowError where `meta.required` is there and is no list of lists of strings."""
    meta = row.get("meta")
    required = meta.get("required") if isinstance(meta, dict) else None
    if required is None or required == []:
        return None
    groups = required if isinstance(required, list) else [None]
    if not all(isinstance(group, list) and group and all(isinstance(text, str) for text in group) for group in groups):
        raise sources.RowError(
            "`meta.required` is no list of groups of strings",
            'Write it as [["cardiology"], ["ambulance", "emergency"]]: a good answer holds one string of each group.',
            required,
        )
    return required


def read_tasks(file: str, ignore_fields: str = "") -> list[Question]:
    """Return the tasks of a file; the category of each is its `type`.

    Raises:
        UserError: rows that are no prompts, or have no `answer` (all of them, by file:line).
    """
    ignore = frozenset(filter(None, ignore_fields.replace(" ", "").split(",")))
    tasks, problems = [], []
    for path in sources.find_files(file):
        for row in sources.read_rows(path):
            if isinstance(row, sources.Problem):
                problems.append(row)
                continue
            try:
                task = formats.to_task(row.value, ignore)
                columns = task["columns"]
                if "answer" not in columns:
                    raise sources.RowError("no answer to compare with", "Put the right one into `answer`.")
            except sources.RowError as error:
                problems.append(sources.Problem(row.place, error.reason, error.remedy, error.value))
                continue
            kind, answer = str(columns.get("type", "no type")), str(columns["answer"])
            tasks.append(Question(row.place, kind, task["messages"], task["tools"], answer, columns=columns))
    _refuse(problems)
    if not tasks:
        raise UserError(f"--task_file {file} holds no tasks.")
    return tasks


def pick_examples(questions: Sequence[Question], count: int) -> list[int]:
    """Choose rows to show, spread evenly over and inside the categories; identity rows are among them."""
    by_category: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        by_category.setdefault(question.category, []).append(index)
    names = sorted(by_category, key=lambda name: "identity" not in name.lower())
    quota = dict.fromkeys(names, 0)
    turns = [name for name in names if "identity" in name.lower()] + names * count
    for name in turns:
        if sum(quota.values()) < count and quota[name] < len(by_category[name]):
            quota[name] += 1
    chosen = []
    for name, number in quota.items():
        rows = by_category[name]
        chosen += [rows[(2 * place + 1) * len(rows) // (2 * number)] for place in range(number)]
    return chosen


def _refuse(problems: Sequence[sources.Problem]) -> None:
    if problems:
        raise UserError(f"{len(problems)} row(s) cannot be measured:\n{sources.listed(problems)}")


def shuffled(count: int, seed: int) -> list[int]:
    # One order for all models: who is asked fewer questions is asked the first of them.
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
