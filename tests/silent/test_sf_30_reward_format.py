"""SF 30: the format reward misses replies of many lines, or those whose `<think>` the template has written already."""

from medicalgpt.formats.answers import extract_answer
from medicalgpt.rewards import rewards

import pytest

THOUGHT = "\n体重 20 kg，每公斤 10 mg。\n\n20 × 10 = 200\n"
ANSWER = "\n200 mg\n\n（分两次）\n"


@pytest.mark.parametrize("opening", ["<think>", "", "\n<think>", "<think>\n", "\n"], ids=repr)
@pytest.mark.parametrize("between", ["", "\n", "\n\n", " \r\n"], ids=repr)
@pytest.mark.parametrize("end", ["", "\n", " \n\n"], ids=repr)
@pytest.mark.parametrize("thought, answer", [("一", "二"), (THOUGHT, ANSWER), (THOUGHT.replace("\n", "\r\n"), ANSWER)])
def test_many_lines_with_and_without_the_opening_tag(opening, between, end, thought, answer):
    text = f"{opening}{thought}</think>{between}<answer>{answer}</answer>{end}"
    as_message = [{"role": "assistant", "content": text}]
    assert rewards.format_reward([text, as_message]) == [1.0, 1.0]
    assert extract_answer(text) == answer.strip()


def test_the_reward_is_not_the_same_for_every_reply():
    text = f"{THOUGHT}</think><answer>{ANSWER}</answer>"
    assert rewards.format_reward([text, text + "!", text + text, text.replace("</think>", "")]) == [1.0, 0.5, 0.0, 0.5]


def test_accuracy_reads_the_answer_of_many_lines():
    text = f"{THOUGHT}</think>\n<answer>\n200 mg\n</answer>\n"
    assert rewards.accuracy_reward([text], answer=["200 mg"], type=["number"]) == [1.0]
