"""reward_modeling.py: its loss and measures, what it starts from, what it trains, and its scoring mode."""

from medicalgpt.errors import UserError
from medicalgpt.models.hub import CheckpointError
from medicalgpt.rewards.scoring import RewardScorer
from tests.families import EACH, Followed, make_family
from tests.helpers import ROOT, open_stage, read_json, run_here, run_program, save_model, stop_tokens, write_jsonl
from tests.tiny import END_OF_TEXT, TURN_END, make_tiny, tiny_tokenizer

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    GraniteConfig,
    GraniteForCausalLM,
)

STAGE = "reward_modeling.py"
PAIRS = [{"prompt": f"Why {n}?", "chosen": "Rest. " * n, "rejected": "A cold, " * (6 - n)} for n in (1, 2, 3, 4, 5)]


def chats(pairs=PAIRS):
    return [
        [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[name]}]
        for pair in pairs
        for name in ("chosen", "rejected")
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("base") / "base", tiny_tokenizer())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_jsonl(root / "train.jsonl", PAIRS)
    write_jsonl(root / "validation.jsonl", [{**pair, "prompt": "And " + pair["prompt"]} for pair in PAIRS])
    return root


def flags(model, data, out, *more):
    return [
        *("--model_name_or_path", model, "--train_file_dir", data, "--output_dir", out, "--max_steps", 2),
        *("--learning_rate", 1e-2, "--save_strategy", "no", "--max_grad_norm", 0, *more),
    ]


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    """An adapter as the program leaves it, and the scores that it gave before the program ended."""
    out = tmp_path_factory.mktemp("trained") / "rm"
    opened = open_stage(STAGE, *flags(base, data, out))
    opened.finish()
    return out, RewardScorer(opened.trainer.model, opened.tokenizer).score(chats())


# --- loss and measures -----------------------------------------------------------------------------------------------


def oracle(scores, coefficient):
    """Bradley-Terry on (chosen, rejected) scores, with the term that draws their sum to 0."""
    chosen, rejected = np.array(scores[::2]), np.array(scores[1::2])
    loss = np.log1p(np.exp(rejected - chosen)) + (coefficient or 0.0) * (chosen + rejected) ** 2
    return {
        "loss": loss.mean(),
        "accuracy": (chosen > rejected).mean(),
        "margin": (chosen - rejected).mean(),
        "mean_reward": (chosen + rejected).mean() / 2,
        "chosen_reward": chosen.mean(),
        "rejected_reward": rejected.mean(),
    }


@pytest.mark.parametrize("coefficient", [None, 0.3])
def test_loss_and_measures_against_numpy_whatever_the_batch(base, data, tmp_path, coefficient):
    more = () if coefficient is None else ("--center_rewards_coefficient", coefficient)
    opened = open_stage(STAGE, *flags(base, data, tmp_path / "out", *more))
    trainer, scorer = opened.trainer, RewardScorer(opened.trainer.model, opened.tokenizer)
    for parameter in trainer.model.get_base_model().score.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    wanted = oracle(scorer.score(chats(), batch_size=1), coefficient)
    assert wanted["margin"] != 0 and 0 < abs(wanted["mean_reward"])
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[n] for n in range(len(PAIRS))]))
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(wanted["loss"], abs=1e-5)
    held_out = oracle(scorer.score(chats(read_json(data / "validation.jsonl")), batch_size=1), coefficient)
    for size in (1, 2, 5):
        trainer.args.per_device_eval_batch_size = size
        found = trainer.evaluate()
        for name, value in held_out.items():
            assert found[f"eval_{name}"] == pytest.approx(value, abs=1e-5), (name, size)


def test_training_raises_the_chosen_answers_above_the_rejected(base, data, tmp_path):
    opened = open_stage(STAGE, *flags(base, data, tmp_path / "out", "--num_train_epochs", 8, "--max_steps", -1))
    metrics = opened.finish()
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_margin"] > 1
    assert metrics["eval_chosen_reward"] - metrics["eval_rejected_reward"] == pytest.approx(metrics["eval_margin"])
    assert metrics["eval_loss"] < 0.3
    samples = read_json(tmp_path / "out" / "samples.jsonl")
    assert len(samples) == 3 and all(row["after"].endswith(": right") for row in samples)
    assert (
        samples[0]["prompt"].startswith("<|im_start|>user\nAnd Why 1?") and samples[0]["chosen"] == "Rest. " + TURN_END
    )
    assert samples[0]["before"] != samples[0]["after"]


