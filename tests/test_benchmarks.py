"""Benchmarks: all sides get the same tokens and differ as they say, results are right, all tokens are counted."""

import argparse
import importlib
import json
import math
import sys
from pathlib import Path

from benchmarks import moe_cpu, peers, preference_cpu, preference_gpu, rl_gpu, sft_cpu
from tests.helpers import read_json, write_jsonl

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import CallbackHandler

LONG = "多喝水，注意休息，如果发烧超过三天就去医院。" * 30


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    rows = [
        {
            "conversations": [{"from": "human", "value": f"第{number}个问题：感冒了怎么办？" + LONG * (number == 3)}],
            "chosen": f"第{number}个回答。" + LONG * (number % 2),
            "rejected": "不知道。" + LONG * (number == 1),
        }
        for number in range(8)
    ]
    data = write_jsonl(folder / "pairs.jsonl", rows)
    found = argparse.Namespace(work=folder / "work", stage="dpo", data=data, rows=6, held_out=2, length=96, batch=2)
    found.work.mkdir()
    preference_cpu.prepare(found)
    return found


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_pairs_are_cut_to_fit_and_whole_ones_stay(args):
    tokenizer = AutoTokenizer.from_pretrained(args.work / "base")
    pairs = preference_cpu.encoded(tokenizer, args.work / "train")
    assert len(pairs) == 6
    assert max(len(ids) for pair in pairs for ids, _ in pair) <= args.length
    whole = lines(args.work / "train" / "pairs.jsonl")[2]
    assert whole["chosen"] == "第2个回答。"
    assert whole["rejected"] == "不知道。"


@pytest.mark.parametrize(("name", "place"), [("chosen", 0), ("rejected", 1)])
def test_the_rendered_texts_have_the_ids_of_the_stages(args, name, place):
    tokenizer = AutoTokenizer.from_pretrained(args.work / "base")
    ours = preference_cpu.encoded(tokenizer, args.work / "train")
    for row, pair in zip(lines(args.work / "trl.jsonl"), ours, strict=True):
        ids, length = pair[place]
        assert tokenizer(row["prompt"] + row[name]).input_ids == ids
        assert tokenizer(row["prompt"]).input_ids == ids[:-length]


def test_a_side_that_saw_other_tokens_stops_the_comparison(args):
    tokenizer = AutoTokenizer.from_pretrained(args.work / "base")
    ours = preference_cpu.encoded(tokenizer, args.work / "train")
    tokens = sum(len(ids) for pair in ours for ids, _ in pair)
    preference_cpu.check_tokens("ours", args.work, [{"num_tokens": tokens}, {"train_runtime": 1.0}], args)
    with pytest.raises(SystemExit, match="ours did not train"):
        preference_cpu.check_tokens("ours", args.work, [{"num_tokens": tokens - 1}], args)
    (args.work / "encoded.json").write_text(json.dumps(ours))
    preference_cpu.check_tokens("trl_no_checkpointing", args.work, [], args)
    ours[0][0] = (ours[0][0][0], ours[0][0][1] + 1)
    (args.work / "encoded.json").write_text(json.dumps(ours))
    with pytest.raises(SystemExit, match="trl did not train"):
        preference_cpu.check_tokens("trl", args.work, [], args)


def test_held_out_loss_of_dpo_is_that_of_a_batch_by_hand(args, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.work / "base")
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(args.work / "base")
    tokenizer.save_pretrained(tmp_path)

    margins = []
    for pair in preference_cpu.encoded(tokenizer, args.work / "held_out"):
        gains = []
        for ids, length in pair:
            batch = torch.tensor([ids])
            labels = batch.clone()
            labels[:, :-length] = -100
            with torch.no_grad():
                now = -model(input_ids=batch, labels=labels).loss * length
                with model.disable_adapter():
                    gains.append(now + model(input_ids=batch, labels=labels).loss * length)
        margins.append(0.1 * (gains[0] - gains[1]).item())
    loss, accuracy = preference_cpu.held_out(tmp_path, args)
    assert max(map(abs, margins)) > 0.01
    assert loss == pytest.approx(sum(math.log(1 + math.exp(-margin)) for margin in margins) / len(margins), abs=1e-4)
    assert accuracy == sum(margin > 0 for margin in margins) / len(margins)


@pytest.fixture(scope="module")
def chat_args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    rows = [
        {"conversations": [{"from": "human", "value": f"第{number}个问题？"}, {"from": "gpt", "value": "多喝水。"}]}
        for number in range(6)
    ]
    data = write_jsonl(folder / "rows.jsonl", rows)
    found = argparse.Namespace(work=folder / "work", data=data, rows=6, held_out=2, length=96, batch=2)
    found.work.mkdir()
    sft_cpu.prepare(found)
    return found


