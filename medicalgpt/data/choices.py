"""Options of a multiple-choice question: in every shape that rows have them, and as they stand in a prompt."""

import json
import re
from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any

from medicalgpt.data.sources import RowError

# Columns that hold all options of a row, and columns that hold one each.
OPTION_FIELDS = ("options", "option", "choices", "Options")
SINGLE_OPTION_FIELDS = (
    ("opa", "opb", "opc", "opd", "ope"),
    ("op1", "op2", "op3", "op4", "op5"),
    ("option1", "option2", "option3", "option4", "option5"),
    ("option_a", "option_b", "option_c", "option_d", "option_e"),
    ("ending0", "ending1", "ending2", "ending3", "ending4"),
    tuple("ABCDEFGHIJ"),
)
# "A. text", "(A) text", "A、text" or "A text" at the start of a line.
_OPTION_LINE = re.compile(r"^\s*[(（]?([A-Ja-j])(?:[)）.．、:：]\s*|\s+)(.*\S)\s*$")


def parse_options(value: Any) -> dict[str, str]:
    """The options of a question under their letters, in order.

    Args:
        value: an object of letters and texts; a list of texts, or of objects with a letter (`key` or `label`) and a
            text (`value` or `text`); two lists, `text` and `label`; a string of lines "A. text"; or JSON of one of
            these in a string. Options that are null are none: tables have a column for the longest list.

    Raises:
        RowError: anything else, fewer than two options, or a letter twice.
    """
    pairs = _option_pairs(value)
    options = {letter: text for letter, text in pairs}
    if len(options) < 2 or len(options) < len(pairs):
        raise RowError(
            f"{len(options)} different option(s), expected two or more",
            'Write them as {"A": "...", "B": "..."} or as a list of texts.',
            value,
        )
    return options


def _option_pairs(value: Any) -> list[tuple[str, str]]:
    if isinstance(value, str):
        return _parse_option_lines(value)
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        texts = value["text"]
        letters = value.get("label") or ascii_uppercase[: len(texts)]
        return [_option(letter, text) for letter, text in zip(letters, texts, strict=False)]
    if isinstance(value, Mapping):
        return [_option(letter, text) for letter, text in value.items() if text is not None]
    if isinstance(value, list) and len(value) <= len(ascii_uppercase):
        kept = [item for item in value if item is not None]
        if kept and all(isinstance(item, Mapping) for item in kept):
            return [
                _option(item.get("key", item.get("label")), item.get("value", item.get("text", item.get("content"))))
                for item in kept
            ]
        return [
            _option(letter, _without_letter(letter, item)) for letter, item in zip(ascii_uppercase, kept, strict=False)
        ]
    raise RowError("the options are not an object or a list", 'Write {"A": "...", "B": "..."}.', value)


def _option(letter: Any, text: Any) -> tuple[str, str]:
    # Tables have answers that are numbers or dates.
    if isinstance(text, int | float) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str) or not text.strip() or not isinstance(letter, str | int):
        raise RowError("an option is empty or not text", "Give each option a letter and a text.", {str(letter): text})
    return str(letter).strip().upper().rstrip(".):"), text.strip()


def _without_letter(letter: str, item: Any) -> Any:
    """The text of an option in a list where texts begin with their own letters ("A. text")."""
    found = _OPTION_LINE.match(item) if isinstance(item, str) else None
    separator = item.strip()[1:2] if found else ""
    return found[2] if found and found[1] == letter and separator in ".．、):：）" else item


def _parse_option_lines(text: str) -> list[tuple[str, str]]:
    if text.lstrip().startswith(("{", "[")):
        try:
            return _option_pairs(json.loads(text))
        except json.JSONDecodeError:
            pass
    pairs: list[tuple[str, str]] = []
    for line in text.splitlines():
        found = _OPTION_LINE.match(line)
        # Letters are in order, so that a text which begins with "A " opens no option.
        if found and found[1].upper() == ascii_uppercase[len(pairs)]:
            pairs.append((found[1].upper(), found[2]))
        elif pairs and line.strip():
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]}\n{line.strip()}")
    return pairs


def options_of(row: Mapping[str, Any]) -> tuple[dict[str, str], tuple[str, ...]] | None:
    """The options of a row and the names of the fields that they come from; None for a row without options.

    Raises:
        RowError: a field of that name with something else in it.
    """
    for name in OPTION_FIELDS:
        if row.get(name) not in (None, "", [], {}):
            return parse_options(row[name]), (name,)
    for names in SINGLE_OPTION_FIELDS:
        if all(row.get(name) not in (None, "") for name in names[:2]):
            there = tuple(name for name in names if name in row)
            return parse_options([row[name] for name in there if row[name] not in (None, "")]), there
    return None


def prompt_with_options(question: str, options: Mapping[str, str]) -> str:
    """A question with its options, one per line as `A. text`; unchanged if every option already is in it."""
    if all(text in question for text in options.values()):
        return question
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return f"{question.rstrip()}\n{lines}"


def answer_letters(answer: Any, options: Mapping[str, str], *, first: int = 0) -> str | None:
    """The letters of the correct options, such as `B` or `ACD`, in order; None if the answer names no option.

    Args:
        answer: a letter or several (`B`, `b)`, `ABD`, `A,C`, a list of them), the number of an option, or its text.
        first: the number of the first option.
    """
    if isinstance(answer, list):
        found = [answer_letters(item, options, first=first) for item in answer]
        return "".join(sorted(set("".join(filter(None, found))))) if found and all(found) else None
    if isinstance(answer, bool) or answer is None:
        return None
    letters = list(options)
    if isinstance(answer, int):
        return letters[answer - first] if 0 <= answer - first < len(letters) else None
    text = str(answer).strip()
    if text in options:
        return text
    by_text = [letter for letter, option in options.items() if option.strip().casefold() == text.casefold()]
    if by_text:
        return by_text[0]
    if text.isdigit():
        return answer_letters(int(text), options, first=first)
    named = [letter for letter in re.sub(r"[\s,，、;；/|.()（）:：]+|and|和", "", text).upper()]
    if named and all(letter in options for letter in named) and len(set(named)) == len(named):
        return "".join(sorted(named))
    opening = _OPTION_LINE.match(text)
    letter = opening[1].upper() if opening else None
    return letter if letter in options and options[letter].casefold() == opening[2].casefold() else None


def answer_text(letters: str, options: Mapping[str, str]) -> str:
    """The correct options as a reply writes them: `B. text`, one per line."""
    return "\n".join(f"{letter}. {options[letter]}" for letter in letters)
