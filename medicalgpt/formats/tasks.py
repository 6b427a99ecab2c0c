"""Convert a row to a task: a prompt with its options, and the answer that replies to it are scored with."""

import math
from collections.abc import Mapping
from typing import Any

from medicalgpt.formats.answers import final_answer
from medicalgpt.formats.choices import (
    OPTION_GOLD_FIELDS,
    answer_letters,
    first_number,
    options_of,
    prompt_with_options,
    read_cop,
    written_options,
)
from medicalgpt.formats.conversations import LEADING_FIELDS, PROMPT_FIELDS
from medicalgpt.formats.conversion import in_lower_case, to_preference, to_prompt, under_common_names
from medicalgpt.formats.fields import ANY_CASE, PREFERENCE_FIELDS, is_blank
from medicalgpt.formats.presets import recognise
from medicalgpt.formats.turns import are_turns, parse_inner_json
from medicalgpt.readers.problems import RowError

# Names of data sets for what we call `question`, and all whose capitals differ between data sets.
QUESTION_FIELDS = ("problem", "question_text", "stem", "Open-ended Verifiable Question")
FOLDED = ANY_CASE | {"options", "choices"}
CONTEXT_FIELDS = ("context", "contexts", "passage")
# Fields with the correct answer, the first of which counts: short answers come before worked solutions.
GOLD_FIELDS = (
    *("answer", "reward_model", "ground_truth", "final_decision", "expected_answer", "correct_answer", "final_answer"),
    *("Ground-True Answer", "answer_string", "solution", "答案", "回答"),
)
REPLY_FIELDS = ("output", "response", "completion", "target")
MEDIA_FIELDS = ("image", "images", "video", "videos", "audio", "audios")
# Next to options, a longer text that names none of them is an explanation.
LONGEST_OPTION = 100  # characters


