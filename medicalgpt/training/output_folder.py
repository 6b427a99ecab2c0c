"""The output folder of a run: it may not be what the run reads, and an earlier run in it is replaced without a risk.

With `--overwrite_output_dir` the earlier run is moved into a subfolder when everything has been read and loaded, and is
removed when the new one has saved its first complete checkpoint, or its result. If the new run ends before that, the
earlier one is moved back; if it was killed, the next start does so. All moves are renames within the folder, and each
state has its own name on the disk, so that a kill at any point leaves one that `PreviousRun.recover` understands.
"""

import dataclasses
import glob
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medicalgpt.errors import UserError
from medicalgpt.files import overlap, remove_entry
from medicalgpt.models import hub
from medicalgpt.training.checkpoints import MANIFEST, SUPERSEDED
from medicalgpt.training.folder_lock import FolderLock

import datasets
from huggingface_hub import constants
from loguru import logger

# What saving a model with its tokenizer writes, and what shows that a folder holds one.
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "run.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "chat_template.jinja",
    "base_chat_template.jinja",
    "*processor_config.json",
    "additional_chat_templates",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
CHECKPOINTS = "checkpoint-[0-9]*"
# What a run writes at the top of its output folder, whatever the stage.
RUN_FILES = (
    *MODEL_FILES,
    CHECKPOINTS,
    f"{SUPERSEDED}*",
    "metrics.jsonl",
    "samples.jsonl",
    "answers.jsonl",
    "completions",
    "loss.png",
    "README.md",
    "trainer_state.json",
    "training_args.bin",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
)
# Flags that name what a run reads; a value that is not a path on this machine is a name on the hub.
READ_FLAG = re.compile(r"(_path|_dir|_file|_files|_model|dataset_name|deepspeed|fsdp_config|accelerator_config)$")
WRITE_FLAGS = ("output_dir", "logging_dir", "output_file")


def refuse_overlap(
    output_dir: Path,
    stage: str,
    groups: Sequence[Any],
    checkpoint: hub.Checkpoint | None = None,
    *,
    resumes: bool = False,
) -> None:
    """Refuse an output folder that is, contains, or is inside something that the run reads.

    Args:
        stage: for the name of the folder that the message proposes.
        groups: the argument dataclasses of the program.
        checkpoint: the model that is trained, whose base need not be found again.
        resumes: the run in this folder is continued, which removes nothing: only `is` is refused.

    Raises:
        UserError: it names both paths and a folder that can be used.
    """
    read = list(paths_read(groups, checkpoint))
    for what, path in read:
        how = overlap(output_dir, path)
        if how == "is" or (how and not resumes):
            raise UserError(
                f"--output_dir {output_dir} {how} {what} {path}. A run writes, and with --overwrite_output_dir "
                "removes, files of these names in its output folder, so it needs one that nothing is read from: "
                f"--output_dir {_free_folder(output_dir, path, stage, [path for _, path in read])}"
            )


def paths_read(groups: Sequence[Any], checkpoint: hub.Checkpoint | None = None) -> Iterator[tuple[str, Path]]:
    """What the arguments of a program make it read on this machine, as (description, path).

    The base of an adapter, the file of `--config`, the caches and the programs themselves are included.
    """
    resolved = {Path(checkpoint.name): Path(checkpoint.base)} if checkpoint else {}
    if checkpoint and checkpoint.adapter:
        resolved[Path(checkpoint.adapter.path)] = Path(checkpoint.base)
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name, None)
            if not READ_FLAG.search(field.name) or field.name in WRITE_FLAGS:
                continue
            values = value if isinstance(value, list | tuple) else [value]
            texts = [each for each in values if isinstance(each, str)]
            for path in (path for text in texts for path in _paths_in(text)):
                yield f"--{field.name}", path
                bases = [resolved[path]] if path in resolved else _bases(path)
                for base in (base for base in bases if base != path and base.exists()):
                    yield f"the base model of --{field.name}", base
    for flag, value in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        name, equals, inline = flag.partition("=")
        if name == "--config" and (path := Path(inline if equals else value)).is_file():
            yield "--config", path
    caches = {"the cache of data": datasets.config.HF_DATASETS_CACHE, "the cache of models": constants.HF_HUB_CACHE}
    for what, folder in caches.items():
        if Path(folder).exists():
            yield what, Path(folder)


def _paths_in(value: str) -> list[Path]:
    """The paths that exist among `a`, `a,b`, `a:0.7,b:0.3` and `a/*.jsonl`."""
    parts = [value] if Path(value).exists() else [part.strip() for part in value.split(",")]
    parts = [part if Path(part).exists() else part.rpartition(":")[0] or part for part in parts]
    return [Path(path) for part in parts if part for path in ([part] if Path(part).exists() else glob.glob(part))]


def _bases(path: Path) -> Iterator[Path]:
    """The base that an adapter names, that of this one if it is an adapter too, and so on."""
    seen: set[Path] = set()
    while (path / hub.ADAPTER_CONFIG).is_file() and path.resolve() not in seen:
        seen.add(path.resolve())
        try:
            path = Path(hub.resolve_checkpoint(str(path))[0])
        except (UserError, OSError, ValueError):
            # Whoever loads it reports what is wrong.
            return
        yield path


