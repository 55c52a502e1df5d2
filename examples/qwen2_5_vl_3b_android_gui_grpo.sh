#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO on finding what to tap on a phone's screen. The data are your own: examples/reward_function/android_gui.py says
# what a row holds.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-VL-3B-Instruct}
DATA_PATH=${DATA_PATH:-./data/android_gui}

python3 -m verl.trainer.main config=examples/config.yaml \
    data.train_files="$DATA_PATH@train" \
    data.val_files="$DATA_PATH@test" \
    data.format_prompt=./examples/format_prompt/android_gui.jinja \
    data.max_prompt_length=3072 \
    data.max_response_length=64 \
    worker.actor.model.model_path="$MODEL_PATH" \
    worker.rollout.limit_images=1 \
    worker.rollout.tensor_parallel_size=1 \
    worker.reward.reward_function=./examples/reward_function/android_gui.py:compute_score \
    trainer.experiment_name=qwen2_5_vl_3b_android_gui_grpo \
    "$@"
