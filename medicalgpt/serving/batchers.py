"""Concurrent requests to one model, answered in batches.

A model answers sixteen conversations in little more time than one. A `Batcher` takes requests from any thread and
returns a future for each. Requests join a running batch, and leave it, at any token: in `ContinuousBatcher` through the
paged attention of transformers, which most models support; in `StaticBatcher` with a padded cache, which is faster on
CPUs, or, for all other models, by computing the batch again. `Schedule` decides who is next.
"""

import dataclasses
import itertools
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.serving.arguments import ServeArguments
from medicalgpt.serving.chat import ChatEngine, settle
from medicalgpt.serving.generation import Answer, GenerationRequest, Sampling
from medicalgpt.serving.paged import PagedAnswer, PagedModel
from medicalgpt.serving.prompt_scores import PromptScorer
from medicalgpt.serving.running_batch import RunningBatch
from medicalgpt.serving.schedule import Job, QueueFullError, Schedule

import psutil
from loguru import logger

# How often, and with how many seconds in between, a model that has failed is tried before it is given up.
TRIALS = 3
SECONDS_BETWEEN_TRIALS = 1.0
# A batch runs this many times as long as it took to compute the prompts that joined it before others join, so that
# prompts cost at most a quarter of the time.
PAYS_OFF = 3
# Share of a machine's memory that a full batch of the longest answers may take when it is padded.
PADDED_SHARE = 0.25


class BatcherClosedError(RuntimeError):
    """The batcher no longer takes requests."""


class ModelFailedError(RuntimeError):
    """The model cannot answer any more."""


