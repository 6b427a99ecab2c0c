"""Find files, read rows with their line numbers, recognise each row's format, convert it, and refuse what is broken.

Nothing is dropped or repaired in silence: a row is used, or it is a `Problem` with file, line, value, reason and
remedy. `LoadedData.account` holds the balance, rows = used + left out by reason, for each file.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medicalgpt.args import DataArguments
from medicalgpt.errors import UserError

from loguru import logger

SUFFIXES = (".jsonl", ".json", ".txt", ".md")
# Shards and splits are named so on the hub too: these prefixes mark rows that are never trained on.
HELD_OUT_NAME = re.compile(r"^(validation|valid|val|dev|eval|test)([-_.]|$)", re.IGNORECASE)
# Fields that say something about a row and are not part of it.
METADATA_FIELDS = frozenset({"id", "idx", "source", "category", "lang", "language", "meta", "metadata"})
SHOWN_PROBLEMS = 20

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


class DataError(UserError):
    """All problems of the data at once."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        shown = "\n  ".join(map(str, problems[:SHOWN_PROBLEMS]))
        more = f"\n  … and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        super().__init__(
            f"{len(problems)} problem(s) in the data:\n  {shown}{more}\n"
            "Nothing was trained. Mend the rows, or leave them out and have them counted: --skip_bad_rows True "
            "(rows that are too long: --skip_long_rows True)."
        )


