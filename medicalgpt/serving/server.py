"""How a server runs: flags are checked before a model is loaded, and it ends once the running answers are complete."""

import asyncio
import ipaddress
import re
import signal
import socket
import ssl
from collections.abc import Callable
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.serving.arguments import ApiArguments
from medicalgpt.serving.batchers import Batcher
from medicalgpt.serving.limits import connection_limits, uvicorn_config
from medicalgpt.serving.server_logs import ServerStatus

import uvicorn
from loguru import logger
from starlette.types import ASGIApp

# How long connections may take to close after the last answer.
SECONDS_TO_CLOSE = 5
# What a client is told that comes while the server is stopping: another connection may lead to another server.
STOPPING_HEADERS = {"Retry-After": "5", "Connection": "close"}


def check_server_flags(arguments: ApiArguments) -> None:
    """Raises UserError that names every flag of `ApiArguments` with a value that cannot be used."""
    problems = [*_tls_problems(arguments)]
    if not re.fullmatch(r"(/[\w.~-]+)*", arguments.root_path or ""):
        problems.append(f"--root_path {arguments.root_path} must be like /llm, with a slash at its beginning only.")
    for address in arguments.forwarded_allow_ips.split(","):
        try:
            ipaddress.ip_network(address.strip())
        except ValueError:
            problems.append(
                f"--forwarded_allow_ips: {address.strip()!r} is not an address or a network. Name those of the "
                "proxies, with commas (10.0.0.7,10.1.0.0/16); believed of everybody, any client could take any address."
            )
    if not arguments.stop_timeout >= 0:
        problems.append(f"--stop_timeout is {arguments.stop_timeout}, it must be 0 or more.")
    try:
        connection_limits(arguments)
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("\n  ".join(problems))


def _tls_problems(arguments: ApiArguments) -> list[str]:
    if arguments.ssl_certfile is None:
        return [] if arguments.ssl_keyfile is None else ["--ssl_keyfile has no effect without --ssl_certfile."]

    def refuse_password() -> str:
        raise ValueError("the private key is encrypted; decrypt it: openssl pkey -in KEY -out DECRYPTED")

    flags = f"--ssl_certfile {arguments.ssl_certfile}"
    flags += f" --ssl_keyfile {arguments.ssl_keyfile}" if arguments.ssl_keyfile else ""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(arguments.ssl_certfile, arguments.ssl_keyfile, refuse_password)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return [f"{flags} cannot be used: {reason}. Both are files in PEM, and belong to each other."]
    return []


class DrainingServer(uvicorn.Server):
    """uvicorn that ends once the requests that it has are answered.

    After SIGINT or SIGTERM it goes on listening, and refuses new requests, until the last one is answered or
    `--stop_timeout` has passed; then answers are cancelled, each with an error to its client. A second signal cancels
    them at once.

    Args:
        on_started: called when connections are accepted.
    """

    def __init__(
        self,
        app: ASGIApp,
        arguments: ApiArguments,
        *,
        batcher: Batcher,
        status: ServerStatus,
        listener: socket.socket,
        on_started: Callable[[], Any] = lambda: None,
    ):
        super().__init__(uvicorn_config(app, arguments, timeout_graceful_shutdown=SECONDS_TO_CLOSE))
        self.stop_timeout = arguments.stop_timeout
        self.batcher = batcher
        self.status = status
        self.listener = listener
        self.on_started = on_started

    def run(self) -> None:
        # A second signal may come at any time until the program has ended.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        super().run([self.listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.deadline: float | None = None
        await super().startup(sockets)
        self.on_started()

    async def on_tick(self, counter: int) -> bool:
        if self.status.stopping and self.deadline is None:
            self.deadline = self.loop.time() + self.stop_timeout
            logger.info(f"stopping: {self.status.active} requests are answered, for up to {self.stop_timeout:g} s")
        late = self.deadline is not None and self.loop.time() >= self.deadline
        if late and self.status.active:
            logger.warning(f"{self.status.active} requests are not answered in time")
            self.status.give_up()
        drained = self.status.stopping and not self.status.active
        # A model that does not recover is started again by whoever supervises the process.
        return await super().on_tick(counter) or drained or late or self.batcher.failure is not None

    def handle_exit(self, sig: int, frame: Any) -> None:
        # A second signal means: do not wait for the running answers.
        if self.status.stopping:
            self.loop.call_soon_threadsafe(self.status.give_up)
            self.should_exit = True
        self.status.stopping = True
