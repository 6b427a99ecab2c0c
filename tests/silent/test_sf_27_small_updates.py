"""Updates at the default learning rate are not lost: what is trained is float32, whatever the base is stored in."""

from tests.helpers import open_stage, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
import torch
from transformers import AutoModelForCausalLM

STAGES = {
    "pretraining.py": [{"text": "".join(map(chr, range(32, 32 + 9 * n)))} for n in (3, 6, 9)],
    "supervised_finetuning.py": [{"prompt": f"Why {n}?", "response": "A cold. " * n} for n in (1, 2, 3)],
}
ADAPTERS = {
    "adapter": ["--dtype", "bfloat16"],
    "DoRA": ["--dtype", "bfloat16", "--use_dora", "True"],
    "four bits": ["--load_in_4bit", "True"],
    "four bits in bfloat16": ["--load_in_4bit", "True", "--dtype", "bfloat16"],
    "head in full": ["--dtype", "bfloat16", "--modules_to_save", "lm_head"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_model(tmp_path_factory.mktemp("sf27") / "base", tiny_tokenizer())
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    return path


def share_that_moves(stage, folder, tmp_path, flags):
    """Train three steps; for each trained tensor the share of its numbers that moved, of those with a gradient."""
    write_jsonl(tmp_path / "data" / "rows.jsonl", STAGES[stage])
    opened = open_stage(
        stage,
        *("--model_name_or_path", folder, "--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / "out"),
        *("--max_steps", 3, "--save_strategy", "no", "--sample_prompts", 0, *flags),
    )
    trained = {name: p for name, p in opened.trainer.model.named_parameters() if p.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    touched = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in trained.items()}
    for name, parameter in trained.items():

        def note(found, name=name):
            touched[name] |= found.grad != 0

        parameter.register_post_accumulate_grad_hook(note)
    opened.finish()
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    return {
        name: ((before[name] != p.detach()) & touched[name]).sum().item() / touched[name].sum().item()
        for name, p in trained.items()
    }


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("stage", STAGES)
def test_adapters_move_on_a_base_of_few_bits(folder, tmp_path, stage, case):
    shares = share_that_moves(stage, folder, tmp_path, ADAPTERS[case])
    assert any(".lora_A." in name for name in shares) and any(".lora_B." in name for name in shares)
    assert any(".lora_magnitude_vector." in name for name in shares) is (case == "DoRA")
    assert min(shares.values()) > 0.95, {name: share for name, share in shares.items() if share <= 0.95}


@pytest.mark.parametrize("stage", STAGES)
def test_all_weights_move_from_a_checkpoint_in_bfloat16(folder, tmp_path, stage):
    shares = share_that_moves(stage, folder, tmp_path, ["--use_peft", "False"])
    assert len(shares) == 25
    assert min(shares.values()) > 0.95, {name: share for name, share in shares.items() if share <= 0.95}
