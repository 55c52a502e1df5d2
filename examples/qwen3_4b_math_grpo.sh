#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO, text only.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-4B}

python3 -m verl.trainer.main config=examples/config.yaml \
    worker.actor.model.model_path="$MODEL_PATH" \
    trainer.experiment_name=qwen3_4b_math_grpo \
    "$@"
