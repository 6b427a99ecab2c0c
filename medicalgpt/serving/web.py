"""Who may ask: keys, passwords, Host headers, the size of bodies, and the address a server listens on.

The API, the small server and the web pages share these rules. Without a key or a password a server listens on this
machine alone and answers only requests that are addressed to it by a name of this machine. Otherwise a page of another
site could give its own name this address and reach the model through a visitor's browser (DNS rebinding).
"""

import asyncio
import base64
import ipaddress
import math
import os
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from medicalgpt.errors import UserError
from medicalgpt.serving.arguments import ApiArguments, PageArguments, ServeArguments
from medicalgpt.serving.keys import ApiKeys

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Wrong keys that a client may send in a minute before it has to wait; of passwords, which are shorter, fewer.
WRONG_KEYS = 100
WRONG_PASSWORDS = 10
SECONDS_OF_FAILURES = 60.0
# Objects and lists of a body in JSON, brackets in its texts included: half a million of them are read as long as a
# second, in which nobody else is served.
MAX_ITEMS = 100_000
# Bodies of all requests that are being read or answered, as many bytes as 1,000 small ones may have. Images are kept
# until their request is answered.
MAX_BODY_BYTES = 2_000_000_000
# Number of clients whose failures are remembered.
MAX_CLIENTS = 10_000
# An IPv6 address in brackets or a name, and perhaps a port.
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::\d+)?")


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def keys_from(arguments: ApiArguments) -> ApiKeys | None:
    """The keys of which requests must carry one, or None.

    Raises:
        UserError: the server would listen to other machines without one, no client could send it, or the file of keys
            cannot be used.
    """
    key = arguments.api_key if arguments.api_key is not None else os.environ.get("MEDICALGPT_API_KEY")
    if key is None and arguments.api_keys_file is None and not is_loopback(arguments.host):
        raise UserError(
            f"--host {arguments.host} would let other machines ask this model without a key.\nSet one "
            "(MEDICALGPT_API_KEY=... in the environment, or --api_keys_file), or omit --host to serve this machine "
            "alone."
        )
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise UserError("The API key must be ASCII letters, digits and signs without spaces, at least one of them.")
    return ApiKeys(key, arguments.api_keys_file) if key is not None or arguments.api_keys_file is not None else None


def auth_from(arguments: PageArguments) -> tuple[str, str] | None:
    """User and password of a web page, or None.

    Raises:
        UserError: other people could reach the page without a password, or it is not user:password.
    """
    auth = arguments.auth or os.environ.get("MEDICALGPT_AUTH")
    if auth:
        user, _, password = auth.partition(":")
        if not (user and password):
            raise UserError("--auth (or MEDICALGPT_AUTH) must be user:password, with both parts.")
        return user, password
    if arguments.share or not is_loopback(arguments.host):
        flag = "--share True" if arguments.share else f"--host {arguments.host}"
        raise UserError(f"{flag} lets other people in: add --auth user:password, or set MEDICALGPT_AUTH to it.")
    return None


