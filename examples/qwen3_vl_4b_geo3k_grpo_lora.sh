#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO on low-rank adapters of the language model in place of the whole model.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-VL-4B-Instruct}

python3 -m verl.trainer.main config=examples/config.yaml \
    data.train_files=hiyouga/geometry3k@train \
    data.val_files=hiyouga/geometry3k@test \
    worker.actor.model.model_path="$MODEL_PATH" \
    worker.actor.model.lora.rank=64 \
    worker.actor.optim.lr=1.0e-5 \
    worker.rollout.tensor_parallel_size=1 \
    trainer.experiment_name=qwen3_vl_4b_geo3k_grpo_lora \
    "$@"
