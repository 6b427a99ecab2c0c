"""Loss, gradient and weights that are not finite: the run ends before such a step is taken or saved.

Training cannot recover from NaN: every weight that it reaches is lost. So the loss and the gradient norm are checked on
every process before each step of the optimizer, and the weights before training and before they are saved.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from medicalgpt.data.encoding import IGNORED
from medicalgpt.errors import UserError
from medicalgpt.files import write_atomically
from medicalgpt.logs import is_main_process
from medicalgpt.readers.problems import Place, place_of
from medicalgpt.training.checkpoints import MANIFEST, numbered_checkpoints, step_of

import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from loguru import logger
from transformers import Trainer, TrainerCallback

# Float16 training skips a step whose gradient overflows, and halves the loss scale. After this many in a row, the
# gradient itself is at fault.
MAX_SKIPPED_STEPS = 10
# Rows named in the message; the file has them all.
SHOWN_ROWS = 4

Ids = tuple[int, ...]


@dataclass(frozen=True)
class BatchRow:
    """One row of a batch.

    Attributes:
        key: token ids by which it is found in the encoded rows; see `find_places`.
        sequences: token ids of all that was trained on, such as both answers of a pair, each with its prompt.
    """

    key: Ids
    sequences: tuple[Ids, ...]


@dataclass(frozen=True)
class _Batch:
    inputs: Any
    items: Any
    loss: torch.Tensor


class FiniteSteps(TrainerCallback):
    """Refuse a step whose loss or gradient is not finite, on every process at once.

    The trainer reports each batch to `record`, and calls `check` between the backward pass and the optimizer's step.
    That costs one all-reduce of three numbers per step and, on a GPU, one synchronization: the host has to know the
    result before it starts the optimizer. The third number is for whoever has a question to all processes in each step.

    DeepSpeed takes its step inside the backward pass, and skips it by itself where the gradient is not finite; see
    `carry_into_gradient`.

    Attributes:
        ask: the question, answered for this process.
        answer: whether any process said yes in the last check.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.ask: Callable[[], bool] = lambda: False
        self.answer = False
        self.batches: list[_Batch] = []
        self.skipped = self.first_step = 0
        if trainer.is_deepspeed_enabled:
            carry_into_gradient(trainer.accelerator)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches, self.skipped, self.first_step = [], 0, state.global_step
        if state.global_step:
            # The checkpoint of a resumed run is loaded now; the weights before that were checked by the run.
            require_finite_start({"the checkpoint to resume from": self.trainer.model})

    def record(self, inputs: Any, items: Any, loss: torch.Tensor) -> None:
        """Keep a batch of the current step until `check`, with the number of items that its loss is divided by."""
        self.batches.append(_Batch(inputs, items, loss.detach()))

    def check(self, model: torch.nn.Module, norm: torch.Tensor | float | None) -> None:
        """Call this before each step of the optimizer, on every process.

        Args:
            model: as it is trained, which may be wrapped.
            norm: of the gradient, before clipping; None if the engine does not compute it.

        Raises:
            UserError: on every process, if the loss of any process or the norm is not finite.
        """
        batches, self.batches = self.batches, []
        loss = torch.stack([batch.loss.float() for batch in batches]).sum()
        norm = torch.as_tensor(0.0 if norm is None else norm, device=loss.device)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # DeepSpeed reports the norm of a gradient that is not finite as -1.
        asked = torch.tensor(self.ask(), device=loss.device)
        found = torch.stack([~loss.isfinite(), ~norm.isfinite() | (norm < 0), asked]).float()
        found = self.trainer.accelerator.reduce(found, reduction="sum").bool().tolist()
        loss_failed, norm_failed, self.answer = found
        if not loss_failed and not norm_failed:
            self.skipped = 0
            return
        if not loss_failed and _scales_loss(self.trainer.accelerator):
            self.skipped += 1
            if self.skipped < MAX_SKIPPED_STEPS:
                logger.info(
                    f"step {self.trainer.state.global_step + 1} is skipped: its gradient overflowed in float16; the "
                    "loss scale is lowered"
                )
                return
        raise UserError(self._explain(model, batches, loss_failed, norm))

    def _explain(self, model: torch.nn.Module, batches: list[_Batch], loss_failed: bool, norm: torch.Tensor) -> str:
        trainer, step = self.trainer, self.trainer.state.global_step + 1
        suspects = list(range(len(batches)))
        if loss_failed:
            suspects = [number for number, batch in enumerate(batches) if not batch.loss.isfinite()]
        elif trainer.accelerator.distributed_type in (
            *(DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU),
        ):
            found = [number for number, batch in enumerate(batches) if not self._has_finite_gradient(model, batch)]
            # With dropout, another pass may be finite.
            suspects = found if any(gather_object([bool(found)])) else suspects
        rows = gather_object([row for number in suspects for row in self._describe(number, batches[number])])
        values = gather_object([batches[number].loss.item() for number in suspects])
        if loss_failed:
            what, value = "loss", next(value for value in values if not math.isfinite(value))
        else:
            what, value = "gradient norm", norm.item() if norm >= 0 or norm.isnan() else math.nan
        processes = sorted({row["process"] for row in rows})
        where = f" on process {', '.join(map(str, processes))}" if trainer.args.world_size > 1 else ""
        places = list(dict.fromkeys(row["place"] for row in rows))
        more = f" and {len(places) - SHOWN_ROWS} more" if places[SHOWN_ROWS:] else ""
        return (
            f"the {what} became {value} in step {step}{where}. That step was not taken; {newest_checkpoint(trainer)}.\n"
            f"  Its rows: {', '.join(places[:SHOWN_ROWS])}{more}; decoded in {self._write(rows, step)}\n"
            f"  {self._remedy(step)}"
        )

    def _has_finite_gradient(self, model: torch.nn.Module, batch: _Batch) -> bool:
        """Whether the gradient of one batch on this process alone is finite. Call it on every process."""
        model.zero_grad()
        with self.trainer.accelerator.no_sync(model):
            self.trainer.training_step(model, batch.inputs, batch.items)
        return all(one.grad is None or bool(one.grad.isfinite().all()) for one in model.parameters())

    def _describe(self, number: int, batch: _Batch) -> Iterator[dict[str, Any]]:
        rows = rows_of(batch.inputs)
        places = self.trainer.places_of(number, rows)
        for row, found in zip(rows, places, strict=True):
            yield {
                "place": ", ".join(map(str, found)) or "a row that was not found in the data",
                "process": self.trainer.args.process_index,
                "batch": number + 1,
                "loss": str(batch.loss.item()),
                "text": "\n".join(self.trainer.processing_class.decode(list(ids)) for ids in row.sequences),
            }

    def _write(self, rows: list[dict[str, Any]], step: int) -> str:
        path = Path(self.trainer.args.output_dir) / f"not_finite_step_{step}.jsonl"
        if is_main_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return str(path)

    def _remedy(self, step: int) -> str:
        args = self.trainer.args
        if step == self.first_step + 1:
            return "No step was taken before, so the learning rate is not the cause: look at these rows."
        ways = [f"lower --learning_rate (now {args.learning_rate:g})"]
        ways += ["add --max_grad_norm 1.0"] if not args.max_grad_norm else []
        ways += ["use --bf16 True instead of --fp16 True"] if args.fp16 else []
        return f"If nothing is wrong with these rows, {', or '.join(ways)}."


