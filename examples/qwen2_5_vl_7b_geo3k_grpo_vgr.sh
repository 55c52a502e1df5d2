#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The script of the same name without _vgr, with VGR token weights. vgr.sh does the same for every other script.
bash examples/vgr.sh examples/qwen2_5_vl_7b_geo3k_grpo.sh "$@"
