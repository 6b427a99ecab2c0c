"""grpo_training.py as a user runs it: what it leaves, what its flags do, what it refuses; rewards have a test apart."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

from grpo_training import (
    LOSSES,
    GroupTrainer,
    GrpoArguments,
    PromptSampler,
    check_flags,
    resolve_rewards,
    zero_std_groups,
)
from medicalgpt.errors import UserError
from medicalgpt.models.loading import load_tokenizer
from medicalgpt.parser import parse_args
from medicalgpt.readers.problems import DataError
from medicalgpt.rewards.rewards import SYSTEM_PROMPT
from medicalgpt.rewards.scoring import RewardScorer, model_reward
from template import apply_template
from tests.helpers import open_stage, read_json, run_here, run_program, stop_tokens, write_jsonl
from tests.silent.pairs import shake
from tests.silent.tasks import STAGE, first_batches, noted, open_tasks, task_flags, tasks
from tests.tiny import END_OF_TEXT, TURN_END, make_tiny, tiny_tokenizer

import pandas as pd
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForSequenceClassification, Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

NAN = math.nan
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look up a drug.",
        "parameters": {"type": "object", "properties": {"drug": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A model, a reward model with another template, and data with held-out rows."""
    folder = tmp_path_factory.mktemp("grpo")
    make_tiny(folder / "model", max_position_embeddings=1024)
    tokenizer = tiny_tokenizer()
    apply_template(tokenizer, "vicuna")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5, "num_labels": 1}
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=200, **sizes, **heads
    )
    Qwen3ForSequenceClassification(config).save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    write_jsonl(folder / "data" / "train.jsonl", tasks(7, language="en"))
    write_jsonl(folder / "data" / "validation.jsonl", tasks(5, start=50))
    return folder


