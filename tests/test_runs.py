"""What surrounds a training: the output folder, checkpoints that can be trusted, what is shown and recorded."""

import json
import re
import sys
import time

from medicalgpt.args import DataArguments, ModelArguments, RunArguments
from medicalgpt.data.encoding import IGNORED, encode_chat
from medicalgpt.data.loading import load_data
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_messages
from medicalgpt.models.hub import Checkpoint
from medicalgpt.training.callbacks import MetricsFile, PlainProgress
from medicalgpt.training.checkpoints import (
    MANIFEST,
    CheckpointCommitter,
    checkpoint_problem,
    find_checkpoint,
    newest_checkpoint,
)
from medicalgpt.training.claiming import Claim
from medicalgpt.training.preview import render_supervision
from medicalgpt.training.runs import Run, model_card, next_commands
from tests.helpers import chat, read_json, write_jsonl
from tests.tiny import make_tiny, tiny_tokenizer

import pytest
import torch
from loguru import logger
from safetensors.torch import save_file
from transformers import TrainerControl, TrainerState, TrainingArguments


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("runs") / "base")


@pytest.fixture
def log(monkeypatch):
    """Lines that are logged; a run may not take the sink away."""
    lines: list[str] = []
    monkeypatch.setattr("medicalgpt.training.runs.setup_logging", lambda: None)
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    yield lines
    logger.remove(sink)


@pytest.fixture
def start(base, tmp_path, log):
    def make(resume=None, overwrite=False, **others) -> Run:
        training = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            resume_from_checkpoint=resume,
            use_cpu=True,
            report_to="none",
            **{"do_train": True, **others},
        )
        return Run(
            "stage",
            training,
            Checkpoint.resolve(base),
            RunArguments(overwrite_output_dir=overwrite),
            ModelArguments(base),
            DataArguments(),
        )

    return make


def save_checkpoint(output_dir, step: int, commit: bool = True):
    """A checkpoint as the trainer saves it, its manifest written by the callback as in a training."""
    folder = output_dir / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    save_file({"weight": torch.arange(5.0)}, folder / "model.safetensors")
    (folder / "global_step" / "optimizer.pt").write_bytes(b"state")
    if commit:
        args = TrainingArguments(output_dir=str(output_dir), use_cpu=True, report_to="none")
        state = TrainerState(global_step=step, is_world_process_zero=True)
        CheckpointCommitter().on_save(args, state, TrainerControl())
    return folder


# --- the coloured view -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [False, True])
def test_trained_tokens_are_marked_in_whole_characters(colour):
    """With this tokenizer a Chinese character is three tokens: decoded one by one they would be torn."""
    tokenizer = tiny_tokenizer()
    messages = [{"role": "user", "content": "感冒？"}, {"role": "assistant", "content": "多休息，多喝水。"}]
    (sample,) = encode_chat(tokenizer, chat(messages))
    shown = render_supervision(tokenizer, sample.input_ids, sample.labels, colour)
    start, end = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    assert shown.endswith(
        f"<|im_start|>user\n感冒？<|im_end|>\n<|im_start|>assistant\n{start}多休息，多喝水。<|im_end|>{end}\n\n"
    )
    assert "\ufffd" not in shown
    trained = sum(label != IGNORED for label in sample.labels)
    assert trained == 8 * 3 + 1
    assert f"({trained} of {len(sample.labels)}, {trained / len(sample.labels):.0%})" in shown


def test_nothing_trained_is_seen_as_such():
    tokenizer = tiny_tokenizer()
    shown = render_supervision(tokenizer, [1, 2], [IGNORED, IGNORED], False)
    assert "(0 of 2, 0%)" in shown and "⟦" not in shown
    assert "(0 of 0, 0%)" in render_supervision(tokenizer, [], [], False)


# --- the output folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trace", ["run.json", "model-00001-of-00002.safetensors", "adapter_config.json", "README.md", "vocab.json"]
)
def test_a_folder_with_another_run_is_refused_and_left_alone(start, tmp_path, trace):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / trace).write_text("{}")
    with pytest.raises(UserError, match=f"(?s)run holds another run .{trace}.*--overwrite_output_dir True"):
        start()
    assert (tmp_path / "run" / trace).exists()


