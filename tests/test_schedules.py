"""Learning rate schedules: each type with right, missing and wrong settings, and runs that are resumed."""

import functools
import json

from medicalgpt.errors import UserError
from medicalgpt.training.schedules import check_schedule, known_settings
from tests.helpers import open_stage, read_json, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
from transformers import SchedulerType, TrainingArguments

RIGHT = {
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 1.5}],
    "cosine_with_restarts": [{}, {"num_cycles": 3}],
    "polynomial": [{}, {"lr_end": 1e-5, "power": 2.0}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "inverse_sqrt": [{}, {"timescale": 5}],
    "reduce_lr_on_plateau": [{}, {"factor": 0.5, "patience": 0, "min_lr": 1e-6}],
    "cosine_with_min_lr": [{"min_lr": 1e-5}, {"min_lr_rate": 0.1, "num_cycles": 0.5}],
    "cosine_warmup_with_min_lr": [{"min_lr": 1e-5}, {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}],
    "warmup_stable_decay": [
        {"num_decay_steps": 2},
        {"num_decay_steps": 2, "min_lr_ratio": 0.1, "decay_type": "1-sqrt"},
    ],
    "greedy": [{"min_lr": 1e-6}, {"min_lr": 1e-6, "max_lr": 1e-3, "smooth": True}],
}
OF_METRIC = ("reduce_lr_on_plateau", "greedy")


def arguments(kind: str, settings, **more) -> TrainingArguments:
    if kind in OF_METRIC:
        more = {"eval_strategy": "steps", "eval_steps": 2, **more}
    more = {"learning_rate": 2e-4, **more}
    return TrainingArguments(output_dir="unused", lr_scheduler_type=kind, lr_scheduler_kwargs=settings, **more)


def refusal(kind: str, settings, **more) -> str:
    with pytest.raises(UserError) as error:
        check_schedule(arguments(kind, settings, **more))
    assert len(str(error.value).splitlines()) <= 4
    return str(error.value)


# --- before data is read ---------------------------------------------------------------------------------------------


def test_every_type_of_the_library_is_known_here():
    assert {kind.value for kind in SchedulerType} == set(RIGHT)


@pytest.mark.parametrize(("kind", "settings"), [(kind, one) for kind, several in RIGHT.items() for one in several])
def test_right_settings_pass(kind, settings):
    check_schedule(arguments(kind, settings))
    check_schedule(arguments(kind, settings, max_steps=20))


@pytest.mark.parametrize("kind", RIGHT)
def test_an_unknown_setting_is_refused_with_those_that_are_known(kind):
    message = refusal(kind, {"min_lrr": 0.1})
    assert f"--lr_scheduler_type {kind} takes no setting min_lrr" in message
    known = known_settings(SchedulerType(kind))
    assert all(name in message for name in known)
    assert ("omit --lr_scheduler_kwargs" in message) == (not known)
    assert ("Did you mean min_lr?" in message) == ("min_lr" in known)


