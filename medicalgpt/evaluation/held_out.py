"""Held-out documents, questions, preference pairs and tasks, read and checked."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from medicalgpt.errors import UserError
from medicalgpt.formats import conversion, tasks
from medicalgpt.readers import folders, sources
from medicalgpt.readers.problems import Problem, RowError, SourceRow, format_problems

# Preference prompts, everyday questions (of each kind) and tasks whose answers are shown.
PROMPT_EXAMPLES = 8
EVERYDAY_EXAMPLES = 6
TASK_EXAMPLES = 6

Item = TypeVar("Item")


@dataclass(frozen=True)
class Question:
    """One chat row: the turns up to the last answer, and that answer.

    Attributes:
        place: file and line, for messages.
        category: what it is counted under.
        reference: the answer in the row.
        required: groups of strings; a good answer to a preference prompt, or to a question that is to be declined,
            contains at least one of each group.
        columns: of a task, what rewards judge a reply by.
    """

    place: str
    category: str
    messages: list[dict[str, Any]]
    tools: list | None
    reference: str
    required: list[list[str]] | None = None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one kind.

    Attributes:
        order: indices of all questions, shuffled. It is the same for all models: one with a limit is asked the first.
        examples: indices of the questions whose answers are shown.
    """

    questions: list[Question]
    order: list[int]
    examples: list[int]

    @classmethod
    def choose(cls, questions: list[Question], examples: int, seed: int) -> "QuestionSet":
        """Shuffle by `seed`, and pick at most this many examples."""
        order = list(range(len(questions)))
        random.Random(seed).shuffle(order)
        return cls(questions, order, pick_examples(questions, examples))

    def describe_examples(self) -> list[dict[str, Any]]:
        """What a report shows of the examples."""
        return [
            {
                "place": question.place,
                "category": question.category,
                "messages": question.messages,
                "reference": question.reference,
                **({"required": question.required} if question.required else {}),
            }
            for question in (self.questions[index] for index in self.examples)
        ]


@dataclass(frozen=True)
class PreferencePair:
    """One row of preferences, as `conversion.to_preference` returns it."""

    place: str
    category: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """How rows are read: the flags of the same names.

    Attributes:
        columns: which field of a row is what; no other field is then read.
        preset: the data set whose rows these are.
    """

    ignore_fields: str = ""
    columns: str | None = None
    preset: str | None = None
    encoding: str | None = None

    def converter(self, to: Callable[..., dict[str, Any]]) -> conversion.Converter:
        """Raises UserError if --columns or --preset cannot be understood."""
        try:
            return conversion.converter(to, sources.ignored_fields(self.ignore_fields), self.columns, self.preset)
        except ValueError as error:
            raise UserError(str(error)) from error


@dataclass(frozen=True)
class HeldOut:
    """What the models are measured on; None for a kind that is not measured.

    Attributes:
        chat: questions whose answers are compared with the reference.
        skipped: rows of the chat file that cannot be compared, counted by reason.
        everyday: questions in everyday words, whose answers are compared with the reference.
        untaught: questions about what was not taught, which a good answer declines.
        prompts: those of the preference pairs, each once.
        places: the file or folder that was given for each kind: `text`, `chat`, `everyday`, `preference`, `task`.
        files: the files of each kind.
    """

    documents: list[str] | None = None
    chat: QuestionSet | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    everyday: QuestionSet | None = None
    untaught: QuestionSet | None = None
    pairs: list[PreferencePair] | None = None
    prompts: QuestionSet | None = None
    tasks: QuestionSet | None = None
    places: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def needs_template(self) -> bool:
        """Whether models are asked something, or score conversations."""
        return bool(self.chat or self.everyday or self.untaught or self.pairs or self.tasks)

    def summary(self) -> Iterator[str]:
        """Yield a line about each kind."""
        if self.documents:
            yield f"held-out text: {len(self.documents):,} documents in {', '.join(map(str, self.files['text']))}"
        if self.chat:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            skipped = f", skipped: {reasons}" if reasons else ""
            yield f"held-out questions: {len(self.chat.questions):,} in {self.places['chat']}{skipped}"
        if "everyday" in self.places:
            taught, untaught = (len(asked.questions) if asked else 0 for asked in (self.everyday, self.untaught))
            yield f"held-out everyday questions: {taught:,} taught, {untaught:,} not, in {self.places['everyday']}"
        if self.pairs:
            required = sum(bool(prompt.required) for prompt in self.prompts.questions) if self.prompts else 0
            yield (
                f"held-out preferences: {len(self.pairs):,} pairs in {self.places['preference']}; {required:,} prompts "
                "say what a good answer contains"
            )
        if self.tasks:
            yield f"held-out tasks: {len(self.tasks.questions):,} in {self.places['task']}"

    def describe(self, max_new_tokens: int, task_max_new_tokens: int) -> dict[str, Any]:
        """Return what a file of results says about the data; the arguments are the limits of the answers."""
        text = chat = everyday = preference = task = None
        if self.documents:
            text = {"files": list(map(str, self.files["text"])), "documents": len(self.documents)}
        if self.chat:
            used = len(self.chat.questions)
            rows = used + sum(self.skipped.values())
            chat = {"file": self.places["chat"], "rows": rows, "used": used, "left_out": self.skipped}
            chat["max_new_tokens"] = max_new_tokens
        if "everyday" in self.places:
            everyday = {"file": self.places["everyday"], "max_new_tokens": max_new_tokens}
            everyday |= {kind: len(asked.questions) for kind, asked in self._everyday_sets()}
        if self.pairs:
            prompts = len(self.prompts.questions) if self.prompts else 0
            preference = {"file": self.places["preference"], "pairs": len(self.pairs), "prompts": prompts}
            preference["max_new_tokens"] = max_new_tokens
        if self.tasks:
            task = {"file": self.places["task"], "tasks": len(self.tasks.questions)}
            task["max_new_tokens"] = task_max_new_tokens
        return {
            "text": text,
            "chat": chat,
            "everyday": everyday,
            "preference": preference,
            "task": task,
            "examples": self.chat.describe_examples() if self.chat else [],
            "everyday_examples": [row for _, asked in self._everyday_sets() for row in asked.describe_examples()],
            "prompt_examples": self.prompts.describe_examples() if self.prompts else [],
            "task_examples": self.tasks.describe_examples() if self.tasks else [],
        }

    def _everyday_sets(self) -> list[tuple[str, QuestionSet]]:
        both = (("taught", self.everyday), ("untaught", self.untaught))
        return [(name, asked) for name, asked in both if asked]


