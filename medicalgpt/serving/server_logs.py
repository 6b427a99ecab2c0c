"""Log of a server: one line for each request, in text or as JSON, that nothing a client sends can forge.

A line has the time, the level, the id of the request and its client. The id comes from the request, so that a line can
be found in the log of a proxy too, or is made here; the answer carries it.
"""

import json
import logging
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from medicalgpt.logs import printable
from medicalgpt.serving.web import client_of

from loguru import logger
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers.utils.logging import disable_progress_bar

# What a proxy may call a request; anything else is replaced by an id that is made here.
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+/=@-]{0,127}")
# https://www.w3.org/TR/trace-context/#traceparent-header
TRACE_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Asked again and again by machines: logged only if they fail.
QUIET_ROUTES = frozenset({"/health", "/metrics"})
# Many programs end a line at these too.
LINE_ENDS = {0x85: "\\x85", 0x2028: "\\u2028", 0x2029: "\\u2029"}
MAX_CLIENT_CHARS = 100
MAX_LINE_CHARS = 20_000


def request_id_from(headers: Mapping[bytes, bytes]) -> str:
    """The id of a request: `X-Request-Id`, or the trace id of `traceparent`, if well-formed; otherwise a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    if REQUEST_ID.fullmatch(given):
        return given
    if traced := TRACE_PARENT.fullmatch(headers.get(b"traceparent", b"").decode("latin-1")):
        return traced[1]
    return f"req-{uuid.uuid4().hex}"


def one_line(text: str, most: int = MAX_LINE_CHARS) -> str:
    """A text without line ends and control characters, and of limited length."""
    text = text if len(text) <= most else text[:most] + "..."
    return printable(text).translate(LINE_ENDS).replace("\n", "\\n").replace("\t", "\\t")


def _indented(text: str) -> str:
    """Several lines as one entry of the log: only its first line begins at the margin."""
    text = text if len(text) <= MAX_LINE_CHARS else text[:MAX_LINE_CHARS] + "..."
    return printable(text).translate(LINE_ENDS).rstrip("\n").replace("\n", "\n    ")


def _traceback(record: Mapping[str, Any]) -> str:
    # Without the values of variables, which contain prompts.
    error = record["exception"]
    return "".join(traceback.format_exception(error.type, error.value, error.traceback)) if error else ""


def text_line(record: dict[str, Any]) -> str:
    """Format of loguru: time, level, request id, client, message."""
    extra = record["extra"]
    time_text = record["time"].isoformat(timespec="milliseconds")
    text = "\n".join(filter(None, (record["message"], _traceback(record))))
    tail = f"{extra.get('request_id', '-')} {extra.get('client', '-')} {_indented(text)}"
    extra |= {"_head": time_text, "_tail": tail}
    return "{extra[_head]} <level>{level: <7}</level> {extra[_tail]}\n"


def json_line(record: dict[str, Any]) -> str:
    """Format of loguru: one JSON object per line; that of a request has its method, route and so on as fields."""
    fields = {
        "time": record["time"].isoformat(timespec="milliseconds"),
        "level": record["level"].name,
        "message": record["message"][:MAX_LINE_CHARS],
        **{name: value for name, value in record["extra"].items() if not name.startswith("_")},
    }
    if record["exception"]:
        fields["exception"] = _traceback(record)[:MAX_LINE_CHARS]
    line = json.dumps(fields, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace").decode()
    record["extra"]["_line"] = line.translate({end: f"\\u{end:04x}" for end in LINE_ENDS})
    return "{extra[_line]}\n"


LOG_FORMATS = {"text": text_line, "json": json_line}


class _ToLoguru(logging.Handler):
    """Passes on what libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname if record.levelname in ("WARNING", "ERROR", "CRITICAL") else "INFO"
        logger.opt(exception=record.exc_info).log(level, "{}: {}", record.name, record.getMessage())