class Batcher(ABC):
    """Answers concurrent requests with one model.

    Args:
        engine: the model.
        max_batch_size: maximum number of answers that are generated together.
        max_waiting: maximum number of queued requests.
        stall_seconds: time without a token, while answers are being generated, after which `problem` says so.

    Attributes:
        failure: why the model cannot answer any more; None as long as it can.
        scorer: gives the log-probabilities of prompts.

    Raises:
        ValueError: a limit is below 1.
    """

    def __init__(
        self, engine: ChatEngine, max_batch_size: int = 16, max_waiting: int = 64, stall_seconds: float = 300.0
    ):
        for name, value in (("max_batch_size", max_batch_size), ("max_waiting", max_waiting)):
            if value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1.")
        self.engine = engine
        # Before the model attends to pages.
        self.scorer = PromptScorer(engine)
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        self.stall_seconds = stall_seconds
        self.failure: str | None = None
        self._changed = threading.Condition()
        self._schedule = Schedule(max_batch_size, max_waiting)
        self._closed = False
        self._last_step = time.monotonic()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._guarded, name=type(self).__name__, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of queued requests: nothing is being generated for them."""
        return sum(not job.future.done() for job in tuple(self._schedule.waiting))

    @property
    def running(self) -> int:
        """Number of answers that are being generated."""
        return sum(not job.future.done() for job in tuple(self._schedule.running))

    def load_of(self, adapter: str | None) -> tuple[int, int]:
        """Running answers, and queued requests, of the engine of this name."""

        def count(jobs: list[Job]) -> int:
            return sum(job.request.adapter == adapter and not job.future.done() for job in tuple(jobs))

        return count(self._schedule.running), count(self._schedule.waiting)

    @property
    def problem(self) -> str | None:
        """What keeps the model from answering; None if nothing does."""
        if self.failure is None and not self._closed and not self._thread.is_alive():
            return "The thread that generates has ended."
        idle = time.monotonic() - self._last_step
        if self.failure is None and self.running and idle > self.stall_seconds:
            return f"The model has generated nothing for {idle:.0f} seconds."
        return self.failure

    def submit(self, request: GenerationRequest) -> "Future[Answer]":
        """Queue one request.

        Args:
            request: its `on_text` is called in the thread that generates all answers, so it must be quick. `on_end`,
                `cancelled` and `on_error` are set here.

        Returns:
            The future answer. Cancelling it frees its place in the batch at the next token. It ends with
            `QueueFullError` if the queue is full later, other clients want a place, and this client has the most.

        Raises:
            QueueFullError: too many requests are queued.
            BatcherClosedError: after `close`.
            ModelFailedError: the model cannot answer any more.
        """
        return self.submit_many([request])[0]

    def submit_many(self, requests: Sequence[GenerationRequest]) -> list["Future[Answer]"]:
        """Queue several requests of one client, all of them or none. Errors are those of `submit`."""
        jobs: list[Job] = []
        for request in requests:
            future: Future[Answer] = Future()
            bound = dataclasses.replace(
                request,
                on_end=partial(settle, future),
                cancelled=future.cancelled,
                on_error=lambda error, future=future: settle(future, error=error),
            )
            jobs.append(Job(bound, future))
        with self._changed:
            if self.failure is not None:
                raise ModelFailedError(self.failure)
            if self._closed:
                raise BatcherClosedError("The server is stopping and takes no new requests.")
            if not self._schedule.running:
                self._last_step = time.monotonic()
            dropped = self._schedule.add(jobs)
            for job in jobs:
                job.future.add_done_callback(partial(self._ended, job))
            self._fill()
            self._changed.notify_all()
        for job in dropped:
            settle(job.future, error=QueueFullError(self.waiting, crowding=True))
        return [job.future for job in jobs]

    def close(self, finish: bool = True) -> None:
        """Take no new requests, and return when nothing is being generated.

        Args:
            finish: answer queued and running requests first; otherwise they are cancelled.
        """
        with self._changed:
            self._closed = True
            jobs = [] if finish else [*self._schedule.running, *self._schedule.waiting]
            self._changed.notify_all()
        for job in jobs:
            job.future.cancel()
        self._thread.join()
        self.scorer.close()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close(finish=False)

    @abstractmethod
    def _fill(self) -> None:
        """Let waiting jobs begin if that is possible at any time; called under the lock."""

    def _ended(self, job: Job, future: "Future[Answer]") -> None:
        """The answer to a job is complete, has failed, or is not wanted any more."""
        with self._changed:
            self._changed.notify_all()

    @abstractmethod
    def _work(self) -> None:
        """Generate until the batcher is closed and nothing is left to do."""

    @abstractmethod
    def _try(self) -> None:
        """Generate one token; raises an error if that fails."""

    def _guarded(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._give_up(error)

    def _fail_batch(self, error: BaseException | str) -> None:
        """Fail the jobs of the batch, and the batcher itself if the model does not answer any more."""
        logger.opt(exception=error if isinstance(error, BaseException) else None).error("a batch failed")
        with self._changed:
            failed, self._schedule.running = self._schedule.running, []
        for job in failed:
            # Without the traceback, whose frames hold tensors.
            settle(job.future, error=RuntimeError(str(error)))
        error = None
        for _ in range(TRIALS):
            try:
                self._try()
                return
            except Exception as again:
                error = again
                time.sleep(SECONDS_BETWEEN_TRIALS)
        self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        logger.opt(exception=error).critical("the model cannot answer any more")
        with self._changed:
            self.failure = f"The model has failed ({type(error).__name__}) and does not recover."
            jobs = [*self._schedule.running, *self._schedule.waiting]
            self._schedule.running, self._schedule.waiting = [], []
        for job in jobs:
            settle(job.future, error=ModelFailedError(self.failure))

    def _probe(self) -> GenerationRequest:
        """The shortest request."""
        return GenerationRequest([min(self.engine.stop_ids, default=0)], Sampling(max_new_tokens=1))


class StaticBatcher(Batcher):
    """Requests join the running batch, and leave it, at any token; the cache is padded to the longest (`RunningBatch`).

    Where the model's cache does not allow that, and for images, the batch is interrupted for a request that can join,
    and computed again together with it. One adapter answers a batch; a request to another one interrupts it too.
    """

    def __init__(
        self, engine: ChatEngine, max_batch_size: int = 16, max_waiting: int = 64, stall_seconds: float = 300.0
    ):
        super().__init__(engine, max_batch_size, max_waiting, stall_seconds)
        # The model that was used last, and its batch.
        self._running_batch: tuple[Any, RunningBatch | None] | None = None
        self._start()

    def _work(self) -> None:
        while self.failure is None:
            with self._changed:
                self._changed.wait_for(lambda: self._unfinished() or self._closed)
                if not self._unfinished():
                    return
                batch = self._next_batch()
            try:
                self._generate(batch)
            except Exception as error:
                self._fail_batch(error)

    def _fill(self) -> None:
        """The thread takes them when it forms the next batch."""

    def _unfinished(self) -> bool:
        schedule = self._schedule
        schedule.forget_ended()
        schedule.running = [job for job in schedule.running if not job.future.done()]
        return bool(schedule.running or schedule.waiting)

    def _next_batch(self) -> list[Job]:
        schedule = self._schedule
        if schedule.running and self._other_adapter_waits():
            for job in tuple(schedule.running):
                schedule.suspend(job)
        while (job := schedule.to_suspend()) is not None:
            schedule.suspend(job)
            # Its place is for the one that it was suspended for.
            schedule.take_next(self._fits)
        while schedule.take_next(self._fits) is not None:
            pass
        return list(schedule.running)

    def _fits(self, job: Job) -> bool:
        running = self._schedule.running
        return not running or job.request.adapter == running[0].request.adapter

    def _other_adapter_waits(self) -> bool:
        return any(not self._fits(job) for job in self._schedule.waiting)

    def _generate(self, batch: Sequence[Job]) -> None:
        name = batch[0].request.adapter
        engine = self.engine.siblings.get(name) if self.engine.siblings else self.engine
        if engine is None:
            for job in batch:
                settle(job.future, error=UserError(f"The adapter {name} has been unloaded."))
            return
        for job in batch:
            job.state = job.state or engine.begin(job.request)
        began = time.monotonic()
        first: float | None = None

        def pause() -> bool:
            nonlocal first
            now = self._last_step = time.monotonic()
            if first is None:
                first = now
            if now - first < PAYS_OFF * (first - began):
                return False
            with self._changed:
                self._schedule.forget_ended()
                if not self._schedule.waiting:
                    return False
                room = sum(not job.future.done() for job in batch) < self.max_batch_size
                return self._other_adapter_waits() or room or self._schedule.to_suspend() is not None

        engine.extend([job.state for job in batch], pause, self._batch_on(engine, batch))

    def _batch_on(self, engine: ChatEngine, batch: Sequence[Job]) -> RunningBatch | None:
        """What the model has computed of the batch before; None if that cannot be kept."""
        if any(job.request.pictures for job in batch):
            self._running_batch = None
            return None
        user = engine, engine.model
        if self._running_batch is None or self._running_batch[0] != user:
            possible = not RunningBatch.obstacles(engine.model)
            self._running_batch = user, RunningBatch(engine.model) if possible else None
        return self._running_batch[1]

    def _try(self) -> None:
        # The first engine may be that of an adapter that has been unloaded.
        engine = next(iter(self.engine.siblings.values()), self.engine)
        engine.generate([self._probe()])


class ContinuousBatcher(Batcher):
    """Admits a queued request as soon as an answer ends, at any token.

    transformers runs the model on pages of a shared cache; each request's `AnswerState` chooses its tokens, so an
    answer is the one that `ChatEngine.chat` gives. Until the batcher is closed, the model uses paged attention and can
    be used through the batcher only. If a forward pass fails, the requests in it fail, and a new cache is made.

    Raises:
        UserError: the model has layers that the library cannot page, or no memory is left for the cache.
    """

    def __init__(
        self, engine: ChatEngine, max_batch_size: int = 16, max_waiting: int = 64, stall_seconds: float = 300.0
    ):
        super().__init__(engine, max_batch_size, max_waiting, stall_seconds)
        if reasons := continuous_obstacles(engine):
            raise UserError(
                f"Continuous batching cannot serve this model: {'; '.join(reasons)}. Use --batching static."
            )
        self._numbers = itertools.count()
        # By the name that they have in the paged model, which is another one each time that they join the batch.
        self._jobs: dict[str, tuple[Job, PagedAnswer]] = {}
        self._paged = PagedModel(engine, max_batch_size)
        self._start()

    def submit_many(self, requests: Sequence[GenerationRequest]) -> list["Future[Answer]"]:
        for request in requests:
            self._paged.require_room(request)
        return super().submit_many(requests)

    def _fill(self) -> None:
        schedule = self._schedule
        if not self._paged.running:
            return
        while (job := schedule.to_suspend()) is not None:
            job.leaving = True
            answer = next(answer for each, answer in self._jobs.values() if each is job)
            answer.pause()
            self._suspend_if_complete(job, answer)
        while (job := schedule.take_next()) is not None:
            job.state = job.state or self.engine.begin(job.request)
            name = str(next(self._numbers))
            self._jobs[name] = job, self._paged.add(name, job.state)

    def _suspend_if_complete(self, job: Job, answer: PagedAnswer) -> None:
        """Suspend a job that is leaving once each token that was chosen for it has arrived."""
        if job.leaving and answer.is_complete and not job.future.done():
            self._forget(job)
            self._schedule.suspend(job)

    def _ended(self, job: Job, future: "Future[Answer]") -> None:
        with self._changed:
            self._forget(job)
            if job in self._schedule.running:
                self._schedule.running.remove(job)
            self._fill()
        super()._ended(job, future)

    def _forget(self, job: Job) -> None:
        for name in [name for name, (each, _) in self._jobs.items() if each is job]:
            del self._jobs[name]
            self._paged.cancel(name)

    def _work(self) -> None:
        """Pass each new token to its request."""
        while self.failure is None:
            with self._changed:
                if self._closed and not self._schedule.running and not self._schedule.waiting:
                    break
            output = self._paged.next_output()
            if output is not None:
                self._take(output.request_id, output.generated_tokens, output.error, output.is_finished())
            elif not self._paged.running:
                with self._changed:
                    self._jobs.clear()
                self._fail_batch(self._paged.error)
                with self._changed:
                    self._fill()
        self._paged.stop()

    def _take(self, name: str, token_ids: Sequence[int], error: str | None, finished: bool) -> None:
        # A request that the paged model has finished must not be cancelled there.
        with self._changed:
            job, answer = (self._jobs.pop if finished else self._jobs.get)(name, (None, None))
        if job is None:
            return
        if error is not None:
            settle(job.future, error=RuntimeError(error))
            return
        self._last_step = time.monotonic()
        answer.receive(token_ids)
        with self._changed:
            self._suspend_if_complete(job, answer)
            if self._schedule.waiting:
                self._fill()
            self._changed.notify_all()

    def _try(self) -> None:
        with suppress(Exception):
            self._paged.stop()
        paged = PagedModel(self.engine, self.max_batch_size)
        try:
            paged.answer(self._probe())
        except BaseException:
            paged.stop()
            raise
        self._paged = paged


def continuous_obstacles(engine: ChatEngine) -> list[str]:
    """Reasons why continuous batching would not give the model's own answers; empty if it does."""
    reasons = PagedModel.obstacles(engine)
    reasons += ["it is shown images"] if engine.vision else []
    return reasons + (["its adapters are switched by name"] if engine.siblings else [])


