#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The script of the same name without _vgr, with VGR token weights.
bash examples/vgr.sh examples/qwen3_vl_8b_geo3k_cispo.sh "$@"