def run_command(command, monkeypatch):
    """Run in this process what a side runs in its own process."""
    name, flags = (command[1], command[2:]) if command[0] == "-m" else (Path(command[0]).stem, command[1:])
    monkeypatch.setattr(sys, "argv", [name, *flags])
    importlib.import_module(name).main()


class Started(BaseException):
    """Training is about to begin."""


@pytest.fixture
def started(monkeypatch):
    """Arguments and model of each trainer that begins to train, which it then does not."""
    found = []

    def stop(handler, args, *_):
        found.append((args, handler.model))
        raise Started

    monkeypatch.setattr(CallbackHandler, "on_train_begin", stop)
    return found


SETTINGS = {
    "ours": (False, "group_by_length"),
    "ours_random": (False, "random"),
    "trl": (True, "random"),
    "trl_no_checkpointing": (False, "random"),
    "trl_grouped": (True, "group_by_length"),
    "trl_grouped_no_checkpointing": (False, "group_by_length"),
}


@pytest.mark.parametrize(
    ("stage", "side"),
    [
        *(("sft", side) for side in sft_cpu.SIDES),
        *((stage, side) for stage in preference_cpu.PROGRAMS for side in preference_cpu.SIDES if side != "ours_random"),
    ],
)
def test_sides_recompute_activations_as_their_names_say(args, chat_args, stage, side, started, tmp_path, monkeypatch):
    if stage == "sft":
        command = sft_cpu.command_for(side, tmp_path / side, chat_args)
    else:
        command = preference_cpu.command_for(side, tmp_path / side, argparse.Namespace(**vars(args) | {"stage": stage}))
    with pytest.raises(Started):
        run_command(command, monkeypatch)
    ((training, model),) = started
    recomputes, order = SETTINGS[side]
    assert training.gradient_checkpointing is recomputes
    assert model.is_gradient_checkpointing is recomputes
    assert training.train_sampling_strategy == order
    assert (training.per_device_train_batch_size, training.num_train_epochs) == (2, 1)
    assert (training.learning_rate, training.seed, training.bf16) == (2e-4, 42, False)


@pytest.mark.parametrize(
    ("side", "flags", "recomputes"),
    [
        ("ours", [], False),
        ("ours", ["--gradient_checkpointing", "True"], True),
        ("trl", [], True),
        ("trl_no_checkpointing", [], False),
    ],
)
def test_what_a_side_leaves_says_whether_it_recomputed(chat_args, side, flags, recomputes, tmp_path, monkeypatch):
    out = tmp_path / side
    run_command([*sft_cpu.command_for(side, out, chat_args), *flags], monkeypatch)
    assert peers.recomputes(side, out) is recomputes
    assert sum("loss" in entry for entry in peers.log_history(out)) == 2


def result(seconds, losses=(0.7, 0.6), recomputes=False):
    times = {"seconds": seconds, "training_seconds": seconds / 2, "cpu_seconds": seconds}
    return times | {"peak_gb": 1.0, "recomputes": recomputes, "losses": list(losses), "held_out_loss": seconds / 100}


def test_the_fastest_runs_are_compared_and_all_are_written(tmp_path, capsys):
    results = {"ours": [result(30.0), result(20.0)], "trl": [result(50.0, recomputes=True), result(70.0)]}
    args = argparse.Namespace(
        runs=2, sides=["ours", "trl"], data=Path("rows.jsonl"), output=tmp_path / "new" / "all.json"
    )
    peers.report(results, args, {"cores": 2}, {"held-out loss": lambda found: f"{found['held_out_loss']:.4f}"})
    assert capsys.readouterr().out.splitlines() == [
        "",
        "| | recomputes | seconds | in training | CPU time | peak GB | first and last loss | held-out loss |",
        "|---|---|---|---|---|---|---|---|",
        "| ours | no | 20.0 | 10.0 | 20.0 | 1.00 | 0.7000, 0.6000 | 0.2000 |",
        "| trl | yes | 50.0 | 25.0 | 50.0 | 1.00 | 0.7000, 0.6000 | 0.5000 |",
        "",
        "| time relative to | ours |",
        "|---|---|",
        "| trl | 2.50 (2.50 in training) |",
    ]
    written = read_json(args.output)
    assert written["runs"] == results
    assert written["settings"] == {"runs": 2, "sides": ["ours", "trl"], "data": "rows.jsonl"}
    assert written["time_relative_to_ours"] == {"trl": {"ours": {"seconds": 2.5, "training_seconds": 2.5}}}


def test_losses_that_differ_fail_the_comparison():
    results = {"ours_random": [result(1.0)], "trl": [result(1.0, (0.7, 0.6 + 1e-5))]}
    peers.check_losses(results, ("ours_random", "trl", "trl_no_checkpointing"))
    results["trl_no_checkpointing"] = [result(1.0, (0.7, 0.602))]
    with pytest.raises(SystemExit, match="did not train the same thing"):
        peers.check_losses(results, ("ours_random", "trl", "trl_no_checkpointing"))


