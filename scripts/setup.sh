#!/usr/bin/env bash
# Create the virtual environment and install the pinned requirements; does nothing if they are installed already.
#
#   bash scripts/setup.sh          to train, evaluate and serve
#   bash scripts/setup.sh --dev    with the tools for the tests
#   bash scripts/setup.sh --extras with the packages of single flags: Liger, kernels, GaLore, APOLLO
#   bash scripts/setup.sh --vllm   with vLLM, for GRPO with --use_vllm
#   bash scripts/setup.sh --quant  llm-compressor, in an environment of its own
#   bash scripts/setup.sh --docs   MkDocs, in an environment of its own, to build the site of docs/
#   bash scripts/setup.sh --which  install nothing; print the Python to use
#
# VENV=folder replaces .venv (.venv-vllm-grpo, .venv-quant, .venv-site); PYTHON=python3.12 selects another interpreter (3.11 or
# newer). constraints.txt holds the exact version of every package that was tested, so that a new release of one cannot
# break an installation, and constraints-vllm.txt and constraints-quant.txt those that were resolved together; NEWEST=1
# ignores them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

REQUIREMENTS=requirements.txt
FOLDER=.venv
# The other environments need other versions of some packages.
CONSTRAINTS=constraints.txt
SIZE=" (once; a few minutes, and about 3 GB with CUDA)"
case "${1:-}" in
  "" | --which) ;;
  --dev) REQUIREMENTS=requirements-dev.txt ;;
  --extras) REQUIREMENTS=requirements-extras.txt ;;
  --vllm) REQUIREMENTS=requirements-vllm.txt FOLDER=.venv-vllm-grpo CONSTRAINTS=constraints-vllm.txt ;;
  --quant) REQUIREMENTS=requirements-quant.txt FOLDER=.venv-quant CONSTRAINTS=constraints-quant.txt ;;
  --docs) REQUIREMENTS=requirements-docs.txt FOLDER=.venv-site CONSTRAINTS=constraints-docs.txt SIZE="" ;;
  *)
    echo "error: unknown argument $1. Known: --dev, --extras, --vllm, --quant, --docs, --which" >&2
    exit 2
    ;;
esac
VENV=${VENV:-$FOLDER}

if [ -z "${PYTHON:-}" ]; then
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      PYTHON=$candidate
      break
    fi
  done
fi
if [ -z "${PYTHON:-}" ]; then
  echo "error: no Python 3.11 or newer was found. Install one, or name it: PYTHON=/path/to/python3.11" >&2
  exit 1
fi
if [ "${1:-}" = "--which" ]; then
  echo "$PYTHON"
  exit
fi

# The stamp records what was installed, so that a changed requirements file is noticed.
wanted=$(cat requirements.txt "$REQUIREMENTS" "$CONSTRAINTS" | cksum)${NEWEST:+ newest}
stamp="$VENV/.installed-$REQUIREMENTS"
if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
echo "installing $REQUIREMENTS into $VENV$SIZE"
bounds=(-c "$CONSTRAINTS")
[ -z "${NEWEST:-}" ] || bounds=()
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$REQUIREMENTS" ${bounds[@]+"${bounds[@]}"}
echo "$wanted" >"$stamp"
