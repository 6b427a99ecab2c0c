"""DeepSpeed and FSDP: how a run starts under them, and what is refused because its weights are sharded."""

import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from medicalgpt.errors import UserError
from medicalgpt.logs import HEARTBEAT_SECONDS, is_main_process, local_rank, rank
from medicalgpt.training.checkpoints import GATHERING

import psutil
import torch
from loguru import logger
from peft import PeftModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import AcceleratorConfig
from trl.models.utils import add_hooks, remove_hooks

# Longer than most files of DeepSpeed's extensions take to compile: a folder in which another machine compiles changes
# more often than this.
STALE_SECONDS = 120
# An extension that is compiled already is locked for a second or two while it is loaded.
SECONDS_TO_BUILD = 5


def is_fsdp_requested(training: TrainingArguments) -> bool:
    """Whether FSDP is to shard the weights, by a flag or by `accelerate launch`."""
    return bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")


def engine_of(training: TrainingArguments) -> str:
    """`DeepSpeed` or `FSDP`, by a flag or by `accelerate launch`; `DDP` for neither, also on a single process."""
    if training.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1"):
        return "DeepSpeed"
    return "FSDP" if is_fsdp_requested(training) else "DDP"


def are_weights_sharded(training: TrainingArguments) -> bool:
    """Whether each process will hold only a part of every weight: under ZeRO-3 and FSDP."""
    return is_deepspeed_zero3_enabled() or is_fsdp_requested(training)


@contextmanager
def complete_weights(trainer: Trainer, models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Inside, each process holds every weight of `models`, so that they can be run without the other processes.

    ZeRO-3 and FSDP2 gather the weights of one module at a time, in which all processes take part. That cannot be while
    answers are generated, which differ in length. Call it on every process, and do not change weights inside. Does
    nothing where weights are not sharded.
    """
    if trainer.is_fsdp_enabled:
        reshard = trainer.accelerator.state.fsdp_plugin.reshard_after_forward
        shards = [module for module in trainer.model_wrapped.modules() if isinstance(module, FSDPModule)]
        # The outermost module must know that it is, before a pass through an inner one.
        shards[0]._get_fsdp_state()._lazy_init()
        for module in shards:
            # A module that is gathered already is not gathered by a pass through it, and not released after it.
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in shards:
                module.set_reshard_after_forward(bool(reshard) and module is not shards[0], recurse=False)
                module.reshard()
        return
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    engine = trainer.model_wrapped
    with deepspeed.zero.GatheredParameters([parameter for model in models for parameter in model.parameters()]):
        remove_hooks(engine)
        try:
            yield
        finally:
            add_hooks(engine)


def check_accelerator_config(training: TrainingArguments) -> None:
    """Refuse settings of `--accelerator_config` without effect: the stages themselves divide rows over processes.

    What is left is `sync_each_batch`, which saves memory under FSDP.

    Raises:
        UserError: it names the settings.
    """
    if "accelerator_config" not in getattr(training, "given", ()):
        return
    settings, defaults = training.accelerator_config.to_dict(), AcceleratorConfig().to_dict()
    accumulation = settings.pop("gradient_accumulation_kwargs") or {}
    idle = [name for name, value in settings.items() if value != defaults[name]]
    idle += [f"gradient_accumulation_kwargs.{name}" for name in accumulation if name != "sync_each_batch"]
    if idle:
        raise UserError(
            f"--accelerator_config: {', '.join(idle)} would have no effect: rows are divided over processes by this "
            "program, and accumulated as --gradient_accumulation_steps says. Remove it; what has an effect is "
            'gradient_accumulation_kwargs: {"sync_each_batch": true}.'
        )


def check_engine(trainer: Trainer) -> None:
    """Refuse settings under which the stages were not made to train, or weights would be saved in parts.

    An adapter is gathered whatever the settings, and so are all weights under FSDP2.

    Raises:
        UserError: with the setting to change.
    """
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        raise UserError(
            "parallelism_config splits each sequence or each layer over processes, and the stages' losses need whole "
            "sequences in each process. Remove it. For long rows: --gradient_checkpointing True, zero3.json or "
            "fsdp2.yaml; docs/distributed.md says more."
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise UserError(
            "fsdp_version 1 is PyTorch's older FSDP, with which these programs were not tested. Set fsdp_version: 2, "
            "as fsdp2.yaml does."
        )
    if not trainer.is_deepspeed_enabled or isinstance(trainer.model, PeftModel):
        return
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    if config.is_zero3() and not config.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
        raise UserError(f"the trained weights would not be saved as a model. {GATHERING}")


def gather_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model that FSDP2 shards, complete and on the CPU; of a model with an adapter, what is trained.

    Call it on every process.

    Returns:
        On the first process; an empty dictionary on the others.
    """
    only_trained = isinstance(model, PeftModel)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_trained)
    return get_model_state_dict(model, options=options)


