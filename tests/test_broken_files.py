"""Files that are damaged, unreadable, or hold something else: a message each, never a traceback."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

from medicalgpt.args import DataArguments, LoraArguments, RunArguments
from medicalgpt.data.loading import load_data
from medicalgpt.errors import UserError, run_main
from medicalgpt.formats.conversion import to_messages
from medicalgpt.serving.chat import ChatEngine
from supervised_finetuning import FinetuningArguments
from tests.tiny import make_tiny

import pytest

WEIGHTS = "model.safetensors"
ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("broken") / "base")


def refusal(folder: str | Path) -> str:
    with pytest.raises(UserError) as refused:
        ChatEngine.from_pretrained(str(folder))
    return str(refused.value)


def with_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("config.json", text) for text in ("[1, 2]", '"x"', '{"a":', "", "{}", b"\xff\xfe\x00")),
        *(("tokenizer.json", text) for text in ('{"a":', "[]", "{}")),
        *(("tokenizer_config.json", text) for text in ("[]", "{")),
        ("generation_config.json", "[]"),
        *((WEIGHTS, data) for data in (b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0{}")),
    ],
)
def test_damaged_files_of_a_model(base, tmp_path, name, content):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(tmp_path)
    assert str(tmp_path) in message and len(message.splitlines()) <= 4


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "x"},
        {"hidden_size": 48},
        {"model_type": ["qwen3"]},
        {"architectures": "Qwen3ForCausalLM"},
        {"num_hidden_layers": None},
        {"num_attention_heads": 0},
        {"vocab_size": -1},
    ],
    ids=str,
)
def test_configurations_that_cannot_be(base, tmp_path, values):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    with_config(tmp_path, **values)
    message = refusal(tmp_path)
    assert f"{tmp_path} could not be loaded" in message and len(message.splitlines()) <= 4


def test_an_index_that_is_a_list(base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    (tmp_path / WEIGHTS).rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / f"{WEIGHTS}.index.json").write_text("[]")
    assert "could not be loaded" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "must hold an object"),
        ("{}", "does not name its base model"),
        (json.dumps({"base_model_name_or_path": 5}), "must be text"),
        (ADAPTER | {"r": "x"}, "does not fit"),
        (ADAPTER | {"peft_type": "FOO"}, "does not fit"),
        (ADAPTER, "does not fit"),
    ],
    ids=str,
)
def test_damaged_adapters(base, tmp_path, config, message):
    if isinstance(config, dict):
        config = json.dumps(config | {"base_model_name_or_path": base})
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 20)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [("[" * 100_000, "nested too deeply"), ('{"prompt": ' + "9" * 5000 + "}", "too many digits")],
    ids=["deep", "digits"],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_that_python_gives_up_on(tmp_path, line, reason, suffix):
    (tmp_path / f"a.{suffix}").write_text(f"{line}\n", encoding="utf-8")
    (problem,) = load_data(DataArguments(train_file_dir=str(tmp_path)), to_messages).problems
    assert reason in problem.reason and problem.place.line == 1


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (LoraArguments, {"lora_rank": 0}),
        (LoraArguments, {"lora_alpha": 0}),
        (LoraArguments, {"lora_alpha": -1}),
        (LoraArguments, {"lora_dropout": 1}),
        (DataArguments, {"max_train_samples": 0}),
        (DataArguments, {"max_eval_samples": -7}),
        (RunArguments, {"sample_prompts": -1}),
        *(
            (FinetuningArguments, {name: value})
            for name, value in (
                ("learning_rate", float("nan")),
                ("learning_rate", float("inf")),
                ("learning_rate", -1),
                ("weight_decay", -1),
                ("max_grad_norm", -1),
                ("warmup_steps", -1),
                ("label_smoothing_factor", 2),
                ("save_steps", 0),
                ("eval_steps", 0),
                ("save_total_limit", -1),
                ("dataloader_num_workers", -1),
            )
        ),
    ],
    ids=str,
)
def test_numbers_out_of_range(cls, values):
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"^--{name} {value} must be "):
        cls(**values)


def ended(error: BaseException, capsys, monkeypatch, *flags: str) -> str:
    """What a program prints whose `main` raises this."""
    monkeypatch.setattr(sys, "argv", ["program.py", *flags])

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_main(main)
    assert end.value.code == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "change its permissions"),
        (errno.EROFS, "another place"),
        (errno.ENAMETOOLONG, "shorter name"),
        (errno.ENOENT, "Check the path"),
    ],
)
def test_errors_of_the_disk_are_messages(capsys, monkeypatch, code, remedy):
    printed = ended(OSError(code, os.strerror(code), "/data/out"), capsys, monkeypatch)
    assert printed.startswith(f"\nerror: {os.strerror(code)}: /data/out. ") and remedy in printed


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py"])

    def main() -> None:
        raise OSError(errno.ECHILD, "no child")

    with pytest.raises(OSError, match="no child"):
        run_main(main)


def test_names_that_are_not_utf8_are_named(capsys, monkeypatch):
    name = os.fsdecode(b"/data/caf\xe9")
    with pytest.raises(UnicodeEncodeError) as error:
        name.encode()
    printed = ended(error.value, capsys, monkeypatch)
    assert r"has a name that is not UTF-8: '/data/caf\udce9'. Rename it." in printed
