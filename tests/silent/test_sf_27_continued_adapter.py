"""An adapter that training continues begins with the weights of its file, also if the base is bfloat16."""

import math

from tests.helpers import open_stage, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
import torch
from safetensors.torch import load_file

ROWS = [{"prompt": f"Question {n}?", "response": "An answer. " * n} for n in (1, 2, 3, 4)]
PAIRS = [
    {"conversations": [{"from": "human", "value": f"Q {n}?"}], "chosen": "Yes. ", "rejected": "No."} for n in (1, 2)
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base, and an adapter on it in bfloat16 whose head and embedding are trained in full."""
    folder = tmp_path_factory.mktemp("continued")
    save_model(folder / "base", tiny_tokenizer(), context=512)
    write_jsonl(folder / "rows.jsonl", ROWS)
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    more = ("--modules_to_save", "lm_head,embed_tokens", "--max_steps", 3, "--learning_rate", 1e-2)
    open_stage("supervised_finetuning.py", *flags(folder, "rows.jsonl", folder / "first", *more)).finish()
    return folder


def flags(work, data, output, *more) -> list:
    return [
        *("--model_name_or_path", work / "base", "--train_file_dir", work / data, "--output_dir", output),
        *("--dtype", "bfloat16", "--save_strategy", "no", "--sample_prompts", 0, *more),
    ]


def test_continued_weights_are_those_of_the_file(work, tmp_path):
    saved = load_file(work / "first" / "adapter_model.safetensors")
    in_full = {name: weight for name, weight in saved.items() if "lora_" not in name}
    # Without digits below those of bfloat16, rounding would not show.
    assert len(in_full) == 2 and all((weight != weight.bfloat16()).any() for weight in in_full.values())
    more = ("--peft_path", work / "first", "--max_steps", 1)
    model = open_stage("supervised_finetuning.py", *flags(work, "rows.jsonl", tmp_path, *more)).trainer.model
    found = {
        name.replace(".modules_to_save.default.", ".").replace(".default", ""): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    assert found.keys() == saved.keys()
    for name, weight in saved.items():
        assert found[name].dtype == torch.float32 and found[name].equal(weight), name


def test_the_reference_is_as_exact_as_the_policy(work, tmp_path):
    more = ("--peft_path", work / "first", "--max_steps", 1, "--logging_steps", 1, "--dataloader_pin_memory", "False")
    opened = open_stage("dpo_training.py", *flags(work, "pairs.jsonl", tmp_path, *more))
    opened.finish()
    losses = [line["loss"] for line in opened.trainer.state.log_history if "loss" in line]
    assert losses == [pytest.approx(math.log(2), abs=1e-6)]
