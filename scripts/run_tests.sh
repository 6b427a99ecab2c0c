#!/usr/bin/env bash
# Everything that has to be green: lint, format, generated docs, tests. Sets up its own environment on a fresh machine.
#
#   bash scripts/run_tests.sh                  what CI runs
#   bash scripts/run_tests.sh -m slow          the tests that take minutes
#   bash scripts/run_tests.sh tests/silent     a part; arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
bash scripts/setup.sh --dev

# Threads that wait should not keep a core busy that another process could use.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/python" -m docs.build_training_params --check
# Nothing in the tests may reach a hub: a test that tries fails at once. Two processes of one thread each, a file to each:
# most of the time goes into Python, which has no use for a second thread.
OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$VENV/bin/python" -m pytest -n 2 --dist loadfile "$@"
