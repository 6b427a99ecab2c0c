"""Ways to change a setting after it was requested, whatever the stage, and the table that must show the change."""

from tests.helpers import Opened, read_json

from torch import nn

# The layers that get an adapter unless the flags say otherwise, as the table names them.
LINEAR = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def table(opened: Opened) -> dict[str, dict]:
    """The table of a run by the names of its lines."""
    return {line["name"]: line for line in read_json(opened.run.output_dir / "run.json")["observed"]}


def adapter_in_bfloat16(trainer):
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def autocast_off(trainer):
    trainer.accelerator.native_amp = False


def one_layer_unquantized(trainer):
    layer = trainer.model.get_base_model().model.layers[0].mlp.up_proj
    layer.base_layer = nn.Linear(layer.base_layer.in_features, layer.base_layer.out_features, bias=False)


def adapter_frozen(trainer):
    trainer.model.get_base_model().model.layers[0].mlp.up_proj.lora_A.default.weight.requires_grad_(False)


def base_trained(trainer):
    trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_(True)


def other_rate(trainer):
    trainer.args.learning_rate = 1e-5


def smaller_batch(trainer):
    trainer._train_batch_size = 1


def no_accumulation(trainer):
    trainer.args.gradient_accumulation_steps = 1


def no_checkpointing(trainer):
    trainer.args.gradient_checkpointing = False
