"""ppo_training.py: its formulas against numbers worked out by hand, and the program as a user runs it."""

import inspect
import math
import re
import shutil
from pathlib import Path

from medicalgpt.errors import UserError
from medicalgpt.parser import parse_args
from medicalgpt.readers.problems import place_of
from medicalgpt.rewards.scoring import RewardScorer
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Answer
from ppo_training import (
    PpoArguments,
    PpoTrainer,
    adapt_kl_coef,
    check_flags,
    explained_variance,
    gae,
    kl_estimate,
    masked_moments,
    masked_whiten,
    policy_loss,
    token_values,
    value_loss,
)
from tests.helpers import open_stage, read_json, run_here, run_program, stop_tokens, write_jsonl
from tests.silent.pairs import pairs, shake
from tests.silent.ppo import STAGE, make_place, open_ppo, ppo_flags, prompts, save_reward_model
from tests.tiny import END_OF_TEXT, TURN_END, tiny_tokenizer

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from safetensors.torch import load_file
from torch import tensor
from transformers import AutoModelForCausalLM, Trainer

# --- the formulas ----------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    """One answer of three tokens and one of a single token, in rows whose other columns must not matter."""
    gamma, lam = 0.9, 0.8
    rewards = tensor([[99.0, 1.0, 0.0, 2.0], [-1.0, 99.0, 99.0, 99.0]])
    values = tensor([[99.0, 0.5, 1.0, -1.0], [0.25, 99.0, 99.0, 99.0]])
    mask = tensor([[False, True, True, True], [True, False, False, False]])
    # What came is compared with what the critic had said; later surprises count gamma x lambda = 0.72 a token.
    third = 2.0 - -1.0
    second = (0.0 + 0.9 * -1.0 - 1.0) + 0.72 * third
    first = (1.0 + 0.9 * 1.0 - 0.5) + 0.72 * second
    assert (first, second, third) == pytest.approx((1.5872, 0.26, 3.0))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    assert advantages.tolist() == [pytest.approx([0, 1.5872, 0.26, 3.0]), pytest.approx([-1.25, 0, 0, 0])]
    assert returns.tolist() == [pytest.approx([0, 2.0872, 1.26, 2.0]), pytest.approx([-1.0, 0, 0, 0])]


def test_advantages_of_lambda_1_are_what_came_less_what_was_expected():
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(3, 6, generator=generator) for _ in range(2))
    mask = tensor([[True] * 6, [False] * 2 + [True] * 3 + [False], [True] + [False] * 5])
    advantages, returns = gae(rewards, values, mask, 0.9, 1.0)
    for row in range(3):
        places = mask[row].nonzero()[:, 0].tolist()
        for place in places:
            came = sum(0.9 ** (later - place) * rewards[row, later].item() for later in places if later >= place)
            assert returns[row, place].item() == pytest.approx(came, abs=1e-5)
            assert advantages[row, place].item() == pytest.approx(came - values[row, place].item(), abs=1e-5)


VALUES = tensor([[1.0, 2.0, 50.0], [6.0, 50.0, 50.0]])
MASK = tensor([[True, True, False], [True, False, False]])
# Mean 3; squared distances 4 + 1 + 9.
VARIANCE = 14 / 3


def test_moments_and_whitening_by_hand():
    mean, variance = masked_moments(VALUES, MASK, lambda total: total)
    assert (mean.item(), variance.item()) == pytest.approx((3.0, VARIANCE))
    white, deviation = masked_whiten(VALUES, MASK), VARIANCE**0.5
    assert white.dtype == VALUES.dtype
    assert white.tolist() == [
        pytest.approx([-2 / deviation, -1 / deviation, 0]),
        pytest.approx([3 / deviation, 0, 0]),
    ]


def test_whitening_is_over_all_processes():
    """Each of two processes holds one row; what it cannot know, the sums of the other one tell it."""
    # Count, sum, and squared distances from the common mean, in the order in which they are asked for.
    of_row = [[2.0, 3.0, 4.0 + 1.0], [1.0, 6.0, 9.0]]
    whole = masked_whiten(VALUES, MASK)
    for own, other in ((0, 1), (1, 0)):
        told = iter(of_row[other])
        row = slice(own, own + 1)
        part = masked_whiten(VALUES[row], MASK[row], lambda total, told=told: total + next(told))
        assert torch.allclose(part, whole[row])
        assert next(told, None) is None


# Ratio, advantage -> loss, gradient with respect to the log-probability, whether it was clipped away. Range 0.2.
POLICY = {
    "likelier than allowed, and good": (1.5, 2.0, -2.4, 0.0, True),
    "likelier than allowed, and bad": (1.5, -2.0, 3.0, 3.0, False),
    "less likely than allowed, and good": (0.5, 2.0, -1.0, -1.0, False),
    "less likely than allowed, and bad": (0.5, -2.0, 1.6, 0.0, True),
    "within the range, and good": (1.1, 2.0, -2.2, -2.2, False),
    "within the range, and bad": (0.9, -2.0, 1.8, 1.8, False),
}


@pytest.mark.parametrize("case", POLICY)
def test_policy_loss_on_each_side_of_the_clip(case):
    ratio, advantage, loss, gradient, clipped = POLICY[case]
    log_probs = tensor([[-1.0 + math.log(ratio)]], requires_grad=True)
    found, found_ratio, was_clipped = policy_loss(log_probs, tensor([[-1.0]]), tensor([[advantage]]), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss) and found_ratio.item() == pytest.approx(ratio)
    assert log_probs.grad.item() == pytest.approx(gradient) and was_clipped.item() is clipped


# Value, return -> loss, gradient, whether it was clipped away. The old value is 1, the range 0.2.
VALUE = {
    "beyond the range, towards the return": (1.5, 2.0, 0.5 * 0.8**2, 0.0, True),
    "beyond the range, away from it": (0.5, 2.0, 0.5 * 1.5**2, -1.5, False),
    "within the range": (1.1, 2.0, 0.5 * 0.9**2, -0.9, False),
    "below the range, towards the return": (0.5, 0.0, 0.5 * 0.8**2, 0.0, True),
    "below the range, away from it": (1.5, 0.0, 0.5 * 1.5**2, 1.5, False),
}


