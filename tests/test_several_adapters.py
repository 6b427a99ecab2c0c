"""Several adapters on one base: combined as defined, merged in a chain, or each under its name; and what is refused."""

import copy
import json
import math
import shlex
import shutil
from argparse import Namespace
from pathlib import Path

import inference
from medicalgpt.adapter_args import COMBINATION_TYPES, CombinationArguments
from medicalgpt.args import ChatArguments, LoraArguments
from medicalgpt.errors import UserError
from medicalgpt.models.adapters import add_lora
from medicalgpt.models.combining import (
    DEFAULT_SEED,
    Combination,
    attach_adapters,
    combine,
    named_adapters,
    read_adapters,
)
from medicalgpt.models.hub import CheckpointError, fingerprint
from medicalgpt.models.loading import load_model
from medicalgpt.serving.batchers import make_batcher
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.engines import engine_from
from medicalgpt.serving.generation import Sampling
from openai_api import OpenAIArguments, Service, make_app
from template import apply_template
from tests.helpers import read_json, run_here
from tests.tiny import TURN_END, make_tiny, tiny_tokenizer

import pytest
import torch
from peft import TaskType
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, GenerationConfig

MERGE = "merge_peft_adapter.py"
ASKED = [{"role": "user", "content": "你好"}]
SHORT = Sampling(max_new_tokens=12)


