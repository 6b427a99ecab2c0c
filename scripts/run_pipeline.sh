#!/usr/bin/env bash
# The whole pipeline. What it does, and the variables that it reads, are at the top of run_pipeline.py, which refuses
# what cannot be done before it installs anything.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(bash scripts/setup.sh --which)
exec "$PYTHON" run_pipeline.py "$@"
