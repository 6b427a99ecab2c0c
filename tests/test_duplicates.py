"""Duplicates: exact and near ones are found in Chinese and English, and nothing else is."""

import random

from medicalgpt.data.duplicates import NearDuplicates, exact_duplicates, shingles, similarity

import numpy as np
import pytest

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 2000)]


def chat(question: str, answer: str) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "tools": None}


def text(rng: random.Random, length: int = 300) -> str:
    return "".join(rng.choices(HAN, k=length))


def changed(text: str, rng: random.Random, characters: int) -> str:
    """Each change of a character replaces five shingles."""
    parts = list(text)
    for position in rng.sample(range(len(parts)), characters):
        parts[position] = rng.choice(HAN)
    return "".join(parts)


def test_exact_duplicates_ignore_white_space_only():
    assert exact_duplicates([chat("问", "答"), chat("问 ", "答"), chat("问", "答案"), chat("", "问答")]) == {1: 0}
    rows = [chat("问 a", "答"), chat("问  a", "答"), chat("问 b", "答"), chat("问\na", "答")]
    assert exact_duplicates(rows) == {1: 0, 3: 0}


def test_preferences_with_other_answers_are_not_duplicates():
    prompt = chat("问", "答")["messages"][:1]
    answers = [{"role": "assistant", "content": word} for word in "甲乙丙"]
    rows = [
        {"messages": prompt, "tools": None, "chosen": answers[0], "rejected": answers[1]},
        {"messages": prompt, "tools": None, "chosen": answers[0], "rejected": answers[2]},
    ]
    assert exact_duplicates(rows) == {} and exact_duplicates([*rows, rows[0]]) == {2: 0}


def test_similarity_is_that_of_the_sets_of_runs():
    # abcde bcdef cdefg against abcde bcdef cdefh: 2 of 4.
    assert similarity(shingles("abcdefg"), shingles("abcdefh")) == 0.5
    assert similarity(shingles("A b，c\ndefg"), shingles("ab,CDEFG")) == 1
    assert similarity(shingles("短"), shingles("短")) == 1 and similarity(shingles("短"), shingles("长")) == 0
    assert len(shingles("")) == 1


def test_near_duplicates_are_found_and_others_are_not():
    rng = random.Random(0)
    rows = [{"text": text(rng)} for _ in range(300)]
    # Up to 4 changes of 300 characters keep at least 276 of 296 runs: a similarity of 0.87 or more.
    near = {300 + number: 2 * number for number in range(30)}
    rows += [{"text": changed(rows[other]["text"], rng, 4)} for other in near.values()]
    # 20 changes leave about two thirds of the runs, a similarity below 0.6.
    rows += [{"text": changed(rows[other]["text"], rng, 20)} for other in range(100, 130)]
    found = {pair.other: pair.one for group in NearDuplicates(rows, 0.8).groups({}) for pair in group}
    assert found == near
    for group in NearDuplicates(rows, 0.8).groups({}):
        for pair in group:
            assert pair.similarity == similarity(shingles(rows[pair.one]["text"]), shingles(rows[pair.other]["text"]))


def test_a_group_is_one_and_exact_duplicates_are_left_to_others():
    rng = random.Random(1)
    first = text(rng)
    rows = [{"text": changed(first, rng, 2)} for _ in range(40)]
    rows += [rows[0]]
    (group,) = NearDuplicates(rows, 0.8).groups(exact_duplicates(rows))
    assert len(group) == 39 and {40}.isdisjoint(position for pair in group for position in (pair.one, pair.other))


@pytest.mark.parametrize("shared", [0, 7])
def test_rows_of_two_sets(shared):
    rng = random.Random(2)
    train = [{"text": text(rng)} for _ in range(200)]
    held_out = [{"text": changed(row["text"], rng, 3)} for row in train[100 : 100 + shared]]
    held_out += [{"text": text(rng)} for _ in range(50)]
    found = NearDuplicates(train, 0.8).shared_with(NearDuplicates(held_out, 0.8))
    assert [(pair.one, pair.other) for pair in found] == [(100 + number, number) for number in range(shared)]
    assert all(0.8 <= pair.similarity < 1 for pair in found)


def test_recall_at_the_threshold():
    """Of pairs with a similarity close to the threshold nearly all are found, and none below it."""
    rng = random.Random(3)
    rows, true = [], set()
    for number in range(200):
        one = text(rng, 200)
        other = changed(one, rng, 4)
        rows += [{"text": one}, {"text": other}]
        if similarity(shingles(one), shingles(other)) >= 0.8:
            true.add(2 * number)
    found = {pair.one for group in NearDuplicates(rows, 0.8).groups({}) for pair in group}
    assert found <= true and len(true) > 50 and len(found) >= 0.97 * len(true)


def test_memory_of_a_row():
    assert NearDuplicates([{"text": "x"}] * 3, 0.8).signatures.nbytes == 3 * 504
    assert NearDuplicates([], 0.8).groups({}) == []
    assert NearDuplicates([], 0.8).shared_with(NearDuplicates([{"text": "x"}], 0.8)) == []
    assert np.array_equal(shingles("一二三四五"), shingles(" 一二 三四五"))
