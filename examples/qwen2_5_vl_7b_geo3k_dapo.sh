#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# DAPO: clip higher, no KL, and new draws in place of groups that are all right or all wrong.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-VL-7B-Instruct}

python3 -m verl.trainer.main config=examples/config.yaml \
    data.train_files=hiyouga/geometry3k@train \
    data.val_files=hiyouga/geometry3k@test \
    data.mini_rollout_batch_size=256 \
    algorithm.disable_kl=true \
    algorithm.online_filtering=true \
    algorithm.filter_key=accuracy \
    worker.actor.model.model_path="$MODEL_PATH" \
    worker.actor.clip_ratio_high=0.28 \
    trainer.experiment_name=qwen2_5_vl_7b_geo3k_dapo \
    "$@"
