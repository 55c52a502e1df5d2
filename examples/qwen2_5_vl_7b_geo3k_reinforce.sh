#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# REINFORCE++ (arXiv 2501.03262): advantages over the whole batch, KL in the reward.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-VL-7B-Instruct}

python3 -m verl.trainer.main config=examples/config.yaml \
    data.train_files=hiyouga/geometry3k@train \
    data.val_files=hiyouga/geometry3k@test \
    algorithm.adv_estimator=reinforce_plus_plus \
    algorithm.use_kl_loss=false \
    algorithm.kl_penalty=kl \
    algorithm.kl_coef=1.0e-3 \
    worker.actor.model.model_path="$MODEL_PATH" \
    trainer.experiment_name=qwen2_5_vl_7b_geo3k_reinforce \
    "$@"
