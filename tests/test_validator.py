# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_validator.py
"""The held-out set is scored a batch at a time, with the numbers of the whole and without keeping its images."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.batches import random_image
from verl.data.vision import MediaHandle
from verl.protocol import DataProto
from verl.trainer.validator import ValidationResult, Validator

ROWS, RESPONSE_LENGTH, NUM_SAMPLES = 6, 4, 4


def response_to(row: int) -> dict[str, torch.Tensor]:
    """Row 0 has one token, row 1 two, and so on, over again after four."""
    length = row % RESPONSE_LENGTH + 1
    mask = (torch.arange(RESPONSE_LENGTH) < length).long()
    return {"responses": 260 + row * mask, "response_mask": mask, "attention_mask": torch.cat([torch.ones(2), mask])}


def validate(
    batch_size: int, on_progress: Callable[[int], None] = lambda num_done: None
) -> tuple[ValidationResult, list[int]]:
    """The result, and how many rows' images there were at each generation, its own among them."""
    images: list[weakref.ref] = []
    alive: list[int] = []

    def generate(features: dict, number: int) -> DataProto:
        assert number * batch_size == features["rows"][0]
        handles = [MediaHandle.put(random_image((28, 28), row)) for row in features["rows"]]
        images.extend(weakref.ref(handle) for handle in handles)
        alive.append(sum(image() is not None for image in images))
        tensors = [response_to(row) for row in features["rows"]]
        return DataProto.from_dict(
            {key: torch.stack([tensor[key] for tensor in tensors]) for key in tensors[0]},
            {
                "prompt_text": [f"prompt {row}" for row in features["rows"]],
                "ground_truth": features["rows"],
                "uid": [str(row) for row in features["rows"]],
                "multi_modal_data": [[handle] for handle in handles],
            },
        )

    def score(batch: DataProto) -> tuple[list[float], list[dict[str, Any]]]:
        """One number for all rows, and one for those above 2 alone, which the first batch of two lacks; weights, which
        are no metric."""
        rows = batch.non_tensor_batch["ground_truth"].tolist()
        results = [{"overall": row / 2, "token_weights": [1.0] * (row + 1)} for row in rows]
        return [row / 2 for row in rows], [
            {**result, "high": row} if row > 2 else result for result, row in zip(results, rows, strict=True)
        ]

    batches = [{"rows": list(range(first, first + batch_size))} for first in range(0, ROWS, batch_size)]
    return Validator(batches, generate, score, NUM_SAMPLES, on_progress).run(), alive


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_give_what_the_whole_set_does(batch_size: int) -> None:
    """Means over samples, 0 to 5 halved: 1.25; of 3, 4 and 5: 4."""
    whole, _ = validate(ROWS)
    parts, _ = validate(batch_size)
    assert (parts.score, parts.metrics) == (whole.score, whole.metrics)
    assert (parts.places, parts.scores, parts.results) == (whole.places, whole.scores, whole.results)
    for name, values in whole.rows.batch.items():
        assert torch.equal(parts.rows.batch[name], values), name
    assert parts.rewards == whole.rewards == {"overall": [0, 0.5, 1, 1.5, 2, 2.5], "high": [3, 4, 5]}
    assert whole.score == whole.metrics["val/overall_reward"] == pytest.approx(1.25)
    assert whole.metrics["val/high_reward"] == pytest.approx(4)
    assert whole.metrics["val_response_length/max"] == RESPONSE_LENGTH
    assert not any("token_weights" in name for name in whole.metrics)


def test_samples_are_the_same_prompts_whatever_was_answered_and_have_their_own_scores() -> None:
    """The choice of EasyR1: prompts in the order of their texts, permuted by the seed 42."""
    result, _ = validate(ROWS)
    assert result.places == np.random.RandomState(42).permutation(ROWS)[:NUM_SAMPLES].tolist()
    assert result.rows.non_tensor_batch["prompt_text"].tolist() == [f"prompt {row}" for row in result.places]
    assert result.scores == [row / 2 for row in result.places]
    assert [len(one["token_weights"]) for one in result.results] == [row + 1 for row in result.places]
    assert "multi_modal_data" not in result.rows.non_tensor_batch


def test_no_more_than_two_batches_images_are_held() -> None:
    _, alive = validate(1)
    assert alive == [1, 2, 2, 2, 2, 2]


def test_progress_is_told_at_the_start_and_after_each_batch() -> None:
    told: list[int] = []
    validate(2, told.append)
    assert told == [0, 2, 4, 6]
