"""Each family from pretraining to an answer; families that cannot be trained are named before the data is read."""

import json
import math
import re
from contextlib import suppress
from pathlib import Path

from medicalgpt.args import LoraArguments
from medicalgpt.data.batching import Collator
from medicalgpt.errors import UserError
from medicalgpt.models import adapters, families, hub, loading
from medicalgpt.models.attention import SHIFTED_MODELS
from template import TEMPLATES
from tests.families import FAMILIES, Followed, family_tokenizer, make_family, stage_flags, vllm_mark
from tests.helpers import open_stage, read_json, run_here, write_jsonl
from tests.tiny import tiny_tokenizer

import pytest
import torch
from peft import TaskType
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    ByT5Tokenizer,
    CLIPConfig,
    T5Config,
)

pytestmark = pytest.mark.usefixtures("one_thread")
PT, SFT = "pretraining.py", "supervised_finetuning.py"
DOCUMENTS = [{"text": f"Document {n}: " + "abcdefgh " * n} for n in (1, 4, 7, 2)]
CHATS = [{"prompt": f"Why {n}?", "response": "A cold. " * n} for n in (1, 4, 2)]
IDS = torch.arange(40).reshape(2, 20)
MATRIX = Path(__file__).resolve().parent.parent / "docs" / "models.md"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_jsonl(root / PT / "rows.jsonl", DOCUMENTS)
    write_jsonl(root / SFT / "rows.jsonl", CHATS)
    return root


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def same_logits(one, other):
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-4, atol=1e-4)


def targets(base):
    """How many weights `--target_modules all` stands for: linear layers but the head, and fused experts."""
    head = base.get_output_embeddings()
    linear = sum(type(module) is nn.Linear and module is not head for module in base.modules())
    convolutions = {id(module.weight) for module in base.modules() if isinstance(module, nn.Conv1d)}
    return linear + sum(each.ndim == 3 and id(each) not in convolutions for each in base.parameters())


def train(stage, base, *options):
    """Train three steps; returns the stage as it was opened. What is declared trainable moves, and nothing else."""
    opened = open_stage(stage, *options)
    trainer = opened.trainer
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        own = trainer.model(**batch, use_cache=False).loss.item()
        assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(own, rel=1e-5)
    trainer.model.train()
    followed = Followed(trainer.model)
    metrics = opened.finish()
    assert math.isfinite(metrics["train_loss"])
    assert followed.moved() == followed.with_gradient() == followed.declared
    if "--use_peft" in options:
        assert followed.declared == set(followed.parameters)
    else:
        assert all(".lora_" in name for name in followed.declared)
        assert len(followed.declared) == 2 * targets(base)
    return opened


