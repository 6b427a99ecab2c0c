#!/usr/bin/env bash
# Any stage on several hosts: the same command on each of them. The hosts find each other at MASTER (torchrun, c10d).
#
#   HOSTS=2 MASTER=node1:29500 NPROC=8 bash scripts/run_multinode.sh supervised_finetuning.py \
#     --config recipes/real/sft.yaml --model_name_or_path Qwen/Qwen3-0.6B --train_file_dir data/finetune \
#     --output_dir /shared/outputs-sft
#
# MASTER is one of the hosts, by the name that it has for itself and for the others, and a free port of it. Code, model
# and data are needed on all hosts. Where to save, what happens if a host fails, and Slurm: docs/multinode.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
HOSTS=${HOSTS:?the number of hosts, for example HOSTS=2}
MASTER=${MASTER:?one of the hosts and a free port of it, for example MASTER=node1:29500}
NPROC=${NPROC:-gpu}                         # processes on each host: one per GPU, or a number
MAX_RESTARTS=${MAX_RESTARTS:-3}             # how often the run is started again, from its last checkpoint
JOB=${JOB:-medicalgpt}                      # a name of its own for each of several runs with the same MASTER
LOCAL_ADDR=${LOCAL_ADDR:-}                  # of this host, for the others, if its name does not lead to it
TIMEOUT=${TIMEOUT:-600}                     # seconds to wait for the other hosts

[ $# -gt 0 ] || { echo "error: no program given, for example supervised_finetuning.py" >&2; exit 2; }
LAUNCH=("$PYTHON" -m medicalgpt.launch --nnodes "$HOSTS" --nproc_per_node "$NPROC" --max_restarts "$MAX_RESTARTS"
  --rdzv_backend c10d --rdzv_endpoint "$MASTER" --rdzv_id "$JOB" --rdzv_conf "join_timeout=$TIMEOUT")
[ -z "$LOCAL_ADDR" ] || LAUNCH+=(--local_addr "$LOCAL_ADDR")
# A host that cannot be reached is reported in a line, and not with a C++ stack for each attempt; FATAL is the quietest.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-FATAL}
exec "${LAUNCH[@]}" "$@"