def test_an_unknown_side_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["preference_cpu", "--sides", "ours,trl_grouped"])
    with pytest.raises(SystemExit):
        preference_cpu.parse_args()
    assert "no such side: trl_grouped; known are ours, ours_random, trl, trl_no_check" in capsys.readouterr().err


def test_pairs_for_a_gpu_are_of_uneven_lengths_within_the_limit(args, tmp_path):
    options = argparse.Namespace(data=args.data, shape="tiny", pairs=8, length=2048)
    preference_gpu.prepare(tmp_path, options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    lengths = [len(ids) for pair in preference_cpu.encoded(tokenizer, tmp_path / "train") for ids, _ in pair]
    assert max(lengths) <= 2048
    assert len(set(lengths)) > 4


@pytest.fixture(scope="module")
def rl_work(tmp_path_factory):
    work = tmp_path_factory.mktemp("rl")
    rows = [{"question": f"第{number}个问题：{LONG[:number]}", "answer": f"{number} mL"} for number in range(8)]
    rl_gpu.prepare(work, argparse.Namespace(data=write_jsonl(work / "questions.jsonl", rows), shape="tiny"))
    return work


@pytest.mark.parametrize("name", ["base", "rm"])
def test_whatever_random_weights_write_can_be_read_back(rl_work, name):
    tokenizer = AutoTokenizer.from_pretrained(rl_work / name)
    assert len(tokenizer) == rl_gpu.SHAPES["tiny"]["vocab_size"]
    words = [number for number in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(number)[1:].islower()]
    assert len(words) > 4000
    for number in words[::50]:
        assert tokenizer(tokenizer.decode([number])).input_ids == [number]


@pytest.mark.parametrize(("stage", "passes"), [("ppo", 4), ("grpo", 1)])
def test_every_token_of_a_step_is_counted_and_every_part_is_timed(rl_work, stage, passes, monkeypatch):
    from grpo_training import GroupTrainer
    from medicalgpt.serving.chat import ChatEngine
    from ppo_training import PpoTrainer

    from trl import GRPOTrainer

    for owner, name in (
        (ChatEngine, "batch"),
        (PpoTrainer, "roll_out"),
        (GRPOTrainer, "_generate_single_turn"),
        (GroupTrainer, "get_batch_samples"),
        (CallbackHandler, "on_step_end"),
    ):
        # Put back at the end of the test, when they have been replaced.
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(sys, "argv", [])
    options = argparse.Namespace(data=rl_work / "questions.jsonl", steps=1, length=1024, answer_length=6, batch=2)
    flags = [*rl_gpu.stage_flags(stage, rl_work, options), "--output_dir", rl_work / stage]
    rl_gpu.run_stage(stage, rl_work / stage, list(map(str, flags)))

    steps = read_json(rl_work / stage / "steps.json")
    logged = [row["num_tokens"] for row in lines(rl_work / stage / "metrics.jsonl") if "reward" in row]
    assert [step["written"] for step in steps] == [48, 48]
    assert [step["learned"] for step in steps] == [logged[0] * passes, (logged[1] - logged[0]) * passes]
    for step in steps:
        assert min(step.values()) > 0
        assert step["generating"] + step["learning"] < step["seconds"]


def test_a_line_of_the_table_has_the_sums_over_the_steps(capsys):
    first = {"written": 100, "generating": 1.0, "learned": 2000, "learning": 2.0, "seconds": 3.5}
    second = {"written": 300, "generating": 3.0, "learned": 7000, "learning": 4.0, "seconds": 8.5}
    rl_gpu.report("ppo", [first, second], 1.25)
    assert capsys.readouterr().out == "| ppo | 100 | 1,500 | 6.00 | 2.00 | 3.00 | 1.00 | 1.25 |\n"


def test_a_mixture_has_the_active_size_of_the_dense_model(tmp_path):
    for kind in moe_cpu.KINDS:
        moe_cpu.save_base(kind, tmp_path / kind)
    dense, sparse = (AutoModelForCausalLM.from_pretrained(tmp_path / kind) for kind in moe_cpu.KINDS)
    assert sparse.num_parameters() > 2 * dense.num_parameters()
    assert moe_cpu.active_parameters(sparse) == pytest.approx(moe_cpu.active_parameters(dense), rel=0.01)
    found = moe_cpu.measure("attention", tmp_path, argparse.Namespace(batch=1, length=16, pairs=2))
    assert set(found) == {f"{kind}_{what}" for kind in moe_cpu.KINDS for what in ("cpu_seconds", "losses")}
    for kind in moe_cpu.KINDS:
        first, second = found[f"{kind}_losses"]
        assert 0 < second < first, "it learns its one batch"
