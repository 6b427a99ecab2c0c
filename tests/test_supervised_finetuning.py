"""supervised_finetuning.py as a user runs it: what it leaves, what it goes on from, what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from medicalgpt.errors import UserError
from medicalgpt.files import hash_file
from medicalgpt.models.adapters import attach_adapter
from medicalgpt.models.hub import Adapter, CheckpointError, fingerprint
from medicalgpt.models.loading import load_model
from medicalgpt.readers.problems import DataError
from medicalgpt.serving.chat import ChatEngine
from tests.helpers import ROOT, read_json, run_here, run_program, stop_tokens, write_jsonl
from tests.tiny import END_OF_TEXT, TURN_END, make_tiny

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = "supervised_finetuning.py"
SYSTEM = "你是小医，回答要短。"
ADAPTER_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "generation_config.json",
    "loss.png",
    "metrics.jsonl",
    "README.md",
    "run.json",
    "samples.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
}


def chats(count: int, first: int = 0) -> list[dict]:
    """Rows of all formats in turn, unequal in length."""
    rows = []
    for n in range(first, first + count):
        question, answer = f"问题 {n}?" + "!" * (n % 5), f"回答 {n * 7}。" + "." * (n % 7)
        rows += [
            {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]},
            {"instruction": question, "input": "", "output": answer, "history": [["Hi", "Hello"]]},
            {"prompt": question, "response": answer},
        ][n % 4 : n % 4 + 1]
    return rows


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with a base model, another one, and chats."""
    folder = tmp_path_factory.mktemp("sft")
    make_tiny(folder / "base")
    make_tiny(folder / "other", seed=1)
    write_jsonl(folder / "chat" / "train.jsonl", chats(20))
    (folder / "chat" / "more.json").write_text(json.dumps(chats(4, 20), ensure_ascii=False), encoding="utf-8")
    write_jsonl(folder / "chat" / "validation.jsonl", chats(5, 100))
    return folder


def train(work: Path, output: str, *more, model="base", data="chat", **options) -> subprocess.CompletedProcess:
    flags = ("--model_name_or_path", work / model, "--train_file_dir", work / data, "--output_dir", work / output)
    return run_program(SCRIPT, *flags, *more, **options)


def here(work: Path, output: str, *more, model="base", data="chat") -> None:
    flags = ("--model_name_or_path", work / model, "--train_file_dir", work / data, "--output_dir", work / output)
    run_here(SCRIPT, *flags, *more)


@pytest.fixture(scope="module")
def adapter(work) -> subprocess.CompletedProcess:
    """The learning guide's command: LoRA r 8, one epoch, with what else is worth seeing in one run."""
    return train(
        work,
        "adapter",
        *("--use_peft", "True", "--lora_rank", 8, "--lora_alpha", 16, "--max_train_samples", 1000),
        *("--num_train_epochs", 1, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2),
        *("--warmup_ratio", 0.5, "--logging_steps", 1, "--learning_rate", 0.02, "--eval_strategy", "epoch"),
        *("--system_prompt", SYSTEM, "--sample_prompts", 2),
    )


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_json(folder / "metrics.jsonl") if "loss" in row}


# --- an adapter ------------------------------------------------------------------------------------------------------


def test_every_file_is_there(work, adapter):
    folder = work / "adapter"
    assert {path.name for path in folder.iterdir()} >= ADAPTER_FILES
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert stop_tokens(folder) == [TURN_END, END_OF_TEXT]
    assert re.search(r"{%-? generation", (folder / "chat_template.jinja").read_text(encoding="utf-8"))
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2
    assert all(weight.dtype == torch.float32 and weight.abs().sum() > 0 for weight in weights.values())


