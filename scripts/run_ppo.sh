#!/usr/bin/env bash
# Proximal policy optimization (PPO) on one or several GPUs (or on a CPU), after fine-tuning and a reward model.
#
#   MODEL=outputs/sft-merged REWARD_MODEL=outputs/rm bash scripts/run_ppo.sh
#   CUDA_VISIBLE_DEVICES=0,1 NPROC=2 MODEL=Qwen/Qwen3-0.6B REWARD_MODEL=outputs/rm bash scripts/run_ppo.sh \
#     --deepspeed zero2.json
#
# Further flags of ppo_training.py may follow; they win over those below. All flags: docs/training_params.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MODEL=${MODEL:-outputs/sft-merged}          # hub name, or folder; the reference is the same model
REWARD_MODEL=${REWARD_MODEL:-outputs/rm}    # hub name, or folder; the critic starts from it
NPROC=${NPROC:-1}                           # processes, one a GPU
LAUNCH=("$PYTHON")
[ "$NPROC" = 1 ] || LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC")

FLAGS=(
  --sft_model_path "$MODEL"
  --reward_model_path "$REWARD_MODEL"
  --train_file_dir data/reward/train.jsonl  # the prompts alone are used; answers are the model's own
  --validation_file_dir data/reward/validation.jsonl
  --output_dir "${OUT:-outputs-ppo}"
  --use_peft True                           # an adapter; False trains every weight, beside a copy as reference
  --target_modules all                      # every linear layer but the head
  --lora_rank 8 --lora_alpha 16
  --model_max_length 1024                   # prompt and answer; a prompt without room for one is refused, never cut
  --response_length 256                     # most tokens of an answer
  --missing_eos_penalty 1.0                 # taken from the score of an answer that does not end within them
  --kl_coef 0.05                            # how firmly the reference holds the policy
  --num_train_epochs 1                      # each prompt is answered once
  --num_ppo_epochs 4                        # times that the answers of a step are learned from
  --num_mini_batches 4                      # updates in each of these times
  --per_device_train_batch_size 4           # answers a GPU; halve it if memory does not suffice ...
  --gradient_accumulation_steps 4           # ... and double this, then nothing changes but the time
  --rollout_forward_batch_size 32           # answers a GPU that are written and scored at once
  --learning_rate 1e-5                      # for adapters; for all weights 1e-6
  --gradient_checkpointing True             # a fifth slower, far less memory
  --logging_steps 1                         # a step is 64 answers a GPU: there are few
  --eval_strategy steps --eval_steps 10     # score, length and end rate on the held-out prompts
  --save_strategy steps --save_steps 10 --save_total_limit 3
  --seed 42
)
exec "${LAUNCH[@]}" ppo_training.py "${FLAGS[@]}" "$@"
