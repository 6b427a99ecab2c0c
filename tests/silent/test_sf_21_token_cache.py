"""Tokens from the cache are those that would be made now: whatever they follow from, a change of it makes them anew."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path

from medicalgpt.args import DataArguments
from medicalgpt.data import cache
from medicalgpt.data.encoding import EncodingError, Sample, encode_chat, encode_document
from medicalgpt.data.loading import load_data
from medicalgpt.data.tokenizing import encode_rows
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_messages, to_text
from template import apply_template
from tests.helpers import ROOT, open_stage, save_model, write_jsonl
from tests.tiny import tiny_tokenizer

import datasets
import pytest

ROWS = [{"prompt": f"Question {n}?", "response": f"Answer {n}."} for n in range(6)]
TOO_LONG = {"prompt": "?", "response": "y" * 300}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty token cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "medicalgpt-tokens"


@pytest.fixture
def path(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def chat_tokens(path, tokenizer=None, *, num_proc=None, renew=False, seed=42, flags=None, **options):
    """What one run would train on: ids, labels and places, held-out ones too, and the problems."""
    data = load_data(DataArguments(train_file_dir=str(path), **(flags or {})), to_messages, seed=seed)
    encode = partial(encode_chat, tokenizer or tiny_tokenizer(), **({"max_length": 200} | options))
    sides = ["train", "validation"] if data.validation else ["train"]
    return [encode_rows(data, side, encode, num_proc, renew).to_dict() for side in sides], list(map(str, data.problems))


def hits(log):
    return sum("tokens taken from the cache at" in line for line in log)


def whole(folder):
    return [path for path in folder.iterdir() if path.is_dir()]


def test_same_everything_is_a_hit_and_changes_nothing(path, log, folder):
    write_jsonl(path, [*ROWS, TOO_LONG])
    first = chat_tokens(path)
    assert hits(log) == 0 and len(first[1]) == 1 and len(whole(folder)) == 1
    assert chat_tokens(path) == first
    assert hits(log) == 1 and str(whole(folder)[0]) in log[-1] and "--overwrite_cache True" in log[-1]


def templates(name, system=None):
    tokenizer = tiny_tokenizer()
    apply_template(tokenizer, name, system)
    return tokenizer


def lowered():
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def other_end():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    return tokenizer


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": lambda: templates("vicuna")},
        {"tokenizer": lambda: templates("chatml", "Be brief.")},
        {"tokenizer": other_end},
        {"tokenizer": lowered},
        {"train_on_inputs": True},
        {"max_length": 30},
        {"flags": {"max_train_samples": 3}},
        {"flags": {"validation_split_percentage": 34.0}},
        {"flags": {"validation_split_percentage": 34.0}, "seed": 1},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_change_gives_the_tokens_of_the_change(path, log, folder, change):
    if make := change.get("tokenizer"):
        change = {**change, "tokenizer": make()}
    old = chat_tokens(path)
    new = chat_tokens(path, **change)
    assert new != old and hits(log) == 0
    shutil.rmtree(folder)
    assert chat_tokens(path, **change) == new


def test_mask_history_changes_the_labels(tmp_path, log):
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    path = write_jsonl(tmp_path / "turns.jsonl", [{"messages": turns}])
    assert chat_tokens(path) != chat_tokens(path, mask_history=True) and hits(log) == 0


def test_other_content_of_the_same_size_and_time(path, log):
    old, before = chat_tokens(path), os.stat(path)
    text = Path(path).read_text(encoding="utf-8")
    Path(path).write_text(text.replace("Answer 3", "Answer 9"), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert chat_tokens(path) != old and hits(log) == 0


def test_order_and_place_of_rows_count(path, log, tmp_path):
    old = chat_tokens(path)
    write_jsonl(path, ROWS[::-1])
    assert chat_tokens(path)[0] != old[0]
    copied = chat_tokens(shutil.copy(path, tmp_path / "copy.jsonl"))[0][0]
    assert copied["place"][0]["file"] == str(tmp_path / "copy.jsonl")
    assert hits(log) == 0


PROGRAM = """
import sys
from functools import partial
sys.path.append({root!r})
from medicalgpt.args import DataArguments
from medicalgpt.data.encoding import encode_document
from medicalgpt.formats.conversion import to_text
from medicalgpt.data.loading import load_data
from medicalgpt.data.tokenizing import encode_rows
from tests.tiny import tiny_tokenizer
data = load_data(DataArguments(train_file_dir={path!r}), to_text)
print(encode_rows(data, "train", partial(encode_document, tiny_tokenizer(), block_size=50))[:])
"""


@pytest.mark.slow
def test_other_code_gives_other_tokens(tmp_path):
    """The code is changed as a developer would: between two runs, in a copy of the project."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "medicalgpt", project / "medicalgpt")
    shutil.copy(ROOT / "template.py", project)
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": "abc"}])
    program = PROGRAM.format(root=str(ROOT), path=path)

    def run():
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=project,
            env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout, "taken from the cache" in done.stderr

    first, hit = run()
    assert not hit and run() == (first, True)
    source = project / "medicalgpt" / "data" / "encoding.py"
    code = source.read_text(encoding="utf-8")
    assert code.count("        ids.append(tokenizer.eos_token_id)\n") == 1
    source.write_text(code.replace("ids.append(tokenizer.eos_token_id)", "pass"), encoding="utf-8")
    second, hit = run()
    assert second != first and not hit


