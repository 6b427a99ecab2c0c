"""DPO measures from where training starts: no preference before the first step, and a reference that never moves."""

import math
import shutil

from medicalgpt.args import LoraArguments, ModelArguments
from medicalgpt.models.adapters import attach_adapter
from medicalgpt.models.hub import Adapter, Checkpoint
from medicalgpt.models.loading import load_base
from tests.helpers import open_stage, read_json, run_here, save_model, write_jsonl
from tests.silent.pairs import open_pairs, pairs
from tests.tiny import tiny_tokenizer

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

STAGE = "dpo_training.py"
NEW = ["感冒", "发热"]
# Adapters that training may start from, by the flags that shape them.
ADAPTERS = {
    "lora": [],
    "dora": ["--use_dora", "True"],
    "in full": ["--modules_to_save", "embed_tokens,lm_head"],
    "new tokens": ["--tokenizer_name_or_path", "extended"],
    "four bits": ["--load_in_4bit", "True"],
}
# What training starts from (base or one of the adapters), and flags.
CASES = {
    "new adapter": ("base", []),
    "new adapter, DoRA and modules in full": ("base", ["--use_dora", "True", "--modules_to_save", "embed_tokens"]),
    "new adapter, grown embedding": ("base", ["--tokenizer_name_or_path", "extended"]),
    "new adapter on four bits": ("base", ["--qlora", "True"]),
    "new adapter, checkpointing": ("base", ["--gradient_checkpointing", "True"]),
    "on an adapter": ("lora", []),
    "on an adapter, by --peft_path": ("base", ["--peft_path", "lora"]),
    "on an adapter, DoRA": ("dora", []),
    "on an adapter, modules in full": ("in full", []),
    "on an adapter, new tokens": ("new tokens", []),
    "on an adapter, four bits": ("four bits", ["--load_in_4bit", "True"]),
    "on an adapter, checkpointing": ("lora", ["--gradient_checkpointing", "True"]),
    "all weights": ("base", ["--use_peft", "False"]),
    "all weights, adapter merged": ("lora", ["--use_peft", "False"]),
    "all weights, grown embedding": ("base", ["--use_peft", "False", "--tokenizer_name_or_path", "extended"]),
    "all weights, the same as reference": ("base", ["--use_peft", "False", "--reference_model", "base"]),
}
# Where the reference's log-probabilities may be computed before training, and are the same then.
BEFOREHAND = ("new adapter", "on an adapter, new tokens", "on an adapter, four bits", "all weights")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a tokenizer with two tokens more, and adapters on the base that say something else than it."""
    folder = tmp_path_factory.mktemp("sf12")
    save_model(folder / "base", tiny_tokenizer())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(NEW)
    tokenizer.save_pretrained(folder / "extended")
    rows = [{"prompt": f"Question {n}?", "response": f"感冒 and 发热. {'y' * n}"} for n in range(8)]
    write_jsonl(folder / "sft" / "rows.jsonl", rows)
    for name, flags in ADAPTERS.items():
        trainer = open_stage(
            "supervised_finetuning.py",
            *("--model_name_or_path", folder / "base", "--train_file_dir", folder / "sft"),
            *("--output_dir", folder / name, "--learning_rate", 0.02, "--max_steps", 3, "--sample_prompts", 0),
            *("--save_strategy", "no", "--dataloader_pin_memory", "False", *here(folder, flags)),
        ).trainer
        trainer.train()
        trainer.save_model()
    return folder


def here(folder, flags):
    """Flags, names of folders turned into paths."""
    names = {"base", "extended", *ADAPTERS}
    return [folder / flag if flag in names else flag for flag in flags]


def opened(place, work, case, *more):
    start, flags = CASES[case]
    flags = [*here(place, flags), "--logging_steps", 1, "--learning_rate", 0.01, "--max_steps", 2, *more]
    # The rows hold the new tokens.
    rows = [row | {"chosen": row["chosen"] + "感冒"} for row in pairs(4)]
    return open_pairs(STAGE, place / start, work, rows, *flags)


def start_of(place, case):
    """What training starts from, loaded without the program: base, or base and adapter."""
    start, flags = CASES[case]
    four = "--load_in_4bit" in flags or "--qlora" in flags
    base = ModelArguments(str(place / "base"), load_in_4bit=four, qlora="--qlora" in flags)
    model = load_base(AutoModelForCausalLM, Checkpoint.from_arguments(base), base, LoraArguments())
    adapter = "lora" if "--peft_path" in flags else start
    return (model if adapter == "base" else attach_adapter(model, Adapter.read(str(place / adapter)))).eval()


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def answer_log_probs(model, batch):
    """(2 x pairs,) summed over the answers, from plain logits."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    picked = logits.float().log_softmax(-1)[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[:, :, 0]
    return (picked * batch["completion_mask"][:, 1:]).sum(1)


