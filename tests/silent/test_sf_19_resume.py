"""A run that was stopped and resumed sees the samples that a run without a stop sees, with the same losses."""

import json
import random
import shutil

from medicalgpt.errors import UserError
from tests.helpers import open_stage, read_json, write_jsonl
from tests.silent.callbacks import Kill
from tests.tiny import make_tiny

import pytest

STEPS = 12
# Length, whether rows are packed, and how they are read: (stage, flags).
RUNS = {
    "sft": ("supervised_finetuning.py", ["--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 2]),
    "packed": ("pretraining.py", ["--block_size", 64, "--per_device_train_batch_size", 2]),
    "workers": ("supervised_finetuning.py", ["--per_device_train_batch_size", 3, "--dataloader_num_workers", 2]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("sf19"), random.Random(0)
    make_tiny(folder / "model")
    # A dozen steps are one and a half epochs; some rows are too long.
    rows = [{"prompt": f"Q{n}?", "response": "x" * draw.randint(1, 60)} for n in range(32)]
    write_jsonl(folder / "supervised_finetuning" / "a.jsonl", rows[:20])
    write_jsonl(folder / "supervised_finetuning" / "b.jsonl", rows[20:])
    write_jsonl(folder / "pretraining" / "a.jsonl", [{"text": f"{n} " + "y" * draw.randint(1, 50)} for n in range(30)])
    return folder


def opened(place, name, output, *more):
    """A streaming run, stopped before its first step, and the list that its batches will join."""
    script, flags = RUNS[name]
    length = ["--model_max_length", 80, "--skip_long_rows", "True"] if script != "pretraining.py" else []
    run = open_stage(
        script,
        *("--model_name_or_path", place / "model", "--train_file_dir", place / script.removesuffix(".py")),
        *("--output_dir", output, "--streaming", "True", "--shuffle_buffer", 8, "--max_steps", STEPS),
        *("--logging_steps", 1, "--save_steps", 5, "--learning_rate", 0.01, "--sample_prompts", 0),
        *("--lora_dropout", 0.2, "--dataloader_pin_memory", "False", *length, *flags, *more),
    )
    seen, training_step = [], run.trainer.training_step

    def noting(model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].tolist())
        return training_step(model, inputs, *args, **kwargs)

    run.trainer.training_step = noting
    return run, seen


def steps(output):
    rows = [row for row in read_json(output / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [{key: row[key] for key in ("epoch", "loss", "grad_norm", "learning_rate")} for row in rows]


@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_equals_never_stopped(place, tmp_path, name):
    whole, wanted = opened(place, name, tmp_path / "whole")
    whole.finish()
    per_step = len(wanted) // STEPS
    # The second time the checkpoint lies in the second epoch, after the stop the first checkpoint in the first.
    for stop, checkpoint in ((7, 5), (11, 10)):
        output = tmp_path / f"stopped{stop}"
        run, first = opened(place, name, output)
        run.trainer.add_callback(Kill(stop))
        with pytest.raises(KeyboardInterrupt):
            run.finish()
        assert first == wanted[: stop * per_step]
        assert "stream.json" in read_json(output / f"checkpoint-{checkpoint}" / "manifest.json")
        run, second = opened(place, name, output, "--resume_from_checkpoint", "True")
        run.finish()
        assert second == wanted[checkpoint * per_step :]
        assert steps(output) == steps(tmp_path / "whole")
        assert read_json(output / "run.json")["streamed"] == read_json(tmp_path / "whole" / "run.json")["streamed"]
    assert 1.2 < steps(tmp_path / "whole")[-1]["epoch"] < 2


@pytest.fixture(scope="module")
def stopped(place):
    run, _ = opened(place, "sft", place / "stopped")
    run.trainer.add_callback(Kill(7))
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    return place / "stopped"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shuffle_buffer", 9], "shuffle_buffer 9 .before: 8."),
        (["--data_seed", 1], "data_seed 1 .before: 42."),
        (
            ["--dataloader_num_workers", 2],
            "dataloader_num_workers 2 .before: 0.: the checkpoint has a position for each",
        ),
        (["--packing", "True"], "packing True .before: False."),
        (["--max_train_samples", 9], "max_train_samples 9 .before: unset."),
    ],
)
def test_what_would_change_the_order_is_refused(place, stopped, tmp_path, more, message):
    shutil.copytree(stopped, tmp_path / "out")
    with pytest.raises(UserError, match=message):
        run, _ = opened(place, "sft", tmp_path / "out", "--resume_from_checkpoint", "True", *more)
        run.finish()


def test_streamed_or_not_stays_as_it_was(place, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    manifest = tmp_path / "out" / "checkpoint-5" / "manifest.json"
    (tmp_path / "out" / "checkpoint-5" / "stream.json").unlink()
    entries = read_json(manifest)
    manifest.write_text(json.dumps({name: entry for name, entry in entries.items() if name != "stream.json"}))
    with pytest.raises(UserError, match="Leave --streaming out"):
        opened(place, "sft", tmp_path / "out", "--resume_from_checkpoint", "True")
