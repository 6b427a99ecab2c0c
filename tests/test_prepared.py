"""Rows that prepare_data.py tokenizes in shards: the same samples in the same order, or a refusal that says why."""

import json
import random
import shutil
from functools import partial
from pathlib import Path

from medicalgpt.args import DataArguments
from medicalgpt.data import prepared, shards
from medicalgpt.data.encoding import Pair, Sample, encode_chat, encode_document, encode_preference
from medicalgpt.data.lengths import count_tokens, list_lengths
from medicalgpt.data.loading import load_data
from medicalgpt.data.prepared import read_prepared
from medicalgpt.data.shards import Shard, load_shard, parts_of, prepare_shard, write_index
from medicalgpt.data.tokenizing import encode_sides
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_messages, to_preference, to_text
from medicalgpt.readers.problems import DataError
from template import apply_template
from tests.helpers import open_stage, read_json, run_here, write_jsonl
from tests.tiny import make_tiny, tiny_tokenizer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

COUNT = 61


def questions(count=COUNT, longest=30):
    draw = random.Random(0)
    return [{"prompt": f"Q{n}?", "response": "x" * draw.randint(1, longest)} for n in range(count)]


def pairs(count=COUNT):
    return [{"prompt": f"Q{n}?", "chosen": "a" * (n % 9 + 1), "rejected": "b" * (n % 7 + 1)} for n in range(count)]


@pytest.fixture
def rows(tmp_path):
    """Two files to train on and a held-out one."""
    write_jsonl(tmp_path / "rows" / "a.jsonl", questions()[:40])
    write_jsonl(tmp_path / "rows" / "b.jsonl", questions()[40:])
    write_jsonl(tmp_path / "rows" / "valid.jsonl", [{"prompt": "Held out?", "response": "Yes."}])
    return tmp_path / "rows"


def chat(**options):
    return partial(encode_chat, tiny_tokenizer(), **{"max_length": 100, "shorten_rows": True, **options})


def prepare(place, rows, total, encode=None, numbers=None, convert=to_messages, sample=Sample, flags=None, **options):
    """Write some shards; by default all, and the index."""
    arguments = DataArguments(train_file_dir=str(rows), **(flags or {}))
    for number in numbers or range(1, total + 1):
        prepare_shard(place, Shard(number, total), arguments, convert, encode or chat(), sample, **options)
    return write_index(place) if numbers is None else None


def read(place, encode=None, block_size=None):
    return read_prepared(DataArguments(prepared_dir=str(place)), encode or chat(), block_size)


# -- which rows -------------------------------------------------------------------------------------------------------


def test_parts_of_all_shards_are_each_file_once(tmp_path):
    draw = random.Random(0)
    for case in range(40):
        files = []
        for number in range(draw.randint(1, 4)):
            files.append(tmp_path / f"{case}-{number}")
            files[-1].write_bytes(b"x" * draw.randint(1, 50))
        total = draw.randint(1, 9)
        at = {}
        for number in range(1, total + 1):
            for part in parts_of(files, Shard(number, total)):
                assert part.start == at.get(part.file, 0) < part.end <= 1
                assert all(at.get(file) == 1 for file in files[: files.index(part.file)])
                at[part.file] = part.end
        assert at == dict.fromkeys(files, 1)