def save_adapter(path: Path, base: str, seed: int, template: str = "chatml", rows: tuple[int, ...] = (), **lora) -> str:
    """An adapter with random weights, as a stage leaves it."""
    model = load_model(AutoModelForCausalLM, base)
    torch.manual_seed(seed)
    model = add_lora(model, LoraArguments(**lora), TaskType.CAUSAL_LM, new_rows=rows)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    run = {"stage": "some_stage", "base": {"name": base, "fingerprint": fingerprint(base)}}
    (path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    apply_template(tokenizer, template)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> dict[str, str]:
    """base; a, b: rank 4; wide: rank 8, rsLoRA, only attention, and not in layer 0; other: of another base."""
    folder = tmp_path_factory.mktemp("adapters")
    base, second = make_tiny(folder / "base", never_stops=True), make_tiny(folder / "second", seed=1)
    return {
        "base": base,
        "second": second,
        "a": save_adapter(folder / "a", base, 1, lora_rank=4),
        "b": save_adapter(folder / "b", base, 2, lora_rank=4, lora_alpha=4),
        "wide": save_adapter(
            folder / "wide", base, 3, lora_rank=8, use_rslora=True, freeze_layers="0", target_modules="q_proj,v_proj"
        ),
        "other": save_adapter(folder / "other", second, 4, lora_rank=4),
        "head": save_adapter(folder / "head", base, 5, modules_to_save="lm_head"),
        "rows": save_adapter(folder / "rows", base, 8, lora_rank=4, rows=(100, 101)),
        "vicuna": save_adapter(folder / "vicuna", base, 6, template="vicuna", lora_rank=4),
    }


def factors(adapter: str) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """A and B of each weight of the base, and the scale of their product, as the files have them."""
    config = read_json(Path(adapter, "adapter_config.json"))
    files = load_file(Path(adapter, "adapter_model.safetensors"))
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    prefix, end = "base_model.model.", ".lora_A.weight"
    return {
        name.removeprefix(prefix).removesuffix(end) + ".weight": (files[name], files[name.replace("lora_A", "lora_B")])
        for name in files
        if name.endswith(end)
    }, scale


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def with_updates(base: str, updates: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the base with these matrices added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, update in updates.items():
            model.get_parameter(name).add_(update)
    return logits(model)


def weighted_sum(adapters: list[str], weights: list[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        found, scale = factors(adapter)
        for name, (a, b) in found.items():
            total[name] = total.get(name, 0) + weight * scale * b @ a
    return total


def combined(work, names: list[str], *args, **options) -> torch.Tensor:
    adapters = read_adapters({name: work[name] for name in names})
    return logits(combine(load_model(AutoModelForCausalLM, work["base"]), adapters, Combination(*args, **options)))


@pytest.mark.parametrize("names", [("a", "b"), ("wide", "a"), ("a", "wide")])
def test_cat_is_the_weighted_sum_of_the_updates(work, names):
    """With any ranks, scales and layers, in any order; a negative weight subtracts."""
    expected = with_updates(work["base"], weighted_sum([work[name] for name in names], [0.7, -0.3]))
    torch.testing.assert_close(combined(work, names, (0.7, -0.3)), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, with_updates(work["base"], {}), atol=0.1)


def test_a_weight_scales_a_single_adapter(work):
    expected = with_updates(work["base"], weighted_sum([work["a"]], [0.5]))
    torch.testing.assert_close(combined(work, ["a"], (0.5,)), expected, atol=1e-4, rtol=1e-4)


def test_svd_of_full_rank_is_the_weighted_sum(work):
    expected = with_updates(work["base"], weighted_sum([work["wide"], work["a"]], [0.7, 0.3]))
    torch.testing.assert_close(
        combined(work, ["wide", "a"], (0.7, 0.3), "svd", svd_rank=12), expected, atol=1e-3, rtol=1e-3
    )
    assert not torch.allclose(combined(work, ["wide", "a"], (0.7, 0.3), "svd"), expected, atol=1e-2)


def kept(matrix: torch.Tensor, density: float) -> torch.Tensor:
    """The largest values of a matrix, the others zero."""
    smallest = matrix.abs().flatten().sort(descending=True).values[int(density * matrix.numel()) - 1]
    return torch.where(matrix.abs() >= smallest, matrix, 0)


def merged_factor(kind: str, matrices: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """One factor, by the definitions of the papers."""
    if kind == "linear":
        return sum(weight * matrix for weight, matrix in zip(weights, matrices, strict=True))
    trimmed = [kept(matrix, 0.5) for matrix in matrices]
    if kind == "magnitude_prune":
        return sum(weight * matrix for weight, matrix in zip(weights, trimmed, strict=True))
    sign = torch.where(sum(trimmed) >= 0, 1, -1)
    agree = [matrix.sign() == sign for matrix in trimmed]
    total = sum(weight * matrix * mask for weight, matrix, mask in zip(weights, trimmed, agree, strict=True))
    return total / sum(mask.int() for mask in agree).clamp(min=1)


@pytest.mark.parametrize("kind", ["linear", "magnitude_prune", "ties"])
def test_factors_are_combined_as_the_papers_define(work, kind):
    weights = (0.7, 0.3)
    (first, scale), (second, other_scale) = factors(work["a"]), factors(work["b"])
    # Each factor gets the root of a weight.
    roots = [math.sqrt(weight * each) for weight, each in zip(weights, (scale, other_scale), strict=True)]
    updates = {
        name: merged_factor(kind, [first[name][1], second[name][1]], roots)
        @ merged_factor(kind, [first[name][0], second[name][0]], roots)
        for name in first
    }
    density = {} if kind == "linear" else {"density": 0.5}
    torch.testing.assert_close(
        combined(work, ["a", "b"], weights, kind, **density), with_updates(work["base"], updates), atol=1e-4, rtol=1e-4
    )


def test_dare_depends_on_its_seed_alone(work):
    def drawn(seed: int, density: float = 0.5) -> torch.Tensor:
        return combined(work, ["a", "b"], (0.7, 0.3), "dare_linear", density=density, seed=seed)

    first = drawn(1)
    torch.manual_seed(99)
    assert torch.equal(first, drawn(1)) and not torch.allclose(first, drawn(2), atol=0.1)
    # Where nothing is dropped, it is linear.
    torch.testing.assert_close(drawn(1, density=1.0), combined(work, ["a", "b"], (0.7, 0.3), "linear"))


@pytest.mark.parametrize("kind", sorted(set(COMBINATION_TYPES) - {"cat", "linear", "svd", "ties"}))
def test_every_kind_gives_a_model_of_its_own(work, kind):
    names = ["a", "wide"] if kind.endswith("_svd") else ["a", "b"]
    assert not torch.allclose(
        combined(work, names, (0.7, 0.3), kind, density=0.5), combined(work, names, (0.7, 0.3)), atol=1e-2
    )


def test_modules_named_by_a_pattern_are_combined_with_others(work, tmp_path):
    """peft refuses a text next to a list, whatever the two name."""
    shutil.copytree(work["wide"], tmp_path / "pattern")
    path = tmp_path / "pattern" / "adapter_config.json"
    path.write_text(json.dumps(read_json(path) | {"target_modules": r".*\.1\..*\.(q_proj|v_proj)"}))
    known = {**work, "pattern": str(tmp_path / "pattern")}
    expected = with_updates(work["base"], weighted_sum([work["wide"], work["a"]], [0.7, 0.3]))
    torch.testing.assert_close(combined(known, ["pattern", "a"], (0.7, 0.3)), expected, atol=1e-4, rtol=1e-4)


def test_the_random_state_of_others_is_left(work):
    model = load_model(AutoModelForCausalLM, work["base"])
    adapters = read_adapters({name: work[name] for name in ("a", "b")})
    attach_adapters(copy.deepcopy(model), adapters)
    torch.manual_seed(0)
    attached = attach_adapters(copy.deepcopy(model), adapters)
    expected = torch.rand(3)
    del attached
    torch.manual_seed(0)
    found = combine(model, adapters, Combination((1.0, 1.0), "dare_linear", 0.5, seed=5))
    assert torch.rand(3).equal(expected)
    assert list(found.peft_config) == ["combined"], "those that it was made of take memory"


def test_an_adapter_of_another_base_is_not_attached(work):
    adapters = read_adapters({name: work[name] for name in ("a", "other")})
    with pytest.raises(CheckpointError, match=r"other was trained on .*second .* has other weights"):
        attach_adapters(load_model(AutoModelForCausalLM, work["base"]), adapters)


def flags(**given) -> Namespace:
    return Namespace(**{name: given.get(name) for name in CombinationArguments.__dataclass_fields__})


@pytest.mark.parametrize(
    ("given", "names", "message"),
    [
        ({"combination_type": "cat"}, "ab", "add --lora_weights 0.5,0.5"),
        ({"lora_weights": "0.5,0.5"}, "", "name these there"),
        ({"lora_weights": "1"}, "ab", r"1 weight\(s\) for 2 adapter\(s\) in --lora_model \(a, b\)"),
        ({"lora_weights": "0.5,x"}, "ab", "must be numbers"),
        ({"lora_weights": "0.5,nan"}, "ab", "must be numbers"),
        ({"lora_weights": "0,0"}, "ab", "without adapters"),
        ({"lora_weights": "1", "combination_type": "ties", "density": 0.5}, "a", "is for several adapters"),
        ({"lora_weights": "1,1", "combination_type": "ties"}, "ab", "needs --density"),
        ({"lora_weights": "1,1", "density": 0.5}, "ab", "--density has no effect with --combination_type cat"),
        ({"lora_weights": "1,1", "combination_type": "ties", "density": 1.5}, "ab", "--density 1.5 must be"),
        ({"lora_weights": "1,1", "combination_type": "ties", "density": 0}, "ab", "--density 0 must be above 0"),
        ({"lora_weights": "1,1", "svd_rank": 4}, "ab", "--svd_rank has no effect"),
        ({"lora_weights": "1,1", "combination_type": "svd", "svd_rank": 0}, "ab", "--svd_rank 0 must be at least 1"),
        ({"lora_weights": "1,1", "majority_sign_method": "total"}, "ab", "--majority_sign_method has no effect"),
        ({"lora_weights": "1,1", "combination_seed": 1}, "ab", "--combination_seed has no effect"),
        (
            {"lora_weights": "1,1", "combination_type": "dare_linear", "density": 0.5, "combination_seed": -1},
            "ab",
            "--combination_seed -1 must be at least 0",
        ),
    ],
)
def test_flags_that_make_no_sense_are_refused(given, names, message):
    with pytest.raises(UserError, match=message):
        Combination.from_arguments(flags(**given), list(names))


def test_every_flag_arrives():
    given = {"lora_weights": "0.7,-0.3", "density": 0.25, "svd_rank": 3, "combination_seed": 7}
    given |= {"combination_type": "dare_ties_svd", "majority_sign_method": "frequency"}
    found = Combination.from_arguments(flags(**given), ["a", "b"])
    assert found == Combination((0.7, -0.3), "dare_ties_svd", 0.25, "frequency", 3, 7)
    assert found.described(["a", "b"]) == "0.7 x a + -0.3 x b (dare_ties_svd, density 0.25, seed 7)"
    usual = Combination.from_arguments(flags(lora_weights="1,0"), ["a", "b"])
    assert usual == Combination((1.0, 0.0), "cat", None, "total", None, DEFAULT_SEED)
    assert usual.described(["a", "b"]) == "1 x a + 0 x b (cat)"
    assert Combination.from_arguments(flags(), ["a", "b"]) is None


def test_the_kinds_are_those_of_peft():
    pruning = {
        f"{kind}{end}" for kind in ("ties", "dare_linear", "dare_ties", "magnitude_prune") for end in ("", "_svd")
    }
    assert set(COMBINATION_TYPES) == {"cat", "linear", "svd"} | pruning


def test_all_problems_are_named_at_once():
    with pytest.raises(UserError, match="(?s)weight.*density.*svd_rank"):
        Combination.from_arguments(flags(lora_weights="1", density=0.5, svd_rank=1), ["a", "b"])


def test_names_are_those_of_folders_or_given(work, tmp_path):
    assert named_adapters(f"{work['a']}, second={work['b']}") == {"a": work["a"], "second": work["b"]}
    assert named_adapters("org/some-lora") == {"some-lora": "org/some-lora"}
    assert named_adapters(None) == {}
    (tmp_path / "x,y=z").mkdir()
    assert list(named_adapters(str(tmp_path / "x,y=z"))) == ["x,y=z"]
    with pytest.raises(UserError, match="is not an adapter. Write PATH,PATH"):
        named_adapters(f"{work['a']},")
    with pytest.raises(UserError, match="both called a. Give them names: --lora_model (.*)") as caught:
        named_adapters(f"{work['a']},elsewhere/a")
    remedy = str(caught.value).rpartition("--lora_model ")[2]
    assert named_adapters(remedy) == {"first": work["a"], "second": "elsewhere/a"}


def merge(work, tmp_path, names, *more) -> Path:
    listed = ",".join(work[name] for name in names)
    run_here(MERGE, "--lora_model", listed, "--output_dir", tmp_path / "out", *more)
    return tmp_path / "out"


def test_a_combination_is_merged(work, tmp_path):
    out = merge(work, tmp_path, ["a", "wide"], "--lora_weights", "0.7,0.3")
    expected = with_updates(work["base"], weighted_sum([work["a"], work["wide"]], [0.7, 0.3]))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), expected, atol=1e-4, rtol=1e-4)
    record = read_json(out / "run.json")
    assert record["adapters"] == [work["a"], work["wide"]] and record["adapter"] is None
    assert (record["combination"]["kind"], record["combination"]["weights"]) == ("cat", [0.7, 0.3])
    assert [run["stage"] for run in record["adapter_runs"]] == ["some_stage"] * 2


def test_several_adapters_need_a_way_to_become_one(work, tmp_path):
    with pytest.raises(UserError, match="--lora_weights 0.5,0.5.*--combination_type chain"):
        merge(work, tmp_path, ["a", "b"])


def test_other_ranks_are_refused_with_a_way_out(work, tmp_path):
    more = ("--lora_weights", "0.7,0.3", "--combination_type", "ties", "--density", "0.5")
    with pytest.raises(UserError, match="one rank: a has 4, wide has 8. Use --combination_type ties_svd") as caught:
        merge(work, tmp_path, ["a", "wide"], *more)
    assert not (tmp_path / "out").exists()
    kind = str(caught.value).partition("Use --combination_type ")[2].partition(",")[0]
    assert merge(work, tmp_path, ["a", "wide"], *more[:2], "--combination_type", kind, *more[4:]).is_dir()


def test_ranks_that_differ_in_one_module_are_found(work, tmp_path):
    """The rank of the configuration is the largest; a module may have a smaller one."""
    adapter = tmp_path / "pattern"
    shutil.copytree(work["a"], adapter)
    config = read_json(adapter / "adapter_config.json") | {"rank_pattern": {"layers.0.self_attn.q_proj": 2}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    weights = load_file(adapter / "adapter_model.safetensors")
    for name, part in (("lora_A", slice(0, 2)), ("lora_B", (slice(None), slice(0, 2)))):
        key = f"base_model.model.model.layers.0.self_attn.q_proj.{name}.weight"
        weights[key] = weights[key][part].contiguous()
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj there are \[2, 4\]. Use --combination_type cat"):
        combined({**work, "pattern": str(adapter)}, ["pattern", "b"], (1, 1), "linear")


@pytest.mark.parametrize("weights", ["1,1", None])
def test_another_base_is_refused(work, tmp_path, weights):
    """Also where the adapters would be switched by name."""
    with pytest.raises(CheckpointError, match=r"(?s)cannot share a base.*other \(.*was trained on .*second"):
        if weights:
            merge(work, tmp_path, ["a", "other"], "--lora_weights", weights)
        else:
            engine_from(chat_arguments(work, "a", "other"), by_name=True)


@pytest.mark.slow
def test_a_base_that_is_only_named_otherwise_is_refused_until_it_is_given(work, tmp_path):
    strange = tmp_path / "strange"
    shutil.copytree(work["b"], strange)
    (strange / "run.json").unlink()
    config = read_json(strange / "adapter_config.json") | {"base_model_name_or_path": "someone/else"}
    (strange / "adapter_config.json").write_text(json.dumps(config))
    known = {**work, "strange": str(strange)}
    with pytest.raises(CheckpointError, match="names the base someone/else .* pass it with --model_name_or_path"):
        merge(known, tmp_path, ["a", "strange"], "--lora_weights", "1,1")
    base = ("--model_name_or_path", work["base"])
    assert merge(known, tmp_path, ["a", "strange"], "--lora_weights", "1,1", *base).is_dir()


def test_modules_trained_in_full_are_refused_but_switch_by_name(work, tmp_path):
    with pytest.raises(UserError, match=r"(?s)head \(.*\) trains lm_head in full.*switched by name"):
        merge(work, tmp_path, ["a", "head"], "--lora_weights", "1,1")
    same_as_alone(work, "a", "head")


def test_different_templates_are_refused_until_one_is_chosen(work, tmp_path):
    weights = ("--lora_weights", "1,1")
    with pytest.raises(UserError, match="vicuna: another chat template.*--tokenizer_path") as caught:
        merge(work, tmp_path, ["a", "vicuna"], *weights)
    chosen = str(caught.value).partition("choose it with ")[2].partition(",")[0].split()
    assert merge(work, tmp_path, ["a", "vicuna"], *weights, *chosen).is_dir()


@pytest.fixture(scope="module")
def chain(work, tmp_path_factory) -> dict[str, str]:
    """`late` was trained on the result of merging `a`, which is gone; `expected`: its logits there."""
    folder = tmp_path_factory.mktemp("chain")
    run_here(MERGE, "--lora_model", work["a"], "--output_dir", folder / "a-merged")
    late = save_adapter(folder / "late", str(folder / "a-merged"), 7, lora_rank=8)
    expected = with_updates(str(folder / "a-merged"), weighted_sum([late], [1]))
    shutil.rmtree(folder / "a-merged")
    return {**work, "late": late, "expected": expected}


def test_a_chain_is_merged_in_order(chain, tmp_path):
    out = merge(chain, tmp_path, ["a", "late"], "--combination_type", "chain")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out)), chain["expected"], atol=1e-4, rtol=1e-4
    )
    record = read_json(out / "run.json")
    assert record["adapters"] == [chain["a"], chain["late"]] and record["combination"] == {"kind": "chain"}
    assert record["base"] == {"name": chain["base"], "fingerprint": fingerprint(chain["base"])}
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == ["out"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("b", "late"), r"late \(.*\) was not trained on what merging b gives: the weights differ from those of"),
        (("a", "b"), "same base as a, not on the result.*--lora_weights 1,1"),
        (("a",), "needs several adapters"),
    ],
)
def test_what_is_not_a_chain_is_refused(chain, tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        merge(chain, tmp_path, names, "--combination_type", "chain")
    assert [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"] == []


@pytest.mark.slow
def test_adapters_of_a_chain_are_not_combined_with_weights(chain, tmp_path):
    with pytest.raises(CheckpointError, match="--combination_type chain --output_dir FOLDER") as caught:
        merge(chain, tmp_path, ["a", "late"], "--lora_weights", "1,1")
    command = str(caught.value).partition("python merge_peft_adapter.py ")[2].partition(", in the order")[0]
    run_here(MERGE, *shlex.split(command.replace("FOLDER", str(tmp_path / "out"))))
    assert (tmp_path / "out" / "config.json").is_file()


def chat_arguments(work, *names, cls=ChatArguments, **more):
    listed = ",".join(work[name] for name in names)
    arguments = cls(model_name_or_path=work["base"], lora_model=listed, **more)
    arguments.given = frozenset()
    return arguments


def answer(engine: ChatEngine) -> str:
    return engine.chat(ASKED, SHORT).text


def alone(work, name: str) -> str:
    return answer(ChatEngine.from_pretrained(work["base"], lora_model=None if name == "base" else work[name]))


def same_as_alone(work, *names) -> dict[str, str]:
    """Each adapter answers by its name as it does alone, in any order; returns the answers, which differ."""
    engines = engine_from(chat_arguments(work, *names), by_name=True).siblings
    expected = {name: alone(work, name) for name in (*names, "base")}
    assert len(set(expected.values())) == len(expected)
    for name in (*names, "base", *reversed(names), "base", names[-1]):
        assert answer(engines[name]) == expected[name], name
    return expected


def test_adapters_are_switched_by_name(work):
    same_as_alone(work, "rows", "a", "wide", "vicuna")


def test_one_adapter_with_a_name_is_served_under_it(work):
    """Beside its base; without a name, it answers under that of the base."""
    arguments = chat_arguments({"base": work["base"], "given": f"first={work['a']}"}, "given")
    assert list(engine_from(arguments, by_name=True).siblings) == ["first", "base"]
    assert engine_from(chat_arguments(work, "a"), by_name=True).siblings == {}


def test_each_adapter_has_its_own_stop_tokens(work, tmp_path):
    stopping = tmp_path / "stopping"
    shutil.copytree(work["b"], stopping)
    first = ChatEngine.from_pretrained(work["base"], lora_model=work["b"]).chat(ASKED, SHORT).token_ids[3]
    GenerationConfig(eos_token_id=[first]).save_pretrained(stopping)
    engines = engine_from(chat_arguments({**work, "stopping": str(stopping)}, "a", "stopping"), by_name=True).siblings
    assert engines["stopping"].chat(ASKED, SHORT).finish_reason == "stop"
    assert engines["a"].chat(ASKED, SHORT).finish_reason == "length"
    assert engines["stopping"].chat(ASKED, SHORT).completion_tokens <= 4


def test_a_conversation_switches_between_adapters(work, monkeypatch, capsys):
    lines = ["你好", "/clear", "/adapter b", "你好", "/clear", "/adapter base", "你好", "/adapter", "/adapter nobody"]
    monkeypatch.setattr(inference, "read_lines", lambda: iter(lines))
    engine = engine_from(chat_arguments(work, "a", "b"), by_name=True)
    inference.talk(engine, SHORT, None)
    said = capsys.readouterr()
    positions = [said.out.find(alone(work, name)) for name in ("a", "b", "base")]
    assert positions == sorted(positions) and -1 not in positions
    assert "/adapter NAME chooses among: a, b, base (active)" in said.err
    assert "There is no adapter nobody." in said.err


def test_one_question_needs_one_adapter(work, tmp_path, capsys):
    base = ("--model_name_or_path", work["base"], "--query", "你好", "--max_new_tokens", 12)
    several = ("--lora_model", f"{work['a']},{work['b']}")
    with pytest.raises(UserError, match="one answers here. Combine them: --lora_weights 0.5,0.5"):
        run_here("inference.py", *base, *several)
    run_here("inference.py", *base, *several, "--lora_weights", "0.5,0.5")
    shown = capsys.readouterr().out.strip()
    out = merge(work, tmp_path, ["a", "b"], "--lora_weights", "0.5,0.5")
    assert shown == answer(ChatEngine.from_pretrained(str(out))).strip()


@pytest.fixture(scope="module")
def served(work):
    arguments = chat_arguments(work, "a", "b", cls=OpenAIArguments, max_new_tokens=12)
    engine = engine_from(arguments, by_name=True)
    with make_batcher(engine, max_batch_size=3) as batcher:
        yield TestClient(make_app(Service(arguments, engine, batcher, None)), base_url="http://127.0.0.1")


def test_the_model_field_names_the_adapter(work, served):
    assert [each["id"] for each in served.get("/v1/models").json()["data"]] == ["a", "b", "base"]
    assert served.get("/v1/models/b").json()["id"] == "b"
    for name in ("a", "b", "base", "a"):
        reply = served.post("/v1/chat/completions", json={"model": name, "messages": ASKED}).json()
        assert reply["model"] == name and reply["choices"][0]["message"]["content"] == alone(work, name)
    refused = served.post("/v1/chat/completions", json={"model": "c", "messages": ASKED})
    assert refused.status_code == 404
    assert "There is no model 'c' here; this server has 'a', 'b', 'base'." in refused.json()["error"]["message"]


def test_requests_for_several_adapters_at_once(work, served):
    """More than a batch, in turns: no answer comes from another adapter, and none waits for ever."""
    service = served.app.state.service
    names = ["a", "b", "base", "a", "b", "a", "a", "b", "base", "a"]
    engines = {name: model.engine for name, model in service.models.items()}
    futures = service.batcher.submit_many([engines[name].request(ASKED, SHORT) for name in names])
    expected = {name: alone(work, name) for name in engines}
    assert [future.result(60).text for future in futures] == [expected[name] for name in names]


def test_continuous_batching_is_refused(work):
    engine = engine_from(chat_arguments(work, "a", "b"), by_name=True)
    with pytest.raises(UserError, match="its adapters are switched by name. Use --batching static"):
        make_batcher(engine, batching="continuous")


def test_names_that_clash_are_refused(work, tmp_path):
    shutil.copytree(work["b"], tmp_path / "base")
    with pytest.raises(UserError, match="the base and an adapter are both called base. .* NAME="):
        engine_from(chat_arguments({**work, "b": str(tmp_path / "base")}, "a", "b"), by_name=True)


def test_adapters_with_other_numbers_of_tokens_are_refused(work, tmp_path):
    base = load_model(AutoModelForCausalLM, work["base"])
    rows = base.get_input_embeddings().num_embeddings
    base.resize_token_embeddings(rows + 1)
    model = add_lora(base, LoraArguments(lora_rank=4), TaskType.CAUSAL_LM, new_rows=[rows])
    model.save_pretrained(tmp_path / "grown")
    shutil.copy(Path(work["a"], "run.json"), tmp_path / "grown")
    with pytest.raises(CheckpointError, match=f"a has {rows}, grown has {rows + 1}.*cannot share a model"):
        engine_from(chat_arguments({**work, "grown": str(tmp_path / "grown")}, "a", "grown"), by_name=True)


def test_the_stop_token_of_the_base_is_kept(work):
    engine = engine_from(chat_arguments(work, "a", "b", lora_weights="1,1"))
    assert tiny_tokenizer().convert_tokens_to_ids(TURN_END) in engine.stop_ids
