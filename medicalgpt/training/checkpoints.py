"""Checkpoints that are whole: a manifest with sizes and hashes, written last, and verified before resuming."""

import hashlib
import json
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError

import torch
from loguru import logger
from transformers import TrainerCallback, TrainingArguments

MANIFEST = "manifest.json"


def committed(output_dir: Path) -> list[Path]:
    """Whole checkpoints below `output_dir`, newest first: those whose manifest agrees with the files."""
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    found = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    whole = []
    for path in found:
        if problem := checkpoint_problem(path):
            logger.warning(f"{path} is not whole ({problem}) and will not be resumed from")
        else:
            whole.append(path)
    return whole


def checkpoint_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
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
        if path.stat().st_size != entry["bytes"] or _digest(path) != entry["sha256"]:
            return f"{name} has changed"
    return None


def find_checkpoint(place: Path) -> str:
    """The newest whole checkpoint of an output folder, or that folder itself if it is a checkpoint.

    Raises:
        UserError: none, or the named one is not whole.
    """
    if place.name.startswith("checkpoint-"):
        if not place.is_dir():
            raise UserError(f"no checkpoint {place}. Check the path of --resume_from_checkpoint.")
        if problem := checkpoint_problem(place):
            raise UserError(f"{place} cannot be resumed from: {problem}. Choose an earlier one.")
        return str(place)
    whole = committed(place)
    if not whole:
        raise UserError(
            f"{place} holds no whole checkpoint to resume from. Start anew without --resume_from_checkpoint."
        )
    logger.info(f"resuming from {whole[0]}")
    return str(whole[0])


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointCommitter(TrainerCallback):
    """Write the manifest of a checkpoint once all its files are there; transformers itself writes them in place."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or not folder.is_dir():
            return
        entries = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        partial = folder / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        partial.rename(folder / MANIFEST)