def shorten(value: Any, limit: int = 60) -> str:
    """One line of at most `limit` characters that shows `value`."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


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


def read_file_text(path: Path) -> str:
    """The text of a file in UTF-8, or in gb18030 with a notice.

    Raises:
        UserError: neither encoding fits.
    """
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        try:
            text = raw.decode("gb18030")
        except UnicodeDecodeError:
            line = raw[: error.start].count(b"\n") + 1
            raise UserError(f"{path}:{line}: neither UTF-8 nor gb18030 text. Save the file as UTF-8.") from error
        logger.warning(f"{path} is not UTF-8; it was read as gb18030")
        return text


def read_rows(path: str | Path, document_unit: str = "auto") -> Iterator[Row | Problem]:
    """Read a file row by row; what cannot be read comes as a `Problem` in its place.

    Args:
        path: .jsonl (a row a line), .json (a list of rows, or one row), .txt or .md.
        document_unit: what one document is in .txt and .md: `line`, `paragraph` (blank lines between), `file`, or
            `auto`: line for .txt, file for .md.
    """
    path = Path(path)
    text = read_file_text(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from _read_jsonl(str(path), text)
    elif suffix == ".json":
        yield from _read_json(str(path), text)
    else:
        unit = document_unit if document_unit != "auto" else ("file" if suffix == ".md" else "line")
        yield from _read_text(str(path), text, unit)


def _read_jsonl(path: str, text: str) -> Iterator[Row | Problem]:
    # str.splitlines would also cut at U+2028 and the like, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse_json(path, number, line)


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


def _read_text(path: str, text: str, unit: str) -> Iterator[Row]:
    text = text.replace("\r\n", "\n")
    if unit == "file":
        if text.strip():
            yield Row(path, 1, text.strip("\n"))
        return
    filled = r"[^\n]*\S[^\n]*"
    line, position = 1, 0
    for match in re.finditer(filled if unit == "line" else rf"{filled}(?:\n{filled})*", text):
        line += text.count("\n", position, match.start())
        position = match.start()
        yield Row(path, line, match.group())


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


PAIR_FIELDS = (("prompt", "response"), ("prompt", "completion"), ("query", "response"), ("question", "answer"))


def _to_conversation(value: Any, ignore: frozenset[str], answer_needed: bool = True) -> dict[str, Any]:
    _require_object(value)
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
    _refuse_unknown(value, {column, "tools", "system", "system_prompt"}, ignore)
    turns = value[column]
    if not isinstance(turns, list) or not turns:
        raise RowError(f"`{column}` must be a list of turns and holds none", "Give it at least two turns.", turns)
    messages = _system_message(value.get("system") or value.get("system_prompt"))
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
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(f"{what} is broken JSON ({error.msg})", "Mend the JSON inside the string.", value) from error


def _from_alpaca(value: dict, ignore: frozenset[str], answer_needed: bool) -> dict[str, Any]:
    _refuse_unknown(value, {"instruction", "input", "output", "history", "system", "tools"}, ignore)
    if "output" not in value and answer_needed:
        raise RowError("`instruction` without `output`", "Give the row its answer as `output`.", value)
    messages = _system_message(value.get("system"))
    history = value.get("history") or []
    if not isinstance(history, list):
        raise RowError("`history` is no list", "Write [[question, answer], ...].", history)
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError("`history` holds something other than pairs", "Write [[question, answer], ...].", pair)
        messages += [_text_message("user", pair[0], "history"), _text_message("assistant", pair[1], "history")]
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
    _refuse_unknown(value, {question, answer, "system", "tools"}, ignore)
    asked = value[question]
    messages = _system_message(value.get("system"))
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


def _system_message(text: Any) -> list[dict[str, Any]]:
    return [_text_message("system", text, "system")] if text else []


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
class FileAccount:
    """The balance of one file: rows = used + sum(left_out.values())."""

    file: str
    sha256: str
    rows: int = 0
    left_out: Counter = field(default_factory=Counter)

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
        }


@dataclass
class LoadedData:
    """Converted rows of both sides. Each row is the converter's dict plus `place`, its "file:line"."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    account: dict[str, list[FileAccount]]
    problems: list[Problem] = field(default_factory=list)

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
        gone = {(problem.place, problem.side): problem.kind for problem in self.problems}
        for side, accounts in self.account.items():
            rows = getattr(self, side)
            present = {row["place"] for row in rows}
            by_file = {account.file: account for account in accounts}
            for (place, read_for), kind in gone.items():
                if read_for == side or (not read_for and place in present):
                    by_file[place.rpartition(":")[0]].left_out[kind] += 1
            setattr(self, side, [row for row in rows if (row["place"], "") not in gone])
        self.problems = []
        if not self.train:
            raise UserError("every training row was left out; see the warnings above.\n" + self.summary())

    def summary(self) -> str:
        """A line for each side: rows in, used, left out and why."""
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
        return "\n".join(lines)


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
    train_files, validation_files = _choose_files(arguments)
    ignore = frozenset(filter(None, (arguments.ignore_fields or "").replace(" ", "").split(",")))
    data = LoadedData([], [], {"train": [], "validation": []})
    for side, files, limit in (
        ("train", train_files, arguments.max_train_samples),
        ("validation", validation_files, arguments.max_eval_samples),
    ):
        for path in files:
            rows = read_rows(path, document_unit)
            _load_file(data, side, str(path), hash_file(path), rows, convert, ignore, limit)
    if arguments.dataset_name:
        _load_from_hub(data, arguments, convert, ignore)
    if arguments.validation_split_percentage and not data.validation:
        _split(data, arguments.validation_split_percentage, seed)
    if not data.train and not data.problems:
        raise UserError("no training rows were found. Check --train_file_dir and --max_train_samples.")
    _refuse_overlap(data, arguments.allow_overlap)
    return data


def _choose_files(arguments: DataArguments) -> tuple[list[Path], list[Path]]:
    if bool(arguments.train_file_dir) == bool(arguments.dataset_name):
        raise UserError("name the data with exactly one of --train_file_dir and --dataset_name.")
    if not arguments.train_file_dir:
        held_out = find_files(arguments.validation_file_dir) if arguments.validation_file_dir else []
        return [], held_out
    found = find_files(arguments.train_file_dir)
    if Path(arguments.train_file_dir).is_file():
        train, beside = found, []
    else:
        beside = [path for path in found if HELD_OUT_NAME.match(path.name)]
        train = [path for path in found if path not in beside]
        if beside:
            logger.info(f"held out by their names, never trained on: {', '.join(map(str, beside))}")
    if not train:
        raise UserError(f"{arguments.train_file_dir} holds only held-out files ({', '.join(map(str, beside))}).")
    if not arguments.validation_file_dir:
        return train, beside
    validation = find_files(arguments.validation_file_dir)
    trained = {path.resolve() for path in train}
    by_name = [path for path in validation if HELD_OUT_NAME.match(path.name)]
    # One folder for both: the names tell the sides apart.
    shared = any(path.resolve() in trained for path in validation)
    return train, by_name if shared and by_name else validation


