"""Checkpoints whose files are quantized: trained on the restored weights, or refused before the data is read."""

import json

from medicalgpt.errors import UserError
from medicalgpt.models import adapters, hub, loading
from medicalgpt.models.quantization import quantization_config, restore
from tests.families import make_family, stage_flags
from tests.helpers import open_stage, read_json, run_here, write_jsonl

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

pytestmark = pytest.mark.usefixtures("one_thread")
SFT = "supervised_finetuning.py"
IDS = torch.arange(40).reshape(2, 20)
# Of 4-bit numbers with two bits of exponent and one of mantissa, by their code.
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_jsonl(root / SFT / "rows.jsonl", [{"prompt": f"Why {n}?", "response": "A cold. " * n} for n in (1, 4, 2)])
    return root


def declare(folder, **settings):
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def store_fp8(folder, block=8):
    """Quantize the linear layers in blocks, as Qwen3 and DeepSeek are; returns what the result stands for."""
    weights = load_file(folder / "model.safetensors")
    stored, restored = {}, {}
    for name, weight in weights.items():
        stored[name] = restored[name] = weight
        if weight.ndim == 2 and name.endswith("proj.weight"):
            rows, columns = (size // block for size in weight.shape)
            blocks = weight.reshape(rows, block, columns, block)
            scales = blocks.abs().amax((1, 3)) / 448
            rounded = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name], stored[f"{name}_scale_inv"] = rounded.reshape(weight.shape), scales
            restored[name] = (rounded.float() * scales[:, None, :, None]).reshape(weight.shape)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    declare(
        folder,
        quant_method="fp8",
        fmt="e4m3",
        activation_scheme="dynamic",
        weight_block_size=[block, block],
        modules_to_not_convert=["lm_head"],
    )
    return restored