@pytest.mark.parametrize("case", VALUE)
def test_value_loss_on_each_side_of_the_clip(case):
    value, came, loss, gradient, clipped = VALUE[case]
    values = tensor([[value]], requires_grad=True)
    found, was_clipped = value_loss(values, tensor([[1.0]]), tensor([[came]]), 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss) and was_clipped.item() is clipped
    assert values.grad.item() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimates_average_to_the_kl(estimator):
    policy, reference = tensor([0.5, 0.3, 0.15, 0.05]).double(), tensor([0.2, 0.5, 0.1, 0.2]).double()
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    estimates = kl_estimate(policy.log(), reference.log(), estimator)
    assert (policy * estimates).sum().item() == pytest.approx(exact, rel=1e-6)
    assert (estimates >= 0).all() if estimator == "k3" else (estimates < 0).any()
    assert kl_estimate(policy.log(), policy.log(), estimator).tolist() == [0, 0, 0, 0]


def test_explained_variance_by_hand():
    returns, mask = tensor([[1.0, 2.0, 3.0, 4.0, 70.0]]), tensor([[True] * 4 + [False]])
    # Errors 0, 0, 0, -1 have variance 3/16, the returns 5/4.
    assert explained_variance(tensor([[1.0, 2, 3, 5, -9]]), returns, mask) == pytest.approx(1 - (3 / 16) / (5 / 4))
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full_like(returns, 7.0), returns, mask) == pytest.approx(0)
    assert math.isnan(explained_variance(returns, torch.ones_like(returns), mask))


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (60.0, 1.02), (7.21, 1.02), (0.0, 0.98), (-3.0, 0.98)]
)
def test_the_kl_coefficient_follows_the_kl(kl, factor):
    """A tenth of the horizon is a tenth of the error, which counts as a fifth at most."""
    assert adapt_kl_coef(0.5, kl, 6.0, 100, 1000) == pytest.approx(0.5 * factor)


# --- the trainer's own sums ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A policy, a reward model, eight prompts of unlike lengths."""
    return make_place(tmp_path_factory.mktemp("ppo"))


def test_scores_are_brought_to_moments_of_all_so_far(place, tmp_path):
    clip = 1.25
    trainer = open_ppo(place, tmp_path, "--normalize_scores", "True", "--score_clip", clip).trainer
    draws, seen, clipped = np.random.default_rng(0), [], 0
    for step in range(5):
        scores = draws.normal(3.0 + step, 1.0 + step, trainer.answers_per_step)
        seen.extend(scores)
        expected = (scores - np.mean(seen)) / np.std(seen)
        clipped += (np.abs(expected) > clip).sum()
        assert trainer._shape_scores(tensor(scores)).tolist() == pytest.approx(np.clip(expected, -clip, clip).tolist())
    assert clipped > 0
    count, mean, squares = trainer.scores_seen.tolist()
    assert (count, mean, squares) == pytest.approx((len(seen), np.mean(seen), np.var(seen) * len(seen)))


@pytest.fixture(scope="module")
def stepped(place, tmp_path_factory):
    """A run of one step, whose learning is one update in two batches, and which can take further steps."""
    trainer = open_ppo(
        place,
        tmp_path_factory.mktemp("stepped"),
        *("--num_mini_batches", 1, "--num_ppo_epochs", 1, "--gradient_accumulation_steps", 2, "--max_steps", 1),
        *("--gamma", 0.9, "--lam", 0.8, "--kl_coef", 0.3, "--kl_estimator", "k3", "--temperature", 0.7),
        *("--vf_coef", 0.4, "--cliprange", 0.1, "--cliprange_value", 0.05, "--missing_eos_penalty", 0.25),
        *("--per_device_train_batch_size", 3, "--max_grad_norm", 0, "--whiten_advantages", "False"),
    ).trainer
    trainer.train()
    return trainer


def by_itself(trainer, ids, start):
    """Log-probability, reference's log-probability and value of each token of an answer, without batch or padding."""
    policy, critic, found = trainer.policy, trainer.model.critic, []
    trainer.model.eval()
    with torch.no_grad():
        for _ in range(2):
            logits = policy(input_ids=tensor([ids])).logits[0, start - 1 : -1].double()
            log_probs = (logits / trainer.args.temperature).log_softmax(dim=-1)
            found.append(log_probs.gather(1, tensor(ids[start:])[:, None])[:, 0].numpy())
            policy.disable_adapter_layers()
        policy.enable_adapter_layers()
        # Before a token, the critic is a reward model of the text so far.
        values = [critic(input_ids=tensor([ids[:end]])).logits.item() for end in range(start, len(ids))]
    return *found, np.array(values)


