"""Find files, read rows with their line numbers, recognise each row's format, convert it, and refuse what is broken.

Nothing is dropped or repaired in silence: a row is used, or it is a `Problem` with file, line, value, reason and
remedy. `LoadedData.account` holds the balance, rows = used + left out by reason, for each file.
"""

import hashlib
import json
import math
import random
import re
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medicalgpt.args import DataArguments
from medicalgpt.errors import UserError
from medicalgpt.mixing import draw, mixture_sizes, parse_sources
from medicalgpt.rows import Rows, on_disk

import numpy as np
from loguru import logger

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".txt", ".md")
# Shards and splits are named so on the hub too: these prefixes mark rows that are never trained on.
HELD_OUT_NAME = re.compile(r"^(validation|valid|val|dev|eval|test)([-_.]|$)", re.IGNORECASE)
# Fields that say something about a row and are not part of it.
METADATA_FIELDS = frozenset({"id", "idx", "source", "category", "lang", "language", "meta", "metadata"})
SHOWN_PROBLEMS = 20
SIGN_OF_LIFE_SECONDS = 30

USER_ROLES = ("human", "user")
ASSISTANT_ROLES = ("gpt", "assistant")
CALL_ROLES = ("function_call", "tool_call")
RESULT_ROLES = ("observation", "tool", "function_response", "tool_response")
ALL_ROLES = ("system", *USER_ROLES, *ASSISTANT_ROLES, *CALL_ROLES, *RESULT_ROLES)


@dataclass(frozen=True)
class Row:
    """One row as it stands in a file.

    Attributes:
        value: text for .txt and .md, whatever JSON holds otherwise.
        item: its number in the list of a .json file, where a line may hold many rows; 0 elsewhere.
    """

    path: str
    line: int
    value: Any
    item: int = 0

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}" + (f" (row {self.item})" if self.item else "")


@dataclass(frozen=True)
class Problem:
    """Why one row cannot be used, and what to do about it.

    Attributes:
        kind: what it is counted under if it is left out; `unreadable` hides rows that nobody can count, and is never
            left out.
        side: `train` or `validation` where it never became a row, empty where one of `LoadedData` is meant.
    """

    place: str
    reason: str
    remedy: str
    value: str = ""
    kind: str = "unusable"
    side: str = ""

    def __str__(self) -> str:
        shown = f" [{self.value}]" if self.value else ""
        return f"{self.place}: {self.reason}{shown}. {self.remedy}"


class RowError(ValueError):
    """A row that cannot be converted.

    Args:
        reason: what is wrong, without a full stop.
        remedy: what to do, a sentence.
        value: the offending value.
    """

    def __init__(self, reason: str, remedy: str, value: Any = ""):
        super().__init__(reason)
        self.reason, self.remedy, self.value = reason, remedy, shorten(value)


def listed(problems: Sequence[Problem]) -> str:
    """The first problems, an indented line each, and how many more there are."""
    lines = list(map(str, problems[:SHOWN_PROBLEMS]))
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"… and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n".join(f"  {line}" for line in lines)


class DataError(UserError):
    """All problems of the data at once."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        super().__init__(
            f"{len(problems)} problem(s) in the data:\n{listed(problems)}\n"
            "Nothing was trained. Mend the rows, or leave them out and have them counted: --skip_bad_rows True "
            "(rows that are too long: --skip_long_rows True)."
        )


def shorten(value: Any, limit: int = 60) -> str:
    """One line of at most `limit` characters that shows `value`."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def signs_of_life(text: Callable[[], str]) -> Iterator[None]:
    """Log `text()` every 30 s for as long as the block runs."""
    done = threading.Event()

    def speak() -> None:
        while not done.wait(SIGN_OF_LIFE_SECONDS):
            logger.info(text())

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()


# ---------------------------------------------------------------------------------------------------------------------
# Files and rows
# ---------------------------------------------------------------------------------------------------------------------


def find_files(place: str) -> list[Path]:
    """All data files at `place` (a file, or a folder with its subfolders), sorted.

    Raises:
        UserError: nothing there, or nothing with a known suffix.
    """
    path = Path(place)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} is not a data file: the suffix must be one of {', '.join(SUFFIXES)}.")
        return [path]
    if not path.is_dir():
        raise UserError(f"no such file or folder: {place} (looked in {Path.cwd()}). Check the path.")
    files = sorted(
        f
        for f in path.rglob("*")
        if f.is_file()
        and f.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in f.relative_to(path).parts)
        and f.stem.lower() not in ("readme", "readme_zh", "license")
    )
    if not files:
        raise UserError(f"{place} holds no data files; put {', '.join(SUFFIXES)} files there.")
    return files


def find_encoding(path: Path) -> str:
    """`utf-8-sig`, or `gb18030` with a notice. The file is read by line, never held.

    Raises:
        UserError: neither encoding fits.
    """
    wrong = _undecodable_line(path, "utf-8")
    if not wrong:
        return "utf-8-sig"
    if _undecodable_line(path, "gb18030"):
        raise UserError(f"{path}:{wrong}: neither UTF-8 nor gb18030 text. Save the file as UTF-8.")
    logger.warning(f"{path} is not UTF-8; it was read as gb18030")
    return "gb18030"


def _undecodable_line(path: Path, encoding: str) -> int:
    """Number of the first line that is not in this encoding, or 0."""
    # In neither encoding is the byte of a line's end part of another character.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return number
    return 0