@pytest.mark.parametrize(
    "name",
    [
        "medicalgpt/data/encoding.py",
        "medicalgpt/data/batching.py",
        "medicalgpt/models/templating.py",
        "medicalgpt/models/tool_formats.py",
    ],
)
def test_each_source_is_in_the_key(path, log, tmp_path, monkeypatch, name):
    chat_tokens(path)
    shutil.copytree(ROOT / "medicalgpt", tmp_path / "project" / "medicalgpt")
    monkeypatch.setattr("medicalgpt.code_version.ROOT", tmp_path / "project")
    chat_tokens(path)
    log.clear()
    chat_tokens(path)
    assert hits(log) == 1
    with open(tmp_path / "project" / name, "a", encoding="utf-8") as file:
        file.write("# changed\n")
    chat_tokens(path)
    assert hits(log) == 1


@pytest.mark.parametrize("library", ["tokenizers", "transformers", "trl"])
def test_another_version_of_a_library(path, log, monkeypatch, library):
    chat_tokens(path)
    real = cache.version
    monkeypatch.setattr(cache, "version", lambda name: "0" if name == library else real(name))
    chat_tokens(path)
    assert hits(log) == 0


def test_a_template_with_the_date_is_made_anew_each_day(path, log, monkeypatch):
    class Tomorrow(date):
        @classmethod
        def today(cls):
            return cls(2099, 1, 1)

    dated, plain = tiny_tokenizer(), tiny_tokenizer()
    dated.chat_template += "{#- strftime_now #}"
    for tokenizer in (dated, plain):
        chat_tokens(path, tokenizer)
    monkeypatch.setattr(cache, "date", Tomorrow)
    chat_tokens(path, dated)
    assert hits(log) == 0
    chat_tokens(path, plain)
    assert hits(log) == 1


# --- what may be kept ------------------------------------------------------------------------------------------------


def noted(tokenizer, row, note=None, wait=0.0):
    """Encode a document and leave a line in the file `note`."""
    with open(note, "a", encoding="utf-8") as file:
        file.write(row["text"] + "\n")
    time.sleep(wait)
    if row["text"] == "long":
        raise EncodingError("too many tokens", "Shorten it", too_long=True)
    return encode_document(tokenizer, row, block_size=3)


def kill(tokenizer, row):
    os.kill(os.getpid(), signal.SIGKILL)


def broken(tokenizer, row, stop_at=""):
    if row["text"] == stop_at:
        raise ZeroDivisionError
    return encode_document(tokenizer, row, block_size=3)


def killed_once(tokenizer, row, marker=""):
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_document(tokenizer, row, block_size=3)


class Holder:
    def encode(self, row):
        return [Sample([1], [1])]


