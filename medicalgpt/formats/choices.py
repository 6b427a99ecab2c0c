"""Options of a multiple-choice question: in every shape that rows have them, and as they stand in a prompt."""

import ast
import json
import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from medicalgpt.formats.answers import CHOICE_LEAD, normalize_width, parse_choice
from medicalgpt.readers.problems import RowError

# Columns that hold all options of a row, and columns that hold one each.
OPTION_FIELDS = ("options", "option", "choices", "Options", "Choices")
SINGLE_OPTION_FIELDS = (
    ("opa", "opb", "opc", "opd", "ope"),
    ("op1", "op2", "op3", "op4", "op5"),
    ("option1", "option2", "option3", "option4", "option5"),
    ("option_a", "option_b", "option_c", "option_d", "option_e"),
    ("ending0", "ending1", "ending2", "ending3", "ending4"),
    tuple("ABCDEFGHIJ"),
)
# Fields with the letter or, counted from 0, the number of the correct option.
OPTION_GOLD_FIELDS = (
    *("answer_idx", "answer_index", "answer_letter", "answerKey", "answer_key", "correct_option", "cop", "gold"),
    *("correct_answer_idx", "label"),
)
LETTERS = "ABCDEFGHIJ"
# "A. text", "(A) text", "A、text" or "A text" at the start of a line.
_OPTION_LINE = re.compile(r"^\s*[(（]?([A-Ja-j])(?:[)）.．、:：]\s*|\s+)(.*\S)\s*$")
# "A. text" anywhere in a line, for options that follow each other on one line.
_OPTION_MARK = re.compile(r"(?:(?<=^)|(?<=[\s;,。；，)）]))[(（]?([A-J])[)）.．、:：]\s*", re.MULTILINE)


def parse_options(value: Any) -> dict[str, str]:
    """The options of a question under their letters, in order.

    Args:
        value: an object of letters and texts; a list of texts, or of objects with a letter (`key` or `label`) and a
            text (`value` or `text`); two lists, `text` and `label`; a string of lines "A. text"; or JSON of one of
            these in a string. Options that are null are ignored: tables have a column for the longest list.

    Raises:
        RowError: anything else, fewer than two options, or a letter twice.
    """
    pairs = [(letter, text) for letter, text in _option_pairs(value) if text is not None]
    options = {letter: text for letter, text in pairs}
    if len(options) < 2 or len(options) < len(pairs):
        raise RowError(
            f"{len(options)} different option(s), expected two or more",
            'Write them as {"A": "...", "B": "..."} or as a list of texts.',
            value,
        )
    return options


def _option_pairs(value: Any) -> list[tuple[str, str | None]]:
    """Letters and texts, None for the text of an option that is empty: the letters of the others stay."""
    if isinstance(value, str):
        return _parse_option_lines(value)
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        texts = value["text"]
        return [_option(*pair) for pair in zip(value.get("label") or LETTERS, texts, strict=False)]
    if isinstance(value, Mapping):
        # Numbers as keys are places; everything else is a letter.
        numbered = all(str(key).strip().isdigit() for key in value) and len(value) <= len(LETTERS)
        return [_option(*pair) for pair in zip(LETTERS if numbered else value, value.values(), strict=False)]
    if isinstance(value, list) and len(value) <= len(LETTERS):
        kept = [item for item in value if item is not None]
        if kept and all(isinstance(item, Mapping) for item in kept):
            return [
                _option(item.get("key", item.get("label")), item.get("value", item.get("text", item.get("content"))))
                for item in kept
            ]
        return [_option(letter, _without_letter(letter, item)) for letter, item in zip(LETTERS, value, strict=False)]
    raise RowError(
        f"the options are not an object or a list of at most {len(LETTERS)}", 'Write {"A": "...", "B": "..."}.', value
    )


