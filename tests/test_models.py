"""Which checkpoint is meant, whether it is the right one, and what is trained on it."""

import json
import shutil
import time
from pathlib import Path

from medicalgpt.args import LoraArguments, ModelArguments
from medicalgpt.errors import UserError
from medicalgpt.models.adapters import (
    adapters_to_float32,
    add_lora,
    attach_adapter,
    check_flags,
    total_parameters,
    trainable_by_module,
)
from medicalgpt.models.hub import (
    Adapter,
    Checkpoint,
    CheckpointError,
    check_base,
    fetch,
    fingerprint,
    resolve_checkpoint,
)
from medicalgpt.models.loading import (
    checkpoint_tokenizer,
    fit_embedding,
    load_base,
    load_model,
    load_tokenizer,
    quantization_config,
    stage_checkpoint,
)
from tests.helpers import run_program
from tests.tiny import make_tiny, tiny_tokenizer

import pytest
import torch
from loguru import logger
from peft import PeftModel, TaskType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

HIDDEN, VOCABULARY = 64, 260


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture
def adapter(base, tmp_path) -> str:
    """An adapter with weights other than zero that records its base, as a stage leaves it."""
    torch.manual_seed(3)
    model = add_lora(load(base), LoraArguments(), TaskType.CAUSAL_LM)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    record = {"base": {"name": base, "fingerprint": fingerprint(base)}}
    (tmp_path / "adapter" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return str(tmp_path / "adapter")


@pytest.fixture
def warnings():
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="WARNING")
    yield lines
    logger.remove(sink)


def load(path: str, **options):
    return load_model(AutoModelForCausalLM, path, **options)


def given(**values) -> LoraArguments:
    """Flags as the parser returns them."""
    arguments = LoraArguments(**values)
    arguments.given = frozenset(values)
    return arguments


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


# --- which checkpoint ------------------------------------------------------------------------------------------------


def test_a_folder_an_adapter_and_a_hub_name(base, adapter):
    assert resolve_checkpoint(base) == (base, None)
    assert resolve_checkpoint(adapter) == (base, Adapter.read(adapter))
    assert resolve_checkpoint("Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B", None)
    checkpoint = Checkpoint.resolve(adapter)
    assert (checkpoint.name, checkpoint.base, checkpoint.source, checkpoint.tokenizer) == (adapter, base, base, base)
    assert checkpoint.adapter == Adapter.read(adapter) and checkpoint.config.hidden_size == HIDDEN
    assert checkpoint.adapter.recorded_base == {"name": base, "fingerprint": checkpoint.fingerprint}
    on_top = Checkpoint.resolve(base, adapter=adapter)
    assert (on_top.name, on_top.adapter) == (base, checkpoint.adapter)


@pytest.mark.parametrize("place", ["./nowhere", "a/b/c", "/no/such", "outputs/nowhere/", "../up"])
def test_a_missing_folder_is_no_hub_name(place):
    with pytest.raises(CheckpointError, match=f"no checkpoint folder {place} .looked in .*Qwen/Qwen3-0.6B"):
        resolve_checkpoint(place)


def test_a_folder_that_is_no_checkpoint_names_one_inside(base, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match="is not a checkpoint: it has neither config.json nor adapter_config.json.$"
    ):
        resolve_checkpoint(str(tmp_path / "empty"))
    shutil.copytree(base, tmp_path / "run" / "model")
    with pytest.raises(CheckpointError, match=f"Did you mean {tmp_path / 'run' / 'model'}"):
        resolve_checkpoint(str(tmp_path / "run"))


def test_the_base_is_found_from_another_folder(base, adapter, tmp_path, monkeypatch):
    """An adapter trained as outputs/x on outputs/base, looked at from elsewhere."""
    shutil.copytree(base, tmp_path / "outputs" / "base")
    folder = Path(shutil.copytree(adapter, tmp_path / "outputs" / "x"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "outputs/base"}))
    monkeypatch.chdir(tmp_path.parent)
    assert resolve_checkpoint(str(folder)) == (str(tmp_path / "outputs" / "base"), Adapter.read(str(folder)))
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint(str(folder)) == ("outputs/base", Adapter.read(str(folder)))


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "does not name its base"), ("/gone/base", "trained on /gone/base, which is not there")],
)
def test_an_adapter_without_its_base(adapter, tmp_path, value, message):
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(adapter)


