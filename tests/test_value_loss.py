# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_value_loss.py
"""The value loss against numbers worked out by hand, and what of it carries a gradient."""

import pytest
import torch

from verl.algorithms.value_loss import clipped_value_loss
from verl.workers.critic.config import CriticConfig

VALUES = torch.tensor([[1.2, 2.0, -1.0, 0.3]])
OLD_VALUES = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
RETURNS = torch.tensor([[2.0, 3.0, 3.0, 0.9]])
HALF = CriticConfig(cliprange_value=0.5)


def test_the_loss_of_every_kind_of_move():
    """Clip range 0.5 around 1, so values are clipped to [0.5, 1.5].

    1.2 is inside: (1.2 - 2)^2 / 2 = 0.32. 2.0 went too far towards 3: clipped to 1.5, (1.5 - 3)^2 / 2 = 1.125 is worse
    than (2 - 3)^2 / 2 and decides. -1.0 went away from 3: clipped to 0.5, (0.5 - 3)^2 / 2 = 3.125 is better than
    (-1 - 3)^2 / 2 = 8, which stays. 0.3 passed its return 0.9 on the way: clipped to 0.5, 0.4^2 / 2 is better than
    0.6^2 / 2 = 0.18, which stays.
    """
    loss, metrics = clipped_value_loss(VALUES, OLD_VALUES, RETURNS, HALF)
    torch.testing.assert_close(loss, torch.tensor([[0.32, 1.125, 8.0, 0.18]]))
    assert torch.equal(metrics["vf_clipfrac"], torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    assert torch.equal(metrics["vpred_mean"], VALUES)


def test_the_gradient_is_the_error_but_for_values_that_went_too_far_towards_their_return():
    """value - return of the above: 1.2 - 2, none, -1 - 3, 0.3 - 0.9."""
    values = VALUES.clone().requires_grad_()
    loss, metrics = clipped_value_loss(values, OLD_VALUES, RETURNS, HALF)
    loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-0.8, 0.0, -4.0, -0.6]]))
    assert not any(metric.requires_grad for metric in metrics.values())


@pytest.mark.parametrize("cliprange_value", [0.1, 1.0])
def test_clipping_never_lowers_the_loss_and_a_wide_range_never_raises_it(cliprange_value):
    generator = torch.Generator().manual_seed(0)
    values, old_values, returns = (torch.randn(8, 16, generator=generator) for _ in range(3))
    squared_error = 0.5 * (values - returns) ** 2
    clipped, metrics = clipped_value_loss(values, old_values, returns, CriticConfig(cliprange_value=cliprange_value))
    assert (clipped >= squared_error).all()
    assert torch.equal(metrics["vf_clipfrac"].bool(), clipped > squared_error)
    unclipped, _ = clipped_value_loss(values, old_values, returns, CriticConfig(cliprange_value=100.0))
    assert torch.equal(unclipped, squared_error)