def _option(letter: Any, text: Any) -> tuple[str, str | None]:
    # Tables have answers that are numbers or dates, and columns for options that only other rows have.
    if isinstance(text, int | float) and not isinstance(text, bool):
        text = None if text != text else str(text)
    if text is None or isinstance(text, str) and not text.strip():
        return str(letter), None
    letter = letter.strip().upper().rstrip(".):、") if isinstance(letter, str) else letter
    if not isinstance(text, str) or letter not in tuple(LETTERS):
        raise RowError(
            "an option is not text under a letter from A to J",
            "Give each option a letter and a text.",
            {str(letter): text},
        )
    return letter, text.strip()


def _without_letter(letter: str, item: Any) -> Any:
    """The text of an option in a list where texts begin with their own letters ("A. text")."""
    found = _OPTION_LINE.match(item) if isinstance(item, str) else None
    separator = item.strip()[1:2] if found else ""
    return found[2] if found and found[1] == letter and separator in ".．、):：）" else item


def _parse_option_lines(text: str) -> list[tuple[str, str | None]]:
    if text.lstrip().startswith(("{", "[")):
        # CSV files have options as JSON, or as Python prints them.
        for parse in (json.loads, ast.literal_eval):
            try:
                return _option_pairs(parse(text))
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                pass
    # A line above the options may begin with "A " as well.
    if options := written_options(text):
        return list(options.items())
    pairs: list[tuple[str, str | None]] = []
    for line in text.splitlines():
        found = _OPTION_LINE.match(line)
        # Letters are in order, so that a text which begins with "A " is not an option.
        if found and found[1].upper() == LETTERS[len(pairs) : len(pairs) + 1]:
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
            return parse_options([row.get(name) for name in names]), there
    return None


def first_number(row: Mapping[str, Any], fields: tuple[str, ...]) -> int:
    """The number of the first option where options have numbers: `option1`, or an object with the keys 1, 2, …

    Args:
        fields: with the options, as `options_of` returns them.
    """
    if fields and fields[0][-1] == "1":
        return 1
    options = row.get(fields[0]) if len(fields) == 1 else None
    if isinstance(options, str):
        key = re.match(r"\s*\{\s*[\"']?(\d+)", options)
        return int(key[1]) if key else 0
    return int(next(iter(options))) if isinstance(options, Mapping) and str(next(iter(options))).isdigit() else 0


def written_options(question: str) -> dict[str, str] | None:
    """The options that a question ends with: marks "A.", "B.", … in order, on lines or in one line. None without."""
    marks = list(_OPTION_MARK.finditer(question))
    on_lines = [mark for mark in marks if not question[: mark.start()].rpartition("\n")[2].strip()]
    return _run_of_options(question, on_lines) or _run_of_options(question, marks)


def _run_of_options(question: str, marks: list[re.Match[str]]) -> dict[str, str] | None:
    """The options at the last marks that run on from "A.": a question may have other lists before its options."""
    for first in reversed([number for number, mark in enumerate(marks) if mark[1] == "A"]):
        run = list(takewhile(lambda pair: pair[0][1] == pair[1], zip(marks[first:], LETTERS, strict=False)))
        if len(run) >= 2:
            ends = [mark.start() for mark, _ in run[1:]] + [len(question)]
            options = {
                letter: question[mark.end() : end].strip(" \n;,；，")
                for (mark, letter), end in zip(run, ends, strict=True)
            }
            return options if all(options.values()) else None
    return None


def _comparable(text: str) -> str:
    return "".join(re.findall(r"[^\W_]|[<>≤≥=+%±-]", normalize_width(text).casefold()))


def prompt_with_options(question: str, options: Mapping[str, str]) -> str:
    """A question with its options, one per line as `A. text`; unchanged if they are written in it.

    Raises:
        RowError: the question ends with the same options under other letters.
    """
    written = {letter: _comparable(text) for letter, text in (written_options(question) or {}).items()}
    wanted = {letter: _comparable(text) for letter, text in options.items()}
    # An instruction may follow the last option.
    last = max(options)
    if written.keys() == wanted.keys() and all(
        text == wanted[letter] or letter == last and text.startswith(wanted[letter]) for letter, text in written.items()
    ):
        return question
    if len(written) == len(wanted) and sorted(written.values()) == sorted(wanted.values()):
        raise RowError(
            "the question has the options under other letters than the row",
            "Remove them from the question, or from the row.",
            question[-60:],
        )
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return f"{question.rstrip()}\n{lines}"


