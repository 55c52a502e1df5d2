#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO of a mixture of experts: parameters and optimizer states in bf16, which halves their memory.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-VL-30B-A3B-Instruct}

python3 -m verl.trainer.main config=examples/config.yaml \
    data.train_files=hiyouga/geometry3k@train \
    data.val_files=hiyouga/geometry3k@test \
    worker.actor.model.model_path="$MODEL_PATH" \
    worker.actor.optim.strategy=adamw_bf16 \
    worker.actor.fsdp.torch_dtype=bf16 \
    worker.rollout.tensor_parallel_size=4 \
    trainer.experiment_name=qwen3_vl_30b_geo3k_grpo \
    "$@"