def test_a_hub_name_offline_is_said_at_once_with_the_cures(tmp_path):
    """As a user meets it: no traceback, no waiting for the network."""
    started = time.monotonic()
    done = run_program(
        "supervised_finetuning.py",
        *(
            "--model_name_or_path",
            "no-such/model",
            "--train_file_dir",
            "data/finetune",
            "--output_dir",
            tmp_path / "run",
        ),
        check=False,
        timeout=60,
    )
    assert done.returncode == 1 and time.monotonic() - started < 40
    for part in ("error: no-such/model is not a folder here", "huggingface.co", "HF_ENDPOINT=", "--hub modelscope"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_modelscope_without_its_package_says_how_to_get_it(base):
    assert fetch(base, "modelscope") == base
    assert fetch("Qwen/Qwen3-0.6B", "huggingface") == "Qwen/Qwen3-0.6B"
    try:
        import modelscope  # noqa: F401
    except ImportError:
        with pytest.raises(CheckpointError, match="pip install modelscope"):
            fetch("Qwen/Qwen3-0.6B", "modelscope")


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_a_file_that_was_not_downloaded_whole_is_named(base, adapter, tmp_path, size):
    folder = shutil.copytree(base, tmp_path / "broken")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{folder} could not be loaded"):
        load(str(folder))
    if size < 1000:
        with pytest.raises(CheckpointError, match="model.safetensors is damaged or incomplete"):
            fingerprint(str(folder))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: size // 2])
    with pytest.raises(CheckpointError, match=f"the adapter {adapter} does not fit"):
        attach_adapter(load(base), Adapter.read(adapter))


def test_the_tokenizer_of_an_adapter_is_its_own_or_its_bases(base, adapter, tmp_path):
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(base).get_vocab()
    assert checkpoint_tokenizer(Checkpoint.resolve(adapter)).get_vocab() == load_tokenizer(base).get_vocab()
    extended = tiny_tokenizer()
    extended.add_tokens(["感冒"])
    extended.save_pretrained(adapter)
    for name, flags in ((adapter, {}), (base, {"adapter": adapter}), (base, {"tokenizer": adapter})):
        tokenizer = checkpoint_tokenizer(Checkpoint.resolve(name, **flags))
        assert len(tokenizer) == len(load_tokenizer(adapter)) == len(load_tokenizer(base)) + 1


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == tokenizer.eos_token
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="neither a padding nor an end token"):
        load_tokenizer(str(tmp_path))


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_follows_the_weights_and_not_the_files(base, other, tmp_path):
    load(base).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert fingerprint(str(tmp_path / "shards")) == fingerprint(base)
    assert fingerprint(other) != fingerprint(base)
    load(base, dtype="bfloat16").save_pretrained(tmp_path / "bf16")
    assert fingerprint(str(tmp_path / "bf16")) != fingerprint(base)


