"""Flags of the stages on pairs: each is seen to do what it says before the first step, or refused."""

from medicalgpt.errors import UserError
from tests.helpers import read_json, run_here
from tests.silent.pairs import on_every_stage, open_pairs, pairs
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
from transformers import Qwen3Config, Qwen3ForCausalLM

FULL = ("--use_peft", "False")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models of two layers, without and with dropout in their attention."""
    root, tokenizer = tmp_path_factory.mktemp("sf24"), tiny_tokenizer()
    for dropout in (0.0, 0.3):
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
        config = Qwen3Config(vocab_size=len(tokenizer), attention_dropout=dropout, **shape, **heads)
        Qwen3ForCausalLM(config).save_pretrained(root / str(dropout))
        tokenizer.save_pretrained(root / str(dropout))
    return root


@pytest.fixture
def open_run(bases, tmp_path):
    def make(stage, *flags, dropout=0.0):
        more = ("--max_steps", 2, "--per_device_train_batch_size", 2, "--learning_rate", 1e-3, *flags)
        return open_pairs(stage, bases / str(dropout), tmp_path, pairs(4), *more)

    return make


def batch(total, size, times):
    return f"{total} = {size} a device x {times} accumulated x 1 process(es)"


# flags -> lines, each with what is observed.
FLAGS = [
    (
        (),
        {
            "attention": "sdpa",
            "trained weights": "float32",
            "adapter": "rank 8, scale 2, dropout 0 on 14 layers",
            "dropout": "none anywhere",
            "effective batch": batch(2, 2, 1),
            "learning rate": "0.001",
            "packing": "off",
            "NEFTune noise": "off",
        },
    ),
    (("--gradient_accumulation_steps", 2), {"effective batch": batch(4, 2, 2)}),
    (("--per_device_train_batch_size", 3), {"effective batch": batch(3, 3, 1)}),
    (
        ("--disable_dropout", "False", "--lora_dropout", 0.1),
        {"adapter": "rank 8, scale 2, dropout 0.1 on 14 layers", "dropout": "off"},
    ),
    (("--qlora", "True"), {"quantization": "NF4, double in 14 of 14 linear layers", "trained weights": "float32"}),
    (("--load_in_8bit", "True"), {"quantization": "int8 in 14 of 14 linear layers"}),
    (("--bf16", "True"), {"frozen weights": "float32", "autocast": "bfloat16"}),
    ((*FULL, "--freeze_layers", "1"), {"frozen layers": "1", "adapter": "off"}),
    (("--gradient_checkpointing", "True"), {"checkpointing": "2 of 2 layers"}),
    (("--loraplus_lr_ratio", 4), {"learning rate": "0.001, B matrices 0.004"}),
]


@pytest.mark.parametrize(("flags", "lines"), FLAGS, ids=[" ".join(map(str, f)) or "defaults" for f, _ in FLAGS])
@on_every_stage
def test_what_is_observed(open_run, stage, flags, lines):
    opened = open_run(stage, *flags)
    opened.finish()
    found = table(opened)
    if "--loraplus_lr_ratio" not in flags or stage != "reward_modeling.py":
        assert {name: found[name]["observed"] for name in lines} == lines
    assert not [line for line in found.values() if line["agrees"] is not True]
    adapted = "off" if FULL[0] in flags else LINEAR + ("; in full score" if stage == "reward_modeling.py" else "")
    assert found["adapter on"]["observed"] == adapted


@on_every_stage
def test_dropout_of_the_checkpoint_is_switched_off_too(open_run, stage):
    """Attention modules have a number in place of a dropout module, which is easily overlooked."""
    opened = open_run(stage, *FULL, dropout=0.3)
    opened.finish()
    assert table(opened)["dropout"]["observed"] == "none anywhere"
    batch = {name: value for name, value in opened.trainer.data_collator(list(opened.trainer.train_dataset)).items()}
    opened.trainer.model.train()
    losses = {opened.trainer.compute_loss(opened.trainer.model, dict(batch)).item() for _ in range(3)}
    assert len(losses) == 1
    kept = open_run(stage, *FULL, "--disable_dropout", "False", "--overwrite_output_dir", "True", dropout=0.3)
    kept.trainer.model.train()
    losses = {kept.trainer.compute_loss(kept.trainer.model, dict(batch)).item() for _ in range(3)}
    assert len(losses) == 3


def dropout_left_on(trainer):
    trainer.model.get_base_model().model.layers[0].mlp.up_proj.lora_dropout["default"] = torch.nn.Dropout(0.1)


def attention_dropout_left_on(trainer):
    trainer.model.get_base_model().model.layers[1].self_attn.attention_dropout = 0.1


def chosen_answers_only(trainer):
    collate = trainer.data_collator

    def first_half(rows):
        return {name: value[: len(value) // 2] for name, value in collate(rows).items()}

    trainer.data_collator = first_half


LIES = [
    (dropout_left_on, (), "dropout"),
    (attention_dropout_left_on, (), "dropout"),
    (chosen_answers_only, (), "effective batch"),
    (smaller_batch, (), "effective batch"),
    (no_accumulation, ("--gradient_accumulation_steps", 2), "effective batch"),
    (adapter_frozen, (), "trained"),
    (base_trained, (), "trained"),
    (adapter_in_bfloat16, (), "trained weights"),
    (one_layer_unquantized, ("--load_in_4bit", "True"), "quantization"),
    (autocast_off, ("--bf16", "True"), "autocast"),
    (other_rate, (), "learning rate"),
    (no_checkpointing, ("--gradient_checkpointing", "True"), "checkpointing"),
]


@pytest.mark.parametrize(("lie", "flags", "line"), LIES, ids=[lie.__name__ for lie, *_ in LIES])
@on_every_stage
def test_a_flag_without_its_effect_stops_the_run(open_run, tmp_path, stage, lie, flags, line):
    opened = open_run(stage, *flags)
    lie(opened.trainer)
    with pytest.raises(
        UserError, match=f"(?s)^requested and observed settings differ, so nothing was trained.*\n  {line}: requested"
    ):
        opened.finish()
    assert opened.trainer.state.global_step == 0
    observed = {line["name"]: line for line in read_json(tmp_path / "out" / "run.json")["observed"]}
    assert observed[line]["agrees"] is False


# flags -> words of the refusal.
REFUSED = {
    ("--neft_alpha", 5): "--neft_alpha has no effect in this program. Noise on the embeddings",
    ("--streaming", "True"): "--streaming has no effect in this program. Pairs are tokenized before training",
    ("--shuffle_buffer", 9): "--shuffle_buffer has no effect in this program. It is for --streaming",
    ("--packing", "True"): "unknown flag --packing: ",
    ("--block_size", 99): "--block_size",
    ("--max_length", 99): "Use --model_max_length",
    ("--padding_free", "True"): "Pairs are padded",
    ("--train_on_inputs", "True"): "unknown flag --train_on_inputs: ",
    ("--label_smoothing_factor", 0.1): "--label_smoothing_factor has no effect in this program",
    ("--prediction_loss_only", "True"): "--prediction_loss_only has no effect in this program",
    ("--batch_eval_metrics", "True"): "--batch_eval_metrics has no effect in this program",
    ("--average_tokens_across_devices", "True"): "--average_tokens_across_devices has no effect in this program",
    ("--beta2", 1): "unknown flag --beta2: ",
}


@pytest.mark.parametrize("flags", REFUSED, ids=lambda flags: flags[0])
@on_every_stage
def test_refused_before_anything_is_read(capsys, stage, flags):
    with pytest.raises(SystemExit) as end:
        run_here(stage, "--model_name_or_path", "nowhere", "--train_file_dir", "nowhere", *flags)
    message = capsys.readouterr().err
    assert end.value.code == 2 and REFUSED[flags] in " ".join(message.split())
    assert len(message.strip().splitlines()) <= 4


@on_every_stage
def test_dropout_of_the_adapter_is_off_with_a_notice(bases, tmp_path, stage, capsys):
    opened = open_pairs(stage, bases / "0.0", tmp_path, pairs(2), "--lora_dropout", 0.1)
    assert "--lora_dropout 0.1 is not used" in capsys.readouterr().err
    assert opened.trainer.model.peft_config["default"].lora_dropout == 0
