#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs another script with VGR token weights.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash examples/vgr.sh examples/SCRIPT.sh [key=value ...]

Runs SCRIPT with VGR token weights from the attention of the last 8 layers, under the name SCRIPT_vgr. Keys of your own
come last and override all others; MODEL_PATH is another model's id or folder.

for example:
  bash examples/vgr.sh examples/qwen2_5_vl_7b_geo3k_grpo.sh trainer.max_steps=100
TEXT
}

case ${1:-} in
    -h | --help)
        usage
        exit
        ;;
esac
if [ ! -f "${1:-}" ]; then
    echo "the first argument has to be a script, and '${1:-}' is no file" >&2
    usage >&2
    exit 2
fi
script=$1
shift

bash "$script" \
    algorithm.enable_token_weights=true \
    algorithm.token_weight_last_k_layers=8 \
    worker.rollout.collect_attentions=true \
    trainer.experiment_name="$(basename "$script" .sh)_vgr" \
    "$@"
