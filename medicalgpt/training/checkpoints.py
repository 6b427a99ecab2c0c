"""Complete checkpoints: a manifest with sizes and hashes, written last, and verified before resuming."""

import json
from pathlib import Path
from typing import Any

from medicalgpt.data.sources import hash_file
from medicalgpt.errors import UserError

import torch
from loguru import logger
from transformers import TrainerCallback, TrainingArguments

MANIFEST = "manifest.json"


def committed(output_dir: Path) -> list[Path]:
    """Complete checkpoints in `output_dir`, newest first: those whose manifest agrees with the files."""
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    found = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
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
    complete = committed(place)
    if not complete:
        raise UserError(
            f"{place} has no complete checkpoint to resume from. Start again without --resume_from_checkpoint."
        )
    logger.info(f"resuming from {complete[0]}")
    return str(complete[0])


class CheckpointCommitter(TrainerCallback):
    """Write the manifest of a checkpoint once all its files are written; transformers writes them in place."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or not folder.is_dir():
            return
        entries = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        partial = folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        partial.rename(folder / MANIFEST)
