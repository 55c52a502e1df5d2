# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_help.py
"""What `--help` says of every key, on a terminal, in a pipe, and to whom asks for less; and the command `verl`."""

import fcntl
import os
import pty
import runpy
import struct
import subprocess
import sys
import termios
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest
import setuptools

from verl.config import as_yaml
from verl.trainer import main
from verl.trainer.config import PPOConfig
from verl.trainer.help_text import field_docstrings, help_text
from verl.utils.lean_imports import import_object

ROOT = Path(__file__).resolve().parent.parent

SAVE_FREQ = """\
  trainer.save_freq=-1 (a whole number)
      Steps between checkpoints; 0 or less saves only at the end.
"""


def ask(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "verl.trainer.main", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def keys_of(section: type, prefix: str = "") -> dict[str, tuple]:
    """By full key: the field, and what stands under it."""
    found = {}
    for field in fields(section):
        if is_dataclass(field.type):
            found |= keys_of(field.type, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = (field, field_docstrings(section)[field.name])
    return found


def test_every_key_is_there_with_its_default_its_type_and_its_meaning() -> None:
    text = " ".join(help_text(PPOConfig, [], width=120).split())
    keys = keys_of(PPOConfig)
    assert len(keys) > 150
    for key, (field, docstring) in keys.items():
        default = field.default if field.default is not MISSING else field.default_factory()
        written = as_yaml(default) or '""'
        begin = f" {key}={written} ("
        assert text.count(begin) == 1, key
        after = text.partition(begin)[2]
        assert " ".join(docstring.split()) in after[:900], key


@pytest.mark.parametrize(
    ("key", "head"),
    [
        ("algorithm.kl_penalty", "algorithm.kl_penalty=kl (one of kl, abs, mse, low_var_kl, full)"),
        ("trainer.max_steps", "trainer.max_steps=null (a whole number or null)"),
        ("data.train_files", 'data.train_files="" (a text or a list)'),
        ("algorithm.token_weight_layers", "algorithm.token_weight_layers=null (a text or a list, or null)"),
        ("algorithm.token_weight_clip", "algorithm.token_weight_clip=[0.2,3.0] (a list of 2 numbers)"),
        ("worker.critic.padding_free", "worker.critic.padding_free=false (true or false)"),
    ],
)
def test_a_key_stands_as_one_would_write_it(key: str, head: str) -> None:
    assert help_text(PPOConfig, [key], width=120).splitlines()[0].strip() == head


def test_a_section_is_its_keys_and_those_of_the_sections_below_it() -> None:
    text = help_text(PPOConfig, ["worker.actor.model"], width=100)
    heads = [line.strip().partition("=")[0] for line in text.splitlines() if line.startswith("  worker")]
    expected = keys_of(PPOConfig.__dataclass_fields__["worker"].type, "worker.")
    assert heads == [key for key in expected if key.startswith("worker.actor.model.")]
    assert text.startswith("worker.actor.model: Which model to load and how to hold it in memory.\n")
    assert "\nworker.actor.model.lora: Low-rank adapters on the policy's linear layers.\n" in text


@pytest.mark.parametrize("width", [40, 77, 120])
def test_no_line_is_wider_than_asked_unless_a_word_is(width: int) -> None:
    for line in help_text(PPOConfig, [], width).splitlines():
        assert len(line) <= width or len(line.split()) == 1 or line.startswith(("usage", "      ")), line


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("algoritm", "did you mean algorithm?"),
        ("save_freq", "did you mean trainer.save_freq?"),
        ("trainer.optim", "did you mean worker.actor.optim?"),
        ("qqq", "the sections are data, worker, algorithm, trainer"),
    ],
)
def test_a_name_that_is_none_is_told_with_the_nearest_one(wrong: str, nearest: str) -> None:
    with pytest.raises(ValueError) as caught:
        help_text(PPOConfig, ["data", wrong])
    assert str(caught.value) == f"no section or key is called {wrong!r}; {nearest}"


def test_the_command_line_answers_with_what_was_asked_for_alone() -> None:
    """What stands before the flag, or has an equals sign, is of the run that somebody was about to start."""
    asked = ask("config=no.yaml", "trainer.save_freq", "--help", "trainer.save_freq", "data.seed=2")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, SAVE_FREQ, "")
    wrong = ask("--help", "algoritm")
    message = "no section or key is called 'algoritm'; did you mean algorithm?\n"
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", message)


def test_a_reader_that_has_seen_enough_ends_no_help_with_an_error() -> None:
    shell = f"{sys.executable} -m verl.trainer.main --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    finished = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=60)
    usage = "usage: verl [config=FILE] [key=value ...] [--dry-run]"
    assert (finished.stdout.splitlines(), finished.stderr) == ([usage, "0"], "")


@pytest.mark.parametrize("columns", [60, 90])
def test_a_terminal_gets_lines_of_its_own_width(columns: int) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        os.chdir(ROOT)
        variables = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        command = [sys.executable, "-m", "verl.trainer.main", "--help", "algorithm"]
        os.execve(sys.executable, command, variables)  # libraries may have set COLUMNS behind Python's back
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how a terminal says that its program is gone
            break
        if not piece:
            break
        shown += piece
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    widths = [len(line) for line in shown.decode().splitlines() if len(line.split()) > 1]
    assert columns - 15 < max(widths) <= columns


def test_the_command_verl_is_main(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    described: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **settings: described.update(settings))
    runpy.run_path("setup.py")
    (script,) = described["entry_points"]["console_scripts"]
    command, _, target = script.partition(" = ")
    assert (command, import_object(target)) == ("verl", main.main)
