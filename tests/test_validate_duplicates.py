"""validate_jsonl.py counts duplicates, compares both sides of a split, and writes statistics."""

import random
import re

from medicalgpt.errors import UserError
from tests.helpers import read_json, run_here, write_jsonl
from tests.tiny import make_tiny

import pytest

SCRIPT = "validate_jsonl.py"


def sentence(seed: int) -> str:
    return "".join(random.Random(seed).choices([chr(code) for code in range(0x4E00, 0x5A00)], k=120))


def row(seed: int, ending: str = "") -> dict:
    return {"prompt": f"问题{seed}", "response": sentence(seed) + ending}


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "data" / "a.jsonl", [row(1), row(2), row(3), row(2)])
    write_jsonl(tmp_path / "data" / "b.jsonl", [row(4), row(1, "。"), row(5)])
    write_jsonl(tmp_path / "data" / "validation.jsonl", [row(6), row(3, "！")])
    return tmp_path / "data"


def test_duplicates_are_counted_across_files_and_sides(folder, capsys):
    run_here(SCRIPT, "--file_path", folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[6] == (
        f"exact duplicates: 1 of 7 rows, such as {folder / 'a.jsonl'}:4, which is also {folder / 'a.jsonl'}:2"
    )
    assert re.fullmatch(
        r"near-duplicates \(--near_duplicates 0.8\): 1 of 7 rows, in 1 group\(s\), such as "
        rf"{folder / 'b.jsonl'}:2 and {folder / 'a.jsonl'}:1 \(0.99\)",
        lines[7],
    )
    assert re.fullmatch(
        r"held-out rows that resemble training rows \(--near_duplicates 0.8\): 1 of 2, such as "
        rf"{folder / 'validation.jsonl'}:2 and {folder / 'a.jsonl'}:3 \(0.99\)",
        lines[8],
    )
    assert lines[9:] == ["every row can be used"]
    run_here(SCRIPT, "--file_path", folder, "--near_duplicates", 0)
    assert capsys.readouterr().out.splitlines() == [*lines[:7], "every row can be used"]


def test_held_out_rows_that_are_trained_on_are_refused_as_in_training(folder, capsys):
    write_jsonl(folder / "validation.jsonl", [row(6), row(3)])
    with pytest.raises(UserError) as refused:
        run_here(SCRIPT, "--file_path", folder)
    assert f"{folder / 'validation.jsonl'}:2 is also {folder / 'a.jsonl'}:3" in str(refused.value)
    assert "every row can be used" not in capsys.readouterr().out
    advised = re.search(r"--allow_overlap True", str(refused.value))[0].split()
    run_here(SCRIPT, "--file_path", folder, *advised)
    assert capsys.readouterr().out.endswith("every row can be used\n")
    other = write_jsonl(folder.parent / "other.jsonl", [row(5)])
    with pytest.raises(UserError, match=r"other.jsonl:1 is also .*b.jsonl:3"):
        run_here(SCRIPT, "--file_path", folder / "b.jsonl", "--validation_file_dir", other)


def test_a_folder_of_held_out_files_alone_is_checked(folder, capsys):
    (folder / "a.jsonl").unlink()
    (folder / "b.jsonl").unlink()
    run_here(SCRIPT, "--file_path", folder)
    assert capsys.readouterr().out.endswith("every row can be used\n")


def test_statistics_are_written_for_programs_and_for_people(folder, tmp_path, capsys):
    base = make_tiny(tmp_path / "base")
    out = tmp_path / "out"
    flags = ("--file_path", folder, "--report", out / "r.html", "--stats_file", out / "s.json")
    run_here(SCRIPT, *flags, "--model_name_or_path", base, "--model_max_length", 500)
    found = read_json(out / "s.json")
    by_name = {file["file"]: file for file in found["files"]}
    a = by_name[str(folder / "a.jsonl")]
    assert (a["rows"], a["usable"], a["exact_duplicates"], a["near_duplicates"]) == (4, 4, 1, 0)
    assert a["languages"] == {"Chinese": 4} and a["turns"] == {"2": 4} and a["characters_of_answers"]["100"] == 120
    assert a["limit"] == 500 and a["longer_than_limit"] == 0 and a["tokens"]["50"] > 120
    assert by_name[str(folder / "b.jsonl")]["near_duplicates"] == 1
    assert len(found["notes"]) == 3 and found["problems"] == {}
    page = (out / "r.html").read_text(encoding="utf-8")
    assert all(note in page for note in found["notes"]) and page.count("<svg") == 12
    # Nothing is replaced unless it is asked for, and nothing is read before that is known.
    capsys.readouterr()
    with pytest.raises(UserError, match=r"r.html exists.*--overwrite True"):
        run_here(SCRIPT, *flags)
    assert capsys.readouterr().out == ""
    run_here(SCRIPT, *flags, "--overwrite", True)


def test_statistics_never_replace_data(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "Q", "response": "A"}]', encoding="utf-8")
    with pytest.raises(UserError, match="is one of the files to check"):
        run_here(SCRIPT, "--file_path", path, "--stats_file", path, "--overwrite")
    for flag, name in (("--stats_file", "rows.jsonl"), ("--report", "rows.json")):
        with pytest.raises(UserError, match="must end with"):
            run_here(SCRIPT, "--file_path", path, flag, tmp_path / name)


def test_problems_are_counted_by_reason(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row(1), "{broken", "{broken"])
    flags = ("--file_path", path, "--stats_file", tmp_path / "s.json")
    with pytest.raises(UserError, match="2 problem"):
        run_here(SCRIPT, *flags)
    found = read_json(tmp_path / "s.json")
    assert list(found["problems"].values()) == [2] and found["files"][0]["usable"] == 1


def test_a_threshold_that_means_nothing_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_here(SCRIPT, "--file_path", tmp_path, "--near_duplicates", 0.3)
    assert "must be above 0.5" in capsys.readouterr().err