def test_the_record_is_exact(work, adapter):
    record = read_json(work / "adapter" / "run.json")
    base, chat = str(work / "base"), work / "chat"
    assert (record["stage"], record["status"]) == ("supervised_finetuning", "finished")
    assert record["command"][:3] == [SCRIPT, "--model_name_or_path", base]
    assert record["parent"] == base
    assert record["base"] == {"name": base, "adapter": None, "fingerprint": fingerprint(base)}
    assert record["data"] == [
        {
            "side": side,
            "file": str(chat / name),
            "sha256": hash_file(chat / name),
            "rows": rows,
            "used": rows,
            "left_out": {},
        }
        for side, name, rows in (
            ("train", "more.json", 4),
            ("train", "train.jsonl", 20),
            ("validation", "validation.jsonl", 5),
        )
    ]
    arguments = record["arguments"]
    assert (arguments["lora_rank"], arguments["warmup_steps"], arguments["system_prompt"]) == (8, 0.5, SYSTEM)
    assert arguments["learning_rate"] == 0.02
    assert record["plan"]["steps"] == 6 and record["plan"]["effective_batch"] == 4
    assert record["plan"]["sequences"] == 24
    assert record["model"]["trainable"] == 16384 == sum(record["model"]["trainable_by_module"].values())
    assert record["processes"] == 1 and record["resumed_from"] is None
    assert {"torch", "transformers", "trl", "peft", "python"} <= set(record["versions"])
    assert re.fullmatch("[0-9a-f]{40}", record["git_commit"] or "0" * 40)
    assert record["metrics"]["eval_perplexity"] == pytest.approx(
        2.718281828 ** record["metrics"]["eval_loss"], rel=1e-6
    )
    assert record["metrics"]["eval_supervised_tokens"] > 0


