"""Continuous batching of transformers: a model that generates on pages of a shared cache, in a thread of its own."""

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.serving.chat import ChatEngine, PromptTooLongError
from medicalgpt.serving.generation import AnswerState, GenerationRequest, plain_settings, refuse_nan

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput, RequestState

# Attention that a paged cache supports.
PAGED_LAYERS = {"full_attention", "sliding_attention"}
# Seconds until the cache must be there, or a token of a request that runs alone.
PATIENCE = 120.0
# On a CPU: tokens of a block of the cache, and tokens of all prompts that are computed in one step.
BLOCK_SIZE = 64
MAX_PREFILL_TOKENS = 1024


class PagedAnswer:
    """An answer from when it joins the batch until it leaves it.

    Attributes:
        state: the answer, which may have begun in an earlier batch.
    """

    def __init__(self, state: AnswerState):
        self.state = state
        self._lock = threading.Lock()
        self._paused = False
        self._chosen = 0
        self._received = 0

    def choose(self, scores: torch.Tensor, before: Callable[[], torch.Tensor]) -> None:
        """See `AnswerState.choose`; nothing is chosen any more once it is paused."""
        with self._lock:
            if self._paused:
                return
            self._chosen += 1
        self.state.choose(scores, before)

    def pause(self) -> None:
        """Choose no further tokens, so that none is chosen and then lost."""
        with self._lock:
            self._paused = True

    @property
    def is_complete(self) -> bool:
        """Whether all tokens have arrived that were chosen."""
        return self._received == self._chosen

    def receive(self, token_ids: Sequence[int]) -> None:
        """Add the new ones of all tokens since it joined the batch. Those after a pause were chosen by nobody."""
        for token_id in token_ids[self._received : self._chosen]:
            self._received += 1
            if not self.state.ended:
                self.state.add(token_id)


class PagedModel:
    """A model with a paged cache; several requests run in it at a time.

    Attributes:
        capacity: number of tokens that fit into the cache.

    Raises:
        UserError: there is no room for the cache.
    """

    def __init__(self, engine: ChatEngine, max_batch_size: int):
        self._engine = engine
        errors = []
        for size in _cache_sizes(engine, max_batch_size):
            if error := self._start(max_batch_size, size):
                errors.append(error)
            else:
                break
        else:
            raise UserError(f"No cache could be made for continuous batching: {errors[-1]}. Use --batching static.")
        self.capacity: int = self._manager.batch_processor.cache.num_pages

    def _start(self, max_batch_size: int, size: dict[str, Any]) -> str | None:
        """Start the thread that generates, with a cache of some size. Returns why that is not possible, if so."""
        self._manager = self._engine.model.init_continuous_batching(
            _plain_config(self._engine),
            ContinuousBatchingConfig(
                max_requests_per_batch=max_batch_size,
                # Each request chooses its token with its own settings, on the host, at every step.
                use_async_batching=False,
                use_cuda_graph=False,
                **size,
            ),
        )
        processor = self._manager.logit_processor
        processor.logits_processor.append(_PagedChooser())
        processor.supported_keys, processor.tensors_required, processor.do_processing = (
            {"paged_answer": PagedAnswer},
            1,
            True,
        )
        self._manager.start()
        deadline = time.monotonic() + PATIENCE
        while self._manager.batch_processor is None:
            if not self.running or time.monotonic() > deadline:
                error = self.error
                self.stop()
                return error
            time.sleep(0.01)
        return None

    @staticmethod
    def obstacles(engine: ChatEngine) -> list[str]:
        """Reasons why the model cannot be paged."""
        config = engine.model.config.get_text_config()
        layers = set(getattr(config, "layer_types", None) or ["full_attention"]) - PAGED_LAYERS
        reasons = [f"it has layers of the kind {', '.join(sorted(layers))}"] if layers else []
        if getattr(config, "kv_lora_rank", None):
            # The pages have room for keys and values of one width.
            reasons.append("its keys and values are compressed (kv_lora_rank)")
        return reasons

    @property
    def running(self) -> bool:
        """Whether the thread that generates is alive."""
        return self._manager.is_running()

    @property
    def error(self) -> str:
        """What has ended the thread."""
        return str(self._manager.background_thread_status.fatal_error or "generation has stopped")

    def require_room(self, request: GenerationRequest) -> None:
        """Raises PromptTooLongError if a prompt leaves no room for an answer in the cache."""
        if len(request.prompt_ids) >= self.capacity:
            raise PromptTooLongError(len(request.prompt_ids), self.capacity)

    def add(self, name: str, state: AnswerState) -> PagedAnswer:
        """Let an answer join the batch."""
        state.max_tokens = min(state.max_tokens, self.capacity - len(state.prompt_ids))
        answer = PagedAnswer(state)
        self._manager.add_request(
            state.ids,
            request_id=name,
            max_new_tokens=state.max_tokens - len(state.token_ids),
            streaming=True,
            paged_answer=answer,
        )
        return answer

    def cancel(self, name: str) -> None:
        self._manager.cancel_request(name)

    def next_output(self, seconds: float = 0.1) -> GenerationOutput | None:
        """The next output of any request; None if there is none after some time."""
        return self._manager.get_result(timeout=seconds)

    def answer(self, request: GenerationRequest) -> None:
        """Generate one answer while nothing else runs.

        Raises:
            RuntimeError: that fails.
        """
        self.add("trial", self._engine.begin(request))
        deadline = time.monotonic() + PATIENCE
        while self.running and time.monotonic() < deadline:
            output = self.next_output()
            if output is not None and output.error is None and output.is_finished():
                return
        raise RuntimeError(self.error)

    def stop(self) -> None:
        """End the thread, free the cache, and let the model attend as before."""
        self._manager.stop(block=True, hard_stop=True)


class _PagedChooser(ContinuousBatchingLogitsProcessor):
    """Lets each request choose its next token from the scores."""

    supported_kwargs = {"paged_answer": PagedAnswer}
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

            def before(state: RequestState = state) -> torch.Tensor:
                return torch.tensor([*state.initial_tokens, *state.generated_tokens], device=scores.device)

            state.logit_processor_kwargs["paged_answer"].choose(scores[number], before)
        return scores


def _cache_sizes(engine: ChatEngine, max_batch_size: int) -> Iterator[dict[str, Any]]:
    """Settings of the cache, the best first.

    By default nearly all free memory becomes cache, which would be all of the machine's on a CPU. There it is what the
    batch can fill, in at most a quarter of the memory, or a twentieth if that is not enough.
    """
    if engine.model.device.type == "cuda":
        yield {}
        return
    if engine.context_length is not None:
        blocks = max_batch_size * (-(-engine.context_length // BLOCK_SIZE) + 1)
        yield {
            "block_size": BLOCK_SIZE,
            "num_blocks": blocks,
            "max_batch_tokens": MAX_PREFILL_TOKENS,
            "max_memory_percent": 0.25,
        }
    yield {"max_memory_percent": 0.05}


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
