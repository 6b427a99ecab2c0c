"""What a person sees on a terminal: read from a real pseudo terminal, as wide as two common ones."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from medicalgpt import KNOWN_MESSAGES
from medicalgpt.training.observed import OFF, Line, as_summary, as_table
from medicalgpt.training.plots import loss_line
from tests.helpers import ROOT, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest


def on_terminal(columns: int, *command: object) -> str:
    """All that a program writes to a terminal of this width, control characters included."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    written = b""
    while True:
        try:
            chunk = os.read(controller, 65536)
        except OSError:
            # So Linux tells that the program has closed its end.
            break
        if not chunk:
            break
        written += chunk
    os.close(controller)
    assert process.wait() == 0, written.decode()
    return written.decode()


def screen(written: str) -> list[str]:
    """The lines that are left on a terminal, without colours: a carriage return lets later text overwrite."""
    lines = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", written).replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            part = part.replace("\x1b[A", "")
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    base = save_model(folder / "base", tiny_tokenizer(), context=512)
    rows = [{"prompt": f"Question {n}?", "response": "Answer. " * n} for n in range(1, 11)]
    write_jsonl(folder / "data" / "rows.jsonl", rows[:8])
    write_jsonl(folder / "held-out" / "rows.jsonl", [{"prompt": "Another?", "response": "Yes."}])

    def run(columns: int, *more: object) -> str:
        return on_terminal(
            columns,
            "supervised_finetuning.py",
            *("--model_name_or_path", base, "--train_file_dir", folder / "data"),
            *("--validation_file_dir", folder / "held-out", "--output_dir", folder / str(columns)),
            *("--save_strategy", "no", "--sample_prompts", "0", "--per_device_train_batch_size", "2"),
            *("--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "4", *more),
        )

    return run


@pytest.mark.parametrize(("columns", "more"), [(80, ()), (120, ("--logging_steps", "1"))])
def test_a_short_run_on_a_terminal(sft, columns, more):
    written = sft(columns, *more)
    lines = screen(written)
    text = "\n".join(lines)
    assert "{'loss'" not in text and "{'eval" not in text
    losses = [line for line in lines if re.search(r" step \d/4 \(\d+%\)  loss [\d.]+", line)]
    assert len(losses) == (4 if more else 1)
    assert all("learning_rate" in line and " tokens/s " in line and line.endswith((" GB", " to go")) for line in losses)
    # Of the untrained model in the first step's line, and of the trained one in the last line.
    evaluations = [line.split("eval_loss")[0].split() for line in lines if "eval_loss" in line]
    assert evaluations == [["INFO", "step", "0/4", "(0%)"], ["INFO"]]
    assert "observed as requested" in text and "optimizer  " not in text
    assert "Failed to load" not in text and "[transformers]" not in text
    # Colours begin a line of the log: what stands before one on its line is torn.
    torn = [
        line for line in lines if re.search(r"\S.*(INFO   |WARNING) ", line) or re.search(r"it/s.*(step|next:) ", line)
    ]
    assert not torn
    bars = re.findall(r"\d+%\|[^|]*\| *\d/4", written)
    assert bars and bars[-1].startswith("100%")
    assert bool(re.search(r" loss [\d.]+ [▁▂▃▄▅▆▇█]{4} [\d.]+$", text, re.MULTILINE)) == bool(more)


def test_the_loss_is_drawn_from_high_to_low(tmp_path):
    assert loss_line_of(tmp_path, [4, 3, 2, 1]) == "loss 4 █▆▃▁ 1"
    assert loss_line_of(tmp_path, [2, float("nan"), 2]) == "loss 2 ▁▁ 2"
    assert loss_line_of(tmp_path, [2]) is None
    assert len(loss_line_of(tmp_path, range(101, 1, -1)).split()[2]) == 40


def loss_line_of(folder, losses):
    write_jsonl(folder / "metrics.jsonl", [{"step": step, "loss": loss} for step, loss in enumerate(losses)])
    return loss_line(folder)


def test_settings_are_one_line_unless_one_differs():
    same, unseen = Line("optimizer", "AdamW", "AdamW", True), Line("rate", "1", "not observed (ZeRO-3)", None)
    idle, differs = Line("quantization", OFF, OFF, True), Line("adapter", "rank 4", "rank 8", False)
    assert as_summary([same, idle]) == ["settings       1 observed as requested; --verbose True shows all"]
    assert ", 1 not observed (rate);" in as_summary([same, unseen])[0]
    assert as_summary([same, idle, differs]) == as_table([same, idle, differs])


@pytest.mark.parametrize(("name", "text", "reason"), KNOWN_MESSAGES, ids=[name for name, *_ in KNOWN_MESSAGES])
def test_only_the_known_message_of_a_library_is_kept_out(name, text, reason):
    known, unknown = (logging.makeLogRecord({"name": name, "msg": msg}) for msg in (f"{text} here", "Out of paper"))
    assert not logging.getLogger(name).filter(known) and logging.getLogger(name).filter(unknown) and reason
