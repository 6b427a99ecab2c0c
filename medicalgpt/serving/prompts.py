"""Texts become tokens, off the event loop, and only if they are not too long."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

from medicalgpt.errors import UserError

# Texts with more characters take noticeable time; they wait for each other, so that short ones do not wait for them.
LONG_TEXT = 20_000


class PromptTooLargeError(UserError, ValueError):
    """A text has more characters than a server accepts."""


class PromptReader:
    """Turns prompts into token ids in threads of its own.

    A tokenizer needs about a second for half a million characters. Meanwhile others are served: the work is done off
    the event loop, long texts one after the other in a thread of their own, and one at a time of each client.

    Args:
        max_chars: maximum characters of a prompt with all of its turns.
    """

    def __init__(self, max_chars: int):
        self.max_chars = max_chars
        self._short = ThreadPoolExecutor(2, "short-prompts")
        self._long = ThreadPoolExecutor(1, "long-prompts")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def check(self, value: Any) -> int:
        """The number of characters. Raises PromptTooLargeError if there are too many."""
        chars = count_chars(value)
        if chars > self.max_chars:
            raise PromptTooLargeError(
                f"The prompt has {chars} characters, and at most {self.max_chars} are accepted (--max_prompt_chars)."
            )
        return chars

    async def read(self, client: str, value: Any, function: Callable[..., Any], *args: Any) -> Any:
        """The result of a function that tokenizes `value`, which it gets as its first argument.

        Raises:
            PromptTooLargeError: the value has too many characters; the function is not called.
        """
        chars = self.check(value)
        loop = asyncio.get_running_loop()
        if chars <= LONG_TEXT:
            return await loop.run_in_executor(self._short, function, value, *args)
        # Each loop has its own locks.
        turn = self._turns.setdefault(f"{id(loop)} {client}", asyncio.Lock())
        async with turn:
            return await loop.run_in_executor(self._long, function, value, *args)


def count_chars(value: Any) -> int:
    """Characters of all texts in a value, which is what JSON can hold; a token id counts as one."""
    return sum(1 if isinstance(part, int) else len(part) for part in _parts(value))


def _parts(value: Any) -> Iterator[str | int]:
    rest = [value]
    while rest:
        part = rest.pop()
        if isinstance(part, str | int):
            yield part
        elif isinstance(part, dict):
            rest += part
            rest += part.values()
        elif isinstance(part, list | tuple):
            rest += part
