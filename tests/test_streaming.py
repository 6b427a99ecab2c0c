"""Samples that are read and tokenized while the model trains: their order, their balance, and what is refused."""

import random
from collections import Counter
from itertools import islice

from medicalgpt.args import DataArguments
from medicalgpt.data import streaming
from medicalgpt.data.encoding import EncodingError, Sample
from medicalgpt.data.streaming import PlacedSample, Position, StreamedSamples, check_data, fill_blocks
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_messages, to_text
from medicalgpt.readers.problems import DataError, Place
from medicalgpt.training.stream_trainer import StreamCollator
from tests.helpers import open_stage, read_json, run_here, write_jsonl
from tests.tiny import make_tiny

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

# A stream has no end: a fault in it can loop forever.
pytestmark = pytest.mark.timeout(120)

LONGEST = 40


def encode(row):
    """A byte a token; rows that begin with `melt` cannot be encoded at all."""
    ids = list(row["text"].encode())
    if row["text"].startswith("melt"):
        raise EncodingError("it melts", "Fix it")
    if len(ids) > LONGEST:
        raise EncodingError(f"{len(ids)} tokens", "Shorten it", too_long=True)
    return [Sample(ids, ids)]


def documents(name, count, longest=LONGEST):
    draw = random.Random(name)
    return [{"text": f"{name}{number} " + "x" * draw.randint(0, longest - 6)} for number in range(count)]


@pytest.fixture
def folder(tmp_path):
    for name, count in (("a", 40), ("b", 25), ("c", 35)):
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", documents(name, count))
    return tmp_path / "data"


def arguments(place, **flags):
    return DataArguments(train_file_dir=str(place), streaming=True, **{"shuffle_buffer": 16, **flags})


def stream(data, block_size=None, process=0, processes=1):
    samples = []
    for row in data.train:
        try:
            samples += [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in encode(row)]
        except EncodingError:
            pass
    drawn = Dataset.from_list(samples) if samples else Dataset.from_dict({"input_ids": [], "labels": []})
    return StreamedSamples(data, encode, drawn, block_size, process, processes)


def texts(samples):
    """The texts of samples, of packed ones each by itself."""
    found = []
    for sample in samples:
        at = 0
        for length in sample.get("seq_lengths", [len(sample["input_ids"])]):
            found.append(bytes(sample["input_ids"][at : at + length]).decode())
            at += length
    return found


def epochs(samples, count):
    """The samples of the first epochs, a list for each."""
    found = [[] for _ in range(count)]
    for sample in samples:
        if sample["position"].epoch >= count:
            return found
        found[sample["position"].epoch].append(sample)


# -- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [None, 100])
def test_each_epoch_holds_every_row_once_in_an_order_of_its_own(folder, block_size):
    data = check_data(arguments(folder), to_text)
    one, two = epochs(stream(data, block_size), 2)
    wanted = sorted(row["text"] for name, count in (("a", 40), ("b", 25), ("c", 35)) for row in documents(name, count))
    assert sorted(texts(one)) == sorted(texts(two)) == wanted
    assert texts(one) != texts(two)


def test_order_follows_from_seed_and_epoch(folder):
    def first(seed):
        return texts(islice(stream(check_data(arguments(folder), to_text, seed=seed)), 150))

    assert first(1) == first(1) != first(2)


def test_rows_move_farther_than_a_line_and_no_farther_than_the_buffer(folder):
    data = check_data(arguments(folder / "a.jsonl", shuffle_buffer=10), to_text)
    places = [int(text.split()[0][1:]) for text in texts(islice(stream(data), 40))]
    # A row cannot come before it was read.
    assert max(place - number for number, place in enumerate(places)) <= 10
    assert sum(place != number for number, place in enumerate(places)) > 20
    unshuffled = check_data(arguments(folder / "a.jsonl", shuffle_buffer=1), to_text)
    assert texts(islice(stream(unshuffled), 40)) == [row["text"] for row in documents("a", 40)]


