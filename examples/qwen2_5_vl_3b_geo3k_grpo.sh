#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO on geometry with diagrams, on two GPUs.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-VL-3B-Instruct}

python3 -m verl.trainer.main config=examples/config.yaml \
    data.train_files=hiyouga/geometry3k@train \
    data.val_files=hiyouga/geometry3k@test \
    worker.actor.model.model_path="$MODEL_PATH" \
    worker.rollout.tensor_parallel_size=1 \
    trainer.experiment_name=qwen2_5_vl_3b_geo3k_grpo \
    trainer.n_gpus_per_node=2 \
    "$@"