QUICK = ("qwen3", "glm4", "mixtral", "deepseek_v3")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in FAMILIES])
def test_family_goes_from_pretraining_to_an_answer(name, data, tmp_path, capsys):
    family = FAMILIES[name]
    source = make_family(tmp_path / "base", name)
    base = AutoModelForCausalLM.from_pretrained(source)
    assert logits(base).std() > 0.3, "logits that hardly differ would show nothing"

    documents = stage_flags(data, PT, source, tmp_path / "pt", "--use_peft", "False")
    if not family.packs:
        with pytest.raises(UserError, match=f"{name} does not keep packed sequences apart.*--packing False"):
            open_stage(PT, *documents)
        documents += ["--packing", "False"]
    read = train(PT, base, *documents)
    assert ("seq_lengths" in read.trainer.train_dataset.column_names) == family.packs
    same_logits(read.trainer.model, AutoModelForCausalLM.from_pretrained(tmp_path / "pt"))

    lora = train(
        SFT, base, *stage_flags(data, SFT, tmp_path / "pt", tmp_path / "lora", "--template_name", family.template)
    )
    live = logits(lora.trainer.model)
    reloaded = loading.load_model(AutoModelForCausalLM, str(tmp_path / "pt"))
    assert (logits(reloaded) - live).abs().max() > 0.01, "the adapter has no effect"
    same_logits(adapters.attach_adapter(reloaded, hub.Adapter.read(str(tmp_path / "lora"))), lora.trainer.model)

    run_here("merge_peft_adapter.py", "--lora_model", tmp_path / "lora", "--output_dir", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    same_logits(merged, lora.trainer.model)
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == base.config.tie_word_embeddings == ("lm_head.weight" not in dict(merged.named_parameters()))

    full = train(SFT, base, *stage_flags(data, SFT, tmp_path / "pt", tmp_path / "full", "--use_peft", "False"))
    same_logits(full.trainer.model, AutoModelForCausalLM.from_pretrained(tmp_path / "full"))

    quantized = stage_flags(data, SFT, tmp_path / "pt", tmp_path / "4bit", "--load_in_4bit", "True")
    if family.experts:
        with pytest.raises(UserError, match=r"reaches \d+% of the .* experts.down_proj.* omit it"):
            open_stage(SFT, *quantized)
    else:
        in_4bit = train(SFT, base, *quantized)
        reloaded = loading.load_model(AutoModelForCausalLM, str(tmp_path / "pt"), load_in_4bit=True)
        # For inference on some CPUs bitsandbytes repacks the weights and computes in fewer bits.
        loading.never_repack_4bit(reloaded)
        same_logits(adapters.attach_adapter(reloaded, hub.Adapter.read(str(tmp_path / "4bit"))), in_4bit.trainer.model)

    turn_end = [label for label in lora.trainer.train_dataset[0]["labels"] if label != -100][-1]
    for folder in ("lora", "full", "merged"):
        assert turn_end in read_json(tmp_path / folder / "generation_config.json")["eos_token_id"]
        capsys.readouterr()
        run_here(
            "inference.py",
            *("--model_name_or_path", tmp_path / folder, "--query", "Why 1?", "--max_new_tokens", 4),
        )
        assert capsys.readouterr().out.endswith("\n")


def test_router_loss_is_added_as_the_configuration_says(data, tmp_path):
    for weight in (0.0, 0.5):
        source = make_family(tmp_path / f"base-{weight}", "mixtral", router_aux_loss_coef=weight)
        opened = open_stage(SFT, *stage_flags(data, SFT, source, tmp_path / f"out-{weight}", "--use_peft", "False"))
        trainer = opened.trainer
        batch = next(iter(trainer.get_train_dataloader()))
        model = AutoModelForCausalLM.from_pretrained(source)
        with torch.no_grad():
            plain = model(**batch, output_router_logits=False).loss
            balance = model(**batch, output_router_logits=True).aux_loss
            ours = trainer.compute_loss(trainer.model, dict(batch))
        assert balance > 0.5
        assert ours.item() == pytest.approx((plain + weight * balance).item(), rel=1e-5)


@pytest.mark.parametrize(("flag", "value"), [("--lora_dropout", 0.1), ("--use_dora", "True"), ("--freeze_layers", "0")])
def test_flags_that_adapters_of_experts_cannot_follow(data, tmp_path, flag, value):
    source = make_family(tmp_path / "base", "mixtral")
    with pytest.raises(UserError, match=rf"cannot follow {flag} {value}.*--target_modules k_proj,o_proj,q_proj,v_proj"):
        open_stage(SFT, *stage_flags(data, SFT, source, tmp_path / "out", flag, value))
    # The way out that the message names.
    named = ("--target_modules", "k_proj,o_proj,q_proj,v_proj")
    open_stage(SFT, *stage_flags(data, SFT, source, tmp_path / "out", flag, value, *named))


def test_layers_that_predict_several_tokens_are_left_out_with_a_warning(data, tmp_path, capsys):
    source = make_family(tmp_path / "base", "glm4_moe", num_mtp_layers=1)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    # It comes after the two layers of the model.
    weights |= {
        name.replace(".layers.1.", ".layers.2."): weight.clone()
        for name, weight in weights.items()
        if ".layers.1." in name
    }
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    opened = open_stage(SFT, *stage_flags(data, SFT, source, tmp_path / "out", "--use_peft", "False"))
    said = capsys.readouterr().err
    assert re.search(r"\d+ weights of layers that predict several tokens at once \(model.layers.2\.", said)
    opened.finish()
    assert not any(".layers.2." in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert read_json(tmp_path / "out" / "config.json")["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("weight", [None, 0])
def test_a_loss_that_trl_cannot_compute_is_refused_before_training(data, tmp_path, weight):
    """TRL reads the number of experts under Mixtral's name, which this family does not have."""
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        "phimoe",
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, **HEADS},
        **{"num_local_experts": 4, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    flags = stage_flags(data, SFT, tmp_path / "base", tmp_path / "out")
    if weight is None:
        with pytest.raises(UserError, match="phimoe cannot be computed in training: .*--router_aux_loss_coef 0"):
            open_stage(SFT, *flags)
    else:
        open_stage(SFT, *flags, "--router_aux_loss_coef", weight).finish()


@pytest.mark.slow
def test_every_type_of_the_library_is_accepted_or_refused():
    for kind in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:
            # Some need the configurations of their parts.
            continue
        with suppress(UserError):
            families.check_family(config)


def test_linear_layers_with_former_names_of_experts(data, tmp_path):
    """The first layer of this model is dense, and its layers have the names that experts had before."""
    source = make_family(tmp_path / "base", "glm4_moe")
    opened = open_stage(SFT, *stage_flags(data, SFT, source, tmp_path / "out"))
    adapted = {name.partition(".lora_A")[0] for name, _ in opened.trainer.model.named_parameters() if ".lora_A" in name}
    assert {name.rpartition(".")[2] for name in adapted if ".layers.0.mlp." in name} == {
        *("gate_proj", "up_proj", "down_proj")
    }
    assert any("shared_experts.up_proj" in name for name in adapted)
    assert not any(name.endswith((".gate", "lm_head")) for name in adapted)
    named = ("--target_modules", "q_proj,gate_proj,up_proj,down_proj", "--lora_dropout", 0)
    with pytest.raises(UserError, match="gate_proj, up_proj, down_proj for a name of the experts"):
        open_stage(SFT, *stage_flags(data, SFT, source, tmp_path / "other", *named))


def test_a_router_that_is_a_linear_layer_gets_no_adapter():
    config = AutoConfig.for_model(
        "afmoe",
        **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_dense_layers": 1, **HEADS},
    )
    model = AutoModelForCausalLM.from_config(config)
    assert type(model.get_submodule("model.layers.1.mlp.router.gate")) is nn.Linear
    model = adapters.add_lora(model, LoraArguments(), TaskType.CAUSAL_LM)
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert any(name.endswith("layers.0.mlp.gate_proj") for name in adapted)
    assert not any("router" in name for name in adapted)


REFUSED = {
    "encoder and decoder": (T5Config(), "of the type t5, which has an encoder and a decoder"),
    "decoder of a pair": (AutoConfig.for_model("bart"), "of the type bart, which has an encoder and a decoder"),
    "encoder": (BertConfig(), "of the type bert, which is an encoder"),
    "another encoder": (AutoConfig.for_model("roberta"), "of the type roberta, which is an encoder"),
    "no text": (CLIPConfig(), "of the type clip, which takes images or audio too and has no language model"),
    "images and a decoder of a pair": (
        AutoConfig.for_model("florence2"),
        "of the type florence2, which takes images or audio too and has an encoder and a decoder",
    ),
    "a prompt in both directions": (AutoConfig.for_model("paligemma"), "paligemma, .* in both directions"),
    "images within": (AutoConfig.for_model("git"), "of the type git, which takes images or audio too, within its"),
    "no causal model": (AutoConfig.for_model("vit"), "of the type vit, which has no causal language model"),
}


@pytest.mark.parametrize(
    ("stage", "case"), [*((SFT, case) for case in REFUSED), (PT, "encoder"), (PT, "encoder and decoder")]
)
def test_what_is_no_causal_model_is_named_before_the_data_is_read(tmp_path, stage, case):
    config, message = REFUSED[case]
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=message) as caught:
        run_here(
            stage,
            *("--model_name_or_path", tmp_path / "model", "--train_file_dir", tmp_path / "nowhere"),
            *("--output_dir", tmp_path / "out"),
        )
    assert "decoder-only" in str(caught.value) or "text alone" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}},
            "needs its own code, and code of a checkpoint is never run",
        ),
        (
            {"model_type": "internlm3", "auto_map": {"AutoConfig": "configuration_internlm3.InternLM3Config"}},
            "needs its own code, and code of a checkpoint is never run",
        ),
        (
            {"model_type": "minicpm", "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}},
            "needs its own code, and code of a checkpoint is never run",
        ),
        ({"model_type": "brandnew"}, "of the type brandnew, which transformers .* does not know"),
    ],
)
def test_what_transformers_does_not_know_is_named_without_asking(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("chatglm", "internlm3", "minicpm"):
        (tmp_path / f"configuration_{name}.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(UserError, match=message):
        run_here(
            SFT,
            *("--model_name_or_path", tmp_path, "--train_file_dir", tmp_path / "nowhere"),
            *("--output_dir", tmp_path / "out"),
        )


def test_inference_names_it_too(tmp_path):
    BertConfig().save_pretrained(tmp_path / "model")
    family_tokenizer(FAMILIES["qwen2"]).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="of the type bert, which is an encoder"):
        run_here("inference.py", "--model_name_or_path", tmp_path / "model", "--query", "Why?")


def test_a_tokenizer_without_places_is_refused(tmp_path):
    make_family(tmp_path / "model", "qwen2")
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    with pytest.raises(UserError, match=r"\(ByT5Tokenizer\) does not give the positions of its tokens"):
        run_here(
            SFT,
            *("--model_name_or_path", tmp_path / "model", "--tokenizer_name_or_path", tmp_path / "slow"),
            *("--train_file_dir", tmp_path / "nowhere", "--output_dir", tmp_path / "out"),
        )


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
# Layers that carry something from token to token: states, a convolution over time, positions counted on their own.
LEAKING = {
    "mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], **HEADS},
    "qwen3_next": {
        **{"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "head_dim": 8, **HEADS},
        **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2},
        **{"linear_num_value_heads": 4, "linear_num_key_heads": 2},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    },
    "bloom": {"n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
}


def leaking(kind, tokenizer):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.1, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **LEAKING[kind], **ends}))