def test_a_checkpoint_is_a_trace_and_can_be_gone_on_with(start, tmp_path):
    save_checkpoint(tmp_path / "run", 3)
    with pytest.raises(UserError, match="Resume it: --resume auto"):
        start()


def test_files_that_are_no_run_are_no_reason_to_refuse(start, tmp_path):
    (tmp_path / "run" / "checkpoint-notes").mkdir(parents=True)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert start().resume_from is None


def test_resuming_and_overwriting_resumes(start, tmp_path, log):
    checkpoint = save_checkpoint(tmp_path / "run", 3)
    for resume in ("True", str(checkpoint)):
        run = start(resume=resume, overwrite=True)
        assert run.resume_from == str(checkpoint) and not run.claim.replaces
        assert "--overwrite_output_dir removes nothing, as this run is resumed" in log


def test_other_processes_leave_the_folder_to_the_first(start, tmp_path, monkeypatch):
    """They get its decision, and take no lock."""
    checkpoint = save_checkpoint(tmp_path / "run", 3)

    def receive(outcome):
        outcome[0] = Claim(resume_from=str(checkpoint))

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("medicalgpt.training.claiming.broadcast_object_list", receive)
    assert start(overwrite=True).resume_from == str(checkpoint)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-3"]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_log_has_size_and_seconds_of_a_checkpoint(tmp_path, log):
    folder = save_checkpoint(tmp_path, 3, commit=False)
    (folder / "global_step" / "optimizer.pt").write_bytes(b"x" * 2_500_000)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state = TrainerState(global_step=3, is_world_process_zero=True)
    began = time.monotonic() - 100
    CheckpointCommitter(began=lambda: began).on_save(args, state, TrainerControl())
    (line,) = [line for line in log if line.startswith("checkpoint-3: ")]
    size, seconds = re.fullmatch(r"checkpoint-3: ([\d.]+) MB saved in ([\d.]+) s", line).groups()
    assert size == "2.5" and 100 <= float(seconds) < 160


def test_a_whole_checkpoint_names_every_file(tmp_path):
    folder = save_checkpoint(tmp_path, 3)
    manifest = read_json(folder / MANIFEST)
    assert set(manifest) == {"model.safetensors", "global_step/optimizer.pt"}
    assert manifest["model.safetensors"]["bytes"] == (folder / "model.safetensors").stat().st_size
    assert checkpoint_problem(folder) is None
    assert not list(folder.glob("*.partial"))


def damage_never_finished(folder):
    (folder / MANIFEST).unlink()


def damage_file_missing(folder):
    (folder / "global_step" / "optimizer.pt").unlink()


def damage_truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def damage_same_size(folder):
    file = folder / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))


def damage_manifest(folder):
    (folder / MANIFEST).write_text('{"model')


def damage_manifest_empty(folder):
    (folder / MANIFEST).write_bytes(b"")


def damage_manifest_null(folder):
    (folder / MANIFEST).write_text("null")


def damage_manifest_names_nothing(folder):
    (folder / MANIFEST).write_text("{}")


def damage_manifest_is_a_list(folder):
    (folder / MANIFEST).write_text('["model.safetensors"]')


def damage_manifest_has_other_entries(folder):
    (folder / MANIFEST).write_text('{"model.safetensors": 3}')


def damage_manifest_lacks_a_digest(folder):
    (folder / MANIFEST).write_text('{"model.safetensors": {"bytes": 3}}')


def damage_manifest_is_not_text(folder):
    (folder / MANIFEST).write_bytes(b"\xff\xfe")


DAMAGES = {
    damage_never_finished: "never finished",
    damage_file_missing: "optimizer.pt is missing",
    damage_truncated: "model.safetensors has changed",
    damage_same_size: "model.safetensors has changed",
    damage_manifest: "manifest.json is damaged",
    damage_manifest_empty: "manifest.json is damaged",
    damage_manifest_null: "manifest.json is damaged",
    damage_manifest_names_nothing: "manifest.json is damaged",
    damage_manifest_is_a_list: "manifest.json is damaged",
    damage_manifest_has_other_entries: "manifest.json is damaged",
    damage_manifest_lacks_a_digest: "manifest.json is damaged",
    damage_manifest_is_not_text: "manifest.json is damaged",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path, log, damage):
    whole, newest = save_checkpoint(tmp_path, 9), save_checkpoint(tmp_path, 10)
    damage(newest)
    assert find_checkpoint(tmp_path) == whole
    assert any(str(newest) in line and DAMAGES[damage] in line for line in log)
    with pytest.raises(UserError, match=DAMAGES[damage]):
        find_checkpoint(newest)
    damage(whole)
    with pytest.raises(UserError, match="no complete checkpoint to resume from"):
        find_checkpoint(tmp_path)