def logged(folder: Path, name: str) -> list[float]:
    return [row[name] for row in read_json(folder / "metrics.jsonl") if name in row]


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_next_step_needs(work, tmp_path):
    more = ("--train_file_dir", work / "data", "--max_steps", 4, "--learning_rate", 0.01, "--sample_prompts", 1)
    more += ("--eval_strategy", "steps", "--eval_steps", 2, "--system_prompt", "Think.", "--beta", 0.1)
    rewards = ("--reward_funcs", "noted", "accuracy", "--reward_weights", 2, 1, "--reward_model_path", work / "rm")
    flags, out = task_flags(work / "model", tmp_path, *more, *rewards), tmp_path / "out"
    with pytest.raises(UserError, match="2 numbers for 3 rewards. Give one for each of: noted, accuracy, reward_model"):
        run_here(STAGE, *flags)
    assert not out.exists()
    done = run_program(STAGE, *flags, "--reward_weights", 2, 1, 0.5)
    files = {"adapter_model.safetensors", "chat_template.jinja", "generation_config.json", "loss.png", "README.md"}
    assert files | {"run.json", "metrics.jsonl", "samples.jsonl"} <= {path.name for path in out.iterdir()}
    record = read_json(out / "run.json")
    assert (record["stage"], record["status"]) == ("grpo_training", "finished")
    assert record["rewards"] == {"noted": 2, "accuracy": 1, "reward_model": 0.5}
    assert record["reward_file"]["file"] == str(tmp_path / "rewards.py") and len(record["reward_file"]["sha256"]) == 64
    assert all(line["agrees"] is not False for line in record["observed"])
    assert any(line["observed"].startswith("8 = 4 a device x 2") for line in record["observed"])
    assert "Think." in load_tokenizer(str(out)).apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    assert stop_tokens(out) == [TURN_END, END_OF_TEXT]
    # 7 prompts, 2 of them in a step, are 4 steps an epoch; nothing is left out.
    assert "steps" in done.stderr and "4 (4 an epoch) of 8 answers" in done.stderr
    assert len(logged(out, "eval_reward")) == len(logged(out, "eval_rewards/noted/mean")) == 4
    by_hand = [
        2 * a + b + 0.5 * c
        for a, b, c in zip(*(logged(out, f"rewards/{name}/mean") for name in record["rewards"]), strict=True)
    ]
    assert logged(out, "reward") == pytest.approx(by_hand, abs=1e-5)
    assert logged(out, "kl")[0] == pytest.approx(0, abs=1e-6) and logged(out, "kl")[-1] > 1e-4
    rows = noted(tmp_path)
    trained = [row for row in rows if "train.jsonl" in row["place"]]
    assert {row["answer"] for row in trained} == set(map(str, range(7))) and len(trained) == 4 * 8
    run_here("merge_peft_adapter.py", "--lora_model", out, "--output_dir", out / "merged")
    assert (out / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--use_peft", "False", "--beta", "0.1"]], ids=["adapter", "all weights"])
def test_zero_2(work, tmp_path, more):
    options = ("--train_file_dir", work / "data", "--max_steps", 2, "--deepspeed", "zero2.json")
    run_program(STAGE, *task_flags(work / "model", tmp_path, *options, *more), processes=2, timeout=400)
    assert read_json(tmp_path / "out" / "run.json")["status"] == "finished"


def test_what_is_rewarded_becomes_likelier(work, tmp_path):
    """Answers of two tokens, of which one letter of the first is wanted: it is found and kept."""
    rewards = tmp_path / "wanted.py"
    rewards.write_text(
        "def wanted(completions, **_):\n    return ['a' <= c[0]['content'][:1] <= 'm' for c in completions]"
    )
    more = ("--reward_file", rewards, "--reward_funcs", "wanted", "--max_completion_length", 2, "--max_steps", 40)
    more += ("--num_generations", 8, "--per_device_train_batch_size", 16, "--learning_rate", 0.02)
    more += ("--lr_scheduler_type", "constant")
    trainer = open_tasks(work / "model", tmp_path, tasks(4), *more).trainer
    trainer.train()
    found = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert sum(found[:3]) < 0.3 and sum(found[-3:]) > 1.8


def test_system_prompt(work, tmp_path):
    """By default the one that asks for the form; `none` leaves the template as it is; a row's own comes first."""
    rows = [{"question": "1?"}, {"system": "Own.", "question": "2?"}]
    for flags, first in (
        (["--system_prompt", "Short."], "Short."),
        (["--system_prompt", "none"], None),
        ([], SYSTEM_PROMPT),
    ):
        write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
        given = task_flags(work / "model", tmp_path, "--output_dir", tmp_path / f"{first}"[:5])
        at = given.index("--system_prompt")
        opened = open_stage(STAGE, *given[:at], *given[at + 2 :], *flags)
        texts = [opened.tokenizer.decode(row["prompt_ids"]) for row in opened.trainer.train_dataset]
        assert (f"system\n{first}" in texts[0]) == (first is not None) and "system\nOwn." in texts[1]
        assert "system" in texts[0] or first is None


def test_fields_and_tools_reach_the_rewards(work, tmp_path):
    """Fields of any shape, None where a row has none, and the prompt as messages with its history."""
    rows = [
        {"question": "1?", "answer": "B", "meta": {"required": [["120"]]}, "score": 3},
        {"question": "2?", "history": [["0?", "No."]], "tools": [TOOL], "score": "high"},
    ]
    opened = open_tasks(work / "model", tmp_path, rows, "--shuffle_dataset", "False")
    first_batches(opened)
    one, two = noted(tmp_path)[0], noted(tmp_path)[4]
    assert (one["answer"], one["meta"], one["score"]) == ("B", {"required": [["120"]]}, 3)
    assert (two["answer"], two["meta"], two["score"], two["tools"]) == (None, None, "high", [TOOL])
    assert [turn["content"] for turn in two["prompt"]] == ["0?", "No.", "2?"]
    assert "look_up" in opened.tokenizer.decode(two["prompt_ids"]) and one["place"].endswith("rows.jsonl:1")


# --- memory ----------------------------------------------------------------------------------------------------------


def test_qlora_with_checkpointing_that_is_on(work, tmp_path):
    """Layers compute anew in the backward pass, sampling keeps the cache, and every trained tensor moves."""
    more = ("--qlora", "True", "--gradient_checkpointing", "True", "--max_steps", 2, "--learning_rate", 0.01)
    opened = open_tasks(work / "model", tmp_path, tasks(4), *more)
    model = opened.trainer.model
    layer = model.get_base_model().model.layers[0]
    widths, passes = [], []
    layer.register_forward_pre_hook(lambda _, inputs, kwargs: widths.append(inputs[0].shape[1]), with_kwargs=True)
    opened.trainer.add_callback(NoteWidths(passes, widths))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    opened.finish()
    observed = {line["name"]: line["observed"] for line in read_json(tmp_path / "out" / "run.json")["observed"]}
    assert observed["checkpointing"] == "2 of 2 layers" and observed["quantization"].startswith("NF4, double")
    # In a step each of two batches goes through the layer twice as a whole, and sampling through it token by token.
    whole = [width for width in passes[-1] if width > 1]
    assert passes[-1].count(1) >= 7 and len(whole) == 1 + 2 * 2
    moved = [name for name, weight in before.items() if not torch.equal(weight, dict(model.named_parameters())[name])]
    assert len(moved) == len(before) > 0


class NoteWidths(TrainerCallback):
    """After each step, move what was noted in it to a list of its own."""

    def __init__(self, steps, widths):
        self.steps, self.widths = steps, widths

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self.widths[:])
        self.widths.clear()


