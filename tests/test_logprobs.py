# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_logprobs.py
"""The frugal log-probabilities equal the plain ones, in value and gradient."""

import math

import pytest
import torch

from verl.utils.logprobs import log_probs_from_logits

SUPPRESSED = [0, 7]


def draw(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (3, 5, 11) that want a gradient, and labels that are not suppressed."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 5, 11, generator=generator)).to(dtype).requires_grad_()
    return logits, torch.randint(1, 7, (3, 5), generator=generator)


def plain_log_probs(logits: torch.Tensor, labels: torch.Tensor, temperature: float, suppressed: list[int]):
    scaled = logits.float() / temperature
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
    allowed[suppressed] = False
    log_probs = torch.log_softmax(scaled.masked_fill(~allowed, -math.inf), dim=-1)
    return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("suppressed", [[], SUPPRESSED])
def test_values_and_gradients_equal_log_softmax(dtype, temperature, suppressed):
    logits, labels = draw(dtype)
    upstream = torch.linspace(-1, 1, 15).view(3, 5)

    expected = plain_log_probs(logits, labels, temperature, suppressed)
    (expected_grad,) = torch.autograd.grad((expected * upstream).sum(), logits)
    log_probs = log_probs_from_logits(logits, labels, temperature, suppressed)
    (grad,) = torch.autograd.grad((log_probs * upstream).sum(), logits)

    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(grad, expected_grad, atol=1e-6 if dtype == torch.float32 else 4e-3, rtol=0)
    assert not grad[..., suppressed].any()


def test_by_hand():
    """Logits 0, ln 3 at temperature 1/2 become 0, 2 ln 3 = ln 9: probabilities 0.1 and 0.9.

    With a third id of the same weight as the second suppressed, nothing changes.
    """
    logits = torch.tensor([[[0.0, math.log(3.0), math.log(3.0)]] * 2])
    log_probs = log_probs_from_logits(logits, torch.tensor([[0, 1]]), temperature=0.5, suppressed_token_ids=[2])
    torch.testing.assert_close(log_probs.exp(), torch.tensor([[0.1, 0.9]]))


def test_without_a_gradient_the_values_are_the_same_bits():
    logits, labels = draw()
    with torch.no_grad():
        frozen = log_probs_from_logits(logits, labels, 0.7, SUPPRESSED)
    assert torch.equal(frozen, log_probs_from_logits(logits, labels, 0.7, SUPPRESSED).detach())


def test_the_callers_logits_are_left_as_they_were():
    logits, labels = draw()
    before = logits.detach().clone()
    log_probs_from_logits(logits.detach(), labels, 1.0, SUPPRESSED)
    assert torch.equal(logits.detach(), before)


def test_a_row_does_not_depend_on_its_neighbours():
    logits, labels = draw()
    together = log_probs_from_logits(logits, labels)
    alone = torch.cat([log_probs_from_logits(logits[row : row + 1], labels[row : row + 1]) for row in range(3)])
    assert torch.equal(together, alone)


def test_huge_logits_stay_finite():
    logits = torch.tensor([[[1e30, -1e30, 0.0]]], requires_grad=True)
    log_probs = log_probs_from_logits(logits, torch.tensor([[1]]), 1.0, [2])
    log_probs.sum().backward()
    assert torch.isfinite(log_probs).all()
    assert torch.isfinite(logits.grad).all()


def test_a_suppressed_label_has_the_lowest_log_prob_and_no_gradient_of_its_own():
    """The other ids' gradient is that of -log-sum-exp; the suppressed id's logit plays no part."""
    logits, labels = draw()
    labels[:] = SUPPRESSED[0]
    log_probs = log_probs_from_logits(logits, labels, 1.0, SUPPRESSED)
    log_probs.sum().backward()
    assert log_probs.max().item() < -3e38
    assert not logits.grad[..., SUPPRESSED].any()


def test_a_view_of_the_models_logits_passes_its_gradient_on():
    """The forward pass hands over all but the last position; that one's gradient is zero."""
    logits, labels = draw()
    log_probs_from_logits(logits[:, :-1], labels[:, :-1]).sum().backward()
    (expected,) = torch.autograd.grad(plain_log_probs(logits, labels, 1.0, [])[:, :-1].sum(), logits)
    torch.testing.assert_close(logits.grad, expected, atol=1e-6, rtol=0)


def test_no_float32_copy_of_the_logits_waits_for_the_backward_pass():
    logits, labels = draw(torch.bfloat16)
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        log_probs_from_logits(logits, labels, 0.7, SUPPRESSED)
    assert not [tensor.shape for tensor in kept if tensor.dtype == torch.float32 and tensor.shape[-1] == 11]
