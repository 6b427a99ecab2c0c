#!/usr/bin/env bash
# Odds ratio preference optimization (ORPO) on one or several GPUs (or on a CPU).
#
#   MODEL=outputs/sft-merged bash scripts/run_orpo.sh
#   CUDA_VISIBLE_DEVICES=0,1 NPROC=2 MODEL=Qwen/Qwen3-0.6B bash scripts/run_orpo.sh --load_in_4bit True --qlora True
#
# Further flags of orpo_training.py may follow; they win over those below. All flags: docs/training_params.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:-outputs/sft-merged}          # hub name, or folder; a base model will do, with --template_name
NPROC=${NPROC:-1}                           # processes, one a GPU
LAUNCH=("$PYTHON")
[ "$NPROC" = 1 ] || LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC")

FLAGS=(
  --model_name_or_path "$MODEL"
  --train_file_dir data/reward              # .jsonl, .json; files named validation* are held out
  --output_dir "${OUT:-outputs-orpo}"
  --orpo_beta 0.1                           # weight of the preference beside the imitation
  --use_peft True                           # an adapter; False trains every weight
  --target_modules all                      # every linear layer but the head
  --lora_rank 8 --lora_alpha 16
  --model_max_length 1024                   # longest prompt with either answer; a longer pair is refused, never cut
  --num_train_epochs 1
  --per_device_train_batch_size 2           # pairs a GPU, two answers each; halve it if memory does not suffice ...
  --gradient_accumulation_steps 8           # ... and double this, then nothing changes but the time
  --learning_rate 5e-5                      # for adapters; for all weights 5e-6
  --warmup_ratio 0.05                       # share of the steps in which the rate rises
  --gradient_checkpointing True             # a fifth slower, far less memory
  --logging_steps 10
  --eval_strategy steps --eval_steps 100    # loss and accuracy on the held-out pairs
  --save_strategy steps --save_steps 100 --save_total_limit 3
  --seed 42
)
exec "${LAUNCH[@]}" orpo_training.py "${FLAGS[@]}" "$@"