@pytest.mark.parametrize("kind", LEAKING)
def test_packs_that_leak_are_found(kind):
    model = leaking(kind, tiny_tokenizer())
    with pytest.raises(UserError, match=rf"{kind} does not keep packed sequences apart.*--packing False"):
        families.require_separate_packs(model, Collator(0))
    assert model.training, "it is left as it was found"


def test_packing_is_refused_before_training(data, tmp_path):
    tokenizer = tiny_tokenizer()
    leaking("mamba", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = stage_flags(data, PT, tmp_path / "model", tmp_path / "out", "--use_peft", "False")
    with pytest.raises(UserError, match="mamba does not keep packed sequences apart"):
        open_stage(PT, *options)
    open_stage(PT, *options, "--packing", "False")


def test_the_page_lists_the_families_that_are_tested():
    assert tuple(FAMILIES) == families.TESTED
    for page in (MATRIX, MATRIX.with_name("models_zh.md")):
        matrix = page.read_text(encoding="utf-8").split("\n## ")[1]
        rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", matrix, flags=re.MULTILINE)
        assert [name for name, _ in rows] == list(FAMILIES)
        for name, cells in rows:
            template, *marks = [cell.strip() for cell in cells.split("|")]
            assert template.strip("`") == FAMILIES[name].template and FAMILIES[name].template in TEMPLATES
            in_4bit = "✗" if FAMILIES[name].experts else "✓"
            shifted = "✓" if name in SHIFTED_MODELS else "✗"
            packed = "✓" if FAMILIES[name].packs else "✗"
            in_vllm = vllm_mark(FAMILIES[name].vllm)
            assert marks[:-1] == ["✓", "✓", "✓", in_4bit, "✓", "✓", packed, shifted, in_vllm]
