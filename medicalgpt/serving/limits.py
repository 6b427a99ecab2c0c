"""What a connection may cost: bytes of headers, time, and how many there are.

uvicorn passes everything on to the application: a header of any size is collected, a connection that sends nothing
stays open, and each one takes a file descriptor. `LimitedProtocol` is uvicorn's own protocol with limits that come
before any key is checked. The size of a body is limited where it is read, in `AccessMiddleware`.
"""

import os
import resource
import time
from asyncio import TimerHandle, Transport
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.serving.arguments import ApiArguments, ServeArguments

import uvicorn
from loguru import logger
from starlette.types import ASGIApp
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Number of headers; each costs more than its bytes.
MAX_HEADERS = 200
# Requests that a client may send before it has the answer to the first one.
MAX_PIPELINED = 8
# Bytes that are parsed at a time, so that a limit is noticed soon.
PIECE = 16_384
# A body in chunks has further bytes: this many for each of its own, and as many as headers may have.
CHUNK_OVERHEAD = 8
# Seconds that a client which was refused may go on sending; closed at once, it might not get to see why.
SECONDS_TO_LINGER = 2.0
# Bytes that are read from such a client, so that it cannot keep the event loop busy.
MAX_DISCARDED = 4_000_000
# Seconds without a byte taken by a client that an answer is sent to.
WRITE_SECONDS = 60.0
# File descriptors for everything else: uploads, child processes, libraries.
SPARE_FILES = 64


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of each connection, and on their number.

    Attributes:
        header_bytes: bytes of a request line with its headers.
        header_seconds: seconds until the headers must be complete.
        connections: number of connections; when there are more, those give way that wait for a request.
    """

    header_bytes: int
    header_seconds: float
    connections: int


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with limits, which are an attribute of a subclass (`limited_protocol`).

    Attributes:
        wrap: makes the application that is called of the one in uvicorn's settings.
    """

    limits: ConnectionLimits
    wrap: Callable[[ASGIApp], ASGIApp]

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.app = self.wrap(self.app)
        # No front end speaks WebSocket.
        self.ws_protocol_class = None
        self.since = time.monotonic()
        self._in_headers = True
        self._in_body = False
        self._refused = False
        self._refusal: HTTPStatus | None = None
        self._header_bytes = self._wire_bytes = self._body_bytes = self._discarded = 0
        self._header_timer: TimerHandle | None = None
        self._write_timer: TimerHandle | None = None
        self._linger_timer: TimerHandle | None = None

    # --- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        self._header_timer = self.loop.call_later(self.limits.header_seconds, self._headers_late)
        if len(self.connections) <= self.limits.connections:
            return
        idle = [each for each in self.connections if each is not self and each.is_idle]
        slow = [each for each in self.connections if each is not self and each.is_receiving]
        if idle or slow:
            min(idle or slow, key=lambda each: each.since)._give_way()
        else:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._header_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    @property
    def is_idle(self) -> bool:
        """Whether no request has arrived that is not answered."""
        return self._in_headers and (self.cycle is None or self.cycle.response_complete)

    @property
    def is_receiving(self) -> bool:
        """Whether the body of a request is not complete, and nothing is answered to it."""
        return self._in_body and not self.cycle.response_started

    def _give_way(self) -> None:
        # The other one needs the file descriptor now.
        self.connections.discard(self)
        self.transport.abort()

    # --- what is received ---------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._linger_timer is not None:
            self._discarded += len(data)
            if self._discarded > MAX_DISCARDED:
                self.transport.abort()
        for start in range(0, len(data), PIECE):
            if self._refused or self.transport.is_closing():
                return
            piece = data[start : start + PIECE]
            if self._in_headers:
                self._header_bytes += len(piece)
                if self._header_timer is None:
                    self.since = time.monotonic()
                    self._header_timer = self.loop.call_later(self.limits.header_seconds, self._headers_late)
            else:
                self._wire_bytes += len(piece)
            super().data_received(piece)
            if self._in_headers and self._header_bytes > self.limits.header_bytes:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            elif self._wire_bytes > (1 + CHUNK_OVERHEAD) * self._body_bytes + self.limits.header_bytes + PIECE:
                self._refuse(HTTPStatus.BAD_REQUEST)

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or HTTPStatus.BAD_REQUEST)

    def on_message_begin(self) -> None:
        if len(self.pipeline) > MAX_PIPELINED:
            self._fail_with(HTTPStatus.TOO_MANY_REQUESTS)
        super().on_message_begin()
        self._in_headers = True

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            self._fail_with(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_headers_complete(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        self._in_headers, self._in_body = False, True
        self._wire_bytes = self._body_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_headers, self._in_body, self._header_bytes, self._wire_bytes = True, False, 0, 0
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
            self._discarded = 0
        super().on_message_complete()

    # --- what is sent -------------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        if self._in_body and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(SECONDS_TO_LINGER, self.transport.abort)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def timeout_keep_alive_handler(self) -> None:
        # `close` would wait for a client that does not take what it was sent.
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _headers_late(self) -> None:
        if self._header_bytes:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.transport.abort()

    def _fail_with(self, refusal: HTTPStatus) -> None:
        """Leave the parser with an error, which it turns into `send_400_response`."""
        self._refusal = refusal
        raise ValueError(refusal.phrase)

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer without the application, and close the connection soon."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            # An answer is on its way: nothing can be said in between.
            self.transport.abort()
            return
        text = f"{status.phrase}\n".encode()
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: text/plain\r\ncontent-length: {len(text)}"
        retry = "\r\nretry-after: 1" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
        self.transport.write(f"{head}{retry}\r\nconnection: close\r\n\r\n".encode() + text)
        self._linger_timer = self.loop.call_later(SECONDS_TO_LINGER, self.transport.abort)


def limited_protocol(
    limits: ConnectionLimits, wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app
) -> type[LimitedProtocol]:
    # Each connection is given the application; it is wrapped once.
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits, "wrap": staticmethod(cache(wrap))})


