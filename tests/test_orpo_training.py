"""The ORPO stage: its loss as numbers, its trainer against plain logits, and the program as a person starts it."""

import math
from types import SimpleNamespace

from medicalgpt.errors import UserError
from orpo_training import NEAREST_TO_CERTAIN, log_odds, orpo_loss
from tests.families import make_family
from tests.helpers import open_stage, read_json, run_program, stop_tokens, write_jsonl
from tests.tiny import END_OF_TEXT, TURN_END, make_tiny

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")
BETA = 0.1
# From a probability so small that exp gives 0 to one that is 1 in float32, and 1 itself.
MEANS = [-2000.0, -104.0, -30.0, -5.0, -0.7, -0.1, -1e-3, -1e-5, -1e-6]
CERTAIN = [-1e-7, -1e-8, -1e-12, 0.0]


def oracle(chosen, rejected, beta=BETA):
    """Loss, its two gradients and the log odds ratio, in float64, from equations 3 to 7 of the paper."""
    c, r = np.float64(chosen), np.float64(rejected)
    ratio = (c - np.log(-np.expm1(c))) - (r - np.log(-np.expm1(r)))
    doubt = np.exp(-np.logaddexp(0, ratio))
    return {
        "loss": -c + beta * np.logaddexp(0, -ratio),
        "log_odds_ratio": ratio,
        "chosen": -1 - beta * doubt / -np.expm1(c),
        "rejected": beta * doubt / -np.expm1(r),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("probability", "expected"), [(0.5, 0.0), (0.8, math.log(4)), (0.25, -math.log(3))])
def test_log_odds_by_hand(probability, expected):
    assert log_odds(torch.tensor([math.log(probability)])).item() == pytest.approx(expected, abs=1e-6)


def test_loss_by_hand():
    """Odds 4 against 1/3, a ratio of 12: -ln 0.8 - 0.1 ln(12/13). And odds of 1 against 1: ln 2 - 0.1 ln(1/2)."""
    found = orpo_loss(torch.tensor([0.8, 0.5]).log(), torch.tensor([0.25, 0.5]).log(), BETA)
    assert found["nll_loss"].tolist() == pytest.approx([0.2231436, 0.6931472], abs=1e-6)
    assert found["log_odds_ratio"].tolist() == pytest.approx([math.log(12), 0], abs=1e-6)
    assert found["loss"].tolist() == pytest.approx([0.2311478, 0.7624619], abs=1e-6)


@pytest.mark.parametrize("rejected", MEANS)
@pytest.mark.parametrize("chosen", MEANS)
def test_loss_and_gradients_against_the_oracle(chosen, rejected):
    c, r = (torch.tensor([value], requires_grad=True) for value in (chosen, rejected))
    found = orpo_loss(c, r, BETA)
    found["loss"].backward()
    expected = oracle(c.item(), r.item())
    for name, value in (*found.items(), ("chosen", c.grad), ("rejected", r.grad)):
        if name != "nll_loss":
            assert value.item() == pytest.approx(expected[name], rel=2e-5, abs=1e-6), name


@pytest.mark.parametrize("other", [*MEANS, *CERTAIN])
@pytest.mark.parametrize("certain", CERTAIN)
@pytest.mark.parametrize("swapped", [False, True])
def test_finite_where_the_model_is_certain(certain, other, swapped):
    values = (other, certain) if swapped else (certain, other)
    c, r = (torch.tensor([value], requires_grad=True) for value in values)
    found = orpo_loss(c, r, BETA)
    found["loss"].backward()
    assert all(torch.isfinite(value).all() for value in (*found.values(), c.grad, r.grad))
    # The odds stop growing where float32 cannot tell a probability from 1.
    limited = oracle(*(min(value.item(), NEAREST_TO_CERTAIN) for value in (c, r)))
    assert found["log_odds_ratio"].item() == pytest.approx(limited["log_odds_ratio"], rel=1e-5, abs=1e-6)


def test_odds_as_trl_computes_them():
    trl = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    for c in MEANS:
        for r in MEANS:
            chosen, rejected = torch.tensor([c]), torch.tensor([r])
            weighted, _, _, _, ratio = trl.odds_ratio_loss(trainer, chosen, rejected)
            ours = orpo_loss(chosen, rejected, BETA)
            assert ours["log_odds_ratio"].item() == pytest.approx(ratio.item(), rel=1e-5, abs=1e-6)
            assert (ours["nll_loss"] - ours["loss"]).item() == pytest.approx(
                weighted.item(), rel=1e-4, abs=1e-6 * max(1, -c)
            )