def _static_is_better(engine: ChatEngine, max_batch_size: int) -> bool:
    """Whether continuous batching is not possible, or slower: on a CPU, unless padding could take much memory."""
    if continuous_obstacles(engine):
        return True
    if engine.model.device.type != "cpu" or engine.context_length is None or RunningBatch.obstacles(engine.model):
        return False
    most = max_batch_size * engine.context_length * RunningBatch.bytes_per_token(engine.model)
    return most <= PADDED_SHARE * psutil.virtual_memory().total


def batcher_from(engine: ChatEngine, arguments: ServeArguments) -> Batcher:
    """The batcher that the flags request. Errors are those of `make_batcher`."""
    return make_batcher(
        engine,
        batching=arguments.batching,
        max_batch_size=arguments.max_batch_size,
        max_waiting=arguments.max_waiting,
        stall_seconds=arguments.request_timeout,
    )


def make_batcher(
    engine: ChatEngine,
    *,
    batching: str = "auto",
    max_batch_size: int = 16,
    max_waiting: int = 64,
    stall_seconds: float = 300.0,
) -> Batcher:
    """The batcher that `--batching` names: static, continuous, or auto, the one that is faster where both are possible.

    Raises:
        UserError: continuous batching is requested and not possible, or a limit is below 1.
    """
    limits = max_batch_size, max_waiting, stall_seconds
    try:
        if batching == "static" or (batching == "auto" and _static_is_better(engine, max_batch_size)):
            return StaticBatcher(engine, *limits)
        try:
            return ContinuousBatcher(engine, *limits)
        except UserError as error:
            if batching != "auto":
                raise
            logger.warning(f"{error} This is done now.")
            return StaticBatcher(engine, *limits)
    except ValueError as error:
        raise UserError(f"--{error}") from error