# --- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["new adapter", "its adapter", "all weights"])
def test_the_reference_is_where_training_began(work, tmp_path, start):
    more = ["--beta", 0.1, "--max_steps", 2, "--learning_rate", 0.02]
    model = work / "model"
    if start == "its adapter":
        first = open_tasks(model, tmp_path / "first", tasks(4), "--max_steps", 1)
        shake(first.trainer.model)
        first.finish()
        model = tmp_path / "first" / "out"
    elif start == "all weights":
        more += ["--use_peft", "False"]
    opened = open_tasks(model, tmp_path, tasks(4), *more)
    trainer, batch = opened.trainer, first_batches(opened)[0]
    ids, mask = (torch.cat([batch[f"prompt_{n}"], batch[f"completion_{n}"]], dim=1) for n in ("ids", "mask"))

    def log_probs():
        with torch.no_grad():
            logits = trainer.model(input_ids=ids, attention_mask=mask).logits.log_softmax(dim=-1)
        return logits[:, :-1].gather(2, ids[:, 1:, None])[:, -batch["completion_ids"].shape[1] :, 0]

    real = batch["completion_mask"].bool()
    at_start = log_probs()
    assert torch.allclose(batch["ref_per_token_logps"][real], at_start[real], atol=1e-4)
    trainer.train()
    assert not torch.allclose(log_probs()[real], at_start[real], atol=1e-2)
    # The reference has not moved with the policy.
    trainer._generate_single_turn = lambda *_: (
        [row[own].tolist() for row, own in zip(batch["completion_ids"], real, strict=True)],
        None,
    )
    rows = [row for row in trainer.train_dataset]
    prompts = [row[own.bool()].tolist() for row, own in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    again = trainer._generate_and_score_completions([next(r for r in rows if r["prompt_ids"] == p) for p in prompts])
    assert torch.allclose(again["ref_per_token_logps"][real], at_start[real], atol=1e-4)
    assert [row["kl"] for row in trainer.state.log_history if "kl" in row][0] == pytest.approx(0, abs=1e-5)


def test_no_reference_without_a_weight_for_it(work, tmp_path):
    opened = open_tasks(work / "model", tmp_path, tasks(4))
    assert "ref_per_token_logps" not in first_batches(opened)[0]
    assert opened.trainer.ref_model is None and list(opened.trainer.model.peft_config) == ["default"]


# --- where answers end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_each_stop_token_ends_an_answer(work, tmp_path, masked):
    """The turn end of the template and the end token of the tokenizer both count; a cut answer is known as such."""
    opened = open_tasks(work / "model", tmp_path, tasks(2), "--mask_truncated_completions", masked)
    trainer, tokenizer = opened.trainer, opened.tokenizer
    turn_end, end, pad = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT, tokenizer.pad_token])
    assert trainer.eos_token_ids == opened.options["stop_ids"] and set(trainer.eos_token_ids) == {turn_end, end}
    written = torch.tensor([[65, turn_end, pad, pad], [66, 66, end, pad], [67, 67, 67, 67], [68, pad, 68, 68]])
    trainer.model.generate = lambda input_ids, **_: torch.cat([input_ids, written], dim=1)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 4)
    assert batch["completion_mask"].sum(dim=1).tolist() == ([2, 3, 0, 0] if masked else [2, 3, 4, 4])
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [0.5]
    texts = [tokenizer.decode(ids) for ids in ([65], [66] * 2, [67] * 4, [68] * 3)]
    assert [row["text"] for row in noted(tmp_path)] == texts


# --- the reward model ------------------------------------------------------------------------------------------------


def test_a_reward_model_reads_in_its_own_template(work, tmp_path):
    """Its reward is the score of prompt, answer and tools as `RewardScorer` gives it."""
    rows = [{"question": "1?"}, {"question": "2?", "system": "Be kind."}]
    more = ("--reward_model_path", work / "rm", "--shuffle_dataset", "False", "--reward_weights", 0, 1)
    opened = open_tasks(work / "model", tmp_path, rows, *more)
    found, calculate = [], opened.trainer._calculate_rewards
    opened.trainer._calculate_rewards = lambda *args: found.append(calculate(*args)) or found[-1]
    first_batches(opened)
    scorer, answers = RewardScorer.from_pretrained(str(work / "rm")), noted(tmp_path)
    chats = [[*row["prompt"], {"role": "assistant", "content": row["text"]}] for row in answers]
    assert "USER: 1?" in scorer.tokenizer.decode(scorer.encode(chats[0]))
    scores = scorer.score(chats)
    assert found[0][:, 1].tolist() == pytest.approx(scores, abs=1e-4) and len(set(scores)) > 4
    assert opened.trainer.reward_func_names == ["noted", "reward_model"]