# ---------------------------------------------------------------------------------------------------------------------
# The trainer
# ---------------------------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": f"Question {n}?", "chosen": "y" * chosen, "rejected": "n" * rejected}
    for n, (chosen, rejected) in enumerate(((1, 90), (40, 3), (7, 8), (60, 30), (2, 1), (25, 70)))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("orpo") / "model")


def flags(model, folder, *more, rows=ROWS):
    if not (folder / "data").exists():
        write_jsonl(folder / "data" / "rows.jsonl", rows)
    return [
        *("--model_name_or_path", model, "--train_file_dir", folder / "data", "--output_dir", folder / "out"),
        *("--sample_prompts", 0, "--save_strategy", "no", "--dataloader_pin_memory", "False", *more),
    ]


def open_orpo(model, folder, *more, rows=ROWS):
    return open_stage("orpo_training.py", *flags(model, folder, *more, rows=rows))


def collate(trainer):
    return trainer.data_collator(list(trainer.train_dataset))


def plain_means(model, row):
    """Mean log-probability of each answer of a pair, alone and without padding, from the model's own logits."""
    means = []
    for name in ("chosen_ids", "rejected_ids"):
        ids, start = torch.tensor([row["prompt_ids"] + row[name]]), len(row["prompt_ids"])
        log_probs = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float().log_softmax(dim=-1)
        means.append(log_probs.gather(1, ids[0, start:, None]).mean())
    return means


def plain_values(trainer):
    trainer.model.eval()
    with torch.no_grad():
        found = [oracle(*(mean.item() for mean in plain_means(trainer.model, row))) for row in trainer.train_dataset]
    return {name: [values[name] for values in found] for name in ("loss", "log_odds_ratio")}


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(found, expected):
    assert found.keys() == expected.keys() and any(gradient.abs().max() > 1e-4 for gradient in expected.values())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen3", {}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("qwen3_moe", {}),
        ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.5}),
    ],
)
def test_the_loss_is_that_of_plain_logits(family, config, tmp_path):
    """Families that change their logits after the head too; what routers add to their loss is not part of ORPO's."""
    trainer = open_orpo(make_family(tmp_path / "model", family, **config), tmp_path).trainer
    expected = plain_values(trainer)
    with torch.no_grad():
        found = trainer.pair_values(trainer.model, collate(trainer))
    for name, values in expected.items():
        assert found[name].tolist() == pytest.approx(values, rel=1e-5, abs=1e-5)


def test_a_certain_model_and_answers_of_one_token(model, tmp_path):
    """The chosen answer, then the rejected one, is what the model says with a probability of 1."""
    trainer = open_orpo(model, tmp_path, "--use_peft", "False").trainer
    row = trainer.train_dataset[0]
    with torch.no_grad():
        trainer.model.lm_head.weight *= 300
        sure = trainer.model(torch.tensor([row["prompt_ids"]])).logits[0, -1].argmax().item()
    for chosen, rejected in (([sure], [sure + 1]), ([sure + 1], [sure])):
        batch = trainer.data_collator([{**row, "chosen_ids": chosen, "rejected_ids": rejected}])
        values = trainer.pair_values(trainer.model, batch)
        assert max(values["logps/chosen"].item(), values["logps/rejected"].item()) == 0
        values["loss"].sum().backward()
        assert torch.isfinite(values["loss"]).all()
        assert all(torch.isfinite(gradient).all() for gradient in gradients(trainer.model).values())


def test_one_pass_and_only_answers_through_the_head(model, tmp_path):
    trainer = open_orpo(model, tmp_path, "--use_peft", "False").trainer
    passes, scored = [], []
    trainer.model.model.register_forward_hook(lambda module, args, output: passes.append(1))
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: scored.append(len(args[0])))
    batch = collate(trainer)
    trainer.compute_loss(trainer.model, batch).backward()
    assert len(passes) == 1
    assert scored == [batch["completion_mask"].sum().item()]