def _free_folder(output_dir: Path, source: Path, stage: str, read: Sequence[Path]) -> Path:
    """A folder that does not exist and touches nothing that is read: in `output_dir` if possible, or next to it."""
    name = f"{output_dir.resolve().name or 'outputs'}-{stage}"
    parents = (output_dir.absolute().parent, *source.absolute().parents)
    for folder in (output_dir.absolute() / stage, *(parent / name for parent in parents)):
        if not folder.exists() and not any(overlap(folder, path) for path in read):
            return folder if output_dir.is_absolute() else _relative(folder)
    return Path.home() / name


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def read_record(output_dir: Path) -> dict[str, Any] | None:
    """run.json of a run; empty if there is none, None if it is damaged, which a full disk or a power failure can do."""
    try:
        record = json.loads((output_dir / hub.RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def recover(output_dir: Path) -> bool:
    """Complete what a killed program left in an output folder; see `PreviousRun.recover`. Hold its `FolderLock`."""
    # Both, always: the second is not to be skipped because the first has restored something.
    return any([PreviousRun(output_dir).recover(), PreviousRun.model_in(output_dir).recover()])


class PreviousRun:
    """An earlier run in an output folder, while another one is about to replace it.

    For the process that holds the `FolderLock`.

    Its files are in the output folder, then in `kept`. They are in `moving` while they are being moved there or back,
    and in `removing` from the moment at which the new run can replace them.

    Args:
        patterns: names of the files that are replaced; all others stay where they are.
        name: of the subfolder.
    """

    def __init__(self, output_dir: Path, patterns: Sequence[str] = RUN_FILES, name: str = ".previous-run"):
        self.output_dir, self.patterns = output_dir, patterns
        self.kept = output_dir / name
        self.moving = output_dir / f"{name}.moving"
        self.removing = output_dir / f"{name}.removing"

    @classmethod
    def model_in(cls, output_dir: Path) -> "PreviousRun":
        """Only the model in a folder, as it is replaced by `replace_model`; checkpoints and logs stay."""
        return cls(output_dir, MODEL_FILES, ".previous-model")

    def files(self) -> list[Path]:
        """What a run has written at the top of the output folder; the earlier one, or the new one."""
        return sorted({path for pattern in self.patterns for path in self.output_dir.glob(pattern)})

    def recover(self) -> bool:
        """Complete what a killed process left: remove the earlier run if there is a new one, else restore it.

        Returns:
            Whether the earlier run was restored.
        """
        restored = False
        if self.kept.is_dir() and self._is_replaced():
            self.discard()
        elif self.kept.is_dir() or self.moving.is_dir():
            self.restore()
            restored = True
        if self.removing.is_dir():
            remove_entry(self.removing)
        return restored

    def set_aside(self) -> None:
        """Move the earlier run into `kept`. If that fails, it is back in its place.

        Raises:
            OSError: a file could not be moved.
        """
        if not (files := self.files()):
            return
        try:
            self.moving.mkdir()
            for path in files:
                path.rename(self.moving / path.name)
            self.moving.rename(self.kept)
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Move the earlier run back; remove what the new one has written. Nothing is done if none was set aside."""
        if self.kept.is_dir():
            for path in self.files():
                remove_entry(path)
            # From here on there are files of the earlier run outside, which a second attempt must not remove.
            self.kept.rename(self.moving)
        if self.moving.is_dir():
            for path in sorted(self.moving.iterdir()):
                path.rename(self.output_dir / path.name)
            self.moving.rmdir()
            logger.warning(f"the run that was in {self.output_dir} before is restored: nothing had replaced it yet")

    def discard(self, reason: str = "the new run is saved") -> None:
        """Remove the earlier run, for a reason that is logged. Nothing is done if there is none."""
        if not self.kept.is_dir():
            return
        try:
            self.kept.rename(self.removing)
            remove_entry(self.removing)
            logger.info(f"{reason}; the run that was in {self.output_dir} before is removed")
        except OSError as error:
            # It is not worth ending the new run for this.
            logger.warning(f"the run that was in {self.output_dir} before could not be removed: {error}")

    def _is_replaced(self) -> bool:
        """Whether the new run, which was killed, has saved a complete checkpoint or has finished."""
        # Where a model alone is replaced, checkpoints of an earlier run may be left.
        if CHECKPOINTS in self.patterns and any(self.output_dir.glob(f"{CHECKPOINTS}/{MANIFEST}")):
            return True
        return (read_record(self.output_dir) or {}).get("status") == "finished"


@contextmanager
def replace_model(output_dir: Path) -> Iterator[Path]:
    """A folder to save a model in, which replaces the one in `output_dir` when the block ends without an error.

    Other files in `output_dir` stay. If the block fails, nothing has changed; so it should end by verifying the result.

    Raises:
        UserError: another process writes into this folder.
    """
    with FolderLock(output_dir):
        unfinished = output_dir / ".unfinished-model"
        # Left by a process that was killed.
        remove_entry(unfinished)
        unfinished.mkdir()
        try:
            yield unfinished
            _move_model(unfinished, output_dir)
        finally:
            remove_entry(unfinished)


def _move_model(unfinished: Path, output_dir: Path) -> None:
    previous = PreviousRun.model_in(output_dir)
    # A file of any other name that would be overwritten is restored as well if a move fails.
    previous.patterns = (*MODEL_FILES, *(glob.escape(path.name) for path in unfinished.iterdir()))
    previous.set_aside()
    try:
        # The record comes last: it says that the model is complete.
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == hub.RUN_FILE):
            path.rename(output_dir / path.name)
    except BaseException:
        previous.restore()
        raise
    previous.discard()
