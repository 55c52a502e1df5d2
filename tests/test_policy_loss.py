# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_policy_loss.py
"""Every loss case by case, what its gradient does, and how token weights and averaging compose with it."""

import math
from dataclasses import replace

import pytest
import torch

from verl.algorithms.policy_loss import (
    POLICY_LOSSES,
    PolicyLossInputs,
    clipped_policy_loss,
    register_policy_loss,
)
from verl.utils.masked_ops import aggregate_loss
from verl.workers.actor.config import ActorConfig

LOSSES = sorted(POLICY_LOSSES)
PER_TOKEN = [name for name in LOSSES if name != "gspo"]
"""Losses in which a token's loss moves that token alone."""


def policy_ratio(
    ratios: list[list[float]], advantages: list[list[float]], mask: list[list[int]] | None = None, **knobs: float
) -> PolicyLossInputs:
    """Inputs of the given ratios to an old policy with log-probability -2 everywhere; the new one wants a gradient."""
    old_log_probs = torch.full_like(torch.tensor(ratios), -2.0)
    log_probs = (old_log_probs + torch.tensor(ratios).log()).requires_grad_()
    mask = torch.ones_like(old_log_probs, dtype=torch.int64) if mask is None else torch.tensor(mask)
    return PolicyLossInputs(log_probs, old_log_probs, torch.tensor(advantages), mask, ActorConfig(**knobs))


def draw_inputs(seed: int = 0) -> PolicyLossInputs:
    """Six responses of 1 to 7 tokens, in float64, with ratios on both sides of every bound."""
    generator = torch.Generator().manual_seed(seed)
    log_probs, advantages = torch.randn(2, 6, 7, generator=generator, dtype=torch.float64)
    old_log_probs = log_probs - 0.8 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([[7], [1], [4], [6], [2], [3]])
    mask = (torch.arange(7) < lengths).long()
    return PolicyLossInputs(log_probs.requires_grad_(), old_log_probs, advantages * mask, mask, ActorConfig())


