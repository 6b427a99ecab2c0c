"""Datasets by name: configuration, split and files, here from local folders, since tests have no network."""

from pathlib import Path

from medicalgpt.args import DataArguments
from medicalgpt.data.loading import load_data
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_messages
from medicalgpt.parser import parse_args
from tests.helpers import write_jsonl

import datasets
import pytest
from loguru import logger


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for config, names in (("zh", ("train", "validation", "test")), ("en", ("train", "dev"))):
        for name in names:
            write_jsonl(tmp_path / "set" / config / f"{name}.jsonl", [{"prompt": f"{config} {name}", "response": "A"}])
    files = "\n".join(
        f"- config_name: {config}\n  data_files:\n"
        + "\n".join(f"  - split: {name}\n    path: {config}/{name}.jsonl" for name in names)
        for config, names in (("zh", ("train", "validation", "test")), ("en", ("train", "dev")))
    )
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{files}\n---\n", encoding="utf-8")
    return tmp_path / "set"


def sides(name: Path, **flags) -> tuple[list[str], list[str]]:
    data = load_data(DataArguments(dataset_name=str(name), **flags), to_messages)
    return tuple([row["messages"][0]["content"] for row in rows] for rows in (data.train, data.validation))


def test_configuration_split_and_files(folder):
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    assert sides(folder, dataset_config_name="zh") == (["zh train"], ["zh validation"])
    assert f"{folder}: trained on split train, held out validation, left out: test" in lines
    assert sides(folder, dataset_config_name="en", dataset_split="dev") == (["en dev"], [])
    assert sides(folder, data_files="zh/test.jsonl,en/*.jsonl")[0] == ["zh test", "en dev", "en train"]
    logger.remove(sink)


def test_what_is_missing_is_named_with_the_choice(folder):
    with pytest.raises(UserError, match="(?s)Config name is missing.*zh.*--dataset_config_name NAME"):
        sides(folder)
    with pytest.raises(UserError, match="no split `dev`; it has train, validation, test. Choose one: --dataset_split"):
        sides(folder, dataset_config_name="zh", dataset_split="dev")
    for flags in ({"dataset_split": "test"}, {"data_files": "a.json"}, {"dataset_config_name": "zh"}):
        with pytest.raises(UserError, match=f"--{next(iter(flags))} has no effect without --dataset_name"):
            load_data(DataArguments(train_file_dir=str(folder), **flags), to_messages)


def test_the_names_of_other_tools_choose_the_split(folder):
    for flag in ("dataset_train_split", "dataset_splits", "dataset_split"):
        (arguments,) = parse_args(DataArguments, argv=[f"--{flag}", "dev", "--dataset_name", str(folder)])
        assert arguments.dataset_split == "dev"


def test_folders_of_save_to_disk(tmp_path):
    rows = {name: datasets.Dataset.from_list([{"prompt": name, "response": "A"}]) for name in ("train", "valid")}
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "both"))
    rows["train"].save_to_disk(str(tmp_path / "one"))
    assert sides(tmp_path / "both") == (["train"], ["valid"])
    assert sides(tmp_path / "one") == (["train"], [])
    with pytest.raises(UserError, match="Omit --dataset_config_name and --data_files"):
        sides(tmp_path / "one", data_files="a.arrow")
