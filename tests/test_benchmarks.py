# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_benchmarks.py
"""Benchmarks and scripts: what does not fit on a machine or is not installed is told, and they run from any folder."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_vgr import SHAPES, build_model, bytes_of_eager_maps, draw, measure_times, table_of
from matplotlib.figure import Figure

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
CPU = torch.device("cpu")


def test_eager_maps_of_the_7b_shape_at_8192_tokens_are_98_gib() -> None:
    """28 layers of 28 heads, two bytes a number."""
    config = build_model("small", CPU).config
    for name in ("num_hidden_layers", "num_attention_heads"):
        setattr(config.text_config, name, SHAPES["7b"][name])
    assert bytes_of_eager_maps(config, 8192, torch.bfloat16) / 2**30 == pytest.approx(98)


def test_a_pass_that_runs_out_of_memory_leaves_the_others_their_figures() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    times = measure_times({"plain": lambda: torch.ones(4), "eager maps": too_large}, CPU, repeats=2, eager_repeats=1)
    assert times.keys() == {"plain"}
    assert times["plain"][1] == 1
    figures = {"seconds": 1.0, "ratio": 1.5, "peak": 20.0}
    table = table_of({64: {"plain": figures, "eager maps": "out of memory", "vgr": {**figures, "peak": math.nan}}})
    assert table.splitlines()[2:] == [
        "| plain | 1.00 s, 20 MiB |",
        "| eager maps | out of memory |",
        "| vgr | +50.0 %, out of memory |",
    ]


def test_axes_of_the_picture_have_ticks_within_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: (drawn.append(figure), save(figure, *args, **kw))
    )
    results = {
        length: {
            "plain": {"seconds": 1.0, "ratio": 1.0, "peak": peak},
            "vgr": {"seconds": 1.0, "ratio": ratio, "peak": 30},
        }
        for length, ratio, peak in ((512, 1.1, 30.0), (1024, 6.0, 300.0))
    }
    draw(results, tmp_path / "picture.png", "title")
    for axes in drawn[0].axes:
        low, high = axes.get_ylim()
        assert len([tick for tick in axes.get_yticks() if low <= tick <= high]) >= 3


def outside(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a script from a folder that is not the repository's."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, SCRIPTS / script, *arguments]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)


def test_a_report_of_a_run_that_is_not_there_names_it(tmp_path: Path) -> None:
    finished = outside(tmp_path, "report_quickstart.py", "no_such_run")
    assert finished.returncode == 2
    assert "no_such_run is no folder of a run: it has no experiment_log.jsonl" in finished.stderr


def test_switches_that_do_not_exist_are_named_before_anything_is_measured(tmp_path: Path) -> None:
    finished = outside(tmp_path, "bench_train.py", "--only", "padding", "packing")
    assert finished.returncode == 2
    assert "no switch begins with packing; --only takes beginnings of: padding_free=false, " in finished.stderr


def test_scripts_that_use_the_package_find_their_own_copy_of_it_from_any_folder() -> None:
    """They put the repository's root before what is installed. A module that only other scripts import need not."""
    sources = {path.stem: path.read_text() for path in SCRIPTS.glob("*.py")}
    helpers = {name for name, source in sources.items() if '__name__ == "__main__"' not in source}
    uses = {name for name, source in sources.items() if re.search(r"^\s*(from|import) (verl|tests)\b", source, re.M)}
    code_of_children = {"bench_startup"}  # its only imports stand in programs that it starts in a tree of their own
    for name in uses - helpers - code_of_children:
        assert re.search(r"^sys\.path(\.insert\(0, |\[:0\] = )", sources[name], re.M), name


def test_rollout_without_vllm_measures_hf_alone(tmp_path: Path) -> None:
    """A package of that name that is hidden is one that is not installed."""
    hide = "import importlib.util as u, runpy, sys; f = u.find_spec\n"
    hide += "u.find_spec = lambda name, *rest: None if name == 'vllm' else f(name, *rest)\n"
    sizes = ["--prompts", "2", "--n", "1", "--response-length", "4", "--calls", "1"]
    program = (
        f"{hide}sys.argv = ['{SCRIPTS}/bench_rollout.py', *{sizes}]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    row = re.search(r"^\| hf \| .* tokens/s \| \d+ MiB \| \de-\d\d \((\de-\d\d)\) \|$", finished.stdout, re.M)
    assert row is not None and 0 < float(row[1]) < 1e-4
    assert "vllm is left out: it is not installed" in finished.stdout
