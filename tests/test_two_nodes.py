# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_two_nodes.py
"""A cluster of two nodes trains as one node does; a run that loses a node goes on with another, and ends without."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.batches import ROWS, write_dataset
from tests.pool import run_shared
from tests.test_training_run import ROOT, arguments, lines_of
from verl.trainer.config import load_config

pytestmark = pytest.mark.ray

STEPS = 3
"""The node leaves in the last of them."""


@pytest.fixture(scope="module")
def args(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run that depends on how it is spread over nodes in nothing but that."""
    data = write_dataset(tmp_path_factory.mktemp("data") / "data.parquet", ROWS, copies=3)
    data_files = [f"data.train_files={data}", f"data.val_files={data}"]
    settings = ["worker.actor.global_batch_size=4", f"trainer.max_steps={STEPS}", "trainer.val_before_train=false"]
    settings += ["algorithm.enable_token_weights=true", "worker.rollout.collect_attentions=true"]
    return arguments(tiny_model_path, data_files, tmp_path_factory.mktemp("unused"), *settings)


@pytest.fixture(scope="module")
def two_nodes(args: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict]]:
    """What the script says, and what its run logged.

    In a process of its own, since this one is connected to another cluster, and with a Ray folder of its own, where no
    other program looks for a cluster to join. Its name is short: sockets in it have a limit of 107 characters.
    """
    folder = tmp_path_factory.mktemp("two")
    settings = [f"trainer.save_checkpoint_path={folder}", "trainer.nnodes=2", "trainer.n_gpus_per_node=2"]
    settings += ["trainer.save_freq=2", "trainer.max_restarts=1"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as ray_folder:
        finished = subprocess.run(
            [sys.executable, "-m", "tests.two_nodes", *args, *settings],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": ray_folder},
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1]), lines_of(folder / "experiment_log.jsonl")


def test_ranks_are_numbered_node_by_node(two_nodes: tuple[dict[str, Any], list[dict]]) -> None:
    nodes = two_nodes[0]["nodes"][0]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]


def test_two_nodes_train_as_one_does(
    two_nodes: tuple[dict[str, Any], list[dict]], args: list[str], tmp_path: Path, ray_cluster
) -> None:
    """Losses, gradients, rewards, advantages, lengths and token weights of two steps, with as many workers."""
    run_shared(load_config([*args, f"trainer.save_checkpoint_path={tmp_path}", "trainer.n_gpus_per_node=4"]))
    # The node leaves in the last step, which may have been logged by then.
    one, two = (lines[: STEPS - 1] for lines in (lines_of(tmp_path / "experiment_log.jsonl"), two_nodes[1]))
    assert len(one) == len(two) == STEPS - 1
    for record, expected in zip(two, one, strict=True):
        assert record.keys() == expected.keys()
        for area in set(expected) - {"step", "timing_s", "timing_per_token_ms", "perf"}:
            assert flat(record[area]) == pytest.approx(flat(expected[area]), rel=1e-5, abs=1e-5), area
        assert expected["actor"]["grad_norm"] > 1e-2
        assert expected["token_weights"]["std"] > 1e-3


def test_a_node_that_leaves_ends_the_run_with_its_name_and_its_ranks(
    two_nodes: tuple[dict[str, Any], list[dict]],
) -> None:
    left, error = two_nodes[0]["left"][-1], two_nodes[0]["error"]
    assert f"(Ray node {left[:8]}) has left the Ray cluster, and rank 2, rank 3 with it" in error
    assert "trainer.find_last_checkpoint=true" in error


def test_a_run_goes_on_by_itself_with_a_node_that_came_later(two_nodes: tuple[dict[str, Any], list[dict]]) -> None:
    first, second = two_nodes[0]["nodes"]
    gone, stayed = first[2], first[0]
    assert gone == two_nodes[0]["left"][0]
    assert stayed in second and gone not in second
    assert second[0] == second[1] != second[2] == second[3]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    result = {}
    for key, value in values.items():
        result.update(flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value})
    return result
