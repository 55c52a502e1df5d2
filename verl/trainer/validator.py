# SPDX-License-Identifier: Apache-2.0
"""Scores the held-out set with the current policy."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl.protocol import DataProto
from verl.trainer.metrics import compute_length_metrics, reduce_metrics
from verl.utils.response_span import response_token_ids


@dataclass(frozen=True)
class ValidationResult:
    """What one pass over the held-out set gave.

    `metrics` has `val/reward_score` (mean over samples, equal to `score`), `val/<key>_reward` for every key of the
    reward function and the `val_` lengths; `samples` are (prompt, response, ground truth, score), in the set's order.
    """

    score: float
    metrics: dict[str, float]
    samples: list[tuple[str, str, str, float]]

    def choose_samples(self, count: int) -> list[tuple[str, str, str, float]]:
        """A fixed choice of at most `count` samples, the same prompts at every validation."""
        samples = sorted(self.samples, key=lambda sample: sample[0])
        chosen = np.random.RandomState(42).permutation(len(samples))[:count]
        return [samples[index] for index in chosen]


class Validator:
    """Runs the policy over the held-out set.

    Args:
        batches: the held-out loader, read anew at every call of `run`.
        generate: a batch of the loader and its number in, the same with responses out (several rows for a prompt,
            side by side).
        score: batch in, (score per row, values per row of every reward key) out.
        tokenizer: for the samples' texts.
        on_progress: called with the number of prompts that are done, at the start and after every batch.
    """

    def __init__(
        self,
        batches: Iterable[dict],
        generate: Callable[[dict, int], DataProto],
        score: Callable[[DataProto], tuple[list[float], dict[str, list[float]]]],
        tokenizer: PreTrainedTokenizerBase,
        on_progress: Callable[[int], None],
    ) -> None:
        self.batches = batches
        self.generate = generate
        self.score = score
        self.tokenizer = tokenizer
        self.on_progress = on_progress

    def run(self) -> ValidationResult:
        """One pass over the whole held-out set, of which no more than two batches' images are held at a time."""
        parts: list[DataProto] = []
        scores: list[float] = []
        rewards: dict[str, list[float]] = {}
        num_done = 0
        self.on_progress(num_done)
        for number, features in enumerate(self.batches):
            part = self.generate(features, number)
            of_part, rewards_of_part = self.score(part)
            parts.append(part.select(None, ["prompt_text", "ground_truth"]))
            scores.extend(of_part)
            for key, values in rewards_of_part.items():
                rewards.setdefault(key, []).extend(values)
            num_done += len(next(iter(features.values())))
            self.on_progress(num_done)
        batch = DataProto.concat(parts)
        score = float(np.mean(scores))
        metrics = {"val/reward_score": score}
        metrics.update({f"val/{key}_reward": value for key, value in reduce_metrics(rewards).items()})
        metrics.update(compute_length_metrics(batch, prefix="val_"))
        return ValidationResult(score, metrics, self._samples(batch, scores))

    def _samples(self, batch: DataProto, scores: list[float]) -> list[tuple[str, str, str, float]]:
        responses = response_token_ids(batch.batch["responses"], batch.batch["response_mask"])
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        prompts = batch.non_tensor_batch["prompt_text"]
        truths = map(str, batch.non_tensor_batch["ground_truth"])
        return list(zip(prompts, texts, truths, scores, strict=True))
