"""The reward is of the text that was written, at its last token, and padding is nothing to learn from."""

import json
import shutil
from unittest.mock import patch

from medicalgpt.errors import UserError
from medicalgpt.readers.problems import place_of
from medicalgpt.rewards.scoring import RewardScorer
from medicalgpt.serving.generation import REPLACEMENT
from tests.families import FAMILIES, family_tokenizer
from tests.helpers import read_json, write_jsonl
from tests.silent.pairs import shake
from tests.silent.ppo import make_place, open_ppo, prompts, save_reward_model

import pytest
import torch

HISTORY = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "I cough."},
    {"role": "assistant", "content": "Since when?"},
    {"role": "user", "content": "A week."},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """With a reward model of another family: other token ids, another chat template."""
    folder = make_place(tmp_path_factory.mktemp("sf16"), [*prompts(5), {"messages": HISTORY}])
    save_reward_model(folder / "other-rm", family_tokenizer(FAMILIES["llama"]))
    return folder


def as_other(place, *more):
    return "--reward_model_path", place / "other-rm", "--value_model_path", place / "rm", *more


def real(rollout, row):
    """Ids of a prompt and its answer, taken from what is learned from."""
    return rollout.input_ids[row][rollout.attention_mask[row].bool()].tolist()


def written(rollout, row):
    """Ids of an answer, taken from what is learned from."""
    return rollout.input_ids[row, 1:][rollout.answer_mask[row]].tolist()


@pytest.mark.parametrize("other", [False, True])
def test_the_text_that_is_scored_is_the_text_that_was_written(place, tmp_path, other):
    flags = ("--missing_eos_penalty", 0, "--kl_coef", 0)
    trainer = open_ppo(place, tmp_path, *flags, *(as_other(place) if other else ())).trainer
    judge = RewardScorer.from_pretrained(str(place / ("other-rm" if other else "rm")))
    prompts_of = {tuple(row["prompt_ids"]): trainer.tasks[place_of(row)] for row in trainer.train_dataset}
    with_history = 0
    for step in range(3):
        rollout, seen = trainer.roll_out(step)
        scores = []
        for row in range(4):
            whole, answer = real(rollout, row), written(rollout, row)
            messages = prompts_of[tuple(whole[: -len(answer)])]["messages"]
            # Bytes that are not a whole character yet are not text.
            text = trainer.processing_class.decode(answer, skip_special_tokens=True).rstrip(REPLACEMENT)
            scores += judge.score([[*messages, {"role": "assistant", "content": text}]])
            with_history += len(messages) > 1
            # Without discount or KL, what is to come is the score, all of it paid at the last token.
            returns = rollout.returns[row]
            assert returns[len(whole) - 2].item() == pytest.approx(scores[-1], abs=1e-4)
            assert not returns[~rollout.answer_mask[row]].any()
            assert not rollout.advantages[row][~rollout.answer_mask[row]].any()
        assert seen["score"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)
        assert len({round(score, 4) for score in scores}) == len(scores)
    assert with_history == 2


def test_answers_are_written_after_the_prompt_that_is_learned_from(place, tmp_path):
    """History, system prompt and all, whatever stands beside it in the batch."""
    trainer = open_ppo(place, tmp_path).trainer
    given, generate = [], trainer.policy.generate

    def noting(**inputs):
        rows = zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
        given.extend(ids[real].tolist() for ids, real in rows)
        return generate(**inputs)

    trainer.policy.generate = noting
    learned = []
    for step in range(3):
        rollout, _ = trainer.roll_out(step)
        for row in range(4):
            learned.append(real(rollout, row)[: -len(written(rollout, row))])
    assert sorted(given) == sorted(learned)
    with_history = trainer.processing_class.apply_chat_template(HISTORY, add_generation_prompt=True, return_dict=False)
    assert list(with_history) in given
    assert {tuple(ids) for ids in given} == {tuple(row["prompt_ids"]) for row in trainer.train_dataset}


