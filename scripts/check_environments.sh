#!/usr/bin/env bash
# Whether the packages of each environment still fit together, with today's releases; run it before a release.
#
#   bash scripts/check_environments.sh           resolve each requirements file, and install nothing
#   bash scripts/check_environments.sh --write   and write the versions: of requirements-dev.txt to constraints.txt, and of
#                                                vllm, quant, peers and docs to constraints-vllm.txt and so on
#
# PYTHON=python3.12 selects another interpreter. Only metadata is downloaded where the index has it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  "" | --write) ;;
  *)
    echo "error: unknown argument $1. Known: --write" >&2
    exit 2
    ;;
esac
PYTHON=${PYTHON:-$(bash scripts/setup.sh --which)}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0
for file in requirements*.txt; do
  if "$PYTHON" -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed \
    --report "$folder/$file.json" -r "$file" 2>"$folder/errors"; then
    count=$("$PYTHON" -c 'import json, sys; print(len(json.load(open(sys.argv[1]))["install"]))' "$folder/$file.json")
    echo "$file: resolved, $count packages"
  else
    failed=1
    echo "$file: does not resolve"
    grep -v "^WARNING" "$folder/errors" | tail -n 20 >&2
  fi
done
[ "$failed" = 0 ] || exit 1

# lock FILE OUTPUT: write the versions in the resolution of a requirements file.
lock() {
  "$PYTHON" - "$folder/$1.json" "$1" >"$folder/lock" <<'END'
import json
import re
import sys

print(f"# The versions that {sys.argv[2]} resolved to. Written by: bash scripts/check_environments.sh --write")
for package in sorted(json.load(open(sys.argv[1]))["install"], key=lambda package: package["metadata"]["name"].lower()):
    name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
    # The build of torch for the GPU at hand decides these.
    if name.startswith(("nvidia-", "cuda-", "triton")):
        continue
    # A build for one kind of hardware (+cpu) has the version of the others.
    print(f"{name}=={package['metadata']['version'].partition('+')[0]}")
END
  mv "$folder/lock" "$2"
  echo "$2: written"
}

if [ "${1:-}" = --write ]; then
  lock requirements-dev.txt constraints.txt
  # These are environments of their own.
  for name in vllm quant peers docs; do
    lock "requirements-$name.txt" "constraints-$name.txt"
  done
fi