def test_a_step_against_ten_lines_of_numpy(place, stepped):
    """Answers of unlike lengths, one by one; policy and critic moved by hand between looking and learning."""
    trainer, args, tokenizer = stepped, stepped.args, stepped.processing_class
    judge = RewardScorer.from_pretrained(str(place / "rm"))
    # Steps follow from their number; one in which some answers end early and others do not end.
    rollout, seen = next(step for step in map(trainer.roll_out, range(1, 99)) if step[1]["length"] < 5)
    rows = []
    for row in range(trainer.answers_per_process):
        ids = rollout.input_ids[row][rollout.attention_mask[row].bool()].tolist()
        start = int(rollout.answer_mask[row].nonzero()[0]) + 1
        asked = tokenizer.decode(ids[:start]).removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]
        # Bytes that are not a whole character yet are not text.
        said = tokenizer.decode(ids[start:], skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        (score,) = judge.score([messages])
        score -= 0.25 * (ids[-1] not in trainer.stop_ids)
        log_probs, reference, values = by_itself(trainer, ids, start)
        rewards = -args.kl_coef * (np.exp(reference - log_probs) - 1 - (reference - log_probs))
        rewards[-1] += score
        advantages, running = np.zeros(len(rewards)), 0.0
        for t in reversed(range(len(rewards))):
            after = values[t + 1] if t + 1 < len(values) else 0.0
            advantages[t] = running = rewards[t] + 0.9 * after - values[t] + 0.9 * 0.8 * running
        rows.append((ids, start, log_probs, values, advantages, rewards))
        mask = rollout.answer_mask[row]
        assert rollout.advantages[row][mask].tolist() == pytest.approx(advantages.tolist(), abs=1e-4)
        assert rollout.returns[row][mask].tolist() == pytest.approx((advantages + values).tolist(), abs=1e-4)
    lengths = [len(row[2]) for row in rows]
    assert len(set(lengths)) > 1 and 0 < seen["end_rate"] < 1 and seen["length"] == pytest.approx(np.mean(lengths))
    assert seen["reward"] == pytest.approx(np.mean([row[5].sum() for row in rows]), abs=1e-4)
    assert seen["kl"] > 1e-4

    shake(trainer.model)
    of_policy, of_critic, ratios = [], [], []
    for ids, start, old_log_probs, old_values, advantages, _ in rows:
        log_probs, _, values = by_itself(trainer, ids, start)
        ratio, returns = np.exp(log_probs - old_log_probs), advantages + old_values
        near = old_values + np.clip(values - old_values, -0.05, 0.05)
        of_policy += list(np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.9, 1.1)))
        of_critic += list(0.5 * np.maximum((values - returns) ** 2, (near - returns) ** 2))
        ratios += list(ratio)
    loss, _, learned = trainer.learn(trainer.model_wrapped, rollout)
    assert loss.item() == pytest.approx(np.mean(of_policy) + 0.4 * np.mean(of_critic), rel=1e-3)
    assert learned["policy_loss"] == pytest.approx(np.mean(of_policy), rel=1e-3, abs=1e-5)
    assert learned["value_loss"] == pytest.approx(np.mean(of_critic), rel=1e-3)
    assert learned["ratio"] == pytest.approx(np.mean(ratios), rel=1e-3) and np.std(ratios) > 0.05
    assert 0 < learned["clip_fraction"] < 1 and learned["value_clip_fraction"] > 0


# A step worked out on paper: an answer of four tokens that ends, and one of two that does not; after each prompt the
# padding is another. gamma = lambda = 0.5, KL coefficient 0.5, penalty for no end 1.5.
SCORES = {"four": 2.8, "two": 1.2}
BY_HAND = {
    "log_probs": [-1.0, -2.0, -0.5, -3.0, -0.7, -1.5],
    "reference": [-1.3, -1.8, 0.0, -3.6, -0.3, -2.3],
    "values": [-1.1, -4.4, 1.0, 0.5, 0.1, 0.3],
}
# KL: 0.3, -0.2, -0.5, 0.6; and -0.4, 0.8. What a token is rewarded with is -0.5 of it, and for the last one the score:
#   -0.15, 0.1, 0.25, -0.3 + 2.8 = 2.5; and 0.2, -0.4 + 1.2 - 1.5 = -0.7.
# Surprises, from the last token to the first, and advantages, each with a quarter of the one after it:
#   2.5 - 0.5               =  2      2
#   0.25 + 0.5 * 0.5 - 1    = -0.5   -0.5  + 0.25 * 2 = 0
#   0.1 + 0.5 * 1 + 4.4     =  5      5    + 0.25 * 0 = 5
#   -0.15 - 0.5 * 4.4 + 1.1 = -1.25  -1.25 + 0.25 * 5 = 0
# and for the other answer
#   -0.7 - 0.3              = -1     -1
#   0.2 + 0.5 * 0.3 - 0.1   =  0.25   0.25 - 0.25 * 1 = 0
# So the advantages are 0, 5, 0, 2 and 0, -1. Their mean is 1, their variance (1 + 16 + 1 + 1 + 1 + 4) / 6 = 4.
RETURNS = [-1.1, 0.6, 1.0, 2.5, 0.1, -0.7]
WHITENED = [-0.5, 2.0, -0.5, 0.5, -0.5, -1.0]
# New probability over old one, loss and its slope for the log-probability, clipped at 0.8 and 1.2; new value, loss and
# slope, clipped 0.3 away from the old value.
LEARNED = [
    (1.1, 0.55, 0.55, -1.0, 0.5 * 0.01, 0.1),
    # Good, and likelier than allowed: no gradient. The value came nearer by more than allowed: none either.
    (1.5, -2.4, 0.0, -3.4, 0.5 * 4.7**2, 0.0),
    # Bad, and less likely than allowed: no gradient. The value has gone away.
    (0.5, 0.4, 0.0, 2.0, 0.5 * 1.0, 1.0),
    # Good, and less likely than allowed: to be made likelier again.
    (0.5, -0.25, -0.25, 0.4, 0.5 * 4.41, -2.1),
    (0.9, 0.45, 0.45, -0.9, 0.5 * 1.0, -1.0),
    # Bad, and likelier than allowed: to be made less likely again.
    (1.5, 1.5, 1.5, -0.2, 0.5 * 0.49, 0.0),
]


class Judge:
    """A reward model that knows two answers."""

    model = None

    def encode(self, messages, tools):
        return [messages[-1]["content"]]

    def score_ids(self, sequences, batch_size):
        return [SCORES[text] for (text,) in sequences]


def placed(numbers, mask, elsewhere=0.0):
    """The numbers of all answers, one after the other, where the mask is True."""
    return torch.full(mask.shape, elsewhere).masked_scatter(mask, tensor(numbers))


