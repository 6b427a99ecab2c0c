"""SF 18: what is saved has empty tensors, or none at all, where the weights are spread over the processes."""

import json
import os

from medicalgpt.errors import UserError
from medicalgpt.training.checkpoints import require_saved_weights
from tests.helpers import ROOT, open_stage, read_json, run_program, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
import torch
from safetensors.torch import load_file, save_file

STAGE = "supervised_finetuning.py"
# Each stage with the folder of its rows and the flags that it needs; PPO refuses ZeRO-3 (test_ppo_training.py).
STAGES = {
    "pretraining.py": ("texts", ["--block_size", 32]),
    "supervised_finetuning.py": ("rows", []),
    "reward_modeling.py": ("pairs", []),
    "dpo_training.py": ("pairs", []),
    "orpo_training.py": ("pairs", []),
    "grpo_training.py": ("tasks", ["--num_generations", 2, "--max_completion_length", 4, "--reward_funcs", "length"]),
}
ROWS = {
    "texts": [{"text": f"Why {n}? A cold is an infection of the nose."} for n in range(8)],
    "rows": [{"prompt": f"Why {n}?", "response": "A cold."} for n in range(8)],
    "pairs": [{"prompt": f"Why {n}?", "chosen": "A cold.", "rejected": "No."} for n in range(8)],
    "tasks": [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(8)],
}
# Trains every stage under ZeRO-3, saves with and without gathering, and notes what is said to it.
DRIVER = """
import json, sys
from pathlib import Path

import deepspeed
# Memory that processes share would be compiled first, which takes a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from medicalgpt.errors import UserError, run_main
from medicalgpt.training.checkpoints import require_saved_weights
from tests.helpers import open_stage
from tests.silent.test_sf_18_empty_tensors import STAGE, STAGES, flags

import torch

place = Path(sys.argv[1])


def said_by(function, *args):
    try:
        function(*args)
    except UserError as error:
        return str(error)


def train(stage):
    trainer = open_stage(stage, *flags(place, stage, "--deepspeed", "zero3.json", stage=stage)).trainer
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if stage == STAGE:
        model.save_pretrained(place / "torn")
    trainer.save_model(place / "whole" / stage)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        torch.save({name: weight.clone() for name, weight in model.state_dict().items()}, place / f"{stage}.pt")


def main():
    pieces = open_stage(STAGE, *flags(place, "pieces", "--deepspeed", place / "pieces.json"))
    said = {"pieces": said_by(pieces.finish)}
    for stage in STAGES:
        train(stage)
        said[stage] = said_by(require_saved_weights, place / "whole" / stage)
    said["torn"] = said_by(require_saved_weights, place / "torn")
    (place / "said.json").write_text(json.dumps(said))


run_main(main)
"""