def test_the_newest_is_the_one_with_most_steps(tmp_path):
    for step in (2, 10, 9):
        save_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_resuming_by_flag(start, tmp_path, log):
    with pytest.raises(UserError, match="no complete checkpoint"):
        start(resume="True")
    first, second = save_checkpoint(tmp_path / "run", 1), save_checkpoint(tmp_path / "run", 2)
    assert start(resume="True").resume_from == str(second)
    assert f"resuming from {second}" in log
    assert start(resume=str(first)).resume_from == str(first)
    with pytest.raises(UserError, match="holds another run"):
        start(resume="False")
    with pytest.raises(UserError, match="no checkpoint .*checkpoint-7"):
        start(resume=str(tmp_path / "run" / "checkpoint-7"))


def test_resuming_on_other_data_is_refused(start, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q", "response": "A"}] * 3)
    save_checkpoint(tmp_path / "run", 1)
    run = start(resume="True")
    run.add_data(load_data(DataArguments(train_file_dir=path), to_messages))
    run._write_record()
    start(resume="True").add_data(load_data(DataArguments(train_file_dir=path), to_messages))
    with pytest.raises(UserError, match="was trained on other rows"):
        start(resume="True").add_data(load_data(DataArguments(train_file_dir=path, max_train_samples=2), to_messages))


@pytest.mark.parametrize("flags", [{"eval_strategy": "steps"}, {"eval_strategy": "epoch"}, {"do_train": False}])
def test_an_evaluation_needs_held_out_rows(start, tmp_path, flags):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"Q{n}", "response": "A"} for n in range(4)])
    with pytest.raises(UserError, match="no held-out rows.*--validation_file_dir.*--validation_split_percentage"):
        start(**flags).add_data(load_data(DataArguments(train_file_dir=path), to_messages))
    held_out = DataArguments(train_file_dir=path, validation_split_percentage=25)
    start(**flags).add_data(load_data(held_out, to_messages))


# --- records ---------------------------------------------------------------------------------------------------------


