# SPDX-License-Identifier: Apache-2.0
"""Policy-gradient losses per token. Averaging, token weights and micro-batches are the caller's.

N sequences, R response length. A loss is a function in `POLICY_LOSSES`, found by `worker.actor.loss_type`: it takes
one `PolicyLossInputs` and returns the loss (N, R) and metrics, (N, R) each without gradient, to be averaged over the
real tokens. Neither is masked. While nothing is clipped and the ratio is one, every loss has the plain policy
gradient, -A d log pi (gspo: with one advantage a response).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from verl.algorithms.registry import Registry
from verl.utils.masked_ops import masked_mean
from verl.workers.actor.config import ActorConfig

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: beyond any clip range, and far from overflow in float32


@dataclass(frozen=True)
class PolicyLossInputs:
    """What a loss may read: the policy's log-probs before and in the update, the advantages, and the settings."""

    log_probs: torch.Tensor
    """(N, R): the only input that carries a gradient."""
    old_log_probs: torch.Tensor
    """(N, R): of the policy before the update."""
    advantages: torch.Tensor
    """(N, R)."""
    response_mask: torch.Tensor
    """(N, R): 1 on response tokens, without token weights."""
    config: ActorConfig
    """The section `worker.actor`: the settings of every loss."""


PolicyLoss = Callable[[PolicyLossInputs], tuple[torch.Tensor, dict[str, torch.Tensor]]]

POLICY_LOSSES: Registry[PolicyLoss] = Registry(
    "policy loss",
    "worker.actor.loss_type",
    {"dapo": "; DAPO is default with clip_ratio_high=0.28 and algorithm.online_filtering=true"},
)
register_policy_loss = POLICY_LOSSES.register


@register_policy_loss("default")
def clipped_policy_loss(inputs: PolicyLossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped surrogate, with a ratio for every token.

    With ratio r = exp(log_probs - old_log_probs) and advantage A, PPO (arXiv 1707.06347, "Clipped Surrogate
    Objective"): max(-A r, -A clip(r, 1 - low, 1 + high)). Our deltas:

    1. The upper and the lower bound are two numbers (DAPO, arXiv 2503.14476, "Raise the Ceiling: Clip-Higher").
    2. Where A < 0 the loss is at most -A * dual, so that a token whose ratio has exploded has no gradient (dual clip,
       arXiv 1912.09729).
    3. The log-ratio is clamped to +-20 before the exponential, for finite values.

    Metrics: `pg_clipfrac_higher` (1 where the clipped ratio decides), `pg_clipfrac_lower` (1 where the dual clip
    decides).
    """
    return _clip(_log_ratio(inputs), inputs)


@register_policy_loss("gspo")
def gspo_loss(inputs: PolicyLossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate with one ratio for a whole response, its geometric mean.

    s = exp(mean over the response's tokens of log_probs - old_log_probs), the loss of every token
    max(-A s, -A clip(s, 1 - low, 1 + high)), so that a response is clipped as a whole (GSPO, arXiv 2507.18071; the
    paper's mean over sequences is `loss_avg_mode: seq`). Our deltas: those of `default`.

    The gradient of every token's loss is the same for all tokens of the response, -A s / (number of tokens). Token
    weights therefore act only by their mean over a response. With `gspo_token` each token's weight matters.

    Metrics: as `default`.
    """
    return _clip(_sequence_log_ratio(inputs).expand_as(inputs.log_probs), inputs)


@register_policy_loss("gspo_token")
def gspo_token_loss(inputs: PolicyLossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """GSPO's ratio and clipping, with each token's loss moving that token only.

    The ratio is s without its gradient, times pi / pi without the gradient of the denominator: its value is
    GSPO's, its gradient is -A s d log pi of the token itself (GSPO-token, arXiv 2507.18071). With equal advantages and
    weights in a response, the gradients add up to GSPO's. Our deltas: the deltas of `default`.

    Metrics: as `default`.
    """
    gradient_only = inputs.log_probs - inputs.log_probs.detach()  # (N, R) zeros that carry the gradient
    return _clip(_sequence_log_ratio(inputs).detach() + gradient_only, inputs)


@register_policy_loss("cispo")
def cispo_loss(inputs: PolicyLossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The plain policy gradient with a clipped importance weight: clipped tokens keep their gradient.

    -A stopgrad(clip(r, 1 - low, 1 + high)) log_probs (CISPO, MiniMax-M1, arXiv 2506.13585). The paper
    sets no lower bound: that is `clip_ratio_low: 1`. At 0, which EasyR1's script uses, no weight is below one.
    Our delta:

    1. The log-ratio is clamped to +-20 before the exponential, for finite values.

    The value is a log-likelihood, not a surrogate: `pg_loss` cannot be compared between this and other losses. No
    metrics.
    """
    weight = _clip_to_range(_log_ratio(inputs).detach().exp(), inputs)  # (N, R)
    return -inputs.advantages * weight * inputs.log_probs, {}


@register_policy_loss("sapo")
def sapo_loss(inputs: PolicyLossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A soft gate in place of the hard clip: the gradient fades as the ratio leaves one, on both sides.

    -A (4 / tau) sigmoid(tau (r - 1)), tau being `tau_positive` where A > 0 and `tau_negative` elsewhere (SAPO, arXiv
    2511.20347, its soft gate). In the gradient -A r is multiplied by 4 p (1 - p), p the sigmoid, which is 1 at r = 1.
    Our delta:

    1. The log-ratio is clamped to +-20 before the exponential, for finite values.

    No metrics.
    """
    tau = torch.where(inputs.advantages > 0, inputs.config.tau_positive, inputs.config.tau_negative)  # (N, R)
    gate = (4.0 / tau) * torch.sigmoid(tau * (_log_ratio(inputs).exp() - 1.0))
    return -inputs.advantages * gate, {}


def _log_ratio(inputs: PolicyLossInputs) -> torch.Tensor:
    return (inputs.log_probs - inputs.old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # (N, R)


def _sequence_log_ratio(inputs: PolicyLossInputs) -> torch.Tensor:
    log_ratio = inputs.log_probs - inputs.old_log_probs  # (N, R)
    mean = masked_mean(log_ratio, inputs.response_mask, dim=-1).unsqueeze(-1)  # (N, 1)
    return mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _clip(log_ratio: torch.Tensor, inputs: PolicyLossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate with dual clip, for ratios of tokens or sequences, and where a bound decides."""
    advantages, ratio = inputs.advantages, log_ratio.exp()  # (N, R)
    loss_plain = -advantages * ratio
    loss_clipped = -advantages * _clip_to_range(ratio, inputs)
    loss_bound = -advantages * inputs.config.clip_ratio_dual

    loss_ppo = torch.maximum(loss_plain, loss_clipped)
    negative = advantages < 0
    per_token_loss = torch.where(negative, torch.minimum(loss_ppo, loss_bound), loss_ppo)
    per_token_metrics = {
        "pg_clipfrac_higher": (loss_clipped > loss_plain).float(),
        "pg_clipfrac_lower": (negative & (loss_ppo > loss_bound)).float(),
    }
    return per_token_loss, per_token_metrics


def _clip_to_range(ratio: torch.Tensor, inputs: PolicyLossInputs) -> torch.Tensor:
    return ratio.clamp(1.0 - inputs.config.clip_ratio_low, 1.0 + inputs.config.clip_ratio_high)  # (N, R)
