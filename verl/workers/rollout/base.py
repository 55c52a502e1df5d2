# SPDX-License-Identifier: Apache-2.0
"""The interface of rollout engines: takes weights and sampling settings, returns a batch of responses.

Shapes: B prompts, n responses each, N = B * n, P prompt length, R response length, S = P + R.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from tensordict import TensorDict
from transformers import PreTrainedTokenizerBase

from verl.data.features import Featurizer
from verl.models.position_ids import extend_position_ids
from verl.models.registry import MODEL_FAMILIES, ModelFamily
from verl.protocol import DataProto
from verl.trainer.config import PPOConfig
from verl.utils.lean_imports import import_object
from verl.workers.rollout.config import ENGINES, RolloutConfig


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Temperature 0 is greedy; `top_k` -1 and `top_p` 1.0 keep every token."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    ignore_eos: bool

    @classmethod
    def for_training(cls, config: RolloutConfig) -> "Sampling":
        """The settings of `worker.rollout`."""
        return cls(config.n, config.temperature, config.top_p, config.top_k, config.ignore_eos)

    @classmethod
    def for_validation(cls, config: RolloutConfig) -> "Sampling":
        """The settings of `worker.rollout` with the overrides of `val_override_config`; n is 1 by default."""
        return replace(cls.for_training(config), **{"n": 1, **config.val_override_config})


class Rollout(ABC):
    """A rollout engine inside one worker.

    Calls in a step: `wake_weights()`, `update_weights(stream)`, `wake_cache()`, any number of `generate(...)`,
    `sleep()`. The weights wake first, so that the trainer's copy and the engine's cache are never on the device
    together.
    """

    @classmethod
    @abstractmethod
    def from_config(
        cls,
        config: PPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        featurizer: Featurizer | None,
        device: torch.device,
        with_videos: bool = False,
    ) -> "Rollout":
        """Builds the engine of one worker; all workers call it at the same time.

        Args:
            featurizer: turns images into model inputs; None for text-only models.
            with_videos: whether prompts may have videos, for engines that reserve memory for them.
        """

    @abstractmethod
    def wake_weights(self) -> None:
        """Allocates the memory of the weights."""

    @abstractmethod
    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Loads the policy's weights by Hugging Face name; consumes the whole stream."""

    @abstractmethod
    def wake_cache(self) -> None:
        """Allocates the other memory for generation."""

    @abstractmethod
    def generate(self, prompts: DataProto, sampling: Sampling, seed: int) -> DataProto:
        """Draws `sampling.n` responses for each prompt; workers that share an engine all pass the same arguments.

        Args:
            prompts: `input_ids`, `attention_mask` (B, P) left-padded, `position_ids` (B, P) or (B, 4, P);
                non-tensor `multi_modal_data`, `raw_prompt_ids`.
            seed: determines every draw; use a different one in each step.

        Returns:
            A batch of N = B * n rows, the responses of a prompt side by side: `prompts` (N, P), `responses` (N, R)
            right-padded, `input_ids`, `attention_mask` (N, S), `response_mask` (N, R), one up to and including the
            first end-of-sequence token, `position_ids` (N, S) or (N, 4, S); and `rollout_log_probs` (N, R) float32,
            the log-probability with which each token was drawn, after temperature, `top_k` and `top_p` (for greedy
            decoding, at temperature 1).
        """

    @abstractmethod
    def sleep(self) -> None:
        """Frees all of this memory for the trainer."""


def require_videos(engine: str, family: ModelFamily) -> None:
    """Raise unless an engine reads prompts with videos in the same way as the trainer.

    Raises:
        ValueError: it does not; the message names the engine and the family.
    """
    if engine == "vllm" and not family.vllm_reads_videos:
        able = ", ".join(other.name for other in MODEL_FAMILIES if other.vllm_reads_videos)
        raise ValueError(
            f"worker.rollout.name=vllm reads prompts with videos otherwise than the trainer with models of the family "
            f"{family.name}; use worker.rollout.name=hf for them, or a model of the family {able}"
        )


def engine_class(name: str) -> type[Rollout]:
    """The engine that `worker.rollout.name` names.

    Raises:
        ImportError: the engine's package is not installed.
    """
    return import_object(ENGINES[name])


def mask_responses(responses: torch.Tensor, eos_token_ids: Iterable[int], ignore_eos: bool) -> torch.Tensor:
    """(N, R) int64: 1 up to and including each row's first end-of-sequence token; all ones with `ignore_eos`."""
    if ignore_eos:
        return torch.ones_like(responses)
    is_eos = torch.isin(responses, torch.tensor(list(eos_token_ids), device=responses.device)).long()  # (N, R)
    eos_seen_before = is_eos.cumsum(dim=1) - is_eos
    return (eos_seen_before == 0).long()


def assemble_batch(
    prompts: DataProto,
    responses: torch.Tensor,
    response_mask: torch.Tensor,
    rollout_log_probs: torch.Tensor,
    n: int,
) -> DataProto:
    """Joins prompts and responses to the batch that every engine returns.

    Args:
        prompts: B rows, as for `Rollout.generate`.
        responses, response_mask, rollout_log_probs: (N, R), the n responses of a prompt side by side; entries of
            `rollout_log_probs` outside the mask are dropped.

    Raises:
        RuntimeError: the log-probability of a drawn token is not finite, for example because the weights are NaN.
    """
    rollout_log_probs = rollout_log_probs.masked_fill(response_mask == 0, 0.0)
    if not rollout_log_probs.isfinite().all():
        row, column = (~rollout_log_probs.isfinite()).nonzero()[0].tolist()
        raise draw_not_finite(row, column, rollout_log_probs[row, column].item())
    prompt = {key: prompts.batch[key].repeat_interleave(n, dim=0) for key in prompts.batch.keys()}  # (N, ...)
    position_ids = torch.cat(
        [prompt["position_ids"], extend_position_ids(prompt["position_ids"], responses.shape[1])], dim=-1
    )  # (N, S) or (N, 4, S)
    return DataProto(
        batch=TensorDict(
            {
                "prompts": prompt["input_ids"],
                "responses": responses,
                "input_ids": torch.cat([prompt["input_ids"], responses], dim=1),
                "attention_mask": torch.cat([prompt["attention_mask"], response_mask], dim=1),
                "response_mask": response_mask,
                "position_ids": position_ids,
                "rollout_log_probs": rollout_log_probs,
            },
            batch_size=[responses.shape[0]],
        )
    )


def draw_not_finite(row: int, column: int, log_prob: float) -> RuntimeError:
    """The error for a token whose log-probability is not finite, after or before drawing it."""
    return RuntimeError(
        f"the rollout engine drew token {column} of response {row} with log-probability {log_prob}: the policy's "
        "weights, or its logits in worker.rollout.dtype, are not finite. If training has diverged, resume from an "
        "earlier step (trainer.load_checkpoint_path) with a lower worker.actor.optim.lr"
    )


def draw_seed(*parts: int) -> int:
    """One 31-bit seed from several numbers (run seed, step, rank, ...).

    Other numbers give unrelated draws, as long as callers pass equally many: zeros at the end do not count.
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


def copy_weights(target: Mapping[str, torch.Tensor], weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copies a weight stream into the tensors of `target`, casting to their dtype; names must match exactly."""
    unseen = set(target)
    for name, value in weights:
        target[name].copy_(value)
        unseen.discard(name)
    assert not unseen, f"the weight stream lacks {sorted(unseen)[:3]} and {len(unseen)} in all"