def read_file_text(path: Path) -> str:
    """The text of a file in UTF-8, or in gb18030 with a notice.

    Raises:
        UserError: neither encoding fits.
    """
    return path.read_bytes().decode(find_encoding(path))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines that hold more than white space, without their ends; a line at a time.

    Raises:
        UserError: the file is neither UTF-8 nor gb18030.
    """
    # Only a line feed ends a line: U+2028 and the like are allowed inside a string of JSON.
    with path.open(encoding=find_encoding(path), newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.removesuffix("\n") if not line.endswith("\r\n") else line[:-2]


def read_rows(path: str | Path, document_unit: str = "auto") -> Iterator[Row | Problem]:
    """Read a file row by row; what cannot be read comes as a `Problem` in its place.

    Files are read by line and never held whole, except .json and documents of a whole file.

    Args:
        path: .jsonl (a row a line), .json (a list of rows, or one row), .txt or .md.
        document_unit: what one document is in .txt and .md: `line`, `paragraph` (blank lines between), `file`, or
            `auto`: line for .txt, file for .md.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        for number, line in read_lines(path):
            yield _parse_json(str(path), number, line)
    elif suffix == ".json":
        yield from _read_json(str(path), read_file_text(path))
    else:
        unit = document_unit if document_unit != "auto" else ("file" if suffix == ".md" else "line")
        yield from _read_text(path, unit)


def _parse_json(path: str, number: int, line: str) -> Row | Problem:
    try:
        return _whole_characters(Row(path, number, json.loads(line)), line)
    except json.JSONDecodeError as error:
        column = error.colno
        snippet = line[max(0, column - 20) : column + 20]
        return Problem(f"{path}:{number}", f"broken JSON at column {column}: {error.msg}", "Mend the line.", snippet)


def _whole_characters(row: Row, raw: str) -> Row | Problem:
    """The row, unless it holds a lone surrogate, half a character: JSON can spell it, no tokenizer can read it."""
    if "\\ud" not in raw.lower():
        return row
    try:
        json.dumps(row.value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):x}"
        return Problem(row.place, f"half a character, {half}, without its other half", "Mend the text.")
    return row


def _read_json(path: str, text: str) -> Iterator[Row | Problem]:
    decoder = json.JSONDecoder()
    position = _skip_space(text, 0)
    line, counted = 1, 0
    try:
        if not text[position : position + 1] == "[":
            value, end = decoder.raw_decode(text, position)
            if _skip_space(text, end) != len(text):
                raise json.JSONDecodeError("more text after the value; a row a line is .jsonl", text, end)
            yield _whole_characters(Row(path, text.count("\n", 0, position) + 1, value), text)
            return
        position = _skip_space(text, position + 1)
        item = 0
        while text[position : position + 1] != "]":
            value, end = decoder.raw_decode(text, position)
            line, counted, item = line + text.count("\n", counted, position), position, item + 1
            yield _whole_characters(Row(path, line, value, item), text[position:end])
            position = _skip_space(text, end)
            if text[position : position + 1] == ",":
                position = _skip_space(text, position + 1)
                if text[position : position + 1] == "]":
                    raise json.JSONDecodeError("expected another row after ','", text, position)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
        if _skip_space(text, position + 1) != len(text):
            raise json.JSONDecodeError("more text after the list", text, _skip_space(text, position + 1))
    except json.JSONDecodeError as error:
        yield Problem(
            f"{path}:{error.lineno}",
            f"broken JSON at column {error.colno}: {error.msg}",
            "Mend the file; rows after this place were not read.",
            shorten(text[max(0, error.pos - 20) : error.pos + 20]),
            kind="unreadable",
        )


def _skip_space(text: str, position: int) -> int:
    match = re.compile(r"\s*").match(text, position)
    return match.end()


def _read_text(path: Path, unit: str) -> Iterator[Row]:
    if unit == "file":
        text = read_file_text(path).replace("\r\n", "\n")
        if text.strip():
            yield Row(str(path), 1, text.strip("\n"))
        return
    if unit == "line":
        for number, line in read_lines(path):
            yield Row(str(path), number, line)
        return
    paragraph: list[str] = []
    first = 0
    for number, line in read_lines(path):
        if paragraph and number > first + len(paragraph):
            yield Row(str(path), first, "\n".join(paragraph))
            paragraph = []
        if not paragraph:
            first = number
        paragraph.append(line)
    if paragraph:
        yield Row(str(path), first, "\n".join(paragraph))


# ---------------------------------------------------------------------------------------------------------------------
# Conversion of one row
# ---------------------------------------------------------------------------------------------------------------------


