"""What benchmarks/crash.py runs: every stage on a tiny model. A run is a fork of a process that imported everything.

Importing the libraries takes ten seconds and training for some steps takes one, so the process that calls `load` pays
for the imports once, and each run starts as its fork. It must not have started threads: a fork has none of them.
"""

import atexit
import contextlib
import gc
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import peers
from medicalgpt.errors import run_main

OUT, JOURNAL, ROWS, LOG = "out", "journal", "rows", "log"
ROW_COUNT = 20
# Compared byte by byte with those of the run that was not interrupted.
STATE_FILES = ("*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
SECONDS_A_RUN = 900
TIMED = ("seconds", "step_time", "tokens_per_second", "peak_memory_gb")


@dataclass(frozen=True)
class Stage:
    """A program, the rows that it is trained on, and its flags."""

    program: str
    rows: Callable[[int], dict[str, Any]]
    flags: tuple[Any, ...] = ()
    model: str = "model_name_or_path"


def _conversation(number: int) -> dict[str, Any]:
    return {"prompt": f"Question {number}?", "response": "yes " * (1 + 7 * number % 11)}


def _pair(number: int) -> dict[str, Any]:
    return {"prompt": f"Question {number}?", "chosen": "y" * (1 + 7 * number % 17), "rejected": "n" * (2 + number % 13)}


KEEP_DROPOUT = ("--disable_dropout", "False")
STAGES = {
    "pt": Stage("pretraining", lambda n: {"text": f"Text {n} " + "word " * (3 + n % 9)}, ("--block_size", 64)),
    "sft": Stage("supervised_finetuning", _conversation),
    "rm": Stage("reward_modeling", _pair, KEEP_DROPOUT),
    "dpo": Stage("dpo_training", _pair, KEEP_DROPOUT),
    "orpo": Stage("orpo_training", _pair, KEEP_DROPOUT),
    "ppo": Stage(
        "ppo_training",
        lambda n: {"prompt": f"Question {n}?"},
        ("--response_length", 4, "--num_mini_batches", 1, "--num_ppo_epochs", 2, *KEEP_DROPOUT),
        model="sft_model_path",
    ),
    "grpo": Stage(
        "grpo_training",
        lambda n: {"question": f"{n}?", "answer": str(n)},
        ("--num_generations", 2, "--max_completion_length", 4, "--reward_funcs", "length", "repetition"),
    ),
}


@dataclass(frozen=True)
class Case:
    """One way to train: a stage, an adapter or all weights, one or several processes."""

    stage: str
    full: bool = False
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.stage}, {'full' if self.full else 'LoRA'}, {self.processes} process(es)"


