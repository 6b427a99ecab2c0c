"""--long_rows: what happens to rows that do not fit, how they are counted, and whether the advice about them works."""

import re
from dataclasses import asdict
from functools import partial
from itertools import islice

from medicalgpt.args import DataArguments
from medicalgpt.data.encoding import (
    EncodingError,
    Pair,
    Prompt,
    ShortenedSamples,
    encode_chat,
    encode_preference,
    encode_prompt,
)
from medicalgpt.data.lengths import LengthLimit, RowLengths
from medicalgpt.data.loading import load_data
from medicalgpt.data.streaming import Position, StreamedSamples, check_data
from medicalgpt.data.tokenizing import encode_sides
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_messages, to_preference
from medicalgpt.formats.tasks import to_task
from medicalgpt.readers.problems import DataError
from template import apply_template
from tests.helpers import chat, open_stage, read_json, write_jsonl
from tests.tiny import make_tiny, tiny_tokenizer

import numpy as np
import pytest

CALL = {"type": "function", "function": {"name": "dose", "arguments": {"drug": "x"}}}


def turns(*texts):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def conversation(exchanges, letters=10):
    return {"messages": turns(*(text for n in range(exchanges) for text in (f"Q{n}", f"{n}" * letters)))}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def length_of(tokenizer, messages):
    return max(len(sample.input_ids) for sample in encode_chat(tokenizer, chat(messages)))


# --- one conversation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chatml", "qwen3"])
def test_the_first_exchanges_that_fit_are_those_of_the_conversation_cut_there(template):
    """qwen3 makes a sample of each turn that thinks."""
    apply_template(tokenizer := tiny_tokenizer(), template)
    messages = conversation(5)["messages"]
    if template == "qwen3":
        messages = [m | ({"reasoning_content": "So"} if m["role"] == "assistant" else {}) for m in messages]
    needed = [length_of(tokenizer, messages[:end]) for end in (2, 4, 6, 8, 10)]
    assert needed == sorted(set(needed))
    encode = partial(encode_chat, tokenizer, chat(messages), shorten_rows=True)
    for count, length in enumerate(needed, start=1):
        for limit in (length, length + 1):
            samples = encode(max_length=limit)
            assert samples == encode_chat(tokenizer, chat(messages[: 2 * count]))
            if count == 5:
                assert not isinstance(samples, ShortenedSamples)
            else:
                assert isinstance(samples, ShortenedSamples) and samples.tokens == needed[-1]
    with pytest.raises(EncodingError, match=f"^{needed[-1]} tokens, longer than the") as refused:
        encode(max_length=needed[0] - 1)
    assert refused.value.too_long and refused.value.tokens == needed[-1]


def test_an_exchange_with_a_tool_stays_whole(tokenizer):
    first = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "1 g"},
        {"role": "assistant", "content": "One gram."},
    ]
    row = chat([*first, *turns("And?", "A" * 50)])
    limit = length_of(tokenizer, first)
    assert encode_chat(tokenizer, row, max_length=limit, shorten_rows=True) == encode_chat(tokenizer, chat(first))
    with pytest.raises(EncodingError):
        encode_chat(tokenizer, row, max_length=limit - 1, shorten_rows=True)


def test_no_answer_is_trained_that_was_not_to_be(tokenizer):
    messages = conversation(3)["messages"]
    limit = length_of(tokenizer, messages[:4])
    with pytest.raises(EncodingError, match="longer than"):
        encode_chat(tokenizer, chat(messages), max_length=limit, shorten_rows=True, mask_history=True)
    untrained = [message | ({"train": False} if number < 3 else {}) for number, message in enumerate(messages)]
    (sample,) = encode_chat(tokenizer, chat(untrained), max_length=limit, shorten_rows=True)
    assert tokenizer.decode([label for label in sample.labels if label != -100]) == f"{'1' * 10}<|im_end|>"
    with pytest.raises(EncodingError, match="longer than"):
        encode_chat(tokenizer, chat(untrained), max_length=limit - 1, shorten_rows=True)


