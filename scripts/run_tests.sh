#!/usr/bin/env bash
# All checks: lint, format, generated docs, tests. It sets up its own environment on a fresh machine.
#
#   bash scripts/run_tests.sh                  what CI runs
#   bash scripts/run_tests.sh -m slow          the tests that take minutes
#   bash scripts/run_tests.sh tests/silent     some tests; arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
bash scripts/setup.sh --dev

# Every program that a test starts would compile the package again.
unset PYTHONDONTWRITEBYTECODE
# Waiting threads should not keep a core busy that another process could use.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/python" -m docs.build_training_params --check
"$VENV/bin/python" -m docs.build_figures --check
# Tests may not access a hub: one that tries fails at once. Two processes with one thread each, one file at a time: most
# of the time is spent in Python, which does not use a second thread.
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$VENV/bin/python" -m pytest -n 2 --dist loadfile "$@"
