# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_lasting_output.py
"""A run goes on when nobody reads its console any more: behind a pipe, or after its terminal was closed."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.test_stop_request import wait_for_steps
from tests.test_training_run import ROOT, arguments, lines_of

PROGRAM = """
import logging, subprocess, sys
from verl.utils.lasting_output import survive_lost_readers

survive_lost_readers()
logging.basicConfig()
print("read")
sys.stdin.read()
for number in range(3):
    print("lost", number)
    print("lost", number, file=sys.stderr)
    logging.warning("lost %d", number)
subprocess.run(["echo", "lost"], check=True)
open(sys.argv[1], "w").write("went on")
"""


def test_a_program_outlives_the_reader_of_its_pipe_and_ends_well(tmp_path: Path) -> None:
    """Nor do the programs fail that it starts afterwards."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as program:
        assert program.stdout.readline() == "read\n"
        program.stdout.close()
        program.stdin.close()
    assert program.returncode == 0
    assert (tmp_path / "file").read_text() == "went on"


@pytest.mark.ray
def test_a_run_goes_on_when_its_terminal_is_closed(
    tiny_model_path: str, data_files: list[str], tmp_path: Path
) -> None:
    """The terminal sends SIGHUP to all of the run's processes that belong to it, and takes no more output."""
    args = arguments(tiny_model_path, data_files, tmp_path, "trainer.max_steps=12", "trainer.logger=[console,file]")
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))  # a second bar takes a second row
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "verl.trainer.main", *args])
    seen = b""
    while b"validation 5/5 prompts" not in seen:  # of a progress bar, which a terminal alone has
        seen += os.read(terminal, 1000)
    wait_for_steps(tmp_path, 1)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert [record["step"] for record in lines_of(tmp_path / "experiment_log.jsonl") if "actor" in record] == [
        *range(1, 13)
    ]
    assert (tmp_path / "global_step_12").is_dir()
