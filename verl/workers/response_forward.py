# SPDX-License-Identifier: Apache-2.0
"""A model's forward pass over padded sequences, for what it says of the response tokens and nothing of the prompt's.

Shapes: N sequences, P prompt length, R response length, S = P + R, V numbers that the model gives for a position.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import ProcessorMixin

from verl.data.vision import featurize
from verl.models.registry import media_token_types
from verl.protocol import DataProto


class ResponseForward:
    """One number for each response token, under one model; a subclass says which.

    Args:
        model: takes `logits_to_keep` and answers with `logits`.
        processor: turns images to features; None for text models.
        device: of the computation.
    """

    def __init__(self, model: nn.Module, processor: ProcessorMixin | None, device: torch.device) -> None:
        self.model = model
        self.processor = processor
        self.device = device

    def __call__(self, rows: DataProto) -> torch.Tensor:
        """(N, R) float32, zero outside `response_mask`.

        Args:
            rows: `input_ids`, `attention_mask` (N, S), `position_ids` (N, S) or (N, 4, S), `responses`,
                `response_mask` (N, R); non-tensor `multi_modal_data` for image-text models.
        """
        raise NotImplementedError

    def outputs(self, rows: DataProto) -> torch.Tensor:
        """(N, length, V): what the model puts out one position before each response token, where it predicts it.

        `length` is that of the longest response. Columns that are padding in all rows are cut off before the forward,
        so neither padding side costs time, and the model's head runs on response positions only.
        """
        columns, length = filled_columns(rows)
        position_ids = rows.batch["position_ids"][..., columns]
        output = self.model(
            input_ids=rows.batch["input_ids"][:, columns].to(self.device),
            attention_mask=rows.batch["attention_mask"][:, columns].to(self.device),
            # Multimodal rope wants its four rows first: (4, N, s).
            position_ids=(position_ids.transpose(0, 1) if position_ids.dim() == 3 else position_ids).to(self.device),
            use_cache=False,
            logits_to_keep=length + 1,
            **self._media_inputs(rows),
        )
        # What stands at a position is about the token after it: drop the last, keep the one before the response.
        return output.logits[:, :-1]

    def as_stream(self, per_token: torch.Tensor, rows: DataProto) -> torch.Tensor:
        """(N, length) numbers, as long as `outputs`, as (N, R), zero outside `response_mask`."""
        response_mask = rows.batch["response_mask"].bool()  # (N, R)
        length = per_token.shape[1]
        per_token = per_token.masked_fill(~response_mask[:, :length].to(self.device), 0.0)
        return nn.functional.pad(per_token, (0, response_mask.shape[1] - length))  # (N, R)

    def _media_inputs(self, rows: DataProto) -> dict[str, torch.Tensor]:
        if self.processor is None:
            return {}
        columns, _ = filled_columns(rows)
        inputs = featurize(rows.non_tensor_batch["multi_modal_data"], self.processor)
        inputs |= media_token_types(self.model.config, rows.batch["input_ids"][:, columns])
        return {key: value.to(self.device) for key, value in inputs.items()}


def filled_columns(rows: DataProto) -> tuple[slice, int]:
    """The columns of the sequence between the padding that all rows share, and how many of them are response."""
    full_length = rows.batch["response_mask"].shape[1]
    length = int(rows.batch["response_mask"].sum(dim=1).max())
    first = int(rows.batch["attention_mask"].argmax(dim=1).min())
    return slice(first, rows.batch["input_ids"].shape[1] - (full_length - length)), length


def compute_per_token(forward: ResponseForward, data: DataProto, micro_batch_size: int) -> torch.Tensor:
    """(N, R) float32 on the CPU: what `forward` gives for all rows, without gradient."""
    (stream,) = compute_streams(forward.model, lambda rows: (forward(rows),), data, micro_batch_size)
    return stream


def compute_streams(
    model: nn.Module, compute: Callable[[DataProto], tuple[torch.Tensor, ...]], data: DataProto, micro_batch_size: int
) -> list[torch.Tensor]:
    """What `compute` gives for all rows, (N, ...) each on the CPU, without gradient.

    Rows go through in micro-batches, the last one smaller if need be; all ranks have as many rows.

    Args:
        model: which `compute` runs.
        compute: from rows to tensors with as many rows.
    """
    model.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(data), micro_batch_size):
            parts.append([tensor.cpu() for tensor in compute(data[start : start + micro_batch_size])])
    return [torch.cat(stream) for stream in zip(*parts, strict=True)]
