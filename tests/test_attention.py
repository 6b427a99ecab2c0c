"""`--flash_attn`, `--shift_attn`, `--rope_scaling` and `--neft_alpha`, each against its definition."""

import math
from pathlib import Path

from medicalgpt.args import AttentionArguments, LoraArguments, ModelArguments
from medicalgpt.data.batching import collator
from medicalgpt.errors import UserError
from medicalgpt.models import attention
from medicalgpt.models.adapters import attach_adapter
from medicalgpt.models.attention import (
    SHIFTED,
    SHIFTED_MODELS,
    FlashFacts,
    choose_flash,
    context_length,
    shifted_attention,
)
from medicalgpt.models.hub import Adapter, Checkpoint, CheckpointError
from medicalgpt.models.loading import load_base, load_model
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.training.trainers import sequence_lengths
from tests.helpers import open_stage, read_json, run_here, write_jsonl
from tests.tiny import make_tiny, tiny_tokenizer

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import create_causal_mask

SFT, PT = "supervised_finetuning.py", "pretraining.py"
CONTEXT = 512
ALL_WEIGHTS = ("--use_peft", "False")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A tiny Qwen3 of 512 positions, conversations, and documents."""
    folder = tmp_path_factory.mktemp("attention")
    make_tiny(folder / "base", max_position_embeddings=CONTEXT)
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "q" * (5 + 9 * n)},
                {"from": "gpt", "value": "answer " * (n + 1)},
            ]
        }
        for n in range(8)
    ]
    write_jsonl(folder / "chats" / "train.jsonl", rows)
    write_jsonl(folder / "chats" / "validation.jsonl", [{"prompt": "Which?", "response": "That one. " * 9}])
    write_jsonl(folder / "texts" / "train.jsonl", [{"text": "A document. " * n} for n in (2, 9, 5, 3, 7)])
    return folder


def flags(work: Path, output: Path, *more, data: str = "chats") -> list:
    fixed = ("--model_name_or_path", work / "base", "--train_file_dir", work / data, "--output_dir", output)
    return [*fixed, "--sample_prompts", 0, "--max_steps", 2, "--logging_steps", 1, *more]


def small_model(kind: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, "initializer_range": 0.2, **options})
    config.sliding_window = None
    return AutoModelForCausalLM.from_config(config)


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


# --- FlashAttention --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "name", "why"),
    [
        (FlashFacts(9, True, package_2=True, package_3=True), "flash_attention_3", "flash-attn-3"),
        (FlashFacts(8, True, package_2=True, package_3=True), "flash_attention_2", "installed package flash-attn"),
        (FlashFacts(9, True, package_2=True), "flash_attention_2", "installed package flash-attn"),
        (FlashFacts(8, True, kernel=True), "kernels-community/flash-attn2", "prebuilt kernel"),
        (FlashFacts(8, True), "sdpa", "setup.sh --extras"),
        (FlashFacts(8, False, package_2=True, package_3=True, kernel=True), "sdpa", "16 bits"),
        (FlashFacts(7, True, package_2=True), "sdpa", "older than Ampere"),
        (FlashFacts(None, True, package_2=True, package_3=True), "sdpa", "no CUDA GPU"),
    ],
)
def test_choice_of_flash_attention(facts, name, why):
    chosen, reason = choose_flash(facts)
    assert (chosen, why in reason) == (name, True)


@pytest.mark.parametrize(
    ("name", "flat"),
    [
        ("flash_attention_2", True),
        ("flash_attention_3", True),
        ("kernels-community/flash-attn2", True),
        ("sdpa", False),
        (SHIFTED, False),
    ],
)
def test_only_flash_attention_gets_flat_batches(work, name, flat):
    model = small_model("llama")
    model.config._attn_implementation_internal = name
    assert collator(tiny_tokenizer(), model).flatten is flat


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the choice depends on what is installed")
def test_flash_attention_without_a_gpu_says_what_it_is(work, tmp_path, capfd):
    opened = open_stage(SFT, *flags(work, tmp_path / "out", "--flash_attn", "True"))
    assert opened.trainer.model.config._attn_implementation == "sdpa"
    assert "--flash_attn: PyTorch's own" in (shown := capfd.readouterr().err) and "no CUDA GPU" in shown


# --- shifted sparse attention ----------------------------------------------------------------------------------------


def looks_at(head: int, heads: int, token: int, size: int) -> range:
    """The definition: groups of `size` tokens, in the second half of the heads moved on by half a group."""
    offset = 0 if head < heads // 2 else size - size // 2
    group = (token + offset) // size
    return range(max(0, group * size - offset), token + 1)


def naive(query, key, value, size, scaling, visible) -> torch.Tensor:
    """Token by token and head by head; (batch, length, heads, width)."""
    batch, heads, length, width = query.shape
    shared = heads // key.shape[1]
    output = torch.zeros(batch, length, heads, width, dtype=query.dtype)
    for row in range(batch):
        for head in range(heads):
            for token in range(length):
                others = [other for other in looks_at(head, heads, token, size) if visible(row, token, other)]
                if not others:
                    continue
                scores = torch.stack([query[row, head, token] @ key[row, head // shared, o] for o in others])
                weights = (scores * scaling).softmax(0)
                output[row, token, head] = sum(
                    weight * value[row, head // shared, other] for weight, other in zip(weights, others, strict=True)
                )
    return output


LENGTHS = [13, 20]
DOCUMENTS = [[5, 7, 8], [20]]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("rows", ["whole", "padded", "packed"])
@pytest.mark.parametrize("size", [4, 7, 32])
def test_shifted_attention_is_the_definition(heads, rows, size):
    """Forward and gradients; 20 tokens are a multiple of some group sizes and not of others, and shorter than one."""
    heads, shared = heads
    length = 20
    torch.manual_seed(1)
    options = {"num_attention_heads": heads, "num_key_value_heads": shared, "hidden_size": 8 * heads}
    model = small_model("llama", **options)
    model.config._attn_implementation_internal = SHIFTED
    layer = model.model.layers[0].self_attn.train()
    layer.shift_group_size = size
    shape = (2, heads, length, 8), (2, shared, length, 8), (2, shared, length, 8)
    qkv = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shape]
    padding = torch.tensor([[1] * n + [0] * (length - n) for n in LENGTHS]) if rows == "padded" else None
    positions = (
        torch.tensor([sum((list(range(n)) for n in row), []) for row in DOCUMENTS]) if rows == "packed" else None
    )
    mask = create_causal_mask(
        model.config, torch.zeros(2, length, 8), padding, past_key_values=None, position_ids=positions
    )
    assert (mask is None) == (rows == "whole")
    number = torch.zeros(2, length) if positions is None else (positions == 0).cumsum(1)

    def visible(row: int, token: int, other: int) -> bool:
        return number[row, token] == number[row, other] and (padding is None or bool(padding[row, other]))

    found, _ = shifted_attention(layer, *qkv, mask, scaling=0.3)
    wanted = naive(*qkv, size, 0.3, visible)
    # What padding gives is nobody's business, as long as it is a number.
    real = torch.ones(2, length, dtype=torch.bool) if padding is None else padding.bool()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[real], wanted[real])
    weights = torch.randn_like(wanted) * real[..., None, None]
    for mine, other in zip(
        torch.autograd.grad((found * weights).sum(), qkv),
        torch.autograd.grad((wanted * weights).sum(), qkv),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def shifted(kind: str = "llama", size: int = 8, **options) -> torch.nn.Module:
    model = small_model(kind, attn_implementation=SHIFTED, **options)
    assert attention.set_group_size(model, 4 * size) == size
    return model.train()


@pytest.mark.parametrize("layers", [1, 2])
def test_what_a_token_reaches(layers):
    """Nothing earlier; after one layer its groups, after two the neighbouring ones, as the definition has it."""
    model = shifted(num_hidden_layers=layers)
    length, heads, size = 27, 4, 8
    reached = {token: {token} for token in range(length)}
    for _ in range(layers):
        reached = {
            token: set().union(
                *(reached[o] for head in range(heads) for o in looks_at(head, heads, token, size)), {token}
            )
            for token in range(length)
        }
    ids = torch.arange(length)[None] + 5
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits[0]
        for token in range(length):
            changed = ids.clone()
            changed[0, token] = 200
            moved = (model(input_ids=changed, use_cache=False).logits[0] - before).abs().amax(-1) > 1e-6
            assert {int(i) for i in moved.nonzero()} == {other for other in range(length) if token in reached[other]}
    assert layers == 1 or any(min(reached[token]) < token // size * size for token in range(size, length))


def test_batch_mates_and_padding_change_nothing():
    model = shifted()
    rows = [torch.arange(n) + n for n in (5, 11, 30)]
    alone = [model(input_ids=row[None], attention_mask=torch.ones(1, len(row))).logits[0] for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    together = model(input_ids=ids, attention_mask=mask).logits
    for row, logit in zip(together, alone, strict=True):
        torch.testing.assert_close(row[: len(logit)], logit)


def test_packed_documents_do_not_see_each_other():
    model = shifted()
    positions = torch.cat([torch.arange(n) for n in (6, 15, 9)])[None]
    ids = torch.arange(30)[None]
    before = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    changed = ids.clone()
    changed[0, :6], changed[0, 21:] = 250, 251
    after = model(input_ids=changed, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(after[:, 6:21], before[:, 6:21])
    assert not torch.allclose(after[:, 21:], before[:, 21:], atol=1e-2)


@pytest.mark.parametrize("kind", SHIFTED_MODELS)
def test_in_evaluation_it_is_full_attention(kind):
    model = shifted(kind)
    plain = small_model(kind, attn_implementation="sdpa")
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(30)[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        in_training = model(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(in_training[:, 8:], logits(plain, ids)[:, 8:], atol=1e-2)
    torch.testing.assert_close(in_training[:, :4], logits(plain, ids)[:, :4])
    assert torch.equal(logits(model, ids), logits(plain, ids))
    prompts = torch.arange(40).view(2, 20)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    left_padded = torch.ones_like(prompts).index_fill_(1, torch.arange(3), 0)
    assert torch.equal(
        model.generate(prompts, attention_mask=left_padded, **options),
        plain.generate(prompts, attention_mask=left_padded, **options),
    )


@pytest.mark.parametrize("packing", ["False", "True"])
def test_a_stage_trains_with_groups_and_evaluates_without(work, tmp_path, packing):
    opened = open_stage(
        SFT,
        *flags(work, tmp_path / "out", "--shift_attn", "True", "--model_max_length", 200, "--packing", packing),
    )
    trainer = opened.trainer
    layers = [module for module in trainer.model.modules() if hasattr(module, "num_key_value_groups")]
    assert [module.shift_group_size for module in layers] == [50, 50]
    plain = open_stage(SFT, *flags(work, tmp_path / "plain", "--model_max_length", 200, "--packing", packing)).trainer
    assert plain.model.config._attn_implementation == "sdpa"
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        grouped, whole = (t.compute_loss(t.model.train(), dict(batch)).item() for t in (trainer, plain))
    assert abs(grouped - whole) > 1e-3
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_a_checkpoint_does_not_name_the_attention(work, tmp_path):
    open_stage(
        SFT, *flags(work, tmp_path / "out", *ALL_WEIGHTS, "--shift_attn", "True", "--model_max_length", 200)
    ).finish()
    for path in (tmp_path / "out").glob("*.json"):
        if path.name != "run.json":
            assert "shift" not in path.read_text(encoding="utf-8"), path
    assert load_model(AutoModelForCausalLM, str(tmp_path / "out")).config._attn_implementation == "sdpa"


def test_where_shifted_attention_is_refused(work, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    windowed = AutoConfig.for_model("mistral", **SIZES, sliding_window=16)
    AutoModelForCausalLM.from_config(windowed).save_pretrained(tmp_path / "windowed")

    def load(path: Path, length: int = 64, **more) -> None:
        load_base(
            AutoModelForCausalLM,
            Checkpoint.resolve(str(path)),
            ModelArguments(model_name_or_path=str(path)),
            LoraArguments(),
            AttentionArguments(shift_attn=True, **more),
            max_length=length,
        )

    with pytest.raises(UserError, match="llama, mistral, qwen2, qwen3 models, this one is gpt2"):
        load(tmp_path / "gpt2")
    with pytest.raises(UserError, match="sliding window of 16"):
        load(tmp_path / "windowed")
    with pytest.raises(UserError, match="--flash_attn.*--shift_attn.*choose one"):
        load(work / "base", flash_attn=True)
    with pytest.raises(UserError, match="7 tokens are too few"):
        load(work / "base", length=7)


# --- rotary positions ------------------------------------------------------------------------------------------------


def published(kind: str, width: int, theta: float, known: int, factor: float, seen: int) -> tuple[list[float], float]:
    """Inverse frequencies and the factor on cos and sin, as the papers have them.

    linear: position / factor. dynamic: theta grows with the length at hand. yarn: a ramp over the number of rotations
    within the known length, from 32 (as it was) to 1 (position / factor).
    """
    if kind == "dynamic":
        theta *= (factor * max(seen, known) / known - (factor - 1)) ** (width / (width - 2))
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    if kind == "linear":
        return [frequency / factor for frequency in plain], 1.0
    if kind == "dynamic":
        return plain, 1.0

    def dimension(rotations: float) -> float:
        return width * math.log(known / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), width - 1)
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(width // 2)]
    mixed = [(1 - r) * f + r * f / factor for r, f in zip(ramp, plain, strict=True)]
    return mixed, 0.1 * math.log(factor) + 1


def load_scaled(path: Path, kind: str, length: int) -> torch.nn.Module:
    return load_base(
        AutoModelForCausalLM,
        Checkpoint.resolve(str(path)),
        ModelArguments(model_name_or_path=str(path)),
        LoraArguments(),
        AttentionArguments(rope_scaling=kind),
        max_length=length,
    )


@pytest.mark.parametrize("kind", attention.ROPE_SCALING)
@pytest.mark.parametrize("length", [1024, 1300])
def test_frequencies_are_the_published_ones(work, kind, length):
    model = load_scaled(work / "base", kind, length)
    rotary = model.model.rotary_emb
    for seen in (20, 700):
        model(input_ids=torch.zeros(1, seen, dtype=torch.long))
        frequencies, scale = published(kind, 16, 10_000.0, CONTEXT, length / CONTEXT, seen)
        torch.testing.assert_close(rotary.inv_freq, torch.tensor(frequencies))
        assert rotary.attention_scaling == pytest.approx(scale)
    assert context_length(model.config) == length
    assert model.config.rope_parameters["rope_theta"] == 10_000.0


FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"head_dim": 8},
    "glm": {"head_dim": 8, "pad_token_id": 0},
}


@pytest.mark.parametrize("kind", attention.ROPE_SCALING)
@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_reaches_the_model_and_its_files(tmp_path, family, kind):
    small_model(family, **FAMILIES[family]).save_pretrained(tmp_path / "base")
    ids = torch.arange(100)[None]
    before = logits(load_model(AutoModelForCausalLM, str(tmp_path / "base")), ids)
    model = load_scaled(tmp_path / "base", kind, 128)
    assert not torch.allclose(logits(model, ids), before, atol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    again = load_model(AutoModelForCausalLM, str(tmp_path / "saved"))
    torch.testing.assert_close(logits(again, ids), logits(model, ids))
    assert context_length(again.config) == 128


@pytest.fixture(scope="module", params=attention.ROPE_SCALING)
def stretched(request, work, tmp_path_factory) -> Path:
    """An adapter trained beyond the model's positions."""
    folder = tmp_path_factory.mktemp("stretched") / request.param
    write_jsonl(work / "long" / "train.jsonl", [{"prompt": "Count.", "response": "one two " * 80}] * 2)
    scaling = ("--rope_scaling", request.param, "--model_max_length", 1024, "--learning_rate", 0.01)
    open_stage(SFT, *flags(work, folder / "adapter", *scaling, data="long")).finish()
    return folder


