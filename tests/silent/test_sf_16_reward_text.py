"""The reward is of the text that was sampled, for the prompt it was sampled for, and padding is never part of it."""

from tests.silent.tasks import first_batches, noted, open_tasks, tasks
from tests.tiny import make_tiny

import pytest
import torch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("sf16"))


def trained_rows(batches):
    """(prompt ids, answer ids, advantage) of each answer, padding taken off by the masks that the loss goes by."""
    for batch in batches:
        for n in range(len(batch["advantages"])):
            prompt, answer = (
                batch[f"{name}_ids"][n][batch[f"{name}_mask"][n].bool()].tolist() for name in ("prompt", "completion")
            )
            yield prompt, answer, batch["advantages"][n].item()


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_grpo_judges_what_it_trains(model, tmp_path, scale):
    opened = open_tasks(model, tmp_path, tasks(6), "--scale_rewards", scale, "--temperature", 0.9)
    batches = first_batches(opened)
    decode, rows = opened.tokenizer.decode, noted(tmp_path)
    assert len(rows) == 8 and len({len(row["ids"]) for row in rows}) > 1
    # An answer ends with its stop token or at the limit, and the text is that of its tokens.
    stops = set(opened.options["stop_ids"])
    for row in rows:
        assert not stops & set(row["ids"][:-1]) and (row["ids"][-1] in stops or len(row["ids"]) == 8)
        assert row["text"] == decode(row["ids"], skip_special_tokens=True)
    # Advantages by hand, from the rewards in the order in which they were given: four of a group together.
    rewards = torch.tensor([row["reward"] for row in rows]).view(2, 4)
    spread = {"group": rewards.std(dim=1, keepdim=True), "none": torch.tensor(1 - 1e-4), "batch": rewards.std()}[scale]
    advantages = ((rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-4)).flatten().tolist()
    wanted = []
    for row, advantage in zip(rows, advantages, strict=True):
        prompt = opened.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        wanted.append((prompt, row["ids"], pytest.approx(advantage, abs=1e-5)))
    found = sorted(trained_rows(batches), key=lambda row: row[:2])
    assert found == sorted(wanted, key=lambda row: row[:2])
    # Each group is of one prompt, and a field of a row goes with its prompt.
    for group in (rows[:4], rows[4:]):
        assert len({row["place"] for row in group}) == 1
        assert {row["prompt"][-1]["content"].partition("?")[0] for row in group} == {group[0]["answer"]}


def test_grpo_padding_changes_nothing(model, tmp_path):
    """The loss of a padded batch is that of its answers one by one, padded to nothing."""
    opened = open_tasks(model, tmp_path, tasks(6), "--loss_type", "grpo", "--num_iterations", 2)
    (trainer, batches), alone = (opened.trainer, first_batches(opened)), []
    batch = batches[0]
    batch["old_per_token_logps"] = batch["old_per_token_logps"] - 0.3
    assert not batch["completion_mask"].all() or not batch["prompt_mask"].all()
    trainer.current_gradient_accumulation_steps = 1
    for n, (prompt, answer, _) in enumerate(trained_rows([batch])):
        one = {
            "prompt_ids": torch.tensor([prompt]),
            "prompt_mask": torch.ones(1, len(prompt), dtype=torch.long),
            "completion_ids": torch.tensor([answer]),
            "completion_mask": torch.ones(1, len(answer), dtype=torch.long),
            "advantages": batch["advantages"][n : n + 1],
            "old_per_token_logps": batch["old_per_token_logps"][n : n + 1, : len(answer)],
            "num_items_in_batch": batch["num_items_in_batch"],
        }
        alone.append(trainer.compute_loss(trainer.model, one).item())
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(sum(alone) / len(alone), abs=1e-5)
    assert max(map(abs, alone)) > 0.1


def test_grpo_answers_that_nothing_judges_teach_nothing(model, tmp_path):
    """`accuracy` does not apply to rows without an answer: their advantages are 0, and the other group is untouched."""
    rows = [{"question": "1?"}, {"question": "2?", "answer": "B", "type": "choice"}]
    more = ("--reward_funcs", "accuracy", "noted", "--reward_weights", 1, 0, "--shuffle_dataset", "False")
    opened = open_tasks(model, tmp_path, rows, *more)
    rewards, calculate = [], opened.trainer._calculate_rewards

    def noting(*args):
        rewards.append(calculate(*args))
        return rewards[-1]

    opened.trainer._calculate_rewards = noting
    batches = first_batches(opened)
    assert rewards[0][:4, 0].isnan().all() and (rewards[0][4:, 0] == 0).all()
    assert all((batch["advantages"] == 0).all() for batch in batches)
