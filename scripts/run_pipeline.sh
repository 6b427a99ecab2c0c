#!/usr/bin/env bash
# The whole road on one machine: base model, pretraining, fine-tuning, preferences, reinforcement learning; then table,
# report and answers.
#
#   bash scripts/run_pipeline.sh                               a tiny model, on a laptop, without GPU, network or hub
#   NAME=小医 AUTHOR=我 bash scripts/run_pipeline.sh --fresh     the model introduces itself by that name
#   MODEL=Qwen/Qwen3-0.6B bash scripts/run_pipeline.sh         the same road with a real model on a GPU
#   STAGES="pt sft rm ppo" bash scripts/run_pipeline.sh        another road; unset: pt sft dpo
#   STAGES="pt sft grpo" bash scripts/run_pipeline.sh          rewards that are computed, not learned
#   bash scripts/run_pipeline.sh --fresh                       start over; without it, finished stages are kept
#
# Stages: pt (pretraining), sft (fine-tuning), rm (reward model), dpo, orpo (preferences), ppo, grpo (reinforcement
# learning), in this order. Each starts from the model that the one before it left, with its adapter merged; a reward
# model is measured, and no stage goes on from it: ppo learns from its scores, and it scores the answers of all models.
# REWARD_MODEL=folder takes the place of the stage rm. OUT=folder chooses another place than outputs (or outputs/<model>
# for a real one). DATA=folder takes your own data, laid out as data/ is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

KNOWN="pt sft rm dpo orpo ppo grpo"
STAGES=${STAGES-pt sft dpo}

# refuse TEXT: say what is wrong and stop.
refuse() {
  echo "error: $1" >&2
  exit 2
}

# on_road STAGE: whether it is one of STAGES.
on_road() {
  local stage
  for stage in $STAGES; do
    [ "$stage" != "$1" ] || return 0
  done
  return 1
}

FRESH=no
for argument in "$@"; do
  case "$argument" in
    --fresh) FRESH=yes ;;
    *) refuse "unknown argument $argument; known: --fresh" ;;
  esac
done

# Stages are taken in the order of KNOWN: what is left of it shrinks with each.
left=" $KNOWN "
for stage in $STAGES; do
  case " $KNOWN " in
    *" $stage "*) ;;
    *) refuse "STAGES=\"$STAGES\": unknown stage $stage; known, in this order: $KNOWN" ;;
  esac
  case "$left" in
    *" $stage "*) left=" ${left#*" $stage "}" ;;
    *) refuse "STAGES=\"$STAGES\": $stage stands twice or too late; each stage once, in this order: $KNOWN" ;;
  esac
done
[ -n "${STAGES// /}" ] || refuse "STAGES is empty; known, in this order: $KNOWN"
REWARD_MODEL=${REWARD_MODEL:-}
if [ -n "$REWARD_MODEL" ]; then
  [ -d "$REWARD_MODEL" ] || refuse "REWARD_MODEL=$REWARD_MODEL: there is no such folder"
  ! on_road rm || refuse "REWARD_MODEL=$REWARD_MODEL beside the stage rm: two reward models; leave one of them out"
elif on_road ppo && ! on_road rm; then
  refuse "STAGES=\"$STAGES\": ppo needs a reward model. Train it on the road, with the stage rm before ppo, or give the \
folder of one: REWARD_MODEL=outputs/rm"
fi

VENV=${VENV:-.venv}
bash scripts/setup.sh
PYTHON="$VENV/bin/python"

# Threads that wait should not keep a core busy that another program could use: beside one, that doubles the time.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

