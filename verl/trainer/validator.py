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
"""Columns of objects that samples are shown with; their media are read once more."""


@dataclass(frozen=True)
class ValidationResult:
    """What one pass over the held-out set gave."""

    score: float
    """Mean over samples."""
    metrics: dict[str, float]
    """`val/reward_score`, which is `score`, `val/<key>_reward` for every key of the reward function, and the `val_`
    lengths."""
    places: list[int]
    """The samples that are shown, by their places in the set: the same prompts at every validation."""
    rows: DataProto
    """The samples that are shown, without their media."""
    scores: list[float]
    """Of each sample that is shown."""
    results: list[dict[str, Any]]
    """What the reward function returned of each."""
    rewards: dict[str, list[float]]
    """By key of the reward function the value of every sample of the set, in its order; what is returned for some
    samples alone has fewer."""


class Validator:
    """Runs the policy over the held-out set.

    Args:
        batches: the held-out loader, read anew at every call of `run`.
        generate: a batch of the loader and its number in, the same with responses out (several rows for a prompt,
            side by side).
        score: batch in, (score per row, the reward function's result per row) out.
        num_samples: how many are shown.
        on_progress: called with the number of prompts that are done, at the start and after every batch.
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
        """One pass over the whole held-out set, of which no more than two batches' images are held at a time."""
        parts: list[DataProto] = []
        scores: list[float] = []
        results: list[dict[str, Any]] = []
        num_done = 0
        self.on_progress(num_done)
        for number, features in enumerate(self.batches):
            part = self.generate(features, number)
            scores_of_part, results_of_part = self.score(part)
            parts.append(part.select(None, KEPT))
            scores.extend(scores_of_part)
            results.extend(results_of_part)
            num_done += len(next(iter(features.values())))
            self.on_progress(num_done)
        batch = DataProto.concat(parts)
        score = float(np.mean(scores))
        metrics = {"val/reward_score": score}
        rewards = without_token_weights(values_by_key(results))
        metrics.update({f"val/{key}_reward": value for key, value in reduce_metrics(rewards).items()})
        metrics.update(compute_length_metrics(batch, prefix="val_"))
        shown = self._shown(batch)
        of_shown = [scores[place] for place in shown], [results[place] for place in shown]
        return ValidationResult(score, metrics, shown, batch[shown], *of_shown, rewards)

    def _shown(self, batch: DataProto) -> list[int]:
        """A choice of prompts that depends on neither their order nor the answers."""
        prompts = batch.non_tensor_batch["prompt_text"]
        by_prompt = sorted(range(len(batch)), key=lambda place: prompts[place])
        order = np.random.RandomState(42).permutation(len(batch))[: self.num_samples]
        return [by_prompt[index] for index in order]
