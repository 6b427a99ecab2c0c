"""What the rewards of a run apply to: checked, counted and shown on examples before training."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.formats.answers import final_answer, parse_choice
from medicalgpt.formats.choices import OPTION_GOLD_FIELDS, written_options
from medicalgpt.formats.tasks import GOLD_FIELDS
from medicalgpt.readers.problems import Problem, place_of, shorten
from medicalgpt.rewards.grading import (
    infer_answer_type,
    is_formula,
    parse_options_chosen,
    parse_quantity,
    strip_unit,
)
from medicalgpt.rewards.rewards import KINDS, REWARDS, RewardFunction, question_text

from loguru import logger

PROBE = "<think>?</think><answer>?</answer>"
# Fields that need no mention: what the rewards read, and what only describes a row.
READ_FIELDS = {
    "passages",
    "supporting",
    "refusal",
    "answer",
    "type",
    "options",
    "tolerance",
    "language",
    "meta",
    *GOLD_FIELDS,
    *OPTION_GOLD_FIELDS,
}
READ_FIELDS |= {"passages", "supporting", "refusal"}
READ_FIELDS |= {"id", "idx", "source", "category", "lang", "metadata"}
EXAMPLES = 3


def first_answer(row: Mapping[str, Any]) -> str:
    """The correct answer as it is in the row, the first of several; empty without one."""
    answer = row["columns"].get("answer")
    if isinstance(answer, list):
        answer = answer[0] if answer else None
    return "" if answer is None else str(answer).strip()


def kind_of_answer(row: Mapping[str, Any]) -> str | None:
    """How the reward `accuracy` compares with the answer of a task: a kind of `KINDS`, or `formula` for a number that
    has to be computed. None for a row without an answer."""
    columns, gold = row["columns"], final_answer(first_answer(row))
    if not gold:
        return None
    kind = columns.get("type")
    if kind not in KINDS:
        kind = infer_answer_type(gold, question_text(row["messages"]), columns.get("options"))
    return "formula" if kind == "number" and not parse_quantity(gold) and is_formula(strip_unit(gold)) else kind


def find_unscorable(rows: Iterable[dict[str, Any]]) -> list[Problem]:
    """The rows whose answer cannot be what their `type` says, so that no reply to them could be correct."""
    problems = []
    for row in rows:
        columns = row["columns"]
        gold, kind = final_answer(first_answer(row)), columns.get("type")
        options = columns.get("options") or written_options(question_text(row["messages"]))
        if gold and kind == "choice" and not parse_options_chosen(gold, options):
            remedy = "Write the letters of the correct options, or omit `type`."
        elif gold and kind == "number" and not (parse_quantity(gold) or is_formula(strip_unit(gold))):
            remedy = "Write one number, with its unit, or omit `type`."
        else:
            continue
        problems.append(Problem(place_of(row), f"`answer` is not a {kind}, as `type` says", remedy, shorten(gold)))
    return problems


def check_coverage(
    rows: Sequence[dict[str, Any]], functions: Mapping[str, RewardFunction], tolerance: float | None = None
) -> dict[str, int]:
    """Count the kinds of answers, log them with judged examples, and refuse rewards that apply to no row.

    Args:
        rows: tasks of training, with `place`.
        functions: the rewards by name; those that are not built in are not called.
        tolerance: `--reward_tolerance`, if it is given.

    Returns:
        The number of rows by kind, and of those with `no answer`.

    Raises:
        UserError: a built-in reward that is None for every row, or a tolerance without numbers.
    """
    kinds: Counter = Counter()
    examples: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kind = kind_of_answer(row)
        kinds[kind] += 1
        if kind and len(examples.setdefault(kind, [])) < EXAMPLES:
            examples[kind].append(row)
    for name, function in functions.items():
        if name in REWARDS and not any(_applies(function, row) for row in rows):
            raise UserError(_no_row(name, rows))
    if tolerance is not None and not kinds["number"]:
        raise UserError("--reward_tolerance has no effect here: no row has a number as its answer. Omit it.")
    if "accuracy" in functions:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common() if kind)
        without = f"; {kinds[None]:,} rows have none, and only the other rewards score them" if kinds[None] else ""
        logger.info(f"answers that replies are compared with: {counts}{without}")
        for kind, row in _spread(examples):
            logger.info(_judged(kind, row, functions["accuracy"]))
    if not set(functions) - set(REWARDS):
        unread = Counter(name for row in rows for name in row["columns"] if name not in READ_FIELDS)
        if unread:
            names = ", ".join(f"{name} ({count:,} rows)" for name, count in sorted(unread.items()))
            logger.info(f"fields that no reward reads: {names}")
    return {kind or "no answer": count for kind, count in kinds.items()}


def _applies(function: RewardFunction, row: dict[str, Any]) -> bool:
    columns = {name: [value] for name, value in row["columns"].items()}
    (value,) = function(completions=[PROBE], prompts=[row["messages"]], **columns)
    return value is not None


def _no_row(name: str, rows: Sequence[dict[str, Any]]) -> str:
    if name != "accuracy":
        reason = {
            "safety": "no row has `meta.required` or asks about an emergency",
            "citation": "no row has `passages`, which chatpdf.py --make_tasks writes",
            "language": "no row has a question in Chinese or English, or `language`",
        }.get(name, "it is None for each")
        return f"--reward_funcs {name} applies to no row: {reason}. Omit it, or add rows that it applies to."
    fields = ", ".join(sorted({column for row in rows for column in row["columns"]})) or "none"
    return (
        f"--reward_funcs accuracy applies to no row: none has an answer to compare with. Fields next to the prompt: "
        f"{fields}.\nRename the one with the correct answer to `answer` (also read: "
        f"{', '.join((*GOLD_FIELDS[1:5], *OPTION_GOLD_FIELDS[:4]))}), or choose other rewards."
    )


def _spread(examples: Mapping[str, list[dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """A few rows, of as many kinds as there are."""
    turns = [(kind, rows[turn]) for turn in range(EXAMPLES) for kind, rows in examples.items() if turn < len(rows)]
    return turns[:EXAMPLES]


def _judged(kind: str, row: dict[str, Any], accuracy: RewardFunction) -> str:
    text = first_answer(row)
    gold = final_answer(text)
    replies = {"correct": gold, "wrong": _another(kind, gold, row), "text of the row": text}
    columns = {name: [value] * len(replies) for name, value in row["columns"].items()}
    scores = accuracy(
        completions=[f"<think>…</think><answer>{reply}</answer>" for reply in replies.values()],
        prompts=[row["messages"]] * len(replies),
        **columns,
    )
    shown = ", ".join(
        f"{name} [{shorten(reply, 30)}] {score:g}"
        for (name, reply), score in zip(replies.items(), scores, strict=True)
        if name != "text of the row" or text.strip() != gold
    )
    return f"  {place_of(row)}: {shorten(question_text(row['messages']))}\n    {kind}: {shown}"


def _another(kind: str, gold: str, row: dict[str, Any]) -> str:
    """An answer of the same kind that is wrong."""
    if kind == "choice":
        letters = row["columns"].get("options") or written_options(question_text(row["messages"])) or "AB"
        correct = parse_choice(gold)
        return next((letter for letter in letters if letter.casefold() not in correct), "J")
    quantity = parse_quantity(gold) if kind == "number" else None
    if quantity:
        return f"{quantity.number + 1:g}"
    return f"{gold} + 1" if kind == "formula" else "?"
