#!/usr/bin/env bash
# Group relative policy optimization (GRPO) on one or several GPUs (or on a CPU), after supervised fine-tuning.
#
#   MODEL=outputs/sft-merged bash scripts/run_grpo.sh
#   CUDA_VISIBLE_DEVICES=0,1 NPROC=2 MODEL=Qwen/Qwen3-0.6B bash scripts/run_grpo.sh --deepspeed zero2.json
#
# Further flags of grpo_training.py may follow; they win over those below. All flags: docs/training_params.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:-outputs/sft-merged}          # hub name, or folder
NPROC=${NPROC:-1}                           # processes, one a GPU
LAUNCH=("$PYTHON")
[ "$NPROC" = 1 ] || LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC")

FLAGS=(
  --model_name_or_path "$MODEL"
  --train_file_dir data/grpo                # .jsonl, .json; files named validation* are held out
  --output_dir "${OUT:-outputs-grpo}"
  --reward_funcs accuracy format            # right answers, and the form in which they are found
  --use_peft True                           # an adapter; False trains every weight
  --target_modules all                      # every linear layer but the head
  --lora_rank 8 --lora_alpha 16
  --num_generations 8                       # answers to a prompt, which are compared with each other
  --max_completion_length 512               # most tokens of an answer: room to think
  --temperature 1.0                         # answers have to differ, or there is nothing to compare
  --beta 0.0                                # no reference: rewards that are computed cannot be talked into anything
  --num_train_epochs 1
  --per_device_train_batch_size 8           # answers a GPU; halve it if memory does not suffice ...
  --gradient_accumulation_steps 8           # ... and double this, then nothing changes but the time
  --learning_rate 1e-5                      # for adapters; for all weights 1e-6
  --gradient_checkpointing True             # a fifth slower, far less memory
  --logging_steps 1                         # a step is 64 answers a GPU: there are few
  --eval_strategy steps --eval_steps 50     # rewards on the held-out prompts
  --save_strategy steps --save_steps 50 --save_total_limit 3
  --seed 42
)
exec "${LAUNCH[@]}" grpo_training.py "${FLAGS[@]}" "$@"