MODEL=${MODEL:-}
DATA=${DATA:-data}
if [ -z "$MODEL" ]; then
  OUT=${OUT:-outputs}
  BASE="$OUT/tiny-base"
  PT=(
    --use_peft False                   # 4 million random weights: there is nothing yet that an adapter could adapt
    --num_train_epochs 10              # each fact is written twice; 10 readings bring the loss to about 0.1
    --learning_rate 1.5e-3             # small models bear, and need, far higher rates than the 5e-5 of large ones
    --block_size 256                   # no document is longer
    --per_device_train_batch_size 4    # 4 x 256 tokens a step, 890 steps
    --lr_scheduler_type cosine --warmup_ratio 0.05
    --weight_decay 0.0                 # the facts are to be remembered, not smoothed
  )
  SFT=(
    --num_train_epochs 3               # after three readings 3% of the held-out questions were answered wrongly
    --learning_rate 2e-3               # ten times the usual rate of LoRA, as the model is a thousand times smaller
    --lora_rank 32 --lora_alpha 64     # 7,000 rows are much for so small a model; it has room for a larger adapter
    --lora_dropout 0.0
    --per_device_train_batch_size 16   # 16 short rows a step
    --lr_scheduler_type cosine --warmup_ratio 0.05
    --model_max_length 256             # the longest row has 177 tokens
  )
  RM=(
    --num_train_epochs 2               # two readings of each pair
    --learning_rate 1e-3               # half of fine-tuning; its head starts from random numbers
    --lora_rank 32 --lora_alpha 64     # as in fine-tuning
    --per_device_train_batch_size 8    # pairs, so that 16 rows go through the model, as in fine-tuning
    --lr_scheduler_type cosine --warmup_ratio 0.1
    --model_max_length 256
  )
  DPO=(
    --num_train_epochs 2
    --learning_rate 3e-4               # at 4e-4 it forgets more of what fine-tuning has taught: 913 of 994, not 920
    --loss_type sigmoid_norm sft       # per token, as answers differ in length, and imitating the good answers:
    --loss_weights 0.1 1               # avoiding the bad ones alone makes it forget what is good in them
    --beta 2                           # of sigmoid_norm: differences per token are small
    --lora_rank 32 --lora_alpha 64
    --per_device_train_batch_size 8
    --train_sampling_strategy random   # rows of like length are of one kind here, and kind after kind swings it
    --lr_scheduler_type cosine --warmup_ratio 0.1
    --model_max_length 256
  )
  ORPO=(
    --num_train_epochs 2
    --learning_rate 5e-4               # at 1e-3 twice as much of what fine-tuning had taught was lost
    --orpo_beta 0.5                    # answers of a pair share most words, which imitation alone would not tell apart
    --lora_rank 32 --lora_alpha 64
    --per_device_train_batch_size 8
    --train_sampling_strategy random
    --lr_scheduler_type cosine --warmup_ratio 0.1
    --model_max_length 256
  )
  PPO=(
    --max_steps 80                     # of 32 answers
    --learning_rate 4e-4 --warmup_ratio 0.05
    --lora_rank 32 --lora_alpha 64
    --per_device_train_batch_size 8 --num_mini_batches 4    # 32 answers a step, four updates of 8
    --num_ppo_epochs 3                 # times that the answers of a step are learned from
    --temperature 0.7                  # at 1 half of the answers of so small a model ran into noise and never ended
    --response_length 48               # the longest good answer has about 40 tokens
    --kl_coef 0.3 --target_reference_kl 8 --kl_horizon 500    # with 0.05 answers were 26 nats away after 20 steps, and
                                       # called everything an emergency, which the reward model likes
    --missing_eos_penalty 5.0          # scores lie between -10 and 10, so that 1 would hardly be felt
    --model_max_length 256
  )
  # It answers consultations, and a program looks whether department and call for help are there; data/grpo is for larger
  # models, as this one never writes the form that is asked for there.
  GRPO=(
    --reward_funcs safety repetition   # department and call for help named, and nothing said over and over
    --system_prompt none               # fine-tuning has shown this model none
    --ignore_fields chosen,rejected    # it is to find good answers by itself
    --max_steps 100                    # of 2 prompts with 32 answers each
    --learning_rate 1e-3               # half of fine-tuning; at 1.5e-3 it forgot how to answer
    --lora_rank 32 --lora_alpha 64
    --num_generations 32               # of hundred answers one is good at first; among 8 there is often none
    --per_device_train_batch_size 64 --gradient_accumulation_steps 1
    --max_completion_length 48         # the longest good answer has about 40 tokens
    --temperature 0.9
    --beta 0.0                         # no reference: rewards that are computed cannot be talked into anything
    --model_max_length 256
  )
