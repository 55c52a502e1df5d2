# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_faults.py
"""A run that ends at any point goes on from its last checkpoint as if nothing had happened."""

import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.faults import Ended, fault_before
from tests.pool import run_shared
from tests.test_training_run import ROOT, arguments, is_changed, lines_of, weights_at
from verl.trainer.config import load_config
from verl.utils.safe_load import load_tensors

SETTINGS = ("trainer.save_freq=1", "trainer.val_before_train=false", "trainer.max_steps=3", "trainer.save_limit=2")

TRAINER = "verl.trainer.ray_trainer:RayDAPOTrainer"
STATE = "verl.trainer.run_state"

POINTS = {
    "before the responses of step 2": (f"{TRAINER}._rollout", 2, [1]),
    "before the update of step 2": (f"{TRAINER}._update_actor", 2, [1]),
    "before step 2 is saved": (f"{TRAINER}._save_if_due", 2, [1]),
    "while step 2 is saved": (f"{STATE}:RunState._write_own", 2, [1]),
    "before step 2 is logged": (f"{TRAINER}._log", 2, [1]),
    "between log and name of step 2": (f"{TRAINER}._name_checkpoint", 2, [1]),
    "before the manifest of step 2": (f"{STATE}:write_manifest", 2, [1]),
    "between name and tracker of step 2": (f"{STATE}:write_tracker", 2, [1, 2]),
    "before step 1 goes": (f"{STATE}:remove_obsolete_ckpt", 3, [1, 2, 3]),
}
"""By what they are: the function that is not called any more, which of its calls, and the whole checkpoints then."""


@pytest.fixture(scope="module")
def whole(tiny_model_path: str, data_files: list[str], tmp_path_factory: pytest.TempPathFactory, ray_cluster) -> Path:
    """Folder of the run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run_shared(load_config(arguments(tiny_model_path, data_files, folder, *SETTINGS)))
    return folder


def steps_logged(folder: Path) -> list[int]:
    return [line["step"] for line in lines_of(folder / "experiment_log.jsonl") if "actor" in line]


CASES = [(point, False) for point in POINTS] + [(point, True) for point in list(POINTS)[4:7]]


def random_numbers(folder: Path) -> list[Any]:
    """What the worker's generators would give after step 3."""
    states = load_tensors(folder / "global_step_3" / "actor" / "extra_state_world_size_1_rank_0.pt")["rng"]
    torch_generator, numpy_generator, generator = torch.Generator(), np.random.RandomState(0), random.Random()
    torch_generator.set_state(states["cpu"])
    numpy_generator.set_state(states["numpy"])
    generator.setstate(states["random"])
    return [torch.rand(1, generator=torch_generator).item(), numpy_generator.rand(), generator.random()]


@pytest.mark.parametrize(("point", "in_background"), CASES)
def test_a_run_that_ends_anywhere_goes_on_to_the_same_weights_with_every_step_logged_once(
    point: str, in_background: bool, whole: Path, tiny_model_path: str, data_files: list[str], tmp_path: Path
) -> None:
    place, call, steps = POINTS[point]
    is_async = f"trainer.save_async={str(in_background).lower()}"
    config = load_config(arguments(tiny_model_path, data_files, tmp_path, *SETTINGS, is_async))
    with pytest.raises(Ended), fault_before(place, call):
        run_shared(config)
    names = {path.name for path in tmp_path.glob("global_step_*") if re.fullmatch(r"global_step_\d+", path.name)}
    if not in_background:
        assert names == {f"global_step_{step}" for step in steps}
        # A step that can be resumed from is in the log.
        assert set(steps) <= set(steps_logged(tmp_path))

    run_shared(config)
    assert steps_logged(tmp_path) == [1, 2, 3]
    assert not is_changed(weights_at(whole, 3), weights_at(tmp_path, 3))
    assert {path.name for path in tmp_path.glob("global_step_*")} == {"global_step_2", "global_step_3"}
    assert not list(tmp_path.glob("**/*.tmp"))
    assert random_numbers(whole) == random_numbers(tmp_path)


def test_a_driver_that_is_killed_between_log_and_name_goes_on_to_the_same_weights(
    whole: Path, tiny_model_path: str, data_files: list[str], tmp_path: Path
) -> None:
    """With a cluster of its own, as from the command line."""
    args = arguments(tiny_model_path, data_files, tmp_path, *SETTINGS)
    place, call, _ = POINTS["between log and name of step 2"]
    killed = subprocess.run([sys.executable, "-m", "tests.faults", place, str(call), *args], cwd=ROOT, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert steps_logged(tmp_path) == [1, 2]
    assert {path.name for path in tmp_path.glob("global_step_*")} == {"global_step_1", "global_step_2.unfinished"}
    run_shared(load_config(args))
    assert steps_logged(tmp_path) == [1, 2, 3]
    assert not is_changed(weights_at(whole, 3), weights_at(tmp_path, 3))