# --- what is trained and saved ---------------------------------------------------------------------------------------


def test_the_ends_of_answers_are_recorded(trained):
    assert stop_tokens(trained[0]) == [TURN_END, END_OF_TEXT]


@pytest.mark.parametrize(
    "more", [("--load_in_4bit", "True"), ("--qlora", "True"), ("--load_in_8bit", "True")], ids=lambda more: more[0]
)
def test_the_head_of_a_quantized_base_is_float32_and_trained(data, tmp_path, more):
    base = make_tiny(tmp_path / "base")
    opened = open_stage(STAGE, *flags(base, data, tmp_path / "out", *more))
    model = opened.trainer.model
    head = model.get_base_model().score
    assert type(head.original_module) is type(head.modules_to_save["default"]) is torch.nn.Linear
    assert head.modules_to_save["default"].weight.dtype == torch.float32
    followed = Followed(model)
    opened.finish()
    assert followed.moved() == followed.declared
    assert any("score" in name for name in followed.declared)
    table = {line["name"]: line for line in read_json(tmp_path / "out" / "run.json")["observed"]}
    assert all(line["agrees"] is not False for line in table.values())
    assert "in 14 of 14 linear layers" in table["quantization"]["observed"]
    live = RewardScorer(model, opened.tokenizer).score(chats())
    found = RewardScorer.from_pretrained(
        str(tmp_path / "out"), load_in_4bit="8bit" not in more[0], load_in_8bit="8bit" in more[0]
    )
    # For inference bitsandbytes computes 4-bit products in bfloat16 on some CPUs.
    assert found.score(chats()) == pytest.approx(live, abs=1e-4 if "8bit" in more[0] else 5e-2)


IN_BFLOAT16 = {
    "base": ("--dtype", "bfloat16"),
    "autocast": ("--bf16", "True"),
    "autocast, all weights": ("--bf16", "True", "--use_peft", "False"),
}


@pytest.mark.parametrize("case", IN_BFLOAT16)
def test_scores_are_float32_where_all_else_is_bfloat16(base, data, tmp_path, case):
    """In training, in the evaluation and when scored: what is read from the last hidden state is not rounded."""
    opened = open_stage(STAGE, *flags(base, data, tmp_path / "out", *IN_BFLOAT16[case]))
    trainer, ends, types = opened.trainer, [], set()
    model = trainer.model
    causal = model.get_base_model() if "all weights" not in case else model
    head = causal.score.modules_to_save["default"] if "all weights" not in case else causal.score
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))

    def note(module, args, kwargs, output):
        last = kwargs["attention_mask"].sum(dim=1) - 1
        ends.append(output.last_hidden_state[torch.arange(len(last)), last].detach())

    causal.model.register_forward_hook(note, with_kwargs=True)
    causal.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, inputs, output: types.add(output.dtype))
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[n] for n in range(len(PAIRS))]))
    model.train()
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(model, dict(batch))
    model.eval()
    with trainer.accelerator.autocast():
        values = trainer.pair_values(model, dict(batch))
    for hidden in ends:
        scores = hidden.float() @ head.weight[0].detach()
        assert (scores - scores.bfloat16()).abs().max() > 1e-3
        chosen, rejected = scores.chunk(2)
        assert loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(chosen - rejected).mean().item(), abs=1e-5)
        for name, expected in (("chosen_reward", chosen), ("rejected_reward", rejected), ("margin", chosen - rejected)):
            assert values[name].dtype == torch.float32
            assert values[name].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(ends) == 2 and types == {torch.bfloat16}
    if case == "base":
        ends.clear()
        live = RewardScorer(model, opened.tokenizer).score(chats(), batch_size=1)
        by_hand = {round((hidden.float() @ head.weight[0]).item(), 4) for hidden in ends}
        assert by_hand == {round(score, 4) for score in live} and len(by_hand) == len(live)
        trainer.save_model()
        saved = RewardScorer.from_pretrained(str(tmp_path / "out"), dtype="bfloat16")
        assert saved.score(chats(), batch_size=1) == pytest.approx(live, abs=1e-5)


