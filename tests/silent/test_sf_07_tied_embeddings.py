"""Embedding and head after training, merging, loading: tied exactly where the config says so, logits unchanged."""

from medicalgpt.models.adapters import attach_adapter
from medicalgpt.serving.chat import ChatEngine
from tests.helpers import open_stage, read_json, run_here, run_program, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

MODULES = ["embed_tokens", "embed_tokens,lm_head", "lm_head"]
STAGES = {
    "pretraining.py": [{"text": "Drink water and rest. " * n} for n in (1, 2, 3)],
    "supervised_finetuning.py": [{"prompt": "What is it?", "response": "A cold. " * n} for n in (1, 2, 3)],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sf07")
    return {tied: save_model(root / f"tied-{tied}", tiny_tokenizer(), tied=tied) for tied in (True, False)}


def weights(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("stage", "modules", "apart"),
    [
        *(("supervised_finetuning.py", modules, modules == "embed_tokens") for modules in MODULES),
        ("pretraining.py", "embed_tokens,lm_head", False),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_train_merge_reload(folders, tmp_path, tied, stage, modules, apart):
    """`apart`: merge in a process of its own, as a user would."""
    folder = folders[tied]
    write_jsonl(tmp_path / "data" / "rows.jsonl", STAGES[stage])
    opened = open_stage(
        stage,
        *("--model_name_or_path", folder, "--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / "out"),
        *("--modules_to_save", modules, "--learning_rate", 1e-2, "--max_steps", 4, "--save_strategy", "no"),
        *("--sample_prompts", 0),
    )
    opened.finish()
    live = opened.trainer.model.eval()
    ids = torch.arange(4, 120)[None]
    with torch.no_grad():
        expected = live(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(folder)
        assert (expected - base(input_ids=ids).logits).abs().max() > 0.1

    moved = {
        name: (new - old).abs().max() > 1e-3
        for name, new, old in zip(("embed_tokens", "lm_head"), weights(live), weights(base), strict=True)
    }
    assert moved == {name: tied or name in modules for name in moved}

    again = attach_adapter(AutoModelForCausalLM.from_pretrained(folder), str(tmp_path / "out")).eval()
    with torch.no_grad():
        assert (again(input_ids=ids).logits - expected).abs().max() < 1e-5

    flags = ["--lora_model", tmp_path / "out", "--output_dir", tmp_path / "merged"]
    (run_program if apart else run_here)("merge_peft_adapter.py", *flags)
    config = read_json(tmp_path / "merged" / "config.json")
    assert config["tie_word_embeddings"] is tied
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not tied
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    embedding, head = weights(merged)
    assert (embedding is head) is tied and torch.equal(embedding, head) is tied
    with torch.no_grad():
        assert (merged(input_ids=ids).logits - expected).abs().max() < 1e-4
    assert torch.equal(embedding, live.get_input_embeddings().weight)

    served = ChatEngine.from_pretrained(str(tmp_path / "merged"))
    with torch.no_grad():
        assert (served.model(input_ids=ids).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_trained(folders, tmp_path, tied):
    write_jsonl(tmp_path / "data" / "rows.jsonl", STAGES["supervised_finetuning.py"])
    opened = open_stage(
        "supervised_finetuning.py",
        *("--model_name_or_path", folders[tied], "--train_file_dir", tmp_path / "data"),
        *("--output_dir", tmp_path / "out", "--use_peft", "False", "--learning_rate", 1e-2, "--max_steps", 4),
        *("--save_strategy", "no", "--sample_prompts", 0),
    )
    opened.finish()
    ids = torch.arange(4, 120)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    embedding, head = weights(again)
    assert (embedding is head) is tied and torch.equal(embedding, head) is tied
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, opened.trainer.model.eval()(input_ids=ids).logits)