def write_every_format(folder):
    rows = questions()
    texts = [f"{row['prompt']} {row['response']}" for row in rows]
    write_jsonl(folder / "a.jsonl", [{"text": text} for text in texts])
    (folder / "b.json").write_text(json.dumps([{"text": text} for text in texts], indent=1), encoding="utf-8")
    (folder / "c.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts), encoding="utf-8")
    (folder / "d.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (folder / "e.md").write_text("\n".join(texts), encoding="utf-8")
    pq.write_table(pa.table({"text": texts}), folder / "f.parquet")
    write_jsonl(folder / "g.jsonl", [{"text": "one row"}])


@pytest.mark.parametrize("total", [1, 2, 3, 16])
def test_rows_of_all_shards_are_those_of_the_files_in_their_order(tmp_path, total):
    write_every_format(tmp_path / "rows")
    flags = DataArguments(train_file_dir=str(tmp_path / "rows"))
    whole = load_data(flags, to_text)
    parts = [load_shard(flags, to_text, Shard(number, total)) for number in range(1, total + 1)]
    assert [row for part in parts for row in part.train] == list(whole.train)
    assert sum(account.rows for part in parts for account in part.account["train"]) == len(whole.train)
    sizes = [len(part.train) for part in parts]
    assert total > 10 or max(sizes) < 2 * len(whole.train) / total


def test_rows_of_another_part_are_not_parsed(tmp_path, monkeypatch):
    from medicalgpt.readers import json_rows

    path = write_jsonl(tmp_path / "rows.jsonl", questions())
    parsed = []
    monkeypatch.setattr(
        json_rows,
        "parse_line",
        lambda place, line, real=json_rows.parse_line: parsed.append(place) or real(place, line),
    )
    loaded = load_shard(DataArguments(train_file_dir=path), to_messages, Shard(3, 4))
    assert len(parsed) == len(loaded.train) < COUNT / 3


# -- which tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 3])
def test_samples_are_those_of_a_run_that_reads_the_files(tmp_path, rows, total):
    write_jsonl(rows / "b.jsonl", [*questions()[40:], {"prompt": "Long?", "response": "y" * 200}])
    flags = DataArguments(train_file_dir=str(rows))
    data = load_data(flags, to_messages)
    train, validation = encode_sides(data, chat(), flags, 42)
    prepare(tmp_path / "out", rows, total)
    again, train_again, validation_again = read(tmp_path / "out")
    assert train_again[:] == train[:] and validation_again[:] == validation[:]
    for side in ("train", "validation"):
        expected = [account.as_dict() for account in data.account[side]]
        found = [account.as_dict() for account in again.account[side]]
        assert len({entry.pop("prepared") for entry in found}) == 1
        assert found == expected
    assert data.account["train"][1].left_out == {"too long": 1}
    assert list(again.validation) == list(data.validation)
    assert [row for row in again.train if row in list(data.train)] == list(again.train)


def test_packed_blocks_hold_every_token(tmp_path, rows):
    encode = partial(encode_document, tiny_tokenizer(), block_size=64)
    write_jsonl(rows / "a.jsonl", [{"text": row["response"] * 4} for row in questions()[:40]])
    write_jsonl(rows / "b.jsonl", [{"text": row["response"]} for row in questions()[40:]])
    write_jsonl(rows / "valid.jsonl", [{"text": "Held out."}])
    index = prepare(tmp_path / "out", rows, 2, encode, convert=to_text, block_size=64)
    _, train, validation = read(tmp_path / "out", encode, 64)
    flags = DataArguments(train_file_dir=str(rows))
    whole, _ = encode_sides(load_data(flags, to_text), encode, flags, 42)
    assert max(map(len, train["input_ids"])) <= 64 and "seq_lengths" in train.column_names
    assert sorted(token for ids in train["input_ids"] for token in ids) == sorted(
        token for ids in whole["input_ids"] for token in ids
    )
    assert index["tokens"] == sum(map(len, whole["input_ids"])) and index["sequences"] == len(train) < len(whole)
    assert "seq_lengths" not in validation.column_names
    assert not list((tmp_path / "out").rglob("cache-*"))


def test_pairs(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", pairs())
    encode = partial(encode_preference, tiny_tokenizer(), max_length=100)
    index = prepare(tmp_path / "out", path, 2, encode, convert=to_preference, sample=Pair)
    _, train, _ = read(tmp_path / "out", encode)
    flags = DataArguments(train_file_dir=path)
    whole, _ = encode_sides(load_data(flags, to_preference), encode, flags, 42, Pair)
    assert train[:] == whole[:]
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in whole)
    assert index["tokens"] == tokens == count_tokens(whole)[1]


def test_counts_and_lengths_of_a_data_set(tmp_path, rows):
    prepare(tmp_path / "out", rows, 2)
    _, train, _ = read(tmp_path / "out")
    for part in (train, train.select([5, 3, 3, 40]), train.select([])):
        labels = [label for row in part["labels"] for label in row if label != -100]
        assert count_tokens(part) == (len(part), sum(map(len, part["input_ids"])), len(labels))
        assert list_lengths(part, "input_ids").tolist() == list(map(len, part["input_ids"]))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three complete shards, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("prepared")
    write_jsonl(folder / "rows.jsonl", questions())
    prepare(folder / "out", folder / "rows.jsonl", 3)
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    shutil.copytree(whole / "out", tmp_path / "copy")
    return tmp_path / "copy"


SECOND = "shard-00002-of-00003"


def remove_shard(place):
    shutil.rmtree(place / SECOND)


def remove_index(place):
    (place / "index.json").unlink()


def tear_shard(place):
    path = place / SECOND / "train.arrow"
    path.write_bytes(path.read_bytes()[:-1000])


def flip_byte(place):
    path = place / SECOND / "train.arrow"
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)


def tear_index(place):
    (place / "index.json").write_text((place / "index.json").read_text()[:100])


def empty_index(place):
    (place / "index.json").write_text("null")


def replace_manifest(place):
    path = place / SECOND / "shard.json"
    path.write_text(path.read_text().replace('"used"', '"used "'))


DAMAGES = [
    (remove_shard, r"shard-00002-of-00003 cannot be used: it is missing\..*--shard 2/3"),
    (tear_shard, r"train.arrow has [\d,]+ of [\d,]+ bytes\..*--check True"),
    (flip_byte, "the content of train.arrow has changed"),
    (replace_manifest, "its shard.json is not the one that index.json names"),
    (tear_index, r"index.json cannot be read .*--check True"),
    (empty_index, r"index.json cannot be read .*--check True"),
    (remove_index, r"it has all shards and no index.json.*--check True"),
    (shutil.rmtree, "no such folder"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: getattr(value, "__name__", None))
def test_damaged_shards_are_refused_and_the_remedy_helps(whole, copied, damage, message):
    expected = read(copied)[1][:]
    damage(copied)
    with pytest.raises(UserError, match=message):
        read(copied)
    if not copied.exists():
        return
    # The remedy: prepare that shard again where it is damaged, and write the index.
    if damage not in (remove_index, tear_index, empty_index):
        shutil.rmtree(copied / SECOND, ignore_errors=True)
        with pytest.raises(UserError, match="2 of 3 shards are complete; missing: 2/3"):
            write_index(copied)
        prepare(copied, whole / "rows.jsonl", 3, numbers=[2])
    write_index(copied)
    assert read(copied)[1][:] == expected


def test_only_the_first_process_of_a_machine_reads_all_bytes(copied, monkeypatch):
    flip_byte(copied)
    monkeypatch.setenv("LOCAL_RANK", "1")
    read(copied)
    tear_shard(copied)
    with pytest.raises(UserError, match="bytes"):
        read(copied)


def other_template():
    encode = chat()
    apply_template(encode.args[0], "vicuna")
    return encode


def other_tokenizer():
    encode = chat()
    encode.args[0].add_tokens(["fever"])
    return encode


OTHERS = [
    (lambda: (chat(max_length=90), None), "prepared with --model_max_length 100, not 90"),
    (lambda: (chat(train_on_inputs=True), None), "prepared with --train_on_inputs False, not True"),
    (lambda: (chat(), 100), "prepared with --packing False, not True"),
    (lambda: (other_template(), None), "another chat template or system prompt"),
    (lambda: (other_tokenizer(), None), "another tokenizer"),
    (lambda: (partial(encode_document, tiny_tokenizer(), block_size=9), 9), "prepared for supervised_finetuning.py"),
]


@pytest.mark.parametrize(("other", "message"), OTHERS, ids=[message for _, message in OTHERS])
def test_shards_for_another_run_are_refused(whole, copied, other, message):
    encode, block_size = other()
    with pytest.raises(UserError, match=message):
        read(copied, encode, block_size)
    # As one of the shards, and as all of them.
    if encode.func is encode_chat:
        shutil.rmtree(copied / SECOND)
        prepare(copied, whole / "rows.jsonl", 3, encode, numbers=[2], block_size=block_size)
        with pytest.raises(UserError, match=f"{SECOND} cannot be used: .*--shard 2/3"):
            write_index(copied)
    with pytest.raises(UserError, match="there already"):
        prepare(whole / "out", whole / "rows.jsonl", 3, other_tokenizer(), numbers=[1])


def test_a_row_that_would_get_other_tokens_is_noticed(copied, monkeypatch):
    real = prepared._compare_examples

    def compare(place, examples, encode):
        real(place, examples, lambda row: encode({**row, "messages": row["messages"][:1] * 2}))

    monkeypatch.setattr(prepared, "_compare_examples", compare)
    with pytest.raises(UserError, match=r"rows.jsonl:1 has other tokens there"):
        read(copied)


def test_shards_of_different_files_versions_or_divisions_are_refused(whole, copied, monkeypatch):
    rows = Path(shutil.copy(whole / "rows.jsonl", copied.parent / "rows.jsonl"))
    shutil.rmtree(copied)
    prepare(copied, rows, 3, numbers=[1, 3])

    def refused(message):
        with pytest.raises(UserError, match=message):
            write_index(copied)
        shutil.rmtree(copied / SECOND)

    # As long as before, so that only its hash shows it.
    text = rows.read_text()
    rows.write_text(text.replace("Q5?", "W5?"))
    prepare(copied, rows, 3, numbers=[2])
    refused(r"rows.jsonl was changed after shard 1/3 was cut from it")
    rows.write_text(text + text)
    prepare(copied, rows, 3, numbers=[2])
    refused("cut from other files than the first shard")
    rows.write_text(text)
    prepare(copied, rows, 3, numbers=[2], flags={"long_rows": "skip"}, encode=chat(shorten_rows=False))
    refused("another --long_rows than the first shard")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "version", lambda name: "0.1")
        prepare(copied, rows, 3, numbers=[2])
    refused("another version of .*tokenizers.* made it than the first shard")
    shutil.copytree(copied / "shard-00001-of-00003", copied / SECOND)
    refused("it is shard 1/3 under another name")
    prepare(copied, rows, 4, numbers=[2])
    with pytest.raises(UserError, match="shards of different divisions: 2 of 3 and 1 of 4"):
        write_index(copied)


def test_a_shard_is_written_once_and_by_one_process(whole, copied):
    before = (copied / SECOND / "shard.json").stat().st_mtime_ns
    prepare(copied, whole / "rows.jsonl", 3, numbers=[2])
    assert (copied / SECOND / "shard.json").stat().st_mtime_ns == before
    tear_shard(copied)
    with pytest.raises(UserError, match="damaged: train.arrow has .* Remove it, and prepare it again"):
        prepare(copied, whole / "rows.jsonl", 3, numbers=[2])
    with FileLock(copied / f".{SECOND}.lock"), pytest.raises(UserError, match="is being written by another process"):
        prepare(copied, whole / "rows.jsonl", 3, numbers=[2])


def test_what_a_killed_process_left_is_removed_and_never_read(whole, copied):
    (copied / SECOND).rename(copied / f"{SECOND}.partial")
    remove_index(copied)
    with pytest.raises(UserError, match="2 of 3 shards are complete; missing: 2/3"):
        read(copied)
    prepare(copied, whole / "rows.jsonl", 3, numbers=[2])
    assert not (copied / f"{SECOND}.partial").exists()
    write_index(copied)
    read(copied)


def test_rows_that_cannot_be_used_are_refused_or_counted(tmp_path):
    given = questions()
    given[50] = {"body": "?"}
    path = write_jsonl(tmp_path / "rows.jsonl", given)
    prepare(tmp_path / "out", path, 2, numbers=[1])
    with pytest.raises(DataError, match="rows.jsonl:51"):
        prepare(tmp_path / "out", path, 2, numbers=[2])
    assert [entry.name for entry in (tmp_path / "out").glob("shard*")] == ["shard-00001-of-00002"]
    prepare(tmp_path / "out", path, 2, numbers=[2], flags={"skip_bad_rows": True})
    write_index(tmp_path / "out")
    data, train, _ = read(tmp_path / "out")
    (account,) = data.account["train"]
    assert (account.rows, account.used, account.left_out) == (COUNT, COUNT - 1, {"unusable": 1})
    assert len(train) == COUNT - 1


def test_whether_most_rows_are_too_long_is_asked_of_all_shards(tmp_path):
    """Rows sorted by length: the last shard has only rows that are too long, which are less than half of all."""
    long = [{"prompt": f"L{n}?", "response": "y" * 200} for n in range(4)]
    path = write_jsonl(tmp_path / "few.jsonl", [*questions(40), *long])
    prepare(tmp_path / "few", path, 12)
    assert read(tmp_path / "few")[0].account["train"][0].left_out == {"too long": 4}
    path = write_jsonl(tmp_path / "most.jsonl", [*questions(3), *long])
    with pytest.raises(UserError, match=r"4 of 7 train rows are too long, more than half(.|\n)*--max_long_rows 0.58"):
        prepare(tmp_path / "most", path, 2)
    write_index(tmp_path / "most", 0.58)
    assert len(read(tmp_path / "most")[1]) == 3


def test_overlap_with_held_out_rows_is_found_in_every_shard(tmp_path, rows):
    write_jsonl(rows / "valid.jsonl", [questions()[-1]])
    with pytest.raises(UserError, match="also trained on"):
        prepare(tmp_path / "out", rows, 2, numbers=[2])


@pytest.mark.parametrize("text", ["3", "0/4", "5/4", "a/b", "1/0", "-1/4"])
def test_a_shard_that_cannot_be_meant_is_refused(text):
    with pytest.raises(UserError, match="--shard .*1/16 to 16/16"):
        Shard.parse(text)


# -- the programs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_tiny(folder / "model")
    write_jsonl(folder / "chat" / "rows.jsonl", questions())
    write_jsonl(folder / "chat" / "valid.jsonl", [{"prompt": "Held out?", "response": "Yes."}])
    write_jsonl(folder / "text" / "rows.jsonl", [{"text": row["response"] * 3} for row in questions()])
    write_jsonl(folder / "preference" / "rows.jsonl", pairs())
    for name in ("chat", "text", "preference"):
        for number in (1, 2):
            flags = ["--format", name, "--model_name_or_path", folder / "model", "--train_file_dir", folder / name]
            flags += ["--prepared_dir", folder / f"{name}-out", "--shard", f"{number}/2"]
            run_here("prepare_data.py", *flags, "--block_size" if name == "text" else "--model_max_length", 64)
    return folder


def stage_flags(work, output, *more):
    return [
        *("--model_name_or_path", work / "model", "--output_dir", output, "--max_steps", 4, "--logging_steps", 1),
        *("--per_device_train_batch_size", 4, "--sample_prompts", 1, "--save_strategy", "no", *more),
    ]


def test_training_is_that_of_the_files(work, tmp_path):
    more = ("--model_max_length", 64, "--eval_strategy", "steps", "--eval_steps", 2)
    for name, data in (
        ("files", ("--train_file_dir", work / "chat")),
        ("shards", ("--prepared_dir", work / "chat-out")),
    ):
        run_here("supervised_finetuning.py", *stage_flags(work, tmp_path / name, *data, *more))
    records = [read_json(tmp_path / name / "run.json") for name in ("files", "shards")]
    assert records[0]["plan"] == records[1]["plan"]
    curves = [
        [row for row in read_json(tmp_path / name / "metrics.jsonl") if "loss" in row or "eval_loss" in row]
        for name in ("files", "shards")
    ]
    losses = [[row.get("loss", row.get("eval_loss")) for row in curve] for curve in curves]
    assert losses[0] == losses[1] and len(losses[0]) > 5
    train, held_out = records[1]["data"]
    assert (train["rows"], train["used"], held_out["rows"]) == (COUNT, COUNT, 1) and train["prepared"]
    assert read_json(tmp_path / "shards" / "samples.jsonl")


def test_pretraining_and_pairs_read_their_shards(work, tmp_path):
    opened = open_stage(
        "pretraining.py", *stage_flags(work, tmp_path / "pt", "--prepared_dir", work / "text-out", "--block_size", 64)
    )
    batch = next(iter(opened.trainer.get_train_dataloader()))
    assert "position_ids" in batch and batch["input_ids"].shape[1] <= 64
    more = ("--prepared_dir", work / "preference-out", "--model_max_length", 64)
    opened = open_stage("dpo_training.py", *stage_flags(work, tmp_path / "dpo", *more))
    assert len(opened.trainer.train_dataset) == COUNT


REFUSED = [
    (["--train_file_dir", "x"], "--train_file_dir has no effect on rows that are prepared"),
    (["--streaming", "True"], "--streaming has no effect on rows that are prepared"),
    (["--max_train_samples", "5"], "--max_train_samples has no effect on rows that are prepared"),
    (["--model_max_length", "32"], "prepared with --model_max_length 64, not 32"),
    (["--packing", "True"], "prepared with --packing False, not True"),
    (["--template_name", "vicuna"], "another chat template"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=[" ".join(more) for more, _ in REFUSED])
def test_flags_that_do_not_suit_the_shards_are_refused(work, tmp_path, more, message):
    flags = stage_flags(work, tmp_path / "out", "--prepared_dir", work / "chat-out", "--model_max_length", 64)
    with pytest.raises(UserError, match=message):
        run_here("supervised_finetuning.py", *flags, *more)


PREPARATION_REFUSED = [
    ([], "--format is missing"),
    (["--format", "chat"], "--model_name_or_path is missing"),
    (["--format", "chat", "--model_name_or_path", "m"], "--train_file_dir is missing"),
    (["--format", "chat", "--block_size", "9"], "--block_size has no effect with --format chat"),
    (["--format", "text", "--template_name", "qwen"], "--template_name has no effect with --format text"),
    (["--check", "True", "--format", "text"], "--format has no effect with --check True"),
    (["--check", "True"], "has no shard"),
    (["--format", "chat", "--shard", "0/2"], "--shard 0/2"),
]


@pytest.mark.parametrize(("flags", "message"), PREPARATION_REFUSED, ids=[" ".join(f) for f, _ in PREPARATION_REFUSED])
def test_preparation_refuses_what_it_cannot_do(work, tmp_path, flags, message):
    given = list(flags)
    if message.startswith(("--block_size", "--template_name")):
        given += ["--model_name_or_path", work / "model", "--train_file_dir", work / "chat"]
    with pytest.raises(UserError, match=message):
        run_here("prepare_data.py", *given, "--prepared_dir", tmp_path / "out")