@pytest.mark.parametrize("position", [0, "middle", -1])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_fingerprint_sees_one_changed_value(base, tmp_path, name, position):
    folder = shutil.copytree(base, tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    flat = weights[name].view(-1)
    flat[len(flat) // 2 if position == "middle" else position] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(str(folder)) != fingerprint(base)


def test_there_is_none_without_weights_here(adapter, tmp_path):
    assert fingerprint(str(tmp_path)) is None
    assert fingerprint("no-such/model") is None
    # The weights of an adapter are not those of a base.
    assert fingerprint(adapter) is None


def test_an_adapter_goes_only_on_its_base(base, other, adapter, tmp_path, warnings):
    check_base(Adapter.read(adapter), base)
    shutil.copytree(base, tmp_path / "copy")
    check_base(Adapter.read(adapter), str(tmp_path / "copy"))
    assert warnings == []
    with pytest.raises(CheckpointError, match=f"trained on {base} .*but {other} has other weights.*Pass the base"):
        check_base(Adapter.read(adapter), other)
    with pytest.raises(CheckpointError, match="other weights"):
        attach_adapter(load(other), Adapter.read(adapter))


def test_a_checkpoint_of_a_run_is_checked_by_the_record_of_the_run(base, other, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "run" / "checkpoint-3")
    (folder / "run.json").rename(tmp_path / "run" / "run.json")
    saved = Adapter.read(str(folder))
    check_base(saved, base)
    with pytest.raises(CheckpointError, match="other weights"):
        check_base(saved, other)


def test_an_adapter_from_elsewhere_cannot_be_checked_and_says_so(other, adapter, tmp_path, warnings):
    (tmp_path / "adapter" / "run.json").unlink()
    check_base(Adapter.read(adapter), other)
    assert "whether" in warnings[0] and other in warnings[0]


def test_an_adapter_of_another_shape_is_refused(adapter, tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "narrow")
    (tmp_path / "adapter" / "run.json").unlink()
    with pytest.raises(CheckpointError, match="does not fit"):
        attach_adapter(load(str(tmp_path / "narrow")), Adapter.read(adapter))


# --- adapters --------------------------------------------------------------------------------------------------------


def test_all_linear_layers_but_the_head_get_an_adapter(base):
    model = add_lora(load(base), LoraArguments(lora_rank=4), TaskType.CAUSAL_LM)
    # Two layers; an adapter of a (in, out) layer has 4 x (in + out) numbers.
    assert trainable_by_module(model) == {
        "q_proj": 2 * 4 * (64 + 64),
        "k_proj": 2 * 4 * (64 + 32),
        "v_proj": 2 * 4 * (64 + 32),
        "o_proj": 2 * 4 * (64 + 64),
        "gate_proj": 2 * 4 * (64 + 128),
        "up_proj": 2 * 4 * (64 + 128),
        "down_proj": 2 * 4 * (128 + 64),
    }
    by_name = add_lora(load(base), LoraArguments(lora_rank=4, target_modules="q_proj, lm_head"), TaskType.CAUSAL_LM)
    assert set(trainable_by_module(by_name)) == {"q_proj", "lm_head"}


def test_modules_to_save_are_trained_in_full(base):
    lora = LoraArguments(target_modules="q_proj", modules_to_save="embed_tokens, lm_head")
    counts = trainable_by_module(add_lora(load(base), lora, TaskType.CAUSAL_LM))
    assert counts["embed_tokens"] == counts["lm_head"] == VOCABULARY * HIDDEN


def test_a_tied_head_is_trained_once(base, tmp_path):
    model = load(base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    lora = LoraArguments(target_modules="q_proj", modules_to_save="embed_tokens,lm_head")
    model = add_lora(model, lora, TaskType.CAUSAL_LM)
    assert sum(trainable_by_module(model).values()) - trainable_by_module(model)["q_proj"] == VOCABULARY * HIDDEN
    head = model.get_output_embeddings()
    head = getattr(head, "modules_to_save", {"default": head})["default"]
    embedding = model.get_input_embeddings()
    embedding = getattr(embedding, "modules_to_save", {"default": embedding})["default"]
    assert head.weight is embedding.weight


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": "q_proj,W_pack"}, "no module W_pack; its linear layers are .*k_proj, lm_head"),
        ({"modules_to_save": "embeddings"}, "no module embeddings"),
    ],
)
def test_adapter_flags_that_cannot_be(base, values, message):
    with pytest.raises(UserError, match=message):
        add_lora(load(base), given(**values), TaskType.CAUSAL_LM)


def test_flags_of_adapters_have_no_effect_on_full_training(base, adapter):
    with pytest.raises(UserError, match="--lora_rank, --peft_path would have no effect"):
        stage_checkpoint(ModelArguments(base), given(use_peft=False, peft_path=adapter, lora_rank=9))


def test_the_usual_adapter_may_be_named_in_full_training(base, capsys):
    """As launch scripts do, which name it whether there is one or not."""
    stage_checkpoint(ModelArguments(base), given(use_peft=False, target_modules="all", lora_rank=8))
    assert "note: --lora_rank, --target_modules: not used" in capsys.readouterr().err


def test_full_training_trains_every_weight(base):
    model = add_lora(load(base), LoraArguments(use_peft=False), TaskType.CAUSAL_LM)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert sum(trainable_by_module(model).values()) == total_parameters(model) == size


def test_going_on_with_an_adapter(base, adapter):
    for name, lora in ((base, given(peft_path=adapter)), (adapter, given())):
        checkpoint = stage_checkpoint(ModelArguments(name), lora)
        model = add_lora(load(base), lora, TaskType.CAUSAL_LM, adapter=checkpoint.adapter)
        assert isinstance(model, PeftModel)
        assert set(trainable_by_module(model)) >= {"q_proj", "down_proj"}
        torch.testing.assert_close(logits(model), logits(attach_adapter(load(base), Adapter.read(adapter))))
        assert not torch.allclose(logits(model), logits(load(base)), atol=1e-2)
    assert sum(trainable_by_module(attach_adapter(load(base), Adapter.read(adapter))).values()) == 0


def test_the_shape_of_a_continued_adapter_is_its_own(base, adapter):
    with pytest.raises(UserError, match="--lora_rank, --target_modules would have no effect"):
        check_flags(given(lora_rank=8, target_modules="all"), Adapter.read(adapter))
    with pytest.raises(UserError, match=f"{adapter} is an adapter already, and --peft_path names another: {adapter}"):
        stage_checkpoint(ModelArguments(adapter), given(peft_path=adapter))


def test_a_folder_without_adapter_config_is_no_adapter(base):
    with pytest.raises(
        CheckpointError, match=f"{base} is not an adapter: it has no adapter_config.json. Check --peft_path"
    ):
        stage_checkpoint(ModelArguments(base), given(peft_path=base))


def test_full_training_of_an_adapter_folder_starts_from_the_merged_weights(base, adapter):
    arguments = ModelArguments(model_name_or_path=adapter)
    checkpoint = Checkpoint.from_arguments(arguments)
    merged = load_base(AutoModelForCausalLM, checkpoint, arguments, LoraArguments(use_peft=False))
    assert not isinstance(merged, PeftModel)
    assert sum(trainable_by_module(merged).values()) == total_parameters(merged)
    torch.testing.assert_close(
        logits(merged), logits(attach_adapter(load(base), Adapter.read(adapter))), atol=1e-4, rtol=0
    )


def test_new_tokens_get_rows_that_the_whole_embedding_brings_back(base, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["感冒", "发热"])
    model = load(base)
    fit_embedding(model, tiny_tokenizer(), LoraArguments())
    assert model.get_input_embeddings().num_embeddings == VOCABULARY
    mean = model.get_input_embeddings().weight.mean(dim=0)
    lora = LoraArguments(modules_to_save="embed_tokens,lm_head")
    assert fit_embedding(model, tokenizer, lora) == [VOCABULARY, VOCABULARY + 1]
    new = model.get_input_embeddings().weight[VOCABULARY:]
    assert len(new) == 2
    torch.testing.assert_close(new, mean.expand(2, -1), atol=1e-3, rtol=0)
    # The adapter that holds the new rows brings them back onto a base without them.
    add_lora(model, lora, TaskType.CAUSAL_LM).save_pretrained(tmp_path / "adapter")
    again = attach_adapter(load(base), Adapter.read(str(tmp_path / "adapter")))
    torch.testing.assert_close(logits(again), logits(model))
    assert logits(again).shape[-1] == VOCABULARY + 2


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_quantization_flags():
    assert quantization_config(False, False, False) is None
    four = quantization_config(True, False, False)
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "nf4", False)
    qlora = quantization_config(False, False, True)
    assert (qlora.load_in_4bit, qlora.bnb_4bit_use_double_quant) == (True, True)
    assert isinstance(quantization_config(False, True, False), BitsAndBytesConfig)


