#!/usr/bin/env bash
# Group relative policy optimization (GRPO) on one or several GPUs (or on a CPU), after supervised fine-tuning.
#
#   MODEL=outputs/sft-merged bash scripts/run_grpo.sh
#   CUDA_VISIBLE_DEVICES=0,1 NPROC=2 MODEL=Qwen/Qwen3-0.6B bash scripts/run_grpo.sh --deepspeed zero2.json
#
# Further flags of grpo_training.py may follow; they override those below. All flags: docs/training_params.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:-outputs/sft-merged}          # hub name, or folder
NPROC=${NPROC:-1}                           # processes, one per GPU
LAUNCH=("$PYTHON")
[ "$NPROC" = 1 ] || LAUNCH=("$PYTHON" -m medicalgpt.launch --standalone --nproc_per_node "$NPROC")

FLAGS=(
  --config recipes/real/grpo.yaml           # all other settings, each with its reason
  --model_name_or_path "$MODEL"
  --train_file_dir data/grpo                # .jsonl, .json; files named validation* are held out
  --output_dir "${OUT:-outputs-grpo}"
  --use_peft True                           # an adapter; False is full fine-tuning
  --target_modules all                      # every linear layer except the head
  --eval_strategy steps --eval_steps 50     # rewards on the held-out prompts
  --save_steps 50 --save_total_limit 3
  --resume auto                             # give the same command again after any stop; it continues
)
exec "${LAUNCH[@]}" grpo_training.py "${FLAGS[@]}" "$@"
