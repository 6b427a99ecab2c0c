"""Sources mixed by weight: the shares that were asked for, no row lost without being counted."""

from collections import Counter
from fractions import Fraction
from functools import partial

from medicalgpt.args import DataArguments
from medicalgpt.data.encoding import encode_document
from medicalgpt.data.loading import load_data
from medicalgpt.data.tokenizing import encode_rows
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_text
from medicalgpt.readers.mixing import draw, mixture_sizes, parse_sources
from tests.helpers import write_jsonl
from tests.tiny import tiny_tokenizer

import pytest

THIRDS = [Fraction(1, 3), Fraction(2, 3)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def folders(tmp_path):
    """a: 30 documents in two files and a held-out one; b: 12 documents and one that is empty."""
    write_jsonl(tmp_path / "a" / "one.jsonl", [{"text": f"a{n}"} for n in range(20)])
    write_jsonl(tmp_path / "a" / "two.jsonl", [{"text": f"a{n} " + "x" * 30} for n in range(20, 30)])
    write_jsonl(tmp_path / "a" / "validation.jsonl", [{"text": "held out a"}])
    write_jsonl(tmp_path / "b" / "one.jsonl", [*({"text": f"b{n}"} for n in range(12)), {"text": ""}])
    write_jsonl(tmp_path / "b" / "test.jsonl", [{"text": "held out b"}])
    return tmp_path


def mixed(tokenizer, place, seed=0, **flags):
    """The data, and the texts of an epoch, whole documents."""
    arguments = DataArguments(train_file_dir=str(place), skip_bad_rows=True, **flags)
    data = load_data(arguments, to_text)
    encode = partial(encode_document, tokenizer, block_size=10)
    encoded = encode_rows(data, "train", encode)
    data.settle(arguments)
    dataset = data.mix(encoded, arguments, seed)
    texts = tokenizer.decode([token for row in dataset for token in row["input_ids"]]).split(tokenizer.eos_token)
    assert texts.pop() == ""
    return data, [text.split()[0] for text in texts]


def entries(data):
    result = [account.as_dict() for account in data.account["train"]]
    for entry in result:
        assert entry["rows"] == entry["used"] + sum(entry["left_out"].values())
    assert sum(entry["used"] for entry in result) == len(data.train)
    return result


# --- what is named ---------------------------------------------------------------------------------------------------


def test_places_and_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c,d", "e:3", "f:x,g:1"):
        (tmp_path / name).mkdir()
    assert parse_sources("a") == [("a", None)]
    assert parse_sources("a, b") == [("a", None), ("b", None)]
    assert parse_sources("a:0.7,b:0.3") == [("a", Fraction(7, 10)), ("b", Fraction(3, 10))]
    assert parse_sources("a:2,b:6e0") == [("a", Fraction(1, 4)), ("b", Fraction(3, 4))]
    assert parse_sources("e:3:1,a:1") == [("e:3", Fraction(1, 2)), ("a", Fraction(1, 2))]
    # What is there under this very name is that.
    assert parse_sources("c,d") == [("c,d", None)] and parse_sources("f:x,g:1") == [("f:x,g:1", None)]
    assert parse_sources("a,e:3") == [("a", None), ("e:3", None)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a:0,b:1", "the weight '0'"),
        ("a:-1,b:1", "the weight '-1'"),
        ("a:nan,b:1", "the weight 'nan'"),
        ("a:inf,b:1", "the weight 'inf'"),
        ("a:much,b:1", "the weight 'much'"),
        ("a:,b:1", "the weight ''"),
        (":1,b:1", "the path ''"),
        ("a:1,b", "gives weights to some paths, but not to b"),
        ("a,,b", "an empty part"),
        ("a,b,", "an empty part"),
    ],
)
def test_wrong_weights_are_refused_with_what_was_read(text, shown):
    with pytest.raises(UserError) as refused:
        parse_sources(text)
    assert shown in str(refused.value) and "--train_file_dir" in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 4


