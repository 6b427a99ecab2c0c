"""DeepSpeed and FSDP: how a run starts under them, and what is refused because its weights are sharded."""

import os
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from medicalgpt.errors import UserError
from medicalgpt.logs import heartbeat, local_rank
from medicalgpt.training.checkpoints import GATHERING

import psutil
from loguru import logger
from peft import PeftModel
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

# Longer than any file of DeepSpeed's extensions takes to compile: a folder that another machine compiles in changes
# more often than this.
STALE_SECONDS = 300


def is_fsdp_requested(training: TrainingArguments) -> bool:
    """Whether FSDP is to shard the weights, by a flag or by `accelerate launch`."""
    return bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")


def are_weights_sharded(training: TrainingArguments) -> bool:
    """Whether each process will hold only a part of every weight: under ZeRO-3 and FSDP."""
    return is_deepspeed_zero3_enabled() or is_fsdp_requested(training)


def require_gathering(trainer: Trainer) -> None:
    """Refuse settings with which all weights would be saved in parts, one per process.

    An adapter is gathered whatever the settings.

    Raises:
        UserError: with the setting to change.
    """
    if not trainer.is_deepspeed_enabled or isinstance(trainer.model, PeftModel):
        return
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    if config.is_zero3() and not config.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
        raise UserError(f"the trained weights would not be saved as a model. {GATHERING}")


def init_deepspeed(training: TrainingArguments) -> None:
    """Start DeepSpeed's process group, where a file of settings is given and there is no GPU.

    Without it, DeepSpeed assumes a single process when `from_pretrained` asks for the world size. On GPUs accelerate
    starts the group. The first start on a machine compiles an extension, which takes minutes.
    """
    if not training.deepspeed:
        return
    if local_rank() == 0:
        wait_for_extensions(extensions_root())
    if training.use_cpu:
        import deepspeed

        with heartbeat(lambda: f"DeepSpeed compiles its extensions in {extensions_root()}, once per machine"):
            deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=training.ddp_timeout))


def extensions_root() -> Path:
    """Where torch keeps the extensions that DeepSpeed compiles."""
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def wait_for_extensions(root: Path) -> None:
    """Wait while another run compiles extensions, and remove the locks of runs that were interrupted as they did.

    torch waits for a lock as long as its file exists, and prints nothing.

    Args:
        root: see `extensions_root`; the locks are in its folders, one or two levels down.
    """
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        with heartbeat(lambda lock=lock: _describe_lock(lock), write=logger.warning):
            described = False
            while (age := _seconds_since_change(lock)) is not None:
                compiling = _process_with_open(lock)
                if compiling is None and age > STALE_SECONDS:
                    logger.warning(
                        f"{lock} was left by a run that was interrupted {age / 60:.0f} min ago; it is removed"
                    )
                    lock.unlink(missing_ok=True)
                    break
                if not described:
                    logger.warning(_describe_lock(lock))
                    described = True
                time.sleep(1)


def _describe_lock(lock: Path) -> str:
    pid = _process_with_open(lock)
    if pid is not None:
        return f"waiting for process {pid}, which compiles an extension of DeepSpeed in {lock.parent}"
    return (
        f"waiting for {lock}: no process of this machine holds it, so it was left by a run that was interrupted, or "
        f"another machine compiles there. If none does, remove it: rm {lock}. It is taken over after "
        f"{STALE_SECONDS // 60} min without a change in that folder."
    )


def _process_with_open(lock: Path) -> int | None:
    """The process of this machine that has a file open, as torch has its lock; None if there is none to be seen."""
    path = str(lock.resolve())
    for process in psutil.process_iter():
        # Processes end, and those of other users show no files.
        with suppress(psutil.Error, OSError):
            if any(file.path == path for file in process.open_files()):
                return process.pid
    return None


def _seconds_since_change(lock: Path) -> float | None:
    """Since any file next to a lock was written; None if the lock is gone."""
    times = []
    for path in lock.parent.iterdir() if lock.exists() else ():
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(0.0, time.time() - max(times)) if lock.exists() and times else None