@pytest.fixture
def by_hand(place, tmp_path):
    """A trainer whose models say what stands above."""
    write_jsonl(tmp_path / "data" / "rows.jsonl", [{"prompt": "Why?"}, {"prompt": "How long does it last?"}])
    trainer = open_ppo(
        place,
        tmp_path / "out",
        *("--train_file_dir", tmp_path / "data", "--num_mini_batches", 1, "--gamma", 0.5, "--lam", 0.5),
        *("--kl_coef", 0.5, "--missing_eos_penalty", 1.5, "--cliprange", 0.2, "--cliprange_value", 0.3),
        *("--vf_coef", 0.1),
    ).trainer
    trainer.scorer = Judge()
    trainer.answer = lambda tasks, temperature, seed: [
        Answer("four", "stop", 0, 4, (), (65, 66, 67, trainer.stop_ids[0]), tuple(BY_HAND["log_probs"][:4])),
        Answer("two", "length", 0, 2, (), (68, 69), tuple(BY_HAND["log_probs"][4:])),
    ]
    trainer._forward_rollout = lambda ids, attention, mask: (
        placed(BY_HAND["log_probs"], mask),
        torch.zeros(mask.shape),
        placed(BY_HAND["reference"], mask),
        placed(BY_HAND["values"], mask),
    )
    return trainer


def test_what_tokens_are_worth_by_hand(by_hand):
    """From scores, log-probabilities and values to rewards, advantages and returns."""
    rollout, seen = by_hand.roll_out(0)
    mask, lengths = rollout.answer_mask, rollout.attention_mask.sum(dim=1)
    assert mask.sum(dim=1).tolist() == [4, 2] and lengths[0] != lengths[1]
    assert rollout.returns[mask].tolist() == pytest.approx(RETURNS, abs=1e-6)
    assert rollout.advantages[mask].tolist() == pytest.approx(WHITENED, abs=1e-6)
    assert not rollout.returns[~mask].any() and not rollout.advantages[~mask].any()
    # The rewards come to 2.7 and -0.5, the KL to 0.2 and 0.4; returns have the mean 0.4 and the mean square 9.32 / 6.
    expected = {"score": 2.0, "score_std": 0.8, "reward": 1.1, "kl": 0.3, "length": 3.0, "end_rate": 0.5}
    expected["explained_variance"] = 1 - 4 / (9.32 / 6 - 0.16)
    assert {name: seen[name] for name in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("parts", [[[0, 1]], [[0], [1]], [[1], [0]]], ids=str)
def test_what_is_learned_by_hand(by_hand, parts):
    """Loss and gradients of an update in one batch or in two; columns of padding are nothing to learn from."""
    rollout, _ = by_hand.roll_out(0)
    mask = rollout.answer_mask
    ratios, of_policy, slopes, values, of_critic, value_slopes = map(list, zip(*LEARNED, strict=True))
    log_probs = [old + math.log(ratio) for old, ratio in zip(BY_HAND["log_probs"], ratios, strict=True)]
    log_probs, values = (placed(now, mask, elsewhere=9.0).requires_grad_() for now in (log_probs, values))
    by_hand._sums = torch.zeros(7, dtype=torch.float64)
    total = 0.0
    for rows in parts:
        batch = rollout.rows(tensor(rows))
        of_rows = [now[rows, : batch["answer_mask"].shape[1]] for now in (log_probs, values)]
        said = (of_rows[0], None, of_rows[1])
        loss = by_hand.compute_loss(lambda *_, said=said: said, batch, num_items_in_batch=tensor(6))
        loss.backward()
        total += loss.item()
    assert total == pytest.approx((sum(of_policy) + 0.1 * sum(of_critic)) / 6, abs=1e-6)
    assert total == pytest.approx((0.25 + 0.1 * 14.5) / 6, abs=1e-6)
    assert log_probs.grad[mask].tolist() == pytest.approx([slope / 6 for slope in slopes], abs=1e-6)
    assert values.grad[mask].tolist() == pytest.approx([0.1 * slope / 6 for slope in value_slopes], abs=1e-6)
    assert not log_probs.grad[~mask].any() and not values.grad[~mask].any()
    # Ratios add up to 6; two tokens of each are clipped; the move is measured by k3.
    moved = sum(ratio - 1 - math.log(ratio) for ratio in ratios)
    assert by_hand._sums.tolist() == pytest.approx([0.25, 14.5, 6.0, 2, 2, moved, 6], abs=1e-5)


# --- a run -----------------------------------------------------------------------------------------------------------


def logged(folder: Path, name: str) -> list[float]:
    return [row[name] for row in read_json(folder / "metrics.jsonl") if name in row]


@pytest.fixture(scope="module")
def work(place) -> Path:
    """What `place` has, and held-out prompts, a reward adapter, and a reward model that reads other tokens."""
    write_jsonl(place / "held-out" / "rows.jsonl", prompts(3, start=50))
    write_jsonl(place / "pairs" / "rows.jsonl", pairs(4))
    open_stage(
        "reward_modeling.py",
        *("--model_name_or_path", place / "policy", "--train_file_dir", place / "pairs", "--max_steps", 2),
        *("--output_dir", place / "reward-adapter", "--learning_rate", 0.02, "--save_strategy", "no"),
        *("--dataloader_pin_memory", "False"),
    ).finish()
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["cough"])
    save_reward_model(place / "other-rm", tokenizer)
    return place


@pytest.fixture(scope="module")
def alone(work, tmp_path_factory) -> Path:
    """A run in a process of its own, as a user starts it."""
    folder = tmp_path_factory.mktemp("alone")
    more = ("--sample_prompts", 2, "--validation_file_dir", work / "held-out", "--eval_strategy", "steps")
    run_program(STAGE, *ppo_flags(work, folder, *more, "--eval_steps", 1))
    return folder


METRICS = {"score", "score_std", "reward", "kl", "entropy", "ratio", "clip_fraction", "value_loss", "policy_loss"}
METRICS |= {"explained_variance", "length", "end_rate", "kl_coef", "num_tokens", "sampling_gap", "unreadable"}


