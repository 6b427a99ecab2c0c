"""SF 39: rewards see the stop token as a part of the answer, or cannot see that the answer ended."""

from medicalgpt.models.templating import reply_text
from medicalgpt.rewards.rewards import format_reward
from tests.silent.tasks import noted, open_tasks, tasks
from tests.tiny import make_tiny, tiny_tokenizer

import pytest

REPLY = "<think>a</think><answer>b</answer>"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("sf39") / "model", max_position_embeddings=1024)


@pytest.mark.parametrize("special", [True, False])
def test_a_reply_ends_at_its_stop_token(special):
    """Whether the tokenizer flags it as special or not, and whatever comes after it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<end>", "<pad2>"], special_tokens=special)
    end, pad = tokenizer.convert_tokens_to_ids(["<end>", "<pad2>"])
    ids = tokenizer.encode(REPLY, add_special_tokens=False)
    for answer in ([*ids, end], [*ids, end, pad, pad], ids):
        text = reply_text(tokenizer, answer, [end])
        assert text == REPLY and format_reward([text]) == [1.0]


def test_tags_that_are_special_tokens_stay():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    ids = [*tokenizer.encode(REPLY, add_special_tokens=False), tokenizer.eos_token_id]
    assert reply_text(tokenizer, ids, [tokenizer.eos_token_id]) == REPLY


def test_rewards_see_an_answer_without_its_end(model, tmp_path):
    """Also if the tokenizer does not flag the turn end as special, so that TRL decodes it as text."""
    opened = open_tasks(model, tmp_path, tasks(2))
    trainer, tokenizer = opened.trainer, opened.tokenizer
    ids = tokenizer.encode(REPLY, add_special_tokens=False)
    (end,) = tokenizer.encode("!", add_special_tokens=False)
    trainer.eos_token_ids = [end]
    rows = trainer.train_dataset[:2]
    rows = [{name: values[n] for name, values in rows.items()} for n in range(2)]
    wrong = [[{"role": "assistant", "content": "as TRL decodes it"}]] * 2
    trainer.model.eval()
    trainer._calculate_rewards(rows, [row["prompt"] for row in rows], wrong, [[*ids, end], ids])
    assert [row["text"] for row in noted(tmp_path)] == [REPLY] * 2
