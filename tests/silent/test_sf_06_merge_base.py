"""An adapter is merged into the base that it was trained on and into no other, and nothing changes by it."""

import shutil

from medicalgpt.errors import UserError
from tests.helpers import open_stage, run_here, save_model, write_jsonl
from tests.silent.pairs import STAGES, pairs, shake, stage_flags
from tests.tiny import tiny_tokenizer

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ROWS = {"supervised_finetuning.py": [{"prompt": f"Why {n}?", "response": "So. " * n} for n in (1, 2, 3)]}
every_stage = pytest.mark.parametrize("stage", ["supervised_finetuning.py", *STAGES])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of adapters that have moved far, by stage, and the scores that each gave when it was saved."""
    root, found = tmp_path_factory.mktemp("sf06"), {}
    for stage in ("supervised_finetuning.py", *STAGES):
        folder = root / stage.removesuffix(".py")
        save_model(folder / "base", tiny_tokenizer())
        write_jsonl(folder / "data" / "rows.jsonl", ROWS.get(stage, pairs(3)))
        opened = open_stage(stage, *stage_flags(folder / "base", folder, "--max_steps", 1))
        shake(opened.trainer.model)
        opened.finish()
        found[stage] = folder, scores(opened.trainer.model)
    return found


IDS = torch.arange(2, 42)[None]


@torch.no_grad()
def scores(model):
    return model.eval()(input_ids=IDS).logits.float()


@every_stage
def test_merged_scores_as_the_adapter_did(trained, tmp_path, stage):
    folder, expected = trained[stage]
    run_here("merge_peft_adapter.py", "--lora_model", folder / "out", "--output_dir", tmp_path / "merged")
    kind = AutoModelForSequenceClassification if stage == "reward_modeling.py" else AutoModelForCausalLM
    merged = scores(kind.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    before = AutoModelForCausalLM.from_pretrained(folder / "base").model.layers[0].mlp.up_proj.weight
    after = kind.from_pretrained(tmp_path / "merged").model.layers[0].mlp.up_proj.weight
    assert (after - before).abs().max() > 0.01


@every_stage
def test_another_base_of_the_same_shape_is_refused(trained, tmp_path, stage):
    folder, _ = trained[stage]
    other = save_model(tmp_path / "other", tiny_tokenizer(), seed=1)
    with pytest.raises(UserError, match="base"):
        run_here(
            "merge_peft_adapter.py",
            *("--lora_model", folder / "out", "--base_model", other, "--output_dir", tmp_path / "merged"),
        )
    # A stage that would go on with the adapter finds the same out.
    shutil.copytree(folder / "out", tmp_path / "adapter")
    shutil.copytree(folder / "data", tmp_path / "data")
    with pytest.raises(UserError, match="base"):
        open_stage(stage, *stage_flags(other, tmp_path, "--peft_path", tmp_path / "adapter"))
