"""A run of all weights resumes also where a checkpoint names them otherwise than the model: experts, one by one."""

from tests.families import make_family
from tests.helpers import open_stage, write_jsonl
from tests.silent.callbacks import Kill

import pytest
from safetensors.torch import load_file

STEPS = 4
STAGES = ["supervised_finetuning.py", "reward_modeling.py"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sf19")
    make_family(folder / "model", "qwen3_moe")
    rows = [{"prompt": f"Q{n}?", "response": "x" * n} for n in range(1, 9)]
    write_jsonl(folder / "supervised_finetuning" / "rows.jsonl", rows)
    write_jsonl(folder / "held-out" / "rows.jsonl", [{"prompt": f"W{n}?", "response": "y" * n} for n in range(1, 5)])
    pairs = [{"prompt": f"Q{n}?", "chosen": "yes" * n, "rejected": "no" * n} for n in range(1, 9)]
    write_jsonl(folder / "reward_modeling" / "rows.jsonl", pairs)
    return folder


def opened(place, stage, output, *more):
    return open_stage(
        stage,
        *("--model_name_or_path", place / "model", "--train_file_dir", place / stage.removesuffix(".py")),
        *("--output_dir", output, "--use_peft", "False", "--max_steps", STEPS, "--save_steps", 1),
        *("--per_device_train_batch_size", 2, "--learning_rate", 0.01, "--sample_prompts", 0),
        *("--dataloader_pin_memory", "False", *more),
    )


def weights(folder):
    found = load_file(folder / "model.safetensors")
    assert any(".experts.0." in name for name in found)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_resumed_equals_never_stopped(place, stage):
    whole, stopped = place / f"whole-{stage}", place / f"stopped-{stage}"
    opened(place, stage, whole).finish()
    run = opened(place, stage, stopped)
    run.trainer.add_callback(Kill(3))
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    opened(place, stage, stopped, "--resume_from_checkpoint", "True").finish()
    wanted, found = weights(whole), weights(stopped)
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)


def test_the_best_checkpoint_is_the_result(place):
    output = place / "best"
    run = opened(
        place,
        "supervised_finetuning.py",
        output,
        *("--load_best_model_at_end", "True", "--eval_strategy", "steps", "--eval_steps", 1),
        *("--validation_file_dir", place / "held-out", "--metric_for_best_model", "eval_loss"),
        *("--greater_is_better", "True"),
    )
    run.finish()
    best = run.trainer.state.best_model_checkpoint
    assert not best.endswith(f"-{STEPS}")
    wanted, found = weights(place / best), weights(output)
    assert all(found[name].equal(wanted[name]) for name in wanted)
