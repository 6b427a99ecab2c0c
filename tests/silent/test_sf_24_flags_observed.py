"""Each flag is seen to do what it says before the first step, and a run whose flag has no effect is stopped."""

from medicalgpt.errors import UserError
from tests.helpers import Opened, open_stage, save_model, write_jsonl
from tests.silent.settings import (
    LINEAR,
    adapter_frozen,
    adapter_in_bfloat16,
    autocast_off,
    base_trained,
    no_accumulation,
    no_checkpointing,
    one_layer_unquantized,
    other_rate,
    smaller_batch,
    table,
)
from tests.tiny import tiny_tokenizer

import pytest
import torch
from torch.nn.functional import linear

ADAPTER = "rank 8, scale 2, dropout 0.05 on 14 layers"
FULL = ("--use_peft", "False")
# Rows of like length would hide noise that is scaled by the length of the longest one.
ROWS = [{"prompt": f"Question {n}?", "response": "Answer. " * (12 * n)} for n in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("sf24"), tiny_tokenizer(), context=512)


@pytest.fixture
def open_run(base, tmp_path):
    """Open a stage with the flags, so that a test can change something before it trains."""

    def make(*flags) -> Opened:
        write_jsonl(tmp_path / "data" / "rows.jsonl", ROWS)
        return open_stage(
            "supervised_finetuning.py",
            *("--model_name_or_path", base, "--train_file_dir", tmp_path / "data", "--output_dir", tmp_path / "run"),
            *("--max_steps", 2, "--save_strategy", "no", "--sample_prompts", 0, "--per_device_train_batch_size", 2),
            *("--overwrite_cache", "True", *flags),
        )

    return make


# flags -> lines, each with what is observed.
FLAGS = [
    ((), {"attention": "sdpa", "frozen weights": "float32", "trained weights": "float32", "autocast": "off"}),
    ((), {"quantization": "off", "adapter": ADAPTER, "adapter on": LINEAR, "frozen layers": "off"}),
    ((), {"optimizer": "AdamW of torch", "in the optimizer": "28 trained tensors once", "learning rate": "0.0002"}),
    (
        (),
        {
            "packing": "rows, with attention mask",
            "NEFTune noise": "off",
            "checkpointing": "off",
            "Liger kernels": "off",
        },
    ),
    (("--flash_attn", "True"), {"attention": "sdpa"}),
    (("--shift_attn", "True"), {"attention": "shifted_sparse", "attention groups": "128"}),
    (("--rope_scaling", "yarn", "--model_max_length", 1024), {"rotary scaling": "yarn"}),
    (("--load_in_4bit", "True"), {"quantization": "NF4 in 14 of 14 linear layers", "trained weights": "float32"}),
    (("--qlora", "True"), {"quantization": "NF4, double in 14 of 14 linear layers"}),
    (("--load_in_8bit", "True"), {"quantization": "int8 in 14 of 14 linear layers"}),
    (("--dtype", "bfloat16"), {"frozen weights": "bfloat16", "trained weights": "float32"}),
    (("--bf16", "True"), {"frozen weights": "float32", "autocast": "bfloat16"}),
    (FULL, {"adapter": "off", "adapter on": "off", "trained weights": "float32", "frozen weights": "off"}),
    ((*FULL, "--freeze_layers", "1"), {"frozen layers": "1", "frozen weights": "float32"}),
    (("--lora_rank", 4, "--lora_alpha", 4), {"adapter": "rank 4, scale 1, dropout 0.05 on 14 layers"}),
    (("--use_dora", "True"), {"adapter": "rank 8, scale 2, dropout 0.05, DoRA on 14 layers"}),
    (("--use_rslora", "True"), {"adapter": "rank 8, scale 5.65685, dropout 0.05 on 14 layers"}),
    (("--lora_dropout", 0), {"adapter": "rank 8, scale 2, dropout 0 on 14 layers"}),
    (("--target_modules", "q_proj,v_proj"), {"adapter on": "q_proj, v_proj"}),
    (("--modules_to_save", "embed_tokens"), {"adapter on": f"{LINEAR}; in full embed_tokens"}),
    (("--freeze_layers", "0"), {"frozen layers": "0", "adapter": "rank 8, scale 2, dropout 0.05 on 7 layers"}),
    (("--optim", "sgd"), {"optimizer": "SGD of torch"}),
    (("--optim", "adafactor"), {"optimizer": "Adafactor of transformers"}),
    (("--optim", "adamw_8bit"), {"optimizer": "AdamW of bitsandbytes, optim_bits 8"}),
    (("--learning_rate", 3e-3), {"learning rate": "0.003"}),
    (("--learning_rate", 1e-3, "--loraplus_lr_ratio", 4), {"learning rate": "0.001, B matrices 0.004"}),
    (("--lr_scheduler_type", "cosine", "--warmup_steps", 1), {"schedule": "0 at 0, 1 at 1"}),
    (("--gradient_accumulation_steps", 2), {"effective batch": "4 = 2 a device x 2 accumulated x 1 process(es)"}),
    (("--packing", "True"), {"packing": "blocks"}),
    (("--gradient_checkpointing", "True"), {"checkpointing": "2 of 2 layers"}),
]


