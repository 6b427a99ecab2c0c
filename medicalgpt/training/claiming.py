"""What a run does with the folder that it is to write to: start there, resume what is there, replace it, or refuse."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.files import hash_file
from medicalgpt.logs import is_main_process
from medicalgpt.training.checkpoints import (
    MANIFEST,
    find_checkpoint,
    is_committed,
    newest_checkpoint,
    numbered_checkpoints,
)
from medicalgpt.training.output_folder import MODEL_FILES, PreviousRun, read_record, recover

from accelerate.utils import broadcast_object_list, gather_object
from loguru import logger

# Values of --resume_from_checkpoint that are not the folder of a checkpoint.
NO, NEWEST, AUTO = "false", "true", "auto"
UNFINISHED = ("running", "stopped", "failed")


@dataclass(frozen=True)
class Claim:
    """What is to be done with an output folder.

    Attributes:
        resume_from: folder of the checkpoint to resume from, if any.
        replaces: a run in the folder is replaced when the new one has been prepared.
        worthless: that run has nothing to be kept until then.
        finished: the run in the folder has finished, and nothing is left to do.
    """

    resume_from: str | None = None
    replaces: bool = False
    worthless: bool = False
    finished: bool = False


def resumes_in(output_dir: Path, wanted: str) -> bool:
    """Whether `--resume_from_checkpoint` would continue a run in this folder, as far as names of files tell."""
    if wanted.lower() == AUTO:
        return any(map(is_committed, numbered_checkpoints(output_dir)))
    return wanted.lower() == NEWEST or (wanted.lower() != NO and _is_in(output_dir, wanted))


def _is_in(output_dir: Path, checkpoint: str) -> bool:
    return Path(checkpoint).resolve().parent == output_dir.resolve()


def claim_folder(output_dir: Path, wanted: str, *, overwrite: bool, trains: bool) -> Claim:
    """Decide for one process what to do with an output folder whose lock it holds; see `Claim`.

    Args:
        wanted: value of `--resume_from_checkpoint`.
        overwrite: a run in the folder may be replaced.
        trains: this run does, so that it has something to replace the other with.

    Raises:
        UserError: the folder holds a run that is neither resumed nor may be replaced; there is no such checkpoint.
    """
    restored = recover(output_dir)
    record = read_record(output_dir)
    status = (record or {}).get("status")
    if status == "running":
        logger.warning(f"the run of {record.get('started')} in {output_dir} was killed: it has not recorded its end")
    if wanted.lower() == AUTO:
        claim = _claim_automatically(output_dir, record, overwrite)
        if claim:
            return claim
    elif wanted.lower() != NO:
        if restored:
            raise UserError(
                f"the run to resume saved no checkpoint; it was to replace the one that is now restored in "
                f"{output_dir}. Give the same command again to resume that one, or replace it: "
                "--overwrite_output_dir True without --resume_from_checkpoint."
            )
        checkpoint = find_checkpoint(output_dir if wanted.lower() == NEWEST else Path(wanted))
        if wanted.lower() == NEWEST or _is_in(output_dir, wanted):
            return _resume(checkpoint, overwrite)
        return Claim(str(checkpoint), _replaces(output_dir, status, overwrite, trains))
    return Claim(None, _replaces(output_dir, status, overwrite, trains))


def _resume(checkpoint: Path, overwrite: bool) -> Claim:
    logger.info(f"resuming from {checkpoint}")
    if overwrite:
        logger.info("--overwrite_output_dir removes nothing, as this run is resumed")
    return Claim(str(checkpoint))


def _replaces(output_dir: Path, status: str | None, overwrite: bool, trains: bool) -> bool:
    """Whether there is a run to replace.

    Raises:
        UserError: it may not be replaced.
    """
    names = [path.name for path in PreviousRun(output_dir).files()]
    if not names:
        return False
    if not overwrite:
        unfinished = status != "finished" and newest_checkpoint(output_dir)
        raise UserError(
            f"--output_dir {output_dir} holds another run ({', '.join(names[:4])}{', …' if names[4:] else ''})."
            f"{' Resume it: --resume auto.' if unfinished else ''} Choose another folder, or replace it: "
            "--overwrite_output_dir True."
        )
    if not trains and any(name.endswith(".safetensors") or "checkpoint-" in name for name in names):
        raise UserError(
            f"--do_train False trains nothing that could replace the run in {output_dir}. Choose another "
            "--output_dir for the evaluation."
        )
    logger.info(f"the run in {output_dir} is replaced when this one has saved its first checkpoint")
    return True


def _claim_automatically(output_dir: Path, record: dict[str, Any] | None, overwrite: bool) -> Claim | None:
    """What `--resume auto` does with a folder; None if it does what a run without it would.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    status = (record or {}).get("status")
    if status == "finished":
        return None if overwrite else Claim(finished=True)
    if record is None:
        logger.warning(f"{output_dir / 'run.json'} is damaged, and is written again")
    if checkpoint := newest_checkpoint(output_dir):
        return _resume(checkpoint, overwrite)
    if any(map(is_committed, numbered_checkpoints(output_dir))) and not overwrite:
        raise UserError(
            f"no checkpoint in {output_dir} can be resumed from: their files have changed since they were saved (see "
            "above). Restore them, or train from the beginning and replace the run: --overwrite_output_dir True."
        )
    # A damaged run.json is ours as well. A folder with a model but without a record is not a run that was stopped.
    has_model = any(path for pattern in MODEL_FILES if pattern != "run.json" for path in output_dir.glob(pattern))
    if status in UNFINISHED or (record is None and not has_model):
        logger.info(f"the run in {output_dir} ended before its first complete checkpoint; it starts from the beginning")
        return Claim(replaces=True, worthless=True)
    return None


def on_first_process(decide: Callable[[], Any]) -> Any:
    """What `decide` returns on the first process, on every process of the run.

    Raises:
        UserError: on every process, if it was raised there.
    """
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def require_same_checkpoint(checkpoint: str) -> None:
    """Refuse to resume if a process does not see the checkpoint of the first one. Call it on every process.

    Raises:
        UserError: on every process.
    """
    manifest = Path(checkpoint) / MANIFEST
    seen = gather_object([hash_file(manifest) if manifest.is_file() else None])
    if different := [number for number, digest in enumerate(seen) if digest != seen[0]]:
        raise UserError(
            f"process {', '.join(map(str, different))} of {len(seen)} does not have the checkpoint {checkpoint} of the "
            "first one. Use a disk that all machines share, or copy that folder to each."
        )