@pytest.mark.parametrize("block_size", [None, 100])
@pytest.mark.parametrize(("process", "processes"), [(0, 1), (1, 3)])
def test_goes_on_from_every_position(folder, block_size, process, processes):
    data = check_data(arguments(folder), to_text)
    whole = list(islice(stream(data, block_size, process, processes), 120))
    assert whole[-1]["position"].epoch >= 1
    for number, sample in enumerate(whole[:-4]):
        again = stream(data, block_size, process, processes)
        again.start = [sample["position"]]
        assert list(islice(again, 4)) == whole[number + 1 : number + 5]


def test_epoch_counter_counts_rows(folder):
    data = check_data(arguments(folder), to_text)
    samples = list(islice(stream(data), 250))
    assert [sample["position"].passed for sample in samples] == pytest.approx([(n + 1) / 100 for n in range(250)])
    passed = [sample["position"].passed for sample in islice(stream(data, 100), 60)]
    assert passed == sorted(passed) and any(value == pytest.approx(1) for value in passed)


# -- packing ----------------------------------------------------------------------------------------------------------


def test_blocks_are_full_and_hold_whole_sequences(folder):
    one, two = epochs(stream(check_data(arguments(folder), to_text), 100), 2)
    for block in one:
        assert sum(block["seq_lengths"]) == len(block["input_ids"]) == len(block["labels"]) <= 100
    tokens = sum(len(block["input_ids"]) for block in one)
    assert len(one) <= tokens / 100 + 2


def test_fill_blocks_is_best_fit():
    samples = [PlacedSample([n] * n, [-100] * n, Place("rows.jsonl", n)) for n in (3, 7, 5, 2, 6)]
    blocks = fill_blocks(samples, 10)
    assert [block["seq_lengths"] for block in blocks] == [[7, 3], [6, 2], [5]]
    assert blocks[0]["input_ids"] == [7] * 7 + [3] * 3 and blocks[0]["labels"] == [-100] * 10
    assert [place.line for place in blocks[1]["places"]] == [6, 2]


def test_small_windows_lose_nothing(folder, monkeypatch):
    monkeypatch.setattr(streaming, "BLOCKS_PER_WINDOW", 3)
    data = check_data(arguments(folder), to_text)
    whole = list(islice(stream(data, 100), 60))
    one, two = epochs(whole, 2)
    assert len(texts(one)) == len(set(texts(one))) == len(texts(two)) == 100
    for number in range(50):
        again = stream(data, 100)
        again.start = [whole[number]["position"]]
        assert next(iter(again)) == whole[number + 1]


def test_a_block_does_not_wait_for_the_end_of_the_epoch(tmp_path):
    """A window is a number of blocks: filled from all rows, it would need the memory of the whole corpus."""
    write_jsonl(tmp_path / "rows.jsonl", documents("a", 2000))
    samples, read = stream(check_data(arguments(tmp_path), to_text), LONGEST), []
    samples.encode = lambda row: read.append(row["place"]) or encode(row)
    windows = 0
    for sample in samples:
        windows += sample["position"].done == 0
        if windows == 3:
            break
    # Three windows of 64 blocks, in rows that are half as long as a block.
    assert 300 < len(read) < 600


# -- several readers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [None, 100])
def test_readers_share_each_epoch_out(folder, block_size):
    data = check_data(arguments(folder), to_text)
    parts = [epochs(stream(data, block_size, process, 3), 2) for process in range(3)]
    for epoch in range(2):
        found = [text for part in parts for text in texts(part[epoch])]
        assert len(found) == len(set(found)) == 100


def test_loader_workers_share_the_rows_and_go_on_in_turn(folder):
    data = check_data(arguments(folder), to_text)

    def batches(samples, count):
        collate = StreamCollator(lambda rows: {"texts": texts(rows)})
        return list(islice(DataLoader(samples, batch_size=5, num_workers=2, collate_fn=collate), count))

    whole = batches(stream(data), 20)
    found = [text for batch in whole for text in batch["texts"]]
    assert len(found) == len(set(found)) == 100
    again = stream(data)
    for batch in whole[:7]:
        again.start = again.start or [Position(), Position()]
        again.start[batch["worker"]] = batch["position"]
        again.next_worker = 1 - batch["worker"]
    assert [batch["texts"] for batch in batches(again, 13)] == [batch["texts"] for batch in whole[7:]]


# -- balance ----------------------------------------------------------------------------------------------------------


