#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO, text only: what examples/config.yaml holds, as it is.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-7B-Instruct}

python3 -m verl.trainer.main config=examples/config.yaml \
    worker.actor.model.model_path="$MODEL_PATH" \
    "$@"
