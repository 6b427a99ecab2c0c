"""Write converted rows in the formats that other programs read, without losing anything, or refuse the row.

The inverse of `medicalgpt/formats/conversion.py`: reading what is written here gives the same row.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medicalgpt.data.rows import Rows
from medicalgpt.errors import UserError
from medicalgpt.files import open_new
from medicalgpt.formats.conversion import to_messages, to_preference, to_text
from medicalgpt.formats.tasks import to_task
from medicalgpt.readers.problems import RowError

import pyarrow as pa
import pyarrow.parquet as pq

# Rows of a Parquet file that are in memory together.
BATCH_ROWS = 5_000
FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
BEYOND_TEXT = {
    "tool_calls": "tool calls",
    "reasoning_content": "reasoning",
    "train": "answers that are context only",
}
HOLDS_ALL = "Convert to a format that holds it: --to messages or --to sharegpt."


def sharegpt_row(row: dict[str, Any]) -> dict[str, Any]:
    """`conversations` with `from` and `value`; tool calls as turns of `function_call`, tools as a string of JSON."""
    written = {"conversations": [_sharegpt_turn(message) for message in row["messages"]]}
    if row["tools"]:
        written["tools"] = _json([_bare_tool(tool) for tool in row["tools"]])
    return written


def messages_row(row: dict[str, Any]) -> dict[str, Any]:
    """`messages` as OpenAI has them, with numbered calls whose arguments are strings of JSON."""
    return {"messages": openai_messages(row["messages"]), **_tools(row)}


def alpaca_row(row: dict[str, Any]) -> dict[str, Any]:
    """`instruction`, `input`, `output`, with `system` and `history` where a conversation has them.

    Raises:
        RowError: tools, reasoning, answers that are context only, or turns in another order.
    """
    messages = list(row["messages"])
    if row["tools"]:
        raise RowError("Alpaca has no tools", HOLDS_ALL, row["tools"])
    for number, message in enumerate(messages, start=1):
        if unheld := [name for field, name in BEYOND_TEXT.items() if field in message]:
            raise RowError(f"Alpaca has no {', '.join(unheld)}, and turn {number} does", HOLDS_ALL, message)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(messages) // 2) or not messages:
        raise RowError("Alpaca has pairs of a question and an answer only", HOLDS_ALL, roles)
    texts = [message["content"] for message in messages]
    pairs = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    written = {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1]}
    return written | ({"system": system} if system else {}) | ({"history": pairs[:-1]} if pairs[1:] else {})


def preference_row(row: dict[str, Any]) -> dict[str, Any]:
    """`prompt`, `chosen` and `rejected` as lists of messages, which TRL reads too."""
    answers = {name: openai_messages([row[name]]) for name in ("chosen", "rejected")}
    return {"prompt": openai_messages(row["messages"]), **answers, **_tools(row)}


def task_row(row: dict[str, Any]) -> dict[str, Any]:
    """`question`, or `prompt` as a list of messages if it has several, and the columns with which answers are scored.

    Raises:
        RowError: a column has the name of the prompt.
    """
    messages = row["messages"]
    alone = len(messages) == 1 and set(messages[0]) == {"role", "content"} and messages[0]["role"] == "user"
    prompt = {"question": messages[0]["content"]} if alone else {"prompt": openai_messages(messages)}
    return _joined({**prompt, **_tools(row)}, row["columns"])


def text_row(row: dict[str, Any]) -> dict[str, Any]:
    """`text`, one document."""
    return {"text": row["text"]}


# What a row is written as, and the converter that reads rows of this kind, and reads what was written.
TARGETS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], Callable[..., dict[str, Any]]]] = {
    "sharegpt": (sharegpt_row, to_messages),
    "messages": (messages_row, to_messages),
    "alpaca": (alpaca_row, to_messages),
    "preference": (preference_row, to_preference),
    "task": (task_row, to_task),
    "text": (text_row, to_text),
}


def export_row(row: dict[str, Any], target: str, kept: dict[str, Any]) -> dict[str, Any]:
    """The row in another format, proven by reading it again.

    Args:
        row: converted by the converter of the target.
        target: one of `TARGETS`.
        kept: fields that describe the row, such as its source; they are written as they are.

    Raises:
        RowError: the format cannot hold the row.
    """
    write, read = TARGETS[target]
    written = _joined(write(row), kept)
    try:
        again = read(written)
    except RowError as error:
        raise RowError(f"as {target} it could not be read again: {error.reason}", error.remedy, error.value) from error
    if again != row and _json(again) != _json(row):
        raise RowError(f"{target} cannot hold it without a change", HOLDS_ALL, written)
    return written


def openai_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with an id for each tool call and for each result of one, as OpenAI's interface requires it."""
    written, waiting, count = [], [], 0
    for message in messages:
        turn = {name: item for name, item in message.items() if name not in ("tool_calls", "train")}
        if message.get("tool_calls"):
            calls = [
                {"id": f"call_{count + number}", "type": "function", "function": _call(call, as_text=True)}
                for number, call in enumerate(message["tool_calls"], start=1)
            ]
            turn["tool_calls"] = calls
            count += len(calls)
            waiting = [call["id"] for call in calls]
        elif message["role"] == "tool" and waiting:
            turn["tool_call_id"] = waiting.pop(0)
        written.append(turn | _mask(message))
    return written