def load(stages: Iterable[str], work: Path) -> None:
    """Import what these stages need, and write their models and rows to `work`."""
    os.environ.update(
        {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_DATASETS_CACHE": str(work / "cache"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
    )
    from build_tiny_model import build_model
    from medicalgpt.models.templating import stop_token_ids
    from template import apply_template

    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.set_num_threads(1)
    for name in stages:
        _modules_of(STAGES[name].program)
    tokenizer = peers.train_tokenizer(["yes no word Question text"])
    stop = apply_template(tokenizer, "chatml")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    shape |= {"max_position_embeddings": 512, "seed": 0}
    model = build_model(tokenizer, stop_token_ids(tokenizer, stop), Namespace(**shape))
    for folder in ("model", "reward"):
        tokenizer.save_pretrained(work / folder)
    model.save_pretrained(work / "model")
    config = AutoConfig.from_pretrained(work / "model", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(work / "reward")
    for name in stages:
        (work / "data" / name).mkdir(parents=True)
        rows = [json.dumps(STAGES[name].rows(number)) + "\n" for number in range(ROW_COUNT)]
        (work / "data" / name / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    _warm_up(stages, work)


def _warm_up(stages: Iterable[str], work: Path) -> None:
    """Do once what would take each fork half of its time: late imports, parsed sources, and a heap free of garbage."""
    from medicalgpt.code_version import import_closure
    from medicalgpt.training.plots import plot_loss

    import_closure(*(STAGES[name].program for name in stages))
    (work / "plot").mkdir()
    (work / "plot" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n', encoding="utf-8")
    plot_loss(work / "plot")
    gc.collect()
    gc.freeze()


def _modules_of(program: str) -> ModuleType:
    """The program, with everything that its `main` imports."""
    module = importlib.import_module(program)
    source = Path(module.__file__).read_text(encoding="utf-8")
    for name in re.findall(r"^    from ([\w.]+) import|^    import ([\w.]+)", source, flags=re.MULTILINE):
        importlib.import_module("".join(name))
    return module


def flags_of(case: Case, work: Path, steps: int, save_steps: int = 1, limit: int | None = None) -> list[str]:
    """The command line of a run that writes to the folder `out` below the current one, or resumes what is there."""
    stage = STAGES[case.stage]
    flags = [f"--{stage.model}", work / "model", "--train_file_dir", work / "data" / case.stage, "--output_dir", OUT]
    flags += ["--resume", "auto"]
    if case.stage == "ppo":
        flags += ["--reward_model_path", work / "reward"]
    flags += ["--max_steps", steps, "--save_strategy", "steps", "--save_steps", save_steps, "--logging_steps", 1]
    flags += ["--save_total_limit", limit] if limit else []
    flags += ["--sample_prompts", 0, "--per_device_train_batch_size", 2]
    flags += ["--dataloader_pin_memory", "False"] if case.stage != "ppo" else []
    flags += ["--use_peft", str(not case.full), "--learning_rate", 1e-3]
    flags += ["--lora_dropout", 0.1] if not case.full and case.stage not in ("grpo",) else []
    return [str(word) for word in (*flags, *stage.flags)]


# -- forks -----------------------------------------------------------------------------------------------------------


def fork(action: Callable[[], object], folder: Path, log: str = LOG) -> int:
    """Run `action` in a fork of this process, in `folder`, with its output in a file there; returns its pid."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    # A program of several processes calls them at its end; those of the parent would remove its files.
    atexit._clear()
    try:
        os.chdir(folder)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for descriptor in (1, 2):
            os.dup2(target, descriptor)
        # Of the parent, they may be captured by a test.
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@dataclass
class Job:
    """The processes of one run."""

    pids: list[int]
    started: float = field(default_factory=time.monotonic)
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Whether all processes have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float = SECONDS_A_RUN) -> list[int]:
        """Exit codes by rank. When one process has failed, the others are ended as a launcher would do."""
        limit = time.monotonic() + seconds
        while not self.poll():
            if any(self.codes.values()) or time.monotonic() > limit:
                self.kill()
                continue
            time.sleep(0.005)
        return [self.codes[rank] for rank in range(len(self.pids))]

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                os.kill(pid, signal.SIGKILL)
        while not self.poll():
            time.sleep(0.001)


def start(case: Case, folder: Path, flags: Sequence[str], inside: Callable[[], object] = lambda: None) -> Job:
    """Start a run in `folder`, all of its processes on this machine.

    Args:
        inside: called in each process before its program, to prepare a fault.
    """
    program = STAGES[case.stage].program
    (folder / OUT).parent.mkdir(parents=True, exist_ok=True)
    port = _free_port() if case.processes > 1 else 0

    def run(rank: int) -> None:
        if case.processes > 1:
            size = str(case.processes)
            os.environ.update(
                {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            )
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        sys.argv = [f"{program}.py", *flags]
        _record(rank)
        inside()
        run_main(importlib.import_module(program).main)

    return Job([fork(lambda rank=rank: run(rank), folder, f"{LOG}.{rank}") for rank in range(case.processes)])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _record(rank: int) -> None:
    """Have this process write down which checkpoints it has committed, and which rows it has trained on."""
    from medicalgpt.training.checkpoints import CheckpointCommitter

    from transformers import Trainer

    on_save, training_step = CheckpointCommitter.on_save, Trainer.training_step

    def save(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        result = on_save(self, args, state, control, **kwargs)
        if rank == 0:
            _append(JOURNAL, state.global_step)
        return result

    def step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        _append(f"{ROWS}.{rank}", self.state.global_step, _digest(inputs))
        return training_step(self, model, inputs, *args, **kwargs)

    CheckpointCommitter.on_save, Trainer.training_step = save, step
    _append(f"{ROWS}.{rank}", -1, "start")


def _append(name: str, *words: Any) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
    os.close(descriptor)


def _digest(inputs: Any) -> str:
    import torch

    def flat(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: flat(value[name]) for name in sorted(value)}
        if isinstance(value, list | tuple):
            return [flat(each) for each in value]
        return value.tolist() if isinstance(value, torch.Tensor) else repr(value)

    return hashlib.sha256(json.dumps(flat(inputs)).encode()).hexdigest()[:16]


# -- what a run leaves -----------------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of weights, optimizer, scheduler and random state in a folder, by file name."""
    found = {path for pattern in STATE_FILES for path in folder.rglob(pattern)}
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


def committed_in(folder: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by their step, newest first, as the programs see them."""
    from medicalgpt.training.checkpoints import checkpoint_problem, numbered_checkpoints

    found = {int(path.name.rpartition("-")[2]): path for path in numbered_checkpoints(folder / OUT)}
    return {step: found[step] for step in sorted(found, reverse=True) if not checkpoint_problem(found[step])}


def journal(folder: Path) -> int:
    """The newest step whose checkpoint was committed, as the run wrote down; 0 if there is none."""
    path = folder / JOURNAL
    return max(map(int, path.read_text().split()), default=0) if path.exists() else 0


def rows_by_step(folder: Path) -> dict[str, dict[int, list[str]]]:
    """What each process was trained on in each step. A step that was repeated after a resume counts once, at last."""
    found: dict[str, dict[int, list[str]]] = {}
    for path in sorted(folder.glob(f"{ROWS}.*")):
        steps: dict[int, list[str]] = {}
        before = None
        for line in path.read_text().splitlines():
            step, digest = int(line.split()[0]), line.split()[1]
            if step != before:
                steps[step] = []
            steps[step].append(digest)
            before = step
        steps.pop(-1)
        found[path.name] = steps
    return found


def losses(folder: Path) -> dict[int, dict[str, float]]:
    """What was logged in each step, without times."""
    rows = [json.loads(line) for line in (folder / OUT / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        row["step"]: {name: value for name, value in row.items() if name not in TIMED} for row in rows if "loss" in row
    }


def tail_of_logs(folder: Path, size: int = 1500) -> str:
    """The end of what the processes of a run have printed."""
    return "\n".join(path.read_text(errors="replace")[-size:] for path in sorted(folder.glob(f"{LOG}*")))


def copy_run(source: Path, target: Path) -> None:
    """Copy the folder of a run."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