def test_a_file_reached_twice_is_refused(folders):
    (folders / "link").symlink_to(folders / "b")
    for second in ("a", "a/one.jsonl", "link"):
        place = f"{folders / 'a'},{folders / 'b'},{folders / second}"
        with pytest.raises(UserError, match="contains .* twice, in .* and in"):
            load_data(DataArguments(train_file_dir=place), to_text)


def test_a_strategy_without_weights_is_refused(folders):
    arguments = DataArguments(train_file_dir=f"{folders / 'a'},{folders / 'b'}", mix_strategy="over")
    arguments.given = {"mix_strategy"}
    with pytest.raises(UserError, match="--mix_strategy over has no effect without weights"):
        load_data(arguments, to_text)


# --- how many --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "weights", "strategy", "limit", "sizes"),
    [
        ([10, 100], THIRDS, "under", None, [10, 20]),
        ([100, 10], THIRDS, "under", None, [5, 10]),
        ([10, 100], THIRDS, "over", None, [50, 100]),
        ([100, 10], THIRDS, "over", None, [100, 200]),
        ([10, 100], THIRDS, "under", 10, [3, 7]),
        ([10, 100], THIRDS, "under", 1000, [10, 20]),
        ([4, 7], THIRDS, "over", 10, [3, 7]),
        ([3, 3, 3], [Fraction(1, 3)] * 3, "under", None, [3, 3, 3]),
        ([10, 10], [Fraction(3, 10), Fraction(7, 10)], "over", None, [10, 24]),
        ([700, 300], [Fraction(7, 10), Fraction(3, 10)], "under", None, [700, 300]),
        ([5, 0], THIRDS, "under", None, [0, 0]),
    ],
)
def test_sizes_of_a_mixture(rows, weights, strategy, limit, sizes):
    assert mixture_sizes(rows, weights, strategy, limit) == sizes


def test_sizes_keep_what_the_strategies_promise():
    for first in range(1, 12):
        for second in range(1, 30, 3):
            for weight in (Fraction(1, 10), Fraction(1, 3), Fraction("0.7")):
                rows, weights = [first, second], [weight, 1 - weight]
                under = mixture_sizes(rows, weights, "under")
                over = mixture_sizes(rows, weights, "over")
                for sizes in (under, over):
                    for size, share in zip(sizes, weights, strict=True):
                        assert abs(size - share * sum(sizes)) < 1
                assert all(size <= count for size, count in zip(under, rows, strict=True))
                assert all(size >= count for size, count in zip(over, rows, strict=True))
                # One row more would not do.
                assert any((sum(under) + 1) * share > count for count, share in zip(rows, weights, strict=True))
                assert any((sum(over) - 1) * share < count for count, share in zip(rows, weights, strict=True))


def test_rows_come_again_in_whole_repetitions_and_a_seeded_rest():
    times = draw(10, 24, [1])
    assert Counter(times.tolist()) == {2: 6, 3: 4} and times.sum() == 24
    assert draw(10, 24, [1]).tolist() == times.tolist() != draw(10, 24, [2]).tolist()
    assert sorted(draw(10, 4, [1]).tolist()) == [0] * 6 + [1] * 4


# --- rows that are trained -------------------------------------------------------------------------------------------


def test_places_without_weights_are_joined(folders, tokenizer):
    data, texts = mixed(tokenizer, f"{folders / 'a'},{folders / 'b'}")
    assert texts == [*(f"a{n}" for n in range(30)), *(f"b{n}" for n in range(12))]
    assert [row["text"] for row in data.validation] == ["held out a", "held out b"]
    assert all("weight" not in entry for entry in entries(data)) and "mixture" not in data.summary()
    data, texts = mixed(tokenizer, f"{folders / 'a'},{folders / 'b'}", max_train_samples=31)
    assert len(texts) == 31 and texts[-1] == "b0"