# --- all rows --------------------------------------------------------------------------------------------------------


def settled(tokenizer, folder, rows, limit, workers=1, validation=None, **flags):
    write_jsonl(folder / "data" / "rows.jsonl", rows)
    if validation:
        flags["validation_file_dir"] = str(write_jsonl(folder / "held_out" / "rows.jsonl", validation))
    arguments = DataArguments(train_file_dir=str(folder / "data"), preprocessing_num_workers=workers, **flags)
    data = load_data(arguments, to_messages)
    encode = partial(encode_chat, tokenizer, max_length=limit, shorten_rows=arguments.long_rows == "turns")
    train, held_out = encode_sides(data, encode, arguments, 0)
    return data, train, held_out


@pytest.mark.parametrize("workers", [1, 2])
def test_both_figures_are_counted_and_add_up(tokenizer, tmp_path, workers):
    rows = [conversation(1), conversation(3), conversation(2), conversation(1, 200), conversation(4), {"bad": 1}]
    limit = length_of(tokenizer, conversation(2)["messages"])
    for _ in range(2):  # made, then from the cache
        data, train, held_out = settled(
            tokenizer, tmp_path, rows, limit, workers, [conversation(3, 9), conversation(1, 9)], skip_bad_rows=True
        )
        (account,), (validation,) = data.account["train"], data.account["validation"]
        assert account.as_dict() | {"file": "", "sha256": ""} == {
            "file": "",
            "sha256": "",
            "rows": 6,
            "used": 4,
            "left_out": {"unusable": 1, "too long": 1},
            "shortened": 2,
        }
        assert (validation.used, validation.shortened, validation.left_out) == (2, 1, {})
        assert (
            [place["line"] for place in train["place"]] == [1, 2, 3, 5] == [row["place"]["line"] for row in data.train]
        )
        texts = [tokenizer.decode(ids).count("<|im_start|>assistant") for ids in train["input_ids"]]
        assert texts == [1, 2, 2, 2] and len(held_out) == 2
        assert (
            "used 4 (2 of them shortened to their first exchanges), left out: 1 unusable, 1 too long" in data.summary()
        )
        assert list(data.lengths["train"].tokens) == [
            length_of(tokenizer, row["messages"]) for row in rows[:3] + [rows[4]]
        ]


@pytest.mark.parametrize(("flags", "used"), [({"long_rows": "skip"}, 2), ({"skip_long_rows": True}, 2), ({}, 4)])
def test_skipped_or_shortened(tokenizer, tmp_path, flags, used):
    rows = [conversation(1), conversation(3), conversation(2), conversation(4)]
    data, train, _ = settled(tokenizer, tmp_path, rows, length_of(tokenizer, conversation(2)["messages"]), **flags)
    (account,) = data.account["train"]
    assert (account.used, len(train), account.shortened) == (used, used, 4 - 2 if not flags else 0)
    assert account.rows == account.used + sum(account.left_out.values())


def test_only_rows_in_the_mixture_count_as_shortened(tokenizer, tmp_path):
    one = write_jsonl(tmp_path / "one" / "rows.jsonl", [conversation(1, 5 + n) for n in range(2)])
    two = write_jsonl(tmp_path / "two" / "rows.jsonl", [conversation(3, 5 + n) for n in range(10)])
    arguments = DataArguments(train_file_dir=f"{one}:0.5,{two}:0.5")
    data = load_data(arguments, to_messages)
    encode = partial(encode_chat, tokenizer, max_length=75, shorten_rows=True)
    train, _ = encode_sides(data, encode, arguments, 0)
    assert len(train) == 4
    assert [account.shortened for account in data.account["train"]] == [0, 2]


def advised(message, flag="--model_max_length"):
    return [int(length) for length in re.findall(rf"{flag} (\d+)", message)]


