"""The tiny base model: its size, its tokenizer, its weights by seed, and what it refuses."""

import json
import sys
from pathlib import Path

import build_tiny_model
from medicalgpt.errors import UserError
from tests.helpers import run_program

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"


def build(monkeypatch, output_dir, *flags):
    arguments = ["build_tiny_model.py", "--output_dir", output_dir, "--data_dir", DATA, *flags]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    build_tiny_model.main()
    return output_dir


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("tiny") / "base"
    with pytest.MonkeyPatch.context() as monkeypatch:
        return build(monkeypatch, output_dir)


@pytest.fixture(scope="module")
def tokenizer(base):
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="module")
def model(base):
    return AutoModelForCausalLM.from_pretrained(base)


def test_size_is_in_range_and_embeddings_are_tied(model, tokenizer):
    assert 2_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 6_000_000
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 4096
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_folder_holds_no_pickle(base):
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in base.iterdir()
    }
    assert not [path for path in base.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_special_tokens(tokenizer, model):
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token is None
    assert tokenizer.chat_template
    stops = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in stops
    assert set(tokenizer.convert_ids_to_tokens(stops)) == {"<|endoftext|>", "<|im_end|>"}
    for token in ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"):
        assert len(tokenizer.encode(token)) == 1
    assert tokenizer.encode("") == [], "no token is added that was not asked for"
    everything = "<|im_start|>肺<|im_end|><|endoftext|><|pad|>"
    assert tokenizer.decode(tokenizer.encode(everything), skip_special_tokens=True) == "肺"


@pytest.mark.parametrize(
    "text",
    [
        "社区获得性肺炎的常见表现有发热、咳嗽咳痰和呼吸时胸痛。",
        "With migraine, call an ambulance; don't wait (really).",
        "收缩压 140 mmHg，体温37.5℃，COVID-19",
        "emoji 🎉 👩‍⚕️ 👍🏽 end",
        "  leading, trailing  \n\n\ttabs\r\nlines \n",
        "龘靐齉 繁體 日本語テスト 한국어 Ménière naïve",
        "\u3000全角　空格\u200b零宽",
        "<|im_start|>user\n你好<|im_end|>\n",
    ],
)
def test_text_comes_back_unchanged(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_name_is_cut_the_same_in_every_sentence(tokenizer):
    conditions = yaml.safe_load((DATA / "facts.yaml").read_text(encoding="utf-8"))["conditions"]
    for row in conditions:
        alone = tokenizer.encode(row["zh"])
        for before, after in (("得了", "怎么办？"), ("", "的常见表现有"), ("请问", "\n"), ("。\n", "，"), ("A", "B")):
            sentence = tokenizer.encode(before + row["zh"] + after)
            start = len(tokenizer.encode(before))
            assert sentence[start : start + len(alone)] == alone, (row["zh"], before, after)


def test_no_token_spans_two_han_characters(tokenizer):
    for token, index in tokenizer.get_vocab().items():
        text = tokenizer.decode([index])
        assert sum("\u4e00" <= character <= "\u9fff" for character in text) <= 1, token


def test_frequent_han_characters_are_one_token(tokenizer):
    text = (DATA / "pretrain/train_zh.txt").read_text(encoding="utf-8")
    han = [character for character in text if "\u4e00" <= character <= "\u9fff"]
    split = {character for character in set(han) if len(tokenizer.encode(character)) > 1}
    assert sum(character in split for character in han) / len(han) < 0.01
    assert all(len(tokenizer.encode(role)) == 1 for role in ("system", "user", "assistant"))


def test_the_chat_template_marks_turns(tokenizer):
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好。"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "<|im_start|>user\n你好<|im_end|>" in text
    assert "<|im_start|>assistant\n您好。<|im_end|>" in text


def test_it_trains_and_generates(model, tokenizer):
    batch = tokenizer(["痛风怎么办？", "肺炎"], return_tensors="pt", padding=True)
    loss = model(**batch, labels=batch["input_ids"]).loss
    assert torch.isfinite(loss)
    # Random weights spread the probability evenly over the vocabulary.
    assert abs(loss.item() - torch.log(torch.tensor(4096.0)).item()) < 0.5
    generated = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] <= batch["input_ids"].shape[1] + 4


def test_weights_depend_on_the_seed_only(base, tmp_path, monkeypatch):
    same = build(monkeypatch, tmp_path / "same")
    other = build(monkeypatch, tmp_path / "other", "--seed", 7)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (same / name).read_bytes() == (base / name).read_bytes()
    assert (other / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (other / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()


def test_sizes_are_honoured(tmp_path, monkeypatch):
    flags = "--vocab_size 600 --hidden_size 64 --intermediate_size 96 --num_layers 2 --num_heads 4 --num_kv_heads 1"
    model = AutoModelForCausalLM.from_pretrained(build(monkeypatch, tmp_path, *flags.split()))
    config = model.config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (600, 64, 96)
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2, 4, 1)


def test_a_model_is_not_overwritten_unless_asked(base, tmp_path, monkeypatch):
    target = build(monkeypatch, tmp_path, "--seed", 1)
    before = (target / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="already holds a model.*\n.*--overwrite_output_dir"):
        build(monkeypatch, target)
    assert (target / "model.safetensors").read_bytes() == before
    build(monkeypatch, target, "--overwrite_output_dir")
    assert (target / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def write_data(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_held_out_files_do_not_shape_the_tokenizer(tmp_path):
    asked = {"instruction": "问", "output": "答"}
    write_data(
        tmp_path,
        {
            "pretrain/train.txt": "训练\n",
            "pretrain/validation.txt": "留出\n",
            "finetune/train.jsonl": asked,
            "finetune/dev_1.jsonl": asked | {"instruction": "藏"},
        },
    )
    assert list(build_tiny_model.training_texts(tmp_path)) == ["训练", "system", "user", "assistant", "问", "答"]


def test_a_broken_row_is_named_without_a_traceback(tmp_path):
    write_data(tmp_path, {"pretrain/train.txt": "文\n", "finetune/train.jsonl": '{"prompt": "x"}\n'})
    done = run_program("build_tiny_model.py", "--output_dir", tmp_path / "out", "--data_dir", tmp_path, check=False)
    assert done.returncode == 1
    assert "train.jsonl:1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_data_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file or folder.*pretrain"):
        list(build_tiny_model.training_texts(tmp_path))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(monkeypatch, capsys, tmp_path, seed):
    with pytest.raises(SystemExit):
        build(monkeypatch, tmp_path / "model", "--seed", str(seed))
    assert f"--seed {seed} must be between 0 and" in capsys.readouterr().err
