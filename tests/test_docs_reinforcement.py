"""The pages of PPO and GRPO say what the programs do: rewards of examples, and a line for each logged number."""

import re
from pathlib import Path

from medicalgpt.rewards.reward_check import check_rewards
from medicalgpt.rewards.rewards import SYSTEM_PROMPT, accuracy_reward, choose_rewards
from tests.docs import code_blocks
from tests.helpers import ROOT, read_json, run_here, write_jsonl
from tests.silent.ppo import make_place, ppo_flags, prompts
from tests.silent.tasks import task_flags, tasks
from tests.tiny import make_tiny

import pytest

PAGES = [ROOT / "docs" / name for name in ("grpo_training.md", "grpo_training_zh.md")]
LABELLED = "data/grpo_labelled/labelled.jsonl"
EVALUATED = ("--eval_strategy", "steps", "--eval_steps", 1)


def examples(page: Path) -> list[tuple[str, str, str, str]]:
    """(type, right answer, answer block, reward) of each row of the table of examples."""
    return re.findall(r"^\| (choice|number|text) \| `(.+?)` \| `(.+?)` \| (\S+) \|$", page.read_text("utf-8"), re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_accuracy_get_the_reward_that_stands_there(page):
    rows = examples(page)
    kinds, golds, answers, rewards = zip(*rows, strict=True)
    replies = [f"<think>So.</think><answer>{answer}</answer>" for answer in answers]
    assert accuracy_reward(replies, answer=golds, type=kinds) == [float(reward) for reward in rewards]
    assert rows == examples(PAGES[0]) and set(kinds) == {"choice", "number", "text"}


def test_the_system_prompt_is_the_one_that_the_page_shows():
    assert f"{SYSTEM_PROMPT}\n" in [text for _, text in code_blocks(PAGES[0])]


def test_the_rewards_of_the_example_run(tmp_path):
    (source,) = [text for language, text in code_blocks(PAGES[0]) if language == "python"]
    (tmp_path / "my_rewards.py").write_text(source, encoding="utf-8")
    functions = choose_rewards(["short_answer", "shows_its_sum"], str(tmp_path / "my_rewards.py"))
    replies = [
        [{"role": "assistant", "content": "<think>3 x 4 = 12</think><answer>12 mg</answer>"}],
        [{"role": "assistant", "content": f"<think>Twelve.</think><answer>{'12 mg, ' * 9}</answer>"}],
        [{"role": "assistant", "content": "x = 12"}],
    ]
    columns = {"prompts": ["How many mg?"] * 3, "type": ["number", "text", "number"]}
    assert functions["short_answer"](completions=replies, **columns) == [1.0, 0.0, 0.0]
    assert functions["shows_its_sum"](completions=replies, **columns) == [1.0, None, 0.0]
    assert functions["shows_its_sum"](completions=replies, **{**columns, "type": ["number"] * 3}) == [1.0, 0.0, 0.0]


def test_the_table_of_the_check_is_the_one_that_comes(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    check_rewards(LABELLED, choose_rewards(["accuracy", "format", "safety", "repetition"]))
    shown = next(text for _, text in code_blocks(PAGES[0]) if text.startswith("60 pairs"))
    assert capsys.readouterr().out.strip() == shown.strip()


def explained(page: Path) -> set[str]:
    """The names in the tables of a page, those that follow another one in a cell with its beginning."""
    cells = re.findall(r"^\| (`[^|]+?) \|", page.read_text(encoding="utf-8"), re.M)
    names = set()
    for cell in cells:
        first, *others = re.findall("`([^`]+)`", cell)
        names |= {first, *others, *(f"{first.rpartition('/')[0]}/{other}" for other in others)}
    return names


def logged(folder: Path) -> set[str]:
    """The names in metrics.jsonl, apart from those of the library that count time."""
    names = {name for row in read_json(folder / "metrics.jsonl") for name in row}
    timed = re.compile(r"step|seconds|total_flos|train_\w+|eval_(runtime|\w+_per_second)")
    return {name for name in names if not timed.fullmatch(name)}


def test_each_number_of_ppo_is_explained(tmp_path):
    place = make_place(tmp_path)
    write_jsonl(place / "data" / "validation.jsonl", prompts(2, start=90))
    run_here("ppo_training.py", *ppo_flags(place, tmp_path / "out", *EVALUATED))
    names = logged(tmp_path / "out")
    assert {"score", "explained_variance", "eval_score"} <= names
    for page in ("ppo_training.md", "ppo_training_zh.md"):
        assert not names - explained(ROOT / "docs" / page), page


def test_each_number_of_grpo_is_explained(tmp_path):
    model = make_tiny(tmp_path / "model")
    write_jsonl(tmp_path / "data" / "train.jsonl", tasks(4))
    write_jsonl(tmp_path / "data" / "validation.jsonl", tasks(2, start=90))
    more = ("--max_steps", 2, "--num_iterations", 2, "--beta", 0.1, *EVALUATED)
    run_here("grpo_training.py", *task_flags(model, tmp_path, *more))
    names = {name.replace("rewards/noted/", "rewards/NAME/") for name in logged(tmp_path / "out")}
    assert {"reward", "kl", "ratio_deviation", "eval_reward"} <= names
    for page in PAGES:
        known = explained(page)
        # All of an evaluation of answers have one line.
        known |= {f"eval_{name}" for name in known if name.startswith("completions/")}
        assert not names - known, page.name
