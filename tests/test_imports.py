# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_imports.py
"""No process of a run loads what it does not need; what each may load is listed here, as far as it is heavy."""

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.batches import ROWS, write_dataset
from tests.test_training_run import arguments
from verl.utils.lean_imports import UNUSED, frozen_objects, lean_imports

ROOT = Path(__file__).resolve().parent.parent

HEAVY = {
    *("accelerate", "av", "datasets", "jinja2", "matplotlib", "mlflow", "numpy", "omegaconf", "pandas", "peft", "PIL"),
    *("pyarrow", "ray", "safetensors", "scipy", "sklearn", "sqlalchemy", "swanlab", "sympy", "tensorboard"),
    *("tensordict", "tokenizers", "torch", "torchvision", "tqdm", "transformers", "triton", "vllm", "wandb"),
}
"""Packages that take a while to import."""

OF_TRANSFORMERS = {"accelerate", "jinja2", "numpy", "peft", "PIL", "safetensors", "sympy", "tokenizers", "torch"} | {
    *("torchvision", "tqdm", "transformers", "triton")
}
"""What its models and processors bring along."""

OF_RAY = {"pyarrow", "ray", "tqdm"}
"""What its workers bring along where it is installed."""

OF_DATASETS = {"datasets", "pandas", "scipy"}
"""What reading data brings along, where scipy is installed."""

ALLOWED = {
    "command line": {"omegaconf", "tqdm", "numpy", "pyarrow"},  # the last two for the headers of data files
    "reward": OF_RAY | {"numpy", "PIL", "tokenizers"},
    "worker": OF_TRANSFORMERS | OF_RAY | {"tensordict"},
    "trainer": OF_TRANSFORMERS | OF_RAY | OF_DATASETS | {"omegaconf", "tensordict"},
}
"""Which of them a process of a run with the HF engine and the file logger may have loaded."""


@pytest.mark.ray
def test_each_process_of_a_run_has_loaded_what_it_needs_and_no_more(tiny_model_path: str, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.parquet", ROWS)
    data_files = [f"data.train_files={data}", f"data.val_files={data}"]
    settings = ["algorithm.disable_kl=true", "trainer.max_steps=1", "trainer.val_before_train=false"]
    finished = subprocess.run(
        [sys.executable, "-m", "tests.modules_of_a_run"]
        + arguments(tiny_model_path, data_files, tmp_path / "run", *settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    loaded = json.loads(finished.stdout.splitlines()[-1])
    assert loaded.keys() == ALLOWED.keys()
    for process, packages in loaded.items():
        assert HEAVY & set(packages) <= ALLOWED[process], process
    assert "torch" in loaded["worker"] and "ray" in loaded["reward"]


def test_the_command_line_loads_nothing_but_python() -> None:
    code = f"import sys, verl.trainer.main; print(sorted({HEAVY!r} & set(sys.modules)))"
    finished = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (finished.returncode, finished.stdout.strip()) == (0, "['tqdm']"), finished.stderr


def test_the_supervisor_of_the_reward_function_loads_nothing_but_python_and_psutil() -> None:
    code = f"import sys, verl.workers.reward.supervisor; print(sorted({HEAVY!r} & set(sys.modules)))"
    finished = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (finished.returncode, finished.stdout.strip()) == (0, "[]"), finished.stderr


def test_packages_that_are_kept_out_are_there_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in UNUSED]:
        monkeypatch.delitem(sys.modules, name)
    with lean_imports():
        for name in UNUSED:
            assert importlib.util.find_spec(name) is None
            with pytest.raises(ImportError):
                importlib.import_module(f"{name}.utils")
        assert not gc.isenabled()
    assert gc.isenabled()
    assert all(importlib.util.find_spec(name) is not None for name in UNUSED)


def test_objects_are_frozen_for_as_long_as_asked() -> None:
    with frozen_objects():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_a_package_that_is_loaded_already_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, UNUSED[0], json)
    with lean_imports():
        assert importlib.import_module(UNUSED[0]) is json
    assert sys.modules[UNUSED[0]] is json
