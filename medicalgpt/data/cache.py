"""A cache on disk for encoded rows that cannot be stale: its key covers everything that the tokens depend on."""

import atexit
import hashlib
import inspect
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from medicalgpt.code_version import code_version
from medicalgpt.data.rows import Rows
from medicalgpt.errors import UserError
from medicalgpt.files import hash_file
from medicalgpt.logs import heartbeat, local_world_size, world_size

import datasets
from filelock import FileLock
from loguru import logger
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
# The code between a row and its tokens. Packed blocks are cached with the tokens, hence batching, trl and datasets.
MODULES = ("medicalgpt.data.tokenizing", "medicalgpt.data.batching")
LIBRARIES = ("tokenizers", "transformers", "jinja2", "datasets", "trl")
MANIFEST = "manifest.json"


class UncacheableError(ValueError):
    """The tokens may depend on something that a cache key cannot cover."""


def token_key(rows: Rows, encode: partial) -> str:
    """The key of the tokens of these rows, 32 hex digits.

    It covers the rows themselves (so that files, limits, splits and conversion are in it), the tokenizer with its chat
    template and settings, the function with its arguments, the source of the code, and versions of libraries.

    Args:
        encode: a function of a module, a tokenizer, and plain values as keyword arguments.

    Raises:
        UncacheableError: `encode` has something else.
    """
    function = encode.func
    if not inspect.isfunction(function) or "<" in function.__qualname__:
        raise UncacheableError(f"{function} is not a function of a module")
    if len(encode.args) != 1:
        raise UncacheableError(f"{function.__qualname__} has {len(encode.args)} positional arguments instead of one")
    (tokenizer,) = encode.args
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise UncacheableError(f"{type(tokenizer).__name__} is not a fast tokenizer, whose state could be read")
    settings = {name: value for name, value in vars(tokenizer).items() if name not in UNRELATED_ATTRIBUTES}
    parts = {
        "rows": rows.digest(),
        "function": f"{function.__module__}.{function.__qualname__}",
        "keywords": encode.keywords,
        "tokenizer": [type(tokenizer).__qualname__, tokenizer.backend_tokenizer.to_str(), settings],
        # A template that writes today's date gives different tokens tomorrow.
        "date": str(date.today()) if "strftime_now" in str(tokenizer.chat_template) else None,
        "code": [code_version(*MODULES), hash_file(inspect.getsourcefile(function))],
        "versions": {name: version(name) for name in LIBRARIES},
    }
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# `_tokenizer` is in the key as its own text; the others change with use and do not affect any token.
UNRELATED_ATTRIBUTES = ("_tokenizer", "deprecation_warnings", "name_or_path", "files_loaded", "init_inputs")


def _as_json(value: Any) -> str:
    if isinstance(value, AddedToken):
        return repr(value)
    raise UncacheableError(f"a {type(value).__name__} among the arguments or the tokenizer's settings")


def load_or_make(key: str | None, make: Callable[[Path], None], read: Callable[[Path], T], *, renew: bool = False) -> T:
    """The result of `read` for a folder that `make` filled, now or earlier under the same key.

    Only one process per machine makes it; the others wait. It is committed when it is complete, and verified by hash
    when it is used.

    Args:
        key: None makes it in a temporary folder, which is removed when the process ends.
        make: writes files into an empty folder.
        read: must have opened what it needs when it returns.
        renew: make it again, once for all processes that were started together.

    Raises:
        UserError: the cache cannot be written.
    """
    if key is None:
        folder = Path(tempfile.mkdtemp(prefix="medicalgpt-tokens-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        make(folder)
        return read(folder)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "medicalgpt-tokens"
    folder, lock = cache / key, FileLock(cache / f"{key}.lock")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with heartbeat(lambda: f"waiting for another process that tokenizes the same rows ({folder})"):
            lock.acquire()
        try:
            if _is_complete(folder, renew):
                logger.info(f"tokens taken from the cache at {folder} (to tokenize again: --overwrite_cache True)")
            else:
                _make_and_commit(folder, make)
            return read(folder)
        finally:
            lock.release()
    except OSError as error:
        raise UserError(
            f"the token cache {cache} cannot be used ({error}). Free some space, or choose another folder with "
            "HF_DATASETS_CACHE."
        ) from error


def _is_complete(folder: Path, renew: bool) -> bool:
    if not folder.exists():
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if renew and manifest["launch"] != _launch():
            return False
        complete = all(hash_file(folder / name) == digest for name, digest in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        logger.warning(f"the token cache at {folder} is damaged; the rows are tokenized again")
    return complete


def _make_and_commit(folder: Path, make: Callable[[Path], None]) -> None:
    aside = folder.with_suffix(".partial")
    # Left by a process that was killed.
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        make(aside)
        files = {path.name: hash_file(path) for path in aside.iterdir()}
        manifest = json.dumps({"launch": _launch(), "files": files}, indent=1)
        (aside / MANIFEST).write_text(manifest, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


ALONE = uuid.uuid4().hex


def _launch() -> str:
    """A name that all processes of this machine share if one launcher started them, and no others have."""
    if local_world_size(world_size()) == 1:
        return ALONE
    return "-".join([os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("MASTER_PORT", ""), str(os.getppid())])
