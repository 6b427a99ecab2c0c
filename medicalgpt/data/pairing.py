"""Preference pairs from answers that were rated one by one: of each prompt, the best answer and the worst."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.formats.conversations import without_mask
from medicalgpt.formats.conversion import canonical_json
from medicalgpt.readers.problems import place_of, shorten


@dataclass
class RatedAnswers:
    """The positions of the best and the worst answer to each prompt, of equal ones the first.

    Attributes:
        left_out: rows that become part of no pair, by reason, once `pairs` has ended.
    """

    rows: Sequence[dict[str, Any]]
    name: str
    left_out: Counter = field(default_factory=Counter)

    def pairs(self) -> Iterator[dict[str, Any]]:
        """Rows of preferences, in the order of their prompts: `row`, and under `kept` the ratings and other fields.

        Raises:
            UserError: a row without a rating, or whose rating is not a number.
        """
        found: dict[bytes, list[tuple[float, int]]] = {}
        counts: Counter = Counter()
        for position, row in enumerate(self.rows):
            key = hashlib.sha256(canonical_json([_prompt_of(row), row["row"]["tools"]]).encode()).digest()[:16]
            rated = (self._rating(row), position)
            best, worst = found.setdefault(key, [rated, rated])
            found[key] = [rated if rated[0] > best[0] else best, rated if rated[0] < worst[0] else worst]
            counts[key] += 1
        for key, (best, worst) in found.items():
            if best[0] > worst[0]:
                self.left_out["between the best and the worst answer"] += counts[key] - 2
                yield self._pair(self.rows[best[1]], self.rows[worst[1]])
            else:
                reason = "only answer to its prompt" if counts[key] == 1 else "rated as the other answers"
                self.left_out[reason] += counts[key]
        self.left_out = +self.left_out

    def _rating(self, row: dict[str, Any]) -> float:
        value = row["kept"].get(self.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            others = ", ".join(row["kept"])
            raise UserError(
                f"{place_of(row)}: `{self.name}` is not a number [{shorten(value)}], and --pair_by compares numbers. "
                + (f"Name another field, of {others}." if others else "The row has no field besides its conversation.")
            )
        return value

    def _pair(self, best: dict[str, Any], worst: dict[str, Any]) -> dict[str, Any]:
        answers = {"chosen": best, "rejected": worst}
        pair = {"messages": _prompt_of(best), "tools": best["row"]["tools"]}
        pair |= {name: without_mask(row["row"]["messages"])[-1] for name, row in answers.items()}
        shared = {name: value for name, value in best["kept"].items() if worst["kept"].get(name) == value}
        ratings = {f"score_{name}": row["kept"][self.name] for name, row in answers.items()}
        return {"row": pair, "kept": shared | ratings, "place": best["place"]}


def _prompt_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    return without_mask(row["row"]["messages"])[:-1]