@pytest.mark.parametrize(("flags", "lines"), FLAGS, ids=[" ".join(map(str, f)) or "defaults" for f, _ in FLAGS])
def test_what_is_observed(open_run, flags, lines):
    opened = open_run(*flags)
    opened.finish()
    found = table(opened)
    assert {name: found[name]["observed"] for name in lines} == lines
    assert all(line["agrees"] for line in found.values())


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("peft", [False, True])
def test_neftune_is_as_large_as_the_paper_says_in_training_and_off_in_evaluation(open_run, packing, peft):
    flags = ("--neft_alpha", 5, "--packing", packing, "--use_peft", peft, "--model_max_length", 512)
    opened = open_run(*flags, "--per_device_train_batch_size", 4)
    opened.finish()
    line = table(opened)["NEFTune noise"]
    # The largest noise is that of the shortest sequence.
    shortest = min(
        min(row["seq_lengths"]) if packing else len(row["input_ids"]) for row in opened.trainer.train_dataset
    )
    bound = 5 / (shortest * 32) ** 0.5
    assert line["requested"] == f"{bound:.3g} at most" and line["agrees"]
    assert 0.95 * bound < float(line["observed"]) <= bound


# ---------------------------------------------------------------------------------------------------------------------
# Something is changed after it was requested
# ---------------------------------------------------------------------------------------------------------------------


def other_attention(trainer):
    trainer.model.set_attn_implementation("eager")


def other_groups(trainer):
    trainer.model.get_base_model().model.layers[1].self_attn.shift_group_size = 64


def base_in_bfloat16(trainer):
    for parameter in trainer.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def other_scale(trainer):
    trainer.model.get_base_model().model.layers[0].mlp.up_proj.scaling["default"] = 1.0


def one_adapter_less(trainer):
    layer = trainer.model.get_base_model().model.layers[0]
    layer.mlp.up_proj = layer.mlp.up_proj.base_layer


def frozen_layer_trained(trainer):
    trainer.model.model.layers[1].requires_grad_(True)


def other_optimizer(trainer):
    trainer.optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=2e-4)


def other_betas(trainer):
    trainer.args.adam_beta1 = 0.5


def half_in_the_optimizer(trainer):
    moving = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.optimizer = torch.optim.AdamW(moving[::2], lr=2e-4, fused=True)


def frozen_in_the_optimizer(trainer):
    trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=2e-4, fused=True)


def one_rate_for_all(trainer):
    trainer.loraplus_lr_ratio = None


def other_schedule(trainer):
    trainer.args.lr_scheduler_type = "constant"


def no_warmup(trainer):
    trainer.args.warmup_steps = 0


def mask_of_ones(trainer):
    collate = trainer.data_collator

    def with_mask(rows):
        batch = collate(rows)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    trainer.data_collator = with_mask


def positions_that_go_on(trainer):
    collate = trainer.data_collator

    def without_restarts(rows):
        batch = collate(rows)
        return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}

    trainer.data_collator = without_restarts


def no_noise(trainer):
    trainer.args.neftune_noise_alpha = None


def twice_the_noise(trainer):
    trainer.args.neftune_noise_alpha *= 2


def noise_by_the_length_of_the_batch(trainer):
    """As transformers scales it."""
    trainer.neftune_noise_alpha, trainer.args.neftune_noise_alpha = trainer.args.neftune_noise_alpha, None