def reference_log_probs(trainer, batch):
    """(2 x pairs,), as the loss uses them."""
    return trainer.reference_log_probs(batch)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_preferred_at_the_start_and_the_reference_stays(place, tmp_path, case):
    trainer = opened(place, tmp_path, case).trainer
    batch = first_batch(trainer)
    before = reference_log_probs(trainer, batch)
    if "grown" not in case:
        assert torch.allclose(before, answer_log_probs(start_of(place, case), batch), atol=1e-3)

    trainer.model.train()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(math.log(2), abs=1e-6)
    values = trainer.pair_values(trainer.model, batch)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert values[name].tolist() == pytest.approx([0] * len(values[name]), abs=1e-5)

    trainer.train()
    assert torch.equal(reference_log_probs(trainer, batch), before)
    assert trainer.compute_loss(trainer.model, batch).item() != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("start", ["lora", "new tokens"])
def test_what_is_saved_is_the_trained_adapter_alone(place, tmp_path, start):
    run = opened(place, tmp_path, f"on an adapter{', new tokens' if start == 'new tokens' else ''}")
    run.finish()
    live = run.trainer.model.eval()
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    before = load_file(place / start / "adapter_model.safetensors")
    assert not list((tmp_path / "out").glob("*/")) and saved.keys() == before.keys()
    assert all(not torch.equal(saved[name], before[name]) for name in saved)
    flags = ("--lora_model", tmp_path / "out", "--output_dir", tmp_path / "merged")
    run_here("merge_peft_adapter.py", *flags)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, live(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "beforehand"),
    [("new adapter", False), ("on an adapter, new tokens", False), ("on an adapter", True), ("all weights", True)],
)
def test_a_resumed_run_measures_from_the_first_start(place, tmp_path, case, beforehand):
    flags = ("--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--per_device_train_batch_size", 1)
    flags += ("--precompute_ref_log_probs", beforehand)
    opened(place, tmp_path, case, *flags).finish()
    whole = read_json(tmp_path / "out" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert not list((tmp_path / "out" / "checkpoint-2").glob("*/"))
    opened(place, tmp_path, case, *flags, "--resume_from_checkpoint", "True").finish()
    for first, second in zip(whole, read_json(tmp_path / "out" / "metrics.jsonl"), strict=True):
        for name in ("loss", "rewards/chosen", "rewards/margins", "logps/rejected", "num_tokens"):
            assert second.get(name) == pytest.approx(first.get(name), abs=1e-5), (first["step"], name)


@pytest.mark.parametrize("case", BEFOREHAND)
def test_computed_beforehand_gives_the_same_losses(place, tmp_path, case):
    def losses(*flags):
        trainer = opened(place, tmp_path, case, "--per_device_train_batch_size", 2, *flags).trainer
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    # What an earlier run of the same rows and weights has computed is no longer right with another flag.
    for flags in ([], ["--ld_alpha", 0.5]):
        found = losses(*flags, "--precompute_ref_log_probs", "True", "--precompute_ref_batch_size", 3)
        assert found == pytest.approx(losses(*flags), abs=1e-5)
        assert found[0] == pytest.approx(math.log(2), abs=1e-5) and found[1] != pytest.approx(found[0], abs=1e-3)


def test_another_reference(place, tmp_path):
    trainer = opened(place, tmp_path, "new adapter", "--reference_model", place / "lora").trainer
    batch = first_batch(trainer)
    wanted = answer_log_probs(start_of(place, "on an adapter"), batch)
    assert torch.allclose(reference_log_probs(trainer, batch), wanted, atol=1e-3)
    trainer.train()
    assert torch.allclose(reference_log_probs(trainer, batch), wanted, atol=1e-3)