def read_held_out(
    *,
    text_file_dir: str | None = None,
    chat_file: str | None = None,
    everyday_file: str | None = None,
    preference_file: str | None = None,
    task_file: str | None = None,
    document_unit: str = "auto",
    reading: Reading | None = None,
    all_prompts: bool = False,
    examples: int = 12,
    seed: int = 42,
) -> HeldOut:
    """Read what is given; see the functions below for each kind.

    Args:
        reading: how the rows of every file are read.
        all_prompts: ask all prompts of the preference file; by default those that say what a good answer contains.
        examples: maximum number of questions of the chat file whose answers are shown.
        seed: shuffles the questions.

    Raises:
        UserError: something is missing, or rows cannot be measured.
    """
    given = {"text": text_file_dir, "chat": chat_file, "everyday": everyday_file}
    given |= {"preference": preference_file, "task": task_file}
    places = {kind: place for kind, place in given.items() if place}
    files = {kind: folders.find_files(place) for kind, place in places.items() if kind != "text"}
    found: dict[str, Any] = {}
    if text_file_dir:
        found["documents"], files["text"] = read_documents(text_file_dir, document_unit, reading)
    if chat_file:
        questions, found["skipped"] = read_questions(chat_file, reading)
        found["chat"] = QuestionSet.choose(questions, examples, seed)
    if everyday_file:
        questions, _ = read_questions(everyday_file, reading, "--everyday_file")
        for name, declined in (("everyday", False), ("untaught", True)):
            if chosen := [question for question in questions if bool(question.required) == declined]:
                found[name] = QuestionSet.choose(chosen, EVERYDAY_EXAMPLES, seed)
    if preference_file:
        found["pairs"], prompts = read_preferences(preference_file, reading)
        if asked := [prompt for prompt in prompts if prompt.required or all_prompts]:
            found["prompts"] = QuestionSet.choose(asked, PROMPT_EXAMPLES, seed)
    if task_file:
        found["tasks"] = QuestionSet.choose(read_tasks(task_file, reading), TASK_EXAMPLES, seed)
    return HeldOut(**found, places=places, files=files)


def read_documents(place: str, document_unit: str, reading: Reading | None = None) -> tuple[list[str], list[Path]]:
    """Return the held-out documents at `place` and their files.

    In a folder, held-out files are those whose name, or that of a folder around them, begins with validation, valid,
    val, dev, eval or test.

    Raises:
        UserError: no such file, no held-out file, or rows that are not documents (all of them, by file:line).
    """
    files = folders.find_files(place)
    if not Path(place).is_file():
        files = [file for file in files if folders.split_of(file, place) != "train"]
        if not files:
            raise UserError(
                f"--text_file_dir {place} has no held-out file. Name one validation.jsonl or validation.txt, or give a "
                "file instead of the folder."
            )
    documents = _convert_rows(files, conversion.to_text, lambda row, text: text["text"], reading, document_unit)
    if not documents:
        raise UserError(f"--text_file_dir {place}: the held-out files are empty ({', '.join(map(str, files))}).")
    return documents, files