def test_an_adapter_is_never_used_with_other_positions(work, stretched):
    adapter, ids = str(stretched / "adapter"), torch.arange(600)[None] % 250
    kind = stretched.name
    assert read_json(Path(adapter) / "run.json")["base"]["rope_parameters"]["rope_type"] == kind
    with pytest.raises(CheckpointError, match=f"trained with other positions.*{kind}"):
        attach_adapter(load_model(AutoModelForCausalLM, str(work / "base")), Adapter.read(adapter))

    engine = ChatEngine.from_pretrained(adapter)
    named = ChatEngine.from_pretrained(str(work / "base"), lora_model=adapter)
    run_here("merge_peft_adapter.py", "--lora_model", adapter, "--output_dir", stretched / "merged")
    merged = ChatEngine.from_pretrained(str(stretched / "merged"))
    assert {e.context_length for e in (engine, named, merged)} == {1024}
    torch.testing.assert_close(logits(named.model, ids), logits(engine.model, ids), atol=0, rtol=0)
    torch.testing.assert_close(logits(merged.model, ids), logits(engine.model, ids), atol=1e-3, rtol=0)
    config = read_json(stretched / "merged" / "config.json")
    assert config["rope_parameters"]["rope_type"] == kind
    # The same weights with the base's own positions are another model.
    plain = load_model(
        AutoModelForCausalLM,
        str(stretched / "merged"),
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]},
    )
    assert not torch.allclose(logits(plain, ids), logits(engine.model, ids), atol=1e-2)


