"""A loss or a gradient that is not finite ends the run before its step: the checkpoints before it stay the newest."""

import math
import os
from functools import partial

from medicalgpt.errors import UserError, run_main
from medicalgpt.logs import rank
from medicalgpt.training.checkpoints import checkpoint_problem, numbered_checkpoints
from tests.helpers import ROOT, open_stage, read_json, run_program, save_model, write_jsonl
from tests.kills import run_together
from tests.silent.pairs import pairs
from tests.silent.ppo import make_place, ppo_flags
from tests.silent.tasks import task_flags, tasks
from tests.tiny import tiny_tokenizer

import pytest
import torch
from safetensors.torch import load_file, save_file

STEPS = 6
ROWS = {
    "pretraining.py": [{"text": f"Text {n}." + "!" * (7 * n % 23)} for n in range(8)],
    "supervised_finetuning.py": [{"prompt": f"Question {n}?", "response": "y" * (1 + 5 * n % 17)} for n in range(8)],
    "reward_modeling.py": pairs(8),
    "dpo_training.py": pairs(8),
    "orpo_training.py": pairs(8),
    "grpo_training.py": tasks(8),
}
STAGES = (*ROWS, "ppo_training.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models, and rows for each stage below `STAGE`/data."""
    folder = tmp_path_factory.mktemp("sf40")
    save_model(folder / "model", tiny_tokenizer())
    for stage, rows in ROWS.items():
        write_jsonl(folder / stage / "data" / "rows.jsonl", rows)
    (folder / "ppo_training.py").mkdir()
    make_place(folder / "ppo_training.py")
    return folder


def flags(place, stage, output, *more):
    common = ["--max_steps", STEPS, "--save_strategy", "steps", "--save_steps", 2, "--logging_steps", 10, *more]
    if stage == "ppo_training.py":
        return ppo_flags(place / stage, output, *common)
    if stage == "grpo_training.py":
        return [*task_flags(place / "model", place / stage), "--output_dir", output, *common]
    rest = ["--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 2, "--sample_prompts", 0]
    rest += ["--block_size", 64] if stage == "pretraining.py" else []
    paths = ("--model_name_or_path", place / "model", "--train_file_dir", place / stage / "data")
    return [*paths, "--output_dir", output, "--dataloader_pin_memory", "False", *rest, *common]


def break_loss(trainer, step, value=math.nan):
    """From `step` on (the first is 1) the loss is not finite, its gradient is."""
    compute_loss = trainer.compute_loss

    def broken(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        return loss + value if trainer.state.global_step + 1 >= step else loss

    trainer.compute_loss = broken


def break_gradient(trainer, step, value=math.nan):
    """From `step` on one gradient is not finite; the loss is."""
    weight = next(one for one in trainer.model.parameters() if one.requires_grad)
    weight.register_hook(lambda grad: grad + value if trainer.state.global_step + 1 >= step else grad)


BREAKS = {"loss": break_loss, "gradient": break_gradient, "overflow": partial(break_gradient, value=math.inf)}


def steps_of(folder):
    """The steps of all complete checkpoints, newest first."""
    found = [path for path in numbered_checkpoints(folder) if not checkpoint_problem(path)]
    return sorted((int(path.name.rpartition("-")[2]) for path in found), reverse=True)


def trained(trainer):
    return {name: one.detach().clone() for name, one in trainer.model.named_parameters() if one.requires_grad}


@pytest.mark.parametrize("what", ["loss", "gradient", pytest.param("overflow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", [1, 3, STEPS])
def test_the_step_is_not_taken_and_nothing_is_saved(place, tmp_path, what, step):
    opened = open_stage("supervised_finetuning.py", *flags(place, "supervised_finetuning.py", tmp_path / "out"))
    BREAKS[what](opened.trainer, step)
    seen = {}
    create = opened.trainer.create_optimizer

    def watched(*args):
        optimizer = create(*args)
        optimizer.register_step_post_hook(lambda *_: seen.update(trained(opened.trainer)))
        return optimizer

    opened.trainer.create_optimizer = watched
    before = trained(opened.trainer)
    with pytest.raises(UserError, match=rf"became (nan|inf) in step {step}\b") as error:
        opened.finish()
    # The weights are those of the last step that was taken.
    for name, weight in trained(opened.trainer).items():
        assert torch.equal(weight, (seen or before)[name])
    assert steps_of(tmp_path / "out") == [one for one in (4, 2) if one < step]
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert read_json(tmp_path / "out" / "run.json")["status"] == "failed"
    lines = str(error.value).splitlines()
    assert len(lines) <= 4 and "rows.jsonl:" in str(error.value)


def check_rows(folder, step):
    """The rows that were written are at the places that are named."""
    rows = read_json(folder / f"not_finite_step_{step}.jsonl")
    assert rows
    for row in rows:
        for place in row["place"].split(", "):
            file, line = place.rsplit(":", 1)
            source = read_json(file)[int(line) - 1]
            assert (source.get("text") or source.get("prompt") or source["question"]) in row["text"]
    return rows


@pytest.mark.parametrize("what", ["gradient", pytest.param("loss", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_names_the_rows_and_writes_them(place, tmp_path, stage, what):
    opened = open_stage(stage, *flags(place, stage, tmp_path / "out"))
    BREAKS[what](opened.trainer, 3)
    with pytest.raises(UserError, match=f"(?s)the {what}.* became nan in step 3.*rows.jsonl:"):
        opened.finish()
    assert steps_of(tmp_path / "out") == [2]
    check_rows(tmp_path / "out", 3)


@pytest.mark.parametrize(
    "more", [("--packing", "True"), ("--streaming", "True"), ("--packing", "True", "--streaming", "True")], ids=str
)
def test_packed_and_streamed_rows_are_named(place, tmp_path, more):
    # Two batches a step, of which the second alone is broken.
    opened = open_stage("pretraining.py", *flags(place, "pretraining.py", tmp_path / "out", *more))
    compute_loss, seen = opened.trainer.compute_loss, []

    def broken(*args, **kwargs):
        seen.extend([args[1]["input_ids"]] * opened.trainer.state.global_step)
        return compute_loss(*args, **kwargs) * (math.inf if len(seen) == 2 else 1)

    opened.trainer.compute_loss = broken
    with pytest.raises(UserError, match="became inf in step 2"):
        opened.finish()
    rows = check_rows(tmp_path / "out", 2)
    assert {row["batch"] for row in rows} == {2}
    text = opened.tokenizer.decode(seen[1].flatten())
    assert all(row["text"] in text for row in rows)
    assert len(rows) == text.count("Text")


def test_without_a_culprit_all_rows_of_the_step_are_named(place, tmp_path):
    """The gradient is not finite once; when each batch is looked at alone, all are."""
    stage = "supervised_finetuning.py"
    opened = open_stage(stage, *flags(place, stage, tmp_path / "out"))
    norm = opened.trainer._clip_grad_norm
    opened.trainer._clip_grad_norm = lambda model: norm(model) * (math.nan if opened.trainer.state.global_step else 1)
    with pytest.raises(UserError, match="the gradient norm became nan in step 2"):
        opened.finish()
    assert len(check_rows(tmp_path / "out", 2)) == 4


@pytest.mark.parametrize(("limit", "skipped"), [(None, 10), (3, 3)])
def test_float16_may_skip_some_steps_in_a_row(place, tmp_path, limit, skipped):
    stage = "supervised_finetuning.py"
    opened = open_stage(stage, *flags(place, stage, tmp_path / "out", "--max_steps", 14, "--save_strategy", "no"))
    trainer = opened.trainer
    # accelerate gives float16 on a GPU a scaler; on a CPU it refuses float16.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    weight = next(one for one in trainer.model.parameters() if one.requires_grad)
    ending = 2 + (limit or 100)
    weight.register_hook(lambda grad: grad * math.inf if 2 <= trainer.state.global_step < ending else grad)
    if limit:
        opened.finish()
        assert trainer.state.global_step == 14 and trainer.accelerator.scaler.get_scale() == 2.0 ** (16 - skipped)
    else:
        with pytest.raises(UserError, match=f"in step {2 + skipped}.*"):
            opened.finish()


def test_float16_does_not_excuse_a_loss(place, tmp_path):
    stage = "supervised_finetuning.py"
    opened = open_stage(stage, *flags(place, stage, tmp_path / "out"))
    opened.trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    break_loss(opened.trainer, 3)
    with pytest.raises(UserError, match="the loss became nan in step 3"):
        opened.finish()


def broken_model(place, folder, name, value):
    """The model with one number that is not finite."""
    tokenizer = tiny_tokenizer()
    save_model(folder, tokenizer)
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("value", "peft"), [(math.nan, "True"), (math.inf, "False")])
def test_a_base_that_is_broken_is_named(place, tmp_path, value, peft):
    name = "model.layers.1.mlp.up_proj.weight"
    model = broken_model(place, tmp_path / "model", name, value)
    stage = "supervised_finetuning.py"
    more = ["--model_name_or_path", model, "--use_peft", peft, "--sample_prompts", 1]
    opened = open_stage(stage, *flags(place, stage, tmp_path / "out"), *more)
    with pytest.raises(UserError, match="is broken: its weight .*layers.1.mlp.up_proj.*weight holds NaN or infinity"):
        opened.finish()
    assert not steps_of(tmp_path / "out")


def test_a_reference_that_is_broken_is_named(place, tmp_path):
    model = broken_model(place, tmp_path / "model", "model.norm.weight", math.nan)
    more = ["--reference_model", model]
    opened = open_stage("dpo_training.py", *flags(place, "dpo_training.py", tmp_path / "out", *more))
    with pytest.raises(UserError, match="the reference is broken: its weight model.norm.weight"):
        opened.finish()


@pytest.mark.parametrize("step", [2, 3, STEPS])
def test_weights_that_a_step_broke_are_not_saved(place, tmp_path, step):
    """With a finite gradient, a step can still overflow: the next loss is NaN, but a checkpoint may come before it."""
    stage = "supervised_finetuning.py"
    opened = open_stage(stage, *flags(place, stage, tmp_path / "out"))
    trainer = opened.trainer
    create = trainer.create_optimizer

    def overflowing(*args):
        optimizer, weight = create(*args), next(one for one in trainer.model.parameters() if one.requires_grad)

        def overflow(*_):
            if trainer.state.global_step + 1 == step:
                weight.data.view(-1)[3] = math.inf

        optimizer.register_step_post_hook(overflow)
        return optimizer

    trainer.create_optimizer = overflowing
    found = "the (loss|gradient norm) became nan in step 4" if step == 3 else f"after step {step} the weight .* lower"
    with pytest.raises(UserError, match=f"(?s){found}"):
        opened.finish()
    assert steps_of(tmp_path / "out") == [one for one in (4, 2) if one < step]
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_remedy_is_right(place, tmp_path):
    """A rate that overflows float32: with the rate that the message asks for, the run finishes."""
    stage, more = "supervised_finetuning.py", ["--optim", "sgd", "--max_grad_norm", 0]
    opened = open_stage(stage, *flags(place, stage, tmp_path / "out", *more, "--learning_rate", 1e38))
    with pytest.raises(UserError, match=r"lower --learning_rate \(now 1e\+38\)"):
        opened.finish()
    opened = open_stage(stage, *flags(place, stage, tmp_path / "again", *more, "--learning_rate", 1e-4))
    opened.finish()
    assert steps_of(tmp_path / "again") == [6, 4, 2]


DRIVER = """
import sys
from medicalgpt.errors import run_main
from medicalgpt.logs import rank
from tests.helpers import open_stage
from tests.silent import test_sf_40_not_finite as shared

def main():
    stage, what, step, process, *flags = sys.argv[1:]
    opened = open_stage(stage, *flags)
    if rank() == int(process):
        shared.BREAKS[what](opened.trainer, int(step))
    opened.finish()

run_main(main)
"""


def run_two(place, output, stage, what, step, process, *more):
    (output.parent / "driver.py").write_text(DRIVER)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    arguments = (stage, what, step, process, *flags(place, stage, output, *more))
    return run_program(
        output.parent / "driver.py",
        *arguments,
        processes=2,
        launcher="medicalgpt.launch",
        env={"PYTHONPATH": path},
        check=False,
    )


@pytest.mark.parametrize(("what", "step"), [("gradient", STEPS), pytest.param("loss", 3, marks=pytest.mark.slow)])
def test_one_process_of_two(place, tmp_path, what, step):
    """Both stop, without an error of the process group, and the one whose batch it was is named."""
    done = run_two(place, tmp_path / "out", "supervised_finetuning.py", what, step, 1)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and "gloo" not in done.stderr
    assert done.stderr.count(f"became nan in step {step} on process 1.") == 1
    assert steps_of(tmp_path / "out") == [4, 2] if step > 4 else [2]
    assert {row["process"] for row in check_rows(tmp_path / "out", step)} == {1}
    assert read_json(tmp_path / "out" / "run.json")["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("what", BREAKS)
@pytest.mark.parametrize("step", [1, 3, STEPS])
@pytest.mark.parametrize("stage", STAGES)
def test_one_process_of_two_in_every_stage(place, tmp_path, one_thread, stage, step, what):
    def train():
        opened = open_stage(stage, *flags(place, stage, tmp_path / "out"))
        if rank() == 1:
            BREAKS[what](opened.trainer, step)
        opened.finish()

    codes, printed = run_together(lambda: run_main(train), tmp_path)
    assert codes == [1, 1], printed
    assert not [text for text in printed if "Traceback" in text or "gloo" in text], printed
    assert "".join(printed).count(f"in step {step} on process 1.") == 1, printed
    assert steps_of(tmp_path / "out") == [one for one in (4, 2) if one < step]


@pytest.mark.slow
@pytest.mark.parametrize("what", BREAKS)
@pytest.mark.parametrize("config", ["zero2.json", "zero3.json"])
def test_deepspeed_does_not_take_the_step_either(place, tmp_path, config, what):
    """DeepSpeed takes its steps inside the backward pass."""
    more = ["--deepspeed", ROOT / config]
    done = run_two(place, tmp_path / "out", "supervised_finetuning.py", what, 3, 1, *more)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr and "gloo" not in done.stderr
    # Whose gradient it was is not known once they are summed up.
    where = "1" if what == "loss" else "0, 1"
    assert f"in step 3 on process {where}. That step was not taken" in done.stderr, done.stderr
    assert steps_of(tmp_path / "out") == [2]
