"""Files that visitors of a page upload: how many bytes they hold together, and when they are removed."""

import asyncio
import json
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from medicalgpt.serving.web import RequestRefused, client_of

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A visitor may hold this share of all bytes.
SHARE = 4
# Seconds after which a file is removed that nobody has read, and between two looks at all of them.
MAX_AGE = 600.0
SECONDS_BETWEEN_SWEEPS = 30.0


@dataclass
class _Upload:
    """Files of one path: Gradio names them by their content, so that several visitors may have the same one."""

    client: str
    size: int
    readers: int = 0


class Uploads:
    """The folder of a page's uploads, private to this process and removed at its end.

    To be made before the page: Gradio's components copy files to the folder that they knew when they were made.

    Args:
        max_bytes: maximum bytes of all files together.

    Attributes:
        folder: where Gradio stores them.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.folder = Path(tempfile.mkdtemp(prefix="medicalgpt-uploads-"))
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)
        self._lock = threading.Lock()
        self._files: dict[Path, _Upload] = {}
        self._arriving: Counter[str] = Counter()
        self._arrivals = 0
        self._swept = 0.0

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def reserve(self, client: str, size: int) -> None:
        """Make room for an upload.

        Raises:
            RequestRefused: there is no room.
        """
        self._sweep()
        with self._lock:
            held = [upload for upload in self._files.values() if upload.client == client]
            own = sum(upload.size for upload in held) + self._arriving[client] + size
            # What arrives is counted twice while it does.
            everything = sum(_size(path) for path in self.folder.rglob("*")) + self._arriving.total() + size
            if own > self.max_bytes // SHARE or everything > self.max_bytes:
                message = "No room is left for uploads; try again in some minutes, or with smaller files."
                raise RequestRefused(HTTPStatus.INSUFFICIENT_STORAGE, message, "uploads_full", {"Retry-After": "60"})
            self._arriving[client] += size
            self._arrivals += 1

    def arrived(self, client: str, size: int, paths: list[str]) -> None:
        """An upload has ended; these files are complete, none if it has failed."""
        with self._lock:
            self._arriving[client] -= size
            self._arrivals -= 1
            self._arriving += Counter()
            for path in map(Path, paths):
                upload = self._files.setdefault(path, _Upload(client, _size(path)))
                upload.readers += 1
            self._remove_read()

    def release(self, path: Path) -> None:
        """A visitor's file was read. It is removed unless another visitor has uploaded, or just uploads, the same."""
        with self._lock:
            if path not in self._files:
                path.unlink(missing_ok=True)
                return
            self._files[path].readers -= 1
            self._remove_read()

    def _remove_read(self) -> None:
        # The content of a file that arrives may be one of these.
        if self._arrivals == 0:
            for path in [path for path, upload in self._files.items() if upload.readers <= 0]:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        self._files.pop(path, None)
        path.unlink(missing_ok=True)
        if path.parent != self.folder:
            with suppress(OSError):
                path.parent.rmdir()

    def _sweep(self) -> None:
        """Remove what nobody has read, the rest of broken uploads included."""
        now = time.time()
        with self._lock:
            if now - self._swept < SECONDS_BETWEEN_SWEEPS:
                return
            self._swept = now
            for path in self.folder.rglob("*"):
                with suppress(OSError):
                    if path.is_file() and now - path.stat().st_mtime > MAX_AGE:
                        self._remove(path)


class UploadMiddleware:
    """Lets uploads through for which there is room, and notes which files they have become."""

    def __init__(self, app: ASGIApp, *, uploads: Uploads, refuse: Callable[[RequestRefused], Response]):
        self.app = app
        self.uploads = uploads
        self.refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_upload(scope):
            await self.app(scope, receive, send)
            return
        client, length = client_of(scope), Headers(scope=scope).get("content-length", "")
        try:
            if not length.isdecimal():
                message = "An upload must say its Content-Length."
                raise RequestRefused(HTTPStatus.LENGTH_REQUIRED, message, "length_required")
            size = int(length)
            await asyncio.to_thread(self.uploads.reserve, client, size)
        except RequestRefused as refusal:
            await self.refuse(refusal)(scope, receive, send)
            return
        status, body = 0, b""

        async def note(message: Message) -> None:
            nonlocal status, body
            status = message.get("status", status)
            body += message.get("body", b"")
            if message["type"] == "http.response.body" and not message.get("more_body"):
                finish()
            await send(message)

        finished = False

        def finish() -> None:
            # Before the visitor knows the path, and can have it read.
            nonlocal finished
            if not finished:
                finished = True
                self.uploads.arrived(client, size, json.loads(body) if status == HTTPStatus.OK else [])

        try:
            await self.app(scope, receive, note)
        finally:
            status = status if finished else 0
            finish()


def is_upload(scope: Scope) -> bool:
    return scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
