"""The table "requested / observed": where it stands, that looking changes nothing, and what cannot be seen."""

import functools

from medicalgpt.errors import UserError
from medicalgpt.training.observed import OFF, Line, as_table
from medicalgpt.training.runs import Run
from tests.helpers import ROOT, open_stage, read_json, run_program, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
import torch
from loguru import logger

ROWS = [{"prompt": f"Question {n}?", "response": "Answer. " * n} for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("observed"), tiny_tokenizer(), context=512)


@pytest.fixture
def flags(base, tmp_path):
    """Flags of a run into `tmp_path / name`."""
    write_jsonl(tmp_path / "data" / "rows.jsonl", ROWS)

    def make(name: str, *more) -> list:
        return [
            *("--model_name_or_path", base, "--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / name),
            *("--save_strategy", "no", "--sample_prompts", 0, "--per_device_train_batch_size", 2),
            *("--logging_steps", 1, *more),
        ]

    return make


def table(folder) -> dict[str, dict]:
    return {line["name"]: line for line in read_json(folder / "run.json")["observed"]}


def unseen(lines: dict[str, dict]) -> dict[str, str]:
    return {name: line["observed"] for name, line in lines.items() if line["agrees"] is None}


# --- the table itself ------------------------------------------------------------------------------------------------


def test_columns_are_aligned_and_idle_lines_left_out():
    lines = [
        Line("optimizer", "AdamW of torch", "SGD of torch", False),
        Line("quantization", OFF, OFF, True),
        Line("rate", "1", "not observed (ZeRO-3)", None),
    ]
    assert as_table(lines) == [
        "           requested       observed",
        "optimizer  AdamW of torch  SGD of torch  <- differs",
        "rate       1               not observed (ZeRO-3)",
    ]


def test_it_is_printed_once_before_the_first_step(flags, tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr("medicalgpt.training.runs.setup_logging", lambda: None)
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    open_stage("supervised_finetuning.py", *flags("run", "--num_train_epochs", 2, "--verbose", True)).finish()
    logger.remove(sink)
    heads = [number for number, line in enumerate(lines) if line.split() == ["requested", "observed"]]
    assert len(heads) == 1
    assert heads[0] < next(number for number, line in enumerate(lines) if line.startswith("first step done"))
    # What the table shows stands nowhere else.
    assert sum(line.startswith("attention ") for line in lines) == 1
    assert sum("learning rate" in line for line in lines) == 1


@pytest.mark.parametrize(
    "more", [(), ("--gradient_checkpointing", "True"), ("--packing", "True"), ("--use_peft", "False")]
)
def test_training_is_the_same_as_without_it(flags, tmp_path, monkeypatch, more):
    """Dropout and noise draw random numbers, the order of the rows does so too."""
    random = ("--neft_alpha", 5, "--train_sampling_strategy", "random", "--gradient_accumulation_steps", 2)
    results = []
    for look in (True, False):
        if not look:
            monkeypatch.setattr(Run, "compare", lambda *args: None)
        opened = open_stage("supervised_finetuning.py", *flags(f"look-{look}", *random, "--num_train_epochs", 2, *more))
        torch.manual_seed(7)
        opened.finish()
        results.append((opened.trainer.state.log_history, opened.trainer.model.state_dict()))
    (logs, weights), (other_logs, other_weights) = results
    keys = ("loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens", "learning_rate")
    assert len(logs) == len(other_logs) > 2
    assert [[log.get(key) for key in keys] for log in logs] == [[log.get(key) for key in keys] for log in other_logs]
    assert all(weights[name].equal(other_weights[name]) for name in weights)


def test_nothing_is_left_behind(flags):
    opened = open_stage("supervised_finetuning.py", *flags("run", "--neft_alpha", 5, "--max_steps", 1))
    trainer, seen = opened.trainer, {}
    compare = opened.run.compare

    def around(*args):
        modes = [module.training for module in trainer.model.modules()]
        state = torch.get_rng_state()
        compare(*args)
        seen["state"] = state.equal(torch.get_rng_state())
        seen["modes"] = modes == [module.training for module in trainer.model.modules()]
        seen["gradients"] = [name for name, p in trainer.model.named_parameters() if p.grad is not None]
        seen["hooks"] = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules())
        seen["tokens"] = trainer.state.num_input_tokens_seen

    opened.run.compare = around
    opened.finish()
    assert seen == {"state": True, "modes": True, "gradients": [], "hooks": 0, "tokens": 0}
    assert "get_batch_samples" not in vars(trainer)


# --- runs of other kinds ---------------------------------------------------------------------------------------------


def test_pretraining_in_blocks(flags, tmp_path):
    write_jsonl(tmp_path / "data" / "rows.jsonl", [{"text": "Some words. " * n} for n in range(1, 12)])
    open_stage("pretraining.py", *flags("run", "--block_size", 128, "--max_steps", 1)).finish()
    lines = table(tmp_path / "run")
    assert lines["packing"]["observed"] == "blocks" and all(line["agrees"] for line in lines.values())


def test_an_adapter_that_is_gone_on_with_has_its_own_shape(flags, tmp_path):
    first = ("--lora_rank", 4, "--use_rslora", "True", "--target_modules", "q_proj,v_proj", "--max_steps", 1)
    open_stage("supervised_finetuning.py", *flags("first", *first)).finish()
    open_stage(
        "supervised_finetuning.py", *flags("second", "--peft_path", tmp_path / "first", "--max_steps", 1)
    ).finish()
    lines = table(tmp_path / "second")
    assert lines["adapter"]["requested"] == "rank 4, scale 8, dropout 0.05"
    assert lines["adapter on"]["requested"] == lines["adapter on"]["observed"] == "q_proj, v_proj"
    assert all(line["agrees"] for line in lines.values())


@pytest.mark.parametrize("more", [("--use_peft", "False"), ("--modules_to_save", "embed_tokens,lm_head")])
def test_tied_embeddings(flags, tmp_path, more):
    tied = save_model(tmp_path / "tied", tiny_tokenizer(), tied=True, context=512)
    open_stage(
        "supervised_finetuning.py", *flags("run", "--max_steps", 1, *more, "--model_name_or_path", tied)
    ).finish()
    assert all(line["agrees"] for line in table(tmp_path / "run").values())


def test_fewer_rows_than_a_batch(flags, tmp_path):
    open_stage("supervised_finetuning.py", *flags("run", "--per_device_train_batch_size", 16)).finish()
    line = table(tmp_path / "run")["effective batch"]
    assert line["observed"].startswith("10 = 10 a device x 1") and line["observed"].endswith("the data ends here")
    assert line["agrees"]


@pytest.mark.parametrize("packing", [False, True])
def test_streamed_rows(flags, tmp_path, packing):
    more = (
        "--streaming",
        "True",
        "--skip_long_rows",
        "True",
        "--max_steps",
        2,
        "--neft_alpha",
        5,
        "--packing",
        packing,
    )
    open_stage("supervised_finetuning.py", *flags("run", *more, "--model_max_length", 128)).finish()
    lines = table(tmp_path / "run")
    assert all(line["agrees"] for line in lines.values())
    assert lines["effective batch"]["observed"] == "2 = 2 a device x 1 accumulated x 1 process(es)"


def test_a_resumed_run_keeps_the_rate_of_its_checkpoint(flags, tmp_path):
    saving = ("--save_strategy", "steps", "--save_steps", 2, "--max_steps", 2)
    open_stage("supervised_finetuning.py", *flags("run", *saving)).finish()
    resumed = ("--resume_from_checkpoint", "True", "--max_steps", 4)
    with pytest.raises(UserError, match="(?s)--learning_rate 0.001 .before: 0.0002.*pass --learning_rate 0.0002"):
        open_stage("supervised_finetuning.py", *flags("run", *resumed, "--learning_rate", 1e-3)).finish()
    open_stage("supervised_finetuning.py", *flags("run", *resumed)).finish()
    assert all(line["agrees"] for line in table(tmp_path / "run").values())


@pytest.mark.parametrize("more", [(), ("--packing", "True", "--model_max_length", 128)])
def test_num_tokens_goes_on_where_a_run_had_stopped(flags, tmp_path, more):
    """The last log is one step before the checkpoint, so that the log does not know the number."""
    more = (*more, "--save_strategy", "steps", "--save_steps", 3, "--logging_steps", 2, "--num_train_epochs", 2)
    whole = open_stage("supervised_finetuning.py", *flags("whole", *more))
    whole.finish()
    stopped = open_stage("supervised_finetuning.py", *flags("parts", *more))
    stopped.trainer.state.max_steps = 0
    stop_after(stopped.trainer, 3)
    stopped.finish()
    open_stage("supervised_finetuning.py", *flags("parts", *more, "--resume_from_checkpoint", "True")).finish()
    counts = [
        [(line["step"], line["num_tokens"]) for line in read_json(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("whole", "parts")
    ]
    assert counts[0] == counts[1] and len(counts[0]) >= 2
    assert counts[0][-1][1] > read_json(tmp_path / "whole" / "run.json")["plan"]["tokens"]


def stop_after(trainer, step):
    """End the training as a signal would, after this step and its checkpoint."""
    save = trainer._save_checkpoint

    @functools.wraps(save)
    def save_and_stop(*args, **kwargs):
        save(*args, **kwargs)
        trainer.control.should_training_stop = trainer.state.global_step >= step

    trainer._save_checkpoint = save_and_stop


@pytest.mark.slow
def test_two_processes(flags, tmp_path):
    run_program("supervised_finetuning.py", *flags("run", "--max_steps", 1), processes=2)
    lines = table(tmp_path / "run")
    assert lines["effective batch"]["observed"] == "4 = 2 a device x 1 accumulated x 2 process(es)"
    assert all(line["agrees"] for line in lines.values())


@pytest.mark.parametrize(("stage", "peft"), [pytest.param(2, False, marks=pytest.mark.slow), (3, True)])
def test_deepspeed(flags, tmp_path, stage, peft):
    pytest.importorskip("deepspeed")
    more = ("--deepspeed", ROOT / f"zero{stage}.json", "--max_steps", 1, "--neft_alpha", 5, "--use_peft", peft)
    run_program("supervised_finetuning.py", *flags("run", *more), processes=2)
    lines = table(tmp_path / "run")
    expected = {"autocast": "not observed (DeepSpeed converts the weights)"}
    if stage == 3:
        expected = dict.fromkeys(("autocast", "in the optimizer", "NEFTune noise"), "not observed (ZeRO-3)")
    assert unseen(lines) == expected
    assert not [name for name, line in lines.items() if line["agrees"] is False]
    assert lines["optimizer"]["observed"] == "AdamW of torch"