def read_questions(
    file: str, reading: Reading | None = None, flag: str = "--chat_file"
) -> tuple[list[Question], dict[str, int]]:
    """Return the questions of a chat file, and the rows that cannot be scored, counted by reason.

    Raises:
        UserError: rows that are not conversations with a final answer (all of them, by file:line).
    """

    def to_question(row: SourceRow, prompt: dict[str, Any]) -> Question:
        if prompt["reference"] is None:
            raise RowError("no answer to compare with", "End the row with the assistant's turn.")
        category = row.value.get("category")
        name = "no category" if category is None else str(category)
        required = _required_strings(row.value)
        return Question(str(row.place), name, prompt["messages"], prompt["tools"], prompt["reference"], required)

    rows = _convert_rows(folders.find_files(file), conversion.to_prompt, to_question, reading)
    questions = [question for question in rows if question.reference.strip()]
    if not questions:
        raise UserError(f"{flag} {file} has no question that can be scored.")
    calls = len(rows) - len(questions)
    return questions, {"the answer is a tool call": calls} if calls else {}


def read_preferences(file: str, reading: Reading | None = None) -> tuple[list[PreferencePair], list[Question]]:
    """Return the pairs of a preference file, and its prompts, each once.

    Raises:
        UserError: rows that are not preferences, or whose format is wrong (all of them, by file:line).
    """

    def to_pair(row: SourceRow, pair: dict[str, Any]) -> tuple[PreferencePair, Question]:
        place = str(row.place)
        language = str(row.value.get("language", "no language"))
        reference, required = pair["chosen"].get("content") or "", _required_strings(row.value)
        question = Question(place, language, pair["messages"], pair["tools"], reference, required)
        return PreferencePair(place, str(row.value.get("category", "no category")), pair), question

    rows = _convert_rows(folders.find_files(file), conversion.to_preference, to_pair, reading)
    if not rows:
        raise UserError(f"--preference_file {file} has no pairs.")
    prompts: dict[str, Question] = {}
    for _, question in rows:
        asked = json.dumps([question.messages, question.tools], ensure_ascii=False, sort_keys=True)
        # Of the rows of a prompt, the first that says what is required counts.
        if asked not in prompts or (question.required and not prompts[asked].required):
            prompts[asked] = question
    return [pair for pair, _ in rows], list(prompts.values())


def _required_strings(row: dict[str, Any]) -> list[list[str]] | None:
    """Raises RowError if there is a `meta.required` that is not a list of lists of strings."""
    meta = row.get("meta")
    required = meta.get("required") if isinstance(meta, dict) else None
    if required is None or required == []:
        return None
    groups = required if isinstance(required, list) else [None]
    if not all(isinstance(group, list) and group and all(isinstance(text, str) for text in group) for group in groups):
        raise RowError(
            "`meta.required` is not a list of groups of strings",
            'Write it as [["cardiology"], ["ambulance", "emergency"]]: a good answer contains one string of each '
            "group.",
            required,
        )
    return required


def read_tasks(file: str, reading: Reading | None = None) -> list[Question]:
    """Return the tasks of a file; the category of each is its `type`.

    Raises:
        UserError: rows that are not prompts, or have no `answer` (all of them, by file:line).
    """

    def to_question(row: SourceRow, task: dict[str, Any]) -> Question:
        columns = task["columns"]
        if "answer" not in columns:
            raise RowError("no answer to compare with", "Put the correct one into `answer`.")
        kind, answer = str(columns.get("type", "no type")), str(columns["answer"])
        return Question(str(row.place), kind, task["messages"], task["tools"], answer, columns=columns)

    questions = _convert_rows(folders.find_files(file), tasks.to_task, to_question, reading)
    if not questions:
        raise UserError(f"--task_file {file} has no tasks.")
    return questions


def pick_examples(questions: Sequence[Question], count: int) -> list[int]:
    """Choose rows to show, spread evenly over and within the categories, identity rows first."""
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


def _convert_rows(
    files: Iterable[Path],
    to: Callable[..., dict[str, Any]],
    measured: Callable[[SourceRow, dict[str, Any]], Item],
    reading: Reading | None,
    document_unit: str = "auto",
) -> list[Item]:
    """Return what is measured of each row.

    Args:
        to: the form that rows are converted to, as in conversion.py.
        measured: of a row and its converted form.

    Raises:
        UserError: rows that cannot be read, or for which one of the two raises RowError; all of them, by file:line.
            Or --columns names a field that no row has.
    """
    reading = reading or Reading()
    convert = reading.converter(to)
    items, problems = [], []
    for row in (row for file in files for row in sources.read_rows(file, document_unit, reading.encoding)):
        if isinstance(row, Problem):
            problems.append(row)
            continue
        try:
            items.append(measured(row, convert(row.value)))
        except RowError as error:
            problems.append(error.at(row.place))
    if problems:
        raise UserError(f"{len(problems)} row(s) cannot be measured:\n{format_problems(problems)}")
    if items and convert.unseen:
        raise UserError(
            f"--columns: no row has the field {', '.join(sorted(convert.unseen))}. Correct its name, or omit it."
        )
    return items
