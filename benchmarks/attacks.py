"""Attacks on a server while others use it: each is repeated until the end, and what comes of it is counted.

Every attacker has an address of its own, in the X-Forwarded-For header that a proxy would set; so do the clients.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np

# Connections that send nothing, and that send a byte of a header now and then.
IDLE = 200
SLOW = 50
MEGABYTE = 1 << 20
PIECE = b"x" * 65_536


@dataclass
class Attacker:
    """A client that means harm.

    Args:
        model: its name on the server.

    Attributes:
        outcomes: number of attacks by their name and what came of them: a status, `closed`, or `open`.
        health: seconds that each request to /health took.
    """

    url: str
    model: str
    outcomes: Counter[str] = field(default_factory=Counter)
    health: list[float] = field(default_factory=list)

    @contextmanager
    def going_on(self, attacking: bool) -> Iterator[None]:
        """A look at the server's health ten times a second and, if asked for, all attacks at the same time."""
        attacks = [self._watch()]
        if attacking:
            attacks += [self._repeat(name, attack) for name, attack in self._attacks().items()]
            attacks += [self._repeat("idle", self._idle) for _ in range(IDLE)]
            attacks += [self._repeat("slow header", self._slow) for _ in range(SLOW)]
        tasks = [asyncio.ensure_future(attack) for attack in attacks]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    def summary(self) -> dict[str, object]:
        """The outcomes, and the 50th, 95th and 99th percentile and the maximum of the seconds to /health."""
        health = self.health or [float("nan")]
        values = [*np.percentile(health, [50, 95, 99]).tolist(), max(health)]
        return {
            "health": dict(zip(("p50", "p95", "p99", "max"), values, strict=True)),
            "attacks": dict(sorted(self.outcomes.items())),
        }

    def _attacks(self) -> dict[str, Callable[[], Awaitable[str]]]:
        chat = {"model": self.model, "messages": [{"role": "user", "content": "x"}]}
        text = {"model": self.model, "prompt": "x"}
        bodies = {
            "long stop string": {**chat, "stop": "a" * 1_900_000},
            "long prompt": {**text, "prompt": "x" * 1_900_000},
            "many prompts": {**text, "prompt": ["x"] * 100_000},
            "wrong items": {**text, "prompt": [None] * 390_000},
            "wrong messages": {**chat, "messages": [{}] * 490_000},
            "long name of a field": {**chat, "y" * 1_900_000: 1},
            "many long answers": {**text, "prompt": ["x"] * 5, "n": 16, "temperature": 1, "max_tokens": 4096},
            "one long answer": {**text, "max_tokens": 4096},
        }
        found = {name: self._posting(number, json.dumps(body)) for number, (name, body) in enumerate(bodies.items())}
        endless = {
            "endless header": b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ",
            "endless URL": b"GET /",
            "endless trailer": b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ",
        }
        found |= {name: self._endless(opening) for name, opening in endless.items()}
        return found | {"body cut off": self._cut_off}

    async def _repeat(self, name: str, attack: Callable[[], Awaitable[str]]) -> None:
        while True:
            try:
                outcome = await attack()
            except OSError:
                outcome = "closed"
            self.outcomes[f"{name}: {outcome}"] += 1
            await asyncio.sleep(0.05)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            with suppress(OSError):
                await self._send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                self.health.append(loop.time() - began)
            await asyncio.sleep(0.1)

    def _posting(self, number: int, body: str) -> Callable[[], Awaitable[str]]:
        head = (
            "POST /v1/{}completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"X-Forwarded-For: 198.51.100.{number}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        ).format("chat/" if '"messages"' in body else "")
        return lambda: self._send((head + body).encode())

    def _endless(self, opening: bytes) -> Callable[[], Awaitable[str]]:
        async def attack() -> str:
            reader, writer = await self._connect()
            try:
                writer.write(opening)
                for _ in range(60 * MEGABYTE // len(PIECE)):
                    writer.write(PIECE)
                    await writer.drain()
                return _status(await reader.read(64))
            finally:
                writer.close()

        return attack

    async def _cut_off(self) -> str:
        _, writer = await self._connect()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(head + b"Content-Length: 1000\r\n\r\n{")
        await asyncio.sleep(0.1)
        writer.close()
        return "closed"

    async def _idle(self) -> str:
        reader, writer = await self._connect()
        try:
            return _status(await reader.read(64))
        finally:
            writer.close()

    async def _slow(self) -> str:
        reader, writer = await self._connect()
        try:
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
            while not reader.at_eof():
                writer.write(b"x")
                with suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        return _status(await reader.read(64))
            return "closed"
        finally:
            writer.close()

    async def _send(self, request: bytes) -> str:
        reader, writer = await self._connect()
        try:
            writer.write(request)
            status = _status(await reader.read(64))
            while await reader.read(65_536):
                pass
            return status
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        address = urlsplit(self.url)
        return await asyncio.open_connection(address.hostname, address.port)


def _status(head: bytes) -> str:
    return head.split()[1].decode("latin-1") if head.startswith(b"HTTP/1.1 ") else "closed"