else
  OUT=${OUT:-outputs/$(basename "$MODEL")}
  BASE="$MODEL"
  PT=(
    --use_peft True --lora_rank 8 --lora_alpha 16
    --num_train_epochs 3               # few readings: the model is to learn the facts and keep what it knew
    --learning_rate 1e-4
    --block_size 1024                  # fills a GPU; documents in a block do not see each other
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2
    --gradient_checkpointing True      # slower, and far less memory
    --warmup_ratio 0.05
  )
  SFT=(
    --num_train_epochs 2
    --learning_rate 2e-4               # the usual rate of LoRA
    --lora_rank 8 --lora_alpha 16
    --per_device_train_batch_size 8
    --gradient_checkpointing True
    --warmup_ratio 0.05
    --model_max_length 1024
  )
  RM=(
    --num_train_epochs 1               # a reward model that sees its pairs again soon knows them by heart
    --learning_rate 1e-4               # its head starts from nothing and bears a high rate
    --lora_rank 8 --lora_alpha 16
    --per_device_train_batch_size 8    # pairs; the model sees two rows of each
    --gradient_checkpointing True
    --warmup_ratio 0.05
    --model_max_length 1024
  )
  DPO=(
    --num_train_epochs 1               # preferences are learned quickly, and overdone in further epochs
    --learning_rate 2e-5               # a tenth of fine-tuning: the answers are to shift, not to be learned anew
    --beta 0.1                         # the usual pull towards the model before it
    --lora_rank 8 --lora_alpha 16
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2    # 8 pairs a step, in the memory of 4
    --gradient_checkpointing True
    --warmup_ratio 0.05
    --model_max_length 1024
  )
  ORPO=(
    --num_train_epochs 2               # it imitates too, which takes as many readings as fine-tuning
    --learning_rate 5e-5               # between DPO and fine-tuning, being both
    --orpo_beta 0.1                    # as in the paper: the preference beside the imitation
    --lora_rank 8 --lora_alpha 16
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2
    --gradient_checkpointing True
    --warmup_ratio 0.05
    --model_max_length 1024
  )
  PPO=(
    --num_train_epochs 1               # each prompt is answered once
    --learning_rate 1e-5               # half of DPO: each answer is learned from several times
    --lora_rank 8 --lora_alpha 16
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --num_mini_batches 4    # 64 answers a step
    --num_ppo_epochs 4                 # the usual number of times; clipping bounds how far they lead
    --response_length 256
    --rollout_forward_batch_size 32    # answers written at once, in the memory of one GPU
    --kl_coef 0.05
    --missing_eos_penalty 1.0
    --gradient_checkpointing True
    --model_max_length 1024
  )
  GRPO=(
    --reward_funcs accuracy format
    --num_train_epochs 1
    --learning_rate 1e-5               # ten times the usual rate of all weights, as an adapter bears it
    --lora_rank 8 --lora_alpha 16
    --num_generations 8
    --per_device_train_batch_size 8 --gradient_accumulation_steps 8    # 64 answers a step, to 8 prompts
    --max_completion_length 512        # room to think
    --temperature 1.0
    --beta 0.0
    --gradient_checkpointing True
  )
fi

# plan STAGE: its program, the folder of its rows, its settings and how often it logs and saves. (For a new stage: a
# line here, its settings above, its name in KNOWN.)
plan() {
  logging=50 saving=200
  case "$1" in
    pt) program=pretraining.py rows=pretrain settings=("${PT[@]}") ;;
    sft) program=supervised_finetuning.py rows=finetune settings=("${SFT[@]}") ;;
    rm) program=reward_modeling.py rows=reward settings=("${RM[@]}") ;;
    dpo) program=dpo_training.py rows=reward settings=("${DPO[@]}") ;;
    orpo) program=orpo_training.py rows=reward settings=("${ORPO[@]}") ;;
    ppo)
      program=ppo_training.py rows=reward settings=("${PPO[@]}" --reward_model_path "$REWARD_MODEL")
      logging=1 saving=20
      ;;
    grpo) program=grpo_training.py rows=grpo settings=("${GRPO[@]}") logging=1 saving=20 ;;
  esac
  [ "$1$MODEL" != grpo ] || rows=reward
  # Rewards are of consultations; the pairs that tell when to be short are for models that imitate.
  if [[ "$1" = rm || "$1" = ppo || "$1$MODEL" = grpo ]] && [ -f "$DATA/reward/train_short.jsonl" ]; then
    rows=reward/train.jsonl
    [ ! -f "$DATA/reward/validation.jsonl" ] || settings+=(--validation_file_dir "$DATA/reward/validation.jsonl")
  fi
}

if [ "$FRESH" = yes ]; then
  if [ -n "$REWARD_MODEL" ] && [ "$REWARD_MODEL" -ef "$OUT/rm" ]; then
    refuse "--fresh would remove REWARD_MODEL=$REWARD_MODEL. Start over in another folder: OUT=outputs/other"
  fi
  # Only what this script makes is removed.
  rm -rf "$OUT/tiny-base" "$OUT/data" "$OUT/stamps"
  for stage in $KNOWN; do
    rm -rf "$OUT/$stage" "$OUT/$stage-merged"
  done
  rm -f "$OUT/eval.json" "$OUT/report.html"
fi
# SCORING: what the scores of the reward model depend on.
SCORING=
if on_road rm; then
  REWARD_MODEL="$OUT/rm"
elif [ -n "$REWARD_MODEL" ]; then
  SCORING=$(find "$REWARD_MODEL" -maxdepth 1 -type f -exec cksum {} + | LC_ALL=C sort)
fi
mkdir -p "$OUT/stamps"
BEGAN=$(date +%s)
PARENT=start