def flags(place, output, *more, stage=STAGE):
    folder, needed = STAGES[stage]
    return [
        *("--model_name_or_path", place / "base", "--train_file_dir", place / folder, "--max_steps", 2),
        *("--output_dir", place / output, "--sample_prompts", 0, "--save_strategy", "no", "--learning_rate", 1e-2),
        *("--use_peft", "False", "--dataloader_pin_memory", "False", *needed, *more),
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sf18")
    save_model(folder / "base", tiny_tokenizer())
    for name, rows in ROWS.items():
        write_jsonl(folder / name / "rows.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def sharded(place):
    """What runs under ZeRO-3 leave, started as a single process, without a launcher."""
    pytest.importorskip("deepspeed")
    settings = read_json(ROOT / "zero3.json")
    settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    (place / "pieces.json").write_text(json.dumps(settings))
    (place / "driver.py").write_text(DRIVER)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # A lock that another program left in the common folder of extensions would be waited for without end.
    env = {"PYTHONPATH": path, "TORCH_EXTENSIONS_DIR": str(place / "extensions")}
    run_program(place / "driver.py", place, env=env, timeout=120)
    return place


def test_weights_saved_without_gathering_are_refused(sharded):
    weights = load_file(sharded / "torn" / "model.safetensors")
    # Small ones are kept whole.
    torn = {name for name, weight in weights.items() if weight.numel() == 0}
    assert 0 < len(torn) < len(weights)
    said = read_json(sharded / "said.json")["torn"]
    assert f"model.safetensors holds nothing of {min(torn)}: its shape there is [0]." in said
    assert '"stage3_gather_16bit_weights_on_model_save": true' in said


@pytest.mark.parametrize("stage", STAGES)
def test_zero_3_saves_the_weights_that_were_trained(sharded, stage):
    assert read_json(sharded / "said.json")[stage] is None
    saved, live = load_file(sharded / "whole" / stage / "model.safetensors"), torch.load(sharded / f"{stage}.pt")
    assert saved.keys() == live.keys()
    for name, weight in saved.items():
        assert weight.shape == live[name].shape and torch.equal(weight, live[name]), name
    base = load_file(sharded / "base" / "model.safetensors")
    assert base.keys() - saved.keys() == ({"lm_head.weight"} if stage == "reward_modeling.py" else set())
    if stage != "grpo_training.py":  # rewards that do not differ teach nothing
        assert not all(torch.equal(weight, base[name]) for name, weight in saved.items() if name in base)


def test_settings_that_would_leave_pieces_are_refused_before_training(sharded):
    said = read_json(sharded / "said.json")["pieces"]
    assert said.startswith("the trained weights would not be saved as a model.")
    assert '"stage3_gather_16bit_weights_on_model_save": true, as zero3.json does' in said
    assert not (sharded / "pieces").exists()


# Flags, and the tensor that is named.
TORN = {
    "all weights": ([], "lm_head.weight"),
    "adapter": (["--use_peft", "True"], "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"),
}


def empty_when_saved(trainer):
    """Each weight is away when it is saved, as ZeRO-3 has it between two forward passes."""
    save = trainer._save

    def empty_and_save(*args, **kwargs):
        for weight in trainer.model.parameters():
            weight.data = torch.empty(0)
        save(*args, **kwargs)

    trainer._save = empty_and_save


@pytest.mark.parametrize("case", TORN)
def test_a_run_whose_weights_are_empty_has_not_finished(place, tmp_path, case):
    more, name = TORN[case]
    opened = open_stage(STAGE, *flags(place, tmp_path / "out", *more))
    empty_when_saved(opened.trainer)
    with pytest.raises(UserError, match=rf"model.safetensors holds nothing of {name}: its shape there is \[0\]"):
        opened.finish()
    assert read_json(tmp_path / "out" / "run.json")["status"] == "failed"


def test_a_checkpoint_whose_weights_are_empty_is_never_resumed_from(place, tmp_path):
    more = ("--save_strategy", "steps", "--save_steps", 1)
    opened = open_stage(STAGE, *flags(place, tmp_path / "out", *more))
    empty_when_saved(opened.trainer)
    with pytest.raises(UserError, match="checkpoint-1/model.safetensors holds nothing of lm_head.weight"):
        opened.finish()
    with pytest.raises(UserError, match="no complete checkpoint to resume from"):
        open_stage(STAGE, *flags(place, tmp_path / "out", *more, "--resume_from_checkpoint", "True"))


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda folder: None, "holds no weights: there is no .safetensors file in it"),
        (lambda folder: save_file({"a": torch.ones(2), "b": torch.ones(3, 0)}, folder / "b.safetensors"), r"\[3, 0\]"),
        (lambda folder: (folder / "a.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{"), "was not saved whole"),
    ],
    ids=["none", "no columns", "torn file"],
)
def test_what_is_read_back(tmp_path, save, message):
    save(tmp_path)
    with pytest.raises(UserError, match=message):
        require_saved_weights(tmp_path)


def test_numbers_without_a_shape_are_weights(tmp_path):
    save_file({"scale": torch.tensor(1.0), "weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    require_saved_weights(tmp_path)
