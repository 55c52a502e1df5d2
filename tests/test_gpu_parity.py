# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_gpu_parity.py
"""The script that compares a GPU with a CPU finds a CPU equal to itself, and tells what is too far."""

import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from gpu_parity import BOUNDS, HELD, beyond_bounds, compare

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("private_cache", "lone_process_group")


def test_a_cpu_is_what_a_cpu_is(tmp_path: Path) -> None:
    distances = compare("Qwen2.5-VL", "cpu", "fp32", tmp_path)
    assert distances == {**dict.fromkeys(BOUNDS["fp32"], 0.0), HELD: 0.0}
    assert beyond_bounds(distances, "fp32") == set()


def test_what_is_too_far_is_told_also_where_it_is_no_number() -> None:
    distances = {"log_probs": 0.001, "mass": math.nan, "kl": 1e-5, HELD: 500.0}
    assert beyond_bounds(distances, "fp32") == {"log_probs", "mass", HELD}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["parity"], "there is no NVIDIA GPU here"),
        (["party"], "there is no stage party"),
    ],
)
# With a GPU the command is not refused: it would install and run the whole check, for half an hour.
@pytest.mark.skipif(torch.cuda.is_available() or shutil.which("nvidia-smi") is not None, reason="would check the GPU")
def test_the_check_of_a_gpu_is_refused_without_one_before_anything_is_installed(
    stages: list[str], message: str, tmp_path: Path
) -> None:
    finished = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *stages],
        env={**os.environ, "VERL_VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith(message)
    assert not (tmp_path / "venv").exists()
