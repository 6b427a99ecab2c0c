"""What the HTTP servers and pages share: who may ask, which address is bound, clients that leave."""

import ipaddress
import os
import re
import socket
from urllib.parse import urlsplit

from medicalgpt.args import ApiArguments, ServeArguments
from medicalgpt.errors import UserError

from fastapi import Request


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_from(arguments: ApiArguments) -> str | None:
    """The key that requests must bear, or None.

    Raises:
        UserError: the server would listen to other machines without one, or no client could send it.
    """
    key = arguments.api_key if arguments.api_key is not None else os.environ.get("MEDICALGPT_API_KEY")
    if key is None and not is_loopback(arguments.host):
        raise UserError(
            f"--host {arguments.host} would let other machines ask this model without a key.\nSet one "
            "(MEDICALGPT_API_KEY=... in the environment), or leave --host out to serve this machine alone."
        )
    if key is not None and not re.fullmatch("[!-~]+", key):
        raise UserError("The API key must be letters, digits and signs of ASCII, without spaces, and at least one.")
    return key


def bound_socket(arguments: ServeArguments) -> socket.socket:
    """Take the port, without listening yet.

    Raises:
        UserError: it is taken, or not to be had.
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


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


def host_of(header: bytes) -> str:
    """The name or address in a Host header, or an empty string."""
    try:
        return urlsplit(f"//{header.decode('ascii')}").hostname or ""
    except ValueError:
        return ""


async def until_client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
