"""pretraining.py as a user runs it: documents of every kind, with an adapter and with all weights."""

import json
import math
import re
from pathlib import Path

from medicalgpt.data.encoding import encode_document
from medicalgpt.errors import UserError
from medicalgpt.models.adapters import attach_adapter
from medicalgpt.models.hub import Adapter, fingerprint
from medicalgpt.models.loading import load_model
from tests.helpers import read_json, run_here, run_program, stop_tokens, write_jsonl
from tests.tiny import TURN_END, make_tiny, tiny_tokenizer

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = "pretraining.py"
LINES = ["感冒是一种病毒感染。", "Rest and drink water.", "发热时要休息，多喝水，量体温，三天不退就去看医生。"]
PAGE = "# Cough\n\nA cough of eight weeks is chronic.\n\n" + "It has many causes. " * 10
NEW_TOKENS = ["感冒", "发热"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A base model, a tokenizer with two more tokens, and a folder of all kinds of files."""
    folder = tmp_path_factory.mktemp("pt")
    make_tiny(folder / "base")
    extended = tiny_tokenizer()
    extended.add_tokens(NEW_TOKENS)
    extended.save_pretrained(folder / "extended")
    texts = folder / "texts"
    write_jsonl(texts / "more" / "rows.jsonl", [{"text": line, "source": "x"} for line in LINES])
    (texts / "lines.txt").write_text("\n\n".join(LINES) + "\n", encoding="gb18030")
    (texts / "page.md").write_text(PAGE, encoding="utf-8")
    (texts / "list.json").write_text(json.dumps([*LINES, {"text": PAGE}], ensure_ascii=False), encoding="utf-8")
    (texts / "valid.txt").write_text("A held-out line.\n又一行。\n", encoding="utf-8")
    return folder


def train(work: Path, output: str, *more, **options):
    flags = ("--model_name_or_path", work / "base", "--train_file_dir", work / "texts", "--output_dir", work / output)
    return run_program(SCRIPT, *flags, *more, **options)


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_json(folder / "metrics.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def adapter(work):
    """An extended vocabulary, its rows trained beside the adapter."""
    return train(
        work,
        "adapter",
        *("--tokenizer_name_or_path", work / "extended", "--modules_to_save", "embed_tokens,lm_head"),
        *("--block_size", 64, "--num_train_epochs", 3, "--per_device_train_batch_size", 4, "--learning_rate", 0.01),
        *("--logging_steps", 1, "--warmup_ratio", 0.05, "--eval_strategy", "epoch", "--gradient_checkpointing", "True"),
    )


def test_files_of_all_kinds_are_read_and_accounted_for(work, adapter):
    record = read_json(work / "adapter" / "run.json")
    rows = {Path(entry["file"]).name: (entry["side"], entry["rows"], entry["used"]) for entry in record["data"]}
    assert rows == {
        "lines.txt": ("train", 3, 3),
        "list.json": ("train", 4, 4),
        "page.md": ("train", 1, 1),
        "rows.jsonl": ("train", 3, 3),
        "valid.txt": ("validation", 2, 2),
    }
    assert "lines.txt is not UTF-8; it was read as gb18030" in adapter.stderr
    assert "train           11 rows in 4 file(s), used 11, left out: none" in adapter.stderr


def test_blocks_hold_every_token_and_are_full(work, adapter):
    plan = read_json(work / "adapter" / "run.json")["plan"]
    tokenizer = AutoTokenizer.from_pretrained(work / "extended")
    documents = [*LINES * 3, PAGE, PAGE]
    pieces = [piece for text in documents for piece in encode_document(tokenizer, {"text": text}, block_size=64)]
    tokens = sum(len(piece.input_ids) for piece in pieces)
    assert plan["tokens"] == plan["supervised_tokens"] == tokens
    assert plan["sequences"] < len(pieces)
    assert plan["sequences"] - math.ceil(tokens / 64) <= 2
    steps = [row for row in read_json(work / "adapter" / "metrics.jsonl") if "loss" in row]
    assert steps[-1]["num_tokens"] == 3 * tokens


def test_what_is_left(work, adapter):
    folder = work / "adapter"
    record = read_json(folder / "run.json")
    assert (record["stage"], record["status"]) == ("pretraining", "finished")
    weights = fingerprint(str(work / "base"))
    assert record["base"] == {"name": str(work / "base"), "adapter": None, "fingerprint": weights}
    assert record["arguments"]["tokenizer_name_or_path"] == str(work / "extended")
    assert record["arguments"]["packing"] is True and record["arguments"]["block_size"] == 64
    trainable = record["model"]["trainable_by_module"]
    assert trainable["embed_tokens"] == trainable["lm_head"] == 262 * 64
    for name in ("adapter_model.safetensors", "tokenizer.json", "loss.png", "README.md", "generation_config.json"):
        assert (folder / name).stat().st_size > 0
    assert len(read_json(folder / "samples.jsonl")) == 2
    # The EOS of the tokenizer, with which documents end, and no more.
    assert stop_tokens(folder) == [TURN_END]
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(NEW_TOKENS) == [260, 261]
    assert "the embedding grew from 260 to 262 rows" in adapter.stderr


def test_perplexity_falls_and_warmup_is_a_twentieth(work, adapter):
    rows = read_json(work / "adapter" / "metrics.jsonl")
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert held_out[-1] < held_out[0] - 0.5
    metrics = read_json(work / "adapter" / "run.json")["metrics"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    # A twentieth of these steps is one step.
    assert rates[0] == 0 and rates[1] == max(rates) == 0.01
    assert "eval_perplexity" in adapter.stderr and not re.search(r"\x1b\[|\r|it/s\]", adapter.stderr)


def test_new_rows_survive_saving_and_merging(work, adapter):
    run_here("merge_peft_adapter.py", "--lora_model", work / "adapter", "--output_dir", work / "merged")
    merged = load_model(AutoModelForCausalLM, str(work / "merged"))
    live = attach_adapter(load_model(AutoModelForCausalLM, str(work / "base")), Adapter.read(str(work / "adapter")))
    torch.testing.assert_close(logits(merged), logits(live), atol=1e-4, rtol=0)
    rows = merged.get_input_embeddings().weight
    assert len(rows) == 262 and len(AutoTokenizer.from_pretrained(work / "merged")) == 262
    # Both started at the same mean; only training tells them apart.
    assert not torch.allclose(rows[260], rows[261], atol=1e-3)


def test_rows_of_new_tokens_are_trained_beside_an_adapter(work):
    flags = ("--model_name_or_path", work / "base", "--train_file_dir", work / "texts", "--output_dir", work / "new")
    run_here(SCRIPT, *flags, "--tokenizer_name_or_path", work / "extended", "--max_steps", 2, "--sample_prompts", 0)
    assert read_json(work / "new" / "run.json")["model"]["trainable_by_module"]["embed_tokens"] == 2 * 64


def test_all_weights_unpacked_with_flags_from_a_file(work):
    """The command line wins over the file; --bf16 named alone; documents by paragraph."""
    config = work / "run.yaml"
    config.write_text(
        f"model_name_or_path: {work / 'base'}\ntrain_file_dir: {work / 'texts' / 'page.md'}\n"
        f"validation_file_dir: {work / 'texts' / 'valid.txt'}\noutput_dir: {work / 'full'}\n"
        "use_peft: false\npacking: false\nlogging_steps: 1\nmax_steps: 99\nlearning_rate: 1e-2\n"
    )
    flags = ("--max_steps", 4, "--bf16", "--verbose", "True", "--document_unit", "paragraph", "--load_in_4bit", "False")
    done = run_program(SCRIPT, "--config", config, *flags)
    record = read_json(work / "full" / "run.json")
    assert record["arguments"]["max_steps"] == 4 and record["arguments"]["learning_rate"] == 0.01
    assert [entry["rows"] for entry in record["data"]] == [3, 1] and record["plan"]["sequences"] == 3
    assert record["model"]["trainable"] == record["model"]["parameters"] == 107392
    assert re.search(r"autocast +bfloat16 +bfloat16\n", done.stderr)
    found = losses(work / "full")
    assert len(found) == 4 and found[-1] < found[0] - 0.3
    weights, before = (load_file(folder / "model.safetensors") for folder in (work / "full", work / "base"))
    assert weights.keys() == before.keys()
    assert all(not torch.equal(weights[name], before[name]) for name in before)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert not (work / "full" / "adapter_config.json").exists()


def test_chat_rows_belong_to_the_other_stage(work):
    rows = write_jsonl(work / "chat.jsonl", [{"messages": [{"role": "user", "content": "Q"}]}])
    flags = ("--model_name_or_path", work / "base", "--train_file_dir", rows, "--output_dir", work / "never")
    with pytest.raises(UserError, match=f"{rows}:1: no field `text`.*supervised_finetuning.py"):
        run_here(SCRIPT, *flags)
    assert not (work / "never").exists()
