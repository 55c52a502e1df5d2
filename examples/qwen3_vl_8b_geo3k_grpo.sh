#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO on geometry with diagrams.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-VL-8B-Instruct}

python3 -m verl.trainer.main config=examples/config.yaml \
    data.train_files=hiyouga/geometry3k@train \
    data.val_files=hiyouga/geometry3k@test \
    worker.actor.model.model_path="$MODEL_PATH" \
    trainer.experiment_name=qwen3_vl_8b_geo3k_grpo \
    "$@"