def test_more_than_half_stops_the_run_and_the_advice_works(tokenizer, tmp_path):
    rows = [conversation(1, letters) for letters in range(1, 101)]
    lengths = sorted(length_of(tokenizer, row["messages"]) for row in rows)
    # Half of the rows may be lost, not one more.
    data, train, _ = settled(tokenizer, tmp_path, rows, lengths[49])
    assert len(train) == 50
    with pytest.raises(UserError, match="51 of 100 train rows are too long, more than half") as stopped:
        settled(tokenizer, tmp_path, rows, lengths[48])
    message = str(stopped.value)
    assert (
        f"50%: {lengths[49]}, 90%: {lengths[89]}, 95%: {lengths[94]}, 99%: {lengths[98]}, 100%: {lengths[99]}"
        in message
    )
    assert len(message.splitlines()) == 4 and "Nothing was trained" in message
    first, *others = message.splitlines()
    for length, used in zip(advised("\n".join(others)), (95, 99, 100), strict=True):
        assert length == lengths[used - 1]
        assert settled(tokenizer, tmp_path, rows, length)[0].account["train"][0].used == used
    assert advised(first) == [lengths[49]]
    # Whoever skips rows does not want to lose most of them unseen either; the way out is a flag of its own.
    with pytest.raises(UserError, match="51 of 100 train rows are too long, more than half"):
        settled(tokenizer, tmp_path, rows, lengths[48], long_rows="skip")
    (flag, value) = re.search(r"--(max_long_rows) ([\d.]+)\.$", message).groups()
    for long_rows in ("turns", "skip"):
        flags = {flag: float(value), "long_rows": long_rows}
        assert settled(tokenizer, tmp_path, rows, lengths[48], **flags)[0].account["train"][0].used == 49
    with pytest.raises(UserError, match="51 of 100 train rows are too long, more than 50%"):
        settled(tokenizer, tmp_path, rows, lengths[48], **{flag: float(value) - 0.01 - 1e-9})
    # There is no way out where no row is left.
    with pytest.raises(UserError, match="100 of 100 train rows") as stopped:
        settled(tokenizer, tmp_path, rows, lengths[0] - 1)
    assert "--max_long_rows" not in str(stopped.value)
    with pytest.raises(UserError, match="2 of 3 validation rows are too long") as stopped:
        settled(
            tokenizer,
            tmp_path,
            rows,
            122,
            validation=[conversation(1, 200), conversation(1, 201), conversation(2)],
        )
    assert "held_out" in str(stopped.value)


def test_refused_rows_come_with_the_length_that_they_need(tokenizer, tmp_path):
    rows = [conversation(1, 5), conversation(1, 6), conversation(2, 20), {"bad": 1}]
    flags = {"long_rows": "refuse"}
    with pytest.raises(DataError, match="^2 problem") as refused:
        settled(tokenizer, tmp_path, rows, 60, **flags)
    *_, needed, last = str(refused.value).splitlines()
    assert last.endswith("skip and count them: --skip_bad_rows True --long_rows turns.")
    with pytest.raises(DataError, match="^1 problem") as refused:
        settled(tokenizer, tmp_path, rows, 60, skip_bad_rows=True, **flags)
    assert str(refused.value).splitlines()[-1].endswith("skip and count what does not fit: --long_rows turns.")
    (length,) = advised(needed)
    assert settled(tokenizer, tmp_path, rows, length, skip_bad_rows=True, **flags)[0].account["train"][0].used == 3
    assert settled(tokenizer, tmp_path, rows, 60, skip_bad_rows=True, long_rows="turns")[1].num_rows == 3


