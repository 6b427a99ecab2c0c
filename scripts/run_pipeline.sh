#!/usr/bin/env bash
# The whole pipeline. The top of run_pipeline.py describes it and its variables. Impossible requests are refused before
# anything is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(bash scripts/setup.sh --which)
exec "$PYTHON" run_pipeline.py "$@"
