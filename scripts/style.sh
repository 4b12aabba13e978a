#!/usr/bin/env bash
# The style checks: lint, format, types, spelling.
set -euo pipefail
source "$(dirname "$0")/env.sh"
ruff check .
ruff format --check .
mypy hf_compact
codespell hf_compact tests scripts evaluation configs docs ./*.md