def test_advice_knows_the_room_for_the_answer_and_the_positions_of_the_model():
    lengths = RowLengths(np.array([10, 20, 300, 0]), np.array([1, 3, 3, 0]))
    limit = LengthLimit(15, ("--response_length", 40), positions=None)
    assert limit.needed(lengths) == "all rows fit with --model_max_length 340 --response_length 40"
    assert LengthLimit(15, positions=100).needed(lengths) == "all rows need 300 positions, the model has 100"
    assert LengthLimit(300).needed(lengths) == ""
    scaled = LengthLimit(15, positions=100, scaling="--rope_scaling yarn")
    more = "300 positions, the model has 100 (more with --model_max_length 300 --rope_scaling yarn)"
    assert scaled.needed(lengths) == f"all rows need {more}"
    assert scaled.remedy(300) == f"Shorten the row: it would need {more}."
    assert scaled.remedy(100) == "Shorten the row, or make room for it: --model_max_length 100."


def test_the_remedy_of_one_row_gives_it_room(tokenizer, tmp_path):
    rows = [conversation(1, 5), conversation(1, 90), {"bad": 1}]
    with pytest.raises(DataError) as refused:
        settled(tokenizer, tmp_path, rows, 60, long_rows="refuse")
    (problem,) = [each for each in refused.value.problems if each.kind == "too long"]
    (length,) = advised(problem.remedy)
    assert settled(tokenizer, tmp_path, rows, length, skip_bad_rows=True)[0].account["train"][0].used == 2


# --- flags -----------------------------------------------------------------------------------------------------------


def test_a_share_of_rows_is_between_0_and_1():
    with pytest.raises(ValueError, match="--max_long_rows 50 is a share of the rows, from 0 to 1"):
        DataArguments(max_long_rows=50)


def test_both_names_mean_the_same():
    assert DataArguments().long_rows == "turns"
    assert DataArguments(skip_long_rows=True).long_rows == "skip"
    assert DataArguments(skip_long_rows=False).long_rows == "refuse"
    assert DataArguments(skip_long_rows=True, long_rows="skip").long_rows == "skip"
    for other in ("turns", "refuse"):
        with pytest.raises(ValueError, match=f"means --long_rows skip, and --long_rows {other}"):
            DataArguments(skip_long_rows=True, long_rows=other)


# --- other stages ----------------------------------------------------------------------------------------------------


def test_pairs_and_prompts_that_do_not_fit_are_skipped(tokenizer, tmp_path):
    history = turns("Q", "A", "And?")
    rows = [
        {"messages": history, "chosen": "yes", "rejected": "no", "answer": "y"},
        {"messages": [*turns("Q" * 300, "A"), *history], "chosen": "yes", "rejected": "no", "answer": "y"},
        {"messages": turns("Why?"), "chosen": "yes", "rejected": "no", "answer": "y"},
    ]
    pairs = [{name: value for name, value in row.items() if name != "answer"} for row in rows]
    tasks = [{"messages": row["messages"], "answer": row["answer"]} for row in rows]
    for kind, given, convert, encode in (
        (Pair, pairs, to_preference, encode_preference),
        (Prompt, tasks, to_task, encode_prompt),
    ):
        write_jsonl(tmp_path / kind.__name__ / "rows.jsonl", given)
        arguments = DataArguments(train_file_dir=str(tmp_path / kind.__name__))
        data = load_data(arguments, convert)
        train, _ = encode_sides(data, partial(encode, tokenizer, max_length=200), arguments, 0, kind)
        assert [place["line"] for place in train["place"]] == [1, 3]
        account = data.account["train"][0]
        assert (account.used, account.shortened, account.left_out) == (2, 0, {"too long": 1})
        assert "<|im_start|>assistant\nA<|im_end|>" in tokenizer.decode(train["prompt_ids"][0])


