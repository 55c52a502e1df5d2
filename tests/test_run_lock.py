# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_run_lock.py
"""A folder belongs to one run at a time, and to none that is gone."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_training_run import ROOT, arguments, command
from verl.utils.run_lock import FolderInUse, FolderRefused, locked_folder

HOLDER = """
import os, sys, time
from verl.utils.run_lock import locked_folder

with locked_folder(sys.argv[1]):
    forked = os.fork()  # as worker processes of a data loader are
    if forked:
        print(forked, flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """A process that has locked `tmp_path`, and the pid of its fork."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        forked = int(process.stdout.readline())
        yield process, forked
        process.kill()
        os.kill(forked, signal.SIGKILL)


def test_a_second_run_is_told_who_has_the_folder(holder, tmp_path: Path) -> None:
    owner = rf"is in use by another run, process {holder[0].pid} on {socket.gethostname()}: "
    with pytest.raises(FolderInUse, match=owner), locked_folder(str(tmp_path)):
        pass


def test_the_folder_is_free_when_its_run_is_killed_though_a_fork_of_it_lives(holder, tmp_path: Path) -> None:
    process, forked = holder
    process.kill()
    process.wait()
    assert Path(f"/proc/{forked}").exists()
    with locked_folder(str(tmp_path)):
        pass


def test_the_command_line_refuses_a_folder_in_use_within_seconds_and_leaves_it_alone(
    holder, tiny_model_path: str, data_files: list[str], tmp_path: Path
) -> None:
    log = tmp_path / "experiment_log.jsonl"
    log.write_text('{"step": 1}\n')
    (tmp_path / "global_step_2.unfinished").mkdir()
    start = time.monotonic()
    finished = command(*arguments(tiny_model_path, data_files, tmp_path))
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert (
        f"trainer.save_checkpoint_path={tmp_path} is in use by another run, process {holder[0].pid}" in finished.stderr
    )
    assert time.monotonic() - start < 20
    assert log.read_text() == '{"step": 1}\n'
    assert (tmp_path / "global_step_2.unfinished").is_dir()


@pytest.mark.parametrize("place", ["a_file", "a_file/below", "/proc/no/such"])
def test_a_folder_that_cannot_be_made_is_refused_by_the_key(place: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    with pytest.raises(FolderRefused, match=r"trainer.save_checkpoint_path=.* cannot be written to \(.*\); name a"):
        with locked_folder(str(tmp_path / place)):
            pass