def gradient(name: str, inputs: PolicyLossInputs, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Of the sum over real tokens of weight times loss, in the log-probabilities (N, R)."""
    loss, _ = POLICY_LOSSES[name](inputs)
    weights = inputs.response_mask if weights is None else inputs.response_mask * weights
    return torch.autograd.grad((loss * weights).sum(), inputs.log_probs)[0]


# ---- by hand ----

# ratio, advantage, loss, d loss / d log_prob, clipped ratio decides, dual clip decides
CLIPPED = [
    (1.0, 1.0, -1.0, -1.0, 0, 0),
    (1.5, 1.0, -1.3, 0.0, 1, 0),
    (0.5, 1.0, -0.5, -0.5, 0, 0),
    (1.5, -1.0, 1.5, 1.5, 0, 0),
    (0.5, -1.0, 0.8, 0.0, 1, 0),
    (4.0, -1.0, 3.0, 0.0, 0, 1),
    (4.0, 2.0, -2.6, 0.0, 1, 0),
    (4.0, -2.0, 6.0, 0.0, 0, 1),
    (4.0, 0.0, 0.0, 0.0, 0, 0),
]


@pytest.mark.parametrize("name", ["default", "gspo", "gspo_token"])
def test_clipping_by_hand(name):
    """Bounds 0.8 and 1.3, dual clip 3; loss max(-A r, -A clip(r)), and at most -3 A where A < 0.

    r 1.5, A 1: max(-1.5, -1.3) = -1.3, clipped. r 0.5, A 1: max(-0.5, -0.8) = -0.5.
    r 1.5, A -1: max(1.5, 1.3) = 1.5. r 0.5, A -1: max(0.5, 0.8) = 0.8, clipped.
    r 4, A -1: max(4, 1.3) = 4, bounded to 3. r 4, A 2: max(-8, -2.6) = -2.6, clipped; the bound is for A < 0 only.
    r 4, A -2: max(8, 2.6) = 8, bounded to 6.
    Where r itself decides the gradient in log_prob is -A r, elsewhere 0. A response of one token has its ratio, so the
    three losses agree.
    """
    ratio, advantage, loss, slope, higher, lower = torch.tensor(CLIPPED).unsqueeze(-1).unbind(1)  # (N, 1) each
    inputs = policy_ratio(ratio.tolist(), advantage.tolist())
    per_token_loss, metrics = POLICY_LOSSES[name](inputs)
    torch.testing.assert_close(per_token_loss.detach(), loss)
    torch.testing.assert_close(gradient(name, inputs), slope)
    torch.testing.assert_close(metrics["pg_clipfrac_higher"], higher)
    torch.testing.assert_close(metrics["pg_clipfrac_lower"], lower)


GSPO_RATIOS = [[1.44, 1.0, 50.0], [2.0, 1.0, 1.0], [0.25, 1.0, 50.0]]
GSPO_ADVANTAGES = [[-1.0, -1.0, 0.0], [1.0, 1.0, 1.0], [2.0, 2.0, 0.0]]
GSPO_MASK = [[1, 1, 0], [1, 1, 1], [1, 1, 0]]


def test_gspo_by_hand():
    """Ratios of a response are the geometric mean over its real tokens; the third column of rows 0 and 2 is padding.

    Row 0: sqrt(1.44) = 1.2, within bounds: loss 1.2 on both tokens; each moves both by 1.2 / 2, so 1.2 in all.
    Row 1: 2^(1/3) = 1.26, within bounds: loss -1.26, gradient -1.26 on each of three tokens.
    Row 2: sqrt(0.25) = 0.5, A 2: max(-1, -1.6) = -1, gradient -1 on both.
    """
    inputs = policy_ratio(GSPO_RATIOS, GSPO_ADVANTAGES, GSPO_MASK)
    loss, metrics = POLICY_LOSSES["gspo"](inputs)
    cube_root = 2 ** (1 / 3)
    expected = torch.tensor([[1.2, 1.2, 0.0], [-cube_root] * 3, [-1.0, -1.0, 0.0]])
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(gradient("gspo", inputs), expected)
    assert not metrics["pg_clipfrac_higher"].any()


def test_gspo_clips_a_response_as_a_whole():
    """Ratios 2 and 1, A 1: sqrt(2) = 1.414 is above 1.3, so neither token has a gradient; one by one only the first
    would have been clipped."""
    inputs = policy_ratio([[2.0, 1.0]], [[1.0, 1.0]])
    _, metrics = POLICY_LOSSES["gspo"](inputs)
    assert metrics["pg_clipfrac_higher"].tolist() == [[1.0, 1.0]]
    assert gradient("gspo", inputs).tolist() == [[0.0, 0.0]]
    assert gradient("gspo_token", inputs).tolist() == [[0.0, 0.0]]
    torch.testing.assert_close(gradient("default", inputs), torch.tensor([[0.0, -1.0]]))


def test_gspo_token_has_the_values_of_gspo_and_moves_each_token_by_its_own_advantage():
    """Row 0 with advantages -1 and -3: s = 1.2, gradients 1.2 and 3.6, where gspo gives both (1.2 + 3.6) / 2 = 2.4."""
    inputs = policy_ratio(GSPO_RATIOS, GSPO_ADVANTAGES, GSPO_MASK)
    losses = [POLICY_LOSSES[name](inputs)[0].detach() for name in ("gspo", "gspo_token")]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(gradient("gspo_token", inputs), gradient("gspo", inputs))

    apart = policy_ratio(GSPO_RATIOS[:1], [[-1.0, -3.0, 0.0]], GSPO_MASK[:1])
    torch.testing.assert_close(gradient("gspo_token", apart), torch.tensor([[1.2, 3.6, 0.0]]))
    torch.testing.assert_close(gradient("gspo", apart), torch.tensor([[2.4, 2.4, 0.0]]))


@pytest.mark.parametrize(
    ("low", "high", "weights"),
    [(0.2, 0.3, [1.0, 1.3, 0.8]), (0.0, 4.0, [1.0, 5.0, 1.0]), (1.0, 4.0, [1.0, 5.0, 0.5])],
)
def test_cispo_by_hand(low, high, weights):
    """Ratios 1, 8, 1/2 clipped to [1 - low, 1 + high]; loss -A w (log 1/e^2 + log r), gradient -A w, never 0."""
    advantages = [1.0, 2.0, -1.0]
    inputs = policy_ratio([[1.0, 8.0, 0.5]], [advantages], clip_ratio_low=low, clip_ratio_high=high)
    loss, metrics = POLICY_LOSSES["cispo"](inputs)
    slope = -torch.tensor([advantages]) * torch.tensor([weights])
    torch.testing.assert_close(loss.detach(), slope * torch.tensor([[-2.0, -2 + math.log(8), -2 - math.log(2)]]))
    torch.testing.assert_close(gradient("cispo", inputs), slope)
    assert metrics == {}


def test_sapo_by_hand():
    """tau 1 for A 1, tau 2 for A -1; p = sigmoid(tau (r - 1)), loss -A (4 / tau) p, gradient -A r 4 p (1 - p).

    r 1: p = 1/2: losses -2 and 1, gradients -1 and 1.
    r 2: p = sigmoid(1) = 0.731059: loss -2.924234, gradient -2 * 4 * 0.196612 = -1.572896;
    p = sigmoid(2) = 0.880797: loss 1.761594, gradient 2 * 4 * 0.104994 = 0.839949.
    """
    inputs = policy_ratio([[1.0, 1.0, 2.0, 2.0]], [[1.0, -1.0, 1.0, -1.0]], tau_positive=1.0, tau_negative=2.0)
    loss, metrics = POLICY_LOSSES["sapo"](inputs)
    torch.testing.assert_close(loss.detach(), torch.tensor([[-2.0, 1.0, -2.924234, 1.761594]]))
    torch.testing.assert_close(gradient("sapo", inputs), torch.tensor([[-1.0, 1.0, -1.572896, 0.839949]]))
    assert metrics == {}


@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_the_gate_of_sapo_fades_the_further_the_ratio_goes(direction):
    inputs = policy_ratio([[math.exp(direction * step) for step in range(5)]], [[1.0] * 5])
    shares = (gradient("sapo", inputs) / -(inputs.log_probs - inputs.old_log_probs).exp()).tolist()[0]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(1.0)
    assert min(shares) >= 0.0


def test_without_bounds_the_clipped_loss_is_plain_importance_sampling():
    inputs = replace(draw_inputs(), config=ActorConfig(clip_ratio_low=1.0, clip_ratio_high=1e30, clip_ratio_dual=1e30))
    loss, _ = clipped_policy_loss(inputs)
    torch.testing.assert_close(loss, -inputs.advantages * (inputs.log_probs - inputs.old_log_probs).exp())


# ---- what all of them hold ----


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_the_gradient_is_minus_the_advantage(name):
    """One advantage a response, as outcome rewards give; so it is for gspo too."""
    inputs = draw_inputs()
    advantages = inputs.advantages[:, :1] * inputs.response_mask
    on_policy = replace(inputs, old_log_probs=inputs.log_probs.detach(), advantages=advantages)
    torch.testing.assert_close(gradient(name, on_policy), -advantages)
    _, metrics = POLICY_LOSSES[name](on_policy)
    assert not any(metric.any() for metric in metrics.values())


@pytest.mark.parametrize("name", LOSSES)
def test_an_absurd_log_ratio_stays_finite(name):
    """exp(100) overflows float32, and so does the gradient of what is made of it."""
    log_probs = torch.tensor([[0.0, 0.0], [-100.0, -100.0]], requires_grad=True)
    old_log_probs = torch.tensor([[-100.0, -100.0], [0.0, 0.0]])
    advantages = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    inputs = PolicyLossInputs(log_probs, old_log_probs, advantages, torch.ones(2, 2), ActorConfig())
    loss, _ = POLICY_LOSSES[name](inputs)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient(name, inputs)).all()
    if name == "default":
        assert loss[0].tolist() == pytest.approx([-1.3, 3.0])


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_in_the_padding_changes_nothing(name):
    inputs = draw_inputs()
    is_padding = inputs.response_mask == 0
    log_probs = inputs.log_probs.detach().masked_fill(is_padding, 3.0).requires_grad_()
    other = replace(inputs, log_probs=log_probs, old_log_probs=inputs.old_log_probs.masked_fill(is_padding, -3.0))
    for inner, outer in zip(
        (POLICY_LOSSES[name](inputs)[0], gradient(name, inputs)),
        (POLICY_LOSSES[name](other)[0], gradient(name, other)),
        strict=True,
    ):
        torch.testing.assert_close(inner[~is_padding], outer[~is_padding])
    assert (gradient(name, other)[is_padding] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_are_one_number_a_token_without_gradient(name):
    inputs = draw_inputs()
    _, metrics = POLICY_LOSSES[name](inputs)
    assert set(metrics) == (set() if name in ("cispo", "sapo") else {"pg_clipfrac_higher", "pg_clipfrac_lower"})
    assert {(metric.shape, metric.requires_grad) for metric in metrics.values()} <= {(torch.Size([6, 7]), False)}


# ---- token weights and averaging ----


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_weight_scales_the_gradient_of_its_token_and_of_no_other(name):
    inputs = draw_inputs()
    weights = torch.linspace(0.2, 3.0, 42, dtype=torch.float64).view(6, 7)
    torch.testing.assert_close(gradient(name, inputs, weights), weights * gradient(name, inputs))


def test_under_gspo_weights_act_by_the_mean_over_their_response():
    """sum_t w_t L with one L for the response: all its tokens move by mean(w) times what they would."""
    inputs = draw_inputs()
    inputs = replace(inputs, advantages=inputs.advantages[:, :1] * inputs.response_mask)
    weights = torch.linspace(0.2, 3.0, 42, dtype=torch.float64).view(6, 7)
    lengths = inputs.response_mask.sum(-1, keepdim=True)
    mean = (weights * inputs.response_mask).sum(-1, keepdim=True) / lengths
    torch.testing.assert_close(gradient("gspo", inputs, weights), mean * gradient("gspo", inputs))


@pytest.mark.parametrize("mode", ["token", "seq"])
@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_and_ranks_add_up_to_the_whole_mini_batch(name, mode):
    """Two ranks of three micro-batches of a row each; the reference is written out over all rows at once.

    Each rank's gradients are of W times its micro-batches' losses, and the ranks' are averaged.
    """
    inputs = draw_inputs()
    mask = inputs.response_mask
    weights = mask * torch.linspace(0.2, 3.0, 42, dtype=torch.float64).view(6, 7)
    weighted = weights * POLICY_LOSSES[name](inputs)[0]
    expected = weighted.sum() / mask.sum() if mode == "token" else (weighted.sum(-1) / mask.sum(-1)).mean()
    (expected_gradient,) = torch.autograd.grad(expected, inputs.log_probs)

    total, gradients = 0.0, torch.zeros_like(expected_gradient)
    for row in range(6):
        rows = slice(row, row + 1)
        part = replace(
            inputs,
            log_probs=inputs.log_probs[rows],
            old_log_probs=inputs.old_log_probs[rows],
            advantages=inputs.advantages[rows],
            response_mask=mask[rows],
        )
        loss = aggregate_loss(POLICY_LOSSES[name](part)[0], weights[rows], mask[rows], mode, mask.sum(), 6)
        total += loss.item()
        gradients += torch.autograd.grad(2 * loss, inputs.log_probs)[0]
    assert total == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradients / 2, expected_gradient, rtol=1e-12, atol=1e-15)


# ---- the table ----


def test_losses_are_found_by_name_and_a_name_is_given_once():
    assert POLICY_LOSSES["default"] is clipped_policy_loss
    register_policy_loss("mine")(clipped_policy_loss)
    assert POLICY_LOSSES.pop("mine") is clipped_policy_loss
    with pytest.raises(ValueError, match="policy loss 'default' is already clipped_policy_loss; use another name"):
        register_policy_loss("default")(clipped_policy_loss)