def to_task(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A prompt and what its answers can be scored with: `{"messages": [...], "tools": [...] | None, "columns": {...}}`.

    The prompt comes in the formats of `to_prompt` and `to_preference`; options in a field of their own (`options_of`)
    and a `context` are written into it. Of the columns, `answer` is the correct answer, wherever the row has it
    (`GOLD_FIELDS`, `OPTION_GOLD_FIELDS`, a final turn of the assistant): with options its letters, and `options` are
    the options by letter. Every other field of the row is a column under its own name.

    Raises:
        RowError: as `to_prompt`; an answer that is none of the options, or two that differ; fields that a prompt of
            text cannot hold, such as images; a tolerance that is not a number of at least 0.
    """
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, Mapping):
        raise RowError(f"the row is a {type(value).__name__}, not an object", "Each row is a JSON object {...}.", value)
    row = value = {name: item for name, item in value.items() if name not in ignore and not _is_null(item)}
    row = in_lower_case(row, FOLDED)
    preset = recognise(value)
    # What is made for tasks under a known name is read below, also without its answer.
    if preset and not ("task" in preset.kinds and set(row) & {*PROMPT_FIELDS, *QUESTION_FIELDS}):
        row = under_common_names(value, preset, "task")
    _refuse_unusable(row)
    offered = options_of(row)
    options, option_fields = offered or ({}, ())
    columns = {name: item for name, item in row.items() if name not in option_fields}
    prompt, reply = _take_prompt(columns)
    question = prompt["messages"][-1]
    for name in CONTEXT_FIELDS:
        if not is_blank(context := columns.pop(name, None)):
            question["content"] = f"{_context_text(context, name)}\n\n{question['content']}"
    if not is_blank(below := columns.pop("input", None)):
        question["content"] += f"\n{_context_text(below, 'input')}"
    if options:
        question["content"] = prompt_with_options(question["content"], options)
    first = first_number(row, option_fields)
    if "opa" in option_fields and "cop" in columns:
        # An option that is empty has its number all the same.
        columns["cop"] = read_cop(columns["cop"], max(4, len(options)))
    columns["answer"] = _choice_gold(columns, options, question["content"], first) or _plain_gold(columns, reply)
    if options:
        columns["options"] = options
        if columns["answer"] is not None:
            columns["answer"] = _letters_of(columns["answer"], "answer", options, first)
    if "tolerance" in columns:
        columns["tolerance"] = _check_tolerance(columns["tolerance"])
    return {**prompt, "columns": {name: item for name, item in columns.items() if item is not None}}


def _is_null(item: Any) -> bool:
    # Tables have NaN where a row has no value.
    return item is None or isinstance(item, float) and math.isnan(item)


def _refuse_unusable(row: dict[str, Any]) -> None:
    for name in MEDIA_FIELDS:
        if row.get(name):
            raise RowError(
                f"`{name}`: prompts are text only", "Remove the rows that ask about pictures or sound.", row[name]
            )
    if row.get("weight") not in (None, 1):
        raise RowError("`weight`: all prompts count the same", "Repeat the row or remove its weight.", row["weight"])
    if isinstance(row.get("label"), bool) and any(name in row for name in REPLY_FIELDS):
        raise RowError(
            "`label` says whether the answer in the row is a good one, so it is not the answer to compare with",
            "Remove the answer and `label`, or write the correct answer into `answer`.",
            row["label"],
        )
    if row.get("functions") or row.get("function_call"):
        name = "functions" if row.get("functions") else "function_call"
        raise RowError(f"`{name}`: replies are scored as text, calls are not", "Remove these rows.", row[name])


def _take_prompt(columns: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Take the prompt out of the columns: messages and tools, and the text of a final turn of the assistant."""
    pair = any(set(pair) <= set(columns) for pair in PREFERENCE_FIELDS)
    if pair and not set(columns) & {*PROMPT_FIELDS, *QUESTION_FIELDS}:
        prompt = to_preference(columns)
        return {"messages": prompt["messages"], "tools": prompt["tools"]}, None
    # Any other prompt field of the row is a separate column.
    names = (*PROMPT_FIELDS, *QUESTION_FIELDS)
    # Some rows have their question in `input` alone.
    asked = next((name for name in (*names, "input") if name in columns), None)
    if asked is None:
        prompt = to_prompt(columns)
        return {"messages": prompt["messages"], "tools": prompt["tools"]}, prompt["reference"]
    parts = [*(["input"] if asked == "instruction" else []), *LEADING_FIELDS]
    fields = {name: columns.pop(name) for name in parts if name in columns}
    fields[asked if asked in PROMPT_FIELDS else "question"] = columns.pop(asked)
    prompt = to_prompt(fields)
    return {"messages": prompt["messages"], "tools": prompt["tools"]}, prompt["reference"]


def _context_text(value: Any, name: str) -> str:
    """A passage that a question is about: text, a list of texts, or `{"contexts": [...]}` (PubMedQA)."""
    parts = value.get("contexts") if isinstance(value, Mapping) else value
    parts = parts if isinstance(parts, list) else [parts]
    if not parts or not all(isinstance(part, str) and part.strip() for part in parts):
        raise RowError(f"`{name}` is not a text or a list of texts", "Write it as one text.", value)
    return "\n".join(part.strip() for part in parts)


def _choice_gold(columns: dict[str, Any], options: dict[str, str], question: str, first: int) -> str | None:
    """The letters of the correct options where a field names them by letter or number; None without such a field.

    A text in `answer` has to name the same option; a long one that names none is an explanation.
    """
    known = options or written_options(question) or {}
    named = {}
    for name in OPTION_GOLD_FIELDS:
        item = columns.get(name)
        # -1 is not an answer: the test sets of MedMCQA and others have it.
        if item is None or item in (-1, "-1", "") or isinstance(item, bool) or not known and name in ("label", "gold"):
            continue
        if known:
            named[name] = _letters_of(item, name, known, first)
        elif not set(columns) & set(GOLD_FIELDS):
            raise RowError(f"`{name}` is an option, and there are no options", "Add them as `options`.", item)
    answer = columns.get("answer")
    if named and known and answer is not None:
        letters = answer_letters(final_answer(answer) if isinstance(answer, str) else answer, known, first=first)
        if letters or len(str(answer)) <= LONGEST_OPTION:
            named["answer"] = letters or f"none of the options ({str(answer)!r})"
    if len(set(named.values())) > 1:
        (one, letter), (other, second) = list(named.items())[0], list(named.items())[-1]
        raise RowError(
            f"`{one}` is {letter}, `{other}` is {second}", "Correct one of them, or remove it.", {one: columns[one]}
        )
    return next(iter(named.values()), None)


def _letters_of(item: Any, name: str, options: dict[str, str], first: int) -> str:
    """The letters of the options that a field names; raises RowError if it names none."""
    letters = answer_letters(final_answer(item) if isinstance(item, str) else item, options, first=first)
    if letters is None:
        counted = isinstance(item, int) or isinstance(item, str) and item.strip().isdigit()
        raise RowError(
            f"`{name}` is none of the options {', '.join(options)}" + f", counted from {first}" * counted,
            "Give the letter of the correct option, or its text as in the options.",
            item,
        )
    return letters


def _plain_gold(columns: dict[str, Any], reply: str | None) -> Any:
    """The correct answer of a row without options, or a list of them; None if it has none. A reply moves into it."""
    for name in GOLD_FIELDS:
        item = columns.get(name)
        if name == "reward_model":
            item = parse_inner_json(item, "`reward_model`")
            item = item.get("ground_truth") if isinstance(item, Mapping) else None
        if isinstance(item, Mapping):
            item = item.get("target")
        item = _of_turns(item)
        if isinstance(item, list) and len(item) == 1:
            item = item[0]
        if isinstance(item, Mapping) or isinstance(item, list) and not all(isinstance(one, str | int) for one in item):
            raise RowError(f"`{name}` is not an answer or a list of answers", "Write it as text.", item)
        if item is not None and item != []:
            return item
    if reply is not None:
        return reply
    for name in REPLY_FIELDS:
        if name in columns:
            return _of_turns(columns.pop(name))
    return None


def _of_turns(answer: Any) -> Any:
    """The text of the last turn where an answer is a list of turns."""
    return answer[-1].get("content", answer[-1].get("value")) if are_turns(answer) else answer


def _check_tolerance(value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise RowError(
            "`tolerance` is not a number of at least 0",
            "Write the accepted deviation as a share of the answer: 0.02 for 2%.",
            value,
        )
    return number
