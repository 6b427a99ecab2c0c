"""Each stage under each engine with each kind of weights: what is saved is the model that was trained."""

import shutil

from tests.helpers import ROOT, read_json, run_program
from tests.matrix import (
    OTHER_CELLS,
    OTHER_ENGINES,
    Cell,
    as_table,
    cells,
    flags,
    logits,
    make_place,
    output_of,
    reload,
)

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

# One of each engine that shards weights, in the quick suite; all others are slow.
QUICK = {"FSDP2": ["supervised_finetuning:full", "dpo_training:LoRA"], "ZeRO-3": ["ppo_training:LoRA"]}


def train_cells(folder, engine, *names):
    if not (folder / "base").exists():
        make_place(folder)
    run_program("tests/matrix.py", folder, engine, *names, processes=2, timeout=1_800, env={"PYTHONPATH": str(ROOT)})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of the engines whose cells were trained, each once."""
    done = {}

    def of(engine):
        if engine not in done:
            names = OTHER_CELLS if engine in OTHER_ENGINES else ()
            done[engine] = train_cells(tmp_path_factory.mktemp("matrix"), engine, *names)
        return done[engine]

    return of


def check_saved(place, cell):
    """The output folder holds the trained model: no empty tensor, and the logits of the live one."""
    found = read_json(output_of(place, cell) / "found.json")
    assert "failure" not in found, found.get("failure")
    assert "refusal" not in found, found.get("refusal")
    for file in output_of(place, cell).glob("**/*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert not [name for name in weights.keys() if 0 in weights.get_slice(name).get_shape()]
    assert (output_of(place, cell) / "checkpoint-2" / "manifest.json").is_file()
    live = torch.tensor(found["logits"])
    if cell.stage != "reward_modeling":
        assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(place / "base")), live, atol=1e-2), (
            "nothing was trained"
        )
    torch.testing.assert_close(logits(reload(place, cell)), live, rtol=1e-4, atol=1e-4)
    return found


@pytest.mark.parametrize("cell", [cell for engine in QUICK for cell in cells([engine], QUICK[engine])], ids="-".join)
def test_a_few_cells(quick, cell):
    check_saved(quick, cell)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    place = tmp_path_factory.mktemp("quick")
    for engine, names in QUICK.items():
        train_cells(place, engine, *names)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("cell", [*cells(), *cells(OTHER_ENGINES, OTHER_CELLS)], ids="-".join)
def test_every_cell(trained, cell):
    """Losses and logits are also those of plain data parallelism: the engines differ in where the numbers are kept."""
    found = check_saved(trained(cell.engine), cell)
    if cell.engine == "DDP":
        return
    plain = read_json(output_of(trained("DDP"), cell._replace(engine="DDP")) / "found.json")
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-3, abs=1e-5)
    torch.testing.assert_close(torch.tensor(found["logits"]), torch.tensor(plain["logits"]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("page", ["distributed.md", "distributed_zh.md"])
def test_the_page_shows_this_table(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert as_table(chinese=page.endswith("_zh.md")) in text


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["full", "LoRA"])
def test_fsdp2_resumes_where_it_stopped(tmp_path, weights):
    """From the parts of all processes: weights, optimizer states, schedule and rows."""
    place = make_place(tmp_path)
    cell = Cell("supervised_finetuning", "FSDP2", weights)
    common = [*flags(place, cell), "--lr_scheduler_type", "linear", "--save_total_limit", 3]

    def run(output, steps, *more):
        command = [*common, "--output_dir", place / output, "--max_steps", steps, *more]
        run_program("tests/fsdp_on_cpu.py", ROOT / "supervised_finetuning.py", *command, **two)
        (file,) = [path for path in (place / output).glob("*.safetensors")]
        return load_file(file)

    two = {"processes": 2, "timeout": 600, "env": {"PYTHONPATH": str(ROOT)}}
    whole = run("whole", 4)
    shutil.copytree(place / "whole", place / "half")
    shutil.rmtree(place / "half" / "checkpoint-4")
    resumed = run("half", 4, "--resume_from_checkpoint", "True")
    parts = place / "half" / "checkpoint-4"
    assert {path.name for path in parts.glob("*/*.distcp")} >= {"__0_0.distcp", "__1_0.distcp"}
    assert whole.keys() == resumed.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ZeRO-3", "FSDP2"])
@pytest.mark.parametrize("weights", ["full", "LoRA"])
def test_ppo_with_sharded_weights_answers_and_learns_as_under_zero_2_and_resumes(tmp_path, weights, engine):
    """Answers from other weights would change the losses. Processes answer for different times."""
    place = make_place(tmp_path)
    two = {"processes": 2, "timeout": 600, "env": {"PYTHONPATH": str(ROOT)}}

    def run(engine, output, *more):
        command = [*flags(place, Cell("ppo_training", engine, weights)), "--max_steps", 4, "--save_total_limit", 3]
        # Fewer held-out prompts than processes, so that one of them has none to answer.
        command += ["--max_eval_samples", 1, "--eval_strategy", "steps", "--eval_steps", 2]
        # At the rates of the cells, rounding would soon lead to other answers.
        command += ["--validation_split_percentage", 20, "--temperature", 1.0, "--learning_rate", 1e-3]
        program = ["tests/fsdp_on_cpu.py", ROOT / "ppo_training.py"] if engine == "FSDP2" else ["ppo_training.py"]
        run_program(*program, *command, "--output_dir", place / output, *more, **two)
        history = read_json(place / output / "trainer_state.json")["log_history"]
        (file,) = [path for path in (place / output).glob("*.safetensors")]
        return [row[name] for row in history for name in ("loss", "kl", "eval_score") if name in row], load_file(file)

    expected, weights_2 = run("ZeRO-2", "two")
    found, weights_3 = run(engine, "three")
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, weight in weights_2.items():
        # Adam divides by the gradient's size, so that where it is almost 0 its rounding decides about a step.
        assert ((weights_3[name] - weight).abs() < 1e-5).float().mean() > 0.99, name
    shutil.copytree(place / "three", place / "half")
    shutil.rmtree(place / "half" / "checkpoint-4")
    _, resumed = run(engine, "half", "--resume_from_checkpoint", "True")
    for name, weight in weights_3.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-7, msg=name)
