#!/usr/bin/env bash
# The whole road on one machine: base model -> pretraining -> merge -> fine-tuning -> merge -> table, report, answers.
#
#   bash scripts/run_pipeline.sh                               a tiny model, on a laptop, without GPU, network or hub
#   NAME=小医 AUTHOR=我 bash scripts/run_pipeline.sh --fresh     the model introduces itself by that name
#   MODEL=Qwen/Qwen3-0.6B bash scripts/run_pipeline.sh         the same road with a real model on a GPU
#   bash scripts/run_pipeline.sh --fresh                       start over; without it, finished stages are kept
#
# OUT=folder chooses another place than outputs (or outputs/<model> for a real one). DATA=folder takes your own data,
# laid out as data/ is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FRESH=no
for argument in "$@"; do
  case "$argument" in
    --fresh) FRESH=yes ;;
    *) echo "error: unknown argument $argument; known: --fresh" >&2; exit 2 ;;
  esac
done

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
fi

if [ "$FRESH" = yes ]; then
  # Only what this script makes is removed.
  rm -rf "$OUT/tiny-base" "$OUT/data" "$OUT/pt" "$OUT/pt-merged" "$OUT/sft" "$OUT/sft-merged" "$OUT/stamps"
  rm -f "$OUT/eval.json" "$OUT/report.html"
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
common=(--logging_steps 50 --save_strategy steps --save_steps 200 --save_total_limit 1 --seed 42)
step pt "$OUT/pt" yes pretraining.py --model_name_or_path "$BASE" --train_file_dir "$DATA/pretrain" \
  --output_dir "$OUT/pt" "${PT[@]}" "${common[@]}"
PRETRAINED="$OUT/pt"
if [ -n "$MODEL" ]; then
  PRETRAINED="$OUT/pt-merged"
  step pt-merged "$PRETRAINED" redo merge_peft_adapter.py --lora_model "$OUT/pt" --output_dir "$PRETRAINED"
fi
step sft "$OUT/sft" yes supervised_finetuning.py --model_name_or_path "$PRETRAINED" \
  --train_file_dir "$DATA/finetune" --output_dir "$OUT/sft" "${SFT[@]}" "${common[@]}"
step sft-merged "$OUT/sft-merged" redo merge_peft_adapter.py --lora_model "$OUT/sft" --output_dir "$OUT/sft-merged"

# Before and after, on rows that no stage was trained on. Models before the last answer 200 of the questions: one that
# was never taught to stop writes to the limit each time.
models=(base="$BASE" pt="$PRETRAINED" sft="$OUT/sft-merged")
echo "== evaluation"
"$PYTHON" eval_pipeline.py --models "${models[@]}" --text_file_dir "$DATA/pretrain" \
  --chat_file "$DATA/finetune/validation.jsonl" --output_file "$OUT/eval.json" \
  --max_chat_samples_before 200 --batch_size 64 --max_new_tokens 96
"$PYTHON" build_report.py --eval_file "$OUT/eval.json" --runs pt="$OUT/pt" sft="$OUT/sft" --output_file "$OUT/report.html"

echo
for question in "你是谁？" "得了偏头痛应该挂什么科？" "急性心肌梗死有哪些情况要马上打120？"; do
  echo "> $question"
  "$PYTHON" inference.py --model_name_or_path "$OUT/sft-merged" --query "$question" --max_new_tokens 96
done
echo
echo "report: $OUT/report.html"
echo "chat:   $PYTHON inference.py --model_name_or_path $OUT/sft-merged --interactive"
echo "all of it took $(($(date +%s) - BEGAN)) s"