def test_a_run_leaves_what_the_next_step_needs(work, alone):
    files = {"adapter_model.safetensors", "chat_template.jinja", "generation_config.json", "loss.png", "README.md"}
    assert files | {"run.json", "metrics.jsonl", "samples.jsonl", "answers.jsonl"} <= {p.name for p in alone.iterdir()}
    assert stop_tokens(alone) == [TURN_END, END_OF_TEXT]
    record = read_json(alone / "run.json")
    assert (record["stage"], record["status"]) == ("ppo_training", "finished")
    assert record["plan"]["sequences"] == 8 and all(line["agrees"] is not False for line in record["observed"])
    steps = [row for row in read_json(alone / "metrics.jsonl") if "loss" in row]
    assert len(steps) == 2 and all(row.keys() >= METRICS and row["unreadable"] == 0 for row in steps)
    # Before, after each step, and at the end.
    assert len(logged(alone, "eval_score")) == 4 and len(set(logged(alone, "eval_score"))) > 1
    shown = read_json(alone / "answers.jsonl")
    assert [row["step"] for row in shown] == [1, 1, 2, 2]
    assert all(row.keys() == {"step", "prompt", "answer", "score", "kl", "ended"} for row in shown)
    assert all(row["prompt"].startswith("<|im_start|>user\nQuestion") for row in shown)
    assert [row["before"] != row["after"] for row in read_json(alone / "samples.jsonl")] == [True, True]
    # The adapter is the policy's: on its base, and without the critic's head.
    saved = load_file(alone / "adapter_model.safetensors")
    assert len(saved) == 28 and not any("score" in name or "critic" in name for name in saved)


def test_the_result_is_merged_and_answers(work, alone, tmp_path):
    run_here("merge_peft_adapter.py", "--lora_model", alone, "--output_dir", tmp_path / "merged")
    asked = [[{"role": "user", "content": row["prompt"]}] for row in prompts(3, start=50)]
    adapted, merged = (ChatEngine.from_pretrained(str(folder)) for folder in (alone, tmp_path / "merged"))
    policy = ChatEngine.from_pretrained(str(work / "policy"))
    answers, of_merged, of_policy = (
        [engine.chat(messages).token_ids for messages in asked] for engine in (adapted, merged, policy)
    )
    assert answers == of_merged
    assert answers != of_policy
    assert TURN_END in adapted.tokenizer.decode(sorted(adapted.stop_ids))


def test_the_held_out_score_is_that_of_the_reward_model(work, tmp_path):
    """Of greedy answers, whatever the batch."""
    more = ("--validation_file_dir", work / "held-out", "--rollout_forward_batch_size", 2)
    trainer = open_ppo(work, tmp_path, *more).trainer
    shake(trainer.model)
    metrics = trainer.evaluate()
    scores, lengths = [], []
    for row in trainer.eval_dataset:
        task = trainer.tasks[place_of(row)]
        (answer,) = trainer.answer([row], temperature=0.0)
        scores += trainer.scorer.score([[*task["messages"], {"role": "assistant", "content": answer.text}]])
        lengths.append(len(answer.token_ids))
    assert metrics["eval_score"] == pytest.approx(np.mean(scores), abs=1e-5)
    assert metrics["eval_length"] == pytest.approx(np.mean(lengths)) and len(set(scores)) == 3


# What a run starts from, and flags.
STARTS = {
    "all weights": ["--use_peft", "False"],
    "four bits": ["--load_in_4bit", "True", "--qlora", "True"],
    "reward adapter": ["--reward_model_path", "reward-adapter"],
    "reward adapter, all weights": ["--reward_model_path", "reward-adapter", "--use_peft", "False"],
    "policy adapter": ["--sft_model_path", "alone"],
    "policy adapter, all weights": ["--sft_model_path", "alone", "--use_peft", "False"],
    "critic from a language model": ["--reward_model_path", "other-rm", "--value_model_path", "policy"],
    "accumulated, checkpointing": ["--gradient_accumulation_steps", 2, "--gradient_checkpointing", "True"],
    "bfloat16": ["--bf16", "True"],
    "without whitening, k3": ["--whiten_advantages", "False", "--kl_estimator", "k3"],
}


@pytest.mark.parametrize("start", STARTS)
def test_what_a_run_can_start_from(work, alone, tmp_path, start):
    """The reference is what the policy was: at the first step the KL is 0, and the reference says the same after it."""
    folders = {"alone": alone, **{name: work / name for name in ("policy", "reward-adapter", "other-rm")}}
    opened = open_ppo(work, tmp_path, *[folders.get(flag, flag) for flag in STARTS[start]])
    trainer = opened.trainer
    rollout, seen = trainer.roll_out(0)
    before = trainer._forward_rollout(rollout.input_ids, rollout.attention_mask, rollout.answer_mask)
    assert abs(seen["kl"]) < (1e-6 if start != "bfloat16" else 1e-3)
    if start.startswith("reward adapter"):
        # The critic begins as the reward model, which has read the answer but for its last token.
        ids = rollout.input_ids[0][rollout.attention_mask[0].bool()].tolist()
        (score,) = trainer.scorer.score_ids([ids[:-1]])
        assert rollout.values[0, len(ids) - 2].item() == pytest.approx(score, abs=1e-4)
    opened.finish()
    after = trainer._forward_rollout(rollout.input_ids, rollout.attention_mask, rollout.answer_mask)
    log_probs, _, reference, values = ((old - new).abs().max().item() for old, new in zip(before, after, strict=True))
    assert reference < 1e-6 and log_probs > 1e-3 and values > 1e-3
    assert len(logged(tmp_path, "loss")) == 2 and read_json(tmp_path / "run.json")["status"] == "finished"


def test_the_reference_of_all_weights_is_the_start_at_the_temperature_of_the_answers(place, tmp_path):
    """Both sides of the KL are divided by the temperature, and training moves only the one."""
    trainer = open_ppo(place, tmp_path, "--use_peft", "False", "--temperature", 0.7).trainer
    shake(trainer.policy)
    rollout, seen = trainer.roll_out(0)
    columns = trainer._forward_rollout(rollout.input_ids, rollout.attention_mask, rollout.answer_mask)
    start = AutoModelForCausalLM.from_pretrained(place / "policy").eval()
    gaps = []
    for row, mask in enumerate(rollout.answer_mask):
        ids = rollout.input_ids[row][rollout.attention_mask[row].bool()]
        chosen = mask[: len(ids) - 1]
        for model, found in ((trainer.policy, columns[0]), (start, columns[2])):
            with torch.no_grad():
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            log_probs = (logits / 0.7).log_softmax(dim=-1).gather(1, ids[1:, None])[chosen, 0]
            torch.testing.assert_close(found[row][mask], log_probs, rtol=1e-4, atol=1e-4)
            gaps.append((log_probs - logits.log_softmax(dim=-1).gather(1, ids[1:, None])[chosen, 0]).abs().max())
    assert min(gaps) > 0.1 and abs(seen["kl"]) > 0.1