@pytest.mark.parametrize("kind", ["cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"])
def test_the_example_of_a_missing_setting_can_be_used(kind):
    message = refusal(kind, None)
    example = message[message.index("'{") + 1 : message.index("}'") + 1]
    check_schedule(arguments(kind, example))


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "Only one of min_lr or min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 0.5}, "outside of 0 to --learning_rate 0.0002"),
        ("cosine_with_min_lr", {"min_lr_rate": "a tenth"}, "cannot be used"),
        ("polynomial", {"lr_end": 0.1}, "lr_end (0.1) must be smaller"),
        ("inverse_sqrt", {"timescale": 0}, "division"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "sine"}, "'1-sqrt'"),
        ("reduce_lr_on_plateau", {"factor": 2}, "Factor should be < 1.0"),
        ("reduce_lr_on_plateau", {"min_lr": 1e-3}, "--learning_rate 0.0002 is outside"),
        ("linear", "num_cycles=2", "is not a JSON object"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(kind, settings, expected):
    assert expected in refusal(kind, settings)


def test_a_learning_rate_of_zero_has_no_share_for_an_absolute_minimum():
    """As in PPO, to train the critic alone at first."""
    with pytest.raises(UserError, match="min_lr 1e-05; use min_lr_rate"):
        check_schedule(arguments("cosine_with_min_lr", {"min_lr": 1e-5}, learning_rate=0))
    check_schedule(arguments("cosine_with_min_lr", {"min_lr_rate": 0.1}, learning_rate=0))


def test_phases_that_do_not_fit_into_the_run():
    message = refusal("warmup_stable_decay", {"num_decay_steps": 8}, max_steps=10, warmup_steps=4)
    assert "4 steps of warmup and num_decay_steps 8 do not fit into the 10 steps" in message
    check_schedule(arguments("warmup_stable_decay", {"num_decay_steps": 6}, max_steps=10, warmup_steps=4))


@pytest.mark.parametrize("kind", ["constant", *OF_METRIC])
def test_a_warmup_without_effect(kind):
    message = refusal(kind, RIGHT[kind][0], warmup_steps=3)
    assert f"--warmup_steps 3 has no effect with --lr_scheduler_type {kind}" in message
    check_schedule(arguments(message.split()[-1].rstrip("."), None, warmup_steps=3))


def test_a_schedule_of_a_metric_follows_its_direction():
    best_is_low, best_is_high = (
        arguments("reduce_lr_on_plateau", None, metric_for_best_model=name) for name in ("loss", "accuracy")
    )
    for one in (best_is_low, best_is_high):
        check_schedule(one)
    assert best_is_low.lr_scheduler_kwargs["mode"] == "min" and best_is_high.lr_scheduler_kwargs["mode"] == "max"


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base"), tiny_tokenizer(), context=512)


@pytest.fixture
def open_run(base, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Q {n}?", "response": "Yes. " * n} for n in range(1, 9)])
    write_jsonl(tmp_path / "held.jsonl", [{"prompt": f"H {n}?", "response": "No. " * n} for n in range(1, 3)])

    def opened(name: str, *more):
        return open_stage(
            "supervised_finetuning.py",
            *("--model_name_or_path", base, "--train_file_dir", tmp_path / "rows.jsonl"),
            *("--output_dir", tmp_path / name, "--sample_prompts", 0, "--per_device_train_batch_size", 2),
            *("--lora_dropout", 0, "--learning_rate", 2e-4, *more),
        )

    return opened


def table(folder) -> dict[str, dict]:
    return {line["name"]: line for line in read_json(folder / "run.json")["observed"]}


def logged(folder) -> dict[int, tuple[float, float]]:
    """Loss and learning rate of each step."""
    return {
        line["step"]: (line["loss"], line["learning_rate"])
        for line in read_json(folder / "metrics.jsonl")
        if "loss" in line
    }


def stop_after(trainer, step: int) -> None:
    """End the training as a signal would, after this step and its checkpoint."""
    save = trainer._save_checkpoint

    @functools.wraps(save)
    def save_and_stop(*args, **kwargs):
        save(*args, **kwargs)
        trainer.control.should_training_stop = trainer.state.global_step >= step

    trainer._save_checkpoint = save_and_stop


@pytest.mark.parametrize(("kind", "settings"), [(kind, several[-1]) for kind, several in RIGHT.items()])
def test_every_schedule_agrees_in_the_table(open_run, tmp_path, kind, settings):
    more = ("--lr_scheduler_type", kind, "--max_steps", 6, "--logging_steps", 1, "--save_strategy", "no")
    if settings:
        more += ("--lr_scheduler_kwargs", json.dumps(settings))
    if kind in OF_METRIC:
        more += ("--eval_strategy", "steps", "--eval_steps", 2, "--validation_file_dir", tmp_path / "held.jsonl")
    elif kind != "constant":
        more += ("--warmup_steps", 2)
    open_run("run", *more).finish()
    lines = table(tmp_path / "run")
    assert lines["schedule"]["agrees"] and lines["schedule"]["observed"].strip()
    assert lines["learning rate"]["agrees"]


SAVING = ("--save_strategy", "steps", "--save_steps", 3, "--logging_steps", 2)


def test_the_mean_loss_of_a_resumed_run_is_that_of_all_its_steps(open_run, tmp_path):
    """The checkpoint is one step after the last log, so that the log does not know all losses before it."""
    whole = open_run("whole", *SAVING, "--max_steps", 8).finish()
    stopped = open_run("parts", *SAVING, "--max_steps", 8)
    stop_after(stopped.trainer, 3)
    stopped.finish()
    resumed = open_run("parts", *SAVING, "--max_steps", 8, "--resume_from_checkpoint", "True").finish()
    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-4)
    assert (
        resumed["train_runtime"]
        > read_json(tmp_path / "parts/checkpoint-3/trainer_state.json")["stateful_callbacks"]["run_figures"]["seconds"]
    )
    record = read_json(tmp_path / "parts" / "run.json")
    assert record["metrics"]["train_loss"] == resumed["train_loss"]
    assert f"train_loss: {resumed['train_loss']:.6g}" in (tmp_path / "parts" / "README.md").read_text()


def test_more_steps_continue_the_schedule_of_the_longer_run(open_run, tmp_path):
    """A finished run has decayed to 0; its continuation must not train at 0, nor call that an agreement."""
    each = ("--save_strategy", "steps", "--save_steps", 4, "--logging_steps", 1)
    open_run("run", *each, "--max_steps", 4).finish()
    assert logged(tmp_path / "run")[4][1] == pytest.approx(2e-4 / 4)
    open_run("run", *each, "--max_steps", 8, "--resume_from_checkpoint", "True").finish()
    rates = {step: rate for step, (_, rate) in logged(tmp_path / "run").items()}
    assert [rates[step] for step in (5, 6, 7, 8)] == pytest.approx([2e-4 * (8 - done) / 8 for done in (4, 5, 6, 7)])
    line = table(tmp_path / "run")["schedule"]
    assert line["agrees"] and line["observed"] == "1 at 0, 0.5 at 4"


def test_the_table_shows_the_rate_that_is_applied(open_run, tmp_path, monkeypatch):
    """The defect put back: the rates of the checkpoint stay, whatever the schedule says."""
    each = ("--save_strategy", "steps", "--save_steps", 4)
    open_run("run", *each, "--max_steps", 4).finish()
    monkeypatch.setattr("medicalgpt.training.trainers.continue_schedule", lambda *args: None)
    with pytest.raises(
        UserError, match="schedule: requested linear, warmup 0: 1 at 0, 0.5 at 4; observed 1 at 0, 0 at 4"
    ):
        open_run("run", *each, "--max_steps", 8, "--resume_from_checkpoint", "True").finish()


def test_a_decay_that_does_not_fit_is_refused_before_training(open_run, tmp_path):
    more = ("--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 50}')
    with pytest.raises(UserError, match="num_decay_steps 50 do not fit into the 4 steps of this run"):
        open_run("run", *more, "--num_train_epochs", 1).finish()


@pytest.mark.parametrize("kind", OF_METRIC)
def test_a_resumed_schedule_of_a_metric_keeps_its_rate(open_run, tmp_path, kind):
    """After a plateau the rate is not that of the flags any more, which does not count as a difference."""
    settings = {"reduce_lr_on_plateau": '{"patience": 0, "threshold": 10}', "greedy": '{"patience": 0, "min_lr": 1e-6}'}
    more = ("--lr_scheduler_type", kind, "--lr_scheduler_kwargs", settings[kind], "--eval_strategy", "steps")
    more += (
        "--validation_file_dir",
        tmp_path / "held.jsonl",
        "--eval_steps",
        1,
        "--save_steps",
        4,
        "--logging_steps",
        1,
    )
    open_run("run", *more, "--max_steps", 4).finish()
    open_run("run", *more, "--max_steps", 6, "--resume_from_checkpoint", "True").finish()
    lines = table(tmp_path / "run")
    assert lines["learning rate"]["agrees"] and lines["schedule"]["agrees"]
    rates = logged(tmp_path / "run")
    assert rates[5][1] != pytest.approx(2e-4)


# --- evaluations that are compared -----------------------------------------------------------------------------------


def evaluated(tmp_path, *more) -> tuple:
    """Flags of a run that evaluates in every step; no rate is high enough to change anything measurable."""
    flags = ("--eval_strategy", "steps", "--eval_steps", 1, "--validation_file_dir", tmp_path / "held.jsonl")
    return (*flags, "--save_strategy", "steps", "--save_steps", 1, "--logging_steps", 1, "--max_steps", 8, *more)


def test_training_ends_after_evaluations_without_a_better_metric(open_run, tmp_path):
    more = ("--early_stopping_patience", 3, "--early_stopping_threshold", 10)
    open_run("run", *evaluated(tmp_path, *more)).finish()
    record = read_json(tmp_path / "run" / "run.json")
    # The first evaluation is the one to compare with, the next three are not better by 10.
    assert record["stopped_early"]["step"] == 4 == max(logged(tmp_path / "run"))
    assert record["stopped_early"]["evaluations_without_a_better"] == {"eval_loss": 3}
    assert record["status"] == "finished"


def test_the_count_of_evaluations_continues_after_a_resume(open_run, tmp_path):
    """The evaluation before the first step of the resumed run repeats one that was counted already."""
    more = ("--early_stopping_patience", 3, "--early_stopping_threshold", 10)
    stopped = open_run("run", *evaluated(tmp_path, *more))
    stop_after(stopped.trainer, 3)
    stopped.finish()
    assert "stopped_early" not in read_json(tmp_path / "run" / "run.json")
    open_run("run", *evaluated(tmp_path, *more, "--resume_from_checkpoint", "True")).finish()
    assert read_json(tmp_path / "run" / "run.json")["stopped_early"]["step"] == 4


def test_early_stopping_can_be_added_on_a_resume(open_run, tmp_path):
    stopped = open_run("run", *evaluated(tmp_path))
    stop_after(stopped.trainer, 2)
    stopped.finish()
    more = ("--early_stopping_patience", 1, "--early_stopping_threshold", 10, "--resume_from_checkpoint", "True")
    open_run("run", *evaluated(tmp_path, *more)).finish()
    # The checkpoint has no best metric, so the evaluation of step 3 is the one to compare with.
    assert read_json(tmp_path / "run" / "run.json")["stopped_early"]["step"] == 4


def test_an_improving_run_is_not_stopped(open_run, tmp_path):
    more = ("--early_stopping_patience", 1, "--learning_rate", 1e-2, "--max_steps", 4)
    open_run("run", *evaluated(tmp_path, *more)).finish()
    assert "stopped_early" not in read_json(tmp_path / "run" / "run.json")
    assert max(logged(tmp_path / "run")) == 4


def test_a_metric_that_the_evaluation_does_not_have_is_refused_before_the_first_step(open_run, tmp_path):
    opened = open_run("run", *evaluated(tmp_path, "--metric_for_best_model", "accuracy"))
    with pytest.raises(UserError) as error:
        opened.finish()
    message = str(error.value)
    assert message.startswith("--metric_for_best_model accuracy is not a metric of the evaluation. Use one of these: ")
    assert opened.trainer.state.global_step == 0
    for name in message.rpartition(": ")[2].rstrip(".").split(", "):
        open_run(name, *evaluated(tmp_path, "--metric_for_best_model", name, "--max_steps", 1)).finish()
    with pytest.raises(UserError, match="Omit --eval_on_start False"):
        open_run("other", *evaluated(tmp_path, "--metric_for_best_model", "accuracy", "--eval_on_start", "False"))


def test_the_lowest_perplexity_is_the_best(open_run, tmp_path):
    more = ("--metric_for_best_model", "perplexity", "--load_best_model_at_end", "True", "--learning_rate", 1e-2)
    opened = open_run("run", *evaluated(tmp_path, *more, "--max_steps", 3))
    opened.finish()
    found = [line["eval_perplexity"] for line in opened.trainer.state.log_history if "eval_perplexity" in line]
    assert opened.trainer.state.best_metric == min(found[1:]) < max(found[1:])
