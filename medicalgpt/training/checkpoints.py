"""Complete checkpoints: a manifest with sizes and hashes, written last, and verified before resuming."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.files import hash_file, remove_entry, write_atomically
from medicalgpt.logs import is_main_process

import torch
from accelerate.utils import gather_object
from loguru import logger
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainingArguments

MANIFEST = "manifest.json"
GATHERING = (
    "Weights that are sharded over the processes must be gathered to be saved. For DeepSpeed ZeRO-3 set "
    '"stage3_gather_16bit_weights_on_model_save": true, as zero3.json does; for FSDP "state_dict_type": '
    '"FULL_STATE_DICT".'
)


def committed_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints in `output_dir`, newest first: those whose manifest agrees with the files."""
    found = sorted(numbered_checkpoints(output_dir), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    complete = []
    for path in found:
        if problem := checkpoint_problem(path):
            logger.warning(f"{path} is incomplete ({problem}) and is not resumed from")
        else:
            complete.append(path)
    return complete


def checkpoint_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None."""
    if not (checkpoint / MANIFEST).is_file():
        return "it was never finished: no manifest"
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        return f"its {MANIFEST} is damaged"
    for name, entry in entries.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"] or hash_file(path) != entry["sha256"]:
            return f"{name} has changed"
    return None


def find_checkpoint(place: Path) -> str:
    """The newest complete checkpoint of an output folder, or that folder itself if it is a checkpoint.

    Raises:
        UserError: there is none, or the named one is incomplete.
    """
    if place.name.startswith("checkpoint-"):
        if not place.is_dir():
            raise UserError(f"no checkpoint {place}. Check the path of --resume_from_checkpoint.")
        if problem := checkpoint_problem(place):
            raise UserError(f"{place} cannot be resumed from: {problem}. Choose an earlier one.")
        return str(place)
    complete = committed_checkpoints(place)
    if not complete:
        raise UserError(
            f"{place} has no complete checkpoint to resume from. Start again without --resume_from_checkpoint."
        )
    logger.info(f"resuming from {complete[0]}")
    return str(complete[0])


def require_saved_weights(folder: Path) -> None:
    """Refuse a folder without weights, or with a tensor of size zero. Call it on every process, once it is saved.

    ZeRO-3 and FSDP leave an empty tensor in the place of a weight, and saving it raises no error. Only the headers of
    the files are read.

    Raises:
        UserError: on every process.
    """
    problem = _problem_of_weights(folder) if is_main_process() else None
    # A process that stops alone would leave the others waiting for it.
    if problems := [found for found in gather_object([problem]) if found]:
        raise UserError(problems[0])


def _problem_of_weights(folder: Path) -> str | None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return f"{folder} holds no weights: there is no .safetensors file in it. {GATHERING}"
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    shape = file.get_slice(name).get_shape()
                    if 0 in shape:
                        return f"{path} holds nothing of {name}: its shape there is {shape}. {GATHERING}"
        except SafetensorError as error:
            return f"{path} was not saved whole ({error}). Make room on the disk, or save somewhere else."
    return None


def numbered_checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints in `output_dir`, complete or not; a copy under another name is not one."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return [path for path in found if path.is_dir()]


def remove_old_checkpoints(output_dir: Path, limit: int, best: str | None) -> None:
    """Remove all but the last `limit` checkpoints; those without a manifest first, never the last one or the best.

    Args:
        best: folder of the best checkpoint, if there is one.
    """
    committed = {path: path / MANIFEST for path in numbered_checkpoints(output_dir)}
    by_age = sorted(committed, key=lambda path: committed[path].is_file() and committed[path].stat().st_mtime_ns)
    kept = {path for path in by_age if path == by_age[-1] or (best and path.resolve() == Path(best).resolve())}
    surplus = len(by_age) - max(limit, len(kept))
    for path in [path for path in by_age if path not in kept][: max(surplus, 0)]:
        remove_entry(path)


class CheckpointCommitter(TrainerCallback):
    """Write the manifest of a checkpoint once all its files are written; transformers writes them in place.

    Older checkpoints are removed only then. transformers would remove them before, and a run that is killed in between
    would have none.

    Args:
        committed: called on the first process after each manifest.

    Raises:
        UserError: its weights are not there (see `require_saved_weights`); without a manifest it is never resumed from.
    """

    def __init__(self, committed: Callable[[], None] = lambda: None):
        self.committed = committed
        self.limit: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.limit, args.save_total_limit = args.save_total_limit, None

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        require_saved_weights(folder)
        if not state.is_world_process_zero:
            return
        entries = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        write_atomically(folder / MANIFEST, json.dumps(entries, indent=1))
        self.committed()
        if self.limit and self.limit > 0:
            remove_old_checkpoints(folder.parent, self.limit, state.best_model_checkpoint)