def test_a_head_goes_on_as_it_was_on_a_base_in_bfloat16(base, data, trained, tmp_path):
    """peft would round it to the type of the base."""
    adapter, _ = trained
    wanted = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert not torch.equal(wanted, wanted.bfloat16().float())
    for start in ((adapter, ()), (base, ("--peft_path", adapter))):
        opened = open_stage(STAGE, *flags(start[0], data, tmp_path / "out", "--dtype", "bfloat16", *start[1]))
        model = opened.trainer.model.get_base_model()
        assert model.model.norm.weight.dtype == torch.bfloat16
        assert torch.equal(model.score.modules_to_save["default"].weight, wanted)


def test_all_weights_are_trained_and_saved_with_the_head(base, data, tmp_path):
    opened = open_stage(STAGE, *flags(base, data, tmp_path / "out", "--use_peft", "False"))
    followed = Followed(opened.trainer.model)
    opened.finish()
    assert followed.moved() == followed.declared == set(followed.parameters)
    assert "score.weight" in load_file(tmp_path / "out" / "model.safetensors")
    live = RewardScorer(opened.trainer.model, opened.tokenizer).score(chats())
    assert RewardScorer.from_pretrained(str(tmp_path / "out")).score(chats()) == pytest.approx(live, abs=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens_are_trained_saved_and_merged(data, tmp_path, tied):
    base = save_model(tmp_path / "base", tiny_tokenizer(), tied=tied)
    extended = tiny_tokenizer()
    extended.add_tokens(["Rest", "cold"])
    extended.save_pretrained(tmp_path / "extended")
    more = ("--tokenizer_name_or_path", tmp_path / "extended")
    opened = open_stage(STAGE, *flags(base, data, tmp_path / "out", *more))
    followed = Followed(opened.trainer.model)
    opened.finish()
    assert any("trainable_tokens_delta" in name for name in followed.moved())
    live = RewardScorer(opened.trainer.model, opened.tokenizer).score(chats())
    assert RewardScorer.from_pretrained(str(tmp_path / "out")).score(chats()) == pytest.approx(live, abs=1e-5)
    run_here("merge_peft_adapter.py", "--lora_model", tmp_path / "out", "--output_dir", tmp_path / "merged")
    assert RewardScorer.from_pretrained(str(tmp_path / "merged")).score(chats()) == pytest.approx(live, abs=1e-5)


# transformers has no class with a scoring head for these.
UNSCORED = ("cohere2", "ernie4_5", "glm4_moe", "glm4_moe_lite", "granite", "lfm2", "llama4_text", "minimax_m2")
# Its class drops out of the residuals by itself, which nothing can turn off.
DROPS_OUT = "seed_oss"


@pytest.mark.parametrize("name", EACH)
def test_every_family_is_trained_saved_and_scores_the_same(name, data, tmp_path):
    base = make_family(tmp_path / "base", name)
    if name in UNSCORED:
        with pytest.raises(UserError, match=f"is of type {name}, for which transformers has no model with a scoring"):
            open_stage(STAGE, *flags(base, data, tmp_path / "out"))
        return
    more = ["--disable_dropout", "False"] if name == DROPS_OUT else []
    opened = open_stage(STAGE, *flags(base, data, tmp_path / "out", "--sample_prompts", 0, *more))
    followed = Followed(opened.trainer.model)
    opened.finish()
    assert followed.moved() == followed.declared and any("score" in moved for moved in followed.moved())
    live = RewardScorer(opened.trainer.model, opened.tokenizer).score(chats(), batch_size=1)
    saved = RewardScorer.from_pretrained(str(tmp_path / "out"))
    assert saved.score(chats(), batch_size=4) == pytest.approx(live, abs=1e-4)


# --- what it starts from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--peft_path"])
def test_the_adapter_of_a_reward_model_goes_on(base, data, trained, tmp_path, flag):
    adapter, scores = trained
    start = (adapter, ()) if flag == "--model_name_or_path" else (base, ("--peft_path", adapter))
    opened = open_stage(STAGE, *flags(start[0], data, tmp_path / "out", *start[1]))
    assert RewardScorer(opened.trainer.model, opened.tokenizer).score(chats()) == pytest.approx(scores, abs=1e-5)
    followed = Followed(opened.trainer.model)
    opened.finish()
    assert any("score.modules_to_save" in name for name in followed.moved())


@pytest.mark.parametrize("more", [(), ("--use_peft", "False")], ids=["adapter", "whole"])
def test_a_merged_reward_model_keeps_its_head(data, trained, tmp_path, more):
    adapter, scores = trained
    run_here("merge_peft_adapter.py", "--lora_model", adapter, "--output_dir", tmp_path / "merged")
    opened = open_stage(STAGE, *flags(tmp_path / "merged", data, tmp_path / "out", *more))
    assert RewardScorer(opened.trainer.model, opened.tokenizer).score(chats()) == pytest.approx(scores, abs=1e-5)


def test_the_adapter_of_a_language_model_is_refused(base, data, tmp_path):
    write_jsonl(tmp_path / "chats" / "rows.jsonl", [{"prompt": "Why?", "response": "A cold."}])
    sft = tmp_path / "sft"
    run_here("supervised_finetuning.py", *flags(base, tmp_path / "chats", sft, "--sample_prompts", 0))
    remedy = f"python merge_peft_adapter.py --lora_model {sft} --output_dir {sft}-merged"
    for model, more in ((sft, ()), (base, ("--peft_path", sft))):
        with pytest.raises(UserError, match="is an adapter of a language model") as caught:
            run_here(STAGE, *flags(model, data, tmp_path / "out", *more))
        assert remedy in str(caught.value)
    with pytest.raises(CheckpointError, match="is an adapter of a language model, without a scoring head"):
        RewardScorer.from_pretrained(str(sft))


def test_a_head_for_classes_is_refused(base, data, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(tmp_path / "classes")
    tiny_tokenizer().save_pretrained(tmp_path / "classes")
    with pytest.raises(CheckpointError, match="a head with 3 outputs: it is a classifier"):
        run_here(STAGE, *flags(tmp_path / "classes", data, tmp_path / "out"))


def test_a_family_without_a_model_that_scores_is_refused(data, tmp_path):
    tokenizer = tiny_tokenizer()
    GraniteForCausalLM(
        GraniteConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    ).save_pretrained(tmp_path / "granite")
    tokenizer.save_pretrained(tmp_path / "granite")
    with pytest.raises(UserError, match="of type granite, for which transformers has no model with a scoring head"):
        run_here(STAGE, *flags(tmp_path / "granite", data, tmp_path / "out"))


# --- around the training ---------------------------------------------------------------------------------------------


def test_the_card_names_commands_for_a_reward_model(trained):
    adapter, _ = trained
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert f"python merge_peft_adapter.py --lora_model {adapter} --output_dir {adapter}-merged" in card
    assert f"reward_modeling.py --model_name_or_path {adapter} --score_file data/reward/validation.jsonl" in card
    assert "inference.py" not in card and "eval_accuracy" in card


def test_as_a_user_train_then_score(base, data, trained, tmp_path):
    """The same head and scores as in this process: nothing depends on what ran before."""
    out = tmp_path / "rm"
    done = run_program(STAGE, *flags(base, data, out))
    assert "a new head with random weights" in done.stderr and "LOAD REPORT" not in done.stderr
    assert f"next: python reward_modeling.py --model_name_or_path {out}" in done.stderr
    asked = ("--model_name_or_path", out, "--score_file", data / "train.jsonl", "--output_file", tmp_path / "s.jsonl")
    done = run_program(STAGE, *asked, "--per_device_eval_batch_size", 2)
    assert "5 rows, scored 5, skipped: none" in done.stderr and "accuracy" in done.stderr
    rows = read_json(tmp_path / "s.jsonl")
    found = [row[name] for row in rows for name in ("chosen_score", "rejected_score")]
    assert found == pytest.approx(trained[1], abs=1e-4)


@pytest.mark.slow
def test_two_processes_train_one_model(base, data, trained, tmp_path):
    """Together they see the rows of one process with twice the batch."""
    batch = ("--per_device_train_batch_size", 1, "--train_sampling_strategy", "random", "--sample_prompts", 0)
    run_program(STAGE, *flags(base, data, tmp_path / "two", *batch), processes=2)
    batch = ("--per_device_train_batch_size", 2, *batch[2:])
    run_here(STAGE, *flags(base, data, tmp_path / "one", *batch))
    one, two = (RewardScorer.from_pretrained(str(tmp_path / name)).score(chats()) for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-3)
    metrics = [read_json(tmp_path / name / "run.json")["metrics"] for name in ("one", "two")]
    assert metrics[1]["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--use_peft", "False")], ids=["adapter", "whole"])
