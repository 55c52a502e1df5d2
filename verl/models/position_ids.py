# SPDX-License-Identifier: Apache-2.0
"""Position ids for left-padded prompts and for the responses that follow them, plain or multimodal rope.

Shapes: N sequences, P prompt length, R response length.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace

import torch
from transformers import MODEL_MAPPING, PretrainedConfig

from verl.models.registry import family_of, media_token_types

GRIDS = {"image_grid_thw", "video_grid_thw", "second_per_grid_ts"}
"""The outputs of a processor that give the positions of media in time and space."""


def prompt_position_ids(
    model_config: PretrainedConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    mm_inputs: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Return the position ids of one left-padded prompt: (P,), or (4, P) for a model with multimodal rope.

    Row 0 counts the real tokens 0, 1, ...; rows 1 to 3 are time, height and width as the model class computes them
    itself (Qwen2-VL, arXiv 2409.12191, section 2.1). Padding has position 0. A prompt without media has four equal
    rows, so that all rows of a batch have one shape.

    Args:
        input_ids: (P,) int64, placeholders already expanded to one token per merged patch.
        attention_mask: (P,), 0 on padding.
        mm_inputs: outputs of the processor; `image_grid_thw` (images, 3), `video_grid_thw` (videos, 3) and
            `second_per_grid_ts` (videos,), in seconds, are read.
    """
    text_positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)  # (P,)
    if not family_of(model_config).uses_mrope:
        return text_positions
    model_class = MODEL_MAPPING[type(model_config)]
    # The method reads only the config and this helper, so no model instance with weights is needed.
    stand_in = SimpleNamespace(config=model_config)
    stand_in.get_vision_position_ids = partial(model_class.get_vision_position_ids, stand_in)
    (token_types,) = media_token_types(model_config, input_ids).values()
    rope_positions, _ = model_class.get_rope_index(
        stand_in,
        input_ids[None],
        token_types[None],
        attention_mask=attention_mask[None],
        **{name: mm_inputs[name] for name in GRIDS & mm_inputs.keys()},
    )  # (3, 1, P)
    return torch.cat([text_positions[None], rope_positions[:, 0]])  # (4, P)


def extend_position_ids(position_ids: torch.Tensor, response_length: int) -> torch.Tensor:
    """Continue prompts into their responses: (N, P) gives (N, R), (N, 4, P) gives (N, 4, R).

    Every row increases by one per token, also past the end of the response. The text row starts after its last
    position. The rows of multimodal rope start after the prompt's highest position, as the models' `rope_deltas` say.
    The highest position is also the last one, unless a video is longer in time than everything after it. In that case
    transformers' `generate`, and a forward pass that computes its own positions, place the response earlier. Rollout
    and training both use the positions of this function.
    """
    last = position_ids[..., -1:].clone()
    if position_ids.dim() == 3:
        last[:, 1:] = position_ids[:, 1:].amax(dim=(1, 2), keepdim=True)
    steps = torch.arange(1, response_length + 1, dtype=position_ids.dtype, device=position_ids.device)
    return last + steps


def swap_rope_rows(position_ids: torch.Tensor) -> torch.Tensor:
    """Swap between the (N, 4, S) of a batch and the (4, N, S) that models take; (N, S) stays as it is."""
    return position_ids.transpose(0, 1) if position_ids.dim() == 3 else position_ids