def store_mxfp4(folder):
    """Quantize the experts in blocks of 32 numbers with a power of two, as in gpt-oss."""
    weights = load_file(folder / "model.safetensors")
    stored, restored = {}, {}
    for name, weight in weights.items():
        stored[name] = restored[name] = weight
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, width, out = weight.shape
            # The files hold rows of outputs, whose inputs are divided into blocks.
            blocks = weight.transpose(1, 2).reshape(experts, out, width // 32, 32)
            exponents = (blocks.abs().amax(-1) / 6).log2().ceil()
            scaled = blocks / exponents.exp2()[..., None]
            codes = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
            values = FP4[codes] * scaled.sign()
            codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
            stored[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
            stored[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
            del stored[name]
            restored[name] = (
                (values * exponents.exp2()[..., None]).reshape(experts, out, width).transpose(1, 2).contiguous()
            )
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    declare(folder, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
    return restored


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def same_logits(one, other):
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "store", "sizes"),
    [
        ("qwen3", store_fp8, {}),
        pytest.param("qwen3_moe", store_fp8, {}, marks=pytest.mark.slow),
        pytest.param("gpt_oss", store_mxfp4, {"intermediate_size": 32}, marks=pytest.mark.slow),
    ],
)
def test_restored_weights_are_trained_merged_and_saved(data, tmp_path, kind, store, sizes):
    plain, base = tmp_path / "plain", tmp_path / "base"
    for folder in (plain, base):
        make_family(folder, kind, **sizes)
    save_file(store(base), plain / "model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(plain)
    assert (logits(expected) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() < 0.05

    template = ("--template_name", "chatml")
    lora = open_stage(SFT, *stage_flags(data, SFT, base, tmp_path / "lora", *template))
    with lora.trainer.model.disable_adapter():
        same_logits(lora.trainer.model, expected)
    lora.finish()
    reloaded = loading.load_model(AutoModelForCausalLM, str(base))
    assert {parameter.dtype for parameter in reloaded.parameters()} == {torch.float32}
    assert (logits(reloaded) - logits(lora.trainer.model)).abs().max() > 0.01
    same_logits(adapters.attach_adapter(reloaded, hub.Adapter.read(str(tmp_path / "lora"))), lora.trainer.model)

    run_here("merge_peft_adapter.py", "--lora_model", tmp_path / "lora", "--output_dir", tmp_path / "merged")
    full = open_stage(SFT, *stage_flags(data, SFT, base, tmp_path / "full", "--use_peft", "False", *template))
    full.finish()
    names = set(load_file(plain / "model.safetensors"))
    for folder, trained in (("merged", lora.trainer.model), ("full", full.trainer.model)):
        assert "quantization_config" not in read_json(tmp_path / folder / "config.json")
        assert set(load_file(tmp_path / folder / "model.safetensors")) == names
        same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder), trained)


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, (), r"stored quantized \(gptq\).* unquantized .*--load_in_4bit True"),
        ({"quant_method": "awq", "bits": 4}, (), r"stored quantized \(awq\).* unquantized .*--load_in_4bit True"),
        ({"quant_method": "compressed-tensors"}, (), r"stored quantized \(compressed-tensors\).* unquantized "),
        ({"quant_method": "fp8"}, ("--load_in_4bit", "True"), "--load_in_4bit would quantize it again. Omit the flag"),
        ({"quant_method": "mxfp4"}, ("--load_in_8bit", "True"), "--load_in_8bit would quantize it again. Omit the"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("--load_in_8bit", "True"), "would have no effect"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("--use_peft", "False"), "be trained in full"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_data_is_read(tmp_path, settings, flags, message):
    make_family(tmp_path / "base", "qwen3")
    declare(tmp_path / "base", **settings)
    with pytest.raises(UserError, match=message):
        run_here(
            SFT,
            *("--model_name_or_path", tmp_path / "base", "--train_file_dir", tmp_path / "nowhere"),
            *("--output_dir", tmp_path / "out", *flags),
        )


def test_inference_names_a_form_that_it_cannot_load(tmp_path):
    make_family(tmp_path / "base", "qwen3")
    declare(tmp_path / "base", quant_method="gptq", bits=4)
    with pytest.raises(UserError, match=r"stored quantized \(gptq\).*to serve this one, use vLLM"):
        run_here("inference.py", "--model_name_or_path", tmp_path / "base", "--query", "Why?")


def test_blocks_that_the_library_would_shift_are_refused(tmp_path):
    """With 12 rows and blocks of 8, the second scale is of 4 rows; the library would give it 6."""
    make_family(tmp_path / "base", "qwen3")
    store_fp8(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    weights[name] = weights[name][:12].contiguous()
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"blocks of \[8, 8\], and 1 weight.*{name} of the shape \[12, 32\]"):
        run_here(
            SFT,
            *("--model_name_or_path", tmp_path / "base", "--train_file_dir", tmp_path / "nowhere"),
            *("--output_dir", tmp_path / "out"),
        )


def test_weights_are_restored_on_a_gpu_too(tmp_path):
    """There the library would keep them in FP8, in layers that cannot be trained."""
    make_family(tmp_path / "base", "qwen3")
    store_fp8(tmp_path / "base")
    config = AutoConfig.from_pretrained(tmp_path / "base")
    restore(config, "fp8")
    merged = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
    assert merged.quantization_config.dequantize


def test_a_base_that_is_stored_in_4_bits_gets_an_adapter(data, tmp_path):
    source = make_family(tmp_path / "plain", "qwen3")
    stored = AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization_config(True, False, False))
    make_family(tmp_path / "base", "qwen3")
    stored.save_pretrained(tmp_path / "base")
    flags = stage_flags(data, SFT, tmp_path / "base", tmp_path / "lora")
    with pytest.raises(UserError, match="Pass --load_in_4bit True to train an adapter on it"):
        open_stage(SFT, *flags)
    lora = open_stage(SFT, *flags, "--load_in_4bit", "True")
    assert {parameter.dtype for parameter in lora.trainer.model.parameters()} >= {torch.uint8, torch.float32}
    lora.finish()
    reloaded = loading.load_model(AutoModelForCausalLM, str(tmp_path / "base"))
    loading.never_repack_4bit(reloaded)
    same_logits(adapters.attach_adapter(reloaded, hub.Adapter.read(str(tmp_path / "lora"))), lora.trainer.model)
