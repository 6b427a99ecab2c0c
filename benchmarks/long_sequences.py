"""Try what divides one sequence over processes, on CPUs over gloo: which method runs, and does it give the same losses.

    python build_tiny_model.py --output_dir outputs/tiny-base
    python -m benchmarks.long_sequences --model_name_or_path outputs/tiny-base
    torchrun --nproc_per_node 2 -m benchmarks.long_sequences --model_name_or_path outputs/tiny-base --method ulysses
    torchrun --nproc_per_node 2 -m benchmarks.long_sequences --model_name_or_path outputs/tiny-base --method ring

`ulysses` is DeepSpeed's sequence parallelism (https://arxiv.org/abs/2309.14509, https://arxiv.org/abs/2506.13996),
through accelerate's ParallelismConfig and transformers' own Trainer; `ring` is PyTorch's context parallelism
(https://arxiv.org/abs/2310.01889). The stages refuse both; docs/distributed.md says why.
"""

import argparse
import os

import deepspeed
import torch
import torch.distributed as dist
from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

ENGINE = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


def main() -> None:
    """Print the losses of some steps, or the reason for which there are none."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model_name_or_path", required=True, help="a small model; it is not changed")
    parser.add_argument("--method", choices=["none", "ulysses", "ring"], default="none")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row; divisible by the processes")
    parser.add_argument("--max_steps", type=int, default=4)
    args = parser.parse_args()
    if args.method == "ring":
        try_ring()
    else:
        train(args)
    if dist.is_initialized():
        dist.destroy_process_group()


def try_ring() -> None:
    """Attention under PyTorch's context parallelism."""
    dist.init_process_group("gloo")
    query = torch.randn(1, 2, 64, 16)
    try:
        with context_parallel(init_device_mesh("cpu", (dist.get_world_size(),)), buffers=[query], buffer_seq_dims=[2]):
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    except NotImplementedError as error:
        print(f"process {dist.get_rank()}: {error}")


def train(args: argparse.Namespace) -> None:
    """Steps of transformers' Trainer; a row per step, its beginning without labels."""
    torch.manual_seed(0)
    rows = []
    for number in range(args.max_steps):
        ids = torch.randint(5, 1000, (args.length,)).tolist()
        prompt = args.length // 3 + number
        labels = [-100] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "labels": labels, "position_ids": list(range(args.length))})
    training = {"per_device_train_batch_size": 1, "max_steps": args.max_steps, "learning_rate": 1e-3}
    training |= {"lr_scheduler_type": "constant", "logging_steps": 1, "train_sampling_strategy": "sequential"}
    training |= {"use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    if args.method == "ulysses":
        training["deepspeed"] = {**ENGINE, "seq_parallel_communication_data_type": "fp32"}
        training["parallelism_config"] = ParallelismConfig(
            sp_backend="deepspeed",
            sp_size=int(os.environ["WORLD_SIZE"]),
            dp_replicate_size=1,
            sp_handler=DeepSpeedSequenceParallelConfig(sp_seq_length=args.length, sp_attn_implementation="sdpa"),
        )
    arguments = TrainingArguments(output_dir="outputs/long-sequences", remove_unused_columns=False, **training)
    if args.method == "ulysses" and arguments.world_size > 1:
        # On CPUs accelerate creates a process group of torch alone, and Ulysses looks for DeepSpeed's.
        deepspeed.init_distributed("gloo")
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, attn_implementation="sdpa")
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), data_collator=default_data_collator
    )
    trainer.train()
    if arguments.process_index == 0:
        print("losses:", *(f"{entry['loss']:.5f}" for entry in trainer.state.log_history if "loss" in entry))


if __name__ == "__main__":
    main()