def connection_limits(arguments: ServeArguments) -> ConnectionLimits:
    """The limits of the flags, with no more connections than files may be open.

    Raises:
        UserError: a limit makes no sense.
    """
    problems = [
        f"--{name} is {getattr(arguments, name)}, it must be above 0."
        for name in ("max_connections", "max_header_bytes", "header_timeout", "body_timeout", "request_timeout")
        + ("max_request_bytes", "max_prompt_chars")
        if not getattr(arguments, name) > 0
    ]
    if problems:
        raise UserError("\n  ".join(problems))
    wanted = arguments.max_connections + len(os.listdir("/dev/fd")) + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    connections = arguments.max_connections
    if soft != resource.RLIM_INFINITY and soft < wanted:
        connections = max(1, arguments.max_connections - (wanted - soft))
        logger.warning(f"--max_connections {arguments.max_connections}: only {connections}, since ulimit -n is {hard}")
    return ConnectionLimits(arguments.max_header_bytes, arguments.header_timeout, connections)


def uvicorn_config(app: ASGIApp, arguments: ApiArguments, **options: Any) -> uvicorn.Config:
    """Settings of uvicorn with the limits of the flags. Errors are those of `connection_limits`."""
    return uvicorn.Config(
        app,
        http=limited_protocol(connection_limits(arguments)),
        ws="none",
        lifespan="off",
        server_header=False,
        log_config=None,
        access_log=False,
        root_path=arguments.root_path or "",
        forwarded_allow_ips=[each.strip() for each in arguments.forwarded_allow_ips.split(",")],
        ssl_certfile=arguments.ssl_certfile,
        ssl_keyfile=arguments.ssl_keyfile,
        **options,
    )


@contextmanager
def limited_uvicorn(arguments: ServeArguments, wrap: Callable[[ASGIApp], ASGIApp]) -> Iterator[None]:
    """Within it, a server whose settings are made elsewhere has the limits too: Gradio makes its own.

    Args:
        wrap: wraps the application in what must be outside of everything.
    """
    usual = HTTP_PROTOCOLS["auto"]
    HTTP_PROTOCOLS["auto"] = limited_protocol(connection_limits(arguments), wrap)
    try:
        yield
    finally:
        HTTP_PROTOCOLS["auto"] = usual
