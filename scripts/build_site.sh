#!/usr/bin/env bash
# Build the site of docs/ into site/ (English) and site/zh/ (Chinese). A link, anchor or image that leads nowhere and a
# page that is missing in the navigation of mkdocs.yml are errors.
#
#   bash scripts/build_site.sh
#   python -m http.server --directory site      then open http://localhost:8000
#
# VENV=folder replaces .venv-site.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv-site}
VENV=$VENV bash scripts/setup.sh --docs
# Silences what Material prints in every build: it is maintained until May 2027, and Zensical is its successor.
export NO_MKDOCS_2_WARNING=1
# With --quiet, --strict would find nothing.
"$VENV/bin/mkdocs" build --strict --clean --config-file mkdocs.yml
"$VENV/bin/mkdocs" build --strict --clean --config-file mkdocs_zh.yml
echo "site/index.html, site/zh/index.html"
