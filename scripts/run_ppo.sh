#!/usr/bin/env bash
# Proximal policy optimization (PPO) on one or several GPUs (or on a CPU), after fine-tuning and a reward model.
#
#   MODEL=outputs/sft-merged REWARD_MODEL=outputs/rm bash scripts/run_ppo.sh
#   CUDA_VISIBLE_DEVICES=0,1 NPROC=2 MODEL=Qwen/Qwen3-0.6B REWARD_MODEL=outputs/rm bash scripts/run_ppo.sh \
#     --deepspeed zero2.json
#
# Further flags of ppo_training.py may follow; they override those below. All flags: docs/training_params.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:-outputs/sft-merged}          # hub name, or folder; the reference is the same model
REWARD_MODEL=${REWARD_MODEL:-outputs/rm}    # hub name, or folder; the critic starts from it
NPROC=${NPROC:-1}                           # processes, one per GPU
LAUNCH=("$PYTHON")
[ "$NPROC" = 1 ] || LAUNCH=("$PYTHON" -m medicalgpt.launch --standalone --nproc_per_node "$NPROC")

FLAGS=(
  --config recipes/real/ppo.yaml            # all other settings, each with its reason
  --sft_model_path "$MODEL"
  --reward_model_path "$REWARD_MODEL"
  --train_file_dir data/reward/train.jsonl  # only the prompts are used; the policy writes the answers
  --validation_file_dir data/reward/validation.jsonl
  --output_dir "${OUT:-outputs-ppo}"
  --use_peft True                           # an adapter; False is full fine-tuning, with a copy as reference
  --target_modules all                      # every linear layer except the head
  --eval_strategy steps --eval_steps 10     # score, length and end rate on the held-out prompts
  --save_steps 10 --save_total_limit 3
  --resume auto                             # give the same command again after any stop; it continues
)
exec "${LAUNCH[@]}" ppo_training.py "${FLAGS[@]}" "$@"
