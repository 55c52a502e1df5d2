# SPDX-License-Identifier: Apache-2.0
"""Where responses begin and end in a batch. All modules use these functions.

A row has S = P + R columns: a left-padded prompt in the first P, then the columns of its response. Column P + r is
response token r if `response_mask` (N, R) is 1 there. The mask may have gaps, so use it to find tokens.

Shapes: N sequences, P prompt length, R response length, S = P + R.
"""

from __future__ import annotations

import torch


def response_columns(width: int, response_length: int) -> slice:
    """The R columns of the responses within the S columns of a row.

    Args:
        width: S.
        response_length: R.
    """
    return slice(width - response_length, width)


def response_tokens(attention_mask: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(N, S) bool: which columns of a row are response tokens, from (N, S) and (N, R) masks."""
    is_response = torch.zeros_like(attention_mask, dtype=torch.bool)
    columns = response_columns(attention_mask.shape[1], response_mask.shape[1])
    is_response[:, columns] = response_mask.bool()
    return is_response


def prompt_lengths(attention_mask: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(N,) int64: tokens of each prompt, from (N, S) and (N, R) masks."""
    first = response_columns(attention_mask.shape[1], response_mask.shape[1]).start
    return attention_mask[:, :first].sum(-1)


def response_lengths(response_mask: torch.Tensor) -> torch.Tensor:
    """(N,) int64: tokens of each response."""
    return response_mask.sum(-1)


def response_ends(response_mask: torch.Tensor) -> torch.Tensor:
    """(N,) int64: the response column after each row's last response token; 0 without one."""
    places = torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device)
    return (response_mask.bool() * places).amax(-1)


def response_token_ids(responses: torch.Tensor, response_mask: torch.Tensor) -> list[torch.Tensor]:
    """The tokens of each response in their order, without padding: N tensors (length,), from (N, R) ids and mask."""
    return [ids[is_token] for ids, is_token in zip(responses, response_mask.bool(), strict=True)]