def test_beta_weighs_the_odds(model, tmp_path):
    losses = []
    for flag, beta in (("--orpo_beta", 0), ("--orpo_beta", 0.5), ("--beta", 1)):
        trainer = open_orpo(model, tmp_path, flag, beta).trainer
        with torch.no_grad():
            values = trainer.pair_values(trainer.model, collate(trainer))
        losses.append(values["loss"])
    torch.testing.assert_close(losses[0], values["nll_loss"])
    odds = torch.nn.functional.softplus(-values["log_odds_ratio"])
    torch.testing.assert_close(losses[1], values["nll_loss"] + 0.5 * odds)
    torch.testing.assert_close(losses[2], values["nll_loss"] + odds)
    for beta in (-0.1, "nan", "inf"):
        with pytest.raises(UserError, match=f"--orpo_beta {beta} is not a valid loss weight"):
            open_orpo(model, tmp_path, "--orpo_beta", beta)


@pytest.mark.parametrize(
    ("flags_given", "dropped"),
    [
        ((), False),
        (("--disable_dropout", "False", "--lora_dropout", 0), True),
        (("--disable_dropout", "False", "--lora_dropout", 0.3, "--target_modules", "down_proj"), True),
    ],
)
def test_dropout_only_where_it_is_asked_for(tmp_path, flags_given, dropped):
    """The dropout of the model, of its family's own modules, and that of the adapter."""
    source = make_family(tmp_path / "model", "phi3", resid_pdrop=0.0 if 0.3 in flags_given else 0.3)
    trainer = open_orpo(source, tmp_path, *flags_given).trainer
    trainer.model.train()
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    losses = [trainer.compute_loss(trainer.model, collate(trainer)).item() for _ in range(2)]
    assert (losses[0] != losses[1]) is dropped


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [("--neft_alpha", 5, "supervised_finetuning"), ("--label_smoothing_factor", 0.1, "The loss is of pairs")],
)
def test_flags_without_effect_are_refused(model, tmp_path, flag, value, reason, capsys):
    with pytest.raises(SystemExit):
        open_orpo(model, tmp_path, flag, value)
    assert reason in capsys.readouterr().err


