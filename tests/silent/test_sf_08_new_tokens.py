"""Rows of new tokens are trained, alone, and are still there after saving, merging and loading."""

from medicalgpt.args import LoraArguments, ModelArguments
from medicalgpt.models.adapters import attach_adapter
from medicalgpt.models.loading import load_base, load_tokenizer
from medicalgpt.serving.chat import ChatEngine
from tests.helpers import open_stage, read_json, run_here, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

NEW = ["感冒", "发热"]
OLD_ROWS = 260
STAGES = {
    "pretraining.py": [{"text": "感冒 and 发热. Drink water. " * n} for n in (1, 2, 3)],
    "supervised_finetuning.py": [{"prompt": "感冒 or 发热?", "response": "感冒. 发热! " * n} for n in (1, 2, 3)],
}
# What a case changes: spare rows in the base's embedding, flags.
CASES = {
    "embedding grows": (0, []),
    "spare rows": (12, []),
    "four bits": (0, ["--load_in_4bit", "True"]),
    "embedding in full": (0, ["--modules_to_save", "embed_tokens"]),
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(NEW)
    folder = tmp_path_factory.mktemp("sf08") / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")

    def base(tied, spare):
        folder = root / f"{tied}-{spare}"
        if not folder.is_dir():
            save_model(folder, tiny_tokenizer(), tied=tied)
            if spare:
                model = AutoModelForCausalLM.from_pretrained(folder)
                model.resize_token_embeddings(OLD_ROWS + spare, mean_resizing=False)
                model.save_pretrained(folder)
        return folder

    return base


def ends(model):
    return {
        "embed_tokens": model.get_input_embeddings().weight.detach().clone(),
        "lm_head": model.get_output_embeddings().weight.detach().clone(),
    }


def moved_rows(before, after):
    return set((before != after).any(dim=1).nonzero().flatten().tolist())


def train(stage, base, tokenizer_folder, tmp_path, *flags):
    write_jsonl(tmp_path / "data" / "rows.jsonl", STAGES[stage])
    return open_stage(
        stage,
        *("--model_name_or_path", base, "--tokenizer_name_or_path", tokenizer_folder),
        *("--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / "out"),
        *("--learning_rate", 1e-2, "--max_steps", 4, "--save_strategy", "no", "--sample_prompts", 0, *flags),
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("stage", "case"),
    [*(("supervised_finetuning.py", case) for case in CASES), ("pretraining.py", "embedding grows")],
)
def test_new_rows_are_trained_saved_merged_and_loaded(bases, tokenizer_folder, tmp_path, stage, case, tied):
    spare, flags = CASES[case]
    base = bases(tied, spare)
    opened = train(stage, base, tokenizer_folder, tmp_path, *flags)
    live = opened.trainer.model
    new = opened.tokenizer.convert_tokens_to_ids(NEW)
    assert new == [OLD_ROWS, OLD_ROWS + 1]
    before = ends(live)
    assert max(opened.tokenizer.get_vocab().values()) < len(before["embed_tokens"]) == len(before["lm_head"])
    opened.finish()
    live.eval()
    after = ends(live)

    in_full = {"embed_tokens", *(["lm_head"] if tied else [])} if "--modules_to_save" in flags else set()
    for name in after:
        moved = moved_rows(before[name], after[name])
        assert set(new) <= moved, f"{name}: new rows stayed as they were"
        assert (moved == set(new)) is (name not in in_full), f"{name}: old rows"
    if not in_full:
        counts = read_json(tmp_path / "out" / "run.json")["model"]["trainable_by_module"]
        assert counts["embed_tokens"] == len(new) * 32 and counts.get("lm_head", 0) == (0 if tied else len(new) * 32)
        with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys() if "lora_" not in name]
        assert shapes == [[len(new), 32]] * (1 if tied else 2), "old rows were saved"

    ids = torch.tensor([[*range(40, 60), *new, *range(60, 80), *reversed(new)]])
    with torch.no_grad():
        expected = live(input_ids=ids).logits
    four_bits = "--load_in_4bit" in flags
    arguments = ModelArguments(model_name_or_path=str(base), load_in_4bit=four_bits)
    again = attach_adapter(load_base(AutoModelForCausalLM, arguments, LoraArguments()), str(tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(input_ids=ids).logits, expected, atol=1e-5, rtol=0)

    run_here("merge_peft_adapter.py", "--lora_model", tmp_path / "out", "--output_dir", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = load_tokenizer(str(tmp_path / "merged"))
    assert tokenizer.encode("".join(NEW), add_special_tokens=False) == new
    assert max(tokenizer.get_vocab().values()) < merged.get_input_embeddings().num_embeddings
    assert merged.config.vocab_size == merged.get_input_embeddings().num_embeddings == len(after["embed_tokens"])
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) is tied
    for name, weight in ends(merged).items():
        torch.testing.assert_close(weight, after[name], atol=0, rtol=0)
    if not four_bits:
        served = ChatEngine.from_pretrained(str(tmp_path / "out"))
        with torch.no_grad():
            torch.testing.assert_close(served.model(input_ids=ids).logits, expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_going_on_trains_the_same_rows(bases, tokenizer_folder, tmp_path, tied):
    base = bases(tied, 0)
    train("pretraining.py", base, tokenizer_folder, tmp_path).finish()
    write_jsonl(tmp_path / "chat" / "rows.jsonl", STAGES["supervised_finetuning.py"])
    opened = open_stage(
        "supervised_finetuning.py",
        *("--model_name_or_path", tmp_path / "out", "--train_file_dir", tmp_path / "chat"),
        *("--output_dir", tmp_path / "next", "--learning_rate", 1e-2, "--max_steps", 2, "--sample_prompts", 0),
        *("--save_strategy", "no"),
    )
    before = ends(opened.trainer.model)
    opened.finish()
    after = ends(opened.trainer.model)
    for name in after:
        assert moved_rows(before[name], after[name]) == {OLD_ROWS, OLD_ROWS + 1}
    ids = torch.tensor([[70, OLD_ROWS, 71, OLD_ROWS + 1]])
    again = attach_adapter(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "next")).eval()
    with torch.no_grad():
        expected = opened.trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(again(input_ids=ids).logits, expected, atol=1e-5, rtol=0)


def test_a_checkpoint_is_resumed_with_its_rows(bases, tokenizer_folder, tmp_path):
    flags = ["--save_strategy", "steps", "--save_steps", 2, "--lora_dropout", 0]
    whole = train("supervised_finetuning.py", bases(False, 0), tokenizer_folder, tmp_path, *flags)
    whole.finish()
    resumed = train(
        "supervised_finetuning.py",
        *(bases(False, 0), tokenizer_folder, tmp_path, *flags),
        *("--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2"),
    )
    resumed.finish()
    found, expected = ends(resumed.trainer.model), ends(whole.trainer.model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)


def test_all_weights_are_trained_with_new_rows(bases, tokenizer_folder, tmp_path):
    opened = train("supervised_finetuning.py", bases(True, 0), tokenizer_folder, tmp_path, "--use_peft", "False")
    before = ends(opened.trainer.model)
    opened.finish()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {OLD_ROWS, OLD_ROWS + 1} <= moved_rows(before["embed_tokens"], ends(again)["embed_tokens"])
    assert max(load_tokenizer(str(tmp_path / "out")).get_vocab().values()) < again.config.vocab_size