@pytest.mark.parametrize("how", ["--peft_path", "--model_name_or_path"])
def test_a_run_on_top_of_the_adapter_keeps_its_positions(work, stretched, tmp_path, how):
    given = [*flags(work, tmp_path / "next"), how, stretched / "adapter", "--model_max_length"]
    opened = open_stage(SFT, *given, 900)
    rope = read_json(stretched / "adapter" / "run.json")["base"]["rope_parameters"]
    assert opened.trainer.model.config.rope_parameters == rope == opened.run.record["base"]["rope_parameters"]
    with pytest.raises(UserError, match="scaled already"):
        open_stage(SFT, *given, 2000, "--rope_scaling", "yarn")
    with pytest.raises(UserError, match="training length is 2000 tokens, and the model has 1024 positions"):
        open_stage(SFT, *given, 2000)


def test_all_weights_on_top_of_the_adapter_keep_its_positions(work, stretched, tmp_path):
    given = [*flags(work, tmp_path / "next", *ALL_WEIGHTS), "--model_name_or_path", stretched / "adapter"]
    opened = open_stage(SFT, *given, "--learning_rate", 0)
    ids = torch.arange(600)[None] % 250
    wanted = logits(ChatEngine.from_pretrained(str(stretched / "adapter")).model, ids)
    opened.finish()
    torch.testing.assert_close(
        logits(load_model(AutoModelForCausalLM, str(tmp_path / "next")), ids), wanted, atol=1e-3, rtol=0
    )


