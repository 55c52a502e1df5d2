# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_cluster_guard.py
"""Whatever ends a driver, nothing is left of the Ray cluster that it started, nor of what that started."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from tests.processes import are_gone, is_running, processes_marked
from tests.test_stop_request import quiet, wait_for_steps
from tests.test_training_run import ROOT

SECONDS = 10
"""In which all has to be gone."""

DRIVER = """
import os, signal, subprocess, sys, time
from verl.trainer.cluster_guard import ClusterGuard

with ClusterGuard() as guard:
    with guard.mark_children():
        member = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, start_new_session=True)
    outsider = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, start_new_session=True)
    guard.remember(sys.argv[1])
    loader = os.fork()  # like a process of a data loader, it holds all pipes of the driver
    if loader == 0:
        time.sleep(1000)
    print(member.pid, outsider.pid, loader, flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["killed", "in order"])
def test_the_clusters_processes_and_spilled_objects_go_and_others_stay(end: str, tmp_path: Path) -> None:
    (tmp_path / "ray_spilled_objects_1").mkdir()
    (tmp_path / "logs").mkdir()
    script = [sys.executable, "-c", DRIVER, str(tmp_path), end]
    driver = subprocess.Popen(script, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    member, outsider, loader = map(int, driver.stdout.readline().split())
    try:
        driver.wait(timeout=SECONDS)
        deadline = time.monotonic() + SECONDS
        while is_running(member) or (tmp_path / "ray_spilled_objects_1").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert is_running(outsider)
        assert (tmp_path / "logs").exists()
    finally:
        os.kill(outsider, signal.SIGKILL)
        os.kill(loader, signal.SIGKILL)


@pytest.mark.ray
def test_a_killed_driver_leaves_no_process_of_its_run(
    tiny_model_path: str, data_files: list[str], tmp_path: Path
) -> None:
    """Nor a server that the reward function started in a session of its own."""
    mark = uuid.uuid4().hex
    reward = f"worker.reward.reward_function={ROOT}/tests/rewards.py:start_a_server"
    args = quiet(tiny_model_path, data_files, tmp_path, "trainer.max_steps=1000", reward)
    driver = subprocess.Popen(
        [sys.executable, "-m", "verl.trainer.main", *args],
        cwd=ROOT,
        env={**os.environ, "VERL_TEST_MARK": mark},
        stderr=subprocess.DEVNULL,
    )
    wait_for_steps(tmp_path, 1)
    members = [child.pid for child in psutil.Process(driver.pid).children(recursive=True)]
    marked = processes_marked(mark)
    commands = [" ".join(psutil.Process(pid).cmdline()) for pid in marked]
    assert any("raylet" in command for command in commands) and "sleep 1000" in commands
    driver.kill()
    driver.wait()
    assert are_gone({*members, *marked}, SECONDS)
    assert processes_marked(mark) == []
