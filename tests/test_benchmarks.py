# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_benchmarks.py
"""Benchmarks for machines that are not at hand: what does not fit there is a cell of the table, not its end."""

import math

import pytest
import torch
from bench_vgr import SHAPES, build_model, bytes_of_eager_maps, measure_times, table_of

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
