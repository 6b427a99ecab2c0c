"""A batch that answers join and leave at any token, with one cache that is padded on the left."""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from medicalgpt.serving.generation import AnswerState, refuse_nan

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# Rows of ended answers, per row that goes on, before the cache is copied without them.
ENDED_SHARE = 0.15


class RunningBatch:
    """The cache of the answers that a model generates together, kept from one call of `run` to the next.

    A cache has a row for each answer, as wide as the longest. An answer joins with a forward pass over its own tokens
    alone, and its row is dropped when it leaves, so that the others are not computed again. Sliding windows are applied
    by the attention mask, since their layers keep all tokens too.

    Raises:
        ValueError: `obstacles` names reasons.
    """

    def __init__(self, model: PreTrainedModel | PeftModel):
        if reasons := self.obstacles(model):
            raise ValueError("; ".join(reasons))
        self._model = _base(model)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(self._model) else {}
        self._clear()

    def _clear(self) -> None:
        self._states: list[AnswerState] = []
        # (rows, tokens); the newest token of each row, (rows, 1), is not in the cache yet.
        self._mask = torch.zeros((0, 0), dtype=torch.long, device=self._model.device)
        self._newest = torch.zeros((0, 1), dtype=torch.long, device=self._model.device)
        self._cache = DynamicCache()

    @staticmethod
    def obstacles(model: PreTrainedModel | PeftModel) -> list[str]:
        """Reasons why rows of the model's cache cannot be padded, joined and dropped; empty if they can."""
        if isinstance(model, PeftModel) and any(each.is_prompt_learning for each in model.peft_config.values()):
            return ["its adapter puts tokens of its own before the prompt"]
        if "position_ids" not in _parameters(_base(model)):
            return ["it takes no position_ids"]
        kinds = {type(layer) for layer in DynamicCache(config=model.config.get_text_config()).layers}
        others = kinds - {DynamicLayer, DynamicSlidingWindowLayer}
        return [f"its cache has layers of the kind {', '.join(sorted(kind.__name__ for kind in others))}"] * bool(
            others
        )

    @staticmethod
    def bytes_per_token(model: PreTrainedModel | PeftModel) -> int:
        """Size of a token's keys and values in all layers."""
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize

    @torch.no_grad()
    def run(self, states: Sequence[AnswerState], pause: Callable[[], bool]) -> None:
        """Continue these answers until all have ended, or until `pause`, called after each token, is True.

        Those of the call before that are not among them leave the batch; new ones join it.
        """
        try:
            new = [state for state in states if state not in self._states]
            if new or any(state not in states for state in self._states):
                self._keep([number for number, state in enumerate(self._states) if state in states])
            if new:
                self._join(new)
                if pause():
                    return
            while not self._is_over():
                self._step()
                if pause():
                    return
        except BaseException:
            self._clear()
            raise

    def _is_over(self) -> bool:
        """Drop the answers that have ended, once they are enough to pay for it; whether none is left."""
        open_rows = [number for number, state in enumerate(self._states) if not state.ended]
        if len(self._states) - len(open_rows) > ENDED_SHARE * len(open_rows):
            self._keep(open_rows)
        return not self._states

    def _join(self, states: Sequence[AnswerState]) -> None:
        device, tokens = self._mask.device, [state.ids for state in states]
        width = max(map(len, tokens))
        # Any token can be padding, since the mask hides it; one of a prompt is certainly in the vocabulary.
        input_ids = torch.full((len(states), width), tokens[0][0], dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for number, ids in enumerate(tokens):
            input_ids[number, width - len(ids) :] = torch.tensor(ids)
            mask[number, width - len(ids) :] = 1
        cache, mask = DynamicCache(), mask.to(device)
        newest = self._forward(states, input_ids.to(device), mask, cache)
        if self._states:
            for old, layer in zip(self._cache.layers, cache.layers, strict=True):
                old.keys, old.values = _stack(old.keys, layer.keys, -2), _stack(old.values, layer.values, -2)
            self._mask = _stack(self._mask, mask, -1)
            self._newest = torch.cat([self._newest, newest])
        else:
            self._cache, self._mask, self._newest = cache, mask, newest
        self._states += states

    def _step(self) -> None:
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)
        self._newest = self._forward(self._states, self._newest, self._mask, self._cache)

    def _forward(
        self, states: Sequence[AnswerState], input_ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Compute tokens that are not in the cache, (rows, tokens), and choose the next one of each row, (rows, 1)."""
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
        output = self._model(**inputs, **self._last_only, past_key_values=cache, use_cache=True)
        scores = output.logits[:, -1].to(input_ids.device, torch.float32)
        refuse_nan(scores)
        if suppressed := self._model.generation_config.suppress_tokens:
            scores[:, suppressed] = float("-inf")
        for row, state in zip(scores, states, strict=True):
            if not state.ended:
                state.choose(row, lambda state=state: torch.tensor(state.ids, device=scores.device))
        newest = scores.argmax(-1, keepdim=True)
        for state, token_id in zip(states, newest[:, 0].tolist(), strict=True):
            if not state.ended:
                state.add(token_id)
        return newest

    def _keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows, and the columns that are padding in all of those that stay."""
        if len(rows) == len(self._states):
            return
        if not rows:
            self._clear()
            return
        self._states = [self._states[row] for row in rows]
        kept = torch.tensor(rows, device=self._mask.device)
        self._mask, self._newest = self._mask[kept], self._newest[kept]
        padding = int(self._mask.argmax(-1).min())
        self._mask = self._mask[:, padding:]
        for layer in self._cache.layers:
            own = kept.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[own, ..., padding:, :], layer.values[own, ..., padding:, :]


def _parameters(model: PreTrainedModel) -> Collection[str]:
    return inspect.signature(model.forward).parameters.keys()


def _base(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model itself, whose layers have the adapters in them."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _stack(above: torch.Tensor, below: torch.Tensor, dim: int) -> torch.Tensor:
    """Rows of one tensor, then those of the other, with zeros before the shorter ones along `dim` (-1, -2)."""
    width = max(above.shape[dim], below.shape[dim])
    before = [0, 0] * (-dim - 1)
    padded = [torch.nn.functional.pad(part, (*before, width - part.shape[dim], 0)) for part in (above, below)]
    return torch.cat(padded)
