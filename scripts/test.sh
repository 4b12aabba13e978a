#!/usr/bin/env bash
# All tests. Needs neither the Hub nor any data. Usage: scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/env.sh"
exec python -m pytest "$@"
