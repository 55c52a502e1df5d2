#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing and runs linter, type checker and tests; --help lists the options.
# Without further arguments, and without a GPU, the tests run in two processes.
set -euo pipefail

case ${1:-} in
    -h | --help)
        cat <<'EOF'
usage: bash scripts/run_tests.sh [--fast | --no-vllm] [pytest arguments]

Installs what is missing, then runs linter, type checker and tests.

  --fast     leaves out the tests that start Ray or an engine, and vLLM's installation (two gigabytes)
  --no-vllm  neither installs vLLM nor runs the tests that need it
EOF
        exit 0
        ;;
esac
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
if [ $# -eq 0 ] && ! has_gpu; then
    # Each file goes to one process, in the order of tests/conftest.py. A GPU is not shared.
    selection+=(-n 2 --dist loadfile --no-loadscope-reorder)
fi

# The pages are tested in a browser. Without the rights to install one these tests are skipped, and say so.
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    mkdir -p "$venv"
    run_quietly "installing Debian's Chromium" "$venv/install_chromium.log" bash -c \
        'apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium chromium-driver' ||
        echo "the tests of the pages are skipped" >&2
fi

prepare_environment "$engine"
"$python" -m ruff check .
"$python" -m mypy
"$python" -m pytest --durations=10 "${selection[@]}" "$@"