def answer_letters(answer: Any, options: Mapping[str, str], *, first: int = 0, numbers: bool = True) -> str | None:
    """The letters of the correct options, such as `B` or `ACD`, in order; None if the answer names no option.

    Args:
        answer: a letter or several (`B`, `b)`, `ABD`, `A,C`, a list of them), the number of an option, or its text.
        first: the number of the first option.
        numbers: False: a number is a text, since nobody replies with the number of an option.
    """
    if isinstance(answer, list):
        found = [answer_letters(item, options, first=first, numbers=numbers) for item in answer]
        return "".join(sorted(set("".join(filter(None, found))))) if found and all(found) else None
    if isinstance(answer, bool) or answer is None:
        return None
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and numbers:
        place = answer - first
        return LETTERS[place] if 0 <= place < len(LETTERS) and LETTERS[place] in options else None
    text = str(answer).strip()
    if text in options:
        return text
    if by_text := _letter_of_text(text, options):
        return by_text
    if text.isdigit() and numbers:
        return answer_letters(int(text), options, first=first)
    stated = CHOICE_LEAD.sub("", text.casefold())
    marked = _OPTION_LINE.match(stated)
    of_text = _letter_of_text(marked[2], options) if marked else None
    if marked and of_text == marked[1].upper():
        return of_text
    chosen = "".join(sorted(parse_choice(text))).upper()
    if not chosen:
        return _letter_of_text(stated, options) or _letter_with_more(stated, options)
    doubled = re.fullmatch(r"([A-J])\1+", text, re.IGNORECASE)
    if doubled or any(letter not in options for letter in chosen):
        return None
    # "B. Aspirin" where Aspirin is A.
    return None if of_text and len(chosen) == 1 and options[chosen] != options[of_text] else chosen


def _letter_of_text(text: str, options: Mapping[str, str]) -> str | None:
    wanted = _comparable(text)
    return next((letter for letter, option in options.items() if wanted and _comparable(option) == wanted), None)


def _letter_with_more(text: str, options: Mapping[str, str]) -> str | None:
    """The option that a text begins with, before a full stop or a bracket: "Heparin. Explanation: …", "Heparin (B)"."""
    text = normalize_width(text).casefold().strip()
    found = {
        letter: len(option)
        for letter, option in ((letter, normalize_width(option).casefold()) for letter, option in options.items())
        if text.startswith(option) and re.match(r"\s*(?:[.。;]\s|\n|\()", text[len(option) :])
    }
    return max(found, key=found.get) if found else None


def read_cop(cop: Any, count: int = 4, first: int = 0) -> Any:
    """MedMCQA's `cop` as a number where it is one. The set's own files count from 1, its copy on the hub from 0.

    Args:
        count: of options.
        first: the number of the first option.

    Raises:
        RowError: `cop` is the number that only the other way of counting has.
    """
    text = str(cop).strip().removesuffix(".0")
    if isinstance(cop, bool) or not text.removeprefix("-").isdecimal():
        return cop
    number = int(text)
    if number == (0 if first else count):
        other = "0, as the hub's copy does: --preset medmcqa" if first else "1: --preset medmcqa-original"
        raise RowError(
            f"`cop` is {number}: no option of {count}, counted from {first}, so that other rows are off by one",
            f"The file counts from {other}.",
            kind="misread",
        )
    return number


def answer_text(letters: str, options: Mapping[str, str]) -> str:
    """The correct options as a reply writes them: `B. text`, one per line."""
    return "\n".join(f"{letter}. {options[letter]}" for letter in letters)
