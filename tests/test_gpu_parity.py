# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_gpu_parity.py
"""The script that compares a GPU with a CPU finds a CPU equal to itself, and tells what is too far."""

import math
from pathlib import Path

import pytest
from gpu_parity import BOUNDS, HELD, beyond_bounds, compare

pytestmark = pytest.mark.usefixtures("private_cache", "lone_process_group")


def test_a_cpu_is_what_a_cpu_is(tmp_path: Path) -> None:
    distances = compare("Qwen2.5-VL", "cpu", "fp32", tmp_path)
    assert distances == {**dict.fromkeys(BOUNDS["fp32"], 0.0), HELD: 0.0}
    assert beyond_bounds(distances, "fp32") == set()


def test_what_is_too_far_is_told_also_where_it_is_no_number() -> None:
    distances = {"log_probs": 0.001, "mass": math.nan, "kl": 1e-5, HELD: 500.0}
    assert beyond_bounds(distances, "fp32") == {"log_probs", "mass", HELD}
