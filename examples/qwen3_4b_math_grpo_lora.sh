#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# GRPO on low-rank adapters, text only.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-4B}

python3 -m verl.trainer.main config=examples/config.yaml \
    worker.actor.model.model_path="$MODEL_PATH" \
    worker.actor.model.lora.rank=64 \
    worker.actor.optim.lr=1.0e-5 \
    worker.rollout.tensor_parallel_size=1 \
    trainer.experiment_name=qwen3_4b_math_grpo_lora \
    "$@"
