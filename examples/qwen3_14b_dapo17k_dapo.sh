#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# DAPO, text only, with the lengths and batch sizes of its paper (arXiv 2503.14476, sec. 4.1). ulysses_size spreads each
# of the long responses over all eight GPUs.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-14B}

python3 -m verl.trainer.main config=examples/config.yaml \
    data.train_files=Saigyouji-Yuyuko1000/dapo17k@train \
    data.val_files=Saigyouji-Yuyuko1000/dapo17k@test \
    data.format_prompt=./examples/format_prompt/dapo.jinja \
    data.max_response_length=20480 \
    data.mini_rollout_batch_size=256 \
    algorithm.disable_kl=true \
    algorithm.online_filtering=true \
    algorithm.filter_key=accuracy_normalized \
    worker.actor.model.model_path="$MODEL_PATH" \
    worker.actor.global_batch_size=32 \
    worker.actor.clip_ratio_high=0.28 \
    worker.actor.clip_ratio_dual=10.0 \
    worker.actor.ulysses_size=8 \
    worker.actor.optim.strategy=adamw_bf16 \
    worker.actor.optim.weight_decay=0.1 \
    worker.actor.optim.lr_warmup_steps=10 \
    worker.actor.fsdp.torch_dtype=bf16 \
    worker.rollout.n=16 \
    worker.rollout.tensor_parallel_size=4 \
    worker.rollout.gpu_memory_utilization=0.8 \
    worker.rollout.max_num_batched_tokens=22528 \
    worker.rollout.val_override_config='{"n":16,"temperature":1.0,"top_p":0.7}' \
    worker.reward.reward_function=./examples/reward_function/dapo.py:compute_score \
    worker.reward.reward_function_kwargs.max_response_length=20480 \
    worker.reward.reward_function_kwargs.overlong_buffer_length=4096 \
    worker.reward.reward_function_kwargs.overlong_penalty_factor=1.0 \
    trainer.max_try_make_batch=10 \
    trainer.experiment_name=qwen3_14b_dapo17k_dapo \
    "$@"