def test_an_answer_that_a_reward_model_cannot_read_is_the_worst(work):
    scorer, shares = RewardScorer.from_pretrained(str(work / "rm")), []
    reward = model_reward(scorer, 2)
    texts = ["Rest.", "x" * 300, "Sleep a lot.", TURN_END]
    prompts = [[{"role": "user", "content": "Why?"}]] * 4
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    found = reward(prompts=prompts, completions=answers, log_metric=lambda name, value: shares.append((name, value)))
    readable = scorer.score([[*prompts[0], *answers[n]] for n in (0, 2)])
    assert found == pytest.approx([readable[0], min(readable), readable[1], min(readable)], abs=1e-5)
    assert shares == [("reward_model/unreadable", 0.5)]
    assert reward(prompts=prompts[:1], completions=answers[1:2]) == [None]


def test_prompts_that_a_reward_model_cannot_read_are_refused(work, tmp_path):
    rows = [{"question": "1?"}, {"question": "?" * 300}]
    more = ("--reward_model_path", work / "rm", "--reward_funcs", "none")
    with pytest.raises(UserError, match=r"1 prompt\(s\) cannot be scored(?s:.*)rows.jsonl:2.*longer than the 200"):
        given = task_flags(work / "model", tmp_path, *more)
        at = given.index("--reward_file")
        write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
        open_stage(STAGE, *given[:at], *given[at + 2 :])


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_the_evaluation_is_greedy_and_does_not_depend_on_the_batch_size(work, tmp_path):
    opened = open_stage(STAGE, *task_flags(work / "model", tmp_path, "--train_file_dir", work / "data"))
    trainer, found = opened.trainer, []
    state = torch.random.get_rng_state()
    for size in (1, 3, 5):
        trainer.args.per_device_eval_batch_size = size
        metrics = trainer.evaluate()
        found.append({name: value for name, value in metrics.items() if not name.endswith(("runtime", "second"))})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found[1] == pytest.approx(found[0]) and found[2] == pytest.approx(found[0])
    rows = noted(tmp_path)
    assert len(rows) == 15 and rows[:5] == rows[5:10] == rows[10:]
    assert found[0]["eval_reward"] == pytest.approx(sum(row["reward"] for row in rows[:5]) / 5)
    assert found[0]["eval_completions/mean_length"] == sum(len(row["ids"]) for row in rows[:5]) / 5
    for row in rows[:5]:
        ids = torch.tensor([row["prompt_ids"]])
        plain = trainer.model.generate(input_ids=ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        assert row["ids"] == plain.tolist()


def test_evaluation_beside_vllm_is_without_it(work, tmp_path):
    """There is no vLLM here; this is the state in which TRL leaves its trainer with one."""
    trainer = open_stage(STAGE, *task_flags(work / "model", tmp_path, "--train_file_dir", work / "data")).trainer
    before = trainer.evaluate()["eval_completions/mean_length"]
    trainer.use_vllm, trainer.generation_config, trainer.generation_kwargs = True, None, None
    assert trainer.evaluate()["eval_completions/mean_length"] == before and trainer.use_vllm


def test_evaluation_where_a_reward_does_not_apply(work, tmp_path):
    """Its mean is over the rows it applies to; where there is none, it has no number."""
    write_jsonl(tmp_path / "data" / "validation.jsonl", [{"question": "1?", "answer": "B"}, {"question": "2?"}])
    more = ("--reward_funcs", "accuracy", "safety")
    given = task_flags(work / "model", tmp_path, *more)
    at = given.index("--reward_file")
    write_jsonl(tmp_path / "data" / "train.jsonl", [*tasks(2), {"question": "Chest pain?"}])
    metrics = open_stage(STAGE, *given[:at], *given[at + 2 :]).trainer.evaluate()
    assert metrics["eval_rewards/accuracy/mean"] == metrics["eval_reward"] == 0
    assert "eval_rewards/safety/mean" not in metrics


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_evaluation_averages_the_rows_that_are_scored(work, tmp_path, size):
    """A row that no reward applies to is not a row of reward 0, whatever batch it is in."""
    rewards = tmp_path / "given.py"
    rewards.write_text("def one(completions, a, **_):\n    return a\n\ndef two(completions, b, **_):\n    return b\n")
    given = [(1.0, None), (None, None), (None, 0.5), (0.25, 1.0), (None, None)]
    rows = [{"question": f"{n}? ", "a": a, "b": b} for n, (a, b) in enumerate(given)]
    write_jsonl(tmp_path / "data" / "validation.jsonl", rows)
    more = ("--reward_file", rewards, "--reward_funcs", "one", "two", "--reward_weights", 2, 1)
    trained = [{"question": f"{n}?", "a": 1.0, "b": 1.0} for n in (7, 8)]
    trainer = open_tasks(work / "model", tmp_path, trained, *more, "--per_device_eval_batch_size", size).trainer
    found = trainer.evaluate()
    # 2 x 1; 0.5; 2 x 0.25 + 1.
    assert found["eval_reward"] == pytest.approx((2 + 0.5 + 1.5) / 3)
    assert found["eval_rewards/one/mean"] == pytest.approx((1 + 0.25) / 2)
    assert found["eval_rewards/two/mean"] == pytest.approx((0.5 + 1) / 2)
    unscored = trainer.evaluate(trainer.eval_dataset.select([1, 4]))
    assert not {"eval_reward", "eval_rewards/one/mean", "eval_rewards/two/mean"} & unscored.keys()
    assert unscored["eval_completions/mean_length"] > 0


def test_the_best_checkpoint_is_that_with_the_highest_reward(work, tmp_path):
    more = ("--train_file_dir", work / "data", "--load_best_model_at_end", "True", "--eval_strategy", "steps")
    more += ("--save_strategy", "steps", "--save_steps", 1, "--eval_steps", 1, "--max_steps", 3)
    trainer = open_stage(STAGE, *task_flags(work / "model", tmp_path, *more, "--learning_rate", 0.02)).trainer
    trainer.train()
    rewards = [row["eval_reward"] for row in trainer.state.log_history if "eval_reward" in row]
    assert trainer.state.best_metric == max(rewards[1:]) and trainer.args.greater_is_better


def test_answers_are_written_down_where_that_is_asked_for(work, tmp_path):
    opened = open_tasks(work / "model", tmp_path, tasks(4), "--max_steps", 1, "--log_completions", "True")
    opened.finish()
    table = pd.read_parquet(next((tmp_path / "out" / "completions").iterdir()))
    rows = noted(tmp_path)
    assert [turns[0]["content"] for turns in table["completion"]] == [row["text"] for row in rows]
    assert table["noted"].tolist() == pytest.approx([row["reward"] for row in rows])


# --- a signal, or none -----------------------------------------------------------------------------------------------


def test_rewards_that_are_all_equal_are_said_to_teach_nothing(work, tmp_path, capsys):
    rewards = tmp_path / "same.py"
    rewards.write_text("def same(completions, **_):\n    return [0.5] * len(completions)")
    more = ("--reward_file", rewards, "--reward_funcs", "same", "--max_steps", 2, "--scale_rewards", "none")
    opened = open_tasks(work / "model", tmp_path, tasks(4), *more)
    before = {name: weight.detach().clone() for name, weight in opened.trainer.model.named_parameters()}
    opened.finish()
    printed = capsys.readouterr().err
    assert "no learning signal at step 1: in 100% of the groups" in printed
    assert "no learning signal in this run: in 4 of 4 groups (100%)" in printed
    assert logged(tmp_path / "out", "frac_reward_zero_std") == [1, 1]
    assert all(torch.equal(weight, before[name]) for name, weight in opened.trainer.model.named_parameters())


def test_groups_without_a_difference_in_reward():
    rewards = torch.tensor([[1, 0], [0, 1], [1, NAN], [1, 0], [NAN, NAN], [1, 1], [NAN, NAN], [NAN, NAN]])
    assert zero_std_groups(rewards, torch.ones(2), 2).tolist() == [True, True, True, True]
    assert zero_std_groups(rewards, torch.tensor([2.0, 1.0]), 2).tolist() == [False, True, True, True]
    assert zero_std_groups(rewards[:, :1], torch.ones(1), 4).tolist() == [False, True]


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_each_prompt_of_an_epoch_is_answered():
    sampler = PromptSampler(7, num_generations=2, batch_size=3, repeat_count=2, seed=5, shuffle=True)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] == epochs[2] != epochs[1] and len(epochs[0]) == len(sampler) == 3 * 3 * 2 * 2
    for order in epochs:
        batches = [order[start : start + 6] for start in range(0, 36, 6)]
        assert batches[0::2] == batches[1::2]
        asked = [batch[::2] for batch in batches[0::2]]
        assert [batch[1::2] for batch in batches[0::2]] == asked
        # The last batch is filled up from the beginning.
        flat = sum(asked, [])
        assert sorted(flat[:7]) == list(range(7)) and flat[7:] == flat[:2]
    filled = PromptSampler(2, num_generations=1, batch_size=5, repeat_count=1, seed=0, shuffle=False)
    assert list(filled) == [0, 1, 0, 1, 0]


