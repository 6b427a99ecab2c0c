"""A run that trains nothing, or whose numbers are not finite, says so and saves nothing."""

from medicalgpt.errors import UserError
from tests.helpers import read_json, save_model
from tests.silent.pairs import on_every_stage, open_pairs, pairs
from tests.tiny import tiny_tokenizer

import pytest
import torch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("sf25nothing"), tiny_tokenizer())


def assert_nothing_saved(folder):
    assert not list((folder / "out").glob("*.safetensors"))
    assert read_json(folder / "out" / "run.json")["status"] != "finished"


@on_every_stage
def test_batch_larger_than_the_data_without_its_rest(model, tmp_path, stage):
    flags = ("--per_device_train_batch_size", 8, "--dataloader_drop_last", "True", "--max_steps", 2)
    with pytest.raises(UserError, match="--dataloader_drop_last True would drop everything"):
        open_pairs(stage, model, tmp_path, pairs(4), *flags)
    assert not list((tmp_path / "out").glob("*.safetensors"))


@on_every_stage
def test_loss_that_is_no_number_in_a_run_too_short_to_log_one(model, tmp_path, stage):
    opened = open_pairs(stage, model, tmp_path, pairs(4), "--max_steps", 2, "--logging_steps", 10)
    with torch.no_grad():
        opened.trainer.model.get_base_model().model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="holds NaN or infinity, so nothing was trained"):
        opened.finish()
    assert_nothing_saved(tmp_path)


@on_every_stage
def test_output_folder_that_cannot_be_one(model, tmp_path, stage):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="Choose another folder"):
            open_pairs(stage, model, tmp_path, pairs(2), "--output_dir", place)
