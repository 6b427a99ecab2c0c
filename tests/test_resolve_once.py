"""A start of a stage resolves its checkpoint and reads the base's configuration once; everything else is handed on."""

from collections import Counter
from pathlib import Path

from medicalgpt.models import hub
from tests.helpers import open_stage, write_jsonl
from tests.tiny import make_tiny

import pytest
from transformers import AutoConfig

SFT = "supervised_finetuning.py"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A base and an adapter on it, as a stage leaves it, and rows for the next stage."""
    folder = tmp_path_factory.mktemp("once")
    make_tiny(folder / "base")
    write_jsonl(folder / "chat" / "train.jsonl", [{"instruction": f"{n}?", "output": f"{n}."} for n in range(4)])
    train(folder, "base", "adapter").finish()
    return folder


def train(work: Path, model: str, output: str):
    return open_stage(
        SFT,
        *("--model_name_or_path", work / model, "--train_file_dir", work / "chat", "--output_dir", work / output),
        *("--max_steps", 1, "--sample_prompts", 0, "--save_strategy", "no"),
    )


@pytest.mark.parametrize("start", ["base", "adapter"])
def test_a_start_reads_what_its_checkpoint_says_once(work, tmp_path, monkeypatch, start):
    read: Counter[str] = Counter()
    load_config, resolve, read_text = AutoConfig.from_pretrained, hub.resolve_checkpoint, Path.read_text

    def count_config(name_or_path, **options):
        read["config of the base"] += str(name_or_path) == str(work / "base")
        return load_config(name_or_path, **options)

    def count_resolve(name_or_path):
        read["resolved"] += 1
        return resolve(name_or_path)

    def count_text(path, *args, **options):
        read[path.name] += path.parent == work / "adapter"
        return read_text(path, *args, **options)

    monkeypatch.setattr(AutoConfig, "from_pretrained", count_config)
    monkeypatch.setattr(hub, "resolve_checkpoint", count_resolve)
    monkeypatch.setattr(Path, "read_text", count_text)
    # Training too, since the table of what was requested and observed is made before its first step.
    train(work, start, f"from-{start}").finish()
    of_adapter = {"adapter_config.json": 1, "run.json": 1} if start == "adapter" else {}
    assert +read == {"config of the base": 1, "resolved": 1, **of_adapter}
