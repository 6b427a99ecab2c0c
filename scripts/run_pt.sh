#!/usr/bin/env bash
# Continued pretraining on one or several GPUs (or on a CPU).
#
#   MODEL=Qwen/Qwen3-0.6B bash scripts/run_pt.sh
#   CUDA_VISIBLE_DEVICES=0,1 NPROC=2 MODEL=Qwen/Qwen3-0.6B bash scripts/run_pt.sh --deepspeed zero2.json
#
# Further flags of pretraining.py may follow; they override those below. All flags: docs/training_params.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:-outputs/tiny-base}           # hub name, or folder; the tiny model comes from build_tiny_model.py
NPROC=${NPROC:-1}                           # processes, one per GPU
LAUNCH=("$PYTHON")
[ "$NPROC" = 1 ] || LAUNCH=("$PYTHON" -m medicalgpt.launch --standalone --nproc_per_node "$NPROC")

FLAGS=(
  --config recipes/real/pt.yaml             # all other settings, each with its reason
  --model_name_or_path "$MODEL"
  --train_file_dir data/pretrain            # .txt, .md, .jsonl, .json; files named validation* are held out
  --output_dir "${OUT:-outputs-pt}"
  --use_peft True                           # an adapter; False is full fine-tuning
  --target_modules all                      # every linear layer except the head
  --lora_dropout 0.05
  --num_train_epochs 1                      # the recipe uses 3, as its documents are few
  --per_device_train_batch_size 4           # blocks per GPU; halve it when out of memory ...
  --gradient_accumulation_steps 4           # ... and double this: only the time changes
  --learning_rate 2e-4                      # usual for LoRA; full fine-tuning takes 1e-5 to 5e-5
  --weight_decay 0.01
  --logging_steps 10
  --eval_strategy steps --eval_steps 100    # perplexity on the held-out documents
  --save_steps 100 --save_total_limit 3
  --resume auto                             # give the same command again after any stop; it continues
)
exec "${LAUNCH[@]}" pretraining.py "${FLAGS[@]}" "$@"