def test_the_critic_judges_in_float32_on_a_base_in_bfloat16(work, tmp_path):
    """With the head of the reward adapter as it was trained, which peft would round."""
    more = ("--reward_model_path", work / "reward-adapter", "--dtype", "bfloat16")
    trainer = open_ppo(work, tmp_path, *more).trainer
    trainer.model.eval()
    head = load_file(work / "reward-adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
    ids = tensor([trainer.train_dataset[0]["prompt_ids"]])
    with torch.no_grad():
        hidden = trainer.model.critic.get_base_model().model(input_ids=ids).last_hidden_state
        found = token_values(trainer.model.critic, ids, torch.ones_like(ids))
    assert hidden.dtype == torch.bfloat16 and found.dtype == torch.float32
    expected = (hidden.float() @ head[0])[:, :-1]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert (expected - expected.bfloat16()).abs().max() > 1e-4
    assert (expected - (hidden.float() @ head[0].bfloat16().float())[:, :-1]).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", ["adapters", "all weights", "checkpointing on two processes"])
def test_zero_2_and_two_processes_do_what_one_does(work, tmp_path, case):
    more = ["--use_peft", "False", "--learning_rate", 1e-3] if case == "all weights" else []
    more += ["--gradient_accumulation_steps", 2, "--num_mini_batches", 1]
    shared = ["--gradient_checkpointing", "True"] if "checkpointing" in case else ["--deepspeed", "zero2.json"]
    run_program(STAGE, *ppo_flags(work, tmp_path / "two", *more, *shared), processes=2, timeout=400)
    open_ppo(work, tmp_path / "one", *more, "--per_device_train_batch_size", 4).finish()
    assert read_json(tmp_path / "two" / "run.json")["processes"] == 2
    for name in ("loss", "score", "kl", "policy_loss", "value_loss", "entropy", "learning_rate", "num_tokens"):
        expected = logged(tmp_path / "one", name)
        assert len(expected) == 2 and logged(tmp_path / "two", name) == pytest.approx(expected, rel=1e-2, abs=1e-4), (
            name
        )
    assert abs(logged(tmp_path / "two", "kl")[0]) < 1e-6


@pytest.mark.slow
def test_zero_2_goes_on_as_it_would_have(work, tmp_path):
    more = ["--normalize_scores", "True", "--target_reference_kl", 5, "--kl_horizon", 8, "--critic_learning_rate", 0.02]
    more += ["--deepspeed", "zero2.json", "--save_strategy", "steps", "--save_steps", 1]
    run_program(STAGE, *ppo_flags(work, tmp_path, *more), processes=2, timeout=400)
    whole = [row for row in read_json(tmp_path / "metrics.jsonl") if "loss" in row]
    shutil.rmtree(tmp_path / "checkpoint-2")
    run_program(STAGE, *ppo_flags(work, tmp_path, *more, "--resume_from_checkpoint", "True"), processes=2, timeout=400)
    resumed = [row for row in read_json(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in resumed] == [1, 2] and resumed[1]["kl_coef"] < resumed[0]["kl_coef"]
    del whole[1]["seconds"]
    assert {name: resumed[1][name] for name in whole[1]} == pytest.approx(whole[1], rel=1e-4, abs=1e-6)


# --- flags -----------------------------------------------------------------------------------------------------------


def test_the_critic_can_be_trained_alone_and_what_changes_nothing_is_named(work, tmp_path, capsys):
    """At the largest seed, whose samples have seeds of their own as well."""
    more = ("--learning_rate", 0, "--critic_learning_rate", 0.02, "--seed", 2**32 - 2**16, "--max_steps", 1)
    opened = open_ppo(work, tmp_path, *more, "--num_ppo_epochs", 1, "--num_mini_batches", 1, "--cliprange", 0.3)
    assert "--cliprange changes nothing" in capsys.readouterr().err
    model = opened.trainer.model
    before = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    opened.finish()
    moved = {
        name.partition(".")[0]
        for name, weight in model.named_parameters()
        if name in before and not weight.equal(before[name])
    }
    assert moved == {"critic"}
    open_ppo(work, tmp_path / "more", "--num_ppo_epochs", 2, "--num_mini_batches", 1, "--cliprange", 0.3)
    assert "changes nothing" not in capsys.readouterr().err


def test_the_policy_stops_where_it_has_gone_too_far(work, tmp_path):
    open_ppo(work, tmp_path, "--target_kl", 1e-3, "--learning_rate", 0.05).finish()
    assert all(share < 1 for share in logged(tmp_path, "updates"))


def test_the_kl_coefficient_is_adapted_in_a_run(work, tmp_path):
    open_ppo(work, tmp_path, "--target_reference_kl", 5, "--kl_horizon", 8, "--max_steps", 3).finish()
    # Far below the target each time: a fifth of 4 answers of 8.
    assert logged(tmp_path, "kl_coef") == pytest.approx([0.05, 0.05 * 0.9, 0.05 * 0.9**2])


# Rate of the policy, of the critic, ratio of LoRA+.
RATES = [(1e-3, 5e-3, 4), (1e-3, None, 4), (1e-3, 5e-3, None), (1e-3, 5e-3, 0.5), (0.0, 5e-3, 4)]


@pytest.mark.parametrize(("rate", "critic_rate", "ratio"), RATES)
def test_the_critics_rate_and_the_ratio_of_lora_plus(work, tmp_path, rate, critic_rate, ratio):
    """The ratio multiplies the rate that the rest of the same model has; the policy may stand still."""
    more = ["--learning_rate", rate, "--weight_decay", 0.1, "--max_steps", 1]
    more += [] if critic_rate is None else ["--critic_learning_rate", critic_rate]
    more += [] if ratio is None else ["--loraplus_lr_ratio", ratio]
    opened = open_ppo(work, tmp_path, *more)
    trained = {name: weight for name, weight in opened.trainer.model.named_parameters() if weight.requires_grad}
    names = {id(weight): name for name, weight in trained.items()}
    groups = opened.trainer.create_optimizer().param_groups
    found = [(names[id(one)], group["lr"], group["weight_decay"]) for group in groups for one in group["params"]]
    expected = {}
    for name in trained:
        of_model = critic_rate if name.startswith("critic.") and critic_rate is not None else rate
        expected[name] = of_model * (ratio or 1) if ".lora_B." in name else of_model
    assert sorted(name for name, *_ in found) == sorted(expected)
    assert {name: own for name, own, _ in found} == pytest.approx(expected)
    assert {decay for *_, decay in found} == {0.1}
    assert len(set(expected.values())) == (2 if None in (ratio, critic_rate) else 4 if rate else 3)
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    opened.finish()
    moved = {name.partition(".")[0] for name, weight in trained.items() if not torch.equal(weight, before[name])}
    assert moved == ({"policy", "critic"} if rate else {"critic"})


def test_scores_are_logged_as_they_are(work, tmp_path):
    """Normalized, clipped and penalized is only what is learned from."""
    open_ppo(work, tmp_path / "plain", "--max_steps", 1, "--missing_eos_penalty", 0).finish()
    changed = ("--normalize_scores", "True", "--score_clip", 0.5, "--missing_eos_penalty", 2)
    open_ppo(work, tmp_path / "shaped", "--max_steps", 1, *changed).finish()
    plain, shaped = ({name: logged(tmp_path / run, name)[0] for name in METRICS} for run in ("plain", "shaped"))
    assert shaped["score"] == plain["score"] == plain["reward"]
    # Clipped scores are within 0.5, and answers without an end lose two.
    assert shaped["reward"] <= 0.5 - 2 * (1 - shaped["end_rate"]) and shaped["end_rate"] < 1


REFUSED = [
    (["--kl_horizon", "100"], "--kl_horizon has no effect without --target_reference_kl"),
    (["--target_reference_kl", "5", "--kl_coef", "0"], "cannot adapt --kl_coef 0"),
    (["--temperature", "0"], "--temperature 0.0 must be above 0"),
    (["--response_length", "1024"], "leaves no room for a prompt"),
    (["--num_ppo_epochs", "0"], "--num_ppo_epochs 0 must be at least 1"),
    (["--gamma", "1.1"], "--gamma 1.1 must be between 0 and 1"),
    (["--lam", "-0.1"], "--lam -0.1 must be between 0 and 1"),
    (["--cliprange", "0"], "--cliprange 0.0 must be above 0"),
    (["--missing_eos_penalty", "-1"], "--missing_eos_penalty -1.0 must be 0 or more"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_flags_without_effect_or_out_of_range_are_refused(more, message):
    (args,) = parse_args(PpoArguments, argv=["--reward_model_path", "rm", *more])
    with pytest.raises(UserError, match=message):
        check_flags(args)


def test_a_missing_reward_model_is_refused_with_the_way_to_one(work, tmp_path):
    flags = [flag for flag in ppo_flags(work, tmp_path) if flag not in ("--reward_model_path", work / "rm")]
    with pytest.raises(UserError, match="--reward_model_path is missing. Train one: python reward_modeling.py"):
        open_stage(STAGE, *flags)
    with pytest.raises(UserError, match="a language model, without a scoring head"):
        open_ppo(work, tmp_path, "--reward_model_path", work / "policy")


def test_a_critic_that_reads_other_tokens_is_refused(work, tmp_path):
    with pytest.raises(UserError, match="the policy's tokenizer, which gets a new head: --value_model_path") as error:
        open_ppo(work, tmp_path, "--reward_model_path", work / "other-rm")
    assert f"--reward_model_path {work / 'other-rm'} has another tokenizer" in str(error.value)
    assert str(error.value).endswith(str(work / "policy"))


def test_an_adapter_of_a_language_model_is_no_critic(work, alone, tmp_path):
    with pytest.raises(UserError, match="is an adapter of a language model. Merge it"):
        open_ppo(work, tmp_path, "--value_model_path", alone)


def test_long_prompts_are_refused_by_place_or_counted(work, tmp_path):
    file = write_jsonl(tmp_path / "data" / "rows.jsonl", [*prompts(4), {"prompt": "long " * 30}])
    flags = ("--train_file_dir", tmp_path / "data", "--model_max_length", 100)
    with pytest.raises(UserError, match="longer than the 95 that leave room for the answer") as error:
        open_ppo(work, tmp_path / "out", *flags, "--long_rows", "refuse")
    assert f"{file}:5" in str(error.value)
    advised = re.search(r"all rows fit with (--model_max_length \d+ --response_length 5)", str(error.value))[1].split()
    fitting = open_ppo(work, tmp_path / "all", *flags[:2], *advised, "--long_rows", "refuse")
    assert len(fitting.trainer.train_dataset) == 5
    opened = open_ppo(work, tmp_path / "out", *flags)
    assert len(opened.trainer.train_dataset) == 4
    assert list(opened.run.record["data"][0]["left_out"].values()) == [1]


def test_rows_of_all_tasks_are_prompts(work, tmp_path):
    """Rows of fine-tuning, of preferences and of GRPO; what was said before the last question stays."""
    said = ("I cough.", "Since when?", "A week.", "See a doctor.")
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, said, strict=True)]
    rows = [
        {"question": "What is 2 + 2?", "answer": "4", "type": "number"},
        {"prompt": "What helps?", "chosen": "Rest.", "rejected": "Nothing."},
        {"messages": turns},
    ]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    trainer = open_ppo(work, tmp_path / "out", "--train_file_dir", tmp_path / "data").trainer
    texts = [trainer.processing_class.decode(row["prompt_ids"]) for row in trainer.train_dataset]
    assert all(text.endswith("<|im_start|>assistant\n") for text in texts)
    assert "What is 2 + 2?" in texts[0] and "What helps?" in texts[1] and "See a doctor" not in texts[2]
    assert all(text in texts[2] for text in said[:3])


class Asked(Exception):
    """Ends a step where it would begin to answer its prompts."""


def asked(trainer, steps):
    """The prompts of so many steps, without answers to them."""
    found = []

    def note(rows, *args, **kwargs):
        found.extend(trainer.tasks[place_of(row)]["messages"][-1]["content"] for row in rows)
        raise Asked

    trainer.answer = note
    for step in range(steps):
        with pytest.raises(Asked):
            trainer.roll_out(step)
    return found


def test_each_epoch_has_an_order_of_its_own(work, tmp_path):
    """It follows from the seed, and each prompt comes once, also where an epoch ends within a step."""
    write_jsonl(tmp_path / "data" / "rows.jsonl", prompts(7))
    orders = {}
    for name, more in {
        "one": (),
        "again": ("--temperature", 0.7),
        "seed": ("--seed", 1),
        "data": ("--data_seed", 2),
    }.items():
        trainer = open_ppo(work, tmp_path / "out", "--train_file_dir", tmp_path / "data", *more).trainer
        torch.manual_seed(len(orders))
        # Steps of four prompts: seven of them are four epochs.
        orders[name] = asked(trainer, 7)
    for order in orders.values():
        epochs = [tuple(order[start : start + 7]) for start in range(0, 28, 7)]
        assert all(sorted(epoch) == sorted(row["prompt"] for row in prompts(7)) for epoch in epochs)
        assert len(set(epochs)) == 4
    assert orders["one"] == orders["again"]
    assert len({tuple(order) for order in orders.values()}) == 3


def test_held_out_prompts_are_not_trained_on(work, tmp_path):
    """Nor is another answer to the same prompt another prompt."""
    write_jsonl(tmp_path / "held-out" / "rows.jsonl", [*prompts(2, start=50), {**prompts(1)[0], "response": "Yes."}])
    flags = ("--validation_file_dir", tmp_path / "held-out")
    with pytest.raises(UserError, match="1 of 3 held-out prompts are also trained on"):
        open_ppo(work, tmp_path / "out", *flags)
    opened = open_ppo(work, tmp_path / "out", *flags, "--allow_overlap", "True")
    assert len(opened.trainer.eval_dataset) == 3


# --- learning --------------------------------------------------------------------------------------------------------


class Arms:
    """A reward model with two arms: the answer `a` is worth 1, all others 0."""

    model = None

    def encode(self, messages, tools):
        return list(messages[-1]["content"].encode())

    def score_ids(self, sequences, batch_size):
        return [float(ids[:1] == list(b"a")) for ids in sequences]


def test_ppo_learns_which_arm_is_better(tmp_path):
    """A policy that answers `a` or `b`, half and half, comes to answer `a`."""
    tokenizer, question = tiny_tokenizer(), {"prompt": "a or b?"}
    place, arms = make_place(tmp_path, [question]), tokenizer.convert_tokens_to_ids(["a", "b"])
    asked = [{"role": "user", "content": question["prompt"]}]
    ids = tensor([tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)])

    def probabilities(model):
        with torch.no_grad():
            return model(input_ids=ids).logits[0, -1].softmax(dim=-1)[arms].tolist()

    model = AutoModelForCausalLM.from_pretrained(place / "policy")
    with torch.no_grad():
        # Where the answer begins, both arms have the logit 12 and all other tokens 0.
        hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
        model.lm_head.weight.zero_()
        model.lm_head.weight[arms] = 12 * hidden / hidden.square().sum()
    model.save_pretrained(place / "policy")
    assert probabilities(model) == pytest.approx([0.5, 0.5], abs=0.01)
    trainer = open_ppo(
        place,
        tmp_path / "out",
        *("--use_peft", "False", "--response_length", 1, "--missing_eos_penalty", 0, "--max_steps", 30),
        *("--per_device_train_batch_size", 8, "--learning_rate", 2e-3, "--lr_scheduler_type", "constant"),
    ).trainer
    trainer.scorer = Arms()
    trainer.train()
    good, bad = probabilities(trainer.policy)
    assert good > 0.95 and bad < 0.05
    scores = [log["score"] for log in trainer.state.log_history if "score" in log]
    assert np.mean(scores[:3]) < 0.8 and np.mean(scores[-3:]) > 0.9


# --- what of transformers and accelerate is built upon ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("_inner_training_loop", "compute_loss", "evaluate", "log", "_save"),
        *("_load_from_checkpoint", "_load_best_model"),
    ],
)
def test_what_is_overridden_is_there(name):
    """A method under a name that transformers has given up would never be called."""
    assert name in vars(PpoTrainer) and name in vars(Trainer)


LOOP = {
    "_init_training_state": ["max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint"],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_maybe_log_save_evaluate": ["tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval"],
    "_finalize_training": ["trial", "num_train_samples", "start_time"],
    "_load_rng_state": ["checkpoint"],
    "_evaluate": ["trial", "ignore_keys_for_eval", "skip_scheduler"],
    "_get_learning_rate": [],
    "_clip_grad_norm": ["model"],
    "_get_grad_norm": ["model", "grad_norm"],
}


@pytest.mark.parametrize("name", LOOP)
def test_what_the_loop_calls_takes_what_it_is_given(name):
    parameters = list(inspect.signature(getattr(Trainer, name)).parameters)[1:]
    assert parameters[: len(LOOP[name])] == LOOP[name]


def test_accelerate_is_told_which_batch_is_the_last():
    state = GradientState()
    before = state.sync_gradients
    try:
        for value in (False, True):
            state._set_sync_gradients(value)
            assert state.sync_gradients is value
    finally:
        state._set_sync_gradients(before)