def test_each_epoch_of_a_run_has_an_order_of_its_own(work, tmp_path):
    """It follows from the seed."""
    asked = {}
    for name, more in {"one": (), "again": ("--learning_rate", 0.1), "other": ("--data_seed", 5)}.items():
        folder = tmp_path / name
        options = ("--num_train_epochs", 2, "--max_completion_length", 2, *more)
        open_tasks(work / "model", folder, tasks(6), *options).trainer.train()
        asked[name] = [row["answer"] for row in noted(folder)[::4]]
    for order in asked.values():
        assert sorted(order[:6]) == sorted(order[6:]) == [str(n) for n in range(6)]
        assert order[:6] != order[6:]
    assert asked["one"] == asked["again"] != asked["other"]


def test_a_long_prompt_is_refused_with_its_place(work, tmp_path):
    rows = [*tasks(2), {"question": "?" * 100}]
    with pytest.raises(DataError, match=r"rows.jsonl:3(?s:.*)longer than the 56 that leave room"):
        open_tasks(work / "model", tmp_path, rows, "--model_max_length", 64, "--long_rows", "refuse")
    opened = open_tasks(work / "model", tmp_path, rows, "--model_max_length", 64)
    assert len(opened.trainer.train_dataset) == 2


@pytest.mark.parametrize("name", ["completions", "place", "environment", "max_length"])
def test_fields_that_rewards_know_otherwise_are_refused(work, tmp_path, name):
    rows = [*tasks(2), {"question": "3?", name: "x"}]
    with pytest.raises(UserError, match=f"rows.jsonl:3: .*`{name}`.*--ignore_fields {name}"):
        open_tasks(work / "model", tmp_path, rows)
    open_tasks(work / "model", tmp_path, rows, "--ignore_fields", name)


