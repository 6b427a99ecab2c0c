#!/usr/bin/env bash
# From a folder of conversations to a model to chat with: checks the rows, trains (SFT), merges, shows answers before
# and after, prints the command to chat.
#
#   bash scripts/train_my_data.sh my_data
#   MODEL=Qwen/Qwen3-0.6B OUT=outputs/clinic bash scripts/train_my_data.sh my_data
#
# FOLDER has .jsonl, .json, .csv and others; files named validation* are held out. Without MODEL the tiny model is
# trained, which can learn rows by heart and nothing else; it is built if missing. OUT is a new folder, or that of the
# same run after a stop: then the run continues. Nothing that is there already is overwritten. Further flags of
# supervised_finetuning.py may follow. With few rows, epochs follow their number: docs/few_rows.md
set -euo pipefail
started_in=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A path as the caller sees it, from wherever the script was started.
absolute() { case "$1" in /*) echo "$1" ;; *) echo "$started_in/$1" ;; esac; }

FOLDER=${1:-}
if [ -z "$FOLDER" ] || [ "${FOLDER#-}" != "$FOLDER" ]; then
  echo "error: name the folder with your conversations: bash scripts/train_my_data.sh my_data" >&2
  exit 2
fi
shift
FOLDER=$(absolute "${FOLDER%/}")
if [ ! -d "$FOLDER" ]; then
  echo "error: the folder $FOLDER does not exist" >&2
  exit 2
fi
OUT=$(absolute "${OUT:-outputs/$(basename "$FOLDER")-model}")
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
TRAINED=$OUT/sft
MERGED=$OUT/merged
REPLACE=
for flag in "$@"; do
  case $flag in
  --output_dir* | --output-dir*)
    echo "error: the folder of the result is given as OUT=..., not as --output_dir" >&2
    exit 2
    ;;
  --overwrite_output_dir* | --overwrite-output-dir*) REPLACE=yes ;;
  esac
done
# A run that has finished reads no rows again, and would answer for rows that it has not seen.
if [ -z "$REPLACE" ] && grep -qs '"status": "finished"' "$TRAINED/run.json" &&
  [ -n "$(find "$FOLDER" -cnewer "$TRAINED/run.json")" ]; then
  echo "error: $FOLDER has changed since $TRAINED was trained. Choose another folder, OUT=..., or replace the run:" \
    "--overwrite_output_dir True" >&2
  exit 2
fi

echo "1 check the rows of $FOLDER"
"$PYTHON" validate_jsonl.py --file_path "$FOLDER" --format chat

echo "2 train"
HOW=()
if [ -z "${MODEL:-}" ]; then
  MODEL=$PWD/outputs/tiny-base
  [ -f "$MODEL/config.json" ] || "$PYTHON" build_tiny_model.py --output_dir "$MODEL"
  # Its weights are random, and an adapter learns little on these.
  HOW=(--use_peft False)
elif [ -d "$started_in/$MODEL" ]; then
  MODEL=$(absolute "$MODEL")
fi
# The empty array needs this form in bash 4.3 and older, such as that of macOS.
"$PYTHON" supervised_finetuning.py --model_name_or_path "$MODEL" --train_file_dir "$FOLDER" --output_dir "$TRAINED" \
  --sample_prompts 5 --resume auto ${HOW[@]+"${HOW[@]}"} "$@"

RESULT=$TRAINED
if [ -f "$TRAINED/adapter_config.json" ]; then
  RESULT=$MERGED
  echo "3 merge the adapter into its base"
  # After a training that has replaced the adapter, what was merged before is the earlier model.
  [ "$MERGED/config.json" -nt "$TRAINED/adapter_model.safetensors" ] ||
    "$PYTHON" merge_peft_adapter.py --lora_model "$TRAINED" --output_dir "$MERGED" \
      ${REPLACE:+--overwrite_output_dir True}
else
  echo "3 nothing to merge: all weights were trained"
fi

echo "4 before and after"
[ ! -f "$TRAINED/samples.jsonl" ] || "$PYTHON" - "$TRAINED/samples.jsonl" <<'PYTHON'
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    for line in file:
        row = json.loads(line)
        for name, text in row.items():
            text = " ".join(text.split())
            print(f"{name:<10} {text if len(text) <= 200 else text[:200] + ' …'}")
        print()
PYTHON
printf 'done. To chat, from %q:\n  %q inference.py --model_name_or_path %q --interactive\n' "$PWD" "$PYTHON" "$RESULT"