def test_rows_are_used_or_left_out(tmp_path):
    rows = documents("a", 30)
    rows[3], rows[11], rows[20] = {"text": "y" * 50}, {"text": "melt"}, {"body": "?"}
    write_jsonl(tmp_path / "rows.jsonl", ['{"text": broken', *rows, *[{"text": "z" * 60}] * 2])
    data = check_data(arguments(tmp_path, skip_long_rows=True, skip_bad_rows=True), to_text)
    (account,) = data.account["train"]
    # What only tokenizing shows is counted while training.
    assert (account.rows, account.used, dict(account.left_out)) == (33, 31, {"unusable": 2})
    for block_size in (None, 100):
        one, two = epochs(stream(data, block_size), 2)
        assert len(texts(one)) == len(texts(two)) == 27


def test_rows_are_in_balance_at_every_sample(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [*documents("a", 30), {"text": "y" * 50}, {"text": "melt"}])
    data = check_data(arguments(tmp_path, skip_long_rows=True, skip_bad_rows=True), to_text)
    for sample in islice(stream(data), 90):
        at = sample["position"]
        assert at.rows == at.samples + sum(at.left_out.values())
        assert at.rows == at.epoch * 32 + at.row
    for sample in islice(stream(data, 100), 40):
        at = sample["position"]
        if at.done == 0:
            assert (at.rows, at.left_out) == (32 * (at.epoch + 1), {"too long": at.epoch + 1, "unusable": at.epoch + 1})


def test_first_rows_only(folder):
    data = check_data(arguments(folder, max_train_samples=50), to_text)
    assert [account.used for account in data.account["train"]] == [40, 10, 0] and data.rows == 50
    (one,) = epochs(stream(data), 1)
    assert sorted(texts(one)) == sorted(row["text"] for row in documents("a", 40) + documents("b", 25)[:10])