def test_a_prompt_that_is_held_out_is_not_trained_on(work, tmp_path):
    """Whatever its answer is."""
    write_jsonl(tmp_path / "data" / "validation.jsonl", [{"question": "1?", "answer": "another"}])
    with pytest.raises(
        UserError, match=r"(?s)1 of 1 held-out prompts.*validation.jsonl:1 has the prompt of .*rows.jsonl:2"
    ):
        open_tasks(work / "model", tmp_path, [{"question": "0?"}, {"question": "1?", "answer": "1"}])


# --- losses ----------------------------------------------------------------------------------------------------------


def losses_by_hand(ratio, advantages, mask, max_length, loss):
    """Clipped at 0.2, from the ratios of tokens (answers, length)."""
    if loss == "gspo":
        mean = (ratio.log() * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
        ratio = mean.exp().expand_as(ratio)
    tokens = -torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]) * mask
    if loss in ("grpo", "gspo"):
        return (tokens.sum(dim=1) / mask.sum(dim=1)).mean()
    return tokens.sum() / (mask.numel() // mask.shape[1] * max_length if loss == "dr_grpo" else mask.sum())


NAMED = {
    "grpo": ["--loss_type", "grpo"],
    "dr_grpo": ["--loss_type", "dr_grpo", "--scale_rewards", "none"],
    "dapo": ["--loss_type", "dapo"],
    "gspo": ["--loss_type", "grpo", "--importance_sampling_level", "sequence"],
}


@pytest.mark.parametrize("name", NAMED)
def test_named_losses_are_what_their_papers_say(work, tmp_path, name):
    more = ("--num_iterations", 2, "--gradient_accumulation_steps", 1, "--per_device_train_batch_size", 8)
    opened = open_tasks(work / "model", tmp_path, tasks(4), *more, *NAMED[name])
    (batch,), trainer = first_batches(opened), opened.trainer
    trainer.current_gradient_accumulation_steps = 1
    noise = torch.randn(batch["completion_ids"].shape, generator=torch.Generator().manual_seed(1)) * 0.3
    batch["old_per_token_logps"] = batch["old_per_token_logps"] - noise
    assert not batch["completion_mask"].all()
    wanted = losses_by_hand(noise.exp(), batch["advantages"], batch["completion_mask"], 8, name)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(wanted.item(), abs=1e-5)


def test_each_loss_is_another_one(work, tmp_path):
    found = {}
    flags = [["--loss_type", loss] for loss in LOSSES]
    flags += [["--importance_sampling_level", "sequence", "--loss_type", "grpo"], ["--beta", "0.5"]]
    flags += [["--epsilon", "0.05"], ["--epsilon_high", "0.5"], ["--delta", "1.1"], ["--entropy_coef", "0.1"]]
    flags += [["--top_entropy_quantile", "0.5"], ["--off_policy_mask_threshold", "0.0001"]]
    flags += [["--multi_objective_aggregation", "normalize_then_sum"], ["--scale_rewards", "batch"]]
    for number, more in enumerate(flags):
        opened = open_tasks(work / "model", tmp_path / str(number), tasks(4), "--num_iterations", 2, *more)
        trainer, batch = opened.trainer, first_batches(opened)[0]
        trainer.current_gradient_accumulation_steps = 1
        shake(trainer.model)
        found[round(trainer.compute_loss(trainer.model, batch).item(), 6)] = more
    assert len(found) == len(flags)


def test_losses_are_trls():
    """TRL names its own in the help of the flag; the first sentence is the list."""
    text = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert set(LOSSES) == set(re.findall(r"'(\w+)'", re.match(r".*?Supported values are (.*?)\. ", text)[1]))


# --- flags -----------------------------------------------------------------------------------------------------------

REFUSED = [
    (["--use_vllm", "True"], "needs vLLM, which is not installed here"),
    (["--vllm_mode", "server"], "--vllm_mode has no effect here: it is for --use_vllm True"),
    (["--vllm_server_port", "1"], "--vllm_server_port has no effect here"),
    (["--epsilon", "0.1"], "each answer is trained on once"),
    (["--epsilon_high", "0.3"], "add --num_iterations 2, or --steps_per_generation 8"),
    (["--importance_sampling_level", "sequence", "--loss_type", "grpo"], "the ratio is 1"),
    (["--importance_sampling_level", "sequence", "--num_iterations", "2"], "For GSPO add --loss_type grpo"),
    (["--epsilon", "0.1", "--num_iterations", "2", "--loss_type", "sapo"], "--loss_type sapo has no lower bound"),
    (["--sapo_temperature_neg", "2"], "it is for --loss_type sapo, not dapo"),
    (["--vespo_k_pos", "2"], "it is for --loss_type vespo, not dapo"),
    (["--delta", "2", "--num_iterations", "2", "--loss_type", "cispo"], "cispo is not clipped"),
    (["--use_bias_correction_kl", "False"], "it is for --beta above 0"),
    (["--scale_rewards", "batch", "--multi_objective_aggregation", "normalize_then_sum"], "each reward separately"),
    (["--entropy_target", "1"], "it is for --use_adaptive_entropy True"),
    (["--log_unique_prompts", "True"], "it is for --log_completions True"),
    (["--off_policy_mask_threshold", "0.5"], "each answer is trained on once"),
    (["--ds3_gather_for_generation", "False"], "it is for --deepspeed"),
    (["--beta", "-1"], "--beta -1.0 must be 0 or more"),
    (["--reward_tolerance", "0.1", "--reward_funcs", "format"], "it is for --reward_funcs accuracy"),
    (["--reward_tolerance", "-0.1"], "--reward_tolerance -0.1 must be 0 or more"),
    (["--temperature", "0"], "--temperature 0.0 must be above 0"),
    (["--top_p", "1.5"], "--top_p 1.5 must be above 0 and at most 1"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else None)
def test_flags_without_effect_are_refused(more, message):
    (args,) = parse_args(GrpoArguments, argv=more)
    with pytest.raises(UserError, match=message):
        resolve_rewards(args)
        check_flags(args)


TORN = [
    (["--num_generations", "1"], "--num_generations 1 must be at least 2"),
    (["--num_generations", "6", "--steps_per_generation", "2"], "make --steps_per_generation a multiple of 3"),
    (["--generation_batch_size", "12"], "must be a multiple of 8"),
    (["--generation_batch_size", "16", "--num_generations", "6"], "make --generation_batch_size a multiple of 24"),
    (["--generation_batch_size", "16", "--steps_per_generation", "2"], "exclude each other; keep one"),
    (["--num_iterations", "0"], "--num_iterations 0 must be at least 1"),
    (["--loss_type", "ppo"], "invalid choice: 'ppo'"),
    (["--generation_kwargs", "{}"], "has no effect in this program. Use the sampling flags"),
]


@pytest.mark.parametrize(("more", "message"), TORN, ids=lambda value: value if isinstance(value, str) else None)
def test_batches_must_hold_whole_groups(more, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(GrpoArguments, argv=more, program="grpo_training.py")
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("processes", "given", "raised"), [(1, 2, 8), (2, 2, 4), (2, 5, 8), (8, 3, 3)])
def test_accumulation_is_raised_to_whole_groups(monkeypatch, processes, given, raised):
    """Of three answers per process and pass, as many passes as make up groups of eight."""
    monkeypatch.setattr("grpo_training.world_size", lambda: processes)
    batches = SimpleNamespace(
        per_device_train_batch_size=3,
        gradient_accumulation_steps=given,
        num_generations=8,
        num_iterations=1,
        steps_per_generation=None,
        generation_batch_size=None,
        notices=[],
    )
    GrpoArguments._check_group_sizes(batches)
    assert batches.gradient_accumulation_steps == raised
    assert ("--gradient_accumulation_steps is" in "".join(batches.notices)) == (raised != given)


def test_defaults_run_as_they_are(work, tmp_path):
    """No flag but model, data and output: half of the length is for the answer."""
    given = [*("--model_name_or_path", work / "model", "--train_file_dir", work / "data", "--output_dir", tmp_path)]
    args = open_stage(STAGE, *given).trainer.args
    assert (args.model_max_length, args.max_completion_length, args.generation_batch_size) == (1024, 512, 32)
    assert (args.learning_rate, args.beta, args.loss_type, args.disable_dropout) == (1e-5, 0.0, "dapo", True)


def test_no_room_for_a_prompt(work, tmp_path):
    with pytest.raises(UserError, match="leave room for a prompt within --model_max_length 8"):
        open_tasks(work / "model", tmp_path, tasks(2), "--model_max_length", 8)


def test_no_reward_at_all(work, tmp_path):
    given = task_flags(work / "model", tmp_path, "--reward_funcs", "none")
    at = given.index("--reward_file")
    with pytest.raises(UserError, match="nothing to score answers with"):
        open_stage(STAGE, *given[:at], *given[at + 2 :])
    with pytest.raises(UserError, match="--reward_min_length has no effect here: it is for --reward_funcs length"):
        open_stage(STAGE, *given, "--reward_funcs", "format", "--reward_min_length", 3)


def test_rewards_are_checked_without_a_model(work, tmp_path, capsys):
    row = {"question": "2+2?", "answer": "4", "good": "<think>x</think><answer>4</answer>", "bad": "5", "flaw": "wrong"}
    path = write_jsonl(tmp_path / "labelled.jsonl", [row])
    run_here(STAGE, "--check_rewards", path, "--reward_model_path", work / "rm")
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "reward_model" in printed and "overall" in printed
    with pytest.raises(UserError, match="--beta, --output_dir would have no effect with --check_rewards"):
        run_here(STAGE, "--check_rewards", path, "--beta", 0.1, "--output_dir", tmp_path)
    with pytest.raises(UserError, match="--model_name_or_path is missing"):
        run_here(STAGE, "--train_file_dir", work / "data")


# --- what of TRL and transformers is built upon ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("_prepare_inputs", "_generate_and_score_completions", "_tokenize_prompts"),
        *("_generate_single_turn", "_calculate_rewards", "_get_per_token_logps_and_entropies", "log"),
        *("_save_checkpoint", "_load_optimizer_and_scheduler", "compute_loss"),
    ],
)
def test_what_is_overridden_is_there(name):
    """A method under a name that TRL has given up would never be called."""
    assert name in vars(GroupTrainer) and name in vars(GRPOTrainer)


@pytest.mark.parametrize("name", ["get_batch_samples", "evaluation_loop", "_load_rng_state"])
def test_what_is_overridden_of_the_base_trainer_is_there(name):
    assert name in vars(GroupTrainer) and name in vars(Trainer) and name not in vars(GRPOTrainer)


def test_state_of_trls_trainer(work, tmp_path):
    """What `GroupTrainer` reads and sets of it."""
    trainer = open_tasks(work / "model", tmp_path, tasks(2)).trainer
    kinds = {"_step": int, "num_iterations": int, "num_generations": int, "_entropy_bonus_enabled": bool}
    kinds |= {"aux_loss_enabled": bool, "eos_token_ids": list, "reward_func_names": list, "_metrics": dict}
    kinds |= {"_pending_metrics": dict, "_pending_extra_logs": dict, "_current_train_step_time": float}
    for name, kind in kinds.items():
        assert type(getattr(trainer, name)) is kind or isinstance(getattr(trainer, name), kind), name
    assert trainer._buffered_inputs is None and trainer.reward_weights.tolist() == [1.0]
    assert trainer.generation_config.eos_token_id == trainer.eos_token_ids and trainer.use_vllm is False