def to_text(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A document for pretraining: `{"text": str}` from a line of text or `{"text": ...}`.

    Raises:
        RowError: no text, empty text, unknown fields.
    """
    if isinstance(value, str):
        value = {"text": value}
    _require_object(value)
    if "text" not in value:
        raise RowError(
            "no field `text`", 'Pretraining rows are {"text": "..."}; chat rows go to supervised_finetuning.py.', value
        )
    _refuse_unknown(value, {"text"}, ignore)
    if not isinstance(value["text"], str) or not value["text"].strip():
        raise RowError("`text` is empty or no string", "Remove the row or give it a text.", value["text"])
    return {"text": value["text"]}


def to_messages(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A conversation that ends with the assistant: `{"messages": [...], "tools": [...] | None}`.

    The format is recognised row by row: ShareGPT `conversations` (with `function_call` and `observation` turns and a
    `tools` column), OpenAI `messages`, Alpaca `instruction`/`input`/`output` with `history`, and prompt/response
    pairs. Messages are in OpenAI form: `role`, `content`, and `tool_calls` with arguments as objects.

    Raises:
        RowError: the row is in no such format, or has unknown fields or roles, empty turns, or turns out of order.
    """
    conversation = _to_conversation(value, ignore)
    _check_order(conversation["messages"], must_end_with="assistant")
    return conversation


def to_prompt(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """What is put to a model: `{"messages": [...], "tools": ... , "reference": str | None}`.

    Takes the formats of `to_messages`, where a final assistant turn becomes the reference answer, and rows that hold
    only a question: a line of text, or `prompt`, `query`, `question`, `instruction` (with `input`).

    Raises:
        RowError: as `to_messages`.
    """
    if isinstance(value, str):
        value = {"prompt": value}
    conversation = _to_conversation(value, ignore, answer_needed=False)
    messages, reference = conversation["messages"], None
    if messages and messages[-1]["role"] == "assistant":
        reference = messages[-1]["content"]
        messages = messages[:-1]
    _check_order(messages, must_end_with="user")
    return {"messages": messages, "tools": conversation["tools"], "reference": reference}


def to_preference(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Two answers to one prompt: `{"messages": [...], "tools": [...] | None, "chosen": {...}, "rejected": {...}}`.

    `messages` is the prompt, which ends with the user or the result of a tool; `chosen` and `rejected` are one message
    of the assistant each. The prompt comes in the formats of `to_prompt`, the answers as `chosen` and `rejected` (or
    `response_chosen` and `response_rejected`): a text, a turn, or a list of one turn. Without a prompt the two are
    whole conversations, lists of turns that differ in the last one only.

    Raises:
        RowError: as `to_messages`; or an answer that is missing, empty, several turns or not the assistant's, equal
            answers (white space apart), a prompt that is missing or ends with the assistant.
    """
    _require_object(value)
    # Some data sets hold the prompt twice: an ignored field makes way for the other.
    prompt = {name: item for name, item in value.items() if name not in ignore}
    columns = next((pair for pair in PREFERENCE_FIELDS if set(pair) & set(prompt)), PREFERENCE_FIELDS[0])
    both = f"`{columns[0]}` and `{columns[1]}`"
    for column in columns:
        if column not in prompt:
            raise RowError(
                f"no field `{column}`",
                f"Rows of preferences have {both}; rows with one answer go to supervised_finetuning.py.",
                value,
            )
    answers = [_to_answer(prompt.pop(column), column) for column in columns]
    if third := sorted(set(prompt) & ANSWER_FIELDS):
        raise RowError(
            f"`{third[0]}` is a third answer beside {both}",
            f"Remove it, or pass --ignore_fields {','.join(third)}.",
            prompt[third[0]],
        )
    if not set(prompt).intersection(PROMPT_FIELDS):
        prompt["messages"] = _common_beginning(value, columns, answers)
        answers = [turns[-1:] for turns in answers]
    conversation = _to_conversation(prompt, frozenset(), answer_needed=False)
    if conversation["messages"] and conversation["messages"][-1]["role"] == "assistant":
        raise RowError(
            "the prompt ends with a turn of the assistant",
            f"Remove that turn: the answers are {both}.",
            conversation["messages"][-1],
        )
    _check_order(conversation["messages"], must_end_with="user")
    for column, turns in zip(columns, answers, strict=True):
        if len(turns) != 1:
            raise RowError(
                f"`{column}` has {len(turns)} turns beside a prompt, expected one",
                "Keep the answer alone in it; or, if both are whole conversations, pass --ignore_fields "
                f"{','.join(sorted(set(prompt).intersection(PROMPT_FIELDS)))}.",
                value[column],
            )
        if turns[0]["role"] != "assistant":
            raise RowError(
                f"`{column}` is a turn of the {turns[0]['role']}, no answer",
                f"Answers have one of the roles {', '.join(ASSISTANT_ROLES + CALL_ROLES)}.",
                value[column],
            )
    (chosen,), (rejected,) = answers
    if _canonical(chosen) == _canonical(rejected):
        raise RowError(f"{both} are the same answer", "Remove the row: it prefers nothing.", value[columns[0]])
    return {**conversation, "chosen": chosen, "rejected": rejected}


def to_task(value: Any, ignore: frozenset[str] = frozenset()) -> dict[str, Any]:
    """A prompt and what answers to it may be judged by: `{"messages": [...], "tools": [...] | None, "columns": {...}}`.

    The prompt comes in the formats of `to_prompt` and `to_preference`. Every other field of the row is a column under
    its own name; a final turn of the assistant, or an answer field under another name, is the column `answer`.

    Raises:
        RowError: as `to_prompt`.
    """
    if isinstance(value, str):
        value = {"prompt": value}
    _require_object(value)
    columns = {name: item for name, item in value.items() if name not in ignore}
    if not set(columns) & set(PROMPT_FIELDS) and any(set(pair) <= set(columns) for pair in PREFERENCE_FIELDS):
        prompt = {name: item for name, item in to_preference(value, ignore).items() if name in ("messages", "tools")}
    else:
        # What else a row may be asked by is a column of its own.
        asked = next((name for name in PROMPT_FIELDS if name in columns), "prompt")
        parts = [asked, *(["input"] if asked == "instruction" else []), *OPENING_FIELDS]
        prompt = _to_conversation({name: columns.pop(name) for name in parts if name in columns}, ignore, False)
    messages = prompt["messages"]
    if messages and messages[-1]["role"] == "assistant":
        columns.setdefault("answer", messages.pop()["content"])
    for name in ("output", "response", "completion"):
        if columns.get(name) is not None and "answer" not in columns:
            answer = columns.pop(name)
            columns["answer"] = answer[-1].get("content") if isinstance(answer, list) and answer else answer
    _check_order(messages, must_end_with="user")
    return {**prompt, "columns": {name: item for name, item in columns.items() if item is not None}}


PAIR_FIELDS = (("prompt", "response"), ("prompt", "completion"), ("query", "response"), ("question", "answer"))
PREFERENCE_FIELDS = (("chosen", "rejected"), ("response_chosen", "response_rejected"))
PROMPT_FIELDS = ("conversations", "messages", "instruction", "prompt", "query", "question")
ANSWER_FIELDS = {"output", *(answer for _, answer in PAIR_FIELDS)}
# Fields of any conversation, beside those that hold its turns.
OPENING_FIELDS = ("tools", "system", "system_prompt", "history")


def _to_answer(value: Any, column: str) -> list[dict[str, Any]]:
    """The turns of one answer; more than one only where it holds its prompt as well."""
    if not isinstance(value, list | dict):
        return [_text_message("assistant", value, column)]
    turns = value if isinstance(value, list) else [value]
    try:
        return [_to_message(turn, number) for number, turn in enumerate(turns, start=1)]
    except RowError as error:
        raise RowError(f"`{column}`: {error.reason}", error.remedy, error.value) from error


def _common_beginning(value: dict, columns: tuple[str, str], answers: list[list[dict]]) -> list[Any]:
    """The prompt of two conversations that differ in their last turn, as it stands in the row."""
    both = f"`{columns[0]}` and `{columns[1]}`"
    if min(len(turns) for turns in answers) < 2:
        raise RowError(
            f"{both} without a prompt",
            "Add the question as `prompt` (text or a list of turns), and keep only the answers in the two.",
            value,
        )
    for number, (one, other) in enumerate(zip_longest(*(turns[:-1] for turns in answers)), start=1):
        if one != other:
            raise RowError(
                f"{both} have another turn {number}, and it is not the last of both",
                "Whole conversations must share all turns but the last, which is the answer.",
                one or other,
            )
    return value[columns[0]][:-1]


def _to_conversation(value: Any, ignore: frozenset[str], answer_needed: bool = True) -> dict[str, Any]:
    _require_object(value)
    if {"chosen", "rejected"} <= set(value) - ignore:
        raise RowError(
            "two answers, `chosen` and `rejected`",
            "Rows of preferences go to dpo_training.py, orpo_training.py or reward_modeling.py.",
            value,
        )
    if "conversations" in value:
        return _from_turns(value, "conversations", ignore)
    if "messages" in value:
        return _from_turns(value, "messages", ignore)
    if "instruction" in value:
        return _from_alpaca(value, ignore, answer_needed)
    for question, answer in PAIR_FIELDS:
        if question in value and (answer in value or (not answer_needed and answer == "response")):
            return _from_pair(value, question, answer, ignore)
    if not answer_needed and "question" in value:
        return _from_pair(value, "question", "answer", ignore)
    raise RowError(
        f"no known chat format (fields: {', '.join(map(str, value)) or 'none'})",
        "Use `conversations`, `messages`, `instruction`+`output` or `prompt`+`response`; data/README.md shows each.",
        value,
    )


def _from_turns(value: dict, column: str, ignore: frozenset[str]) -> dict[str, Any]:
    _refuse_unknown(value, {column, *OPENING_FIELDS}, ignore)
    turns = value[column]
    if not isinstance(turns, list) or not turns:
        raise RowError(f"`{column}` must be a list of turns and holds none", "Give it at least two turns.", turns)
    messages = _opening(value)
    messages += [_to_message(turn, number) for number, turn in enumerate(turns, start=1)]
    return {"messages": messages, "tools": _to_tools(value.get("tools"))}


def _to_message(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"turn {number} is no object", 'A turn is {"from": "human", "value": "..."}.', turn)
    role_field = "from" if "from" in turn else "role"
    text_field = "value" if "value" in turn else "content"
    known = {role_field, text_field, "tool_calls", "tool_call_id", "name", "reasoning_content", "weight"}
    if unknown := sorted(set(turn) - known):
        raise RowError(f"turn {number} has unknown fields {unknown}", f"Known: {sorted(known)}.", turn)
    role, text = turn.get(role_field), turn.get(text_field)
    if role not in ALL_ROLES:
        raise RowError(f"turn {number} has the unknown role {role!r}", f"Roles are {', '.join(ALL_ROLES)}.", turn)
    if turn.get("weight") not in (None, 1):
        raise RowError(
            f"turn {number} has the weight {turn['weight']!r}; every answer is trained on",
            "Remove the turn or its weight.",
            turn,
        )
    calls = turn.get("tool_calls")
    if calls and role not in ASSISTANT_ROLES:
        raise RowError(f"turn {number} ({role}) has tool calls", "Only the assistant calls tools.", turn)
    if text is not None and not isinstance(text, str):
        raise RowError(f"turn {number} ({role}) is no text", "Write the turn as one string.", text)
    if not calls and not (text or "").strip():
        raise RowError(f"turn {number} ({role}) is empty", "Remove the row or write the turn.", turn)
    if role in CALL_ROLES:
        return {"role": "assistant", "content": "", "tool_calls": _to_tool_calls(text, number)}
    if role in RESULT_ROLES:
        return {"role": "tool", "content": text}
    if role in USER_ROLES or role == "system":
        return {"role": "user" if role in USER_ROLES else "system", "content": text}
    message: dict[str, Any] = {"role": "assistant", "content": text or ""}
    if turn.get("reasoning_content"):
        message["reasoning_content"] = turn["reasoning_content"]
    if calls:
        message["tool_calls"] = _to_tool_calls(calls, number)
    return message


def _to_tool_calls(value: Any, number: int) -> list[dict[str, Any]]:
    calls = _parse_inner_json(value, f"turn {number}: the function call")
    calls = calls if isinstance(calls, list) else [calls]
    remedy = 'Write {"name": "...", "arguments": {...}}.'
    if not calls:
        raise RowError(f"turn {number}: no function is called", remedy, value)
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"turn {number}: a function call needs a name and an object of arguments", remedy, value)
        if unknown := sorted(set(function) - {"name", "arguments", "type", "id", "index"}):
            raise RowError(f"turn {number}: the function call has unknown fields {unknown}", remedy, value)
        arguments = _parse_inner_json(function.get("arguments", {}), f"turn {number}: the call's arguments")
        if not isinstance(arguments, dict):
            raise RowError(f"turn {number}: the call's arguments are no object", remedy, value)
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _to_tools(value: Any) -> list[dict[str, Any]] | None:
    if not value:
        return None
    tools = _parse_inner_json(value, "the column `tools`")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("`tools` is no list of objects", 'Write [{"name": ..., "parameters": {...}}].', value)
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for tool in wrapped:
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise RowError("a tool has no name", "Give each tool a `name`.", tool)
    return wrapped or None


def _parse_inner_json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
        json.dumps(parsed, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise RowError(f"{what} is broken JSON ({error.msg})", "Mend the JSON inside the string.", value) from error
    except UnicodeEncodeError as error:
        raise RowError(f"{what} holds half a character", "Mend the text.", value) from error
    return parsed


def _from_alpaca(value: dict, ignore: frozenset[str], answer_needed: bool) -> dict[str, Any]:
    _refuse_unknown(value, {"instruction", "input", "output", *OPENING_FIELDS}, ignore)
    if "output" not in value and answer_needed:
        raise RowError("`instruction` without `output`", "Give the row its answer as `output`.", value)
    messages = _opening(value)
    question = _text_message("user", value["instruction"], "instruction")
    if value.get("input") is not None and not isinstance(value["input"], str):
        raise RowError("`input` is no text", "Write it as one string.", value["input"])
    if (value.get("input") or "").strip():
        question["content"] += f"\n{value['input']}"
    messages.append(question)
    if value.get("output") is not None:
        messages.append(_text_message("assistant", value["output"], "output"))
    return {"messages": messages, "tools": _to_tools(value.get("tools"))}


def _from_pair(value: dict, question: str, answer: str, ignore: frozenset[str]) -> dict[str, Any]:
    _refuse_unknown(value, {question, answer, *OPENING_FIELDS}, ignore)
    asked = value[question]
    messages = _opening(value)
    if isinstance(asked, list):
        messages += [_to_message(turn, number) for number, turn in enumerate(asked, start=1)]
    else:
        messages.append(_text_message("user", asked, question))
    given = value.get(answer)
    if isinstance(given, list):
        messages += [_to_message(turn, number) for number, turn in enumerate(given, start=len(messages) + 1)]
    elif given is not None:
        messages.append(_text_message("assistant", given, answer))
    return {"messages": messages, "tools": _to_tools(value.get("tools"))}


def _opening(value: dict) -> list[dict[str, Any]]:
    """The turns that stand before a row's own: `system` (or `system_prompt`), then `history`."""
    columns = [column for column in ("system", "system_prompt") if value.get(column)]
    if len(columns) == 2:
        raise RowError("both `system` and `system_prompt`", "Keep one of them.", value["system_prompt"])
    messages = [_text_message("system", value[column], column) for column in columns]
    history = value.get("history") or []
    if not isinstance(history, list):
        raise RowError("`history` is no list", "Write [[question, answer], ...].", history)
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("`history` holds something other than pairs", "Write [[question, answer], ...].", pair)
        messages += [_text_message("user", pair[0], "history"), _text_message("assistant", pair[1], "history")]
    return messages


def _text_message(role: str, text: Any, column: str) -> dict[str, Any]:
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"`{column}` is empty or no text", "Remove the row or fill the field.", text)
    return {"role": role, "content": text}


def _check_order(messages: list[dict[str, Any]], must_end_with: str) -> None:
    """system? then user, assistant (or assistant with calls, tool results, assistant), again and again."""
    allowed = ("system", "user")
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in allowed:
            raise RowError(
                f"wrong order: turn {number} is {role}, expected {' or '.join(allowed)}",
                "Turns are system (at most one, first), user, assistant, user, assistant, …; a tool's result follows "
                "its call.",
                [m["role"] for m in messages],
            )
        if role == "system":
            allowed = ("user",)
        elif role == "user":
            allowed = ("assistant",)
        elif role == "tool":
            allowed = ("assistant", "tool")
        else:
            allowed = ("tool",) if message.get("tool_calls") else ("user",)
    last = messages[-1]["role"] if messages else "nothing"
    ends = ("user", "tool") if must_end_with == "user" else ("assistant",)
    if last not in ends:
        raise RowError(
            f"the last turn is {last}, expected {' or '.join(ends)}",
            "Add the missing turn or remove the dangling one.",
            [m["role"] for m in messages],
        )


def _require_object(value: Any) -> None:
    if not isinstance(value, dict):
        raise RowError(f"the row is a {type(value).__name__}, no object", "Each row is a JSON object {...}.", value)


def _refuse_unknown(value: dict, known: set[str], ignore: frozenset[str]) -> None:
    if unknown := sorted(set(value) - known - METADATA_FIELDS - ignore):
        raise RowError(
            f"unknown field(s) {', '.join(unknown)}",
            f"Known here: {', '.join(sorted(known))}. Remove them, or pass --ignore_fields {','.join(unknown)}.",
            {name: value[name] for name in unknown},
        )


# ---------------------------------------------------------------------------------------------------------------------
# Loading both sides
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """One place of `--train_file_dir`; with weights, `limit` is its part of `--max_train_samples`."""

    place: str
    files: list[Path]
    weight: Fraction | None = None
    limit: int | None = None


@dataclass
class FileAccount:
    """The balance of one file: rows = used + sum(left_out.values()).

    Attributes:
        mixture: of a file in a weighted mixture: its source, the source's weight and the share it got, and `drawn`,
            how many rows of this file an epoch has, those that come again counted again.
    """

    file: str
    sha256: str
    rows: int = 0
    left_out: Counter = field(default_factory=Counter)
    mixture: dict[str, Any] = field(default_factory=dict)

    @property
    def used(self) -> int:
        return self.rows - sum(self.left_out.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "sha256": self.sha256,
            "rows": self.rows,
            "used": self.used,
            "left_out": dict(self.left_out),
            **self.mixture,
        }


@dataclass
class LoadedData:
    """Converted rows of both sides. Each row is the converter's dict plus `place`, its "file:line"."""

    train: Sequence[dict[str, Any]]
    validation: Sequence[dict[str, Any]]
    account: dict[str, list[FileAccount]]
    problems: list[Problem] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)

    def settle(self, arguments: DataArguments) -> None:
        """Leave out and count the rows with problems, as far as the flags allow it.

        Raises:
            DataError: any problem that no flag allows to leave out, all at once.
            UserError: no training row is left.
        """
        allowed = {
            "unusable": arguments.skip_bad_rows,
            "too long": arguments.skip_long_rows,
            "unreadable": False,
        }
        if refused := [problem for problem in self.problems if not allowed[problem.kind]]:
            raise DataError(refused)
        for problem in self.problems[:SHOWN_PROBLEMS]:
            logger.warning(f"left out: {problem}")
        by_file = {(side, account.file): account for side, accounts in self.account.items() for account in accounts}
        for problem in self.problems:
            if problem.side:
                by_file[problem.side, _file_of(problem.place)].left_out[problem.kind] += 1
        gone = {problem.place: problem.kind for problem in self.problems if not problem.side}
        for side in self.account if gone else ():
            rows = getattr(self, side)
            keep = np.ones(len(rows), dtype=bool)
            for index, row in enumerate(rows):
                if kind := gone.get(row["place"]):
                    keep[index] = False
                    by_file[side, _file_of(row["place"])].left_out[kind] += 1
            setattr(self, side, on_disk(rows).select(keep))
        self.problems = []
        if not self.train:
            raise UserError("every training row was left out; see the warnings above.\n" + self.summary())

    def mix(self, encoded: "Dataset", arguments: DataArguments, seed: int) -> "Dataset":
        """Take from the encoded training rows as many of each source as its weight says; all of them without weights.

        Call it after `settle`, so that the shares are those of the rows that are trained. A row counts once, whatever
        the number of its samples. Rows that are not taken are counted as "not in the mixture".

        Args:
            encoded: column `place`; the samples of a row stand together, rows in the order of `train`.
            arguments: `mix_strategy`, and `max_train_samples` as the most rows that the mixture may have.
            seed: chooses the rows.

        Raises:
            UserError: a source of which no row could be taken.
        """
        if not self.sources or self.sources[0].weight is None:
            return encoded
        source_of = {str(path): number for number, source in enumerate(self.sources) for path in source.files}
        starts, row_sources, before = array("q"), array("q"), None
        for index, place in enumerate(_column(encoded, "place")):
            if place != before:
                starts.append(index)
                row_sources.append(source_of[_file_of(place)])
                before = place
        owners = np.array(row_sources)
        counts = np.bincount(owners, minlength=len(self.sources)).tolist()
        weights = [source.weight for source in self.sources]
        sizes = mixture_sizes(counts, weights, arguments.mix_strategy, arguments.max_train_samples)
        for source, count, size in zip(self.sources, counts, sizes, strict=True):
            if size == 0:
                raise UserError(
                    f"--train_file_dir: a mixture of {sum(sizes)} rows has none of {source.place} (weight "
                    f"{float(source.weight):.4g}, {count} usable rows). Give it another weight or more rows, or leave "
                    "it out."
                )
        times = np.zeros(len(owners), dtype=np.int64)
        for number, size in enumerate(sizes):
            times[owners == number] = draw(counts[number], size, [seed, number])
        self._count_mixture(times, sizes)
        self.train = on_disk(self.train).select(times > 0)
        lengths = np.diff([*starts, len(encoded)])
        # Each pass over the rows holds those that are to come once more.
        passes = [np.flatnonzero(times > number) for number in range(times.max())]
        rows = np.concatenate(passes)
        first_of_row = np.repeat(np.array(starts)[rows], lengths[rows])
        within_row = np.arange(len(first_of_row)) - np.repeat(np.cumsum(lengths[rows]) - lengths[rows], lengths[rows])
        return encoded.select(first_of_row + within_row)

    def _count_mixture(self, times: np.ndarray, sizes: list[int]) -> None:
        accounts = {account.file: account for account in self.account["train"]}
        at = 0
        # Rows stand in the order of their files.
        for source, size in zip(self.sources, sizes, strict=True):
            for path in source.files:
                account = accounts[str(path)]
                drawn = times[at : at + account.used]
                at += account.used
                account.mixture = {
                    "source": source.place,
                    "weight": float(source.weight),
                    "share": size / sum(sizes),
                    "drawn": int(drawn.sum()),
                }
                if unused := int((drawn == 0).sum()):
                    account.left_out["not in the mixture"] += unused

    def summary(self) -> str:
        """A line for each side: rows in, used, left out and why; and one for each source of a mixture."""
        lines = []
        for side, accounts in self.account.items():
            if not accounts:
                continue
            left_out = sum((account.left_out for account in accounts), Counter())
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none"
            rows = sum(account.rows for account in accounts)
            lines.append(
                f"{side:<10} {rows:>7} rows in {len(accounts)} file(s), used {rows - sum(left_out.values())}, "
                f"left out: {reasons}"
            )
        for source in self.sources:
            parts = [account for account in self.account["train"] if account.mixture.get("source") == source.place]
            if parts:
                drawn, used = sum(part.mixture["drawn"] for part in parts), sum(part.used for part in parts)
                lines.append(
                    f"{'mixture':<10} {drawn:>7} rows of {source.place}, {parts[0].mixture['share']:.2%} for a weight "
                    f"of {float(source.weight):.2%}" + (f"; {used} different ones" if used < drawn else "")
                )
        return "\n".join(lines)


def _file_of(place: str) -> str:
    return place.rpartition(":")[0]


def _column(dataset: "Dataset", name: str) -> Iterator[Any]:
    for batch in dataset.select_columns(name).iter(10_000):
        yield from batch[name]


Converter = Callable[[Any, frozenset[str]], dict[str, Any]]


def load_data(
    arguments: DataArguments, convert: Converter, *, document_unit: str = "auto", seed: int = 42
) -> LoadedData:
    """Read, convert and check the training and held-out rows.

    Rows that cannot be used stand in `problems` of the result, so that a stage can add its own (too long, say);
    `LoadedData.settle` then reports all of them at once, or leaves them out and counts them.

    Args:
        arguments: the data flags.
        convert: `to_text`, `to_messages` or another converter; raises `RowError`.
        document_unit: see `read_rows`.
        seed: of the random split that `--validation_split_percentage` asks for.

    Raises:
        UserError: no data named, nothing found, or held-out rows that occur among the training rows.
    """
    sources, validation_files = choose_files(arguments)
    ignore = frozenset(filter(None, (arguments.ignore_fields or "").replace(" ", "").split(",")))
    data = LoadedData([], [], {"train": [], "validation": []}, sources=sources)
    accounts = data.account

    def read(side: str, files: Iterable[InputFile], limit: int | None) -> Iterator[dict[str, Any]]:
        return convert_files(data, side, files, convert, ignore, limit)

    with signs_of_life(lambda: f"reading rows: {sum(a.rows for a in accounts['train'] + accounts['validation'])}"):
        if sources and sources[0].weight is not None:
            groups = [(open_files(source.files, document_unit), source.limit) for source in sources]
        else:
            files = [path for source in sources for path in source.files]
            groups = [(open_files(files, document_unit), arguments.max_train_samples)]
        data.train = Rows(chain.from_iterable(read("train", files, limit) for files, limit in groups))
        data.validation = Rows(
            read("validation", open_files(validation_files, document_unit), arguments.max_eval_samples)
        )
        if arguments.dataset_name:
            for side, files, limit in _open_hub(arguments, with_validation=not validation_files):
                setattr(data, side, Rows(read(side, files, limit)))
        if arguments.validation_split_percentage and not data.validation:
            _split(data, arguments.validation_split_percentage, seed)
        if not data.train and not data.problems:
            raise UserError("no training rows were found. Check --train_file_dir and --max_train_samples.")
        refuse_overlap(data, arguments.allow_overlap)
    return data


def choose_files(arguments: DataArguments) -> tuple[list[Source], list[Path]]:
    """The sources of training rows, and the held-out files."""
    if bool(arguments.train_file_dir) == bool(arguments.dataset_name):
        raise UserError("name the data with exactly one of --train_file_dir and --dataset_name.")
    if not arguments.train_file_dir:
        held_out = find_files(arguments.validation_file_dir) if arguments.validation_file_dir else []
        return [], held_out
    sources: list[Source] = []
    beside: list[Path] = []
    reached: dict[Path, str] = {}
    for place, weight in parse_sources(arguments.train_file_dir):
        found = find_files(place)
        for path in found:
            if other := reached.get(path.resolve()):
                raise UserError(
                    f"--train_file_dir reaches {path} twice, by {other} and by {place}. Name places that do not hold "
                    "each other."
                )
        reached |= {path.resolve(): place for path in found}
        held_out = [] if Path(place).is_file() else [path for path in found if HELD_OUT_NAME.match(path.name)]
        train = [path for path in found if path not in held_out]
        if not train:
            raise UserError(f"{place} holds only held-out files ({', '.join(map(str, held_out))}).")
        limit = arguments.max_train_samples
        if weight is not None and limit is not None:
            limit = math.ceil(limit * weight)
        sources.append(Source(place, train, weight, limit))
        beside += held_out
    if sources[0].weight is None and "mix_strategy" in getattr(arguments, "given", ()):
        raise UserError(
            f"--mix_strategy {arguments.mix_strategy} has no effect without weights. Give them (--train_file_dir "
            "data/a:0.7,data/b:0.3), or leave the flag out."
        )
    if beside:
        logger.info(f"held out by their names, never trained on: {', '.join(map(str, beside))}")
    if not arguments.validation_file_dir:
        return sources, beside
    validation = find_files(arguments.validation_file_dir)
    trained = {path.resolve() for source in sources for path in source.files}
    by_name = [path for path in validation if HELD_OUT_NAME.match(path.name)]
    # One folder for both: the names tell the sides apart.
    shared = any(path.resolve() in trained for path in validation)
    return sources, by_name if shared and by_name else validation


# Name, hash of the content, rows.
InputFile = tuple[str, str, Iterable[Row | Problem]]


def open_files(paths: list[Path], document_unit: str) -> Iterator[InputFile]:
    return ((str(path), hash_file(path), read_rows(path, document_unit)) for path in paths)


def convert_files(
    data: LoadedData,
    side: str,
    files: Iterable[InputFile],
    convert: Converter,
    ignore: frozenset[str],
    limit: int | None,
) -> Iterator[dict[str, Any]]:
    """Yield the first `limit` rows that can be converted; the account of each file and all problems join `data`."""
    converted = 0
    for name, digest, rows in files:
        account = FileAccount(name, digest)
        data.account[side].append(account)
        for row in rows:
            account.rows += 1
            if limit is not None and converted >= limit:
                account.left_out[f"beyond --max_{'train' if side == 'train' else 'eval'}_samples"] += 1
                continue
            if isinstance(row, Problem):
                data.problems.append(replace(row, side=side))
                continue
            try:
                value = {**convert(row.value, ignore), "place": row.place}
            except RowError as error:
                data.problems.append(Problem(row.place, error.reason, error.remedy, error.value, side=side))
                continue
            converted += 1
            yield value
        if account.rows == 0:
            raise UserError(f"{name} is empty. Remove it or fill it.")


def _open_hub(arguments: DataArguments, with_validation: bool) -> Iterator[tuple[str, list[InputFile], int | None]]:
    """Side, rows and limit of the splits of a data set on the hub."""
    import datasets

    name = arguments.dataset_name
    try:
        splits = datasets.load_dataset(name, arguments.dataset_config_name)
    except Exception as error:
        raise UserError(
            f"the data set {name} could not be loaded from the hub ({type(error).__name__}: "
            f"{shorten(str(error), 160)}). Check the name and the network, set HF_ENDPOINT to a mirror, or use files "
            "with --train_file_dir."
        ) from error
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    if "train" not in splits:
        raise UserError(f"the data set {name} has no split `train`; it has {', '.join(splits)}.")
    for side, split, limit in (
        ("train", "train", arguments.max_train_samples),
        ("validation", held_out if with_validation else None, arguments.max_eval_samples),
    ):
        if split:
            place = f"{name}/{split}"
            yield side, [(place, splits[split]._fingerprint, _hub_rows(place, splits[split]))], limit


def _hub_rows(name: str, split: "Dataset") -> Iterator[Row]:
    for number, value in enumerate(split, start=1):
        # Columns that a row of mixed formats lacks come as None.
        yield Row(name, number, {key: item for key, item in value.items() if item is not None})


def _split(data: LoadedData, percentage: float, seed: int) -> None:
    if not 0 < percentage < 100:
        raise UserError(f"--validation_split_percentage {percentage} must lie between 0 and 100.")
    if len(data.train) < 2:
        if data.problems:
            logger.warning("nothing could be held out: --validation_split_percentage needs two usable rows")
            return
        raise UserError("--validation_split_percentage: of a single row nothing can be held out. Leave it out.")
    # Rows that occur twice stay on one side; groups of equal rows are numbered as they first occur.
    _, first, group = np.unique(_identities(data.train), return_index=True, return_inverse=True)
    numbers = np.empty(len(first), dtype=np.int64)
    numbers[np.argsort(first)] = np.arange(len(first))
    order = array("q", range(len(first)))
    random.Random(seed).shuffle(order)
    count = min(len(order) - 1, max(1, round(len(order) * percentage / 100)))
    held_out = np.isin(numbers[group], order[:count])
    rows = on_disk(data.train)
    data.train, data.validation = rows.select(~held_out), rows.select(held_out)
    by_file = {account.file: account for account in data.account["train"]}
    moved = Counter(_file_of(row["place"]) for row in data.validation)
    for name, number in moved.items():
        by_file[name].left_out["moved to validation"] += number
        data.account["validation"].append(FileAccount(name, by_file[name].sha256, rows=number))
    logger.info(f"held out {held_out.sum()} of {len(rows)} training rows at random (seed {seed})")


def refuse_overlap(data: LoadedData, allowed: bool) -> None:
    if not data.validation:
        return
    trained, held_out = _identities(data.train), _identities(data.validation)
    shared = np.flatnonzero(np.isin(held_out, trained))
    if not len(shared):
        return
    places = [
        (data.validation[index]["place"], data.train[np.flatnonzero(trained == held_out[index])[-1]]["place"])
        for index in shared[:5].tolist()
    ]
    by_prompt = {"chosen", "columns"} & set(data.validation[0])
    what, relation = ("prompts", "has the prompt of") if by_prompt else ("rows", "is also")
    shown = "\n  ".join(f"{validation} {relation} {train}" for validation, train in places)
    message = f"{len(shared)} of {len(data.validation)} held-out {what} are also trained on:\n  {shown}"
    if allowed:
        logger.warning(f"{message}\n  Evaluation will look better than it is (--allow_overlap True)")
        return
    raise UserError(f"{message}\nRemove them from one side, or say --allow_overlap True.")


def _identities(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """What tells rows apart, (rows,) of 16 bytes."""
    return np.fromiter((identity(row) for row in rows), dtype="S16", count=len(rows))


def identity(row: dict[str, Any]) -> bytes:
    """What tells converted rows apart, 16 bytes: what they hold, white space apart.

    Of preferences and tasks it is only the prompt: one that is trained on is not held out, whatever its answers are.
    """
    content = {key: value for key, value in row.items() if key not in ("place", "chosen", "rejected", "columns")}
    return hashlib.sha256(_canonical(content).encode()).digest()[:16]


def _canonical(value: Any) -> str:
    """JSON that is the same for values that differ in white space or in the order of fields only."""
    return json.dumps(_without_layout(value), ensure_ascii=False, sort_keys=True)


def _without_layout(value: Any) -> Any:
    """The value with white space in all its strings made alike."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, list):
        return [_without_layout(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_layout(item) for key, item in value.items()}
    return value


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
