#!/usr/bin/env bash
# Whether today's releases of all packages work: install them without our bounds in an environment of their own, run the
# tests there, and write what is newer than constraints.txt, and what fails, to a report.
#
#   bash scripts/try_newest.sh                       all quick tests
#   bash scripts/try_newest.sh tests/test_chat.py    some tests; arguments go to pytest
#
# VENV=folder replaces .venv-newest, REPORT=file replaces outputs/newest.md; PYTHON=python3.12 selects another
# interpreter. The exit code is that of the tests.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv-newest}
REPORT=${REPORT:-outputs/newest.md}
PYTHON=${PYTHON:-$(bash scripts/setup.sh --which)}
mkdir -p "$(dirname "$REPORT")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Names, extras and markers without versions; what is installed already is upgraded.
grep -hvE '^(#|-r|$)' requirements.txt requirements-dev.txt |
  sed -E 's/^([A-Za-z0-9_.-]+(\[[^]]*\])?)[^;]*/\1/; s/;/ ;/' >"$work/requirements.txt"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || exit 1
echo "installing the newest releases into $VENV"
if ! "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade -r "$work/requirements.txt" \
  2>"$work/errors"; then
  { echo "# Newest releases"; echo; echo "They do not install together:"; echo; echo '```'; tail -n 20 "$work/errors"; echo '```'; } |
    tee "$REPORT"
  exit 1
fi

# The one about our pinned versions is about other versions than these.
OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$VENV/bin/python" -m pytest -n 2 --dist loadfile \
  --deselect tests/test_scripts.py::test_the_constraints_are_the_versions_that_these_tests_run_with "$@" |
  tee "$work/tests"
status=${PIPESTATUS[0]}

"$VENV/bin/python" - "$work/tests" "$status" >"$REPORT" <<'END'
import re
import sys
from importlib.metadata import distributions

tests, status = sys.argv[1:]
pinned = dict(line.split("==") for line in open("constraints.txt").read().splitlines() if "==" in line)
installed = {re.sub(r"[-_.]+", "-", one.name).lower(): one.version.partition("+")[0] for one in distributions()}
changed = [(name, old, installed[name]) for name, old in pinned.items() if installed.get(name, old) != old]
print("# Newest releases\n")
print(f"The tests {'pass' if status == '0' else f'fail (exit code {status})'}.\n")
print(f"{len(changed)} of {len(pinned)} packages are newer than in constraints.txt:\n")
print("| package | constraints.txt | newest |\n|---|---|---|")
print(*(f"| {name} | {old} | {new} |" for name, old, new in changed), sep="\n")
print("\n```")
lines = open(tests, encoding="utf-8", errors="replace").read().splitlines()
print(*[line for line in lines if line.startswith(("FAILED", "ERROR"))][:100], *lines[-1:], sep="\n")
print("```")
END
echo "report: $REPORT"
exit "$status"
