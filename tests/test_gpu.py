# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_gpu.py
"""What only a CUDA device can show: the run goes there by itself, and offloaded memory comes back."""

from pathlib import Path

import pytest
import torch

from tests.batches import ROWS, write_dataset
from tests.test_training_run import arguments, command, lines_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_run_goes_to_the_gpu_by_itself_in_bf16_with_everything_offloaded_between_phases(
    tiny_model_path: str, tmp_path: Path
) -> None:
    train = write_dataset(tmp_path / "train.parquet", ROWS, copies=2)
    args = arguments(
        tiny_model_path,
        [f"data.train_files={train}", f"data.val_files={train}"],
        tmp_path / "run",
        "worker.actor.fsdp.mp_param_dtype=bf16",
        "worker.rollout.dtype=bf16",
        "worker.actor.offload.offload_params=true",
        "worker.actor.offload.offload_optimizer=true",
        "worker.ref.offload.offload_params=true",
        "trainer.max_steps=2",
    )
    finished = command(*args)
    assert finished.returncode == 0, finished.stderr
    assert "running on cuda: 1 worker" in finished.stderr
    steps = [record for record in lines_of(tmp_path / "run" / "experiment_log.jsonl") if "actor" in record]
    assert len(steps) == 2
    assert all(record["perf"]["max_memory_allocated_gb"] > 0 for record in steps)
    assert all(record["actor"]["grad_norm"] > 0 for record in steps)
