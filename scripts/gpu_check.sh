#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The tests, checks and benchmarks that need a GPU, in one command, installs included.
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/gpu_check.sh [STAGE ...]

On a machine with an NVIDIA GPU of 80 GB; without STAGE all of them, one after the other:

  report      device, versions, speed of a product of matrices and of copies
  tests       the tests that need a GPU, and the tests of the compiled Triton kernel
  parity      every model family on the GPU against the CPU: log-probs, attention masses, gradients, checkpoints, memory
  vgr         what VGR costs, at a small shape and at the 7B one
  train       tokens per second, memory and MFU of a model of 2.5 billion weights, switch by switch
  quickstart  the quickstart, on the GPU

Logs, tables and pictures are in the folder that OUTPUT names (default gpu_check). A stage that fails does not keep the
next from running; the exit code is then 1. VERL_VENV and PYTHON are as in the other scripts.
TEXT
}

case ${1:-} in -h | --help)
    usage
    exit
    ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# Workers on GPUs have their share of the cores; scripts/environment.sh would give them one thread.
threads=${OMP_NUM_THREADS:-}
source scripts/environment.sh
if [ -n "$threads" ]; then export OMP_NUM_THREADS=$threads; else unset OMP_NUM_THREADS; fi

stages=(report tests parity vgr train quickstart)
for stage in "$@"; do
    [[ " ${stages[*]} " = *" $stage "* ]] || {
        echo "there is no stage $stage" >&2
        usage >&2
        exit 2
    }
done
has_gpu || {
    echo "there is no NVIDIA GPU here (neither nvidia-smi nor /dev/nvidia0)" >&2
    exit 2
}
[ $# -eq 0 ] || stages=("$@")

prepare_environment vllm || exit
output=${OUTPUT:-gpu_check}
mkdir -p "$output"
failed=()

# Runs a command with its output in a log and on the console.
logged() {
    local name=$1 started=$SECONDS
    shift
    echo "==== $name: $*"
    "$@" 2>&1 | tee "$output/$name.log" || failed+=("$name")
    echo "---- $name: $((SECONDS - started)) s"
}

report() {
    logged report "$python" scripts/gpu_report.py
}

tests() {
    logged tests "$python" -m pytest tests/test_gpu.py tests/test_attention_mass.py
}

parity() {
    logged parity_fp32 "$python" scripts/gpu_parity.py
    logged parity_bf16 "$python" scripts/gpu_parity.py --bf16
}

vgr() {
    logged vgr_small "$python" scripts/bench_vgr.py --repeats 5 --output "$output/vgr_small.png"
    logged vgr_7b "$python" scripts/bench_vgr.py --shape 7b --lengths 4096 8192 16384 --repeats 5 --output "$output/vgr_7b.png"
}

train() {
    logged train_2b "$python" scripts/bench_train.py --shape 2b --prompts 8 --prompt-length 256 --response-length 512
}

quickstart() {
    logged quickstart bash scripts/quickstart.sh --seed 0
}

for stage in "${stages[@]}"; do "$stage"; done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; the logs are in $output"
    exit 1
fi
echo "all went well; logs, tables and pictures are in $output"