def bound_socket(arguments: ServeArguments) -> socket.socket:
    """Take the port, without listening yet.

    Raises:
        UserError: it is taken or cannot be used.
    """
    family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((arguments.host, arguments.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(
            f"--host {arguments.host} --port {arguments.port} cannot be listened on: {error}.\nGive another --port, or "
            "0 for a free one."
        ) from error
    return listener


def url_host(host: str) -> str:
    """The host as written in a URL, an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


class RequestRefused(HTTPException):
    """A request that is refused before the model sees it.

    Args:
        code: a word for programs, `invalid_api_key` for example.
    """

    def __init__(self, status: int, message: str, code: str, headers: dict[str, str] | None = None):
        super().__init__(status, message, headers)
        self.code = code


def client_of(scope: Scope) -> str:
    """Who sends a request: the name of its key, or its address; of IPv6 the network, all of which a client has.

    uvicorn takes the address from X-Forwarded-For if the request comes from a proxy that is trusted.
    """
    if name := scope.get("key_name"):
        return name
    host = scope["client"][0] if scope.get("client") else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))


class Failures:
    """Counts what clients got wrong, a key or a password, and refuses those that try too often.

    Args:
        allowed: failures within a minute; after these, nothing is tried until its end, be it right or wrong.
    """

    def __init__(self, allowed: int):
        self.allowed = allowed
        # The beginning of each client's minute, and its failures in it.
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def check(self, client: str) -> None:
        """Raises RequestRefused if the client has to wait."""
        began, count = self._counts.get(client, (0.0, 0))
        left = began + SECONDS_OF_FAILURES - time.monotonic()
        if count >= self.allowed and left > 0:
            raise RequestRefused(
                429, "Too many wrong keys or passwords.", "too_many_failures", {"Retry-After": str(math.ceil(left))}
            )

    def forget(self, client: str) -> None:
        self._counts.pop(client, None)

    def add(self, client: str) -> None:
        now = time.monotonic()
        began, count = self._counts.pop(client, (now, 0))
        self._counts[client] = (began, count + 1) if now - began < SECONDS_OF_FAILURES else (now, 1)
        while len(self._counts) > MAX_CLIENTS:
            self._counts.popitem(last=False)


def origins_from(allow_origins: str | None) -> list[str]:
    """The origins of --allow_origins. Raises UserError if a value is not one."""
    origins = [origin.strip() for origin in (allow_origins or "").split(",") if origin.strip()]
    for origin in origins:
        if not re.fullmatch(r"https?://[^/*\s]+", origin):
            raise UserError(
                f"--allow_origins: {origin!r} is not an origin. Name each site as a browser does, https://example.org "
                "or http://localhost:3000; a wildcard would let every page ask."
            )
    return origins


class OriginMiddleware:
    """Refuses requests that pages of other sites send: a browser names the origin of the page, and adds its cookies.

    Args:
        allowed: further origins; that of the application itself is the one in the Host header.
    """

    def __init__(self, app: ASGIApp, *, refuse: Callable[[RequestRefused], Response], allowed: Collection[str] = ()):
        self.app = app
        self.refuse = refuse
        self.allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and self._is_foreign(dict(scope["headers"]), scope.get("method")):
            refusal = RequestRefused(403, "Pages of other sites may not send requests.", "wrong_origin")
            await self.refuse(refusal)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _is_foreign(self, headers: dict[bytes, bytes], method: str | None) -> bool:
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin:
            # A link on another page may lead here; nothing else may.
            return headers.get(b"sec-fetch-site") == b"cross-site" and method not in ("GET", "HEAD")
        if origin in self.allowed:
            return False
        try:
            own = urlsplit(origin)
            # A proxy may have taken TLS off, so the scheme is not compared.
            named = {own.netloc.lower(), (own.hostname or "") if own.port in (None, 80, 443) else ""} - {""}
        except ValueError:
            return True
        return headers.get(b"host", b"").decode("latin-1").lower() not in named


@dataclass
class _Body:
    """How many bytes of a request's body have arrived."""

    size: int = 0


class AccessMiddleware:
    """Passes a request on if it has the key or, without a key, is addressed to this machine; limits its body.

    Args:
        app: the ASGI application that is protected, all routes of it.
        refuse: makes the response to a refused request.
        keys: the keys of `Authorization: Bearer KEY`, or user:password of `Basic`; None asks for none. The name of the
            key becomes `scope["key_name"]`.
        any_host: do not look at the Host header; the application itself asks for a password.
        protection: what a server that other machines may reach is started with, for the message.
        max_body_bytes: returns the most bytes of a request's body, whatever its headers say of its length.
        body_seconds: time within which the body must have arrived.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        refuse: Callable[[RequestRefused], Response],
        max_body_bytes: Callable[[Scope], int],
        body_seconds: float,
        keys: ApiKeys | None = None,
        any_host: bool = False,
        protection: str = "a key",
    ):
        self.app = app
        self.refuse = refuse
        self.keys = keys
        self.any_host = any_host
        self.failures = Failures(WRONG_KEYS)
        self.protection = protection
        self.max_body_bytes = max_body_bytes
        self.body_seconds = body_seconds
        self.bytes_held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            self._admit(scope, client_of(scope), dict(scope["headers"]))
        except RequestRefused as refusal:
            await self.refuse(refusal)(scope, receive, send)
        else:
            body = _Body()
            try:
                await self.app(scope, self._limited(scope, receive, body), send)
            finally:
                self.bytes_held -= body.size

    def _admit(self, scope: Scope, client: str, headers: dict[bytes, bytes]) -> None:
        if self.keys is not None:
            self.failures.check(client)
            scope["key_name"] = self.keys.name_of(_key_in(headers.get(b"authorization", b"")))
            if scope["key_name"] is None:
                self.failures.add(client)
                raise RequestRefused(
                    401,
                    "The API key is missing or wrong; send the header Authorization: Bearer KEY.",
                    "invalid_api_key",
                    {"WWW-Authenticate": "Bearer"},
                )
        elif not self.any_host and not is_loopback(_host_of(headers.get(b"host", b""))):
            raise RequestRefused(
                403,
                "The Host header names another machine. Ask by 127.0.0.1 or localhost, or start the server with "
                f"{self.protection}.",
                "wrong_host",
            )

    def _limited(self, scope: Scope, receive: Receive, body: "_Body") -> Receive:
        items, complete, max_bytes = 0, False, self.max_body_bytes(scope)
        is_json = b"json" in dict(scope["headers"]).get(b"content-type", b"")
        deadline = asyncio.get_running_loop().time() + self.body_seconds

        async def receive_limited() -> Message:
            nonlocal items, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise RequestRefused(408, "The body did not arrive in time.", "timeout") from error
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            arrived = len(message.get("body", b""))
            body.size += arrived
            self.bytes_held += arrived
            complete = not message.get("more_body", False)
            if is_json:
                items += sum(message.get("body", b"").count(opening) for opening in (b"{", b"["))
            if items > MAX_ITEMS:
                raise RequestRefused(400, f"The body has more than {MAX_ITEMS} lists and objects.", "too_many_items")
            if body.size > max_bytes:
                raise RequestRefused(413, f"The body has more than {max_bytes} bytes.", "request_too_large")
            if self.bytes_held > MAX_BODY_BYTES:
                raise RequestRefused(429, "Too many large requests at a time.", "queue_full", {"Retry-After": "5"})
            return message

        return receive_limited


def _key_in(header: bytes) -> bytes:
    """The key in an Authorization header, or nothing: `Bearer KEY`, or `Basic` with a key of the form user:password."""
    scheme, _, key = header.partition(b" ")
    if scheme.lower() == b"basic":
        try:
            key = base64.b64decode(key.strip(), validate=True)
        except ValueError:
            return b""
        return key if b":" in key else b""
    return key.strip() if scheme.lower() == b"bearer" else b""


def _host_of(header: bytes) -> str:
    """The name or address in a Host header, without port and brackets, or an empty string."""
    found = HOST.fullmatch(header.decode("latin-1"))
    return (found[1] or found[2]).lower() if found else ""


class ProbeMiddleware:
    """Answers `/live` and `/ready` to everybody, without a key, and says nothing else: for supervisors and balancers.

    Args:
        ready: whether the server can answer requests now.
    """

    def __init__(self, app: ASGIApp, *, ready: Callable[[], bool]):
        self.app = app
        self.probes: dict[str, Callable[[], bool]] = {"/live": lambda: True, "/ready": ready}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        probe = self.probes.get(path) if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") else None
        if probe is None:
            await self.app(scope, receive, send)
        else:
            response = PlainTextResponse("ok\n") if probe() else PlainTextResponse("not ready\n", 503)
            await response(scope, receive, send)


class ClientDisconnected(HTTPException):
    """The client has disconnected, so nobody waits for the answer. Counted as 499, as nginx does."""

    def __init__(self) -> None:
        super().__init__(499, "The client has left.")


async def settled(futures: Sequence[Future]) -> list[Any]:
    """The results of futures, or the first error. If nobody waits for them any more, they are cancelled."""
    waiting = [asyncio.wrap_future(future) for future in futures]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
        failed = [each for each in waiting if each.done() and (each.cancelled() or each.exception())]
        return [each.result() for each in failed or waiting]
    finally:
        for each in waiting:
            # asyncio complains of errors that nobody has looked at.
            each.cancel() or each.cancelled() or each.exception()


async def wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