def test_zero_2_saves_the_head(base, data, tmp_path, more):
    out = tmp_path / "out"
    run_program(STAGE, *flags(base, data, out, "--deepspeed", ROOT / "zero2.json", *more), processes=2)
    record = read_json(out / "run.json")
    held_out = chats(read_json(data / "validation.jsonl"))
    scores = RewardScorer.from_pretrained(str(out)).score(held_out)
    assert record["metrics"]["eval_margin"] == pytest.approx(oracle(scores, None)["margin"], abs=1e-3)


# --- scoring mode ----------------------------------------------------------------------------------------------------


def test_pairs_and_conversations_are_scored_by_the_adapter(data, trained, tmp_path):
    adapter, scores = trained
    rows = [PAIRS[0], {"prompt": PAIRS[1]["prompt"], "response": PAIRS[1]["chosen"]}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    asked = ("--model_name_or_path", adapter, "--score_file", source, "--output_file", tmp_path / "out.jsonl")
    run_here(STAGE, *asked)
    first, second = read_json(tmp_path / "out.jsonl")
    assert [first["chosen_score"], first["rejected_score"], second["score"]] == pytest.approx(scores[:3], abs=1e-5)
    with pytest.raises(UserError, match="exists already"):
        run_here(STAGE, *asked)
    run_here(STAGE, *asked, "--overwrite_output_file", "True")


@pytest.mark.parametrize(
    "more, named",
    [
        (("--train_file_dir", "data/reward"), "--train_file_dir would have no effect with --score_file"),
        (("--learning_rate", 1e-4, "--lora_rank", 4), "--learning_rate, --lora_rank would have no effect"),
        (("--output_dir", "x"), "--output_dir would have no effect"),
        (("--system_prompt", "x"), "--system_prompt would have no effect"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else value.split()[0],
)
def test_flags_that_train_are_refused_when_scoring(trained, data, tmp_path, more, named):
    asked = ("--model_name_or_path", trained[0], "--score_file", data / "train.jsonl")
    with pytest.raises(UserError, match=named):
        run_here(STAGE, *asked, "--output_file", tmp_path / "out.jsonl", *more)
    assert not (tmp_path / "out.jsonl").exists()


def test_flags_of_scoring_are_refused_when_training(base, data, tmp_path):
    with pytest.raises(UserError, match="--output_file would have no effect without --score_file"):
        run_here(STAGE, *flags(base, data, tmp_path / "out", "--output_file", "x.jsonl"))


def test_several_processes_do_not_write_one_file(monkeypatch):
    import reward_modeling

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in a single process"):
        reward_modeling.score(None, None, None, 8, set())


def test_a_language_model_is_no_scorer(base, data, tmp_path):
    with pytest.raises(UserError, match="is a language model, without a scoring head. Train one"):
        run_here(
            STAGE,
            *("--model_name_or_path", base, "--score_file", data / "train.jsonl"),
            *("--output_file", tmp_path / "out.jsonl"),
        )


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_a_reward_model_is_not_taken_for_a_language_model(trained, tmp_path, merge):
    """Its head for words would be random numbers, and its answers noise."""
    model = trained[0]
    if merge:
        run_here("merge_peft_adapter.py", "--lora_model", model, "--output_dir", tmp_path / "merged")
        model = tmp_path / "merged"
    with pytest.raises(CheckpointError, match="scores texts and cannot generate any"):
        run_here("inference.py", "--model_name_or_path", model, "--query", "Why?")


@pytest.mark.parametrize("value", ["-1", "nan"])
def test_a_centering_that_would_push_scores_away_is_refused(base, data, tmp_path, value, capsys):
    with pytest.raises(SystemExit):
        run_here(STAGE, *flags(base, data, tmp_path / "out", "--center_rewards_coefficient", value))
    assert "must be 0 or more" in capsys.readouterr().err


def test_the_class_of_trl_that_hides_the_load_report_is_there(base, capfd):
    """Contract: within it, a new head is not reported."""
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    with suppress_seqcls_warning():
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    assert model.score.weight.abs().sum() > 0 and "MISSING" not in "".join(capfd.readouterr())
