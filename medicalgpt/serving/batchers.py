"""Concurrent requests to one model, answered in batches.

A model answers sixteen conversations in little more time than one. A `Batcher` takes requests from any thread and
returns a future for each. `StaticBatcher` answers the queued requests together and admits the next ones when all of
them are done. `ContinuousBatcher` admits at every token, through the paged attention of transformers, which is made for
CUDA.
"""

import copy
import dataclasses
import itertools
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial

from medicalgpt.args import ServeArguments
from medicalgpt.errors import UserError
from medicalgpt.serving.chat import ChatEngine, settle
from medicalgpt.serving.generation import Answer, AnswerState, GenerationRequest, plain_settings, refuse_nan

import torch
from loguru import logger
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput

# Attention that a paged cache supports.
PAGED_LAYERS = {"full_attention", "sliding_attention"}


class QueueFullError(RuntimeError):
    """The queue is full.

    Attributes:
        waiting: number of queued requests.
    """

    def __init__(self, waiting: int):
        super().__init__(f"{waiting} requests wait already. Try again in a moment.")
        self.waiting = waiting


class BatcherClosedError(RuntimeError):
    """The batcher no longer takes requests."""


class Batcher(ABC):
    """Answers concurrent requests with one model.

    Args:
        engine: the model.
        max_batch_size: maximum number of answers that are generated together.
        max_waiting: maximum number of queued requests.

    Raises:
        ValueError: a limit is below 1.
    """

    def __init__(self, engine: ChatEngine, max_batch_size: int = 16, max_waiting: int = 64):
        for name, value in (("max_batch_size", max_batch_size), ("max_waiting", max_waiting)):
            if value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1.")
        self.engine = engine
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        self._changed = threading.Condition()
        self._closed = False

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Number of queued requests: nothing has been generated for them yet."""

    @property
    @abstractmethod
    def running(self) -> int:
        """Number of answers that are being generated."""

    @abstractmethod
    def _admit(self, jobs: Sequence[tuple[GenerationRequest, "Future[Answer]"]]) -> None:
        """Queue requests; called under the lock."""

    @abstractmethod
    def _join(self) -> None:
        """Wait until nothing is being generated."""

    @abstractmethod
    def _cancel_all(self) -> None:
        """Cancel queued and running requests; called under the lock."""

    def submit(self, request: GenerationRequest) -> "Future[Answer]":
        """Queue one request.

        Args:
            request: its `on_text` is called in the thread that generates all answers, so it must be quick. `on_end`,
                `cancelled` and `on_error` are set here.

        Returns:
            The future answer. Cancelling it frees its place in the batch at the next token.

        Raises:
            QueueFullError: too many requests are queued.
            BatcherClosedError: after `close`.
        """
        return self.submit_many([request])[0]

    def submit_many(self, requests: Sequence[GenerationRequest]) -> list["Future[Answer]"]:
        """Queue several requests, all of them or none. Errors are those of `submit`."""
        admitted: list[tuple[GenerationRequest, Future[Answer]]] = []
        for request in requests:
            future: Future[Answer] = Future()
            bound = dataclasses.replace(
                request,
                on_end=partial(settle, future),
                cancelled=future.cancelled,
                on_error=lambda error, future=future: settle(future, error=error),
            )
            admitted.append((bound, future))
        with self._changed:
            if self._closed:
                raise BatcherClosedError("The server is stopping and takes no new requests.")
            free = self.max_waiting + max(0, self.max_batch_size - self.running) - self.waiting
            if len(requests) > free:
                raise QueueFullError(self.waiting)
            self._admit(admitted)
            self._changed.notify_all()
        return [future for _, future in admitted]

    def close(self, finish: bool = True) -> None:
        """Take no new requests, and return when nothing is being generated.

        Args:
            finish: answer queued and running requests first; otherwise they are cancelled.
        """
        with self._changed:
            self._closed = True
            if not finish:
                self._cancel_all()
            self._changed.notify_all()
        self._join()

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close(finish=False)


class StaticBatcher(Batcher):
    """Answers the queued requests together; the next are admitted when each of these has its answer.

    One adapter answers a batch: that of the request that has waited longest.
    """

    def __init__(self, engine: ChatEngine, max_batch_size: int = 16, max_waiting: int = 64):
        super().__init__(engine, max_batch_size, max_waiting)
        self._queue: deque[tuple[GenerationRequest, Future[Answer]]] = deque()
        self._batch: list[tuple[GenerationRequest, Future[Answer]]] = []
        self._thread = threading.Thread(target=self._work, name="StaticBatcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return sum(not future.done() for _, future in tuple(self._queue))

    @property
    def running(self) -> int:
        return sum(not future.done() for _, future in tuple(self._batch))

    def _admit(self, jobs: Sequence[tuple[GenerationRequest, "Future[Answer]"]]) -> None:
        self._queue.extend(jobs)

    def _join(self) -> None:
        self._thread.join()

    def _cancel_all(self) -> None:
        for _, future in (*self._queue, *self._batch):
            future.cancel()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                batch = self._batch = self._next_batch()
                if not batch and self._closed and not self._queue:
                    return
            if batch:
                self._answer(batch)

    def _next_batch(self) -> list[tuple[GenerationRequest, "Future[Answer]"]]:
        batch: list[tuple[GenerationRequest, Future[Answer]]] = []
        others: deque[tuple[GenerationRequest, Future[Answer]]] = deque()
        while self._queue and len(batch) < self.max_batch_size:
            job = self._queue.popleft()
            if not job[1].cancelled():
                same = not batch or job[0].adapter == batch[0][0].adapter
                (batch if same else others).append(job)
        self._queue.extendleft(reversed(others))
        return batch

    def _answer(self, batch: Sequence[tuple[GenerationRequest, "Future[Answer]"]]) -> None:
        try:
            engine = self.engine.siblings.get(batch[0][0].adapter, self.engine)
            engine.generate([request for request, _ in batch])
        except BaseException as error:
            # The thread continues: what broke this batch need not break the next one.
            logger.opt(exception=error).debug("a batch failed")
            for _, future in batch:
                settle(future, error=error)


class ContinuousBatcher(Batcher):
    """Admits a queued request as soon as an answer ends, at any token.

    transformers schedules the requests and runs the model on pages of a shared cache; each request's `AnswerState`
    chooses its tokens, so an answer is the one that `ChatEngine.chat` gives. Until the batcher is closed, the model
    uses paged attention and can be used through the batcher only.

    Raises:
        UserError: the model has layers that the library cannot page.
    """

    def __init__(self, engine: ChatEngine, max_batch_size: int = 16, max_waiting: int = 64):
        super().__init__(engine, max_batch_size, max_waiting)
        if reasons := continuous_obstacles(engine):
            raise UserError(
                f"Continuous batching cannot serve this model: {'; '.join(reasons)}. Use --batching static."
            )
        self._jobs: dict[str, tuple[AnswerState, Future[Answer]]] = {}
        self._numbers = itertools.count()
        self._manager = engine.model.init_continuous_batching(
            _plain_config(engine),
            ContinuousBatchingConfig(
                max_requests_per_batch=max_batch_size,
                # Each request chooses its token with its own settings, on the host, at every step.
                use_async_batching=False,
                use_cuda_graph=False,
                # By default nearly all free memory becomes cache, which would be all of the machine's on a CPU.
                max_memory_percent=None if engine.model.device.type == "cuda" else 0.05,
            ),
        )
        processor = self._manager.logit_processor
        processor.logits_processor.append(_PagedChooser())
        processor.supported_keys, processor.tensors_required, processor.do_processing = (
            {"answer_state": AnswerState},
            1,
            True,
        )
        self._manager.start()
        self._thread = threading.Thread(target=self._deliver, name="ContinuousBatcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return max(0, len(self._jobs) - self.max_batch_size)

    @property
    def running(self) -> int:
        return min(len(self._jobs), self.max_batch_size)

    def _admit(self, jobs: Sequence[tuple[GenerationRequest, "Future[Answer]"]]) -> None:
        for request, future in jobs:
            name = str(next(self._numbers))
            state = self.engine.begin(request)
            self._jobs[name] = state, future
            self._manager.add_request(
                list(request.prompt_ids),
                request_id=name,
                max_new_tokens=state.max_tokens,
                streaming=True,
                answer_state=state,
            )
            future.add_done_callback(lambda future, name=name: self._forget(name))

    def _forget(self, name: str) -> None:
        with self._changed:
            if self._jobs.pop(name, None) is not None:
                self._manager.cancel_request(name)
            self._changed.notify_all()

    def _join(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)
        self._manager.stop(block=True)
        self._thread.join()

    def _cancel_all(self) -> None:
        for _, future in tuple(self._jobs.values()):
            future.cancel()

    def _deliver(self) -> None:
        """Pass each new token to its request, until the manager has stopped."""
        while not self._closed or self._jobs:
            output = self._manager.get_result(timeout=0.1)
            if output is not None:
                self._take(output)
            elif not self._manager.is_running():
                error = self._manager.background_thread_status.fatal_error or RuntimeError("generation has stopped")
                with self._changed:
                    self._closed = True
                    futures = [future for _, future in self._jobs.values()]
                for future in futures:
                    settle(future, error=error)
                return

    def _take(self, output: GenerationOutput) -> None:
        # A request that the manager has finished must not be cancelled there.
        find = self._jobs.pop if output.is_finished() else self._jobs.get
        state, future = find(output.request_id, (None, None))
        if state is None:
            return
        if output.error is not None:
            settle(future, error=RuntimeError(output.error))
            return
        # Under load, an output may hold more than one new token.
        for token_id in output.generated_tokens[len(state.token_ids) :]:
            if not state.ended:
                state.add(token_id)
        with self._changed:
            self._changed.notify_all()


class _PagedChooser(ContinuousBatchingLogitsProcessor):
    """Lets each request choose its next token from the scores."""

    supported_kwargs = {"answer_state": AnswerState}
    ignored_kwargs = ()

    def __init__(self) -> None:
        self._states: list[FutureRequestState] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        """Keep the requests in the order of the coming scores; the tensor itself is not used."""
        self._states = list(requests_with_new_token)
        return torch.zeros(len(self._states), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """scores: (requests, vocabulary), float32, possibly with padding rows at the end."""
        refuse_nan(scores[: len(self._states)])
        for number, future_state in enumerate(self._states):
            state = future_state.state
            before = torch.tensor([*state.initial_tokens, *state.generated_tokens], device=scores.device)
            state.logit_processor_kwargs["answer_state"].choose(scores[number], before)
        return scores


def _plain_config(engine: ChatEngine) -> GenerationConfig:
    """The checkpoint's generation settings without those that choose tokens: requests do so themselves."""
    config = copy.deepcopy(engine.model.generation_config)
    config.update(
        **plain_settings(),
        stop_strings=None,
        max_length=None,
        max_new_tokens=None,
        max_time=None,
        eos_token_id=sorted(engine.stop_ids) or -1,
    )
    return config


