# SPDX-License-Identifier: Apache-2.0
"""Converts batches to inputs of the reward function, and its results to scores.

The trainer runs the function (user_function.py) in a separate process. `AutoRewardManager`, a class of EasyR1, runs it
in the calling process, for programs that score batches without a trainer.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from verl.protocol import DataProto
from verl.utils.response_span import response_ends, response_token_ids
from verl.utils.tokenizer import text_decoder
from verl.workers.reward.config import RewardConfig
from verl.workers.reward.results import Scored, values_by_key
from verl.workers.reward.user_function import load_reward_function

BATCH_TENSORS = ("prompts", "responses", "response_mask", "input_ids", "attention_mask", "position_ids")
BATCH_OBJECTS = ("ground_truth", "uid", "prompt_text", "multi_modal_data", "image_grid_thw", "extra")
"""Columns that a function of the whole batch gets, besides its REWARD_STREAMS."""


class AutoRewardManager:
    """Loads the function that `config.reward_function` names and applies it to batches.

    Args:
        config: the section `worker.reward`.
        tokenizer: decodes the responses.

    Raises:
        ValueError: as in `load_reward_function`.
    """

    def __init__(self, config: RewardConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.config = config
        self.function = load_reward_function(config, None if tokenizer is None else text_decoder(tokenizer))

    def compute_reward(self, data: DataProto) -> tuple[torch.Tensor, dict[str, list[Any]]]:
        """The scores (N, R) of `score`, and `values_by_key` of its results."""
        scored = self.score(data)
        return scored.batch["token_level_scores"], values_by_key(scored.non_tensor_batch["reward_results"])

    def score(self, data: DataProto) -> DataProto:
        """Scores N responses of at most R tokens.

        Reads what `reward_inputs` reads, and meta `step` and `split`. EasyR1's batches lack some of it: absent are
        then the prompt's text (empty), media (none), further columns (none), step (0) and split ("train"), and each
        row is its own uid.

        Returns:
            The result of `place_scores`.

        Raises:
            RuntimeError, ValueError: as in `RewardFunction.score`.
        """
        step, split = data.meta_info.get("step", 0), data.meta_info.get("split", "train")
        streams = tuple(name for name in self.config.streams if name in data.batch)  # held-out batches have none
        inputs = reward_inputs(_completed(data), self.config, step, split, streams)
        return place_scores(data, self.function.score(inputs))


def _completed(data: DataProto) -> DataProto:
    """The batch with what EasyR1's lacks."""
    rows = range(len(data))
    absent: dict[str, list[Any]] = {
        "uid": [str(row) for row in rows],
        "prompt_text": ["" for _ in rows],
        "multi_modal_data": [None for _ in rows],
        "image_grid_thw": [None for _ in rows],
        "extra": [{} for _ in rows],
    }
    columns = {name: values for name, values in absent.items() if name not in data.non_tensor_batch}
    return DataProto(data.batch, {**data.non_tensor_batch, **columns}, data.meta_info)


def reward_inputs(
    data: DataProto, config: RewardConfig, step: int, split: str, streams: tuple[str, ...] = ()
) -> list[dict[str, Any]] | DataProto:
    """The input of `RewardFunction.score`: samples, or the batch for a function of the whole batch.

    Reads: what `reward_samples` reads, or `BATCH_TENSORS`, `BATCH_OBJECTS` and `streams`.
    """
    if not config.takes_batch:
        return reward_samples(data, step, split)
    _require_tokens(data)
    batch = data.select([*BATCH_TENSORS, *streams], BATCH_OBJECTS, [])
    batch.meta_info.update(step=step, split=split)
    return batch


def reward_samples(data: DataProto, step: int, split: str) -> list[dict[str, Any]]:
    """The input of `SampleFunction.score`, for N responses of at most R tokens.

    Reads: `responses`, `response_mask` (N, R); objects `ground_truth`, `uid`, `prompt_text`, `multi_modal_data` (the
    sample's media handles, or None), `extra` (the dataset row's other columns).
    """
    _require_tokens(data)
    responses = response_token_ids(data.batch["responses"], data.batch["response_mask"])  # N of (length,)
    columns = data.non_tensor_batch
    return [
        {
            "response_ids": ids.numpy(),  # (length,)
            "ground_truth": columns["ground_truth"][index],
            "prompt": columns["prompt_text"][index],
            "uid": columns["uid"][index],
            "images": [medium for medium in columns["multi_modal_data"][index] or () if not medium.is_video],
            "videos": [medium for medium in columns["multi_modal_data"][index] or () if medium.is_video],
            "extra": columns["extra"][index],
            "step": step,
            "split": split,
        }
        for index, ids in enumerate(responses)
    ]


def place_scores(data: DataProto, scored: Scored) -> DataProto:
    """The streams that the results of N samples add to their batch.

    Reads: `response_mask` (N, R).

    Returns:
        `token_level_scores` (N, R) float32, as the function gave them, or `overall` on the last token of each response
        and zero elsewhere; and objects `reward_results`, each sample's result.
    """
    response_mask, results = data.batch["response_mask"], scored.results
    if scored.token_level_scores is not None:
        scores = torch.tensor(scored.token_level_scores)  # (N, R)
    else:
        last_tokens = response_ends(response_mask) - 1  # (N,)
        scores = torch.zeros(response_mask.shape, dtype=torch.float32)  # (N, R)
        scores[range(len(results)), last_tokens] = torch.tensor([result["overall"] for result in results])
    return DataProto.from_dict({"token_level_scores": scores}, {"reward_results": results})


def _require_tokens(data: DataProto) -> None:
    empty = (data.batch["response_mask"].sum(dim=-1) == 0).nonzero().flatten().tolist()
    assert not empty, f"responses {empty} have no tokens"
