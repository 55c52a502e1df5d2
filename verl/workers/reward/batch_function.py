# SPDX-License-Identifier: Apache-2.0
"""Applies a user's function of the whole batch: a DataProto in, rewards and columns out.

    REWARD_TYPE = "proto"
    REWARD_STREAMS = ["attention_mass", "attention_keys"]  # optional: streams of the log-prob pass

    def compute_reward(batch: DataProto, **reward_function_kwargs) -> tuple[torch.Tensor, dict[str, list]]:
        rewards = torch.tensor([float(text == truth) for text, truth in zip(...)])
        return rewards, {"overall": rewards.tolist(), "token_weights": [...]}

Shapes: N samples, R response length.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from verl.protocol import DataProto
from verl.utils.response_span import response_ends, response_token_ids
from verl.workers.reward.calls import CallFailed
from verl.workers.reward.results import LARGEST_NUMBER, TOKEN_WEIGHTS, Scored, rows_of, shorten
from verl.workers.reward.user_function import RewardFunction, describe

TEXTS = ("response", "prefix", "response_length", "response_tokens")


class BatchFunction(RewardFunction):
    """A function of the batch."""

    def score(self, inputs: DataProto) -> Scored:
        """Scores a batch, as `RewardFunction.score`.

        The batch has `input_ids`, `attention_mask` and `position_ids` of prompt and response, `prompts`, `responses`
        and `response_mask` (N, R), in training also the streams in REWARD_STREAMS; and objects `ground_truth`,
        `prompt_text`, `uid`, `multi_modal_data` (media handles, or None), `image_grid_thw` (an array (images, 3), or
        None), `extra`, and `response`, `prefix`, `response_length`, `response_tokens` as in sample dicts. `meta_info`
        has `step` and `split`.

        The function returns (rewards, columns), or columns alone. Rewards are (N,), or (N, R) with a reward for each
        token and 0 outside the responses. Columns are a dict with one value per sample. `overall` is logged and
        used to filter groups; without it, the sum of the sample's rewards is. `token_weights` holds, for each sample,
        a list of one weight per token or None; or it is a tensor (N, R).
        """
        ids = response_token_ids(inputs.batch["responses"], inputs.batch["response_mask"])  # N of (length,)
        texts = [self._texts(sample_ids.tolist()) for sample_ids in ids]
        samples = [
            {"uid": uid, "ground_truth": truth, "response": text["response"]}
            for uid, truth, text in zip(
                inputs.non_tensor_batch["uid"], inputs.non_tensor_batch["ground_truth"], texts, strict=True
            )
        ]
        columns = {name: [text[name] for text in texts] for name in TEXTS}
        batch = DataProto(inputs.batch, {**inputs.non_tensor_batch, **columns}, inputs.meta_info)
        all_samples = f"the batch of {len(samples)} samples, starting with {describe(0, samples[0])}"
        try:
            answers = self._calls.each([batch], lambda _: all_samples)
        except CallFailed as failure:
            message = self._raised(failure.__cause__, all_samples, failure.first)
            raise RuntimeError(f"{message}. In general, {self._right_forms}") from failure.__cause__
        failures = self._failures(answers.failures, lambda _: all_samples)
        return self._placed(answers.results[0], samples, inputs.batch["response_mask"], failures)

    def _copy(self, argument: DataProto) -> DataProto:
        columns = {name: values.copy() for name, values in argument.non_tensor_batch.items()}
        columns["extra"] = copy.deepcopy(columns["extra"])
        return DataProto(argument.batch.clone(), columns, dict(argument.meta_info))

    def _placed(self, returned: Any, samples: list[dict], response_mask: torch.Tensor, failures: list[str]) -> Scored:
        rewards, columns = self._parts(returned)
        try:
            if TOKEN_WEIGHTS in columns:
                columns = {**columns, TOKEN_WEIGHTS: _cut(columns[TOKEN_WEIGHTS], response_mask)}
            results = rows_of(columns, len(samples))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._label}: {error}; {self._right_forms}") from None
        scores = None
        if rewards is not None:
            scores = self._checked_rewards(rewards, samples, response_mask)
            totals = scores.sum(axis=-1) if scores.ndim == 2 else scores  # (N,)
            results = [{"overall": total, **result} for total, result in zip(totals.tolist(), results, strict=True)]
        results = self._checked(results, samples)
        return Scored(results, failures, _on_last_tokens(scores, response_mask))

    def _parts(self, returned: Any) -> tuple[Any, Mapping[str, Any]]:
        """The rewards (or None) and the columns."""
        rewards, columns = returned if isinstance(returned, (tuple, list)) and len(returned) == 2 else (None, returned)
        columns = {} if columns is None and rewards is not None else columns
        if not isinstance(columns, Mapping) or (rewards is None and "overall" not in columns):
            raise ValueError(
                f"{self._label} returned {shorten(returned)}; {self._right_forms}, with the key 'overall'"
            )
        return rewards, columns

    def _checked_rewards(self, rewards: Any, samples: list[dict], response_mask: torch.Tensor) -> np.ndarray:
        """(N,) or (N, R) float32."""
        try:
            values = torch.as_tensor(rewards).detach().cpu().double()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self._label} returned rewards {shorten(rewards)}, which are no tensor: {error}"
            ) from None
        if values.shape not in (response_mask.shape[:1], response_mask.shape):
            raise ValueError(
                f"{self._label} returned rewards of shape {tuple(values.shape)}; they must be "
                f"{tuple(response_mask.shape[:1])}, one a sample, or {tuple(response_mask.shape)}, one a token"
            )
        outside = (
            (values * (1 - response_mask) != 0) if values.ndim == 2 else torch.zeros_like(values, dtype=torch.bool)
        )
        for wrong, problem in (
            (~(values.abs() <= LARGEST_NUMBER), "which is not a number between -1e15 and 1e15"),
            (outside, "where its response has no token; put it on a token of the response, or return (N,)"),
        ):
            if wrong.any():
                index, *place = wrong.nonzero()[0].tolist()
                at = f" at position {place[0]}" if place else ""
                raise ValueError(
                    f"{self._label} returned the reward {values[index, *place].item()}{at} for "
                    f"{describe(index, samples[index])}, {problem}"
                )
        return values.float().numpy()


def _cut(weights: Any, response_mask: torch.Tensor) -> Any:
    """Token weights as a list per sample; rows of a tensor (N, R) are cut at the end of the response."""
    if not isinstance(weights, (torch.Tensor, np.ndarray)) or weights.ndim != 2:
        return weights
    if weights.shape != response_mask.shape:
        raise ValueError(f"{TOKEN_WEIGHTS!r} have shape {tuple(weights.shape)}, not {tuple(response_mask.shape)}")
    return [
        row[is_token].tolist() for row, is_token in zip(torch.as_tensor(weights), response_mask.bool(), strict=True)
    ]


def _on_last_tokens(scores: np.ndarray | None, response_mask: torch.Tensor) -> np.ndarray | None:
    """Rewards (N, R), from (N,) or (N, R)."""
    if scores is None or scores.ndim == 2:
        return scores
    placed = np.zeros(response_mask.shape, dtype=np.float32)
    placed[np.arange(len(scores)), response_ends(response_mask) - 1] = scores
    return placed
