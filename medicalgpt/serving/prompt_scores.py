"""Log-probabilities of the tokens of prompts, for measures such as those of multiple choice."""

import copy
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import TokenScore

import torch

# Scores that are in memory at a time, of four bytes each.
MAX_SCORES = 2**26


class PromptScorer:
    """Reads prompts one after the other, in a thread of its own, while the model generates answers.

    It has the model's weights, and modules of its own: those that generate may attend to pages, and have one of
    several adapters switched on.

    Args:
        engine: before a batcher uses it.
    """

    def __init__(self, engine: ChatEngine):
        self._thread = ThreadPoolExecutor(1, "prompt-scores")
        self._lock = threading.Lock()
        self.renew(engine)

    def renew(self, engine: ChatEngine) -> None:
        """Take over modules that the model has got, those of a new adapter."""
        weights = itertools.chain(engine.model.parameters(), engine.model.buffers())
        model = copy.deepcopy(engine.model, {id(weight): weight for weight in weights}).eval()
        with self._lock:
            self._model = model

    def close(self) -> None:
        """Read no further prompt, and return when none is being read."""
        self._thread.shutdown(cancel_futures=True)

    def submit(self, engine: ChatEngine, prompt_ids: Sequence[int], top: int) -> "Future[list[TokenScore]]":
        """Read a prompt when it is its turn, see `scores`. Cancelling the future takes it out of the queue."""
        return self._thread.submit(self.scores, engine, prompt_ids, top)

    def scores(self, engine: ChatEngine, prompt_ids: Sequence[int], top: int) -> list[TokenScore]:
        """The log-probability of each token of a prompt but the first, given those before.

        Args:
            engine: the one with the adapter that reads the prompt.
            top: number of the most likely tokens to return in each place.
        """
        found: list[TokenScore] = []
        with self._lock, engine.adapter_on(self._model), torch.no_grad():
            model = self._model
            device = model.device
            ids = torch.tensor([list(prompt_ids)], device=device)
            rows = max(16, MAX_SCORES // model.config.get_text_config().vocab_size)
            cache = None
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                # The last token scores nothing.
                for start in range(0, ids.shape[1] - 1, rows):
                    part = ids[:, start : min(start + rows, ids.shape[1] - 1)]
                    several = ids.shape[1] - 1 > rows
                    output = model(input_ids=part, past_key_values=cache, use_cache=several)
                    cache = output.past_key_values if several else None
                    targets = ids[0, start + 1 : start + 1 + part.shape[1]]
                    found += _scores(output.logits[0].float().log_softmax(-1), targets, top)
        return found


def _scores(log_probs: torch.Tensor, targets: torch.Tensor, top: int) -> list[TokenScore]:
    """log_probs: (length, vocabulary); targets: (length,)."""
    own = log_probs.gather(1, targets[:, None])[:, 0].tolist()
    best = log_probs.topk(min(top, log_probs.shape[1]), dim=-1)
    return [
        TokenScore(token_id, log_prob, tuple(zip(ids, values, strict=True)))
        for token_id, log_prob, ids, values in zip(
            targets.tolist(), own, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
