# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_vllm_environment.py
"""What a vLLM run does not say, and what it says instead; without vLLM."""

import importlib
import logging
import os
import warnings
from pathlib import Path

import pytest

from verl.trainer import main
from verl.trainer.config import load_config
from verl.workers.rollout import vllm_environment


@pytest.mark.parametrize(("count", "tells"), [(1, False), (2, True)])
def test_several_numa_nodes_are_told_and_one_is_not(
    count: int, tells: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for node in range(count):
        (tmp_path / f"node{node}").mkdir()
    monkeypatch.setattr(vllm_environment, "NUMA_NODES", tmp_path)
    vllm_environment.tell_of_numa_nodes()
    assert ("one of this machine's 2 NUMA nodes" in caplog.text) == tells


def test_vllm_is_quiet_at_the_level_of_its_variable_before_it_sets_up_its_loggers() -> None:
    level = os.environ["VLLM_LOGGING_LEVEL"].upper()
    assert logging.getLogger("vllm.triton_utils.importing").getEffectiveLevel() == logging.getLevelName(level)


def test_only_the_one_deprecation_is_ignored() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        importlib.reload(vllm_environment)
        warnings.warn("`torch.distributed.reduce_op` is deprecated, please use another", FutureWarning, stacklevel=1)
        warnings.warn("`torch.distributed.all_reduce` is deprecated", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["`torch.distributed.all_reduce` is deprecated"]


@pytest.mark.parametrize(
    ("engine", "device", "level"), [("vllm", "cpu", "ERROR"), ("vllm", "cuda", None), ("hf", "cpu", None)]
)
def test_warnings_from_torchs_cpp_stay_quiet_for_vllm_on_cpus_alone(
    engine: str, device: str, level: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    config = load_config(["worker.rollout.tensor_parallel_size=1", f"worker.rollout.name={engine}"])
    assert main.variables_of_workers(config, device).get("TORCH_CPP_LOG_LEVEL") == level
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    assert "TORCH_CPP_LOG_LEVEL" not in main.variables_of_workers(config, device)
