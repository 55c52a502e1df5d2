# SPDX-License-Identifier: Apache-2.0
"""What every test shares: one thread per process, a Ray with a token, and one tiny model for the whole session."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

# Two threads in each of several processes on two cores are ten times slower than one; torch and Ray read these once,
# when they are first imported.
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="token",
    RAY_DEDUP_LOGS="0",
)
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())  # one for all processes of the tests
if shutil.which("nvidia-smi") is None and not any(Path("/dev").glob("nvidia[0-9]*")):  # containers may lack either
    # Without a GPU, Triton kernels run in Python. Triton reads this when a kernel is defined, so when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import pytest

if TYPE_CHECKING:
    from PIL import Image


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files with tests on a cluster first: they take longest, and pytest-xdist hands files out in order."""
    for item in items:
        if "ray_cluster" in item.fixturenames:
            item.add_marker("ray")
    long_files = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in long_files)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Qwen2.5-VL with its processor; tests read it and never write into it."""
    from tests.tiny import make_tiny_model  # here, so that tests which need no model do not load torch

    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="module")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A training set of 24 rows and a held-out set of 5 (no multiple of any batch size), half of them text only."""
    from tests.batches import ROWS, write_dataset

    folder = tmp_path_factory.mktemp("data")
    (folder / "val").mkdir()
    train = write_dataset(folder / "train.parquet", ROWS, copies=6)
    val = write_dataset(folder / "val" / "val.parquet", [*ROWS, ROWS[0]])
    return [f"data.train_files={train}", f"data.val_files={val}"]


@pytest.fixture(scope="session")
def tokenizer(tiny_model_path: str):
    """The tiny model's tokenizer."""
    from verl.utils.tokenizer import get_tokenizer

    return get_tokenizer(tiny_model_path)


@pytest.fixture
def make_manager(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """From the source of a reward function's file to what scores with it, in this process."""
    from verl.workers.reward import calls
    from verl.workers.reward.config import RewardConfig
    from verl.workers.reward.function import AutoRewardManager

    monkeypatch.setattr(calls, "RETRY_PAUSE_SECONDS", 0.01)

    def make(source: str, name: str = "compute_score", **settings: Any) -> AutoRewardManager:
        path = tmp_path / "my_reward.py"
        path.write_text(dedent(source))
        return AutoRewardManager(RewardConfig(reward_function=f"{path}:{name}", **settings), tokenizer)

    return make


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what `datasets` converts out of the user's own cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def ray_cluster():
    """One Ray for all tests that need it; more CPUs than cores, since workers mostly wait for each other."""
    import ray

    ray.init("local", num_cpus=16, include_dashboard=False, logging_level="ERROR", object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def lone_process_group():
    """A default process group of one rank in this very process, without a port."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two_ranks(tiny_model_path: str, ray_cluster):
    """Two workers that share the tiny model; tests leave its weights as they find them."""
    from tests.probe import make_config, start_two

    group = start_two(make_config(tiny_model_path, "worker.actor.micro_batch_size_per_device_for_update=2"))
    yield group
    group.release()


@pytest.fixture
def processed_images(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """The images that Qwen-VL processors have been given."""
    from transformers import Qwen2VLImageProcessor

    images_seen = []
    preprocess = Qwen2VLImageProcessor.preprocess

    def counting(self: Qwen2VLImageProcessor, images: list[Image.Image], **options: object) -> object:
        images_seen.extend(images)
        return preprocess(self, images, **options)

    monkeypatch.setattr(Qwen2VLImageProcessor, "preprocess", counting)
    return images_seen
