#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO on questions about several images.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-VL-7B-Instruct}

python3 -m verl.trainer.main config=examples/config.yaml \
    data.train_files=hiyouga/journeybench-multi-image-vqa@train \
    data.val_files=hiyouga/journeybench-multi-image-vqa@test \
    data.format_prompt=./examples/format_prompt/r1v.jinja \
    data.rollout_batch_size=256 \
    worker.actor.model.model_path="$MODEL_PATH" \
    worker.rollout.limit_images=2 \
    worker.reward.reward_function=./examples/reward_function/r1v.py:compute_score \
    trainer.experiment_name=qwen2_5_vl_7b_multi_image \
    "$@"