def _sharegpt_turn(message: dict[str, Any]) -> dict[str, Any]:
    role, calls = message["role"], message.get("tool_calls")
    if calls and not message["content"] and not message.get("reasoning_content"):
        bare = [_call(call, as_text=False) for call in calls]
        return {"from": "function_call", "value": _json(bare[0] if len(bare) == 1 else bare)} | _mask(message)
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    turn = {"from": names[role], "value": message["content"]}
    if message.get("reasoning_content"):
        turn["reasoning_content"] = message["reasoning_content"]
    if calls:
        turn["tool_calls"] = [{"type": "function", "function": _call(call, as_text=True)} for call in calls]
    return turn | _mask(message)


def _mask(message: dict[str, Any]) -> dict[str, int]:
    """OpenAI's mark of an answer that is context only."""
    return {"weight": 0} if message.get("train") is False else {}


def _call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    return {"name": call["function"]["name"], "arguments": _json(arguments) if as_text else arguments}


def _tools(row: dict[str, Any]) -> dict[str, str]:
    # As text, so that no table gives each tool the parameters of all others.
    return {"tools": _json(row["tools"])} if row["tools"] else {}


def _bare_tool(tool: dict[str, Any]) -> dict[str, Any]:
    return tool["function"] if set(tool) == {"type", "function"} and tool["type"] == "function" else tool


def _joined(written: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    if twice := sorted(set(written) & set(kept)):
        raise RowError(
            f"the field(s) {', '.join(twice)} would be twice in the row",
            f"Rename them, or leave them out: --ignore_fields {','.join(twice)}.",
            {name: kept[name] for name in twice},
        )
    return written | kept


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def write_rows(path: str | Path, rows: Rows, overwrite: bool = False) -> None:
    """Write all rows, or nothing: the file is there once it is complete.

    Args:
        path: its suffix chooses the format: .jsonl, .json (a list), .parquet, or .txt (one document per line).
        overwrite: replace a file that is there.

    Raises:
        UserError: another suffix, a file that is there, or rows that the format cannot hold.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise UserError(f"{path}: the suffix must be one of {', '.join(FILE_SUFFIXES)}.")
    try:
        with open_new(path, overwrite) as partial:
            if suffix == ".parquet":
                _write_parquet(partial, rows, path)
            else:
                with partial.open("w", encoding="utf-8", newline="\n") as file:
                    file.writelines(_lines(rows, suffix, path))
    except FileExistsError as error:
        raise UserError(f"{path} exists. Choose another path, or replace it with --overwrite True.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}. Choose another path.") from error


def _lines(rows: Rows, suffix: str, path: Path) -> Iterator[str]:
    if suffix == ".txt":
        for number, row in enumerate(rows, start=1):
            text = row["text"]
            if set(row) != {"text"} or "\n" in text or text != text.strip():
                raise UserError(
                    f"row {number} is not one line of text, which is all that {path} can hold. Write .jsonl instead."
                )
            yield f"{text}\n"
    elif suffix == ".jsonl":
        yield from (f"{_json(row)}\n" for row in rows)
    else:
        yield "["
        for number, row in enumerate(rows):
            yield ("\n" if number == 0 else ",\n") + _json(row)
        yield "\n]\n"


def _write_parquet(partial: Path, rows: Rows, path: Path) -> None:
    """Objects other than turns become strings of JSON: as a table they would all get each other's fields."""
    schema = pa.schema([])
    advice = "Write .jsonl instead, which holds any row."
    try:
        for batch in _batches(rows):
            # Turns have different fields; a column of text and numbers is an error.
            schema = pa.unify_schemas([schema, pa.Table.from_pylist(batch).schema], promote_options="permissive")
        with pq.ParquetWriter(partial, schema) as writer:
            for batch in _batches(rows):
                table = pa.Table.from_pylist(batch, schema)
                for row, again in zip(batch, table.to_pylist(), strict=True):
                    if _sorted_json(_without_nulls(row)) != _sorted_json(_without_nulls(again)):
                        raise UserError(f"{path}: a row would be changed by the table: {_json(row)[:200]}. {advice}")
                writer.write_table(table)
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(
            f"{path}: the rows do not fit into one table ({str(error).splitlines()[0]}). {advice}"
        ) from error


def _batches(rows: Rows) -> Iterator[list[dict[str, Any]]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    for start in range(0, len(rows), BATCH_ROWS):
        # Every batch has all columns: those of a table are those of its first row.
        yield [{name: _cell(row.get(name)) for name in names} for row in rows.select(slice(start, start + BATCH_ROWS))]


def _cell(value: Any) -> Any:
    turns = isinstance(value, list) and all(_is_turn(item) for item in value)
    return _json(value) if not turns and _has_object(value) else value


def _has_object(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_has_object, value)))


def _is_turn(item: Any) -> bool:
    return isinstance(item, dict) and bool({"role", "from"} & set(item))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _sorted_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
