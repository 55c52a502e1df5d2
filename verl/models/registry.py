# SPDX-License-Identifier: Apache-2.0
"""The model families that this package can train, one row each; the rest of the package asks here, never by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig


@dataclass(frozen=True)
class ModelFamily:
    """What the trainer has to know of a family beyond what transformers' auto classes settle."""

    name: str
    """How messages call it."""
    model_types: tuple[str, ...]
    """The `model_type` of the configs that belong to it."""
    has_vision_tower: bool
    """Whether images enter through `model.model.visual`, fed with `pixel_values` and `image_grid_thw`."""
    uses_mrope: bool
    """Whether position ids have time, height and width beside the text position: (4, S) a row instead of (S,)."""
    media_token_fields: tuple[str, ...]
    """Config fields with the placeholder ids, in the order of transformers' media types: 1 image, 2 video."""
    packs: bool = True
    """Whether nothing but the order of the tokens decides who attends to whom."""
    transposed_weights: tuple[str, ...] = ()
    """Ends of the names of weights whose last two dimensions transformers holds swapped against checkpoints."""


QWEN_MEDIA = ("image_token_id", "video_token_id")
FUSED_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")

MODEL_FAMILIES = (
    ModelFamily("Qwen2-VL", ("qwen2_vl",), True, True, QWEN_MEDIA),
    ModelFamily("Qwen2.5-VL", ("qwen2_5_vl",), True, True, QWEN_MEDIA),
    ModelFamily("Qwen3-VL", ("qwen3_vl",), True, True, QWEN_MEDIA),
    ModelFamily("Qwen3-VL-MoE", ("qwen3_vl_moe",), True, True, QWEN_MEDIA, transposed_weights=FUSED_EXPERTS),
)

PLAIN_TEXT = ModelFamily("plain text", (), False, False, ())
"""Every causal language model without other inputs, whatever its type."""


def family_of(model_config: PretrainedConfig) -> ModelFamily:
    """Return the row for a Hugging Face config; text-only models share `PLAIN_TEXT`.

    Raises:
        ValueError: a model with further inputs (images, audio) whose family has no row.
    """
    for family in MODEL_FAMILIES:
        if model_config.model_type in family.model_types:
            return family
    if model_config.sub_configs:
        known = ", ".join(model_type for family in MODEL_FAMILIES for model_type in family.model_types)
        raise ValueError(
            f"model_type {model_config.model_type!r} is a multimodal model of no known family; use a text-only model "
            f"or one of {known} (worker.actor.model.model_path)"
        )
    return PLAIN_TEXT


def media_token_ids(model_config: PretrainedConfig) -> list[int]:
    """Return the ids that stand for image and video content in a prompt.

    A response must never contain one: the model would look for media that is not there. Empty for text models.
    """
    return [getattr(model_config, field) for field in family_of(model_config).media_token_fields]


def media_token_types(model_config: PretrainedConfig, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the model input that marks media tokens: {"mm_token_type_ids": 0 text, 1 image, 2 video}.

    Same shape as `input_ids`, int64; an empty dict for text models, which do not take it.
    """
    if not family_of(model_config).media_token_fields:
        return {}
    token_types = torch.zeros_like(input_ids)
    for media_type, token_id in enumerate(media_token_ids(model_config), start=1):
        token_types[input_ids == token_id] = media_type
    return {"mm_token_type_ids": token_types}