def carry_into_gradient(accelerator: Accelerator) -> None:
    """Let a loss that is not finite make every gradient so.

    For engines that take their step inside the backward pass and look at the gradient alone: a NaN that was added to
    the loss has a finite gradient.
    """
    backward = accelerator.backward

    def carried(loss: torch.Tensor, **kwargs: Any) -> None:
        # The factor is exactly 1, or NaN.
        backward(loss * (1 + 0 * loss.detach()), **kwargs)

    accelerator.backward = carried


def _scales_loss(accelerator: Accelerator) -> bool:
    """Whether the loss is scaled for float16, so that a step may be skipped now and then."""
    engine = getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)
    return accelerator.scaler is not None or (engine is not None and engine.fp16_enabled())


def rows_of(inputs: dict[str, torch.Tensor]) -> list[BatchRow]:
    """The rows of a batch, in its order, from the tensors of any stage; packed sequences are taken apart."""
    if "completion_ids" in inputs:
        sides = [(inputs[f"{side}_ids"], inputs[f"{side}_mask"].bool()) for side in ("prompt", "completion")]
        pieces = zip(*([_ids(row[kept]) for row, kept in zip(*side, strict=True)] for side in sides), strict=True)
        return [BatchRow(prompt, (prompt + answer,)) for prompt, answer in pieces]
    if "answer_mask" in inputs:
        rows = _unpadded(inputs)
        # The mask belongs to tokens 1, 2, …
        starts = inputs["answer_mask"].int().argmax(dim=1) + 1
        return [BatchRow(row[:start], (row,)) for row, start in zip(rows, starts.tolist(), strict=True)]
    if "completion_mask" in inputs:
        rows = _unpadded(inputs)
        chosen, rejected = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        return [
            BatchRow(chosen + rejected, (chosen, rejected)) for chosen, rejected in zip(chosen, rejected, strict=True)
        ]
    rows = _unpadded(inputs) if "attention_mask" in inputs else list(_unpacked(inputs))
    return [BatchRow(row, (row,)) for row in rows]


def _ids(row: torch.Tensor) -> Ids:
    return tuple(row.tolist())


