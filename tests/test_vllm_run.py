# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_vllm_run.py
"""Whole runs with vLLM: VGR weights from its rollouts, the same run twice, adapters, and engines that fail."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
import torch

from tests.batches import ROWS, write_dataset
from tests.processes import processes_marked
from tests.test_training_run import arguments, command, lines_of
from tests.tiny import make_tiny_model
from verl.trainer.config import load_config
from verl.trainer.main import run

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="these runs are on CPUs; tests/test_gpu.py has one on a GPU"),
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Heads of 32 dimensions, the least that vLLM's attention on CPUs takes."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=128)


@pytest.fixture(scope="module")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = write_dataset(tmp_path_factory.mktemp("data") / "train.parquet", ROWS, copies=2)
    return [f"data.train_files={path}", f"data.val_files={path}"]


def with_vllm(model_path: str, data_files: list[str], output: Path, *overrides: str) -> list[str]:
    engine = ("worker.rollout.name=vllm", "worker.rollout.tensor_parallel_size=1", "trainer.max_steps=2")
    return arguments(model_path, data_files, output, *engine, *overrides)


def test_token_weights_come_from_vllms_rollouts_and_a_seed_repeats_the_run(
    model_path: str, data_files: list[str], tmp_path: Path, ray_cluster
) -> None:
    """Two steps, so that the second rollout is one of updated weights; half of each step's rows have an image."""
    weighted = (
        "data.shuffle=false",
        "algorithm.enable_token_weights=true",
        "worker.rollout.collect_attentions=true",
        "worker.rollout.importance_cap=2.0",
        "trainer.val_freq=1",
    )
    runs, weights = [], []
    for name in ("first", "again"):
        run(load_config(with_vllm(model_path, data_files, tmp_path / name, *weighted)))
        records = lines_of(tmp_path / name / "experiment_log.jsonl")
        runs.append([record for record in records if "actor" in record])
        weights.append(torch.load(tmp_path / name / "global_step_2" / "actor" / "model_world_size_1_rank_0.pt"))
    for record, again in zip(*runs, strict=True):
        assert record["token_weights"]["std"] > 0
        assert 0 < record["token_weights"]["weighted_rows"] <= 0.5  # rows without an image weigh one
        assert record["vgr"]["mean"] > 0
        assert record["actor"]["grad_norm"] > 0
        assert record["rollout"]["log_prob_diff_max"] < 1e-4
        assert record["rollout"]["importance_weight_mean"] == pytest.approx(1, abs=1e-4)
        for area in ("actor", "reward", "token_weights", "rollout"):
            assert record[area] == again[area]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_vllm_draws_from_adapters_that_train(
    model_path: str, data_files: list[str], tmp_path: Path, ray_cluster
) -> None:
    """From the second step on the policy has left the base, as the KL loss tells, and vLLM has left it too: its
    log-probabilities are still the trainer's."""
    adapters = ("worker.actor.model.lora.rank=4", "worker.actor.optim.lr=1e-2")
    run(load_config(with_vllm(model_path, data_files, tmp_path, *adapters)))
    records = [record for record in lines_of(tmp_path / "experiment_log.jsonl") if "actor" in record]
    assert len(records) == 2
    assert records[1]["actor"]["kl_loss"] > 1e-3
    for record in records:
        assert record["rollout"]["log_prob_diff_max"] < 1e-4
    assert (tmp_path / "global_step_2" / "actor" / "lora_adapter" / "adapter_model.safetensors").exists()


def test_an_engine_that_cannot_start_ends_the_run_with_its_own_error_and_no_process_left(
    model_path: str, data_files: list[str], tmp_path: Path
) -> None:
    """Longer sequences than the model's positions reach."""
    mark = uuid.uuid4().hex
    too_long = ("worker.rollout.max_model_len=100000000", "worker.rollout.max_num_batched_tokens=100000000")
    finished = command(*with_vllm(model_path, data_files, tmp_path, *too_long), mark=mark)
    assert finished.returncode == 1
    assert "max_model_len" in finished.stderr
    assert "in from_config" in finished.stderr
    assert not re.search("Triton|FutureWarning|NUMA binding|safetensors", finished.stdout + finished.stderr)
    assert processes_marked(mark) == []


def test_an_engine_that_dies_while_it_generates_ends_the_run_within_seconds_and_leaves_no_process(
    model_path: str, data_files: list[str], tmp_path: Path
) -> None:
    """Two workers, each with its own engine; one worker is killed."""
    mark = uuid.uuid4().hex
    endless = (
        "trainer.n_gpus_per_node=2",
        "data.max_response_length=900",
        "worker.rollout.ignore_eos=true",
        "worker.rollout.max_num_batched_tokens=8192",
        "trainer.val_before_train=false",
        "trainer.logger=[console]",
    )
    started = subprocess.Popen(
        [sys.executable, "-m", "verl.trainer.main", *with_vllm(model_path, data_files, tmp_path, *endless)],
        cwd=ROOT,
        env={**os.environ, "VERL_TEST_MARK": mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    worker = _worker_that_generates(started)
    os.kill(worker, signal.SIGKILL)
    died = time.monotonic()
    _, errors = started.communicate(timeout=120)
    assert started.returncode == 1
    assert "ActorDiedError" in errors
    assert time.monotonic() - died < 60
    assert processes_marked(mark) == []


def _worker_that_generates(run: subprocess.Popen) -> int:
    """Ray names an actor's process after the method that it runs."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert run.poll() is None, run.stderr.read()
        for process in psutil.Process(run.pid).children(recursive=True):
            try:
                if "generate_sequences" in " ".join(process.cmdline()):
                    return process.pid
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.2)
    raise AssertionError("no worker began to generate")
