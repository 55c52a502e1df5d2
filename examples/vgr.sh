#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs another script with VGR token weights. The scripts named *_vgr.sh do this for the one they are named after.
script=${1:?"usage: bash examples/vgr.sh examples/SCRIPT.sh [key=value ...]"}
shift

bash "$script" \
    algorithm.enable_token_weights=true \
    algorithm.token_weight_last_k_layers=8 \
    worker.rollout.collect_attentions=true \
    trainer.experiment_name="$(basename "$script" .sh)_vgr" \
    "$@"