@pytest.mark.parametrize(
    ("strategy", "limit", "a", "c"), [("under", None, 40, 10), ("over", None, 140, 35), ("under", 20, 16, 4)]
)
def test_sources_are_mixed_by_weight(folder, strategy, limit, a, c):
    place = f"{folder / 'a.jsonl'}:0.8,{folder / 'c.jsonl'}:0.2"
    data = check_data(arguments(place, mix_strategy=strategy, max_train_samples=limit), to_text)
    one, two = (texts(epoch) for epoch in epochs(stream(data), 2))
    assert Counter(text[0] for text in one) == {"a": a, "c": c}
    # The same rows in each epoch, so that those left out are left out of the run.
    assert sorted(one) == sorted(two) and one != two
    for source in "ac":
        times = Counter(text for text in one if text.startswith(source)).values()
        assert max(times) - min(times) <= (1 if strategy == "over" else 0)
    accounts = data.account["train"]
    assert [account.mixture["drawn"] for account in accounts] == [a, c]
    assert [account.used for account in accounts] == [min(a, 40), min(c, 35)]
    # The small source is spread over the epoch.
    thirds = [one[: len(one) // 3], one[-len(one) // 3 :]]
    assert all("c" in {text[0] for text in third} for third in thirds)


# -- the first pass ---------------------------------------------------------------------------------------------------


def test_all_problems_come_at_once(tmp_path):
    rows = [*documents("a", 5), {"body": "?"}, "[1, 2", *documents("b", 5), {"text": " "}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = check_data(arguments(tmp_path), to_text)
    with pytest.raises(DataError, match="3 problem") as caught:
        data.settle(data.arguments)
    assert [problem.place for problem in caught.value.problems] == [(str(path), line, 0) for line in (6, 7, 13)]


def test_reading_stops_where_problems_have_no_end(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "MAX_PROBLEMS", 10)
    write_jsonl(tmp_path / "rows.jsonl", [{"body": "?"}] * 30)
    with pytest.raises(DataError, match="10 problem"):
        check_data(arguments(tmp_path), to_text)


@pytest.mark.parametrize(
    ("cop", "flags", "remedy"),
    [(4, {}, "medmcqa-original"), (0, {"preset": "medmcqa-original"}, "medmcqa")],
)
def test_options_counted_the_other_way_stop_a_stream_too(tmp_path, cop, flags, remedy):
    """Of MedMCQA: without these rows, all others would be trained with the answer next to the correct one."""
    options = {"opa": "iron", "opb": "zinc", "opc": "lead", "opd": "gold", "exp": "So it is."}
    rows = [{"question": f"{number}?", **options, "cop": number} for number in (1, 2, 3)]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {**rows[0], "question": "4?", "cop": cop}])
    given = arguments(path, skip_bad_rows=True, **flags)
    with pytest.raises(UserError, match=f"a.jsonl:4: `cop` is {cop}.*--preset {remedy}"):
        check_data(given, to_messages).settle(given)
    given = arguments(path, preset=remedy)
    data = check_data(given, to_messages)
    data.settle(given)
    assert data.rows == 4


def test_overlap_with_held_out_rows_is_refused(folder):
    write_jsonl(folder / "valid.jsonl", [{"text": "new"}, documents("b", 25)[7]])
    with pytest.raises(UserError, match=r"(?s)1 of 2 held-out rows.*valid.jsonl:2 is also .*b.jsonl:8"):
        check_data(arguments(folder), to_text)
    data = check_data(arguments(folder, allow_overlap=True), to_text)
    assert len(data.validation) == 2 and data.rows == 100


def test_drawn_rows_come_from_everywhere(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", documents("a", 1000))
    data = check_data(arguments(tmp_path), to_text)
    lines = [row["place"]["line"] for row in data.train]
    assert len(set(lines)) == 100 and min(lines) < 100 and max(lines) > 900
    sequences, tokens, supervised = stream(data).estimate()
    real = sum(len(row["text"].encode()) for row in documents("a", 1000))
    assert sequences == 1000 and tokens == supervised == pytest.approx(real, rel=0.1)


# -- refusals while training ------------------------------------------------------------------------------------------


def test_a_row_that_must_not_be_left_out_ends_the_stream_with_its_place(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [*documents("a", 5), {"text": "melt"}])
    last = list(stream(check_data(arguments(tmp_path), to_text)))[-1]
    assert set(last) == {"failure"}
    assert f"{path}:6: it melts. Fix it." in last["failure"] and "--skip_bad_rows True" in last["failure"]
    assert StreamCollator(None)([{"input_ids": [1]}, last]) == last


def test_a_file_that_changes_ends_the_stream(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", documents("a", 20))
    samples = stream(check_data(arguments(tmp_path), to_text))
    reader = iter(samples)
    next(reader)
    write_jsonl(path, documents("b", 30))
    assert "was changed during training" in list(reader)[-1]["failure"]


def test_an_epoch_without_a_sample_ends_the_stream(tmp_path):
    rows = [{"text": "short"}, {"text": "y" * 99}] * 5
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = check_data(arguments(tmp_path, shuffle_buffer=1, skip_long_rows=True), to_text)
    assert "an entire epoch gave no sample" in next(iter(stream(data, process=1, processes=2)))["failure"]


# -- the programs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streaming")
    make_tiny(folder / "model")
    write_jsonl(folder / "sft" / "rows.jsonl", [{"prompt": f"Q{n}?", "response": "x" * (n % 40)} for n in range(1, 40)])
    write_jsonl(folder / "pt" / "rows.jsonl", documents("a", 40))
    write_jsonl(folder / "valid" / "rows.jsonl", [{"prompt": "Held out?", "response": "Yes."}])
    return folder


def flags(work, output, data="sft", *more):
    return [
        *("--model_name_or_path", work / "model", "--train_file_dir", work / data, "--output_dir", output),
        *("--streaming", "True", "--max_steps", 3, "--per_device_train_batch_size", 4, "--logging_steps", 1),
        *("--sample_prompts", 0, "--save_strategy", "no", "--dataloader_pin_memory", "False", *more),
    ]


def sft_flags(work, output, *more):
    return flags(work, output, "sft", "--skip_long_rows", "True", "--model_max_length", 55, *more)


REFUSED = [
    (["--max_steps", -1], "needs --max_steps"),
    (["--skip_long_rows", "False"], "--long_rows turns"),
    (["--train_sampling_strategy", "group_by_length"], "needs the lengths of all rows"),
    (["--validation_split_percentage", 5], "--validation_file_dir"),
    (["--num_train_epochs", 2], "Use --max_steps only"),
    (["--save_strategy", "epoch"], "Use --save_steps N"),
    (["--shuffle_buffer", 0], "must be at least 1"),
    (["--preprocessing_num_workers", 2], "--dataloader_num_workers"),
    (["--streaming", "False", "--shuffle_buffer", 5], "only has an effect with --streaming True"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_flags_that_cannot_be_kept_are_refused_before_anything_is_made(work, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        run_here("supervised_finetuning.py", *sft_flags(work, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_hub_data_is_refused(work, tmp_path):
    given = sft_flags(work, tmp_path / "out", "--dataset_name", "some/thing")
    at = given.index("--train_file_dir")
    without_files = [*given[:at], *given[at + 2 :]]
    with pytest.raises(UserError, match="--streaming reads files") as refused:
        run_here("supervised_finetuning.py", *without_files)
    assert "`hf download some/thing --repo-type dataset --local-dir data/thing`" in str(refused.value)
    # A folder needs no download; the remedy is applied.
    rows = [{"prompt": f"Q{number}?", "response": "Rest."} for number in range(20)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    at = without_files.index("--dataset_name")
    with pytest.raises(UserError, match=f"pass --train_file_dir {tmp_path / 'saved'}; omit --dataset_name.\n"):
        run_here("supervised_finetuning.py", *without_files[:at], "--dataset_name", tmp_path / "saved")
    without_name = [*without_files[:at], *without_files[at + 2 :]]
    open_stage("supervised_finetuning.py", *without_name, "--train_file_dir", tmp_path / "saved")


def test_too_few_rows_for_the_readers_are_refused(work, tmp_path):
    opened = open_stage("supervised_finetuning.py", *sft_flags(work, tmp_path, "--dataloader_num_workers", 50))
    with pytest.raises(UserError, match="39 rows are too few for 50 readers"):
        opened.trainer.get_train_dataloader()


def test_fine_tuning_streams(work, tmp_path, capsys):
    more = ("--validation_file_dir", work / "valid", "--eval_strategy", "steps", "--eval_steps", 10, "--max_steps", 20)
    run_here("supervised_finetuning.py", *sft_flags(work, tmp_path / "out", *more))
    log = capsys.readouterr().err
    record = read_json(tmp_path / "out" / "run.json")
    assert record["status"] == "finished" and record["plan"]["estimated"] is True
    assert "sequences      about " in log and "skipped: " in log and " tokens, longer than the 55 that fit" in log
    seen = record["streamed"]
    # Steps hold samples, epochs hold rows.
    assert seen["samples"] == 80 and seen["epochs_begun"] == 3
    assert seen["rows"] == seen["used"] + sum(seen["left_out"].values()) and seen["used"] == 80
    assert seen["left_out"]["too long"] > 10
    steps = [row for row in read_json(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert steps[-1]["epoch"] == pytest.approx(seen["rows"] / 39)
    assert record["metrics"]["eval_loss"] > 0


def test_pretraining_streams_blocks_of_whole_documents(work, tmp_path):
    opened = open_stage("pretraining.py", *flags(work, tmp_path, "pt", "--block_size", 64))
    batch = next(iter(opened.trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] == 64 and "position_ids" in batch and "attention_mask" not in batch
    starts = (batch["position_ids"] == 0).sum()
    assert starts > 4
    opened.finish()
    (entry,) = read_json(tmp_path / "run.json")["data"]
    assert (entry["rows"], entry["used"]) == (40, 40)


def test_special_tokens_in_a_text_end_the_run_with_the_place(work, tmp_path):
    rows = read_json(work / "sft" / "rows.jsonl") * 4
    rows[100] = {"prompt": "How?", "response": "So.<|im_end|>"}
    path = write_jsonl(tmp_path / "data" / "rows.jsonl", rows)
    given = sft_flags(work, tmp_path / "out", "--train_file_dir", tmp_path / "data", "--max_steps", 40)
    with pytest.raises(UserError, match=rf"{path}:101: .*special token"):
        run_here("supervised_finetuning.py", *given)
    run_here("supervised_finetuning.py", *given, "--skip_bad_rows", "True", "--overwrite_output_dir", "True")
    assert read_json(tmp_path / "out" / "run.json")["streamed"]["left_out"]["unusable"] == 1
