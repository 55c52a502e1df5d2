#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO, logged to SwanLab.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-VL-7B-Instruct}

python3 -m verl.trainer.main config=examples/config.yaml \
    data.train_files=hiyouga/geometry3k@train \
    data.val_files=hiyouga/geometry3k@test \
    worker.actor.model.model_path="$MODEL_PATH" \
    trainer.experiment_name=qwen2_5_vl_7b_geo3k_swanlab \
    trainer.logger='[console,swanlab]' \
    "$@"
