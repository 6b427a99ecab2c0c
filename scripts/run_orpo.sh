#!/usr/bin/env bash
# Odds ratio preference optimization (ORPO) on one or several GPUs (or on a CPU).
#
#   MODEL=outputs/sft-merged bash scripts/run_orpo.sh
#   CUDA_VISIBLE_DEVICES=0,1 NPROC=2 MODEL=Qwen/Qwen3-0.6B bash scripts/run_orpo.sh --load_in_4bit True --qlora True
#
# Further flags of orpo_training.py may follow; they override those below. All flags: docs/training_params.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:-outputs/sft-merged}          # hub name, or folder; a base model also works, with --template_name
NPROC=${NPROC:-1}                           # processes, one per GPU
LAUNCH=("$PYTHON")
[ "$NPROC" = 1 ] || LAUNCH=("$PYTHON" -m medicalgpt.launch --standalone --nproc_per_node "$NPROC")

FLAGS=(
  --config recipes/real/orpo.yaml           # all other settings, each with its reason
  --model_name_or_path "$MODEL"
  --train_file_dir data/reward              # .jsonl, .json; files named validation* are held out
  --output_dir "${OUT:-outputs-orpo}"
  --use_peft True                           # an adapter; False is full fine-tuning
  --target_modules all                      # every linear layer except the head
  --num_train_epochs 1
  --per_device_train_batch_size 2           # pairs per GPU, two answers each; halve it when out of memory ...
  --gradient_accumulation_steps 8           # ... and double this: only the time changes
  --logging_steps 10
  --eval_strategy steps --eval_steps 100    # loss and accuracy on the held-out pairs
  --save_steps 100 --save_total_limit 3
  --resume auto                             # give the same command again after any stop; it continues
)
exec "${LAUNCH[@]}" orpo_training.py "${FLAGS[@]}" "$@"