def test_padding_changes_nothing(place, tmp_path):
    """Columns of padding on the right, with nonsense in them, and batches of any size."""
    trainer = open_ppo(place, tmp_path, "--num_mini_batches", 1, "--num_ppo_epochs", 1).trainer
    trainer.train()
    rollout, _ = trainer.roll_out(2)
    trainer.args.rollout_forward_batch_size = 1
    alone, _ = trainer.roll_out(2)
    for name, values in vars(alone).items():
        assert torch.allclose(values.float(), vars(rollout)[name].float(), atol=1e-5), name
    padded = {}
    for name, values in vars(rollout).items():
        filling = {"attention_mask": 0, "answer_mask": False, "input_ids": 7}.get(name, 9.0)
        padded[name] = torch.cat([values, torch.full((len(values), 6), filling, dtype=values.dtype)], dim=1)
    shake(trainer.model)
    found = []
    for values in (vars(rollout), padded):
        trainer.model.zero_grad()
        tokens = rollout.answer_mask.sum()
        trainer._sums = torch.zeros_like(trainer._sums)
        loss = trainer.compute_loss(trainer.model, values, num_items_in_batch=tokens)
        loss.backward()
        gradients = [weight.grad.clone() for weight in trainer.model.parameters() if weight.grad is not None]
        sums = torch.cat([loss.detach()[None], trainer._sums])
        found.append((sums, torch.cat([gradient.flatten() for gradient in gradients])))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-4) and found[0][0][0] != 0
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5) and found[0][1].abs().max() > 1e-3


def test_a_longer_prompt_beside_it_changes_no_answer(place, tmp_path):
    """Each answer, its scores and its log-probabilities are those that it has alone."""
    write_jsonl(tmp_path / "data" / "rows.jsonl", [*prompts(3), {"prompt": "Long. " * 60}])
    trainer = open_ppo(place, tmp_path / "out", "--train_file_dir", tmp_path / "data").trainer
    shake(trainer.model)
    trainer.args.whiten_advantages = False
    rows = list(trainer.train_dataset)
    tasks = [trainer.tasks[place_of(row)] for row in rows]
    # Prompts are answered as they were encoded, not rendered a second time.
    with patch.object(type(trainer.processing_class), "apply_chat_template", side_effect=AssertionError):
        together = trainer.answer(rows, 1.0, seed=11)
    for number, (row, answer) in enumerate(zip(rows, together, strict=True)):
        (alone,) = trainer.answer([row], 1.0, seed=11 + number)
        assert alone.token_ids == answer.token_ids
    scores, _ = trainer.score(tasks, together)
    for task, answer, score in zip(tasks, together, scores.tolist(), strict=True):
        assert trainer.score([task], [answer])[0].item() == pytest.approx(score, abs=1e-5)


def test_an_answer_that_cannot_be_scored_gets_the_lowest_score(place, tmp_path):
    """And is counted."""
    trainer = open_ppo(place, tmp_path).trainer
    encode, texts = trainer.scorer.encode, []

    def refusing(messages, tools):
        texts.append(messages[-1]["content"])
        if len(texts) == 2:
            messages = [*messages[:-1], {"role": "assistant", "content": "<|im_end|>"}]
        return encode(messages, tools)

    trainer.scorer.encode = refusing
    rows = [trainer.train_dataset[number] for number in range(4)]
    scores, unreadable = trainer.score(
        [trainer.tasks[place_of(row)] for row in rows], trainer.answer(rows, 1.0, seed=3)
    )
    assert unreadable.tolist() == [False, True, False, False]
    assert scores[1] == scores.min() and len(set(scores.tolist())) == 3


def test_prompts_that_cannot_be_scored_are_refused_by_place(place, tmp_path):
    shutil.copytree(place / "rm", tmp_path / "rm")
    config = read_json(tmp_path / "rm" / "config.json") | {"max_position_embeddings": 60}
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config))
    rows = write_jsonl(tmp_path / "data" / "rows.jsonl", [*prompts(3), {"prompt": "Long. " * 9}])
    flags = ("--reward_model_path", tmp_path / "rm", "--value_model_path", place / "policy")
    flags += ("--train_file_dir", tmp_path / "data")
    with pytest.raises(UserError, match=r"1 prompt\(s\) cannot be scored by --reward_model_path") as error:
        open_ppo(place, tmp_path / "out", *flags)
    assert f"{rows}:4" in str(error.value) and "longer than the 60 of the reward model" in str(error.value)


def test_a_step_without_a_score_is_counted_and_goes_on(place, tmp_path):
    trainer = open_ppo(place, tmp_path, "--missing_eos_penalty", 0).trainer
    trainer.scorer.context_length = 4
    _, seen = trainer.roll_out(0)
    assert seen["unreadable"] == 1 and seen["score"] == 0 and abs(seen["reward"]) < 1e-6
