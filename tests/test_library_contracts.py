"""What the code uses of libraries beyond their public interface: the table in docs/design.md, and its contracts."""

import ast
import atexit
import ctypes
import importlib.util
import inspect
import platform
import re
from argparse import ArgumentParser
from functools import cache
from pathlib import Path

from medicalgpt.training.cpu import M_MMAP_THRESHOLD, MMAP_THRESHOLD
from tests.tiny import make_tiny

import pytest
import torch
import uvicorn
from accelerate.state import GradientState
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from transformers import AutoModelForCausalLM, Trainer
from trl import GRPOTrainer, SFTTrainer
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

ROOT = Path(__file__).resolve().parent.parent
HEADING = "## Where we reach into libraries\n"
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "uvicorn", "fastapi", "starlette")
# Documented although they begin with an underscore.
PUBLIC = {"_asdict", "_replace", "_exit"}


def rows():
    """(file, symbols, names in `what`, tests) of each row of the table."""
    section = (ROOT / "docs/design.md").read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    found = []
    for line in [line for line in section.splitlines() if line.startswith("| `")]:
        where, what, _, tests = line.strip("| ").split(" | ")
        file, *symbols = re.findall("`([^`]+)`", where)
        names = {part for text in re.findall("`([^`]+)`", what) for part in re.findall(r"\w+", text)}
        found.append((file, symbols, names, re.findall("`([^`]+)`", tests)))
    return found


@cache
def tree(file):
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def ours():
    """Files of the package and the programs."""
    return [str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *sorted((ROOT / "medicalgpt").rglob("*.py"))]]


