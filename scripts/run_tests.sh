#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing and runs linter and tests: bash scripts/run_tests.sh [--fast | --no-vllm] [pytest arguments]
#   --fast     leaves out the tests that start Ray or an engine, and vLLM's installation (two gigabytes)
#   --no-vllm  neither installs vLLM nor runs the tests that need it
# Without further arguments, and without a GPU, the tests run in two processes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

engine=vllm
selection=()
case ${1:-} in
    --fast) selection=(-m "not ray and not vllm") ;;
    --no-vllm) selection=(-m "not vllm") ;;
esac
if [ ${#selection[@]} -gt 0 ]; then
    engine=none
    shift
fi
if [ $# -eq 0 ] && ! command -v nvidia-smi >/dev/null; then
    # Each file goes to one process, in the order of tests/conftest.py. A GPU is not shared.
    selection+=(-n 2 --dist loadfile --no-loadscope-reorder)
fi

prepare_environment "$engine"
"$python" -m ruff check .
"$python" -m pytest --durations=10 "${selection[@]}" "$@"
