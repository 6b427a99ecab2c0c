"""Measure how well rewards separate good replies from bad ones, on labelled data (`--check_rewards`)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_preference
from medicalgpt.formats.tasks import to_task
from medicalgpt.readers.problems import Problem, RowError
from medicalgpt.readers.sources import read_rows
from medicalgpt.rewards.rewards import RewardFunction


class Separation(NamedTuple):
    """How well a reward separates good replies from bad ones to the same question.

    Attributes:
        pairs: number of pairs that the reward applies to.
        good, bad: mean reward of the good and the bad replies.
        better, equal: share of pairs in which the good reply scores higher, and the same.
    """

    pairs: int
    good: float
    bad: float
    better: float
    equal: float

    @property
    def auc(self) -> float:
        """Share of pairs in the correct order, ties counting half; 0.5 is chance."""
        return self.better + self.equal / 2


def measure_separation(pairs: Sequence[tuple[float, float]]) -> Separation | None:
    """Statistics of (good, bad) reward pairs; None without pairs."""
    if not pairs:
        return None
    good, bad = zip(*pairs, strict=True)
    better = sum(g > b for g, b in pairs) / len(pairs)
    equal = sum(g == b for g, b in pairs) / len(pairs)
    return Separation(len(pairs), math.fsum(good) / len(pairs), math.fsum(bad) / len(pairs), better, equal)


def check_rewards(
    path: str,
    functions: Mapping[str, RewardFunction],
    weights: Sequence[float] | None = None,
    encoding: str | None = None,
) -> dict[str, Separation | None]:
    """Print how well rewards separate the good from the bad replies in a file.

    Args:
        path: rows with a question, reference fields (`answer`, `type`, `meta`, ...), and a `good` and a `bad` reply,
            where `flaw` names what is wrong with the bad one; or preference pairs (`chosen`, `rejected`).
        functions: from `choose_rewards`.
        weights: one per function. None: all 1.
        encoding: of a file that is not UTF-8; None finds it.

    Returns:
        The separation by reward, and under `overall` that of the weighted sum used in training, in which a reward that
        does not apply counts as 0. None for a reward that applies to no row.

    Raises:
        UserError: a row cannot be read or lacks one of the two replies, or a reward fails.
    """
    questions, replies, columns = read_labelled(path, encoding)
    weights = [1.0] * len(functions) if weights is None else list(weights)
    scores = {
        name: [function(completions=side, prompts=questions, **columns) for side in replies]
        for name, function in functions.items()
    }
    sums = [
        [sum(weight * (value or 0.0) for weight, value in zip(weights, values, strict=True)) for values in rows]
        for rows in (list(zip(*(scores[name][side] for name in functions), strict=True)) for side in (0, 1))
    ]
    pairs = {name: list(zip(*sides, strict=True)) for name, sides in (scores | {"overall": sums}).items()}

    def measure(name: str, flaw: str | None = None) -> Separation | None:
        flaws = columns.get("flaw") or [None] * len(questions)
        return measure_separation(
            [pair for pair, one in zip(pairs[name], flaws, strict=True) if None not in pair and flaw in (None, one)]
        )

    results = {name: measure(name) for name in pairs}
    print(f"{len(questions)} pairs in {path}\n")
    print(f"{'reward':<16}{'weight':>8}{'pairs':>8}{'good':>9}{'bad':>9}{'good > bad':>12}{'equal':>9}{'AUC':>8}")
    for (name, found), weight in zip(results.items(), [*weights, None], strict=True):
        start = f"{name:<16}{'' if weight is None else f'{weight:g}':>8}{found.pairs if found else 0:>8}"
        if found:
            start += f"{found.good:>9.3f}{found.bad:>9.3f}{found.better:>12.1%}{found.equal:>9.1%}{found.auc:>8.3f}"
        print(start)
    flaws = sorted({flaw for flaw in columns.get("flaw", []) if flaw is not None})
    if flaws:
        widths = [max(8, len(name)) + 2 for name in pairs]
        print("\nAUC by flaw of the bad reply")
        heads = "".join(f"{name:>{width}}" for name, width in zip(pairs, widths, strict=True))
        print(f"{'flaw':<24}{'pairs':>7}{heads}")
        for flaw in flaws:
            cells = [(measure(name, flaw), width) for name, width in zip(pairs, widths, strict=True)]
            line = "".join(f"{f'{found.auc:.3f}' if found else '-':>{width}}" for found, width in cells)
            print(f"{flaw:<24}{columns['flaw'].count(flaw):>7}{line}")
    print()
    for name, found in results.items():
        if found is None:
            print(f"{name} applies to none of these rows.")
        elif found.auc <= 0.5:
            print(f"{name} does not separate: it prefers the bad reply at least as often as the good one.")
    return results


def read_labelled(
    path: str, encoding: str | None = None
) -> tuple[list[Any], tuple[list[Any], list[Any]], dict[str, list[Any]]]:
    """Read a file for `check_rewards`: prompts, (good, bad) replies as messages, and the other columns.

    Raises:
        UserError: no such file, an empty one, or a row without a question and two replies.
    """
    if not Path(path).is_file():
        raise UserError(f"--check_rewards {path} is not a file. Give a file of labelled replies, one row per line.")
    tasks, good, bad = [], [], []
    for row in read_rows(path, encoding=encoding):
        try:
            if isinstance(row, Problem):
                raise UserError(f"{row}")
            task = to_task(row.value)
            if {"good", "bad"} <= set(task["columns"]):
                pair = [{"role": "assistant", "content": task["columns"].pop(name)} for name in ("good", "bad")]
            else:
                pair = [to_preference(row.value)[name] for name in ("chosen", "rejected")]
            if not all(isinstance(reply["content"], str) for reply in pair):
                raise RowError("a reply is not text", "Give good and bad (or chosen and rejected) as text.")
        except RowError as error:
            problem = Problem(row.place, str(error), error.remedy, error.value)
            raise UserError(
                f"{problem}\n--check_rewards needs rows with a question, good and bad, or preference pairs."
            ) from error
        tasks.append(task)
        good.append([pair[0]])
        bad.append([pair[1]])
    if not tasks:
        raise UserError(f"--check_rewards {path} has no rows.")
    names = {name: None for task in tasks for name in task["columns"]}
    columns = {name: [task["columns"].get(name) for task in tasks] for name in names}
    return [task["messages"] for task in tasks], (good, bad), columns
