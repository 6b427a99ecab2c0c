"""The guides that citing is learned from: their questions, quotations, and the whole recipe with a few steps."""

import shlex
import sys
from unittest.mock import patch

from benchmarks import hospital_guides
from medicalgpt.errors import UserError
from medicalgpt.formats.citations import UNKNOWN, read_citations
from tests.docs import code_blocks
from tests.helpers import ROOT, read_json, run_program

import pytest


def draw(folder, *flags):
    flags = ["--output_dir", folder, "--train_hospitals", 6, "--unseen_hospitals", 2, "--quotations", 200, *flags]
    with patch.object(sys, "argv", ["hospital_guides", *map(str, flags)]):
        hospital_guides.main()


def test_every_answer_is_in_a_guide_and_no_hospital_is_in_both_parts(tmp_path):
    draw(tmp_path / "a")
    guides = {}
    for part in ("train", "unseen"):
        guides[part] = [
            line
            for language in ("en", "zh")
            for line in (tmp_path / "a" / part / "documents" / f"{language}.txt").read_text().split("\n\n")
        ]
        questions = read_json(tmp_path / "a" / part / "questions.jsonl")
        missing = [row for row in questions if row["file"] is None]
        assert 0.1 < len(missing) / len(questions) < 0.3
        text = "\n".join(guides[part])
        assert all(row["evidence"] in text for row in questions if row["file"])
        assert len(text.splitlines()) > len({row["evidence"] for row in questions if row["file"]})
    names = {language: list(hospital_guides.hospital_names(language)) for language in ("en", "zh")}
    for every in names.values():
        in_train, in_unseen = ({name for name in every if name in "\n".join(guides[part])} for part in guides)
        assert len(in_train) == 6 and len(in_unseen) == 2 and not in_train & in_unseen
        quotations = (tmp_path / "a" / "train" / "pretrain" / "quotations.jsonl").read_text()
        assert not any(name in quotations for name in in_unseen)
    draw(tmp_path / "b")
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_a_quotation_cites_the_passage_that_it_copies_or_refuses(tmp_path):
    draw(tmp_path / "a")
    numbers = set()
    for row in read_json(tmp_path / "a" / "train" / "pretrain" / "quotations.jsonl"):
        passages, question, reply = row["text"].rsplit("\n", 2)
        tag, places = passages[1:5], passages.split("\n\n")
        if reply in UNKNOWN.values():
            continue
        answer = read_citations(reply, tag, len(places))
        (number,) = answer.cited
        assert answer.text.replace(f"[{number}]", "").strip() in passages.split("\n\n")[number - 1]
        numbers.add(number)
    assert numbers == {1, 2, 3}


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--train_hospitals", "0"], "must be 1 or more"), (["--unseen_hospitals", "99"], "together at most")],
)
def test_wrong_numbers_are_refused(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        draw(tmp_path / "a", *flags)
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="exists"):
        draw(tmp_path / "b")


@pytest.mark.slow
def test_the_recipe_runs_as_it_stands_with_fewer_steps(tmp_path):
    (recipe,) = [text for _, text in code_blocks(ROOT / "docs" / "results.md") if "hospital_guides" in text]
    small = {
        "benchmarks.hospital_guides": "--train_hospitals 4 --unseen_hospitals 1 --quotations 200",
        "build_tiny_model.py": "--hidden_size 32 --intermediate_size 64 --num_layers 2",
        "pretraining.py": "--max_steps 3",
        "supervised_finetuning.py": "--max_steps 3",
        "grpo_training.py": "--max_steps 2 --num_generations 4 --per_device_train_batch_size 8",
        "chatpdf.py": "",
    }
    lines = recipe.replace("\\\n", " ").replace("outputs/", f"{tmp_path}/").strip().splitlines()
    for line in lines:
        words = shlex.split(line)[1:]
        program = words.pop(0) if words[0] != "-m" else words[1]
        for flag, value in zip(*[iter(small[program].split())] * 2, strict=True):
            if flag in words:
                words[words.index(flag) + 1] = value
            else:
                words += [flag, value]
        if program.startswith("benchmarks"):
            with patch.object(sys, "argv", [program, *words[2:]]):
                hospital_guides.main()
        else:
            run_program(program, *words)
    measures = read_json(tmp_path / "citing" / "grpo.json")["measures"]["en"]
    assert 0 <= measures["reward `citations` of the answers"] <= 1
    rows = read_json(tmp_path / "citing" / "grpo" / "metrics.jsonl")
    assert any("rewards/citations/mean" in row for row in rows)
