# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_mend_torchvision.py
"""The import hook, against a stand-in torchvision that breaks as the real CUDA wheel does beside a CPU-only torch."""

from __future__ import annotations

import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
# What torchvision does when it is imported: decorate an operator that its binary was to define.
DECORATE = (
    "import torch\n@torch.library.register_fake('torchvision::nms')\ndef nms(dets, scores, t): ...\nLOADED = True\n"
)


@pytest.fixture
def environment(tmp_path: Path) -> tuple[Path, Path]:
    """An environment with torch but its own packages, and its site-packages: (python, folder)."""
    venv.create(tmp_path, with_pip=False, symlinks=True)
    python = tmp_path / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site_packages = Path(subprocess.check_output([python, "-c", query], text=True).strip())
    # A plain path in a .pth file: the real environment's packages, without the .pth files among them.
    (site_packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python, site_packages


def install_package(site_packages: Path, name: str, code: str) -> None:
    (site_packages / name).mkdir()
    (site_packages / name / "__init__.py").write_text(code)


def run(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([python, *arguments], capture_output=True, text=True, check=False)


def test_a_torchvision_without_its_operators_is_mended_and_torch_stays_unloaded_until_then(environment) -> None:
    """Mending tells the error that users would see. After it the import works, but neither starting Python nor looking
    for the package (as transformers does) loads torch. A broken torchcodec looks uninstalled."""
    python, site_packages = environment
    install_package(site_packages, "torchvision", DECORATE)
    (site_packages / "torchvision" / "_C.so").write_bytes(b"not a library")
    install_package(site_packages, "torchcodec", "raise RuntimeError('linked against CUDA')")

    mended = run(python, SCRIPTS / "mend_torchvision.py")
    assert mended.returncode == 0, mended.stderr
    assert "operator torchvision::nms does not exist" in mended.stdout and "torchcodec" in mended.stdout

    check = """
import importlib.util, sys
assert importlib.util.find_spec("torchvision") is not None
assert importlib.util.find_spec("torchcodec") is None
assert "torch" not in sys.modules
import torchvision
assert torchvision.LOADED
"""
    result = run(python, "-c", check)
    assert result.returncode == 0, result.stderr


def test_where_torchvision_imports_nothing_is_written_and_an_old_hook_goes(environment) -> None:
    """The machine with CUDA. Mending it twice, or after an upgrade that cured it, leaves no hook behind."""
    python, site_packages = environment
    for name in ("torchvision", "torchaudio", "torchcodec"):
        install_package(site_packages, name, "")
    (site_packages / "verl_torchvision_hook.pth").write_text("# left over\n")
    before = {file.name for file in site_packages.iterdir()} - {"verl_torchvision_hook.pth"}
    mended = run(python, SCRIPTS / "mend_torchvision.py")
    assert mended.returncode == 0, mended.stderr
    assert "nothing to mend" in mended.stdout
    assert {file.name for file in site_packages.iterdir()} == before


def test_what_the_hook_cannot_cure_is_an_error_with_torchvisions_own_words(environment) -> None:
    python, site_packages = environment
    install_package(site_packages, "torchvision", "raise ImportError('something else is wrong')")
    (site_packages / "torchvision" / "_C.so").write_bytes(b"not a library")
    mended = run(python, SCRIPTS / "mend_torchvision.py")
    assert mended.returncode != 0
    assert "does not import even with the hook" in mended.stderr and "something else is wrong" in mended.stderr


def test_help_is_help_and_mends_nothing(environment) -> None:
    python, site_packages = environment
    asked = run(python, SCRIPTS / "mend_torchvision.py", "--help")
    assert asked.returncode == 0
    assert asked.stdout.startswith("usage: mend_torchvision.py")
    assert not (site_packages / "verl_torchvision_hook.py").exists()