def _load_file(
    data: LoadedData,
    side: str,
    name: str,
    digest: str,
    rows: Iterator[Row | Problem],
    convert: Converter,
    ignore: frozenset[str],
    limit: int | None,
) -> None:
    account = FileAccount(name, digest)
    data.account[side].append(account)
    converted: list[dict[str, Any]] = getattr(data, side)
    for row in rows:
        account.rows += 1
        if limit is not None and len(converted) >= limit:
            account.left_out[f"beyond --max_{'train' if side == 'train' else 'eval'}_samples"] += 1
            continue
        if isinstance(row, Problem):
            data.problems.append(replace(row, side=side))
            continue
        try:
            converted.append({**convert(row.value, ignore), "place": row.place})
        except RowError as error:
            data.problems.append(Problem(row.place, error.reason, error.remedy, error.value, side=side))
    if account.rows == 0:
        raise UserError(f"{name} is empty. Remove it or fill it.")


def _load_from_hub(data: LoadedData, arguments: DataArguments, convert: Converter, ignore: frozenset[str]) -> None:
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
        ("validation", held_out, arguments.max_eval_samples),
    ):
        if split and not data.account[side]:
            # Columns that a row of mixed formats lacks come as None.
            rows = (
                Row(f"{name}/{split}", number, {key: item for key, item in value.items() if item is not None})
                for number, value in enumerate(splits[split], start=1)
            )
            _load_file(data, side, f"{name}/{split}", splits[split]._fingerprint, rows, convert, ignore, limit)


def _split(data: LoadedData, percentage: float, seed: int) -> None:
    if not 0 < percentage < 100:
        raise UserError(f"--validation_split_percentage {percentage} must lie between 0 and 100.")
    if len(data.train) < 2:
        return
    # Rows that occur twice stay on one side.
    places: dict[str, list[int]] = {}
    for index, row in enumerate(data.train):
        places.setdefault(_identity(row), []).append(index)
    order = list(places.values())
    random.Random(seed).shuffle(order)
    count = min(len(order) - 1, max(1, round(len(order) * percentage / 100)))
    held_out = {index for same in order[:count] for index in same}
    rows = data.train
    data.train = [row for index, row in enumerate(rows) if index not in held_out]
    data.validation = [row for index, row in enumerate(rows) if index in held_out]
    by_file = {account.file: account for account in data.account["train"]}
    moved = Counter(row["place"].rpartition(":")[0] for row in data.validation)
    for name, number in moved.items():
        by_file[name].left_out["moved to validation"] += number
        data.account["validation"].append(FileAccount(name, by_file[name].sha256, rows=number))
    logger.info(f"held out {len(held_out)} of {len(rows)} training rows at random (seed {seed})")


def _refuse_overlap(data: LoadedData, allowed: bool) -> None:
    trained = {_identity(row): row["place"] for row in data.train}
    shared = [(row["place"], trained[_identity(row)]) for row in data.validation if _identity(row) in trained]
    if not shared:
        return
    shown = "\n  ".join(f"{held_out} is also {train}" for held_out, train in shared[:5])
    message = f"{len(shared)} of {len(data.validation)} held-out rows are also trained on:\n  {shown}"
    if allowed:
        logger.warning(f"{message}\n  Evaluation will look better than it is (--allow_overlap True)")
        return
    raise UserError(f"{message}\nRemove them from one side, or say --allow_overlap True.")


def _identity(row: dict[str, Any]) -> str:
    content = {key: _without_layout(value) for key, value in row.items() if key != "place"}
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


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
