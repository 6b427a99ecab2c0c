"""A resumed run has the settings of the run that made its checkpoint, or says which have changed, or is refused."""

import json
import re
import shlex
import shutil
from unittest.mock import patch

from medicalgpt.errors import UserError
from medicalgpt.training.runs import Run
from tests.helpers import commit, open_stage, read_json, run_here, write_jsonl
from tests.silent.callbacks import Kill
from tests.tiny import make_tiny

import pytest
from loguru import logger
from safetensors.torch import load_file
from transformers import AutoTokenizer

SFT = "supervised_finetuning.py"
# What the run had that is resumed, and another value of each flag.
BEFORE = {
    "per_device_train_batch_size": 2,
    "model_max_length": 256,
    "weight_decay": 0.01,
    # Workers that load data draw random numbers, so that dropout would differ with another number of them.
    "lora_dropout": 0.0,
}
# By what leads out of a refusal; all of a group are changed at once, and each is named.
CHANGED = {
    "from the weights": {
        "per_device_train_batch_size": 1,
        "seed": 7,
        "data_seed": 8,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "optim": "adafactor",
        "model_max_length": 320,
        "train_sampling_strategy": "random",
        "dataloader_drop_last": "True",
        "ignore_data_skip": "True",
        "packing": "True",
        "template_name": "vicuna",
        "system_prompt": "Be brief.",
        "train_on_inputs": "True",
        "neft_alpha": 5,
        "max_train_samples": 8,
    },
    "accumulation": {"gradient_accumulation_steps": 2},
    "streaming": {"streaming": "True"},
    "without an adapter": {"use_peft": "False", "lora_dropout": None},
    "another adapter": {
        "lora_rank": 16,
        "lora_dropout": 0.1,
        "target_modules": "q_proj",
        "modules_to_save": "lm_head",
        "freeze_layers": "0",
    },
    "another base": {"load_in_4bit": "True", "dtype": "bfloat16"},
}


class Reached(Exception):
    """The run was neither refused nor trained: it would now read its data."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two models, data, and a run of four steps that was killed after the third."""
    folder = tmp_path_factory.mktemp("sf42")
    make_tiny(folder / "model")
    make_tiny(folder / "other", seed=1)
    write_jsonl(folder / "data" / "a.jsonl", [{"prompt": f"Q{n}?", "response": "x" * (n + 2)} for n in range(16)])
    open_stage(SFT, *flags(folder, output_dir=folder / "whole")).finish()
    run = open_stage(SFT, *flags(folder))
    run.trainer.add_callback(Kill(3))
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    return folder


def flags(place, **changed):
    settings = {
        "model_name_or_path": place / "model",
        "train_file_dir": place / "data",
        "output_dir": place / "run",
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "sample_prompts": 0,
        **BEFORE,
        **changed,
    }
    return [part for name, value in settings.items() if value is not None for part in (f"--{name}", value)]


def resumed(place, **changed):
    return flags(place, **{"resume_from_checkpoint": "True", **changed})


def refusal(arguments) -> str:
    with patch.object(Run, "add_data", side_effect=Reached), pytest.raises(UserError) as error:
        run_here(SFT, *arguments)
    return str(error.value)


def passes(arguments) -> None:
    """The run would read its data now."""
    with patch.object(Run, "add_data", side_effect=Reached), pytest.raises(Reached):
        run_here(SFT, *arguments)


def applied(arguments, remedy: str) -> list:
    """The arguments without the flags that a remedy omits, and with those that it passes."""
    omitted = set(re.findall(r"--\w+", re.search(r"omit ([^;]*)|$", remedy)[1] or ""))
    words = shlex.split(re.search(r"pass (.*)|$", remedy)[1] or "")
    # A flag with two names.
    names = {"--neft_alpha": "--neftune_noise_alpha"}
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    kept = {flag: value for flag, value in pairs if names.get(flag, flag) not in omitted}
    return [part for pair in (kept | dict(zip(words[::2], words[1::2], strict=True))).items() for part in pair]


def as_before(message: str) -> str:
    return re.search(r"\n  To resume it, (.*)\.\n", message)[1]


def way_out(message: str) -> str:
    return re.search(r"With the new settings, start another run(.*)\.$", message)[1]


@pytest.mark.parametrize("group", CHANGED)
def test_changed_flags_are_refused_with_two_remedies(place, group):
    record = (place / "run" / "run.json").read_bytes()
    changed = CHANGED[group]
    arguments = resumed(place, **changed)
    message = refusal(arguments)
    for flag in changed:
        assert re.search(rf"--{flag.replace('neft_alpha', 'neftune_noise_alpha')} \S.* \(before: ", message), flag
    lines = message.splitlines()
    assert lines[-2].startswith("  To resume it, ") and lines[-1].startswith("  With the new settings, ")
    assert (place / "run" / "run.json").read_bytes() == record
    passes(applied(arguments, as_before(message)))
    # Another adapter needs a merged model, which the next test makes.
    needs_merge = "python merge_peft_adapter.py" in way_out(message)
    assert needs_merge == (group in ("another adapter", "without an adapter"))
    if not needs_merge:
        passes(applied(arguments, way_out(message)))


