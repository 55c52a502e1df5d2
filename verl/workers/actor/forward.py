# SPDX-License-Identifier: Apache-2.0
"""The forward pass of training: log-probabilities of the response tokens, and nothing of the prompt's logits.

Shapes: N sequences, P prompt length, R response length, S = P + R.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import ProcessorMixin

from verl.data.vision import featurize
from verl.protocol import DataProto
from verl.utils.logprobs import log_probs_from_logits


class PolicyForward:
    """Response log-probabilities under one model, with the temperature and the support that sampling used.

    Args:
        model: the sharded policy or reference.
        processor: turns images to features; None for text models.
        temperature: of the rollout; logits are divided by it.
        banned_token_ids: tokens that cannot be sampled; they have probability zero here too.
        device: of the computation.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ProcessorMixin | None,
        temperature: float,
        banned_token_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        self.model = model
        self.processor = processor
        self.temperature = temperature
        self.banned_token_ids = banned_token_ids
        self.device = device

    def __call__(self, rows: DataProto) -> torch.Tensor:
        """(N, R) float32 log-probabilities of `responses`, zero outside `response_mask`.

        Columns that are padding in all rows are cut off before the forward, so neither padding side costs time.
        Logits exist for the response positions only.

        Args:
            rows: `input_ids`, `attention_mask` (N, S), `position_ids` (N, S) or (N, 4, S), `responses`,
                `response_mask` (N, R); non-tensor `multi_modal_data` for image-text models.
        """
        response_mask = rows.batch["response_mask"].bool()  # (N, R)
        full_length = response_mask.shape[1]
        length = int(response_mask.sum(dim=1).max())
        first = int(rows.batch["attention_mask"].argmax(dim=1).min())
        last = rows.batch["input_ids"].shape[1] - (full_length - length)

        position_ids = rows.batch["position_ids"][..., first:last]
        output = self.model(
            input_ids=rows.batch["input_ids"][:, first:last].to(self.device),
            attention_mask=rows.batch["attention_mask"][:, first:last].to(self.device),
            # Multimodal rope wants its four rows first: (4, N, s).
            position_ids=(position_ids.transpose(0, 1) if position_ids.dim() == 3 else position_ids).to(self.device),
            use_cache=False,
            logits_to_keep=length + 1,
            **self._media_inputs(rows),
        )
        # The logits at a position predict the token after it: drop the last, keep the one before the response.
        logits = output.logits[:, :-1]  # (N, length, V)
        responses = rows.batch["responses"][:, :length].to(self.device)
        log_probs = log_probs_from_logits(logits, responses, self.temperature, self.banned_token_ids)
        log_probs = log_probs.masked_fill(~response_mask[:, :length].to(self.device), 0.0)
        return nn.functional.pad(log_probs, (0, full_length - length))  # (N, R)

    def _media_inputs(self, rows: DataProto) -> dict[str, torch.Tensor]:
        if self.processor is None:
            return {}
        features = featurize(rows.non_tensor_batch["multi_modal_data"], self.processor.image_processor)
        return {key: value.to(self.device) for key, value in features.items()}
