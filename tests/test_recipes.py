"""Recipes of the pipeline: programs accept them, each setting has its reason, and the pages quote them correctly."""

import importlib
import re
from enum import Enum
from pathlib import Path
from unittest.mock import patch

from run_pipeline import STAGES
from tests.helpers import ROOT

import pytest
import yaml

RECIPES = sorted((ROOT / "recipes").glob("*/*"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md")])
# A quotation is a link to a recipe whose text is what that sets: [`beta: 2`](../recipes/tiny/dpo.yaml).
QUOTATION = re.compile(r"\[`(\w+: [^`]+)`\]\(([^)]*recipes/\w+/\w+\.yaml)\)")
QUOTED = [
    pytest.param(quoted, page.parent / link, id=f"{page.name}: {quoted}")
    for page in PAGES
    for quoted, link in QUOTATION.findall(page.read_text(encoding="utf-8"))
]


class Stopped(BaseException):
    """Ends a program after its command line."""


def name_of(recipe):
    return f"{recipe.parent.name}/{recipe.name}"


def settings_of(recipe):
    return yaml.safe_load(recipe.read_text(encoding="utf-8"))


def parse(stage, *flags):
    """What the parser of a stage makes of these flags: {name: value}, and the names that were given."""
    module = importlib.import_module(Path(STAGES[stage][0]).stem)
    original, parsed = module.parse_args, []

    def parse_args(*classes, **options):
        parsed.extend(original(*classes, **options, argv=list(map(str, flags))))
        raise Stopped

    with patch.object(module, "parse_args", parse_args), pytest.raises(Stopped):
        module.main()
    values = {name: value for group in parsed for name, value in vars(group).items()}
    return values, {name for group in parsed for name in group.given}


def is_written_value(value, written):
    """Whether a parsed value is the one in the file, where a number like 1e-3 is text."""
    if isinstance(written, list):
        return len(value) == len(written) and all(map(is_written_value, value, written))
    if isinstance(value, Enum):
        return value.value == written
    return value == (type(value)(written) if isinstance(value, float) else written)


def test_each_stage_has_a_recipe_for_the_tiny_model_and_for_real_ones():
    expected = sorted(f"{size}/{stage}.yaml" for size in ("tiny", "real") for stage in STAGES)
    assert [name_of(recipe) for recipe in RECIPES] == expected


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_the_program_of_a_stage_takes_its_recipe(tmp_path, recipe):
    paths = ("--model_name_or_path", tmp_path, "--output_dir", tmp_path / "out")
    values, given = parse(recipe.stem, "--config", recipe, *paths)
    # The libraries have one flag for both: below 1 it is a share of the steps.
    settings = {
        "warmup_steps" if name == "warmup_ratio" else name: value for name, value in settings_of(recipe).items()
    }
    assert given == {"model_name_or_path", "output_dir", *settings}
    assert not {name: values[name] for name in settings if not is_written_value(values[name], settings[name])}


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_each_setting_has_its_reason_next_to_it(recipe):
    lines = recipe.read_text(encoding="utf-8").splitlines()
    settings = [line for line in lines if not line.lstrip().startswith("#")]
    assert [line for line in settings if not re.fullmatch(r"\w+: \S.*? # \S.*", line)] == []
    assert lines[0].startswith("# ") and len(settings) == len(settings_of(recipe))


@pytest.mark.parametrize("quoted, recipe", QUOTED)
def test_the_pages_quote_recipes_correctly(quoted, recipe):
    assert yaml.safe_load(quoted).items() <= settings_of(recipe).items()


@pytest.mark.parametrize("name", ["orpo_training", "grpo_training"])
def test_the_guides_that_state_a_setting_of_the_tiny_model_quote_its_recipe(name):
    for page in (f"{name}.md", f"{name}_zh.md"):
        assert any(parameters.id.startswith(f"{page}: ") for parameters in QUOTED)


def test_the_results_state_the_steps_of_reinforcement_learning():
    ppo, grpo = (settings_of(ROOT / "recipes" / "tiny" / f"{stage}.yaml") for stage in ("ppo", "grpo"))
    answers = {
        "PPO": (ppo["max_steps"], ppo["per_device_train_batch_size"] * ppo["num_mini_batches"]),
        "GRPO": (grpo["max_steps"], grpo["per_device_train_batch_size"] * grpo["gradient_accumulation_steps"]),
    }
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    stated = re.findall(r"(PPO|GRPO):\s+commit\s+\w+, (\d+) steps of (\d+) answers", text)
    assert {name: (int(steps), int(number)) for name, steps, number in stated} == answers
