# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_response_span.py
"""Where responses begin and end, by hand; responses with gaps (several turns) too."""

import pytest
import torch

from tests.batches import answer_at_random, make_prompts
from verl.models.token_layout import PackedLayout, PaddedLayout
from verl.protocol import DataProto
from verl.utils.response_span import (
    prompt_lengths,
    response_columns,
    response_ends,
    response_lengths,
    response_token_ids,
    response_tokens,
)
from verl.workers.reward.function import place_scores, reward_samples
from verl.workers.reward.results import Scored

ATTENTION = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0]])
RESPONSE = torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
"""Three prompt columns and four of responses. Row 0 has a token between its turns that is no response."""


def test_lengths_ends_and_places_by_hand() -> None:
    assert response_columns(7, 4) == slice(3, 7)
    assert prompt_lengths(ATTENTION, RESPONSE).tolist() == [2, 3, 1]
    assert response_lengths(RESPONSE).tolist() == [3, 1, 0]
    assert response_ends(RESPONSE).tolist() == [4, 1, 0]
    assert response_tokens(ATTENTION, RESPONSE).nonzero().tolist() == [[0, 3], [0, 5], [0, 6], [1, 3]]
    ids = torch.arange(12).view(3, 4)
    assert [row.tolist() for row in response_token_ids(ids, RESPONSE)] == [[0, 2, 3], [4], []]


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight answered rows; the second token of every response of three or more is no response token."""
    rows = answer_at_random(make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts")), 2, 12)
    mask = rows.batch["response_mask"]
    mask[mask.sum(1) >= 3, 1] = 0
    return rows


def test_layouts_rewards_and_scores_agree_on_responses_with_gaps(batch: DataProto) -> None:
    tensors = batch.batch
    mask = tensors["response_mask"].bool()
    assert ((response_lengths(mask) < response_ends(mask)).sum()) > 0
    labels = tensors["responses"][mask]
    for layout in (PaddedLayout(batch), PackedLayout(batch)):
        assert torch.equal(layout.labels(), labels)
    objects = batch.non_tensor_batch
    for name in ("ground_truth", "prompt_text", "extra", "uid"):
        objects[name] = objects["multi_modal_data"]
    samples = reward_samples(batch, 1, "train")
    assert [sample["response_ids"].tolist() for sample in samples] == [
        ids[is_token].tolist() for ids, is_token in zip(tensors["responses"], mask, strict=True)
    ]
    scores = place_scores(batch, Scored([{"overall": 1.0 + row} for row in range(len(batch))], [])).batch[
        "token_level_scores"
    ]
    assert scores.sum(1).tolist() == [1.0 + row for row in range(len(batch))]
    last = [row.nonzero().max().item() for row in mask]
    assert scores.argmax(1).tolist() == last