def test_the_record_of_a_run(start, base, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/stage.py", "--seed", "3"])
    record = start(seed=3, warmup_steps=0.1).record
    assert record["stage"] == "stage" and record["status"] == "running"
    assert record["command"] == ["stage.py", "--seed", "3"]
    assert record["parent"] == record["base"]["name"] == base
    assert record["arguments"]["seed"] == 3 and record["arguments"]["warmup_steps"] == 0.1
    assert record["arguments"]["tokenizer_name_or_path"] is None
    assert not [name for name in record["arguments"] if name.endswith("_token")]
    assert record["versions"]["torch"] and record["versions"]["python"]
    assert json.loads(json.dumps(record)) == record


def test_a_model_card_says_what_is_known_and_commands_that_run(tmp_path):
    output_dir = tmp_path / "my run"
    output_dir.mkdir()
    (output_dir / "adapter_config.json").write_text("{}")
    record = {
        "stage": "supervised_finetuning",
        "parent": "outputs/pt",
        "finished": "2026-01-02T03:04:05+00:00",
        "command": ["supervised_finetuning.py", "--system_prompt", "Be brief."],
        "metrics": {"train_loss": 0.123456789, "eval_loss": None},
        "data": [{"side": "train", "file": "a.jsonl", "rows": 5, "used": 3, "left_out": {"too long": 2}}],
    }
    card = model_card(record, output_dir, "A sentence.")
    for part in (
        "# my run\n\nA sentence.",
        "`supervised_finetuning.py` from `outputs/pt`, 2026-01-02",
        "- train: `a.jsonl`, 5 rows, 3 used, 2 too long",
        "- train_loss: 0.123457",
        f"merge_peft_adapter.py --lora_model '{output_dir}' --output_dir '{output_dir}-merged'",
        "python supervised_finetuning.py --system_prompt 'Be brief.'",
        "not medical advice",
    ):
        assert part in card
    assert "eval_loss" not in card
    (output_dir / "adapter_config.json").unlink()
    assert next_commands(output_dir) == [f"python inference.py --model_name_or_path '{output_dir}' --interactive"]


def test_metrics_are_a_row_an_event_and_go_on_when_resumed(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")

    def run(resumed_from: int, *steps: int) -> list[dict]:
        metrics = MetricsFile(tmp_path, append=resumed_from > 0)
        state = TrainerState(is_world_process_zero=True, epoch=0.5, global_step=resumed_from)
        metrics.on_train_begin(args, state, TrainerControl())
        for step in steps:
            state.global_step = step
            metrics.on_log(args, state, TrainerControl(), logs={"loss": 1 / step})
        return read_json(tmp_path / "metrics.jsonl")

    assert [(row["step"], row["loss"], row["epoch"]) for row in run(0, 1, 2)] == [(1, 1.0, 0.5), (2, 0.5, 0.5)]
    assert [row["step"] for row in run(2, 3, 4)] == [1, 2, 3, 4]
    # Killed at step 4, resumed from the checkpoint of step 3.
    assert [row["step"] for row in run(3, 4, 5)] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in run(0, 1)] == [1]


def test_only_the_first_process_writes_metrics(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    MetricsFile(tmp_path, False).on_log(args, TrainerState(is_world_process_zero=False), TrainerControl(), {"loss": 1})
    assert not (tmp_path / "metrics.jsonl").exists()


# --- progress where there is no terminal -----------------------------------------------------------------------------


def test_plain_progress_has_loss_speed_memory_and_time_left(tmp_path, log, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("medicalgpt.training.runs.time.time", lambda: now[0])
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state = TrainerState(is_world_process_zero=True, max_steps=100)
    progress, control = PlainProgress(), TrainerControl()
    progress.on_train_begin(args, state, control)
    now[0] += 10
    state.global_step = 1
    progress.on_step_end(args, state, control)
    assert log == ["first step done, 10.0 s after training began"]
    state.global_step = 10
    progress.on_log(args, state, control, {"loss": 2.5, "learning_rate": 1e-4, "num_tokens": 5000})
    assert log[-1].startswith("step 10/100 (10%)  loss 2.5  learning_rate 0.0001  500 tokens/s  ")
    assert log[-1].endswith(" GB  1m30s to go")
    now[0] += 29
    progress.on_step_end(args, state, control)
    assert len(log) == 2
    now[0] += 2
    progress.on_step_end(args, state, control)
    assert len(log) == 3 and "step 10/100" in log[-1]
    progress.on_log(args, state, control, {"train_runtime": 1.0})
    assert len(log) == 3


# --- announcements ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "steps", "per_epoch"),
    [
        ({"per_device_train_batch_size": 4, "num_train_epochs": 3}, 9, 3),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3}, 9, 3),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1}, 2, 2),
        ({"per_device_train_batch_size": 4, "num_train_epochs": 0.5}, 2, 3),
        ({"per_device_train_batch_size": 4, "max_steps": 5}, 5, 3),
    ],
)
def test_the_announced_steps_are_the_trainers(start, base, log, flags, steps, per_epoch):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, Trainer

    run = start(save_strategy="no", logging_strategy="no", disable_tqdm=True, **flags)
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}] * 10
    dataset, model = Dataset.from_list(rows), AutoModelForCausalLM.from_pretrained(base)
    run.announce(model, dataset, None)
    plan = run.record["plan"]
    batch = flags["per_device_train_batch_size"] * flags.get("gradient_accumulation_steps", 1)
    expected = {"sequences": 10, "tokens": 30, "supervised_tokens": 20, "effective_batch": batch, "steps": steps}
    assert plan == expected
    text = "\n".join(log)
    assert f"{steps} ({per_epoch} an epoch)" in text and "30, supervised 20 (67%)" in text
    assert "10 to train on, 0 held out" in text
    trainer = Trainer(model=model, args=run.training, train_dataset=dataset)
    trainer.train()
    assert trainer.state.global_step == steps
