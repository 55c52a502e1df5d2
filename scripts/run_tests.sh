#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing and runs linter and tests: bash scripts/run_tests.sh [--no-vllm] [arguments of pytest]
#   --no-vllm  neither installs vLLM (two gigabytes) nor runs the tests that need it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

engine=vllm
if [ "${1:-}" = --no-vllm ]; then
    engine=none
    shift
    set -- -m "not vllm" "$@"
fi

prepare_environment "$engine"
"$python" -m ruff check .
"$python" -m pytest "$@"
