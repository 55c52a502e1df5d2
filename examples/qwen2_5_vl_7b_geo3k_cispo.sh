#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# CISPO (arXiv 2506.13585): the ratio, here held within [1 - 0, 1 + 4], weighs each token and cuts no gradient. The paper
# leaves the lower end open: worker.actor.clip_ratio_low=1.
set -x

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-VL-7B-Instruct}

python3 -m verl.trainer.main config=examples/config.yaml \
    data.train_files=hiyouga/geometry3k@train \
    data.val_files=hiyouga/geometry3k@test \
    worker.actor.model.model_path="$MODEL_PATH" \
    worker.actor.loss_type=cispo \
    worker.actor.clip_ratio_low=0 \
    worker.actor.clip_ratio_high=4 \
    trainer.experiment_name=qwen2_5_vl_7b_geo3k_cispo \
    "$@"