@cache
def own_names():
    """Private names that the code itself defines: functions, classes, methods, attributes."""
    names = set()
    for node in (node for file in ours() for node in ast.walk(tree(file))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def private(names):
    return {name for name in names if re.match("_[a-z]", name)} - PUBLIC


def attributes(node):
    return [one for one in ast.walk(node) if isinstance(one, ast.Attribute)]


@cache
def source(kind):
    return inspect.getsource(kind)


def has(kind, name):
    """Whether a library's class defines a method of this name, or has it as an attribute of `self`."""
    return name in vars(kind) or re.search(rf"\bself\.{name}\b", source(kind)) is not None


def private_names(file):
    """Private names of libraries in a file: of library classes that it extends, and of objects that are not its own."""
    others = {one.attr for one in attributes(tree(file)) if ast.unparse(one.value) not in ("self", "super()", "cls")}
    classes = [node for node in tree(file).body if isinstance(node, ast.ClassDef) and node.bases]
    used, bases = set(), set()
    for node in classes:
        kind = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), node.name)
        bases |= {base for base in kind.__mro__ if base.__module__.partition(".")[0] in LIBRARIES}
        used |= {one.attr for one in attributes(node) if ast.unparse(one.value) in ("self", "super()")}
        used |= {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
    bases = [base for base in bases if not base.__module__.startswith("torch._C")]
    inherited = {name for name in private(used) if any(has(base, name) for base in bases)}
    return (private(others) - own_names()) | inherited


@pytest.mark.parametrize("file", ours())
def test_private_names_are_in_the_table(file):
    """If a library gives up a name, the table has a name too many here."""
    listed = set().union(*(names for place, _, names, _ in rows() if place == file))
    assert private(listed) == private_names(file)


def test_places_and_tests_of_the_table_exist():
    table = rows()
    assert len(table) > 20
    for file, symbols, _, tests in table:
        defined = {node.name for node in tree(file).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert symbols and set(symbols) <= defined, file
        assert tests, file
        for name in tests:
            assert (ROOT / "tests" / name).is_file() if name.endswith(".py") else callable(globals().get(name)), name


@pytest.mark.parametrize(
    ("kind", "name", "parameters"),
    [
        (Trainer, "get_batch_samples", "epoch_iterator num_batches device"),
        (Trainer, "_remove_unused_columns", "dataset description"),
        (Trainer, "_get_eval_sampler", "eval_dataset"),
        (Trainer, "_save", "output_dir state_dict"),
        (Trainer, "_load_from_checkpoint", "resume_from_checkpoint model"),
        (Trainer, "_load_best_model", ""),
        (Trainer, "_load_rng_state", "checkpoint"),
        (Trainer, "_load_optimizer_and_scheduler", "checkpoint"),
        (Trainer, "_inner_training_loop", "batch_size args resume_from_checkpoint trial ignore_keys_for_eval"),
        (
            Trainer,
            "_init_training_state",
            "max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
        ),
        (Trainer, "_prepare_for_training", "max_steps train_dataloader resume_from_checkpoint"),
        (Trainer, "_evaluate", "trial ignore_keys_for_eval skip_scheduler"),
        (Trainer, "_determine_best_metric", "metrics trial"),
        (
            Trainer,
            "_run_epoch",
            "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
            "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
        ),
        (Trainer, "_finalize_training", "trial num_train_samples start_time"),
        (
            Trainer,
            "_maybe_log_save_evaluate",
            "tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate",
        ),
        (Trainer, "_save_checkpoint", "model trial"),
        (Trainer, "_load_from_checkpoint", "resume_from_checkpoint model"),
        (Trainer, "_load_best_model", ""),
        (Trainer, "_get_grad_norm", "model grad_norm"),
        (SFTTrainer, "_save_checkpoint", "model trial"),
        (GRPOTrainer, "_save_checkpoint", "model trial"),
        (GRPOTrainer, "_prepare_inputs", "generation_batch"),
        (GRPOTrainer, "_generate_and_score_completions", "inputs"),
        (GRPOTrainer, "_tokenize_prompts", "prompts"),
        (GRPOTrainer, "_calculate_rewards", "inputs prompts completions completion_ids_list"),
        (LocalElasticAgent, "_invoke_run", "role"),
        (LocalElasticAgent, "_monitor_workers", "worker_group"),
        (LocalElasticAgent, "_shutdown", "death_sig timeout"),
        (uvicorn.Server, "run", "sockets"),
        (uvicorn.Server, "startup", "sockets"),
        (uvicorn.Server, "handle_exit", "sig frame"),
        (uvicorn.Server, "on_tick", "counter"),
        (HttpToolsProtocol, "connection_made", "transport"),
        (HttpToolsProtocol, "connection_lost", "exc"),
        (HttpToolsProtocol, "data_received", "data"),
        (HttpToolsProtocol, "send_400_response", "msg"),
        (HttpToolsProtocol, "on_message_begin", ""),
        (HttpToolsProtocol, "on_header", "name value"),
        (HttpToolsProtocol, "on_headers_complete", ""),
        (HttpToolsProtocol, "on_body", "body"),
        (HttpToolsProtocol, "on_message_complete", ""),
        (HttpToolsProtocol, "on_response_complete", ""),
        (HttpToolsProtocol, "timeout_keep_alive_handler", ""),
    ],
)
def test_signatures_of_overridden_methods(kind, name, parameters):
    assert list(inspect.signature(getattr(kind, name)).parameters)[1:] == parameters.split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    return folder, AutoModelForCausalLM.from_pretrained(folder)


def test_attention_and_origin_of_a_model(model):
    folder, loaded = model
    assert loaded._supports_sdpa and loaded.config._attn_implementation == "sdpa"
    loaded.set_attn_implementation("eager")
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config._name_or_path == loaded.config.name_or_path == str(folder)
    # A folder has no commit, a model of the hub has.
    assert loaded.config._commit_hash is None


def test_fingerprint_of_a_dataset():
    same, again, other = (Dataset.from_dict({"text": [text]}) for text in ("a", "a", "b"))
    assert same._fingerprint == again._fingerprint != other._fingerprint


def test_exit_handlers_can_be_run():
    assert callable(atexit._run_exitfuncs)


def test_flags_of_argparse():
    parser = ArgumentParser()
    action = parser.add_argument("--flag")
    assert action in parser._actions and parser._option_string_actions["--flag"] is action


def test_options_of_save_pretrained():
    assert {"save_embedding_layers", "selected_adapters"} <= inspect.signature(
        PeftModel.save_pretrained
    ).parameters.keys()


def test_dropout_of_lora_layers(model):
    """A layer calls the module in `lora_dropout` under the adapter's name."""
    _, base = model
    adapted = get_peft_model(base, LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"]))
    layer = next(module for module in adapted.modules() if isinstance(module, LoraLayer))
    assert type(layer.lora_dropout["default"]) is torch.nn.Dropout
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    inputs = torch.ones(1, layer.in_features)
    layer.lora_dropout["default"] = torch.nn.Identity()
    assert not torch.equal(layer(inputs), layer.base_layer(inputs))
    # 0 for each number up to 2, so that nothing is left for the adapter.
    layer.lora_dropout["default"] = torch.nn.Threshold(2.0, 0.0)
    assert torch.equal(layer(inputs), layer.base_layer(inputs))


def test_repacking_of_4_bit_weights():
    """The flag that is cleared is the one that decides about repacking."""
    nn = pytest.importorskip("bitsandbytes").nn
    assert hasattr(nn.Linear4bit(4, 4), "support_avx512bf16_for_cpu")
    condition = re.search(r"if \((.*?)\):\n", inspect.getsource(nn.Linear4bit.forward), re.DOTALL)[1]
    assert "and self.support_avx512bf16_for_cpu" in condition and "packing_format_for_cpu" in condition


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")
def test_threshold_of_malloc():
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD) == 1


def test_optimizer_state_of_another_cpu_process():
    importlib.import_module("medicalgpt.training.trainers")
    storage = torch.ones(2).untyped_storage()
    assert torch.serialization.default_restore_location(storage, "cpu:1") is storage


def test_gradients_are_synchronized_on_request():
    state = GradientState()
    before = state.sync_gradients
    try:
        for value in (False, True):
            state._set_sync_gradients(value)
            assert state.sync_gradients is value
    finally:
        state._set_sync_gradients(before)


def test_attributes_of_sharded_parameters():
    """Read from the files: to import DeepSpeed takes seconds."""
    spec = importlib.util.find_spec("deepspeed")
    if spec is None:
        pytest.skip("DeepSpeed is not installed")
    folder = Path(spec.origin).parent / "runtime" / "zero"
    sharding = (folder / "partition_parameters.py").read_text(encoding="utf-8")
    for name in ("ds_id", "ds_shape", "ds_numel", "ds_tensor"):
        assert re.search(rf"param\.{name} = ", sharding), name
    assert re.search(r"self\.bit16_groups\b.* = ", (folder / "stage_1_and_2.py").read_text(encoding="utf-8"))


def test_a_stream_of_datasets_loses_its_shuffle_buffer_at_a_resume():
    """When this fails, data/streaming.py can leave the order and the position to the library (docs/data.md)."""
    rows = Dataset.from_dict({"number": list(range(1000))})

    def stream():
        return rows.to_iterable_dataset(num_shards=8).shuffle(seed=1, buffer_size=100)

    stopped, seen = stream(), []
    for row in stopped:
        seen.append(row["number"])
        if len(seen) == 400:
            state = stopped.state_dict()
            break
    resumed = stream()
    resumed.load_state_dict(state)
    after = [row["number"] for row in resumed]
    assert set(range(1000)) - set(seen) - set(after) and set(seen) & set(after)
    whole = [row["number"] for row in stream()]
    assert sorted(whole) == list(range(1000)) and whole != seen + after


def test_a_stream_of_datasets_has_another_order_on_two_processes():
    rows = Dataset.from_dict({"number": list(range(1000))})

    def steps(processes, batch):
        stream = rows.to_iterable_dataset(num_shards=8).shuffle(seed=1, buffer_size=100)
        parts = [
            [row["number"] for row in split_dataset_by_node(stream, rank=rank, world_size=processes)]
            for rank in range(processes)
        ]
        return [{number for part in parts for number in part[step * batch : (step + 1) * batch]} for step in range(125)]

    assert sum(one == two for one, two in zip(steps(1, 8), steps(2, 4), strict=True)) == 0
