"""Space for a checkpoint: compared with what is free before it is written, and errors of the disk in words."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medicalgpt.errors import USERS_ERRORS, UserError
from medicalgpt.models.adapters import parameter_count
from medicalgpt.training.checkpoints import newest_committed

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import SafetensorError

# Tokenizer, settings, and what differs between two checkpoints of a run.
MARGIN_BYTES = 2**20
UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
# Moments of Adam, and the copy in float32 that DeepSpeed trains.
BYTES_PER_SHARDED_WEIGHT = 12


def checkpoint_bytes(output_dir: Path, model: torch.nn.Module, optimizer: Any, *, sharded: bool) -> int:
    """How many bytes the next checkpoint needs: as many as the last one, else those of weights and optimizer.

    Args:
        model: whose trained weights are saved, or all if it has no adapter.
        optimizer: its tensors are counted; those of a sharded one, which each process has in part, are estimated.
    """
    if last := newest_committed(output_dir):
        return sum(path.stat().st_size for path in last.rglob("*") if path.is_file()) + MARGIN_BYTES
    trained = [one for one in model.parameters() if one.requires_grad]
    has_adapter = any(isinstance(module, PeftModel) for module in model.modules())
    saved = trained if has_adapter else list(model.parameters())
    weights = sum(parameter_count(one) * one.element_size() for one in saved)
    if sharded or not getattr(optimizer, "state", None):
        return weights + sum(map(parameter_count, trained)) * BYTES_PER_SHARDED_WEIGHT + MARGIN_BYTES
    states = (value for state in optimizer.state.values() for value in state.values())
    return weights + sum(one.nbytes for one in states if isinstance(one, torch.Tensor)) + MARGIN_BYTES


def require_space(output_dir: Path, needed: int, what: str) -> None:
    """Refuse to write `needed` bytes where less is free.

    Raises:
        UserError: with both sizes, and what the checkpoints there take.
    """
    free = shutil.disk_usage(output_dir).free
    if free >= needed:
        return
    last = newest_committed(output_dir)
    kept = f"The last complete one is {last.name}; " if last else ""
    raise UserError(
        f"{what} needs about {as_size(needed)}, and the disk of {output_dir} has {as_size(free)} free.\n"
        f"{kept}nothing more was written. Free {as_size(needed - free)} or more there, then give the same command with "
        "--resume auto; with --save_total_limit 1 a run keeps one checkpoint, and needs space for two."
    )


def as_size(count: int) -> str:
    """Bytes in a unit that people read."""
    unit, factor = next(((unit, factor) for unit, factor in UNITS if count >= factor), ("bytes", 1))
    return f"{count / factor:,.{0 if factor == 1 else 1}f} {unit}"


@contextmanager
def saving(folder: Path, what: str) -> Iterator[None]:
    """Turn an error of the disk within the block into a message.

    Libraries that write files raise errors of their own, in which the system's is only a text.

    Raises:
        UserError: the file system refused or failed.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _errno_of(error, folder)
        if number not in USERS_ERRORS:
            raise
        last = newest_committed(folder)
        kept = f"The last complete checkpoint is {last.name}, which" if last else "No checkpoint is complete; a run"
        raise UserError(
            f"{what} in {folder} was not written: {os.strerror(number)}"
            f"{f' ({as_size(shutil.disk_usage(folder).free)} free)' if number == errno.ENOSPC else ''}.\n"
            f"{USERS_ERRORS[number]}\n{kept} the same command continues with --resume auto."
        ) from error


@contextmanager
def on_every_process(*, together: bool) -> Iterator[None]:
    """Raise a `UserError` of the block on every process, so that none waits for one that has ended.

    Args:
        together: no process waits for another one within the block; otherwise the error is raised where it occurs.

    Raises:
        UserError: of the first process that has one.
    """
    problem = None
    try:
        yield
    except UserError as error:
        if not together:
            raise
        problem = str(error)
    if together and (problems := [found for found in gather_object([problem]) if found]):
        raise UserError(problems[0])


def _errno_of(error: Exception, folder: Path) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if found := re.search(r"os error (\d+)", str(error)):
        return int(found[1])
    # torch says only that its writer has failed.
    if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
        return errno.ENOSPC if shutil.disk_usage(folder).free < MARGIN_BYTES else errno.EIO
    return None
