# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_packaging.py
"""The ranges that the package asks for, against the pins that were tested; and the checks before a commit."""

import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What setup.py says."""
    monkeypatch.chdir(ROOT)
    described: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: described.update(given))
    runpy.run_path("setup.py")
    return described


@pytest.fixture
def pins() -> dict[str, str]:
    """Versions in requirements.txt by name."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {one.name: str(one.specifier).removeprefix("==") for one in requirements}


def test_every_range_holds_the_pin_that_was_tested(settings: dict, pins: dict[str, str]) -> None:
    for line in settings["install_requires"]:
        requirement = Requirement(line)
        assert pins[requirement.name] in requirement.specifier, line


def test_every_pin_is_asked_for_by_the_package_or_by_an_extra(settings: dict, pins: dict[str, str]) -> None:
    lines = [*settings["install_requires"], *(line for extra in settings["extras_require"].values() for line in extra)]
    assert set(pins) - {Requirement(line).name for line in lines} == set()


def test_no_range_is_a_pin_so_that_an_installed_torch_may_stay(settings: dict) -> None:
    ranges = {Requirement(line).name: Requirement(line).specifier for line in settings["install_requires"]}
    operators = {name: {part.operator for part in range_} for name, range_ in ranges.items()}
    assert {name for name, of_range in operators.items() if of_range & {"==", "===", "~="}} == set()
    assert "2.11.0" in ranges["torch"]
    assert "2.14.1+cu130" in ranges["torch"]


def test_the_checks_before_a_commit_are_those_of_the_tests_script() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    commands = {hook["entry"] for hook in repository["hooks"]}
    script = (ROOT / "scripts" / "run_tests.sh").read_text()
    assert {"python -m ruff check", "python -m mypy"} <= commands
    assert '"$python" -m ruff check .' in script
    assert '"$python" -m mypy' in script


def test_the_type_checker_finds_a_wrong_type_on_the_public_surface(tmp_path: Path) -> None:
    source = "from verl.protocol import DataProto\nlength: str = len(DataProto())\nrow: int = DataProto()[0:1]\n"
    (tmp_path / "wrong.py").write_text(source)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "--config-file", "pyproject.toml"]
    finished = subprocess.run([*command, tmp_path / "wrong.py"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 1
    assert 'has type "int", variable has type "str"' in finished.stdout
    assert 'has type "DataProto", variable has type "int"' in finished.stdout


def test_asking_how_the_tests_are_run_installs_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"VERL_VENV": str(tmp_path / "venv"), "PYTHON": "false"}
    command = ["bash", "scripts/run_tests.sh", "--help"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("usage: bash scripts/run_tests.sh")
    assert not (tmp_path / "venv").exists()


def test_an_installation_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    """Also where the caller tests the result, which switches `set -e` off."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "python"
    stub.write_text('#!/bin/sh\ncase "$*" in *pip*) echo no such package; exit 1;; esac\n')
    stub.chmod(0o755)
    program = "set -euo pipefail; source scripts/environment.sh; prepare_environment || exit 7"
    for _ in range(2):
        tried = subprocess.run(
            ["bash", "-c", program],
            cwd=ROOT,
            env=os.environ | {"VERL_VENV": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert tried.returncode == 7
        assert "no such package" in tried.stderr and "failed; the whole output is in" in tried.stderr
    assert not list(tmp_path.glob("*.sha256"))


def test_a_source_distribution_can_be_installed(tmp_path: Path) -> None:
    """setup.py reads requirements.txt, which setuptools would leave out."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(tmp_path, filter="data")
    (folder,) = (path for path in tmp_path.glob("verl-*") if path.is_dir())
    version = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert version.returncode == 0, version.stderr
    assert (folder / "verl" / "report" / "templates").is_dir()
