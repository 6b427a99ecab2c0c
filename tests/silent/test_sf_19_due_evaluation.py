"""An evaluation that a stop has left out is made by the resumed run, and counts as if it had been made in its step."""

import os
import signal
from pathlib import Path

from medicalgpt.errors import Stopped
from tests.helpers import open_stage, read_json, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

SFT = "supervised_finetuning.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sf19")
    save_model(folder / "model", tiny_tokenizer())
    for side, numbers in (("train", range(8)), ("held", range(8, 11))):
        write_jsonl(folder / side / "rows.jsonl", [{"prompt": f"Q{n}?", "response": "y" * (n + 2)} for n in numbers])
    return folder


class Stop(TrainerCallback):
    """Asks this process to stop in a step, or kills the run when the step has been saved."""

    def __init__(self, step: int, kills: bool):
        self.step, self.kills = step, kills

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.kills and state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_save(self, args, state, control, **kwargs):
        if self.kills and state.global_step == self.step:
            raise KeyboardInterrupt


def train(place: Path, output: Path, *flags: object, stop: int | None = None, kills: bool = False):
    words = ["--model_name_or_path", place / "model", "--train_file_dir", place / "train", "--output_dir", output]
    words += ["--validation_file_dir", place / "held", "--per_device_train_batch_size", 2, "--logging_steps", 1]
    words += ["--sample_prompts", 0, "--lora_dropout", 0.1, "--learning_rate", 0.01, "--resume", "auto"]
    opened = open_stage(SFT, *words, "--dataloader_pin_memory", "False", *flags)
    if stop is None:
        opened.finish()
    else:
        opened.trainer.add_callback(Stop(stop, kills))
        with pytest.raises(KeyboardInterrupt if kills else Stopped):
            opened.finish()
    return opened.trainer


def results(output: Path, trainer) -> dict[str, object]:
    """What the evaluations have led to."""
    rows = [row for row in read_json(output / "metrics.jsonl") if row["step"]]
    best = trainer.state.best_model_checkpoint
    return {
        "steps": trainer.state.global_step,
        "rates": {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row},
        "losses": {row["step"]: row["loss"] for row in rows if "loss" in row},
        "evaluated": {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row},
        "best": (trainer.state.best_metric, trainer.state.best_global_step, best and Path(best).name),
        "stopped_early": read_json(output / "run.json").get("stopped_early"),
    }


# Without dropout a lower loss is the rule, so that the highest one, which is the best here, is that of the first
# evaluation: a run that does not count it takes the second, and stops later.
EARLY = ("--metric_for_best_model", "loss", "--greater_is_better", "True", "--early_stopping_patience", 1)
EARLY += ("--load_best_model_at_end", "True")


@pytest.mark.parametrize(
    ("flags", "stop", "kills"),
    [
        # The evaluation of the stop is the best one.
        ((*EARLY, "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2, "--max_steps", 8), 2, False),
        # It ends the run: no step is left to train.
        ((*EARLY, "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2, "--max_steps", 8), 4, False),
        # It comes at the end of an epoch, after the step is saved.
        ((*EARLY, "--eval_strategy", "epoch", "--save_strategy", "epoch", "--num_train_epochs", 4), 4, False),
        (("--eval_strategy", "epoch", "--save_steps", 4, "--num_train_epochs", 2), 4, True),
        # The learning rate follows it.
        (
            (
                *("--eval_strategy", "steps", "--eval_steps", 1, "--max_steps", 5, "--eval_on_start", "False"),
                *("--lr_scheduler_type", "reduce_lr_on_plateau"),
                *("--lr_scheduler_kwargs", '{"patience": 0, "threshold": 0.9}'),
            ),
            2,
            False,
        ),
    ],
    ids=["best", "stops early", "end of epoch", "killed at the end of an epoch", "learning rate"],
)
def test_a_resumed_run_is_as_one_that_was_not_stopped(place, tmp_path, flags, stop, kills):
    whole = results(tmp_path / "whole", train(place, tmp_path / "whole", *flags))
    stopped = train(place, tmp_path / "stopped", *flags, stop=stop, kills=kills)
    assert stopped.state.global_step == stop
    assert stop not in {row["step"] for row in read_json(tmp_path / "stopped" / "metrics.jsonl") if "eval_loss" in row}
    assert results(tmp_path / "stopped", train(place, tmp_path / "stopped", *flags)) == whole
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_without_evaluations_none_is_made_up_for(place, tmp_path):
    flags = ("--max_steps", 4)
    train(place, tmp_path / "run", *flags, "--eval_strategy", "steps", "--eval_steps", 2, stop=2)
    trainer = train(place, tmp_path / "run", *flags, "--do_eval", "False")
    assert not any("eval_loss" in row for row in trainer.state.log_history if row["step"])
