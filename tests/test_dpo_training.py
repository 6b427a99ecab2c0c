"""dpo_training.py as a user runs it: what it leaves, what its flags do, what it refuses."""

import json
import math
from pathlib import Path

from dpo_training import LOSSES, PreferenceArguments, check_flags
from medicalgpt.errors import UserError
from medicalgpt.parser import parse_args
from tests.helpers import open_stage, read_json, run_here, run_program, save_model, stop_tokens, write_jsonl
from tests.silent.pairs import open_pairs, pair, pairs, shake, trl_dpo
from tests.tiny import END_OF_TEXT, TURN_END, make_tiny, tiny_tokenizer

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SCRIPT = "dpo_training.py"
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look up a drug.",
        "parameters": {"type": "object", "properties": {"drug": {"type": "string"}}},
    },
}
DOSE = {"from": "human", "value": "布洛芬一天最多吃多少？"}


def call(drug: str) -> list[dict]:
    return [{"from": "function_call", "value": json.dumps({"name": "look_up", "arguments": {"drug": drug}})}]


# A tool called against a guess and against a call with other arguments; a result of a tool; system and history.
SHAPES = [
    {"conversations": [DOSE], "tools": [TOOL], "chosen": call("布洛芬"), "rejected": "一天吃多少都可以。"},
    {"conversations": [DOSE], "tools": [TOOL], "chosen": call("布洛芬"), "rejected": call("阿司匹林")},
    {
        "conversations": [DOSE, *call("布洛芬"), {"from": "observation", "value": "1.2 g"}],
        "tools": [TOOL],
        "chosen": "说明书写的是 1.2 g，请遵医嘱。",
        "rejected": "不知道。",
    },
    {
        "system": "回答要短。",
        "conversations": [DOSE, {"from": "gpt", "value": "看说明书。"}, {"from": "human", "value": "儿童呢？"}],
        "chosen": "按体重，问医生。",
        "rejected": "和大人一样，随便吃。",
    },
]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A model, another one that the first can be measured from, and data with held-out rows."""
    folder = tmp_path_factory.mktemp("dpo")
    make_tiny(folder / "model", max_position_embeddings=1024)
    make_tiny(folder / "other", max_position_embeddings=1024, seed=1)
    write_jsonl(folder / "data" / "train.jsonl", [*pairs(12), *SHAPES])
    write_jsonl(folder / "data" / "validation.jsonl", pairs(7, start=100))
    return folder


def flags(work: Path, output: Path, *more) -> list:
    return [
        *("--model_name_or_path", work / "model", "--train_file_dir", work / "data", "--output_dir", output),
        *("--logging_steps", 1, "--dataloader_pin_memory", "False", *more),
    ]


def logged(folder: Path, name: str) -> list[float]:
    return [row[name] for row in read_json(folder / "metrics.jsonl") if name in row]


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(work, tmp_path_factory) -> Path:
    """One process, as a user starts it."""
    folder = tmp_path_factory.mktemp("alone")
    options = ("--per_device_train_batch_size", 4, "--max_steps", 4, "--learning_rate", 0.01, "--sample_prompts", 1)
    run_program(SCRIPT, *flags(work, folder, *options, "--eval_strategy", "steps", "--eval_steps", 2))
    return folder


def test_a_run_leaves_what_the_next_step_needs(work, alone):
    files = {"adapter_model.safetensors", "chat_template.jinja", "generation_config.json", "loss.png", "README.md"}
    assert files | {"run.json", "metrics.jsonl", "samples.jsonl"} <= {path.name for path in alone.iterdir()}
    record = read_json(alone / "run.json")
    assert (record["stage"], record["status"]) == ("dpo_training", "finished")
    assert stop_tokens(alone) == [TURN_END, END_OF_TEXT]
    assert record["plan"]["sequences"] == 16 and record["arguments"]["loss_type"] == ["sigmoid"]
    assert all(line["agrees"] is not False for line in record["observed"])
    assert logged(alone, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(alone, "rewards/margins")[-1] > 0.1
    # Before training nothing is preferred on the held-out rows either.
    assert logged(alone, "eval_loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(logged(alone, "eval_rewards/margins")) == 4
    run_here("merge_peft_adapter.py", "--lora_model", alone, "--output_dir", alone / "merged")
    assert (alone / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_do_what_one_does(work, alone, tmp_path):
    """Same pairs a step, and seven held-out pairs, which two processes cannot share evenly."""
    options = ("--per_device_train_batch_size", 2, "--max_steps", 4, "--learning_rate", 0.01, "--sample_prompts", 0)
    options += ("--eval_strategy", "steps", "--eval_steps", 2, "--per_device_eval_batch_size", 2)
    run_program(SCRIPT, *flags(work, tmp_path, *options), processes=2)
    assert read_json(tmp_path / "run.json")["processes"] == 2
    for name in ("loss", "rewards/chosen", "rewards/margins", "num_tokens", "eval_loss", "eval_rewards/chosen"):
        assert logged(tmp_path, name) == pytest.approx(logged(alone, name), rel=1e-3, abs=1e-5), name
    for name in ("eval_entropy", "eval_mean_token_accuracy", "eval_logits/rejected", "eval_rewards/accuracies"):
        assert logged(tmp_path, name) == pytest.approx(logged(alone, name), rel=1e-3, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("start", ["adapter", "all weights", "all weights, computed beforehand"])
def test_zero_2(work, alone, tmp_path, start):
    more = ["--max_steps", 2, "--per_device_train_batch_size", 2, "--sample_prompts", 0, "--deepspeed", "zero2.json"]
    more += ["--eval_strategy", "no", "--learning_rate", 0.01]
    more += ["--model_name_or_path", alone] if start == "adapter" else ["--use_peft", "False"]
    more += ["--precompute_ref_log_probs", "True"] if "beforehand" in start else []
    run_program(SCRIPT, *flags(work, tmp_path, *more), processes=2, timeout=400)
    losses = logged(tmp_path, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[1] < 0.69


def test_calls_of_tools_are_answers(work, tmp_path):
    run = open_pairs(SCRIPT, work / "model", tmp_path, SHAPES, "--learning_rate", 0.02, "--max_steps", 3)
    decode = run.tokenizer.decode
    rows = run.trainer.train_dataset
    assert ['"布洛芬"' in decode(row["chosen_ids"]) for row in rows] == [True, True, False, False]
    assert '"阿司匹林"' in decode(rows[1]["rejected_ids"]) and "1.2 g" in decode(rows[2]["prompt_ids"])
    assert "回答要短。" in decode(rows[3]["prompt_ids"]) and "看说明书。" in decode(rows[3]["prompt_ids"])
    run.trainer.train()
    batch = run.trainer._prepare_inputs(next(iter(run.trainer.get_train_dataloader())))
    run.trainer.model.eval()
    with torch.no_grad():
        margins = run.trainer.pair_values(run.trainer.model, batch)["rewards/margins"]
    assert len(margins) == 4 and (margins > 0).all()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "aot", "sft"])
def test_the_evaluation_does_not_depend_on_the_batch_size(work, tmp_path, loss):
    run = open_stage(
        SCRIPT,
        *flags(work, tmp_path, "--eval_strategy", "epoch", "--loss_type", loss, "--reference_model", work / "other"),
    )
    run.trainer.model.eval()
    found = []
    for size in (1, 3, 7):
        run.trainer.args.per_device_eval_batch_size = size
        metrics = run.trainer.evaluate()
        found.append({name: value for name, value in metrics.items() if not name.endswith(("runtime", "second"))})
    assert len(found[0]) >= 12 and found[0]["eval_loss"] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    assert found[2] == pytest.approx(found[0], rel=1e-4, abs=1e-6)


def test_routers_of_experts_keep_their_own_loss(tmp_path):
    """It is logged and added in training, and left out where pairs are measured one by one."""
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 8}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), **sizes, **shape, **experts)).save_pretrained(
        tmp_path / "moe"
    )
    tokenizer.save_pretrained(tmp_path / "moe")
    write_jsonl(tmp_path / "data" / "validation.jsonl", pairs(5, start=100))
    options = ("--router_aux_loss_coef", 0.5, "--max_steps", 1, "--logging_steps", 1, "--eval_strategy", "steps")
    trainer = open_pairs(SCRIPT, tmp_path / "moe", tmp_path, pairs(4), *options).trainer
    trainer.train()
    first = next(log for log in trainer.state.log_history if "loss" in log)
    assert first["aux_loss"] > 0 and first["loss"] == pytest.approx(math.log(2) + 0.5 * first["aux_loss"], abs=1e-5)
    trainer.args.per_device_eval_batch_size = 2
    last = [log for log in trainer.state.log_history if "eval_loss" in log][-1]
    assert "eval_aux_loss" not in last
    assert trainer.evaluate()["eval_loss"] == pytest.approx(last["eval_loss"], abs=1e-6)


# --- flags -----------------------------------------------------------------------------------------------------------

WHAT_FLAGS_CHANGE = [
    ["--beta", "0.5"],
    *(["--loss_type", loss] for loss in LOSSES if loss not in ("sigmoid", "robust", "exo_pair")),
    ["--loss_type", "robust", "--label_smoothing", "0.1"],
    ["--loss_type", "robust", "--label_smoothing", "0.2"],
    ["--loss_type", "exo_pair", "--label_smoothing", "0.1"],
    ["--loss_type", "aot", "--label_smoothing", "0.1"],
    ["--loss_type", "sigmoid", "sft"],
    ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.2"],
    ["--loss_type", "discopop", "--discopop_tau", "5"],
    ["--f_divergence_type", "forward_kl"],
    ["--f_divergence_type", "js_divergence"],
    ["--f_divergence_type", "alpha_divergence"],
    ["--f_divergence_type", "alpha_divergence", "--f_alpha_divergence_coef", "0.2"],
    ["--ld_alpha", "0.5"],
    ["--use_weighting", "True"],
    ["--reference_model", "model"],
]


def test_each_flag_changes_the_loss(work, tmp_path):
    """The loss of the first batch, measured from another model, so that there is something to change."""
    # Alike in length, so that both models put the pairs into another order, which is all that `aot` sees.
    rows = [{"prompt": f"Question {n}?", "chosen": f"{n**9 % 991}", "rejected": f"{n**7 % 997}"} for n in range(2, 12)]
    losses = {}
    for number, more in enumerate([[], *WHAT_FLAGS_CHANGE]):
        more = [work / word if word == "model" else word for word in more]
        more = more if "--reference_model" in more else [*more, "--reference_model", work / "other"]
        trainer = open_pairs(SCRIPT, work / "model", tmp_path / str(number), rows, *more).trainer
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.model.train()
        losses[round(trainer.compute_loss(trainer.model, batch).item(), 6)] = more
    assert len(losses) == 1 + len(WHAT_FLAGS_CHANGE)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--use_weighting", "True"],
        ["--ld_alpha", "0.3", "--loss_type", "sigmoid", "bco_pair", "sft", "--loss_weights", "0.8", "0.2", "1"],
    ],
    ids=["alone", "weighted", "several losses"],
)
def test_loss_gradient_and_metrics_of_a_pair_are_those_of_trl(work, tmp_path, more):
    trainer = open_pairs(SCRIPT, work / "model", tmp_path, [pair(1, 5, 9)], "--beta", 0.3, *more).trainer
    shake(trainer.model)
    batch = trainer.data_collator(list(trainer.train_dataset))
    reference = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), trainer.reference_log_probs(batch), strict=True))
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    loss, wanted = trl_dpo(trainer.args, trainer.model, batch | {name: each[None] for name, each in reference.items()})
    expected = torch.autograd.grad(loss, trained)
    trainer.model.train()
    values = trainer.pair_values(trainer.model, batch)
    found = torch.autograd.grad(values["loss"], trained)
    metrics = {name: column.item() for name, column in values.items()}
    assert metrics.pop("loss") == pytest.approx(loss.item(), rel=1e-5)
    del wanted["num_tokens"]
    # A reward is a difference of sums of log-probabilities, which are rounded differently on every processor.
    assert metrics == pytest.approx(wanted, rel=1e-5, abs=5e-6) and len(metrics) == 10
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-6)


def test_the_batch_is_padded_to_a_multiple(work, tmp_path):
    trainer = open_pairs(SCRIPT, work / "model", tmp_path, pairs(4), "--pad_to_multiple_of", 64).trainer
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] % 64 == 0


def test_the_reference_follows_where_that_is_asked_for(work, tmp_path):
    options = ("--use_peft", "False", "--sync_ref_model", "True", "--max_steps", 2, "--learning_rate", 0.01)
    share = ("--ref_model_sync_steps", 2, "--ref_model_mixup_alpha", 0.25)
    trainer = open_pairs(SCRIPT, work / "model", tmp_path, pairs(4), *options, *share).trainer
    start = {name: weight.clone() for name, weight in trainer.ref_model.named_parameters()}
    trainer.train()
    moved = dict(trainer.model.named_parameters())
    for name, weight in trainer.ref_model.named_parameters():
        assert torch.allclose(weight, 0.75 * start[name] + 0.25 * moved[name], atol=1e-6)
    assert not torch.equal(weight, start[name])
    late = open_pairs(SCRIPT, work / "model", tmp_path, pairs(4), *options, "--ref_model_sync_steps", 3).trainer
    with pytest.raises(UserError, match="the run has 2 steps"):
        late.train()


REFUSED = [
    (["--label_smoothing", "0.1"], "no effect here: it is for --loss_type aot, aot_unpaired, exo_pair, robust"),
    (["--loss_type", "robust"], "needs --label_smoothing"),
    (["--loss_type", "exo_pair"], "needs --label_smoothing"),
    (["--loss_type", "robust", "--label_smoothing", "0.5"], "must be at least 0 and below 0.5"),
    (["--loss_type", "sft", "--beta", "0.2"], "--beta has no effect here"),
    (["--loss_type", "sft", "--ld_alpha", "0.2"], "--ld_alpha has no effect here"),
    (["--ld_alpha", "1.5"], "must be between 0 and 1"),
    (["--beta", "0"], "must be above 0"),
    (["--discopop_tau", "1"], "it is for --loss_type discopop"),
    (["--loss_type", "apo_zero", "--f_divergence_type", "forward_kl"], "--f_divergence_type has no effect here"),
    (["--loss_type", "sigmoid", "apo_zero", "--f_divergence_type", "forward_kl"], "is not defined for apo_zero"),
    (["--f_alpha_divergence_coef", "0.2"], "it is for --f_divergence_type alpha_divergence"),
    (["--precompute_ref_batch_size", "2"], "it is for --precompute_ref_log_probs"),
    (["--ref_model_sync_steps", "2"], "it is for --sync_ref_model"),
    (["--ref_model_mixup_alpha", "0.2"], "it is for --sync_ref_model"),
    (["--sync_ref_model", "True"], "add --use_peft False"),
    (["--loss_type", "aot", "--use_weighting", "True"], "takes apart"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else None)
def test_flags_without_effect_are_refused(more, message):
    (args,) = parse_args(PreferenceArguments, argv=more)
    with pytest.raises(UserError, match=message):
        check_flags(args, use_peft=True)


@pytest.mark.parametrize("more", [["--precompute_ref_log_probs", "True"], ["--resume_from_checkpoint", "True"]])
def test_a_moving_reference_goes_with_few_flags(more):
    (args,) = parse_args(PreferenceArguments, argv=["--sync_ref_model", "True", *more])
    with pytest.raises(UserError, match=more[0]):
        check_flags(args, use_peft=False)


def test_fsdp_would_load_another_reference(monkeypatch):
    (args,) = parse_args(PreferenceArguments, argv=["--precompute_ref_log_probs", "True"])
    check_flags(args, use_peft=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_flags(args, use_peft=True)
    with pytest.raises(UserError, match="cannot be combined with FSDP"):
        check_flags(args, use_peft=False)


@pytest.mark.parametrize("loss", ["simpo", "kto_pair"])
def test_an_unknown_loss_is_answered_with_those_there_are(loss, capsys):
    with pytest.raises(SystemExit):
        parse_args(PreferenceArguments, argv=["--loss_type", loss])
    printed = capsys.readouterr().err
    assert loss in printed and all(known in printed for known in LOSSES)


def test_a_reference_that_reads_other_tokens_is_refused(work, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["感冒"])
    other = save_model(tmp_path / "extended", tokenizer)
    more = ("--reference_model", work / "other")
    with pytest.raises(UserError, match=r"has another vocabulary than the model \(1 differing tokens, such as '感冒'"):
        open_pairs(SCRIPT, other, tmp_path, pairs(2), *more)
    open_pairs(SCRIPT, work / "model", tmp_path, pairs(2), "--reference_model", other)


def test_an_adapter_as_reference_of_a_quantized_model_is_refused(work, alone, tmp_path):
    more = ("--reference_model", alone, "--qlora", "True")
    with pytest.raises(UserError, match="cannot be merged into a quantized base"):
        open_pairs(SCRIPT, work / "model", tmp_path, [pair(1)], *more)