def setup_server_logging(log_format: str) -> None:
    """Send the log, and the warnings of libraries, to stderr in this format: text or json."""
    logger.remove()
    logger.add(sys.stderr, format=LOG_FORMATS[log_format], level="INFO", backtrace=False, diagnose=False)
    if not sys.stderr.isatty():
        disable_progress_bar()
    root = logging.getLogger()
    if not any(isinstance(handler, _ToLoguru) for handler in root.handlers):
        root.addHandler(_ToLoguru(logging.WARNING))
    if log_format == "json":
        # Some libraries write lines in a format of their own.
        for library in map(logging.getLogger, list(root.manager.loggerDict)):
            library.handlers.clear()
            library.propagate = True
        logging.captureWarnings(True)


@dataclass
class RequestRecord:
    """What is known of a request, `scope["record"]`.

    Attributes:
        started: when it arrived, in seconds of `time.monotonic`.
        status: 499 as long as nothing is sent, as nginx says of a client that leaves.
        prompt_tokens: tokens of its prompts, each counted once.
        completion_tokens: tokens generated for it so far.
    """

    id: str
    method: str
    started: float = field(default_factory=time.monotonic)
    status: int = 499
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def seconds(self) -> float:
        """Time since it arrived."""
        return time.monotonic() - self.started

    def count_token(self) -> None:
        self.completion_tokens += 1


class ServerStatus:
    """What a server does at the moment.

    Attributes:
        stopping: it takes no new requests, and ends when those that it has are answered.
        active: number of requests that are being answered.
        open: answers that clients wait for.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.active = 0
        self.open: set[Future[Any]] = set()

    def track(self, future: "Future[Any]") -> None:
        self.open.add(future)
        future.add_done_callback(self.open.discard)

    def give_up(self) -> None:
        """Cancel all answers; each client gets an error."""
        for future in list(self.open):
            future.cancel()


class RequestLogMiddleware:
    """Gives each request an id, logs it at its end, and refuses new ones while the server is stopping.

    Args:
        refusal: makes the response that the server is stopping.
        on_end: called with the scope of each request that has ended; `scope["record"]` is its record.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        status: ServerStatus,
        refusal: Callable[[], Response],
        on_end: Callable[[Scope], Any] = lambda scope: None,
    ):
        self.app = app
        self.status = status
        self.refusal = refusal
        self.on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in METHODS else "OTHER"
        record = scope["record"] = RequestRecord(request_id_from(dict(scope["headers"])), method)

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            await send(message)

        # The numbers of a server are still wanted while it stops.
        refused = self.status.stopping and method != "GET"
        self.status.active += not refused
        try:
            with logger.contextualize(request_id=record.id):
                await (self.refusal() if refused else self.app)(scope, receive, note)
        except Exception:
            record.status = 500 if record.status == 499 else record.status
            raise
        finally:
            self.status.active -= not refused
            self.on_end(scope)
            log_request(scope)


def route_of(scope: Scope) -> str:
    """The path of a route as it is declared; `other` if there is none, so that clients cannot make names up."""
    return getattr(scope.get("route"), "path", "other")


def log_request(scope: Scope) -> None:
    """Log a request that has ended; not those that only watch the server."""
    record, route = scope["record"], route_of(scope)
    if route in QUIET_ROUTES and record.status < 400:
        return
    seconds = round(record.seconds, 3)
    fields = {
        "request_id": record.id,
        "client": one_line(client_of(scope), MAX_CLIENT_CHARS) or "-",
        "method": record.method,
        "route": route,
        "status": record.status,
        "seconds": seconds,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
    }
    tokens = f", {record.prompt_tokens} + {record.completion_tokens} tokens" if record.prompt_tokens else ""
    # The answer is sent even if the log cannot be written, on a full disk for example.
    with suppress(OSError):
        logger.bind(**fields).info(f"{record.method} {route} {record.status} in {seconds:.3f} s{tokens}")