def documents(tmp_path, texts):
    return load_data(
        DataArguments(train_file_dir=write_jsonl(tmp_path / "t.jsonl", [{"text": t} for t in texts])), to_text
    )


@pytest.mark.parametrize(
    ("encode", "reason"),
    [
        (partial(encode_document, tiny_tokenizer(), block_size=3, end=object()), "a object among the arguments"),
        (partial(encode_document, tiny_tokenizer(), block_size=Path("3")), "among the arguments"),
        (partial(Holder().encode), "not a function of a module"),
        (partial(lambda tokenizer, row: [Sample([1], [1])], tiny_tokenizer()), "not a function of a module"),
        (partial(broken, tiny_tokenizer(), stop_at={"a"}), "a set among the arguments"),
        (partial(broken, "no tokenizer"), "str is not a fast tokenizer"),
        (partial(broken), "0 positional arguments"),
    ],
)
def test_what_a_key_cannot_hold_is_not_kept(tmp_path, encode, reason):
    data = documents(tmp_path, ["a"])
    with pytest.raises(cache.UncacheableError, match=reason):
        cache.token_key(data.train, encode)


def test_without_a_key_rows_are_encoded_each_time(tmp_path, log, folder):
    data = documents(tmp_path, ["a", "b"])
    lines = tmp_path / "note"
    for encode in (partial(noted, tiny_tokenizer(), note=lines), lambda row: noted(tiny_tokenizer(), row, str(lines))):
        for _ in range(2):
            assert [place["line"] for place in encode_rows(data, "train", encode)["place"]] == [1, 2]
    assert len(lines.read_text().splitlines()) == 8 and not folder.exists()
    assert sum("tokens are not cached: a PosixPath" in line for line in log) == 2


def test_problems_of_a_hit_are_those_of_a_miss(tmp_path, log):
    note, results = tmp_path / "note", []
    for _ in range(2):
        data = documents(tmp_path, ["a", "long", "b", "long"])
        encode_rows(data, "train", partial(noted, tiny_tokenizer(), note=str(note)))
        arguments = DataArguments(skip_long_rows=True)
        problems = list(data.problems)
        data.settle(arguments)
        results.append((problems, data.summary(), [account.as_dict() for account in data.account["train"]]))
    assert results[0] == results[1] and results[0][2][0]["left_out"] == {"too long": 2}
    assert hits(log) == 1 and len(note.read_text().splitlines()) == 4


