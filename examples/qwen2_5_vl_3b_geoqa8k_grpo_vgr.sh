#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The script of the same name without _vgr, with VGR token weights.
bash examples/vgr.sh examples/qwen2_5_vl_3b_geoqa8k_grpo.sh "$@"