def test_pretraining_scales_to_its_block_size(work, tmp_path):
    given = flags(work, tmp_path / "out", *ALL_WEIGHTS, "--block_size", 1536, "--rope_scaling", "linear", data="texts")
    open_stage(PT, *given).finish()
    rope = read_json(tmp_path / "out" / "config.json")["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 3.0)
    assert ChatEngine.from_pretrained(str(tmp_path / "out")).context_length == 1536


def test_where_scaling_is_refused(work, tmp_path):
    def refused(path: Path, match: str, length: int = 2048) -> None:
        with pytest.raises(UserError, match=match):
            load_scaled(path, "yarn", length)

    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    layered = AutoConfig.for_model("gemma3_text", **SIZES, head_dim=8)
    AutoModelForCausalLM.from_config(layered).save_pretrained(tmp_path / "layered")
    load_scaled(work / "base", "linear", 1024).save_pretrained(tmp_path / "scaled")
    small_model("phi3", pad_token_id=0).save_pretrained(tmp_path / "phi3")
    refused(tmp_path / "phi3", "--rope_scaling yarn does not work with phi3 models")
    refused(work / "base", "no effect: the model has 512 positions, and the training length is 512", length=512)
    refused(tmp_path / "gpt2", "gpt2 models have no rotary positions")
    refused(tmp_path / "layered", "the layers of gemma3_text models have different positions")
    refused(tmp_path / "scaled", r"scaled already \(linear, up to 1024 tokens\)")


@pytest.mark.parametrize(
    ("script", "flag", "data"), [(SFT, "--model_max_length", "chats"), (PT, "--block_size", "texts")]
)
def test_a_length_beyond_the_positions(work, tmp_path, script, flag, data):
    """Given, it is refused with the remedy, before the data is read; the default becomes what the model has."""
    given = flags(work, tmp_path / "out", data="nowhere")
    with pytest.raises(UserError, match="length is 513 tokens, and the model has 512 .*--rope_scaling yarn"):
        open_stage(script, *given, flag, 513)
    assert not (tmp_path / "out").exists()
    opened = open_stage(script, *flags(work, tmp_path / "out", data=data))
    assert opened.run.record["arguments"][flag.removeprefix("--")] == CONTEXT


def test_no_scaling_is_offered_where_there_is_none(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="the model has 1024 positions") as error:
        attention.position_options(Checkpoint.resolve(str(tmp_path / "gpt2")).config, None, 2000)
    assert "--rope_scaling" not in str(error.value)


@pytest.mark.parametrize(
    ("rope", "known", "length"),
    [
        ({"rope_type": "default"}, 4096, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 4096, 16384),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096, 8192),
        # A quotient whose product is a little less.
        ({"rope_type": "linear", "factor": 12288 / 12032}, 12032, 12288),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 4096, 16384),
        ({"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}, 163840, 163840),
        ({"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}, 131072, 131072),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_context_length(rope, known, length):
    config = AutoConfig.for_model("llama", **{**SIZES, "max_position_embeddings": known})
    config.rope_parameters = {"rope_theta": 10_000.0, **rope}
    assert context_length(config) == length


def test_context_without_bound():
    assert context_length(AutoConfig.for_model("bloom")) is None


# --- NEFTune ---------------------------------------------------------------------------------------------------------


def test_lengths_of_sequences():
    ids = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert sequence_lengths({"input_ids": ids, "attention_mask": mask}).tolist() == [[3] * 5, [5] * 5]
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]])
    assert sequence_lengths({"input_ids": ids, "position_ids": positions}).tolist() == [
        [2, 2, 3, 3, 3],
        [1, 4, 4, 4, 4],
    ]


class Listener:
    """Records, for every forward pass, what the first layer is given beyond the embedding of its tokens.

    Attributes:
        heard: (training, noise (batch, length, width), length of each token's sequence (batch, length), real tokens).
    """

    def __init__(self, model: torch.nn.Module):
        self.model, self.heard, self.inputs = model, [], {}
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.model.register_forward_pre_hook(self.take_inputs, with_kwargs=True)
        base.model.layers[0].register_forward_pre_hook(self.take_hidden, with_kwargs=True)

    def take_inputs(self, module, args, kwargs):
        self.inputs = kwargs

    def take_hidden(self, module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).detach()
        ids, mask, positions = (self.inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
        weight = self.model.get_input_embeddings().weight.detach()
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        lengths = torch.zeros_like(ids)
        for row in range(len(ids)):
            starts = [0] if positions is None else (positions[row] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], int(real[row].sum())], strict=True):
                lengths[row, start:end] = end - start
        self.heard.append((module.training, hidden - weight[ids], lengths, real))


@pytest.mark.parametrize(
    "more",
    [
        (),
        ALL_WEIGHTS,
        ("--packing", "True"),
        ("--modules_to_save", "embed_tokens,lm_head"),
        ("--gradient_checkpointing", "True"),
    ],
    ids=lambda more: " ".join(more) or "adapter",
)
def test_noise_has_the_papers_scale_in_training_and_is_off_elsewhere(work, tmp_path, more):
    alpha = 5.0
    given = flags(work, tmp_path / "out", "--neft_alpha", alpha, "--eval_strategy", "steps", "--eval_steps", 1, *more)
    opened = open_stage(SFT, *given, "--validation_file_dir", work / "chats" / "validation.jsonl")
    listener = Listener(opened.trainer.model)
    opened.finish()
    noisy = [entry for entry in listener.heard if entry[0]]
    quiet = [entry for entry in listener.heard if not entry[0]]
    assert len(noisy) >= 2 and len(quiet) >= 3
    assert all((noise == 0).all() for _, noise, _, _ in quiet)
    shares = []
    for _, noise, lengths, real in noisy:
        width = noise.shape[-1]
        bound = alpha / (lengths[real] * width).sqrt()
        shares.append((noise[real] / bound[:, None]).flatten())
    share = torch.cat(shares)
    assert share.abs().max() < 1.0001
    # Uniform on [-1, 1]: mean 0, variance 1/3, a tenth of the values in each tenth.
    assert abs(share.mean()) < 0.02 and abs(share.var() - 1 / 3) < 0.01
    tenths = torch.histc(share, 10, -1, 1) / len(share)
    assert (tenths - 0.1).abs().max() < 0.01
    # Lengths differ, so that a bound by the length of the whole row would be seen.
    assert len({int(n) for _, _, lengths, real in noisy for n in lengths[real].unique()}) > 2
    after = opened.trainer.model.train()
    ids = torch.arange(9)[None]
    after(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert (listener.heard[-1][1] == 0).all()


def test_noise_does_not_reach_the_weights(work, tmp_path):
    given = flags(work, tmp_path / "out", *ALL_WEIGHTS, "--neft_alpha", 50, "--learning_rate", 0)
    open_stage(SFT, *given).finish()
    base, saved = (
        load_model(AutoModelForCausalLM, str(path)).state_dict() for path in (work / "base", tmp_path / "out")
    )
    assert all(torch.equal(base[name], saved[name]) for name in base)


def test_without_the_flag_there_is_no_noise(work, tmp_path):
    opened = open_stage(SFT, *flags(work, tmp_path / "out"))
    listener = Listener(opened.trainer.model)
    opened.finish()
    assert any(training for training, *_ in listener.heard)
    assert all((noise == 0).all() for _, noise, _, _ in listener.heard)