def test_flags_that_were_given_are_not_advised(tmp_path):
    model = make_tiny(tmp_path / "model")
    bad = {"prompt": "Q", "chosen": "a<|im_end|>", "rejected": "b"}
    rows = [*({"prompt": f"Q{n}" * 40, "chosen": "a", "rejected": "b"} for n in range(25)), bad]
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    flags = ["--model_name_or_path", model, "--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / "out"]
    with pytest.raises(DataError) as refused:
        open_stage("dpo_training.py", *flags, "--model_max_length", 60, "--skip_long_rows", "True")
    assert [problem.kind for problem in refused.value.problems] == ["unusable"]
    assert "long_rows" not in str(refused.value)


# --- streamed --------------------------------------------------------------------------------------------------------


def test_streamed_rows_are_in_balance_at_every_sample(tokenizer, tmp_path):
    rows = [conversation(1 + n % 4, 10 if n % 7 else 200) for n in range(40)]
    write_jsonl(tmp_path / "rows.jsonl", [{**row, "id": n} for n, row in enumerate(rows)])
    data = check_data(DataArguments(train_file_dir=str(tmp_path), streaming=True, shuffle_buffer=5), to_messages)
    limit = length_of(tokenizer, conversation(2)["messages"])
    encode = partial(encode_chat, tokenizer, max_length=limit, shorten_rows=True)
    drawn, _ = encode_sides(data, encode, data.arguments, 0)
    # Rows of the sample are not counted: training counts them.
    assert data.account["train"][0].as_dict()["used"] == 40 and data.account["train"][0].shortened == 0
    samples = list(islice(StreamedSamples(data, encode, drawn), 60))
    for sample in samples:
        at = sample["position"]
        assert at.rows == at.samples + sum(at.left_out.values())
        assert Position(**asdict(at)) == at
    long = sum(n % 7 == 0 for n in range(40))
    after = next(sample["position"] for sample in samples if sample["position"].epoch == 1)
    assert (samples[40 - long - 1]["position"].samples, after.left_out["too long"]) == (40 - long, long)
    shortened = sum(n % 4 > 1 and n % 7 != 0 for n in range(40))
    assert samples[40 - long]["position"].shortened - shortened in (0, 1)


def test_a_streamed_run_stops_where_most_drawn_rows_are_too_long(tokenizer, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [conversation(1, 100 + n) for n in range(20)] + [conversation(1)])
    stops = "20 of 21 train rows"
    for long_rows, share, expected in (("turns", 0.5, stops), ("skip", 0.5, stops), ("skip", 0.96, None)):
        arguments = DataArguments(
            train_file_dir=str(tmp_path), streaming=True, long_rows=long_rows, max_long_rows=share
        )
        data = check_data(arguments, to_messages)
        encode = partial(encode_chat, tokenizer, max_length=60)
        if expected:
            with pytest.raises(UserError, match=expected):
                encode_sides(data, encode, arguments, 0)
        else:
            assert len(encode_sides(data, encode, arguments, 0)[0]) == 1


def test_a_run_records_what_it_shortened(tmp_path):
    model = make_tiny(tmp_path / "model")
    write_jsonl(tmp_path / "data" / "rows.jsonl", [conversation(1), conversation(3), conversation(1, 150)])
    flags = ["--model_name_or_path", model, "--train_file_dir", tmp_path / "data", "--model_max_length", 80]
    flags += ["--max_steps", 1, "--sample_prompts", 0, "--save_strategy", "no"]
    open_stage("supervised_finetuning.py", *flags, "--output_dir", tmp_path / "out").finish()
    (entry,) = read_json(tmp_path / "out" / "run.json")["data"]
    assert (entry["rows"], entry["used"], entry["shortened"], entry["left_out"]) == (3, 2, 1, {"too long": 1})
    assert "3 rows, 2 used, 1 of them shortened, 1 too long" in (tmp_path / "out" / "README.md").read_text("utf-8")
    flags += ["--streaming", "True", "--logging_steps", 1, "--max_steps", 2, "--per_device_train_batch_size", 2]
    open_stage("supervised_finetuning.py", *flags, "--output_dir", tmp_path / "streamed").finish()
    seen = read_json(tmp_path / "streamed" / "run.json")["streamed"]
    assert seen["rows"] == seen["used"] + sum(seen["left_out"].values()) and seen["shortened"] == 2
