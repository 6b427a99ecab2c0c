"""Command lines of MedicalGPT, and what becomes of each of its flags."""

import os
import re
from functools import cache
from importlib import import_module
from typing import Any
from unittest.mock import patch

from medicalgpt.parser import StrictParser, parse_args
from medicalgpt.refusals import (
    ACCEPTED,
    CPU_ONLY,
    IMPLIES,
    PROGRAMS,
    QUOTIENTS,
    REFUSED,
    RENAMED,
    RENAMED_VALUES,
    SUMS,
)
from tests.helpers import ROOT
from tests.launch_lines import LINES

import pytest


class Parsed(Exception):
    """What a program would run with, instead of running."""


def parsed(program: str, *argv: Any) -> dict[str, Any]:
    """All values that a program would run with, by name."""
    module = import_module(program.removesuffix(".py"))

    def stop(*classes: type, **options: Any) -> None:
        raise Parsed(parse_args(*classes, **options, argv=list(map(str, argv))))

    with patch.object(module, "parse_args", stop), pytest.raises(Parsed) as found:
        module.main()
    return {name: value for group in found.value.args[0] for name, value in vars(group).items()}


@pytest.mark.parametrize(("program", "line"), [line[1:] for line in LINES], ids=[line[0] for line in LINES])
def test_lines_of_medicalgpt_are_understood(program, line, grouped):
    values = parsed(program, *line.split())
    source = {"validate_jsonl.py": "file_path", "convert_dataset.py": "in_file"}.get(program, "model_name_or_path")
    assert values[source] in ("M", "F")