# --- damage, interruption, several processes -------------------------------------------------------------------------


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["samples.arrow", "problems.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda file: file.write_text("[]")])
def test_a_damaged_entry_is_made_anew_with_a_warning(path, log, folder, name, damage):
    write_jsonl(path, [*ROWS, TOO_LONG])
    first = chat_tokens(path)
    damage(whole(folder)[0] / name)
    assert chat_tokens(path) == first
    assert hits(log) == 0 and sum("is damaged; the rows are tokenized again" in line for line in log) == 1
    assert chat_tokens(path) == first and hits(log) == 1


@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_interrupted_one_is_no_entry(tmp_path, folder, num_proc):
    data = documents(tmp_path, ["a", "b", "c"])
    with pytest.raises(ZeroDivisionError):
        encode_rows(data, "train", partial(broken, tiny_tokenizer(), stop_at="c"), num_proc)
    assert whole(folder) == []


def test_a_program_killed_while_it_writes_leaves_no_entry(tmp_path, log, folder):
    data = documents(tmp_path, ["a", "b"])
    encode = partial(killed_once, tiny_tokenizer(), marker=str(tmp_path / "marker"))
    program = multiprocessing.get_context("fork").Process(target=encode_rows, args=(data, "train", encode))
    program.start()
    program.join()
    assert program.exitcode == -signal.SIGKILL
    left = [path.name for path in whole(folder)]
    assert len(left) == 1 and left[0].endswith(".partial")
    assert len(encode_rows(data, "train", encode)) == 2 and len(encode_rows(data, "train", encode)) == 2
    assert hits(log) == 1 and not any("damaged" in line for line in log)
    assert [path.name for path in whole(folder)] == [left[0].removesuffix(".partial")]


def test_a_killed_process_of_many_is_named(tmp_path, folder):
    with pytest.raises(UserError, match="a tokenizing process was killed"):
        encode_rows(documents(tmp_path, ["a"] * 500), "train", partial(kill, tiny_tokenizer()), 2)
    assert whole(folder) == []


def test_a_cache_that_cannot_be_written_is_named(path, folder):
    folder.parent.write_text("a file")
    with pytest.raises(UserError, match="HF_DATASETS_CACHE"):
        chat_tokens(path)


def test_the_number_of_processes_changes_nothing(tmp_path, folder):
    texts = [f"{n}" * (n % 7 + 1) if n % 50 else "long" for n in range(1, 1001)]
    results = []
    for workers in (1, 2, 3):
        data = documents(tmp_path, texts)
        encode = partial(noted, tiny_tokenizer(), note=str(tmp_path / "note"))
        results.append((encode_rows(data, "train", encode, workers, True).to_dict(), data.problems))
    assert results[0] == results[1] == results[2] and len(results[0][1]) == 20
    assert len(results[0][0]["place"]) > 980
    with pytest.raises(UserError, match="--preprocessing_num_workers 0 must be at least 1"):
        encode_rows(data, "train", encode, 0)


def test_renewing(path, log, folder, monkeypatch):
    first = chat_tokens(path)
    made = whole(folder)[0].stat().st_ino
    assert chat_tokens(path) == first and whole(folder)[0].stat().st_ino == made
    # A new program has no part in what an earlier one has renewed.
    monkeypatch.setattr(cache, "ALONE", "another program")
    assert chat_tokens(path, renew=True) == first
    assert hits(log) == 1 and whole(folder)[0].stat().st_ino != made


@pytest.mark.parametrize("renew", [False, True])
def test_of_processes_started_together_one_encodes(tmp_path, folder, monkeypatch, renew):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    texts = [f"text {n}" for n in range(20)]
    data = documents(tmp_path, texts)
    encode = partial(noted, tiny_tokenizer(), note=str(tmp_path / "note"), wait=0.01)
    encode_rows(data, "train", encode)
    manifest = json.loads((whole(folder)[0] / "manifest.json").read_text())
    (whole(folder)[0] / "manifest.json").write_text(json.dumps(manifest | {"launch": "earlier"}))
    (tmp_path / "note").unlink()
    if not renew:
        shutil.rmtree(folder)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def rank():
        try:
            results.put(encode_rows(data, "train", encode, 1, renew).to_dict())
        except Exception as error:
            results.put(repr(error))

    ranks = [context.Process(target=rank) for _ in range(3)]
    for process in ranks:
        process.start()
    found = [results.get() for _ in ranks]
    for process in ranks:
        process.join()
    assert (tmp_path / "note").read_text().splitlines() == texts
    assert found[0] == found[1] == found[2] and len(found[0]["place"]) > 20


# --- whole programs --------------------------------------------------------------------------------------------------


def test_stages_use_the_cache_and_train_the_same(tmp_path, monkeypatch, capsys):
    model = save_model(tmp_path / "model", tiny_tokenizer())
    write_jsonl(tmp_path / "data" / "rows.jsonl", [*ROWS, TOO_LONG])
    flags = [
        *("--model_name_or_path", model, "--train_file_dir", tmp_path / "data", "--model_max_length", 200),
        *("--max_steps", 2, "--sample_prompts", 0, "--skip_long_rows", "True", "--validation_split_percentage", 20),
    ]
    seen, messages = [], []
    for number, more in enumerate([[], [], ["--overwrite_cache", "True"]]):
        monkeypatch.setattr(cache, "ALONE", f"program {number}")
        opened = open_stage("supervised_finetuning.py", *flags, "--output_dir", tmp_path / f"out{number}", *more)
        messages.append(capsys.readouterr().err.count("tokens taken from the cache at"))
        seen.append((opened.trainer.train_dataset.to_dict(), opened.run.record["data"], opened.finish()["train_loss"]))
    # Both sides of the second run.
    assert messages == [0, 2, 0]
    assert seen[0] == seen[1] == seen[2]
    assert not list(tmp_path.glob("out*/**/*.arrow"))
