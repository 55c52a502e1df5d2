# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_gpu.py
"""What only a CUDA device can show: the run goes there by itself, and offloaded memory comes back."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.batches import ROWS, write_dataset
from tests.test_training_run import arguments, command, lines_of
from verl.workers.fsdp2 import resident

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


@pytest.mark.parametrize("raises", [False, True])
def test_model_and_optimizer_rest_on_the_cpu_and_work_on_the_gpu_also_after_an_exception(raises: bool) -> None:
    model = nn.Linear(64, 64).cuda()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.ones(1, 64, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def places() -> set[str]:
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return {tensor.device.type for tensor in (*model.parameters(), *moments)}

    step()
    for _ in range(2):
        try:
            with resident(torch.device("cuda"), model, optimizer):
                assert places() == {"cuda"}
                step()
                if raises:
                    raise KeyError("in the middle of a phase")
        except KeyError:
            assert raises
        assert places() == {"cpu"}
