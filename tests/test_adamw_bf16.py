# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_adamw_bf16.py
"""AdamW in bf16 goes where AdamW in fp32 goes, also by steps that bf16 has no room for."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from verl.workers import adamw_bf16
from verl.workers.adamw_bf16 import AdamWBF16

SETTINGS = dict(lr=1e-6, betas=(0.9, 0.999), weight_decay=0.1)
SIZE = 4000


def start_weights() -> torch.Tensor:
    """Numbers that are the same in bf16: as small as a layer's, and ones, as a norm has them."""
    generator = torch.Generator().manual_seed(0)
    weights = 0.02 * torch.randn(SIZE, generator=generator)
    weights[: SIZE // 2] = 1.0
    return weights.bfloat16().float()


def gradients(steps: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [scale * (1 + 0.5 * torch.randn(SIZE, generator=generator)) for _ in range(steps)]


def trained(
    kind: type[torch.optim.Optimizer], dtype: torch.dtype, steps: list[torch.Tensor], **settings
) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(start_weights().to(dtype))
    optimizer = kind([parameter], **{**SETTINGS, **settings})
    for gradient in steps:
        parameter.grad = gradient.to(dtype)
        optimizer.step()
    return parameter, optimizer


def exact(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    return parameter.detach().double() + optimizer.state[parameter]["compensation"].double()


@pytest.mark.parametrize("chunk_size", [2**24, 7])
def test_the_first_step_of_fp32_weights_is_that_of_adamw_in_pieces_too(
    chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was rounded yet."""
    monkeypatch.setattr(adamw_bf16, "CHUNK_SIZE", chunk_size)
    expected, _ = trained(torch.optim.AdamW, torch.float32, gradients(1), lr=1e-2)
    parameter, _ = trained(AdamWBF16, torch.float32, gradients(1), lr=1e-2)
    assert (parameter - start_weights()).abs().min() > 1e-3
    torch.testing.assert_close(parameter, expected, atol=1e-7, rtol=1e-6)


def test_steps_that_bf16_has_no_room_for_add_up() -> None:
    """A step of 1e-6 is lost on a weight of 1, whose neighbours in bf16 are 0.0039 and 0.0078 away.

    A thousand of them and the decay take it down by 0.001. Up to there the neighbours of its compensation are up to
    3.8e-6 away, which is more than a step too: rounded to nearest, it would stand still on the way.
    """
    steps = gradients(1000)
    expected, _ = trained(torch.optim.AdamW, torch.float32, steps)
    lost, _ = trained(torch.optim.AdamW, torch.bfloat16, steps)
    kept, optimizer = trained(AdamWBF16, torch.bfloat16, steps)
    way = (expected.detach() - start_weights()).double()
    went = exact(kept, optimizer) - start_weights().double()
    for part in (slice(None, SIZE // 2), slice(SIZE // 2, None)):
        assert way[part].mean() < -8e-4
        assert went[part].mean().item() == pytest.approx(way[part].mean().item(), rel=0.01)
    assert torch.equal(lost[: SIZE // 2], start_weights()[: SIZE // 2].bfloat16())
    assert (kept.double() - exact(kept, optimizer)).abs().max() <= 2**-8, "a weight is next to its exact value"


def test_weights_in_bf16_arrive_where_those_in_fp32_do() -> None:
    """Fifty steps of up to 1.8e-4, each under half a place of bf16, take a weight of 1 two places down, to 0.992."""
    steps = gradients(50)
    settings = dict(lr=1.8e-4, weight_decay=0.0)
    expected, _ = trained(torch.optim.AdamW, torch.float32, steps, **settings)
    parameter, _ = trained(AdamWBF16, torch.bfloat16, steps, **settings)
    ones = slice(None, SIZE // 2)
    assert (expected[ones] - 1).mean().item() == pytest.approx(-0.008, rel=0.05)
    assert (parameter[ones].float() - expected[ones]).abs().max() <= 2**-8
    lost, _ = trained(torch.optim.AdamW, torch.bfloat16, steps, **settings)
    assert (lost[ones] == 1).all()


def test_the_second_moment_falls_after_a_large_gradient_has_passed() -> None:
    """It falls by 1/1000 a step, and a bf16 number has no neighbour nearer than 1/256 of it."""
    steps = gradients(200) + gradients(2000, scale=0.1)
    moments = {}
    for name, kind, dtype in (
        ("expected", torch.optim.AdamW, torch.float32),
        ("stuck", torch.optim.AdamW, torch.bfloat16),
        ("ours", AdamWBF16, torch.bfloat16),
    ):
        parameter, optimizer = trained(kind, dtype, steps)
        moments[name] = optimizer.state[parameter]["exp_avg_sq"].double()
    ratio = moments["ours"] / moments["expected"]
    assert ratio.mean() == pytest.approx(1, abs=0.01)
    assert ratio.std() < 0.1
    assert (moments["stuck"] / moments["expected"]).mean() > 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_resumed_optimizer_takes_the_same_next_step(dtype: torch.dtype) -> None:
    *before, last = gradients(5)
    parameter, optimizer = trained(AdamWBF16, dtype, before)
    copy = nn.Parameter(parameter.detach().clone())
    resumed = AdamWBF16([copy], **SETTINGS)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    names = {"exp_avg", "exp_avg_sq"} | ({"compensation"} if dtype == torch.bfloat16 else set())
    for one, its in ((parameter, optimizer), (copy, resumed)):
        one.grad = last.to(dtype)
        its.step()
        state = its.state[one]
        assert {name for name, value in state.items() if value.dtype == torch.bfloat16} == names
        assert state["step"] == 5
    assert torch.equal(copy, parameter)
    for name, value in optimizer.state[parameter].items():
        assert torch.equal(resumed.state[copy][name], value)


def test_states_of_fp32_weights_lose_no_small_step_of_bf16_weights_either() -> None:
    """Those have no compensation: a step of 1e-6 would be lost on a weight of 1."""
    *before, last = gradients(5)
    _, of_fp32 = trained(AdamWBF16, torch.float32, before)
    parameter = nn.Parameter(start_weights().bfloat16())
    optimizer = AdamWBF16([parameter], **SETTINGS)
    optimizer.load_state_dict(of_fp32.state_dict())
    parameter.grad = last.bfloat16()
    optimizer.step()
    way = exact(parameter, optimizer) - start_weights().double()
    assert way[: SIZE // 2].mean().item() == pytest.approx(-1.1e-6, rel=0.1)  # the rate, and a tenth of it as decay


def test_rounding_is_to_a_neighbour_and_right_in_the_mean() -> None:
    """1 + 1/512 is a quarter of the way from 1 to 1 + 1/128; numbers of bf16 stay what they are."""
    value = torch.tensor([1 + 1 / 512, -1 - 1 / 512, 0.0, 1.5, float("inf")]).repeat(40000, 1)
    rounded = torch.empty_like(value, dtype=torch.bfloat16)
    adamw_bf16._round_stochastically(value, rounded, torch.Generator().manual_seed(0))
    up = (rounded[:, :2].abs() == 1 + 1 / 128).double().mean(dim=0)
    assert up.tolist() == pytest.approx([0.25, 0.25], abs=0.01)  # 4.6 standard deviations
    assert set(rounded[:, :2].abs().unique().tolist()) == {1, 1 + 1 / 128}
    assert torch.equal(rounded[:, 2:].float(), value[:, 2:])