def test_another_shape_of_the_adapter_starts_from_the_merged_one(place):
    arguments = flags(place, lora_rank=16)
    remedy = way_out(refusal([*arguments, "--resume_from_checkpoint", "True"]))
    merge, _, rest = remedy.removeprefix(" from these weights: ").partition(", then ")
    run_here(*shlex.split(merge)[1:])
    passes(applied(arguments, rest))
    shutil.rmtree(f"{place / 'run' / 'checkpoint-2'}-merged")


def test_all_differences_are_named_at_once(place):
    arguments = resumed(place, seed=7, weight_decay=None, packing="True", model_name_or_path=place / "other")
    message = refusal(arguments)
    for part in ("--seed 7 (before: 42)", "--weight_decay 0 (before: 0.01)", "--packing True (before: False)"):
        assert part in message
    assert "the weights of the base model" in message
    assert as_before(message).startswith("omit --seed, --packing; pass --weight_decay 0.01 ")
    passes(applied(arguments, as_before(message)))
    passes(applied(arguments, way_out(message)))


@pytest.mark.parametrize("same_path", [False, True])
def test_another_base_is_refused(place, tmp_path, same_path):
    """Also when other weights are at the path that the run names."""
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(place / "run", run)
    arguments = resumed(place, model_name_or_path=place / "other", output_dir=run)
    if same_path:
        record = run / "checkpoint-2" / "run.json"
        text = record.read_text().replace(json.dumps(str(place / "model")), json.dumps(str(model)))
        record.write_text(text)
        commit(record.parent)
        shutil.copytree(place / "other", model)
        arguments = resumed(place, model_name_or_path=model, output_dir=run)
    message = refusal(arguments)
    assert "the weights of the base model" in message
    # The same weights at another place are right.
    shutil.copytree(place / "model", model, dirs_exist_ok=True)
    passes(resumed(place, model_name_or_path=model, output_dir=run))


def test_another_configuration_at_the_same_path_is_refused(place, tmp_path):
    """It changes what the same weights compute. Another layout of the file, and who has written it, change nothing."""
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(place / "model", model)
    open_stage(SFT, *flags(place, model_name_or_path=model, output_dir=run, max_steps=1, save_steps=1)).finish()
    arguments = resumed(place, model_name_or_path=model, output_dir=run)
    config = read_json(model / "config.json")
    (model / "config.json").write_text(json.dumps({**config, "transformers_version": "6.0"}))
    passes(arguments)
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    message = refusal(arguments)
    assert re.search(
        r"the configuration of the model \w{12} \(before: \w{12}\): determines what a model makes", message
    )
    assert as_before(message) == f"restore the configuration of the model {model}"
    passes(applied(arguments, way_out(message)))
    # At another place.
    message = refusal(resumed(place, model_name_or_path=model))
    assert as_before(message) == f"pass --model_name_or_path {place / 'model'}"


def test_a_resume_from_an_earlier_checkpoint_is_resumed_from_there_again(place, tmp_path):
    """The later ones are kept aside from the moment at which training begins."""
    run = tmp_path / "run"
    shutil.copytree(place / "whole", run)
    opened = open_stage(SFT, *flags(place, output_dir=run, resume_from_checkpoint=run / "checkpoint-2"))
    assert (run / "checkpoint-4").is_dir()
    opened.trainer.add_callback(Kill(3))
    with pytest.raises(KeyboardInterrupt):
        opened.finish()
    assert (run / "superseded-checkpoints" / "checkpoint-4" / "manifest.json").is_file()
    again = open_stage(SFT, *flags(place, output_dir=run, resume_from_checkpoint="auto"))
    assert again.run.resume_from == str(run / "checkpoint-2")


@pytest.mark.parametrize("part", ["template", "tokenizer"])
def test_another_template_or_tokenizer_at_the_same_path_is_refused(place, tmp_path, part):
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(place / "model", model)
    opened = open_stage(SFT, *flags(place, model_name_or_path=model, output_dir=run, max_steps=1, save_steps=1))
    opened.finish()
    tokenizer = AutoTokenizer.from_pretrained(model)
    if part == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("\\n", " ", 1)
    else:
        tokenizer.add_tokens(["aspirin"])
    tokenizer.save_pretrained(model)
    arguments = resumed(place, model_name_or_path=model, output_dir=run)
    message = refusal(arguments)
    assert f"the {'chat template' if part == 'template' else 'tokenizer'} " in message
    passes(applied(arguments, as_before(message)))


