# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_host_memory.py
"""Images cross the wire once and are let go: a batch carries none, and a long run's host memory does not grow."""

import pickle
from statistics import median
from typing import Any

import psutil
import pytest
import ray
import torch
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from transformers import Qwen2VLImageProcessor

from tests.batches import random_image, write_dataset
from tests.pool import new_processes, pids_of
from tests.test_training_run import arguments
from tests.tiny import make_tiny_model
from verl.data.vision import MediaHandle
from verl.protocol import DataProto
from verl.trainer.config import load_config
from verl.trainer.main import run
from verl.trainer.ray_trainer import RayDAPOTrainer
from verl.trainer.step_record import StepRecord
from verl.utils.tokenizer import get_processor

STEPS = 50
WINDOW = 10
"""Steps whose median is compared: the second ten, when buffers and caches have their sizes, with the last ten."""
IMAGES_A_STEP = 4
IMAGE = (512, 512)
MIB = 2**20
ONE_COPY_KEPT = 3 * WINDOW * IMAGES_A_STEP * 3 * IMAGE[0] * IMAGE[1]
"""Growth of memory in bytes from one window to the other if every image were kept once: 90 MiB."""
BOUND = 15 * MIB
"""Without a leak the median grows by up to 4 MiB in a worker, of 460, and by less than 1 MiB elsewhere."""


def host_memory(workers: list[int]) -> dict[str, int]:
    """Bytes: what each process of the run holds by itself, and what lies in Ray's object store or was spilled from it.

    The store is memory that processes share, and part of the resident set of each that has read in it.

    Args:
        workers: the process ids of the run's workers.
    """
    store = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    memory = {"object store": store.object_store_bytes_used + store.spilled_bytes_total}
    driver = psutil.Process()
    memory["driver"] = _private(driver)
    for process in driver.children(recursive=True):
        name = process.cmdline()[0] if process.cmdline() else ""
        if process.pid in workers or name.startswith("ray::RewardProcess"):
            memory[f"{name} {process.pid}"] = _private(process)
    return memory


def _private(process: psutil.Process) -> int:
    memory = process.memory_info()
    return memory.rss - memory.shared


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model, with an image processor that makes at most 64 tokens of an image, however large."""
    path = make_tiny_model(tmp_path_factory.mktemp("model"))
    processor = get_processor(path)
    processor.image_processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=64 * 28 * 28)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def long_run(
    model_path: str, tmp_path_factory: pytest.TempPathFactory, ray_cluster
) -> tuple[list[dict[str, int]], list[float]]:
    """Two workers, VGR and five validations: `host_memory` after each of `STEPS` steps, and bytes a row of all batches
    sent, tensors left aside."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"images": [IMAGE], "prompt": "<image>What is in the picture?", "answer": "1"}]
    data = write_dataset(folder / "data.parquet", rows, copies=2 * IMAGES_A_STEP)
    args = arguments(
        model_path,
        [f"data.train_files={data}", f"data.val_files={data}"],
        folder,
        f"data.rollout_batch_size={IMAGES_A_STEP}",
        "data.mini_rollout_batch_size=null",
        "data.val_batch_size=4",
        "data.max_prompt_length=128",
        "data.max_response_length=4",
        "algorithm.enable_token_weights=true",
        f"worker.actor.global_batch_size={IMAGES_A_STEP}",
        "worker.rollout.collect_attentions=true",
        "worker.rollout.n=2",
        "trainer.n_gpus_per_node=2",
        f"trainer.max_steps={STEPS}",
        "trainer.val_freq=10",
        "trainer.val_before_train=false",
    )
    memory, bytes_a_row = [], []
    log, getstate = RayDAPOTrainer._log, DataProto.__getstate__

    def measure(trainer: RayDAPOTrainer, batch: DataProto, record: StepRecord) -> None:
        log(trainer, batch, record)
        memory.append(host_memory(pids))

    def weigh(batch: DataProto) -> dict[str, Any]:
        # Not with Ray's pickle, which outside of its own calls pins what it meets for good.
        bytes_a_row.append(len(pickle.dumps(batch.non_tensor_batch)) / len(batch))
        return getstate(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RayDAPOTrainer, "_log", measure)
        patch.setattr(DataProto, "__getstate__", weigh)
        with new_processes(2) as processes:
            pids = pids_of(processes)
            run(load_config(args), processes)
    return memory, bytes_a_row


def test_host_memory_is_flat_over_fifty_steps(long_run: tuple[list[dict[str, int]], list[float]]) -> None:
    """In every process, in the object store and on the disk it spills to."""
    memory, _ = long_run
    assert len(memory) == STEPS
    assert len(memory[0]) == 5  # driver, two workers, reward function, object store
    assert all(sample.keys() == memory[0].keys() for sample in memory)
    assert ONE_COPY_KEPT > 5 * BOUND
    growth = {
        name: (_median(memory[-WINDOW:], name) - _median(memory[WINDOW : 2 * WINDOW], name)) / MIB
        for name in memory[0]
    }
    assert max(growth.values()) * MIB < BOUND, f"growth in MiB: {growth}"


def test_no_batch_of_a_run_carries_pixels(long_run: tuple[list[dict[str, int]], list[float]]) -> None:
    """An image has 768 KiB; beside its tensors a row has a few texts, its prompt's ids and a handle."""
    _, bytes_a_row = long_run
    assert len(bytes_a_row) > 5 * STEPS
    assert max(bytes_a_row) < 2_000


def test_a_batch_weighs_the_same_whatever_the_size_of_its_images(ray_cluster) -> None:
    """And its n samples of a prompt share the handle."""

    def weight(size: tuple[int, int], n: int) -> int:
        handles = [[MediaHandle.put(random_image(size, seed))] for seed in range(3)]
        batch = DataProto.from_dict({"input_ids": torch.zeros(3, 1)}, {"multi_modal_data": handles})
        return len(pickle.dumps(batch.repeat(n).select([])))

    assert weight((28, 28), 1) == weight((1024, 1024), 1)
    assert weight((28, 28), 50) - weight((28, 28), 1) < 3 * 50 * 10


def _median(samples: list[dict[str, int]], name: str) -> float:
    return median(sample[name] for sample in samples)