@pytest.mark.parametrize("flags", [{"load_in_4bit": True}, {"qlora": True}])
def test_two_widths_at_once_are_refused(flags):
    with pytest.raises(UserError, match="choose one"):
        quantization_config(**{"load_in_4bit": False, "qlora": False, **flags}, load_in_8bit=True)


def test_options_that_contradict_each_other_are_refused(base, monkeypatch):
    with pytest.raises(UserError, match="a quantized base cannot be trained in full"):
        load(base, load_in_8bit=True, full_training=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--device_map is for a single process"):
        load(base, device_map="balanced")


def test_several_processes_do_not_distribute_a_model_over_their_gpus(base, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = load(base, device_map="auto")
    assert not hasattr(model, "hf_device_map") and "its own GPU" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [{"load_in_4bit": True}, {"qlora": True}, {"load_in_8bit": True}])
def test_a_quantized_base_counts_the_numbers_that_it_stands_for(base, flags):
    model = load(base, **flags)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.__class__.__name__ == ("Linear8bitLt" if "load_in_8bit" in flags else "Linear4bit")
    assert not isinstance(model.lm_head, layer.__class__)
    assert total_parameters(model) == total_parameters(load(base))
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("flags", [{"load_in_4bit": True}, {"qlora": True}, {"load_in_8bit": True}])
def test_answers_before_training_leave_the_gradients_alone(base, flags):
    """bitsandbytes repacks 4-bit weights when a CPU with AVX-512 generates, and their product then has no gradient."""

    def gradients(answer_first: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        lora = LoraArguments(lora_dropout=0.0)
        arguments = ModelArguments(model_name_or_path=base, **flags)
        model = load_base(AutoModelForCausalLM, Checkpoint.resolve(base), arguments, lora)
        model = add_lora(model, lora, TaskType.CAUSAL_LM)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        ids = torch.arange(40).reshape(2, 20)
        if answer_first:
            model.eval()
            model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        model.train()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    before, after = gradients(False), gradients(True)
    assert len(before) == 28 and all(gradient.abs().sum() > 0 for gradient in before.values())
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_the_dtype_flag_is_the_type_of_the_weights(base, dtype):
    expected = torch.float32 if dtype == "auto" and not torch.cuda.is_available() else None
    expected = expected or (torch.bfloat16 if dtype == "auto" else getattr(torch, dtype))
    model = load(base, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_trained_weights_are_kept_in_float32_and_others_are_not(base):
    model = add_lora(load(base, dtype="bfloat16"), LoraArguments(modules_to_save="lm_head"), TaskType.CAUSAL_LM)
    model.to(torch.bfloat16)
    adapters_to_float32(model)
    types = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}


def test_a_model_with_a_head_for_labels(base):
    model = load_model(AutoModelForSequenceClassification, base, num_labels=3)
    model = add_lora(model, LoraArguments(target_modules="q_proj"), TaskType.SEQ_CLS)
    assert trainable_by_module(model)["score"] == 3 * HIDDEN
