#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# qwen2_5_vl_7b_geo3k_gspo.sh with another model.

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-VL-8B-Instruct} bash examples/qwen2_5_vl_7b_geo3k_gspo.sh \
    trainer.experiment_name=qwen3_vl_8b_geo3k_gspo \
    "$@"