def init_deepspeed(training: TrainingArguments) -> None:
    """Start DeepSpeed's process group, where a file of settings is given and there is no GPU.

    Without it, DeepSpeed assumes a single process when `from_pretrained` asks for the world size. On GPUs accelerate
    starts the group. The first start on a machine compiles an extension, which takes minutes.
    """
    if not training.deepspeed:
        return
    locks = ExtensionLocks(extensions_root())
    while locks.check():
        time.sleep(1)
    # A lock may appear later, when this run compiles as well, and its owner be killed.
    threading.Thread(target=locks.watch, name="extension locks", daemon=True).start()
    if training.use_cpu:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=training.ddp_timeout))


def extensions_root() -> Path:
    """Where torch keeps the extensions that DeepSpeed compiles."""
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


class ExtensionLocks:
    """The locks of extensions that are being compiled, or that interrupted runs left.

    torch waits for a lock as long as its file exists, and prints nothing. A process that is killed leaves the file.

    Args:
        root: see `extensions_root`; the locks are in its folders, one or two levels down.
    """

    def __init__(self, root: Path):
        self.root = root
        self.seen: dict[Path, float] = {}
        self.described: dict[Path, float] = {}

    def check(self) -> bool:
        """Remove locks of interrupted runs, name the others every 30 s; returns whether there are any.

        The first process of each machine does both.
        """
        found = [*self.root.glob("*/lock"), *self.root.glob("*/*/lock")]
        now = time.monotonic()
        self.seen = {lock: self.seen.get(lock, now) for lock in found}
        if local_rank() != 0:
            return bool(found)
        for lock in found:
            age = _seconds_since_change(lock)
            if age is None:
                continue
            holder = _process_with_open(lock)
            unsaid = now - self.described.get(lock, -math.inf) >= HEARTBEAT_SECONDS
            if holder is None and age > STALE_SECONDS:
                _warn(
                    f"{lock} was left by a run that was interrupted {age / 60:.0f} min ago; it is removed. If this run "
                    "now cannot load the extension, start it again."
                )
                lock.unlink(missing_ok=True)
            elif unsaid and now - self.seen[lock] >= SECONDS_TO_BUILD:
                self.described[lock] = now
                _warn(_describe_lock(lock, holder))
        return bool(found)

    def watch(self) -> None:
        """Check for as long as the process runs."""
        while True:
            self.check()
            time.sleep(5)


def _warn(text: str) -> None:
    # Only the very first process has a log, and the locks are on each machine.
    if is_main_process():
        logger.warning(text)
    else:
        print(f"process {rank()}: {text}", file=sys.stderr, flush=True)


def _describe_lock(lock: Path, holder: int | None) -> str:
    if holder is not None:
        return f"process {holder} compiles an extension of DeepSpeed in {lock.parent}; this run waits for it"
    return (
        f"this run waits for {lock}: no process of this machine holds it, so that it was left by a run that was "
        f"interrupted, or another machine compiles there. If none does, remove it: rm {lock}. It is removed after "
        f"{STALE_SECONDS} s without a change in that folder."
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