def test_under_has_no_row_twice_and_counts_the_rest(folders, tokenizer):
    place = f"{folders / 'a'}:1,{folders / 'b'}:3"
    data, texts = mixed(tokenizer, place)
    assert len(texts) == len(set(texts)) == 16
    assert Counter(text[0] for text in texts) == {"a": 4, "b": 12}
    one, two, b = entries(data)
    assert one["used"] + two["used"] == one["drawn"] + two["drawn"] == 4
    assert one["left_out"]["not in the mixture"] + two["left_out"]["not in the mixture"] == 26
    assert b == b | {"rows": 13, "used": 12, "drawn": 12, "left_out": {"unusable": 1}}
    assert [(entry["weight"], entry["share"]) for entry in (one, two, b)] == [(0.25, 0.25)] * 2 + [(0.75, 0.75)]
    assert [row["text"].split()[0] for row in data.train] == texts
    assert [row["text"] for row in data.validation] == ["held out a", "held out b"]
    assert f"4 rows of {folders / 'a'}, 25.00% for a weight of 25.00%" in data.summary()
    _, again = mixed(tokenizer, place)
    _, other = mixed(tokenizer, place, seed=1)
    assert again == texts != other


def test_over_has_every_row_and_counts_repetitions(folders, tokenizer):
    data, texts = mixed(tokenizer, f"{folders / 'a'}:1,{folders / 'b'}:3", mix_strategy="over")
    times = Counter(texts)
    assert {times[f"a{n}"] for n in range(30)} == {1}
    assert Counter(times[f"b{n}"] for n in range(12)) == {7: 6, 8: 6}
    one, two, b = entries(data)
    assert (one["used"], one["drawn"], two["used"], two["drawn"]) == (20, 20, 10, 10)
    assert b == b | {"rows": 13, "used": 12, "drawn": 90, "left_out": {"unusable": 1}, "share": 0.75}
    assert f"90 rows of {folders / 'b'}, 75.00% for a weight of 75.00%; 12 distinct ones" in data.summary()


@pytest.mark.parametrize("strategy", ["under", "over"])
def test_samples_of_a_mixture_keep_its_shares(folders, tokenizer, strategy):
    place = f"{folders / 'a'}:0.7,{folders / 'b'}:0.3"
    data, texts = mixed(tokenizer, place, max_train_samples=20, mix_strategy=strategy)
    assert Counter(text[0] for text in texts) == {"a": 14, "b": 6} and len(set(texts)) == 20
    one, two, b = entries(data)
    assert (one["left_out"], two["left_out"]) == ({"beyond --max_train_samples": 6}, {"beyond --max_train_samples": 10})
    assert b["left_out"] == {"beyond --max_train_samples": 7}
    # The small source has 6 of the 12 rows that a mixture of 40 would need.
    data, texts = mixed(tokenizer, f"{folders / 'a'}:1,{folders / 'b'}:1", max_train_samples=40, mix_strategy=strategy)
    assert Counter(text[0] for text in texts) == ({"a": 12, "b": 12} if strategy == "under" else {"a": 20, "b": 20})
    entries(data)


def test_a_source_that_would_have_no_row_is_refused(folders, tokenizer):
    write_jsonl(folders / "bad" / "x.jsonl", [{"text": ""}])
    for place in (f"{folders / 'a'}:1,{folders / 'bad'}:1", f"{folders / 'a'}:1000,{folders / 'b'}:1"):
        with pytest.raises(UserError, match="has none of"):
            mixed(tokenizer, place)


def test_held_out_rows_are_taken_before_mixing(folders, tokenizer):
    for name in ("a/validation.jsonl", "b/test.jsonl"):
        (folders / name).unlink()
    data, texts = mixed(tokenizer, f"{folders / 'a'}:1,{folders / 'b'}:1", validation_split_percentage=20)
    held_out = {row["text"].split()[0] for row in data.validation}
    assert len(held_out) == 8 and held_out.isdisjoint(texts)
    assert len(texts) == 2 * min(Counter(text[0] for text in texts).values())
    entries(data)
