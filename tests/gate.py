"""A model that goes on step by step, at the word of a test."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Stands before each step of a model; `with gate.shut():` lets pass only what `allow` allows.

    Attributes:
        steps: steps that the model has taken since the gate was shut.
    """

    def __init__(self, model):
        self.steps = 0
        self._permits: threading.Semaphore | None = None
        model.register_forward_pre_hook(self)

    def __call__(self, *_):
        if (permits := self._permits) is not None:
            permits.acquire(timeout=60)
        self.steps += 1

    @contextmanager
    def shut(self) -> Iterator[None]:
        self.steps, self._permits = 0, threading.Semaphore(0)
        try:
            yield
        finally:
            permits, self._permits = self._permits, None
            permits.release(10_000)

    def allow(self, steps: int) -> None:
        self._permits.release(steps)
