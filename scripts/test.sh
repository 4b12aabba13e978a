#!/usr/bin/env bash
# All tests, a process for each of two cores. Needs neither the Hub nor any data. Usage: scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/env.sh"
exec python -m pytest -n 2 --dist loadfile "$@"