@pytest.mark.parametrize(
    ("program", "line", "expected"),
    [
        ("supervised_finetuning.py", "--max_source_length 256 --max_target_length 300", {"model_max_length": 556}),
        ("ppo_training.py", "--max_source_length 1024 --max_completion_length 1000", {"model_max_length": 2024}),
        ("ppo_training.py", "--max_source_length 100", {"model_max_length": 228, "response_length": 128}),
        ("grpo_training.py", "--max_prompt_length 512 --max_completion_length 100", {"model_max_length": 612}),
        ("dpo_training.py", "--max_prompt_length 77", {"max_source_length": 77}),
        ("grpo_training.py", "--lora_r 3 --lora_target_modules q_proj v_proj", {"target_modules": "q_proj,v_proj"}),
        ("grpo_training.py", "--lora_target_modules q_proj,v_proj", {"target_modules": "q_proj,v_proj"}),
        ("grpo_training.py", "--lora_target_modules q_proj, v_proj", {"target_modules": "q_proj,v_proj"}),
        ("grpo_training.py", "--train_samples 9 --reward_model_name_or_path R", {"max_train_samples": 9}),
        ("grpo_training.py", "--train_samples -1 --lora_r 3", {"max_train_samples": None, "lora_rank": 3}),
        ("grpo_training.py", "--subset_name main", {"dataset_config_name": "main"}),
        ("ppo_training.py", "--reward_model_name_or_path R", {"reward_model_path": "R"}),
        ("ppo_training.py", "--batch_size 8", {"num_mini_batches": 8, "per_device_train_batch_size": 1}),
        (
            "ppo_training.py",
            "--batch_size 8 --mini_batch_size 2 --gradient_accumulation_steps 2",
            {"num_mini_batches": 2, "per_device_train_batch_size": 2},
        ),
        ("ppo_training.py", "--total_episodes 30000 --per_device_train_batch_size 1", {"max_steps": 7500}),
        ("ppo_training.py", "--total_episodes 100", {"max_steps": 4}),
        ("ppo_training.py", "--early_stopping True", {"target_kl": 0.1}),
        ("ppo_training.py", "--early_stopping True --target_kl 0.3", {"target_kl": 0.3}),
        ("ppo_training.py", "--adap_kl_ctrl True --init_kl_coef 0.2", {"target_reference_kl": 6.0, "kl_coef": 0.2}),
        ("ppo_training.py", "--adap_kl_ctrl False --ppo_epochs 2", {"target_reference_kl": None, "num_ppo_epochs": 2}),
        ("ppo_training.py", "--log_with tensorboard --stop_token eos", {"report_to": ["tensorboard"]}),
        ("pretraining.py", "--attn_implementation flash_attention_2", {"flash_attn": True}),
        ("pretraining.py", "--attn_implementation sdpa", {"flash_attn": False}),
        ("pretraining.py", "--optim adamw_hf --device_map None", {"optim": "adamw_torch", "device_map": None}),
        ("inference.py", "--int4 --max_new_tokens 7", {"load_in_4bit": True, "max_new_tokens": 7}),
        ("openai_api.py", "--api_auth user:password", {"api_key": "user:password"}),
        ("gradio_demo.py", "--share", {"share": True}),
        ("chatpdf.py", "--corpus_files a.txt,b.pdf", {"files": ["a.txt", "b.pdf"]}),
        ("chatpdf.py", "--files a,b.txt c.txt --sim_model E", {"files": ["a,b.txt", "c.txt"], "sim_model_name": "E"}),
        ("chatpdf.py", "--prompt_template_name qwen --int8", {"template_name": "qwen", "load_in_8bit": True}),
    ],
)
def test_flags_keep_their_meaning_under_old_names(program, line, expected):
    values = parsed(program, "--model_name_or_path", "m", *line.split())
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("program", "line", "reason"),
    [
        ("pretraining.py", "--model_type bloom", "config.json"),
        ("pretraining.py", "--remove_unused_columns False", "only gets the columns"),
        ("pretraining.py", "--no_remove_unused_columns", "only gets the columns"),
        ("grpo_training.py", "--remove_unused_columns False", "Every field"),
        ("pretraining.py", "--max_train_samples -1", "All rows"),
        ("pretraining.py", "--max_eval_samples -1", "All held-out rows"),
        ("pretraining.py", "--group_by_text True", "packed into blocks"),
        ("pretraining.py", "--keep_linebreaks True", "are kept"),
        ("pretraining.py", "--use_fast_tokenizer False", "always the fast one"),
        ("pretraining.py", "--trust_remote_code True", "never run"),
        ("pretraining.py", "--push_to_hub False", "Nothing is uploaded"),
        ("inference.py", "--with_prompt", "chat template"),
        ("inference.py", "--gpus 0", "first visible GPU"),
        ("inference.py", "--resize_emb", "embedding rows"),
        ("merge_peft_adapter.py", "--lora_model L --output_dir O --resize_emb", "embedding rows"),
        ("openai_api.py", "--disable_gc", "Memory is kept"),
        ("ppo_training.py", "--reward_baseline 0.0", "subtracted"),
    ],
)
def test_what_is_not_needed_is_accepted_with_its_reason(program, line, reason, capsys):
    values = parsed(program, "--model_name_or_path", "m", *line.split())
    flag = next(token for token in reversed(line.split()) if token.startswith("--"))
    printed = capsys.readouterr().err
    assert printed.count("note: ") == 1 and f"note: {flag}" in printed and "is not needed" in printed
    assert reason in printed
    assert not any(flag[2:] in getattr(value, "given", ()) for value in values.values())