def continuous_obstacles(engine: ChatEngine) -> list[str]:
    """Reasons why continuous batching would not give the model's own answers; empty if it does."""
    config = engine.model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"]) - PAGED_LAYERS
    reasons = [f"it has layers of the kind {', '.join(sorted(layers))}"] if layers else []
    reasons += ["it is shown images"] if engine.vision else []
    return reasons + (["its adapters are switched by name"] if engine.siblings else [])


def batcher_from(engine: ChatEngine, arguments: ServeArguments) -> Batcher:
    """The batcher that the flags request. Errors are those of `make_batcher`."""
    return make_batcher(
        engine,
        batching=arguments.batching,
        max_batch_size=arguments.max_batch_size,
        max_waiting=arguments.max_waiting,
    )


def make_batcher(
    engine: ChatEngine, *, batching: str = "auto", max_batch_size: int = 16, max_waiting: int = 64
) -> Batcher:
    """The batcher that `--batching` names: static, continuous, or auto, which is continuous on CUDA where possible.

    Raises:
        UserError: continuous batching is requested and the model does not support it, or a limit is below 1.
    """
    if batching == "auto":
        batching = "continuous" if engine.model.device.type == "cuda" and not continuous_obstacles(engine) else "static"
    kind = {"static": StaticBatcher, "continuous": ContinuousBatcher}[batching]
    try:
        return kind(engine, max_batch_size, max_waiting)
    except ValueError as error:
        raise UserError(f"--{error}") from error