def test_gradient_checkpointing_changes_no_number(model, tmp_path):
    results = []
    for on in (False, True):
        trainer = open_orpo(model, tmp_path, "--use_peft", "False", "--gradient_checkpointing", on).trainer
        if on:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, collate(trainer))
        loss.backward()
        results.append((loss.item(), gradients(trainer.model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert_close(results[1][1], results[0][1])


def test_bfloat16_is_close_to_float32(model, tmp_path):
    losses = []
    for on in (False, True):
        opened = open_orpo(model, tmp_path, "--bf16", on, "--max_steps", 2, "--logging_steps", 1)
        opened.trainer.train()
        losses.append([event["loss"] for event in opened.trainer.state.log_history if "loss" in event])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_the_log_holds_means_over_pairs_however_they_are_batched(model, tmp_path):
    """The last step of the epoch has one batch of four pairs and one of two, or batches of one."""
    logs = []
    for batch_size, accumulation in ((6, 1), (4, 2), (1, 6)):
        opened = open_orpo(
            model,
            tmp_path,
            *("--per_device_train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation),
            *("--logging_steps", 1, "--num_train_epochs", 1, "--validation_file_dir", tmp_path / "data"),
            *("--allow_overlap", "True", "--eval_strategy", "epoch"),
        )
        expected = plain_values(opened.trainer)
        opened.trainer.train()
        before, step, after, _ = opened.trainer.state.log_history
        assert step["loss"] == pytest.approx(np.mean(expected["loss"]), rel=1e-5)
        assert step["log_odds_ratio"] == pytest.approx(np.mean(expected["log_odds_ratio"]), rel=1e-4, abs=1e-5)
        assert step["nll_loss"] == pytest.approx(-step["logps/chosen"], rel=1e-6)
        assert step["margin"] == pytest.approx(step["logps/chosen"] - step["logps/rejected"], abs=1e-5)
        assert step["num_tokens"] == sum(
            2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
            for row in opened.trainer.train_dataset
        )
        names = ("loss", "nll_loss", "log_odds_ratio", "accuracy", "margin", "logps/chosen", "logps/rejected")
        # Held out are the training rows, so that the evaluation before the first step finds what that step finds.
        assert {name: before[f"eval_{name}"] for name in names} == pytest.approx(
            {name: step[name] for name in names}, rel=1e-4, abs=1e-5
        )
        assert after["eval_loss"] < before["eval_loss"]
        logs.append({name: step[name] for name in (*names, "grad_norm")})
    assert logs[1] == pytest.approx(logs[0], rel=1e-4, abs=1e-5)
    assert logs[2] == pytest.approx(logs[0], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("more", [(), ("--load_in_4bit", "True", "--qlora", "True")])
def test_rows_that_are_too_long_are_counted_and_the_loss_stays_finite(model, tmp_path, more):
    """Cut to this length, two of these rows would keep no token of an answer, and a mean over none is not a number."""
    long = [
        {"prompt": "p" * 200, "chosen": "y", "rejected": "n"},
        {"prompt": "?", "chosen": "y" * 200, "rejected": "n"},
    ]
    opened = open_orpo(
        model,
        tmp_path,
        *("--model_max_length", 140, "--skip_long_rows", "True", "--num_train_epochs", 3, "--logging_steps", 1),
        *("--per_device_train_batch_size", 2, "--learning_rate", 1e-2, *more),
        rows=[*long, *ROWS, *long],
    )
    opened.finish()
    losses = [event["loss"] for event in read_json(tmp_path / "out" / "metrics.jsonl") if "loss" in event]
    assert len(losses) == 9 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    (entry,) = read_json(tmp_path / "out" / "run.json")["data"]
    assert (entry["rows"], entry["used"], entry["left_out"]) == (10, 6, {"too long": 4})


def test_held_out_pairs_are_told_apart_after_training(model, tmp_path):
    rows = [{"prompt": f"Question {n}?", "chosen": "Rest.", "rejected": "Panic!"} for n in range(16)]
    opened = open_orpo(
        model,
        tmp_path,
        *("--validation_split_percentage", 25, "--use_peft", "False", "--learning_rate", 3e-3, "--num_train_epochs", 6),
        *("--per_device_train_batch_size", 4, "--eval_strategy", "epoch"),
        rows=rows,
    )
    opened.finish()
    held_out = [event for event in read_json(tmp_path / "out" / "metrics.jsonl") if "eval_loss" in event]
    assert held_out[-1]["eval_accuracy"] == 1
    assert held_out[-1]["eval_log_odds_ratio"] > held_out[0]["eval_log_odds_ratio"] + 2
    assert held_out[-1]["eval_nll_loss"] < held_out[0]["eval_nll_loss"] / 2


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def test_as_a_person_starts_it(model, tmp_path):
    done = run_program(
        "orpo_training.py",
        *flags(model, tmp_path, "--num_train_epochs", 1, "--logging_steps", 1, "--sample_prompts", 2),
        *("--eval_strategy", "epoch", "--validation_split_percentage", 20),
    )
    out = tmp_path / "out"
    for name in ("adapter_model.safetensors", "chat_template.jinja", "run.json", "loss.png", "README.md"):
        assert (out / name).stat().st_size > 0
    assert len(read_json(out / "samples.jsonl")) == 1
    assert read_json(out / "run.json")["status"] == "finished"
    assert stop_tokens(out) == [TURN_END, END_OF_TEXT]
    assert "held out" in done.stderr + done.stdout


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(model, tmp_path):
    """One step of SGD at rate 1 writes the gradient into the weights."""
    from safetensors.torch import load_file

    common = [
        *("--use_peft", "False", "--optim", "sgd", "--learning_rate", 1, "--lr_scheduler_type", "constant"),
        *("--max_grad_norm", 0, "--max_steps", 1, "--logging_steps", 1),
    ]
    opened = open_orpo(model, tmp_path / "here", *common, "--per_device_train_batch_size", 4, rows=ROWS[:4])
    trainer = opened.trainer
    loss = trainer.compute_loss(trainer.model, collate(trainer))
    loss.backward()
    expected = gradients(trainer.model)
    divided = ("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2)
    run_program("orpo_training.py", *flags(model, tmp_path, *common, *divided, rows=ROWS[:4]), processes=2)
    before, after = load_file(f"{model}/model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    (event,) = [event for event in read_json(tmp_path / "out" / "metrics.jsonl") if "loss" in event]
    assert event["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert event["num_tokens"] == collate(trainer)["attention_mask"].sum()
    for name, weight in before.items():
        gradient = expected[name]
        assert (weight - after[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max() + 2e-7, name