def test_a_checkpoint_is_compared_from_another_folder(place, tmp_path):
    """Without the run.json of the run that made it, and with it."""
    copy = tmp_path / "moved" / "checkpoint-2"
    shutil.copytree(place / "run" / "checkpoint-2", copy)
    for checkpoint in (copy, place / "run" / "checkpoint-2"):
        arguments = flags(place, output_dir=tmp_path / "new", resume_from_checkpoint=checkpoint, seed=7)
        assert "--seed 7 (before: 42)" in refusal(arguments)
    # An older checkpoint has no copy; its output folder has the record.
    (copy / "run.json").unlink()
    commit(copy)
    shutil.copy(place / "run" / "run.json", copy.parent)
    assert "--seed 7 (before: 42)" in refusal([*arguments, "--resume_from_checkpoint", copy])


def test_other_rows_are_refused_from_another_folder_too(place, tmp_path):
    write_jsonl(tmp_path / "data" / "a.jsonl", [{"prompt": "Q?", "response": "A."}] * 4)
    checkpoint = place / "run" / "checkpoint-2"
    arguments = flags(place, train_file_dir=tmp_path / "data", output_dir=tmp_path / "new")
    with pytest.raises(UserError, match="was trained on other rows"):
        open_stage(SFT, *arguments, "--resume_from_checkpoint", checkpoint)
    # The same rows at another place are right.
    shutil.copytree(place / "data", tmp_path / "data", dirs_exist_ok=True)
    open_stage(SFT, *arguments, "--resume_from_checkpoint", checkpoint)


def test_a_run_that_would_train_nothing_is_refused(place):
    assert "--max_steps 2 (before: 4): the checkpoint has 2 already" in refusal(resumed(place, max_steps=2))


def test_what_may_change_is_recorded_and_changes_nothing(place, tmp_path):
    lines = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    changed = {
        "logging_steps": 2,
        "save_steps": 3,
        "save_total_limit": 2,
        "dataloader_num_workers": 1,
        "flash_attn": "True",
        "validation_file_dir": place / "data",
        "allow_overlap": "True",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "output_dir": tmp_path / "new",
    }
    checkpoint = place / "run" / "checkpoint-2"
    arguments = flags(place, **changed, resume_from_checkpoint=checkpoint)
    try:
        with patch("medicalgpt.training.runs.setup_logging"):
            open_stage(SFT, *arguments).finish()
    finally:
        logger.remove(sink)
    (entry,) = read_json(tmp_path / "new" / "run.json")["changed_on_resume"]
    assert entry["checkpoint"] == str(checkpoint)
    assert set(changed) - set(entry["changes"]) == set()
    assert entry["changes"]["logging_steps"] == {"before": 1, "now": 2}
    assert "changed on resume: --logging_steps 2 (before: 1)" in lines
    ours, whole = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "new", place / "whole"))
    assert all((ours[name] == whole[name]).all() for name in whole)
    # A second resume keeps the record of the first.
    copy = read_json(tmp_path / "new" / "checkpoint-3" / "run.json")
    assert copy["changed_on_resume"] == [entry]


def test_an_unchanged_run_has_changed_nothing(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    opened = open_stage(SFT, *resumed(place, output_dir=tmp_path / "run"))
    assert set(opened.run.record["changed_on_resume"][0]["changes"]) == {"output_dir"}
    assert open_stage(SFT, *resumed(place)).run.record["changed_on_resume"] == []


def test_the_same_rows_per_step_may_be_divided_otherwise(place, tmp_path):
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    checkpoint = place / "run" / "checkpoint-2"
    arguments = flags(place, **parts, output_dir=tmp_path / "new", resume_from_checkpoint=checkpoint)
    open_stage(SFT, *arguments).finish()
    before, after = (
        {row["step"]: row["loss"] for row in read_json(folder / "metrics.jsonl") if "loss" in row}
        for folder in (place / "whole", tmp_path / "new")
    )
    assert set(after) == {3, 4} and all(after[step] == pytest.approx(before[step], rel=1e-5) for step in after)


def test_a_finished_run_is_not_taken_for_another(place, tmp_path):
    """`--resume auto` ends with success if nothing is left to do, which other settings are not."""
    auto = {"output_dir": place / "whole", "resume_from_checkpoint": "auto"}
    with pytest.raises(SystemExit) as ended:
        run_here(SFT, *flags(place, **auto, logging_steps=3))
    assert ended.value.code == 0
    message = refusal(flags(place, **auto, seed=7))
    assert "has finished, with other settings: --seed 7 (before: 42)." in message
    message = refusal(flags(place, **auto, max_steps=5))
    assert "--max_steps 5 (before: 4)" in message and "To continue it from its last checkpoint" in message
    passes(flags(place, output_dir=place / "whole", max_steps=5, resume_from_checkpoint="True"))
