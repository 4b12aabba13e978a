#!/usr/bin/env bash
# The tests that run exported files in llama.cpp itself. llama-cpp-python has no wheel on PyPI, so it is built here (fifteen
# minutes of a core; a C++ compiler and cmake are needed); without it these tests are skipped. Usage: scripts/test_llama_cpp.sh
set -euo pipefail
source "$(dirname "$0")/env.sh"
export CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF"
CMAKE_ARGS+=" -DLLAMA_BUILD_SERVER=OFF -DGGML_OPENMP=OFF"
pip install --quiet --constraint constraints.txt llama-cpp-python==0.3.36
exec python -m pytest tests/hf/test_export.py -k llama_cpp
