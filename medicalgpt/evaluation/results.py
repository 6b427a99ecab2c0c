"""The results file of an evaluation, and which of its results are still valid."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medicalgpt.errors import UserError
from medicalgpt.files import write_atomically

if TYPE_CHECKING:
    from medicalgpt.models.hub import Checkpoint

FORMAT = 3
# Name of the reward model's results among those of the models; no model can have it.
REWARD = "=reward"
CHECKPOINT_FILES = (
    "*.safetensors",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.jinja",
)


def fingerprint_files(paths: Sequence[Path]) -> list[list]:
    """Return [path, bytes, modification time in ns] of each file: what changes when the file does."""
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)]


def fingerprint_checkpoint(checkpoint: "Checkpoint") -> list[list] | None:
    """Return the fingerprint of a local checkpoint and, for an adapter, of its base; None if one is not local."""
    folders = [Path(checkpoint.source), *([Path(checkpoint.adapter.path)] if checkpoint.adapter else [])]
    if not all(folder.is_dir() for folder in folders):
        return None
    return fingerprint_files([file for folder in folders for kind in CHECKPOINT_FILES for file in folder.glob(kind)])


class ResultsFile:
    """Results of models and of a reward model, written after each one, so that a stopped evaluation loses none.

    A result is reused if its fingerprint is the same: of the checkpoint, of what all results depend on, and of the
    settings that it was measured with.
    """

    def __init__(self, path: Path, names: Sequence[str], inputs: dict[str, Any]):
        """
        Args:
            names: of all models, in the order in which their results will be added.
            inputs: what all results depend on, such as the version of the code; their fingerprints hold it.

        Raises:
            UserError: there is another file at `path`.
        """
        self.path, self.names, self.inputs = path, list(names), inputs
        self.models: list[dict[str, Any]] = []
        self.reward: dict[str, Any] | None = None
        self._previous = self._read()

    def fingerprint(self, checkpoint: "Checkpoint", settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return what a result depends on; None if the checkpoint is not on this machine, and nothing is reused."""
        found = fingerprint_checkpoint(checkpoint)
        return found and {**self.inputs, "checkpoint": found, "settings": settings}

    def find(self, fingerprint: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the earlier result with this fingerprint, if any."""
        if fingerprint is None:
            return None
        return next((result for result in self._previous if result.get("fingerprint") == fingerprint), None)

    def write(self, description: dict[str, Any]) -> None:
        """Write the results so far.

        Args:
            description: further entries of the file: what was measured, and how.
        """
        # Earlier results of models still to come are kept apart.
        waiting = self.names[len(self.models) :] + ([] if self.reward else [REWARD])
        earlier = [result for result in self._previous if result["name"] in waiting]
        content = {"format": FORMAT, **description, "models": self.models, "reward": self.reward, "earlier": earlier}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n")

    def _read(self) -> list[dict[str, Any]]:
        try:
            previous = json.loads(self.path.read_text(encoding="utf-8"))
            if previous["format"] != FORMAT and "models" in previous:
                return []
            return [*previous["models"], *previous["earlier"], *filter(None, [previous["reward"]])]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--output_file {self.path} exists and does not hold results of an evaluation ({error!r}). Choose "
                "another file, or remove it first."
            ) from error
