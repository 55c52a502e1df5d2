# SPDX-License-Identifier: Apache-2.0
"""Scores the held-out set with the current policy."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl.protocol import DataProto
from verl.trainer.metrics import compute_length_metrics, reduce_metrics
from verl.workers.reward.results import values_by_key, without_token_weights

KEPT = ["prompt_text", "ground_truth", "uid"]
"""Object columns that are shown with a sample; its media are read again."""


@dataclass(frozen=True)
class ValidationResult:
    """The result of one pass over the held-out set."""

    score: float
    """Mean over samples."""
    metrics: dict[str, float]
    """`val/reward_score`, which is `score`, `val/<key>_reward` for every key of the reward function, and the `val_`
    lengths."""
    places: list[int]
    """Positions in the set of the samples that are shown: the same prompts at every validation."""
    rows: DataProto
    """The samples that are shown, without their media."""
    scores: list[float]
    """The score of each sample that is shown."""
    results: list[dict[str, Any]]
    """The reward function's result for each."""
    rewards: dict[str, list[float]]
    """By key of the reward function, the value of every sample, in the set's order. A key that is returned only for
    some samples has fewer values."""


class Validator:
    """Runs the policy over the held-out set.

    Args:
        batches: the held-out loader, read again at every call of `run`.
        generate: takes a loader batch and its number, returns it with responses (several rows per prompt, side by
            side).
        score: takes a batch, returns (score per row, the reward function's result per row).
        num_samples: number of samples to show.
        on_progress: called with the number of finished prompts, at the start and after every batch.
    """

    def __init__(
        self,
        batches: Iterable[dict],
        generate: Callable[[dict, int], DataProto],
        score: Callable[[DataProto], tuple[list[float], list[dict[str, Any]]]],
        num_samples: int,
        on_progress: Callable[[int], None],
    ) -> None:
        self.batches = batches
        self.generate = generate
        self.score = score
        self.num_samples = num_samples
        self.on_progress = on_progress

    def run(self) -> ValidationResult:
        """Makes one pass over the held-out set. At most two batches' images are in memory at a time."""
        parts: list[DataProto] = []
        scores: list[float] = []
        results: list[dict[str, Any]] = []
        num_done = 0
        self.on_progress(num_done)
        for number, features in enumerate(self.batches):
            part = self.generate(features, number)
            part_scores, part_results = self.score(part)
            parts.append(part.select(None, KEPT))
            scores.extend(part_scores)
            results.extend(part_results)
            num_done += len(next(iter(features.values())))
            self.on_progress(num_done)
        batch = DataProto.concat(parts)
        score = float(np.mean(scores))
        metrics = {"val/reward_score": score}
        rewards = without_token_weights(values_by_key(results))
        metrics.update({f"val/{key}_reward": value for key, value in reduce_metrics(rewards).items()})
        metrics.update(compute_length_metrics(batch, prefix="val_"))
        shown = self._shown(batch)
        shown_results = [scores[place] for place in shown], [results[place] for place in shown]
        return ValidationResult(score, metrics, shown, batch[shown], *shown_results, rewards)

    def _shown(self, batch: DataProto) -> list[int]:
        """Chooses samples to show, independently of their order and of the answers."""
        prompts = batch.non_tensor_batch["prompt_text"]
        by_prompt = sorted(range(len(batch)), key=lambda place: prompts[place])
        order = np.random.RandomState(42).permutation(len(batch))[: self.num_samples]
        return [by_prompt[index] for index in order]
