"""The fields of task rows as columns of a data set, which reward functions receive."""

import json
from collections.abc import Sequence
from typing import Any

from medicalgpt.data.loading import LoadedData
from medicalgpt.errors import UserError
from medicalgpt.readers.problems import Place, place_of

from datasets import Dataset

# Arguments that TRL or the built-in rewards pass to a reward function; a field of a row cannot have these names.
RESERVED_COLUMNS = {
    *("prompt", "prompts", "prompt_ids", "completion", "completions", "completion_ids", "tools", "place"),
    *("image", "images", "environment", "environments", "trainer_state", "log_extra", "log_metric"),
    *("min_length", "max_length", "default_tolerance"),
}


def add_reward_columns(encoded: Dataset, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Dataset:
    """The trainer's data set: each row a dict with `prompt_ids`, `place`, `prompt`, `tools` and the row's fields.

    Args:
        encoded: columns `prompt_ids` and `place`.
        rows: converted by `to_task`; every row of `encoded` is among them.
        names: names of the fields; None where a row lacks one.
    """
    number_of = {place_of(row): number for number, row in enumerate(rows)}
    texts = []
    for place in encoded["place"]:
        row = rows[number_of[Place(**place)]]
        fields = {name: row["columns"].get(name) for name in names}
        # JSON, since a table column cannot hold a number in one row and text in another.
        texts.append(json.dumps({"prompt": row["messages"], "tools": row["tools"], **fields}, ensure_ascii=False))
    return encoded.add_column("fields", texts).with_transform(_decode_fields)


def _decode_fields(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = [json.loads(text) for text in batch["fields"]]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {"prompt_ids": batch["prompt_ids"], "place": [str(Place(**place)) for place in batch["place"]], **columns}


def reward_columns(data: LoadedData) -> list[str]:
    """Names of the fields that rows have in addition to the prompt, sorted.

    Raises:
        UserError: a field has a name that reward functions receive something else under.
    """
    names: dict[str, str] = {}
    for rows in (data.train, data.validation):
        for row in rows:
            for name in row["columns"]:
                names.setdefault(name, place_of(row))
    if reserved := sorted(names.keys() & RESERVED_COLUMNS):
        raise UserError(
            f"{names[reserved[0]]}: the field name `{reserved[0]}` is reserved, since reward functions receive "
            f"something else under it. Rename the field, or pass --ignore_fields {','.join(reserved)}."
        )
    return sorted(names)
