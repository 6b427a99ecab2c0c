"""What tests of whole programs share: run one as a user would, write its data, read what it leaves."""

import atexit
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from medicalgpt.training.folder_lock import FolderLock
from tests import fork_server

ROOT = Path(__file__).resolve().parent.parent


def run_program(
    script: str,
    *args: Any,
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
    check: bool = True,
    processes: int = 1,
    launcher: str | None = None,
    folder: str | Path = ROOT,
) -> subprocess.CompletedProcess:
    """Run a program of the repository root, offline and on one thread, and return it with its output as text.

    Args:
        script: its file name, relative to the root, or an absolute path.
        args: flags; anything that is not a string is turned into one.
        env: variables on top of the present ones.
        timeout: seconds.
        check: fail, with all that was printed, if the exit code is not 0.
        processes: more than one work together as under torchrun, over gloo where there is no GPU.
        launcher: the module that starts several processes, to be tried itself (`torch.distributed.run`).
        folder: where it is started.
    """
    environment = {**os.environ, **fork_server.FOR_ALL, **(env or {})}
    command = [str(ROOT / script), *map(str, args)]
    if launcher is None and fork_server.can_start(environment):
        done = fork_server.run(command, environment, timeout, processes, folder=folder)
    else:
        several = ["-m", launcher or "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run(
            [sys.executable, *(several if processes > 1 else ()), *command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    if check and done.returncode != 0:
        raise AssertionError(f"{script} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def run_here(script: str, *args: Any) -> None:
    """Run a program's `main` in this process, which saves the seconds that its imports take.

    A `UserError` comes out as it is raised, not as an exit code; locks are then released, as when a process ends.
    """
    module = importlib.import_module(Path(script).stem)
    locks: list[Callable[[], None]] = []
    register = atexit.register

    def note_lock(function: Callable, *rest: Any, **named: Any) -> Callable:
        if isinstance(getattr(function, "__self__", None), FolderLock):
            locks.append(function)
        return register(function, *rest, **named)

    with patch.object(sys, "argv", [script, *map(str, args)]), patch.object(atexit, "register", note_lock):
        try:
            module.main()
        except BaseException:
            for release in locks:
                release()
            raise


@dataclass
class Opened:
    """A training program stopped where it would begin to train: everything is loaded, encoded and built."""

    run: Any
    trainer: Any
    tokenizer: Any
    options: dict[str, Any]

    def finish(self) -> dict[str, float]:
        """Train and save, as the program would have gone on; returns its metrics."""
        return self.run.train_and_save(self.trainer, self.tokenizer, **self.options)


def open_stage(script: str, *args: Any) -> Opened:
    """Run a training program in this process up to its last step, so that a test can look at its trainer."""
    from medicalgpt.training.runs import Run

    caught: list[Opened] = []

    def stop(run: Any, trainer: Any, tokenizer: Any, **options: Any) -> None:
        caught.append(Opened(run, trainer, tokenizer, options))

    with patch.object(Run, "train_and_save", stop):
        run_here(script, *args)
    return caught[0]


def save_model(path: str | Path, tokenizer: Any, *, tied: bool = False, context: int = 4096, seed: int = 0) -> str:
    """Save a Qwen3 of two layers with random weights beside its tokenizer; returns the folder as a string."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=context,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> str:
    """Write a row a line, with the folders that it needs; text goes as it is. Returns the path as a string."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def read_json(path: str | Path) -> Any:
    """What a JSON file holds; of a .jsonl file, the list of its rows."""
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix != ".jsonl":
        return json.loads(text)
    # Only a line feed ends a row: a string may contain U+2028, which also ends a line for Python.
    return [json.loads(line) for line in text.split("\n") if line]


def commit(checkpoint: str | Path) -> None:
    """Write the manifest of a checkpoint, again if a test has changed its files."""
    from medicalgpt.files import hash_file
    from medicalgpt.training.checkpoints import MANIFEST

    files = [path for path in sorted(Path(checkpoint).rglob("*")) if path.is_file() and path.name != MANIFEST]
    entries = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in files
    }
    Path(checkpoint, MANIFEST).write_text(json.dumps(entries))


def stop_tokens(folder: str | Path) -> list[str]:
    """The tokens that end an answer of a trained model, as its run.json says.

    Its generation_config.json must say the same; a reward model, which answers nothing, must have none.
    """
    from transformers import AutoTokenizer

    record, generation = read_json(Path(folder, "run.json")), Path(folder, "generation_config.json")
    if record["stage"] == "reward_modeling":
        assert not generation.exists()
    else:
        assert read_json(generation)["eos_token_id"] == record["stop_token_ids"]
    return AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(record["stop_token_ids"])


def chat(messages: list[dict], tools: list[dict] | None = None) -> dict[str, Any]:
    """A converted row, as `encode_chat` takes it."""
    return {"messages": messages, "tools": tools}