def _unpadded(inputs: dict[str, torch.Tensor]) -> list[Ids]:
    return [_ids(row[kept]) for row, kept in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)]


def _unpacked(inputs: dict[str, torch.Tensor]) -> Iterator[Ids]:
    """The sequences of packed rows, without the padding, which is a sequence that is not supervised."""
    for row, labels, positions in zip(inputs["input_ids"], inputs["labels"], inputs["position_ids"], strict=True):
        starts = (positions == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            if bool((labels[start:end] != IGNORED).any()):
                yield _ids(row[start:end])


def find_places(rows: Sequence[BatchRow], encoded: Dataset) -> list[list[Place]]:
    """Where the rows of a batch are in the files: all places with these token ids, for each row.

    Searching the encoded rows costs nothing until it is needed; carrying a place through every collator would cost
    something in every step.

    Args:
        encoded: columns `place`, and `input_ids`, the three of `Pair`, or `prompt_ids`.
    """
    pair = ("prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids")
    kinds = (("input_ids",), pair, ("prompt_ids",))
    columns = next(kind for kind in kinds if set(kind) <= set(encoded.column_names))
    wanted: dict[Ids, list[Place]] = {row.key: [] for row in rows}
    lengths = pa.array({len(key) for key in wanted})
    for table in encoded.select_columns([*dict.fromkeys(columns), "place"]).with_format("arrow").iter(10_000):
        length = sum((pc.list_value_length(table[name]).to_numpy() for name in columns), start=0)
        candidates = table.filter(pc.is_in(pa.array(length, lengths.type), lengths))
        for row in candidates.to_pylist():
            key = tuple(chain.from_iterable(row[name] for name in columns))
            if key in wanted:
                wanted[key].append(place_of(row))
    return [wanted[row.key] for row in rows]


def require_finite_weights(named: Iterable[tuple[str, torch.Tensor]], explain: Callable[[str], str]) -> None:
    """Call this on every process.

    Args:
        named: weights with their names; where they are sharded, each process looks at its part.
        explain: the message for the first weight that is not finite.

    Raises:
        UserError: on every process, if a weight on any process holds NaN or infinity.
    """
    local = [(name, part) for name, weight in named for part in _numbers(weight)]
    broken = []
    # The largest magnitude: unlike a sum it cannot overflow, and NaN passes through it. One synchronization if all is
    # well.
    if local and not torch.nn.utils.get_total_norm([part for _, part in local], math.inf).isfinite():
        broken = [name for name, part in local if not part.isfinite().all()]
    if names := gather_object(broken[:1]):
        raise UserError(explain(names[0]))


def require_finite_start(models: Mapping[str, torch.nn.Module | None]) -> None:
    """Refuse models whose weights are broken before training. Call it on every process.

    Args:
        models: by the names that messages give them.

    Raises:
        UserError: on every process.
    """
    for model_name, model in models.items():
        require_finite_weights(
            model.named_parameters() if model is not None else (),
            lambda weight, model_name=model_name: (
                f"{model_name} is broken: its weight {weight} holds NaN or infinity, so nothing was trained. Download "
                "or copy it again, or take an earlier checkpoint of it."
            ),
        )


def require_finite_training(trainer: Trainer) -> None:
    """Refuse to save weights that training has broken. Call it on every process.

    Raises:
        UserError: on every process.
    """
    require_finite_weights(
        ((name, weight) for name, weight in trainer.model.named_parameters() if weight.requires_grad),
        lambda weight: (
            f"after step {trainer.state.global_step} the weight {weight} holds NaN or infinity. It was not saved; "
            f"{newest_checkpoint(trainer)}.\n  The gradient was finite, so the steps are too long: lower "
            f"--learning_rate (now {trainer.args.learning_rate:g})."
        ),
    )


def newest_checkpoint(trainer: Trainer) -> str:
    """A clause that names the newest checkpoint of a run."""
    found = [path for path in numbered_checkpoints(Path(trainer.args.output_dir)) if (path / MANIFEST).is_file()]
    newest = max(found, key=step_of, default=None)
    return "there is no checkpoint before it" if newest is None else f"the newest checkpoint is {newest}"


def _numbers(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The floating-point numbers of a weight that are on this process; of a quantized one, its scales."""
    weight = getattr(weight, "ds_tensor", weight)
    weight = weight.to_local() if hasattr(weight, "to_local") else weight
    scales = getattr(weight, "quant_state", None)
    for part in (weight, getattr(scales, "absmax", None), getattr(scales, "offset", None)):
        # A weight that is on disk has no numbers here, and torch computes no norm of 8-bit floats.
        if part is not None and part.is_floating_point() and part.numel() and part.element_size() > 1:
            if not part.is_meta:
                yield part.detach()
