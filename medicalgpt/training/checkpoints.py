"""Complete checkpoints: a manifest with sizes and hashes, written last, and verified before resuming."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.files import hash_file, remove_entry, sync, write_atomically
from medicalgpt.logs import is_main_process
from medicalgpt.models import loading

import torch
from accelerate.utils import gather_object
from loguru import logger
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

MANIFEST = "manifest.json"
# Subfolder of an output folder, and the beginning of the names of further ones.
SUPERSEDED = "superseded-checkpoints"
GATHERING = (
    "Weights that are sharded over the processes must be gathered to be saved. For DeepSpeed ZeRO-3 set "
    '"stage3_gather_16bit_weights_on_model_save": true, as zero3.json does.'
)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint with most steps in `output_dir`: one whose manifest agrees with the files."""
    for path in sorted(numbered_checkpoints(output_dir), key=step_of, reverse=True):
        if (problem := checkpoint_problem(path)) is None:
            return path
        logger.warning(f"{path} is incomplete ({problem}) and is not resumed from")
    return None


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, by its name."""
    return int(checkpoint.name.rpartition("-")[2])


def is_committed(checkpoint: Path) -> bool:
    """Whether a checkpoint has a manifest; whether that agrees with the files, `checkpoint_problem` tells."""
    return (checkpoint / MANIFEST).is_file()


def newest_committed(output_dir: Path) -> Path | None:
    """The checkpoint with most steps that has a manifest; its files are not read."""
    return max(filter(is_committed, numbered_checkpoints(output_dir)), key=step_of, default=None)


def checkpoint_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None."""
    if not is_committed(checkpoint):
        return "it was never finished: no manifest"
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        expected = {checkpoint / name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        expected = {}
    except OSError as error:
        return f"its {MANIFEST} cannot be read: {error.strerror}"
    if not expected:
        return f"its {MANIFEST} is damaged"
    for path, (size, _) in expected.items():
        if not path.is_file():
            return f"{path.relative_to(checkpoint)} is missing"
        if path.stat().st_size != size:
            return f"{path.relative_to(checkpoint)} has changed"
    for path, (_, digest) in expected.items():
        try:
            if hash_file(path) != digest:
                return f"{path.relative_to(checkpoint)} has changed"
        except OSError as error:
            return f"{path.relative_to(checkpoint)} cannot be read: {error.strerror}"
    return None


def find_checkpoint(place: Path) -> Path:
    """The newest complete checkpoint of an output folder, or that folder itself if it is a checkpoint.

    Raises:
        UserError: there is none, or the named one is incomplete.
    """
    if place.name.startswith("checkpoint-"):
        if not place.is_dir():
            raise UserError(f"no checkpoint {place}. Check the path of --resume_from_checkpoint.")
        if problem := checkpoint_problem(place):
            raise UserError(f"{place} cannot be resumed from: {problem}. Choose an earlier one.")
        return place
    if (found := newest_checkpoint(place)) is None:
        raise UserError(
            f"{place} has no complete checkpoint to resume from. Start it from the beginning, in this folder or in "
            "another: --resume auto"
        )
    return found


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


def load_renamed_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Load weights that a checkpoint has under other names than the model, such as experts, which are saved one by one.

    The trainer loads what it finds by its name, and leaves the rest of the model as it was.

    Raises:
        UserError: the checkpoint is that of another model.
    """
    if isinstance(model, PeftModel):
        return
    names: set[str] = set()
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    if names <= model.state_dict().keys():
        return
    scores = "SequenceClassification" in type(model).__name__
    loaded = loading.load_model(
        AutoModelForSequenceClassification if scores else AutoModelForCausalLM,
        str(checkpoint),
        num_labels=model.config.num_labels if scores else None,
        dtype=str(model.dtype).removeprefix("torch."),
    )
    try:
        model.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        raise UserError(f"{checkpoint} does not have the weights of this model. {error}") from error


def numbered_checkpoints(output_dir: Path) -> list[Path]:
    """Folders of checkpoints in `output_dir`, complete or not; a copy under another name is not one."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return [path for path in found if path.is_dir()]


def prepare_folder(checkpoint: Path) -> None:
    """Remove what a killed run left in the folder of a checkpoint that is about to be saved."""
    if checkpoint.is_dir():
        _remove(checkpoint)


def remove_incomplete_checkpoints(output_dir: Path) -> None:
    """Remove folders of checkpoints without a manifest, which a killed run has left."""
    for path in numbered_checkpoints(output_dir):
        if not is_committed(path):
            logger.info(f"{path}, which was never finished, is removed")
            _remove(path)


def remove_old_checkpoints(output_dir: Path, limit: int, best: str | None) -> None:
    """Remove all but the last `limit` complete checkpoints; never the last one or the best.

    Args:
        best: folder of the best checkpoint, if there is one.
    """
    found = filter(is_committed, numbered_checkpoints(output_dir))
    committed = {path: (path / MANIFEST).stat().st_mtime_ns for path in found}
    # After a resume from an earlier one, the last is not the one with most steps.
    by_age = sorted(committed, key=lambda path: (committed[path], step_of(path)))
    kept = {path for path in by_age if path == by_age[-1] or (best and path.resolve() == Path(best).resolve())}
    surplus = len(by_age) - max(limit, len(kept))
    for path in [path for path in by_age if path not in kept][: max(surplus, 0)]:
        _remove(path)


def set_later_aside(checkpoint: Path, output_dir: Path) -> None:
    """Move the complete checkpoints of later steps into a subfolder, as the run now continues from this one.

    Otherwise the next start, which resumes from the newest one, would continue from them. They are kept; the log says
    where. Nothing is done for a checkpoint of another folder.

    Raises:
        OSError: one could not be moved.
    """
    step = step_of(checkpoint)
    later = [path for path in numbered_checkpoints(output_dir) if is_committed(path) and step_of(path) > step]
    if not later or checkpoint.resolve().parent != output_dir.resolve():
        return
    aside, number = output_dir / SUPERSEDED, 2
    while aside.exists():
        aside, number = output_dir / f"{SUPERSEDED}-{number}", number + 1
    aside.mkdir()
    # The last one comes last: until then, the newest checkpoint is the same as before.
    for path in sorted(later, key=step_of):
        path.rename(aside / path.name)
    names = ", ".join(path.name for path in sorted(later, key=step_of))
    logger.warning(
        f"this run continues from {checkpoint}, so that the later {names} will not be resumed from any more; moved to "
        f"{aside}. Remove that folder if you do not need it."
    )


def _remove(checkpoint: Path) -> None:
    try:
        # A checkpoint that is only partly removed when the run is killed must not look complete.
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        remove_entry(checkpoint)
    except OSError as error:
        # It is not worth ending the run for this.
        logger.warning(f"{checkpoint} could not be removed: {error}")


def _write_manifest(folder: Path) -> int:
    """Make sure that all files of a checkpoint are on the disk, then write its manifest; returns their bytes."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            sync(path)
            entries[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    write_atomically(folder / MANIFEST, json.dumps(entries, indent=1))
    sync(folder / MANIFEST)
    sync(folder)
    return sum(entry["bytes"] for entry in entries.values())


class CheckpointCommitter(TrainerCallback):
    """Write the manifest of a checkpoint once all its files are written; transformers writes them in place.

    Older checkpoints are removed only then. transformers would remove them before, and a run that is killed in between
    would have none.

    Args:
        committed: called on the first process after each manifest.
        began: returns when the current checkpoint began to be saved, as `time.monotonic`.

    Raises:
        UserError: its weights are not there (see `require_saved_weights`); without a manifest it is never resumed from.
    """

    def __init__(self, committed: Callable[[], None] = lambda: None, began: Callable[[], float] = time.monotonic):
        self.committed, self.began = committed, began
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
        size = _write_manifest(folder)
        logger.info(f"{folder.name}: {size / 1e6:,.1f} MB saved in {time.monotonic() - self.began():.1f} s")
        self.committed()
        self._remove_superseded(folder, state)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # A run that was killed after its last manifest saves nothing more, and still has older checkpoints.
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and is_committed(folder):
            self._remove_superseded(folder, state)

    def _remove_superseded(self, newest: Path, state: Any) -> None:
        remove_incomplete_checkpoints(newest.parent)
        if self.limit and self.limit > 0:
            remove_old_checkpoints(newest.parent, self.limit, state.best_model_checkpoint)