def test_metrics_show_learning_and_the_warmup(work, adapter):
    rows = read_json(work / "adapter" / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    # Half of six steps warm up to 0.02; then it falls.
    rates = [row["learning_rate"] for row in steps]
    assert rates[:4] == pytest.approx([0, 0.02 / 3, 0.04 / 3, 0.02]) and rates[3] > rates[4] > rates[5]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert rows[0]["step"] == 0 and "eval_loss" in rows[0]
    assert held_out[-1] < held_out[0]
    assert steps[-1]["num_tokens"] == read_json(work / "adapter" / "run.json")["plan"]["tokens"]


def test_the_log_tells_what_will_happen_without_a_terminal(work, adapter):
    log = adapter.stderr
    for part in (
        "train           24 rows in 2 file(s), used 24, left out: none",
        "held out by their names, never trained on",
        "⟦回答 ",
        "24 to train on, 5 held out",
        "16,384 of 123,776 parameters",
        "observed as requested",
        "6 (6 an epoch)",
        "step 3/6 (50%)",
        "tokens/s",
        "eval_perplexity",
        f"next: python merge_peft_adapter.py --lora_model {work / 'adapter'}",
    ):
        assert part in log, part
    preview = log.split("first training row")[1].split("INFO")[0]
    assert SYSTEM in preview.split("⟦")[0] and preview.count("⟦") == preview.count("⟧") >= 1
    assert "�" not in preview
    # Neither bars nor colours nor the libraries' own chatter where nobody looks at a terminal.
    assert not re.search(r"\x1b\[|\r|it/s\]|WARNING|Warning", log)


def test_samples_before_and_after_are_kept(work, adapter):
    samples = read_json(work / "adapter" / "samples.jsonl")
    assert len(samples) == 2
    for sample in samples:
        assert set(sample) == {"prompt", "before", "after"}
        assert sample["prompt"].startswith(f"<|im_start|>system\n{SYSTEM}") and sample["before"] != sample["after"]
        assert sample["prompt"].endswith("<|im_start|>assistant\n")


def test_the_card_has_commands_that_run(work, adapter):
    card = (work / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"python inference.py --model_name_or_path {work / 'adapter'} --interactive" in card
    assert f"- train: `{work / 'chat' / 'train.jsonl'}`, 20 rows, 20 used" in card
    assert "not medical advice" in card


def test_the_engine_answers_as_it_was_trained(work, adapter):
    """The system prompt comes from the folder, as do template and stop tokens, with no flag."""
    engine = ChatEngine.from_pretrained(str(work / "adapter"))
    prompt = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    own = [{"role": "system", "content": "Other."}, {"role": "user", "content": "Q"}]
    assert SYSTEM not in engine.tokenizer.apply_chat_template(own, tokenize=False)
    base = load_model(AutoModelForCausalLM, str(work / "base"))
    assert not torch.allclose(logits(engine.model), logits(base), atol=1e-2)


# --- going on --------------------------------------------------------------------------------------------------------


def test_an_adapter_folder_goes_on_as_that_adapter(work, adapter):
    """--model_name_or_path may be an adapter: base, adapter, template and system prompt follow from it."""
    done = train(
        work,
        "second",
        "--max_steps",
        2,
        "--learning_rate",
        1e-3,
        "--logging_steps",
        1,
        "--save_steps",
        1,
        model="adapter",
    )
    assert f"base {work / 'base'} plus that adapter" in done.stderr and "in its own shape" in done.stderr
    assert SYSTEM in done.stderr
    first, second = (load_file(work / name / "adapter_model.safetensors") for name in ("adapter", "second"))
    assert first.keys() == second.keys()
    moved = [(first[name] - second[name]).abs().max().item() for name in first]
    assert 0 < min(moved) and max(moved) < 0.01
    assert losses(work / "second")[1] < losses(work / "adapter")[1] - 0.2
    record = read_json(work / "second" / "run.json")
    assert record["parent"] == str(work / "adapter") and record["base"]["name"] == str(work / "base")
    assert read_json(work / "second" / "adapter_config.json")["base_model_name_or_path"] == str(work / "base")
    run_here("merge_peft_adapter.py", "--lora_model", work / "second", "--output_dir", work / "second-merged")
    merged = load_model(AutoModelForCausalLM, str(work / "second-merged"))
    live = attach_adapter(load_model(AutoModelForCausalLM, str(work / "base")), Adapter.read(str(work / "second")))
    torch.testing.assert_close(logits(merged), logits(live), atol=1e-4, rtol=0)
    # A checkpoint of the run is an adapter folder too, and the record of its run vouches for its base.
    run_here(SCRIPT, *evaluation(work, "from-checkpoint", "--model_name_or_path", work / "second" / "checkpoint-2"))
    run_here(SCRIPT, *evaluation(work, "from-end", "--model_name_or_path", work / "second"))
    ends = [read_json(work / name / "run.json")["metrics"]["eval_loss"] for name in ("from-checkpoint", "from-end")]
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


def evaluation(work, output, *more):
    where = ("--train_file_dir", work / "chat", "--output_dir", work / output)
    return (*where, "--do_train", "False", "--sample_prompts", 0, *more)


def test_peft_path_and_evaluation_alone(work, adapter):
    """The adapter, named by --peft_path, has the loss that its training ended with; nothing is trained or saved."""
    done = train(work, "evaluated", "--peft_path", work / "adapter", "--do_train", "False", "--sample_prompts", 0)
    trained, evaluated = (read_json(work / name / "run.json") for name in ("adapter", "evaluated"))
    assert evaluated["metrics"]["eval_loss"] == pytest.approx(trained["metrics"]["eval_loss"], abs=1e-6)
    assert "train_loss" not in evaluated["metrics"] and "in its own shape" in done.stderr
    assert {path.name for path in (work / "evaluated").iterdir()} == {"metrics.jsonl", "run.json"}


def test_full_training_on_packed_blocks(work, adapter):
    """All weights from an adapter folder, with the flags of MedicalGPT's guide."""
    done = train(
        work,
        "full",
        *("--use_peft", "False", "--packing", "True", "--train_on_inputs", "True", "--gradient_checkpointing", "True"),
        *("--model_max_length", 256, "--num_train_epochs", 2, "--logging_steps", 1, "--learning_rate", 5e-3),
        *(
            "--torch_dtype",
            "float32",
            "--validation_split_percentage",
            50,
            "--per_device_train_batch_size",
            1,
            "--bf16",
            "--verbose",
        ),
        model="adapter",
    )
    assert re.search(r"autocast +bfloat16 +bfloat16\n", done.stderr)
    assert "100.00%" in done.stderr and "100%):" in done.stderr
    record = read_json(work / "full" / "run.json")
    assert record["plan"]["supervised_tokens"] == record["plan"]["tokens"]
    assert record["plan"]["sequences"] < 24 and record["arguments"]["packing"] is True
    # Held-out files are there, so no training row is moved.
    assert [entry["used"] for entry in record["data"]] == [4, 20, 5]
    folder = work / "full"
    present = {path.name for path in folder.iterdir()}
    assert ADAPTER_FILES - {"adapter_config.json", "adapter_model.safetensors"} | {"model.safetensors"} <= present
    assert not present & {"adapter_config.json", "adapter_model.safetensors"}
    steps = losses(folder)
    assert steps[max(steps)] < steps[1] - 0.3
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.dtype == torch.float32
    base = load_file(work / "base" / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    assert all(not torch.equal(weights[name], base[name]) for name in base)
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template
        == AutoTokenizer.from_pretrained(work / "adapter").chat_template
    )
    assert len(read_json(folder / "metrics.jsonl")) > 2


@pytest.mark.parametrize(
    "flags",
    [
        ("--load_in_4bit", "True", "--qlora", "True"),
        pytest.param(("--load_in_8bit", "True"), marks=pytest.mark.slow),
    ],
)
def test_quantized_bases(work, flags):
    """As the guide has it; the adapter is float32 and merges into the base in full precision."""
    output = flags[0].strip("-")
    done = train(work, output, *flags, "--max_steps", 4, "--learning_rate", 0.02, "--logging_steps", 1)
    assert "16,384 of 123,776 parameters" in done.stderr
    # The warning of torch that a product without gradient is differentiated.
    assert "autograd" not in done.stderr
    steps = losses(work / output)
    assert steps[4] < steps[1] - 0.1
    weights = load_file(work / output / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(weight.abs().sum() > 0 for weight in weights.values())
    record = read_json(work / output / "run.json")
    assert record["base"]["fingerprint"] == fingerprint(str(work / "base"))
    run_here("merge_peft_adapter.py", "--lora_model", work / output, "--output_dir", work / f"{output}-merged")
    assert torch.isfinite(logits(load_model(AutoModelForCausalLM, str(work / f"{output}-merged")))).all()


# --- stopped and resumed ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_resumed_is_the_run_that_was_not_killed(work):
    """Per-step losses, rates and final weights; a checkpoint that is not whole is passed over and named."""
    flags = (
        *("--num_train_epochs", 20, "--per_device_train_batch_size", 4, "--logging_steps", 1, "--save_steps", 20),
        *("--learning_rate", 5e-3, "--sample_prompts", 0, "--lora_dropout", 0.1, "--max_train_samples", 22),
    )
    train(work, "whole", *flags)
    folder = work / "killed"
    command = [sys.executable, ROOT / SCRIPT, "--model_name_or_path", work / "base", "--train_file_dir", work / "chat"]
    process = subprocess.Popen(
        list(map(str, [*command, "--output_dir", folder, *flags])),
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    for _ in range(12_000):
        if (folder / "checkpoint-40" / "manifest.json").is_file() or process.poll() is not None:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_json(folder / "run.json")["status"] == "running", "the run ended before it could be killed"
    # The newest checkpoint lost its last bytes with the power.
    shutil.copytree(folder / "checkpoint-20", folder / "checkpoint-60", dirs_exist_ok=True)
    weights = folder / "checkpoint-60" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    with pytest.raises(UserError, match="Resume it: --resume auto"):
        here(work, "killed", *flags)
    resumed = train(work, "killed", *flags, "--resume_from_checkpoint", "True")
    assert re.search(r"checkpoint-60 is incomplete \(adapter_model.safetensors has changed\)", resumed.stderr)
    assert f"resuming from {folder / 'checkpoint-40'}" in resumed.stderr
    expected, found = losses(work / "whole"), losses(folder)
    assert list(found) == list(expected) == list(range(1, 121))
    assert found == pytest.approx(expected, abs=1e-6)
    rates = [[row.get("learning_rate") for row in read_json(run / "metrics.jsonl")] for run in (work / "whole", folder)]
    assert rates[0] == rates[1]
    ends = [load_file(run / "adapter_model.safetensors") for run in (work / "whole", folder)]
    torch.testing.assert_close(ends[1], ends[0], atol=1e-6, rtol=0)
    record = read_json(folder / "run.json")
    assert record["status"] == "finished" and record["resumed_from"] == str(folder / "checkpoint-40")

    with pytest.raises(UserError, match="was trained on other rows"):
        here(work, "killed", *flags[:-1], 23, "--resume_from_checkpoint", "True")


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_one_adapter(work):
    flags = ("--max_steps", 3, "--per_device_train_batch_size", 2, "--logging_steps", 1, "--learning_rate", 0.02)
    done = train(work, "two", *flags, "--save_steps", 2, processes=2)
    record = read_json(work / "two" / "run.json")
    assert record["processes"] == 2 and record["plan"]["effective_batch"] == 4 and record["status"] == "finished"
    assert {path.name for path in (work / "two").iterdir()} >= ADAPTER_FILES
    assert sorted(losses(work / "two")) == [1, 2, 3] and len(losses(work / "two")) == 3
    assert losses(work / "two")[3] < losses(work / "two")[1]
    assert done.stderr.count("first training row") == 1 and done.stderr.count("24 to train on") == 1
    assert (work / "two" / "checkpoint-2" / "manifest.json").is_file()
    refused = train(work, "two", *flags, processes=2, check=False)
    assert refused.returncode != 0 and refused.stderr.count("holds another run") == 1


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["True", "False"])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(work, stage, peft):
    """Two processes: what is saved has no empty tensor, loads, and is the model that was evaluated at the end."""
    pytest.importorskip("deepspeed")
    output = f"zero{stage}-{peft}"
    done = train(
        work,
        output,
        *("--deepspeed", ROOT / f"zero{stage}.json", "--max_steps", 4, "--per_device_train_batch_size", 2),
        *("--logging_steps", 1, "--learning_rate", 0.02 if peft == "True" else 5e-3, "--use_peft", peft),
        *("--save_strategy", "no", "--max_grad_norm", 1.0),
        processes=2,
        timeout=400,
    )
    check_sharded(work, output, peft, done, sharded=stage == 3)


@pytest.mark.slow
def test_fsdp_that_would_not_come_about_stops_the_run(work):
    """accelerate leaves FSDP out on CPUs without a word, whether a flag or its own launcher asks for it."""
    flagged = train(work, "fsdp", "--fsdp", "full_shard auto_wrap", check=False)
    assert flagged.returncode == 2 and "--fsdp has no effect on CPUs" in flagged.stderr
    launched = train(work, "fsdp", "--max_steps", 1, env={"ACCELERATE_USE_FSDP": "true"}, check=False)
    assert launched.returncode == 1 and "sharding: requested FSDP; observed off" in launched.stderr
    assert not list((work / "fsdp").glob("*.safetensors"))


def check_sharded(work: Path, output: str, peft: str, done: subprocess.CompletedProcess, sharded: bool) -> None:
    # Samples are off exactly where no process has all weights, which shows that the flag did something.
    assert ("the weights are sharded over the processes" in done.stderr) is sharded
    folder = work / output
    assert read_json(folder / "run.json")["status"] == "finished", done.stderr
    weights = load_file(folder / ("adapter_model.safetensors" if peft == "True" else "model.safetensors"))
    assert weights and all(weight.numel() > 0 for weight in weights.values())
    steps = losses(folder)
    assert steps[4] < steps[1] - 0.05
    # The saved weights, evaluated by one process, have the loss that two processes had at the end.
    run_here(SCRIPT, *evaluation(work, f"{output}-alone", "--model_name_or_path", folder))
    alone, together = (
        read_json(run / "run.json")["metrics"]["eval_loss"] for run in (work / f"{output}-alone", folder)
    )
    assert alone == pytest.approx(together, abs=1e-4)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_broken_folder_is_refused_before_anything_is_loaded(work, tmp_path):
    write_jsonl(tmp_path / "bad" / "a.jsonl", [*chats(2), "{broken", {"prompt": "Q", "response": ""}])
    write_jsonl(
        tmp_path / "bad" / "b.jsonl",
        [{"messages": [{"role": "robot", "content": "x"}]}, {**chats(1)[0], "label": False}],
    )
    write_jsonl(tmp_path / "bad" / "dev.jsonl", [{"prompt": "Q", "response": "A" * 2000}])
    done = train(work, "never", "--long_rows", "refuse", data=tmp_path / "bad", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    bad = tmp_path / "bad"
    for part in (
        "error: 5 problem(s) in the data:",
        f"{bad / 'a.jsonl'}:3: broken JSON at column 2",
        f"{bad / 'a.jsonl'}:4: `response` is empty",
        f"{bad / 'b.jsonl'}:1: turn 1 has the unknown role 'robot'",
        f"{bad / 'b.jsonl'}:2: `label` is false",
        f"{bad / 'dev.jsonl'}:1: 2",
        "Nothing was trained.",
    ):
        assert part in done.stderr, part
    assert not (work / "never").exists()


def test_rows_are_left_out_when_asked_and_counted(work, tmp_path):
    rows = [*chats(6), {"prompt": "Q", "response": ""}, {"prompt": "Q", "response": "A" * 2000}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    flags = ("--skip_bad_rows", "True", "--skip_long_rows", "True", "--max_train_samples", 7, "--max_steps", 1)
    here(work, "left-out", *flags, "--sample_prompts", 0, "--save_strategy", "no", data=tmp_path)
    (entry,) = read_json(work / "left-out" / "run.json")["data"]
    assert (entry["rows"], entry["used"], entry["left_out"]) == (8, 6, {"unusable": 1, "too long": 1})
    assert "8 rows, 6 used, 1 unusable, 1 too long" in (work / "left-out" / "README.md").read_text(encoding="utf-8")


def test_a_file_of_nothing_but_bad_rows_is_reported(work, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["{broken"] * 2)
    with pytest.raises(DataError, match="2 problem"):
        here(work, "never", data=tmp_path)


def test_a_folder_of_another_run_is_left_alone(work, adapter):
    before = {path.name: path.stat().st_mtime_ns for path in (work / "adapter").iterdir()}
    with pytest.raises(UserError, match="holds another run"):
        here(work, "adapter")
    assert {path.name: path.stat().st_mtime_ns for path in (work / "adapter").iterdir()} == before


def test_the_adapter_of_another_base_is_refused(work, adapter):
    with pytest.raises(CheckpointError, match="has other weights"):
        here(work, "never", "--peft_path", work / "adapter", model="other")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora_rank", 4, "--peft_path", "{adapter}"), "--lora_rank would have no effect"),
        (("--load_in_4bit", "True", "--use_peft", "False"), "a quantized base cannot be trained in full"),
        (("--load_in_4bit", "True", "--load_in_8bit", "True"), "choose one"),
        (("--template_name", "qwne"), "qwen"),
        (("--validation_file_dir", "{chat}/train.jsonl"), "all 20 held-out rows are also trained on"),
        (("--target_modules", "q_prj"), "no module q_prj"),
        (("--resume_from_checkpoint", "True"), "no complete checkpoint"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_a_step(work, adapter, flags, message):
    flags = [str(flag).format(adapter=work / "adapter", chat=work / "chat") for flag in flags]
    with pytest.raises(UserError, match=message):
        here(work, "never", *flags)
    assert not (work / "never").exists()


def test_evaluation_that_has_nothing_to_evaluate_is_said_plainly(work, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", chats(4))
    for flags in (("--eval_strategy", "steps"), ("--do_train", "False")):
        with pytest.raises(UserError, match="no held-out rows"):
            here(work, "never", *flags, data=tmp_path)


@pytest.mark.parametrize(
    ("flag", "place"), [("--model_name_or_path", "no/such/model"), ("--train_file_dir", "no/such")]
)
def test_missing_places_are_named(work, flag, place):
    flags = {"--model_name_or_path": work / "base", "--train_file_dir": work / "chat", "--output_dir": work / "never"}
    with pytest.raises(UserError, match=f"no .*{place}"):
        run_here(SCRIPT, *[token for pair in {**flags, flag: place}.items() for token in pair])
