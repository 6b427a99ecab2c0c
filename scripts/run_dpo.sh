#!/usr/bin/env bash
# Direct preference optimization (DPO) on one or several GPUs (or on a CPU), after supervised fine-tuning.
#
#   MODEL=outputs/sft-merged bash scripts/run_dpo.sh
#   CUDA_VISIBLE_DEVICES=0,1 NPROC=2 MODEL=Qwen/Qwen3-0.6B bash scripts/run_dpo.sh --load_in_4bit True --qlora True
#
# Further flags of dpo_training.py may follow; they override those below. All flags: docs/training_params.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:-outputs/sft-merged}          # hub name, or folder; the reference is the same model
NPROC=${NPROC:-1}                           # processes, one per GPU
LAUNCH=("$PYTHON")
[ "$NPROC" = 1 ] || LAUNCH=("$PYTHON" -m medicalgpt.launch --standalone --nproc_per_node "$NPROC")

FLAGS=(
  --config recipes/real/dpo.yaml            # all other settings, each with its reason
  --model_name_or_path "$MODEL"
  --train_file_dir data/reward              # .jsonl, .json; files named validation* are held out
  --output_dir "${OUT:-outputs-dpo}"
  --use_peft True                           # an adapter; False is full fine-tuning, with a copy as reference
  --target_modules all                      # every linear layer except the head
  --loss_type sigmoid                       # the original DPO loss; the others are in docs/dpo_training.md
  --per_device_train_batch_size 4           # pairs per GPU; halve it when out of memory ...
  --gradient_accumulation_steps 4           # ... and double this: only the time changes
  --warmup_ratio 0.1                        # share of the steps in which the learning rate rises
  --logging_steps 10
  --eval_strategy steps --eval_steps 50     # loss, rewards and accuracy on the held-out pairs
  --save_steps 50 --save_total_limit 3
  --resume auto                             # give the same command again after any stop; it continues
)
exec "${LAUNCH[@]}" dpo_training.py "${FLAGS[@]}" "$@"
