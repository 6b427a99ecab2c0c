"""Who may ask: keys, passwords, Host headers, the size of bodies, and the address a server listens on.

The API, the small server and the web pages share these rules. Without a key or a password a server listens on this
machine alone and answers only requests that are addressed to it by a name of this machine. Otherwise a page of another
site could give its own name this address and reach the model through a visitor's browser (DNS rebinding).
"""

import asyncio
import base64
import hmac
import ipaddress
import os
import re
import socket
from collections.abc import Callable

from medicalgpt.args import ApiArguments, PageArguments, ServeArguments
from medicalgpt.errors import UserError

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# An IPv6 address in brackets or a name, and perhaps a port.
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([\w.-]+))(?::\d+)?")


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_from(arguments: ApiArguments) -> str | None:
    """The key that requests must carry, or None.

    Raises:
        UserError: the server would listen to other machines without one, or no client could send it.
    """
    key = arguments.api_key if arguments.api_key is not None else os.environ.get("MEDICALGPT_API_KEY")
    if key is None and not is_loopback(arguments.host):
        raise UserError(
            f"--host {arguments.host} would let other machines ask this model without a key.\nSet one "
            "(MEDICALGPT_API_KEY=... in the environment), or omit --host to serve this machine alone."
        )
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise UserError("The API key must be ASCII letters, digits and signs without spaces, at least one of them.")
    return key


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


class AccessMiddleware:
    """Passes a request on if it has the key or, without a key, is addressed to this machine; limits its body.

    Args:
        app: the ASGI application that is protected, all routes of it.
        refuse: makes the response to a refused request.
        key: the key of `Authorization: Bearer KEY`, or user:password of `Basic`; None asks for none.
        protection: what a server that other machines may reach is started with, for the message.
        max_body_bytes: most bytes of a body, whatever its headers say of its length; None for no limit.
        body_seconds: time within which the body must have arrived; None for no limit.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        refuse: Callable[[RequestRefused], Response],
        key: str | None = None,
        protection: str = "a key",
        max_body_bytes: int | None = None,
        body_seconds: float | None = None,
    ):
        self.app = app
        self.refuse = refuse
        self.key = key
        self.protection = protection
        self.max_body_bytes = max_body_bytes
        self.body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            self._admit(dict(scope["headers"]))
        except RequestRefused as refusal:
            await self.refuse(refusal)(scope, receive, send)
        else:
            await self.app(scope, self._limited(receive), send)

    def _admit(self, headers: dict[bytes, bytes]) -> None:
        if self.key is not None:
            # In constant time, so that a key cannot be guessed letter by letter.
            if not hmac.compare_digest(_key_in(headers.get(b"authorization", b"")), self.key.encode()):
                raise RequestRefused(
                    401,
                    "The API key is missing or wrong; send the header Authorization: Bearer KEY.",
                    "invalid_api_key",
                    {"WWW-Authenticate": "Bearer"},
                )
        elif not is_loopback(_host_of(headers.get(b"host", b""))):
            raise RequestRefused(
                403,
                "The Host header names another machine. Ask by 127.0.0.1 or localhost, or start the server with "
                f"{self.protection}.",
                "wrong_host",
            )

    def _limited(self, receive: Receive) -> Receive:
        size, complete = 0, False
        deadline = None if self.body_seconds is None else asyncio.get_running_loop().time() + self.body_seconds

        async def receive_limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise RequestRefused(408, "The body did not arrive in time.", "timeout") from error
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if self.max_body_bytes is not None and size > self.max_body_bytes:
                raise RequestRefused(413, f"The body has more than {self.max_body_bytes} bytes.", "request_too_large")
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


class ClientDisconnected(Exception):
    """The client has disconnected, so nobody waits for the answer."""


async def wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