def noise_in_evaluation(trainer):
    def add(module, args, output):
        return output + torch.rand_like(output) * (0 if module.training else 0.01)

    trainer.model.get_input_embeddings().register_forward_hook(add)


def noise_unasked(trainer):
    trainer.args.neftune_noise_alpha = 5.0


LIES = [
    (other_attention, (), "attention"),
    (other_attention, ("--shift_attn", "True"), "attention"),
    (other_groups, ("--shift_attn", "True"), "attention groups"),
    (base_in_bfloat16, (), "frozen weights"),
    (adapter_in_bfloat16, (), "trained weights"),
    (adapter_in_bfloat16, ("--load_in_4bit", "True"), "trained weights"),
    (autocast_off, ("--bf16", "True"), "autocast"),
    (one_layer_unquantized, ("--load_in_4bit", "True"), "quantization"),
    (one_layer_unquantized, ("--load_in_8bit", "True"), "quantization"),
    (other_scale, (), "adapter"),
    (one_adapter_less, (), "adapter on"),
    (adapter_frozen, (), "trained"),
    (base_trained, (), "trained"),
    (frozen_layer_trained, (*FULL, "--freeze_layers", "1"), "frozen layers"),
    (other_optimizer, (), "optimizer"),
    (other_betas, (), "optimizer"),
    (half_in_the_optimizer, (), "in the optimizer"),
    (frozen_in_the_optimizer, (), "in the optimizer"),
    (other_rate, (), "learning rate"),
    (one_rate_for_all, ("--loraplus_lr_ratio", 16), "learning rate"),
    (other_schedule, (), "schedule"),
    (no_warmup, ("--warmup_steps", 1), "schedule"),
    (smaller_batch, (), "effective batch"),
    (no_accumulation, ("--gradient_accumulation_steps", 2), "effective batch"),
    (mask_of_ones, ("--packing", "True"), "packing"),
    (positions_that_go_on, ("--packing", "True"), "packing"),
    (no_noise, ("--neft_alpha", 5), "NEFTune noise"),
    (twice_the_noise, ("--neft_alpha", 5), "NEFTune noise"),
    (noise_by_the_length_of_the_batch, ("--neft_alpha", 5), "NEFTune noise"),
    (noise_in_evaluation, ("--neft_alpha", 5), "NEFTune noise"),
    (noise_unasked, (), "NEFTune noise"),
    (no_checkpointing, ("--gradient_checkpointing", "True"), "checkpointing"),
]


@pytest.mark.parametrize(("lie", "flags", "line"), LIES, ids=[f"{lie.__name__}-{line}" for lie, _, line in LIES])
def test_a_flag_without_its_effect_stops_the_run(open_run, lie, flags, line):
    opened = open_run(*flags)
    lie(opened.trainer)
    before = {name: parameter.detach().clone() for name, parameter in opened.trainer.model.named_parameters()}
    with pytest.raises(
        UserError, match=f"(?s)^requested and observed settings differ, so nothing was trained.*\n  {line}: requested"
    ):
        opened.finish()
    assert opened.trainer.state.global_step == 0
    assert all(before[name].equal(parameter) for name, parameter in opened.trainer.model.named_parameters())
    assert table(opened)[line]["agrees"] is False


def test_the_message_names_both_sides_and_a_remedy(open_run):
    opened = open_run("--gradient_checkpointing", "True")
    no_checkpointing(opened.trainer)
    with pytest.raises(UserError, match="\n  checkpointing: requested 2 of 2 layers; observed off. Leave --gradient_c"):
        opened.finish()


def test_a_warmup_that_the_schedule_does_not_have(open_run):
    with pytest.raises(UserError, match="--warmup_steps 1 has no effect with .* constant_with_warmup"):
        open_run("--lr_scheduler_type", "constant", "--warmup_steps", 1)


def test_quantized_layers_compute_with_four_bits(open_run):
    """The line of the table is more than a name: the numbers of such a layer are those of its packed weights."""
    layer = open_run("--load_in_4bit", "True").trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == layer.in_features * layer.out_features / 2
    inputs = torch.rand(3, layer.in_features)
    from bitsandbytes.functional import dequantize_4bit

    unpacked = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(layer(inputs), linear(inputs, unpacked.to(inputs.dtype)), rtol=1e-3, atol=1e-3)