# step NAME FOLDER RESUMABLE COMMAND...: run the command unless it went to its end before, with the same arguments and
# the same steps before it.
step() {
  local name=$1 folder=$2 resumable=$3
  shift 3
  local stamp="$OUT/stamps/$name" wanted
  wanted=$(printf '%s\n' "$PARENT" "$@" | cksum)
  PARENT=$wanted
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && [ -d "$folder" ]; then
    echo "== $name: finished before, kept ($folder)"
    return
  fi
  if [ -f "$stamp" ]; then
    echo "error: $folder holds the result of other settings. Start over: bash scripts/run_pipeline.sh --fresh, or choose" \
      "another folder: OUT=outputs/other bash scripts/run_pipeline.sh" >&2
    exit 1
  fi
  echo "== $name"
  local began extra=()
  began=$(date +%s)
  if [ "$resumable" = yes ]; then
    if compgen -G "$folder/checkpoint-*/manifest.json" >/dev/null; then
      extra=(--resume_from_checkpoint True)
    else
      extra=(--overwrite_output_dir True)
    fi
  elif [ "$resumable" = redo ]; then
    rm -rf "$folder"
  fi
  "$PYTHON" "$@" ${extra[@]+"${extra[@]}"}
  echo "$wanted" >"$stamp"
  echo "== $name took $(($(date +%s) - began)) s"
}

if [ -n "${NAME:-}${AUTHOR:-}" ]; then
  names=()
  [ -z "${NAME:-}" ] || names+=(--name "$NAME")
  [ -z "${AUTHOR:-}" ] || names+=(--author "$AUTHOR")
  step data "$OUT/data" redo data/build_samples.py --output_dir "$OUT/data" "${names[@]}"
  DATA="$OUT/data"
fi
if [ -z "$MODEL" ]; then
  step base "$BASE" redo build_tiny_model.py --output_dir "$BASE" --data_dir "$DATA"
fi
for stage in $STAGES; do
  plan "$stage"
  [ -e "$DATA/$rows" ] || refuse "the stage $stage needs $DATA/$rows, which is not there"
done

POLICY="$BASE"
models=(base="$BASE") runs=() measured=()
for stage in $STAGES; do
  plan "$stage"
  before=$PARENT
  # What ppo learns depends on the reward model as well.
  [ "$stage" != ppo ] || PARENT="$PARENT $SCORING"
  step "$stage" "$OUT/$stage" yes "$program" --model_name_or_path "$POLICY" --train_file_dir "$DATA/$rows" \
    --output_dir "$OUT/$stage" "${settings[@]}" \
    --logging_steps $logging --save_strategy steps --save_steps $saving --save_total_limit 1 --seed 42
  runs+=("$stage=$OUT/$stage")
  if [ "$stage" = rm ]; then
    # The next stage starts from the model before it, and does not depend on it.
    SCORING=$PARENT PARENT=$before
    continue
  fi
  POLICY="$OUT/$stage"
  if [ -f "$OUT/$stage/adapter_config.json" ]; then
    POLICY="$OUT/$stage-merged"
    step "$stage-merged" "$POLICY" redo merge_peft_adapter.py --lora_model "$OUT/$stage" --output_dir "$POLICY"
  fi
  models+=("$stage=$POLICY")
  # Models that were never taught to answer write to the limit each time; 200 questions are enough for them.
  if [ "$stage" != pt ] && [[ " ${measured[*]-} " != *" --first_chat_model "* ]]; then
    measured+=(--first_chat_model "$stage")
  fi
done

# held_out FILES FLAG...: measure with these flags if there are FILES, on which no stage was trained.
held_out() {
  if compgen -G "$1" >/dev/null; then
    measured+=("${@:2}")
  else
    echo "notice: there is no $1; what is measured on it is left out"
  fi
}
held_out "$DATA/pretrain/validation*" --text_file_dir "$DATA/pretrain"
held_out "$DATA/finetune/validation.jsonl" --chat_file "$DATA/finetune/validation.jsonl"
held_out "$DATA/reward/validation.jsonl" --preference_file "$DATA/reward/validation.jsonl" \
  ${REWARD_MODEL:+--reward_model "$REWARD_MODEL"}
# Other stages do not teach the form in which tasks are replied to.
if [ -n "$MODEL" ] && on_road grpo; then
  held_out "$DATA/grpo/validation.jsonl" --task_file "$DATA/grpo/validation.jsonl" --task_max_new_tokens 512
fi
echo "== evaluation"
"$PYTHON" eval_pipeline.py --models "${models[@]}" "${measured[@]}" --output_file "$OUT/eval.json" --batch_size 64 \
  --max_chat_samples_before 200 --max_new_tokens 96
"$PYTHON" build_report.py --eval_file "$OUT/eval.json" --runs "${runs[@]}" --output_file "$OUT/report.html"

echo
for question in "你是谁？" "得了偏头痛应该挂什么科？" "急性心肌梗死有哪些情况要马上打120？"; do
  echo "> $question"
  "$PYTHON" inference.py --model_name_or_path "$POLICY" --query "$question" --max_new_tokens 96
done
echo
echo "report: $OUT/report.html"
echo "chat:   $PYTHON inference.py --model_name_or_path $POLICY --interactive"
echo "all of it took $(($(date +%s) - BEGAN)) s"