@pytest.mark.parametrize(
    ("program", "line", "reason"),
    [
        ("pretraining.py", "--push_to_hub True", "hf upload"),
        ("pretraining.py", "--group_by_text False", "--packing False"),
        ("pretraining.py", "--attn_implementation eager", "--attn_implementation sdpa is --flash_attn False"),
        ("grpo_training.py", "--remove_unused_columns True", "--remove_unused_columns"),
        ("ppo_training.py", "--reward_baseline 0.5", "omit the flag"),
        ("ppo_training.py", "--early_stopping False", "Omit it, and --target_kl"),
        ("ppo_training.py", "--batch_size 7 --per_device_train_batch_size 2", "must be a multiple of 2"),
        ("ppo_training.py", "--total_episodes 9 --max_steps 3", "set the same thing; keep --max_steps"),
        ("supervised_finetuning.py", "--max_source_length 256", "give both, at least 1 each"),
        ("supervised_finetuning.py", "--max_source_length 256 --max_target_length x", "give both, at least 1 each"),
        (
            "supervised_finetuning.py",
            "--max_source_length 9 --max_target_length 9 --model_max_length 17",
            "set the same thing; keep --model_max_length",
        ),
        ("inference.py", "--single_tune", "until /clear"),
        ("inference.py", "--gpus 3", "CUDA_VISIBLE_DEVICES=3 before the command"),
        ("chatpdf.py", "--device cuda:2", "CUDA_VISIBLE_DEVICES=2 before the command"),
    ],
)
def test_what_would_be_lost_is_refused(program, line, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        parsed(program, "--model_name_or_path", "m", *line.split())
    assert stop.value.code == 2 and reason in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--only_cpu", "--cpu_only", "--gpus="])
def test_front_ends_compute_on_the_cpu_if_asked(flag, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    parsed("inference.py", "--base_model", "m", flag, "--query", "q")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and "on the CPU" in capsys.readouterr().err


def test_gpus_that_cannot_be_hidden_any_more_are_an_error(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit):
        parsed("inference.py", "--base_model", "m", "--only_cpu", "--query", "q")
    assert "CUDA_VISIBLE_DEVICES= before the command" in capsys.readouterr().err


STAGES_AND_TOOLS = [program for program in PROGRAMS if program.endswith(".py")]


@cache
def parser_of(program: str) -> StrictParser:
    module = import_module(program.removesuffix(".py"))

    def stop(*classes: type, **options: Any) -> None:
        raise Parsed(StrictParser(*classes, **options))

    with patch.object(module, "parse_args", stop), pytest.raises(Parsed) as found:
        module.main()
    return found.value.args[0]


@pytest.mark.parametrize("program", STAGES_AND_TOOLS)
def test_a_flag_of_another_program_is_not_taken_for_a_misspelling(program):
    """Two names that both mean something are two things, however alike they look."""
    parser = parser_of(program)
    names = {name for other in STAGES_AND_TOOLS for name in parser_of(other).dest_of if "-" not in name}
    names |= {word[2:] for _, _, line in LINES for word in line.split() if word.startswith("--")}
    hints = {name: parser.hint(name) for name in sorted(names - parser.dest_of.keys() - RENAMED.keys())}
    assert len(hints) > 50
    hints.pop("out_file", None)  # It means the same as --output_file.
    # One letter apart: rows of inference.py, and files of a dataset. Neither does harm where the other was meant.
    hints.pop("data_file", None), hints.pop("data_files", None)
    assert {name: text for name, text in hints.items() if "did you mean" in text} == {}


def rows_of(page: str) -> list[list[str]]:
    """The cells of all tables of a page, without their headings."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return cells


@pytest.mark.parametrize("page", ["migration.md", "migration_zh.md"])
def test_the_migration_table_agrees_with_the_parsers(page):
    """Old flags are understood by some program, as what the table says; new ones and files are there."""
    parsers = {program: parser_of(program) for program in STAGES_AND_TOOLS}
    known = {name for parser in parsers.values() for name in parser.dest_of}
    understood = {*known, *RENAMED, *RENAMED_VALUES, *IMPLIES, *CPU_ONLY, *ACCEPTED, *REFUSED}
    understood |= {*QUOTIENTS, *(part for by in SUMS.values() for parts in by.values() for part in parts)}
    rows = rows_of(page)
    assert len(rows) > 70
    for old, new, *_ in rows:
        flags = re.findall(r"`--(\w+)`", old)
        assert set(flags) <= understood, old
        targets = re.findall(r"`--(\w+)`", new)
        assert set(targets) <= known, new
        for flag in flags:
            renamed = RENAMED.get(flag)
            if renamed and targets and " + " not in old and flag not in CPU_ONLY:
                assert renamed in targets, (flag, targets)
        for file in re.findall(r"`([\w/]+\.(?:py|sh))`", new):
            assert (ROOT / file).is_file(), file


def test_every_flag_of_the_launch_lines_is_in_the_migration_table_or_has_its_name_still():
    table = {flag for old, *_ in rows_of("migration.md") for flag in re.findall(r"`--(\w+)`", old)}
    known = {name for program in STAGES_AND_TOOLS for name in parser_of(program).dest_of}
    used = {word[2:] for *_, line in LINES for word in line.split() if word.startswith("--")}
    assert (
        used - known - table - {"early_stopping", "reward_baseline", "push_to_hub", "gen_model_type", "device"} == set()
    )


def test_both_migration_pages_have_the_same_rows():
    assert [row[:2] for row in rows_of("migration.md") if row[1] != "nothing yet"] == [
        row[:2] for row in rows_of("migration_zh.md") if row[1] != "无"
    ]
