"""Keys of an API: one for everybody, or one for each client with a name, from a file that may change at any time."""

import hashlib
import hmac
import os
import re
import time
from collections.abc import Mapping

from medicalgpt.errors import UserError

from loguru import logger

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEY = re.compile("[!-~]+")
# How long a change of the file may go unnoticed.
SECONDS_BETWEEN_LOOKS = 1.0


class ApiKeys:
    """Keys by their names. The name of a key that everybody shares is empty.

    Args:
        path: a file of further keys, see `read_keys`. It is read again when it has changed; as long as it cannot be
            used, the keys are those that it had before.

    Raises:
        UserError: the file cannot be used, or a name or key is there twice.
    """

    def __init__(self, shared: str | None = None, path: str | None = None):
        self.shared = {"": shared} if shared else {}
        self.path = path
        self._state: tuple[int, ...] | None = None
        self._looked_at = time.monotonic()
        self._digests: dict[str, bytes] = {}
        if path is None:
            self._set({})
        else:
            self._state = _state_of(path)
            self._set(read_keys(path))

    def name_of(self, presented: bytes) -> str | None:
        """The name of a key that a client sends; None if there is no such key.

        Each key is compared, in constant time, so that the time says nothing about them.
        """
        self._refresh()
        digest, found = hashlib.sha256(presented).digest(), None
        for name, known in self._digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _set(self, named: Mapping[str, str]) -> None:
        if set(named.values()) & set(self.shared.values()):
            raise UserError(f"--api_keys_file {self.path}: the key of --api_key is in it too; leave one of them out.")
        # Digests have one length, whatever the lengths of the keys.
        self._digests = {
            name: hashlib.sha256(key.encode()).digest() for name, key in (self.shared | dict(named)).items()
        }

    def _refresh(self) -> None:
        now = time.monotonic()
        if self.path is None or now - self._looked_at < SECONDS_BETWEEN_LOOKS:
            return
        self._looked_at = now
        try:
            state = _state_of(self.path)
            if state == self._state:
                return
            self._state = state
            self._set(read_keys(self.path))
        except UserError as error:
            if self._state is not None:
                logger.error(f"The keys stay as they were. {error}")
            # Looked at again, and not reported again before it has changed.
            self._state = _state_or_none(self.path)
        else:
            logger.info(f"{len(self._digests)} keys, after --api_keys_file has changed")


def _state_of(path: str) -> tuple[int, ...]:
    """What changes whenever a file does. Raises UserError if it is not there."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"--api_keys_file {path}: {error.strerror}. Give the path of a file of `name: key`.") from error
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode


def _state_or_none(path: str) -> tuple[int, ...] | None:
    try:
        return _state_of(path)
    except UserError:
        return None


def read_keys(path: str) -> dict[str, str]:
    """Keys by their names: a line `name: key` for each; empty lines, and those that begin with `#`, are skipped.

    Raises:
        UserError: other users of the machine can read or change the file, or lines cannot be used, all of them named.
            The message does not contain keys.
    """
    mode = _state_of(path)[-1]
    if mode & 0o027:
        raise UserError(
            f"--api_keys_file {path}: its permissions are {mode & 0o777:o}, so that others can read or change it. "
            f"Run: chmod 600 {path}"
        )
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"--api_keys_file {path}: {reason}.") from error
    keys: dict[str, str] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, key = (part.strip() for part in line.partition(":"))
        if not colon or not NAME.fullmatch(name):
            problems.append(f"{path}:{number}: write `name: key`; a name has up to 64 letters, digits and ._-")
        elif not KEY.fullmatch(key):
            problems.append(
                f"{path}:{number}: the key of {name} must be ASCII letters, digits and signs, without spaces"
            )
        elif name in keys:
            problems.append(f"{path}:{number}: there is a key of {name} already; use another name")
        elif key in keys.values():
            problems.append(f"{path}:{number}: {name} has the key of another name; each needs its own")
        else:
            keys[name] = key
    if not keys and not problems:
        problems = [f"{path}: it has no keys; write `name: key` on a line for each client"]
    if problems:
        raise UserError("--api_keys_file:\n  " + "\n  ".join(problems))
    return keys
