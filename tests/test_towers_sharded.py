"""Checkpoints that take images too, on two processes that share the weights: the whole checkpoint comes back."""

import shutil

from tests.helpers import ROOT, read_json, run_program
from tests.matrix import Cell, logits, make_place, output_of, reload
from tests.towers import make_towers, require_whole

import pytest
import torch
from transformers import AutoModelForMultimodalLM

# Of one, transformers has the language model alone; of the other only the whole.
FAMILIES = ("gemma3", "qwen3_vl")
STAGE = "supervised_finetuning"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("engine", ["ZeRO-3", "FSDP2"])
def test_sharded_training_gives_the_whole_checkpoint(tmp_path, engine, name):
    make_place(tmp_path)
    shutil.rmtree(tmp_path / "base")
    base = make_towers(tmp_path / "base", name)
    cells = [f"{STAGE}:full", f"{STAGE}:LoRA", "dpo_training:full"]
    run_program(
        *("tests/matrix.py", tmp_path, engine, *cells),
        **{"processes": 2, "timeout": 1_800, "env": {"PYTHONPATH": str(ROOT)}},
    )
    for names in cells:
        stage, weights = names.split(":")
        cell = Cell(stage, engine, weights)
        found = read_json(output_of(tmp_path, cell) / "found.json")
        assert found.keys() >= {"logits", "losses"}, found
        live = torch.tensor(found["logits"])
        torch.testing.assert_close(logits(reload(tmp_path, cell)), live, rtol=1e-4, atol=1e-4)
        if weights == "full":
            require_whole(base, output_of(tmp_path, cell))
            whole, info = AutoModelForMultimodalLM.from_pretrained(output_of(tmp_path, cell), output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
            torch.testing.assert_close(logits(whole.eval()), live, rtol=1e-4, atol=1e-4)
