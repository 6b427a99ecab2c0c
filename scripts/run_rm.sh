#!/usr/bin/env bash
# Reward model on one or several GPUs (or on a CPU), after supervised fine-tuning.
#
#   MODEL=outputs/sft-merged bash scripts/run_rm.sh
#   CUDA_VISIBLE_DEVICES=0,1 NPROC=2 MODEL=Qwen/Qwen3-0.6B bash scripts/run_rm.sh --load_in_4bit True --qlora True
#
# Further flags of reward_modeling.py may follow; they override those below. All flags: docs/training_params.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:-outputs/sft-merged}          # hub name, or folder; merge an SFT adapter first
NPROC=${NPROC:-1}                           # processes, one per GPU
LAUNCH=("$PYTHON")
[ "$NPROC" = 1 ] || LAUNCH=("$PYTHON" -m medicalgpt.launch --standalone --nproc_per_node "$NPROC")

FLAGS=(
  --config recipes/real/rm.yaml             # all other settings, each with its reason
  --model_name_or_path "$MODEL"
  --train_file_dir data/reward              # .jsonl, .json; files named validation* are held out
  --output_dir "${OUT:-outputs-rm}"
  --use_peft True                           # an adapter and the head; False is full fine-tuning
  --target_modules all                      # every linear layer; the head is trained in full anyway
  --center_rewards_coefficient 0.01         # pulls the mean of both scores towards 0
  --per_device_train_batch_size 4           # pairs per GPU; halve it when out of memory ...
  --gradient_accumulation_steps 4           # ... and double this: only the time changes
  --logging_steps 10
  --eval_strategy steps --eval_steps 50     # accuracy, margin and scores on the held-out pairs
  --save_steps 50 --save_total_limit 3
  --resume auto                             # give the same command again after any stop; it continues
)
exec "${LAUNCH[@]}" reward_modeling.py "${FLAGS[@]}" "$@"
