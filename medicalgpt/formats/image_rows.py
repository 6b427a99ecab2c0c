"""Images of a row: their paths, and where they are in the conversation, in the spellings that data sets have."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medicalgpt.formats.turns import IMAGE_MARK, IMAGE_PART, ROLE_FIELDS, TEXT_FIELDS, USER_ROLES, parse_turns
from medicalgpt.readers.problems import RowError

# LLaMA-Factory and ms-swift have a list, LLaVA one path.
IMAGE_FIELDS = ("images", "image")
IMAGE_TYPES = ("image", "image_url", "input_image")
# Where a part of a turn, or an element of the list, has its path.
PATH_FIELDS = ("image", "image_url", "url", "path")
WHERE = f"Write {IMAGE_MARK} into the user's text where each image belongs."


def take_image_parts(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str | None]]:
    """Fields with a mark in place of each part that is an image, and the paths of these parts; None if one has none.

    Args:
        row: its lists of turns are in the OpenAI form, whose content may be a list of parts, or any other row.

    Returns:
        The changed fields, and the paths in the order of the parts.

    Raises:
        RowError: an image in another turn than the user's, or a part that cannot be read.
    """
    found: list[str | None] = []
    changed = {}
    for name, value in row.items():
        turns = parse_turns(value) if isinstance(value, list | str) else value
        if isinstance(turns, list) and any(map(_has_image, turns)):
            changed[name] = [_marked(turn, number, found) for number, turn in enumerate(turns, start=1)]
    return changed, found


def _has_image(turn: Any) -> bool:
    return isinstance(turn, dict) and any(
        isinstance(part, dict) and part.get("type") in IMAGE_TYPES
        for field in TEXT_FIELDS
        for part in (turn.get(field) if isinstance(turn.get(field), list) else ())
    )


def _marked(turn: Any, number: int, found: list[str | None]) -> Any:
    if not _has_image(turn):
        return turn
    role = next((turn[name] for name in ROLE_FIELDS if turn.get(name)), None)
    if str(role).strip().lower() not in USER_ROLES:
        raise _of_another_turn(number, role, turn)
    changed = {}
    for name in TEXT_FIELDS:
        if not isinstance(turn.get(name), list):
            continue
        parts = []
        for part in turn[name]:
            if isinstance(part, dict) and part.get("type") in IMAGE_TYPES:
                found.append(_path_of_part(part, number))
                part = {"type": "text", "text": IMAGE_MARK}
            parts.append(part)
        changed[name] = parts
    return {**turn, **changed}


def _of_another_turn(number: int, role: Any, value: Any) -> RowError:
    return RowError(
        f"turn {number} ({role}) has an image, and only turns of the user can",
        "Move the image into the user's turn before it, or remove the row.",
        value,
    )


def _path_of_part(part: Mapping[str, Any], number: int) -> str | None:
    given = {
        name: value for name, value in part.items() if value is not None and name not in ("type", "text", "detail")
    }
    if unknown := sorted(set(given) - set(PATH_FIELDS)):
        raise RowError(
            f"turn {number}: an image with the field `{unknown[0]}`, which is not read",
            "Remove it. The size of all images is bounded by --image_min_pixels and --image_max_pixels.",
            part,
        )
    paths = [_path_of(value) for value in given.values()]
    if len(set(paths)) > 1:
        raise RowError(f"turn {number}: an image with several paths", "Keep one of them.", part)
    return paths[0] if paths else None


def _path_of(value: Any) -> str:
    """The path in an element of `images`.

    Raises:
        RowError: it is not the path of a file.
    """
    if isinstance(value, dict):
        given = {name: item for name, item in value.items() if item is not None and name != "detail"}
        if len(given) == 1 and (name := next(iter(given))) in PATH_FIELDS:
            value = given[name]
    if not isinstance(value, str) or not value.strip():
        raise RowError("an image that is not a path", "Write the image to a file, and its path into the row.", value)
    scheme = value.partition(":")[0].lower() if ":" in value else ""
    if scheme in ("http", "https", "ftp", "s3", "oss", "gs", "hf"):
        raise RowError(
            "an image at a network address, and nothing is fetched",
            "Download it, and write the path of the file, relative to the data file.",
            value,
        )
    if scheme == "data":
        raise RowError("an image within the row", "Write it to a file, and the path of the file into the row.", value)
    return value.removeprefix("file://") if scheme == "file" else value


def read_image_paths(values: Mapping[str, Any], inline: list[str | None]) -> list[str]:
    """The paths of all images of a row, in the order of their marks.

    Args:
        values: the fields of `IMAGE_FIELDS` that the row has.
        inline: of `take_image_parts`.

    Raises:
        RowError: a path that is missing, or one that is not of a file here.
    """
    given = {name: value for name, value in values.items() if value not in (None, "", [], {})}
    if len(given) > 1:
        raise RowError("both `images` and `image`", "Keep one of them.", given)
    listed = next(iter(given.values()), [])
    paths = [_path_of(value) for value in (listed if isinstance(listed, list) else [listed])]
    named = [path for path in inline if path is not None]
    if named and len(named) < len(inline):
        raise RowError(
            f"{len(inline) - len(named)} of {len(inline)} images in the turns have no path",
            "Give each its path, or none and list all in `images`.",
            inline,
        )
    if named and paths and named != paths:
        raise RowError("`images` and the images in the turns differ", "Keep one of them.", paths)
    return named or paths


def move_image_paths(row: Mapping[str, Any], paths: Iterable[str], old: Path, new: Path, name: str = "") -> dict:
    """The row, of a data file in one folder, with the paths of its images for a file in another.

    Args:
        row: as it is in its file.
        paths: of its images; absolute ones stay as they are.
        old, new: the folders.
        name: a further field that may have paths.
    """
    moved = {path: os.path.relpath(old / path, new) for path in paths if not Path(path).is_absolute()}
    moved |= {f"file://{path}": target for path, target in moved.items()}
    named = {*IMAGE_FIELDS, *PATH_FIELDS, name.lower()}

    def walk(item: Any, is_path: bool) -> Any:
        if isinstance(item, str):
            return moved.get(item, item) if is_path else item
        if isinstance(item, list):
            return [walk(each, is_path) for each in item]
        if isinstance(item, dict):
            return {name: walk(each, str(name).lower() in named) for name, each in item.items()}
        return item

    lists = {name: parse_turns(item) for name, item in row.items() if isinstance(item, str)}
    turns = {name: item for name, item in lists.items() if isinstance(item, list) and any(map(_has_image, item))}
    return walk({**row, **turns}, False)


def place_images(messages: list[dict[str, Any]], paths: list[str], mark_is_text: bool = False) -> list[dict[str, Any]]:
    """The messages with the marks in turns of the user replaced: content becomes a list of parts, text and images.

    Args:
        mark_is_text: a mark in a row without images is text.

    Raises:
        RowError: another number of marks than of images, or a mark in another turn.
    """
    if mark_is_text and not paths:
        return messages
    if paths:
        for number, message in enumerate(messages, start=1):
            if message["role"] != "user" and IMAGE_MARK in message["content"] + message.get("reasoning_content", ""):
                raise _of_another_turn(number, message["role"], message["content"])
    marks = sum(message["content"].count(IMAGE_MARK) for message in messages if message["role"] == "user")
    if marks != len(paths):
        remedy = WHERE if marks < len(paths) else "List each image in `images`, in the order of the marks."
        if not paths:
            remedy += " If it is text that happens to be like the mark, write it another way."
        raise RowError(f"{marks} {IMAGE_MARK} in the text, and {len(paths)} image(s)", remedy, paths)
    return [
        {**message, "content": _parts(message["content"])}
        if message["role"] == "user" and IMAGE_MARK in message["content"]
        else message
        for message in messages
    ]


def _parts(text: str) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        parts += [dict(IMAGE_PART)] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts
