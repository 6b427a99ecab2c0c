"""The frozen model that DPO measures its policy from: where it comes from, where it is placed, how it may move."""

import copy
from dataclasses import replace
from typing import Any

from medicalgpt.args import LoraArguments, ModelArguments
from medicalgpt.errors import UserError
from medicalgpt.models import adapters, loading
from medicalgpt.models.hub import Checkpoint, merge_command

import torch
from accelerate import Accelerator, DistributedType
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SyncRefModelCallback
from trl.models import prepare_deepspeed, prepare_fsdp


def load_reference(
    name: str, tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments, lora_args: LoraArguments, **load: Any
) -> PreTrainedModel:
    """The model that `--reference_model` names, frozen, an adapter merged into it, fitted as the policy is.

    Args:
        name: model or adapter, on disk or on the hub.
        tokenizer: of the policy.
        lora_args: of the policy; if all of its weights are trained, both models are float32 by default.
        load: further arguments of `loading.load_base`.

    Raises:
        UserError: it has another tokenizer, or is an adapter and the base is quantized.
    """
    dtype = "float32" if model_args.dtype == "auto" and not lora_args.use_peft else model_args.dtype
    model_args = replace(
        model_args, model_name_or_path=name, tokenizer_name_or_path=None, model_revision=None, dtype=dtype
    )
    checkpoint = Checkpoint.from_arguments(model_args)
    if checkpoint.adapter and (model_args.load_in_4bit or model_args.load_in_8bit or model_args.qlora):
        raise UserError(
            f"--reference_model {name} is an adapter, which cannot be merged into a quantized base. Merge it first: "
            f"{merge_command(name)}"
        )
    vocabulary = loading.stage_tokenizer(checkpoint, model_args).get_vocab()
    if differing := sorted(set(tokenizer.get_vocab().items()) - set(vocabulary.items())):
        token, row = differing[0]
        raise UserError(
            f"--reference_model {name} has another vocabulary than the model ({len(differing)} differing tokens, such "
            f"as {token!r} with id {row}). Use a reference with the same tokenizer."
        )
    reference = loading.load_base(AutoModelForCausalLM, checkpoint, model_args, LoraArguments(), **load)
    if checkpoint.adapter:
        reference = adapters.attach_adapter(reference, checkpoint.adapter).merge_and_unload()
    loading.add_missing_rows(reference, tokenizer, "the reference")
    return reference.requires_grad_(False)


def copy_policy(
    policy: PreTrainedModel, checkpoint: Checkpoint, model_args: ModelArguments, lora_args: LoraArguments, **load: Any
) -> PreTrainedModel:
    """A frozen copy of a policy of which all weights are trained, also if ZeRO-3 shards them.

    Args:
        policy: as training starts from it.
        checkpoint: of the policy.
        load: further arguments of `loading.load_base`.
    """
    if not is_deepspeed_zero3_enabled():
        return copy.deepcopy(policy).requires_grad_(False)
    reference = loading.load_base(AutoModelForCausalLM, checkpoint, model_args, lora_args, **load)
    rows = policy.get_input_embeddings().num_embeddings
    # Under ZeRO-3 the library puts whole weights in the place of sharded ones, also if the number of rows stays.
    if rows != reference.get_input_embeddings().num_embeddings:
        reference.resize_token_embeddings(rows, mean_resizing=False)
    # New rows of an embedding are drawn at random, so each process copies its part of every weight.
    for ours, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
        getattr(ours, "ds_tensor", ours).data.copy_(getattr(theirs, "ds_tensor", theirs).data)
    return reference.requires_grad_(False)


def place_reference(model: PreTrainedModel, accelerator: Accelerator) -> torch.nn.Module:
    """Put a frozen model on the devices, sharded if the policy is; returns it with its wrapper."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return prepare_fsdp(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


class SyncReference(SyncRefModelCallback):
    """`--sync_ref_model`: the reference follows the policy (TR-DPO, https://arxiv.org/abs/2404.09656)."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.ref_model_sync_steps > state.max_steps:
            raise UserError(
                f"--sync_ref_model has no effect: the run has {state.max_steps} steps, and the reference would move "
                f"every {args.ref_model_sync_steps}. Use a smaller --ref_model_sync_steps."
            )
