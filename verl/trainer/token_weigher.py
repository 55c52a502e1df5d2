# SPDX-License-Identifier: Apache-2.0
"""Token weights in the trainer: the run's signals, the weights of a batch, and the metrics of both.

Shapes: N rows, R response length.
"""

import logging
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from verl.algorithms.token_weights import CONTROLS, compute_token_weights, signals_of
from verl.config import as_yaml
from verl.protocol import DataProto
from verl.trainer.config import ATTENTION_SIGNALS, AlgorithmConfig, PPOConfig
from verl.trainer.metrics import compute_signal_metrics, compute_token_weight_metrics
from verl.trainer.token_kinds import TokenKinds
from verl.workers.reward.results import TOKEN_WEIGHTS

logger = logging.getLogger(__name__)

LOWEST_MEAN, HIGHEST_MEAN = 0.8, 1.1
"""Range of a step's mean weight without a warning; outside it, weighting changes the size of the update."""


def describe_token_weights(algorithm: AlgorithmConfig, is_measured: bool) -> str:
    """One line on the run's token weights, for the console and the report.

    Args:
        is_measured: whether the run measures attention.
    """
    if not algorithm.enable_token_weights:
        return "token weights off: all tokens weigh the same"
    name = algorithm.token_weight_signal
    if not is_measured and name in ATTENTION_SIGNALS:
        return "token weights on: only from the reward function; all other tokens weigh 1"
    parts = [name]
    if name in ATTENTION_SIGNALS:
        layers = algorithm.attention_layers
        parts.append("all layers" if layers == "all" else f"layers {as_yaml(layers)}")
    if algorithm.token_weight_top_share is not None:
        parts.append(f"the top {algorithm.token_weight_top_share:.0%} of a response's tokens")
    else:
        low, high = algorithm.token_weight_clip
        parts.append(f"clip {low:g} to {high:g}")
    if algorithm.token_weight_control != "none":
        parts.append(f"control {algorithm.token_weight_control}")
    return f"token weights on: {', '.join(parts)}; weights from the reward function take precedence"


class TokenWeigher:
    """Computes token weights for a run's batches.

    Args:
        config: the run's configuration.
        tokenizer: tells which tokens are digits, words or markup; None leaves that out of the metrics.
    """

    def __init__(self, config: PPOConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.algorithm = config.algorithm
        is_measured = config.worker.rollout.collect_attentions
        self.signals = {
            name: signal
            for name, signal in signals_of(config.algorithm).items()
            if is_measured or not signal.needs_attention
        }
        self.kinds = None if tokenizer is None else TokenKinds(tokenizer)
        self._weighed_by: dict[str, torch.Tensor] = {}
        self._share_from_reward = 0.0
        self._told: set[str] = set()

    def weights(self, batch: DataProto, reward_values: dict[str, list[Any]], step: int) -> torch.Tensor | None:
        """Weights (N, R) float32 from `compute_token_weights`; None, with one warning, if no source gives any.

        Reads: `response_mask`, the streams of the signal, `responses` for a random control.

        Args:
            reward_values: values per sample of every key that the reward function returned.
            step: the training step.
        """
        streams, name = batch.batch, self._used_signal_name
        self._weighed_by = {name: self.signals[name].importance(streams)} if name in self.signals else {}
        weights = self._weights(self._weighed_by.get(name), batch, reward_values, step)
        returned = reward_values.get(TOKEN_WEIGHTS) or [None] * len(batch)
        self._share_from_reward = sum(given is not None and len(given) > 0 for given in returned) / len(batch)
        if weights is None:
            self._warn_once(
                "nothing",
                "algorithm.enable_token_weights=true, but nothing gives token weights, so training goes on "
                "unweighted: set worker.rollout.collect_attentions=true, or let the reward function return "
                f"{TOKEN_WEIGHTS!r}",
            )
        elif name != "uniform" and step > self.algorithm.token_weight_warmup_steps:
            self._warn_of_idle_weights(weights[streams["response_mask"].bool()], step)
        return weights

    def preview(self, batch: DataProto, reward_values: dict[str, list[Any]], step: int) -> torch.Tensor:
        """Weights (N, R) float32 that a step would give to other responses, such as held-out ones; 1 if no source
        gives any or token weights are off. Reads: what `weights` reads."""
        streams, name, weights = batch.batch, self._used_signal_name, None
        if self.algorithm.enable_token_weights:
            importance = self.signals[name].importance(streams) if name in self.signals else None
            weights = self._weights(importance, batch, reward_values, step)
        return streams["response_mask"].float() if weights is None else weights

    def _weights(
        self, importance: torch.Tensor | None, batch: DataProto, reward_values: dict[str, list[Any]], step: int
    ) -> torch.Tensor | None:
        streams = batch.batch
        return compute_token_weights(
            importance,
            reward_values.get(TOKEN_WEIGHTS),
            streams["responses"] if CONTROLS[self.algorithm.token_weight_control].draw is not None else None,
            streams["response_mask"],
            self.algorithm,
            step,
        )

    def _warn_of_idle_weights(self, weights: torch.Tensor, step: int) -> None:
        """weights: (response tokens,)."""
        if (weights == 1).all():
            self._warn_once(
                "ones",
                f"algorithm.enable_token_weights=true, but every token of step {step} weighs 1: its prompts have no "
                "image or no text to compare. For text-only models or data, token weights have no effect",
            )
        mean = weights.mean().item()
        if not LOWEST_MEAN <= mean <= HIGHEST_MEAN:
            self._warn_once(
                "mean",
                f"token_weights/mean is {mean:.2f} in step {step}: clipping changes the mean, and weighted rows count "
                "less or more than rows of weight 1. algorithm.token_weight_conserve_mean=true brings it back to one; "
                "wider bounds in algorithm.token_weight_clip, or more layers, change it less",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            logger.warning(message)

    def metrics(self, batch: DataProto) -> dict[str, float]:
        """`token_weights/*` of weighted runs, `signals/*` of runs that log signals. `token_weights/from_reward` is the
        share of responses whose weights the reward function gave.

        Reads: `response_mask`, the streams of the signals; in weighted runs `token_weights` and `responses`.
        """
        metrics: dict[str, float] = {}
        if self.algorithm.enable_token_weights:
            clip = None if self.algorithm.token_weight_top_share is not None else self.algorithm.token_weight_clip
            metrics |= compute_token_weight_metrics(batch, clip, self.kinds)
            metrics["token_weights/from_reward"] = self._share_from_reward
        if self.algorithm.token_signals_to_log:
            # The signal that gave the weights is not computed again: a random one would log other values.
            importance = dict(self._weighed_by) if self.algorithm.enable_token_weights else {}
            for name, signal in self.signals.items():
                if name not in importance:
                    importance[name] = signal.importance(batch.batch)
            metrics |= compute_signal_metrics(importance, batch.batch["response_mask"])
        return metrics

    @property
    def _used_signal_name(self) -> str:
        return self.algorithm.token_weight_signal.rpartition(":")[2]
