"""Which adapters cannot be combined, or share a base: decided by their files, without their weights."""

import json
import shutil
from types import SimpleNamespace

from medicalgpt.errors import UserError
from medicalgpt.models.combining import (
    Combination,
    check_bases,
    check_combinable,
    check_same_template,
    peft_names,
    read_adapters,
)
from medicalgpt.models.hub import Adapter, CheckpointError
from template import apply_template
from tests.tiny import tiny_tokenizer

import pytest
from transformers import AutoTokenizer

LORA = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "base"}
ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}


def adapter(path="place", recorded=None, **config):
    return Adapter(path, {**LORA, **config}, recorded or {})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "is of the type IA3, not LORA"),
        ({"use_dora": True}, "is a DoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, "trains lm_head in full"),
        ({"trainable_token_indices": {"embed_tokens": [7]}}, "trains rows of new tokens"),
        ({"bias": "all"}, "trains biases"),
        ({"lora_bias": True}, "trains biases"),
        ({"target_parameters": ["experts.down_proj"]}, "adapts fused experts"),
        ({"init_lora_weights": "pissa_niter_4"}, r"changes the weights of its base at the start \(pissa_niter_4\)"),
        ({"init_lora_weights": "olora"}, "changes the weights of its base"),
    ],
)
def test_what_peft_would_leave_out_is_named(config, reason):
    plain = adapter(bias="none", use_dora=False, init_lora_weights=True, modules_to_save=None, target_parameters=None)
    check_combinable({"a": plain, "b": plain}, Combination((1.0, 1.0)))
    with pytest.raises(UserError, match=rf"cannot be combined with weights:\n  - b \(there\) {reason}"):
        check_combinable({"a": plain, "b": adapter("there", **config)}, Combination((1.0, 1.0)))


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [
        ("linear", "Use --combination_type cat, which takes any ranks.$"),
        ("ties", "Use --combination_type ties_svd, which takes any ranks, or cat, the exact weighted sum.$"),
    ],
)
def test_other_ranks_are_named_with_a_way_out(kind, way_out):
    four, eight, both = adapter(r=4), adapter(r=8), adapter(r=4, rank_pattern={"q_proj": 8})
    with pytest.raises(UserError, match=f"one rank: four has 4, eight has 8. {way_out}"):
        check_combinable({"four": four, "eight": eight}, Combination((1.0, 1.0), kind, 0.5))
    check_combinable({"both": both, "eight": eight}, Combination((1.0, 1.0), kind, 0.5))
    check_combinable({"four": four, "eight": eight}, Combination((1.0, 1.0), "svd"))


def test_all_missing_adapters_are_named(tmp_path):
    named = {name: str(tmp_path / name) for name in ("one", "two")}
    with pytest.raises(
        CheckpointError, match=r"(?s)no adapter folder .*/one .*Check --lora_model.*/two .*Check --lora"
    ):
        read_adapters(named)


def test_bases_that_differ_by_name_or_positions():
    base = SimpleNamespace(base="base", fingerprint="f" * 64)
    first, renamed = adapter("p1"), adapter("p2", base_model_name_or_path="someone/else")
    check_bases({"a": first, "b": adapter("p2")}, base, base_given=False)
    with pytest.raises(CheckpointError, match=r"b \(p2\) names the base someone/else and p1 names base"):
        check_bases({"a": first, "b": renamed}, base, base_given=False)
    check_bases({"a": first, "b": renamed}, base, base_given=True)
    check_bases({"a": first, "b": adapter("p2", {"fingerprint": "f" * 64})}, base, base_given=False)
    with pytest.raises(CheckpointError, match=r"b \(p2\) was trained on its base .*base here is base"):
        check_bases(
            {"a": first, "b": adapter("p2", {"name": "its base", "fingerprint": "0" * 64})}, base, base_given=True
        )
    with pytest.raises(CheckpointError, match=r"b \(p2\) was trained with other positions than p1"):
        check_bases({"a": first, "b": adapter("p2", ROPE)}, base, base_given=True)


def test_prompts_that_differ_in_any_part(tmp_path):
    def saved(name, template="chatml", ends=(2, 1), token=None):
        tokenizer = tiny_tokenizer()
        apply_template(tokenizer, template)
        if token:
            tokenizer.add_tokens([token])
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}))
        return adapter(str(tmp_path / name))

    first = saved("first")
    checkpoint = SimpleNamespace(source=str(tmp_path / "base"), revision=None, cache_dir=None)
    shutil.copytree(tmp_path / "first", tmp_path / "base")
    check_same_template(checkpoint, {"first": first, "turned": saved("turned", ends=(1, 2))})
    for what, other in (
        ("set of stop tokens", saved("stops", ends=(1, 3))),
        ("chat template", saved("vicuna", template="vicuna")),
        ("vocabulary", saved("words", token="<new>")),
    ):
        with pytest.raises(UserError, match=f"than first: other: another {what}. Combined, .*--tokenizer_path"):
            check_same_template(checkpoint, {"first": first, "other": other}, "--tokenizer_path")
    assert "<new>" in AutoTokenizer.from_pretrained(tmp_path / "words").get_vocab()
    # An adapter without a tokenizer has that of the base.
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    check_same_template(checkpoint, {"first": first, "bare": adapter(str(tmp_path / "bare"))})


def test_adapters_with_rows_of_tokens_are_loaded_last():
    rows = adapter(trainable_token_indices={"embed_tokens": [7]})
    assert peft_names({"rows": rows, "a": adapter(), "b": adapter()}) == {
        **{"a": "default", "b": "adapter_1", "rows": "adapter_2"}
    }
