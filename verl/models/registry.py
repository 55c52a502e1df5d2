# SPDX-License-Identifier: Apache-2.0
"""The model families that this package can train, one row each. Other modules use these rows, never a model's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import MODEL_MAPPING, PretrainedConfig

from verl.models.token_grid import TokenGrid, grid_of_patches, grid_of_sized_image, grid_of_tiles

# ---- blank images: the smallest that a vision tower takes, as inputs of `get_image_features` ----


def blank_patches(model_config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """An image of four tokens for a tower that takes patches and their grid."""
    vision = model_config.vision_config
    side = 2 * vision.spatial_merge_size
    patch_size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": torch.zeros(side**2, patch_size), "image_grid_thw": torch.tensor([[1, side, side]])}


def blank_tile(model_config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """One tile, for a tower that takes tiles of one size."""
    size = model_config.vision_config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {"pixel_values": torch.zeros(1, 3, height, width)}


def blank_sized_image(model_config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """An image of four tokens for a tower that takes images of any size, with the size as an input."""
    side = 2 * model_config.vision_config.patch_size * model_config.spatial_merge_size
    return {"pixel_values": torch.zeros(1, 3, side, side), "image_sizes": torch.tensor([[side, side]])}


# ---- families ----


@dataclass(frozen=True)
class ModelFamily:
    """Facts about a family that transformers' auto classes and processors do not give."""

    name: str
    """Its name in messages."""
    model_types: tuple[str, ...]
    """The `model_type` of its configs."""
    media_token_fields: tuple[str, ...] = ()
    """Config fields with the placeholder ids, in the order of transformers' media types: 1 image, 2 video."""
    blank_image: Callable[[PretrainedConfig], dict[str, torch.Tensor]] | None = None
    """Makes a blank image, so that the vision tower takes part in every forward; None without a tower."""
    token_grid: Callable[..., TokenGrid] | None = None
    """Gives the positions of image tokens on the image: a function of `token_grid.py`; None without a tower."""
    token_types: str | None = None
    """Name of the model input that marks media tokens; None if the model has no such input."""
    uses_mrope: bool = False
    """Whether position ids have time, height and width beside the text position: (4, S) a row instead of (S,)."""
    copies_pixels: bool = False
    """Whether the processor needs real pixels to count an image's tokens; otherwise a shape is enough."""
    takes_videos: bool = False
    """Whether prompts may hold videos."""
    vllm_reads_videos: bool = False
    """Whether vLLM gives prompts with videos the positions that transformers gives them. Measured: log-probabilities
    of Qwen3-VL differ by less than 2e-5 in fp32, of Qwen3.5 in bf16 as much as with images. With Qwen2-VL and
    Qwen2.5-VL they differ by 0.3 to 0.5: vLLM counts on from the largest position of a video, its time included,
    transformers from its height and width."""
    marks_each_frame: bool = False
    """Whether each frame of a video has a time stamp and a pair of vision marks, in place of one pair per video."""
    attends_both_ways: bool = False
    """Whether the tokens of an image attend to later ones. This needs attention with a mask: FlashAttention and vLLM
    give other results than transformers."""
    transposed_weights: tuple[str, ...] = ()
    """Suffixes of the names of weights whose last two dimensions are swapped between transformers and checkpoints."""

    @property
    def has_vision_tower(self) -> bool:
        """Whether the model takes images, through `model.model.get_image_features`."""
        return self.blank_image is not None


FUSED_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")

QWEN = {
    "media_token_fields": ("image_token_id", "video_token_id"),
    "blank_image": blank_patches,
    "token_grid": grid_of_patches,
    "token_types": "mm_token_type_ids",
    "uses_mrope": True,
    "takes_videos": True,
}
QWEN3 = {**QWEN, "marks_each_frame": True, "vllm_reads_videos": True}
GLM = {**QWEN, "takes_videos": False}
TILES = {"media_token_fields": ("image_token_id",), "blank_image": blank_tile, "token_grid": grid_of_tiles}

MODEL_FAMILIES = (
    ModelFamily("Qwen2-VL", ("qwen2_vl",), **QWEN),
    ModelFamily("Qwen2.5-VL", ("qwen2_5_vl",), **QWEN),
    ModelFamily("Qwen3-VL", ("qwen3_vl",), **QWEN3),
    ModelFamily("Qwen3-VL-MoE", ("qwen3_vl_moe",), **QWEN3, transposed_weights=FUSED_EXPERTS),
    ModelFamily("Qwen3.5", ("qwen3_5", "qwen3_5_moe"), **QWEN3),
    ModelFamily("GLM-4V", ("glm4v", "glm4v_moe"), **GLM),
    ModelFamily("LLaVA", ("llava",), **TILES, copies_pixels=True),
    ModelFamily("InternVL", ("internvl",), **TILES),
    ModelFamily("Gemma 3", ("gemma3",), **TILES, token_types="token_type_ids", attends_both_ways=True),
    ModelFamily("Mistral 3", ("mistral3",), ("image_token_id",), blank_sized_image, grid_of_sized_image),
)

NESTED_TOWERS = {"clip_vision_model", "siglip_vision_model"}
"""Vision towers whose weights have a `vision_model.` in their checkpoint names, but not in transformers."""

PLAIN_TEXT = ModelFamily("plain text", ())
"""Any causal language model that takes only text."""


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


def checkpoint_name(model_config: PretrainedConfig, name: str) -> str:
    """Return the name in checkpoints of a weight of a loaded model."""
    vision_config = getattr(model_config, "vision_config", None)
    if vision_config is not None and vision_config.model_type in NESTED_TOWERS:
        return name.replace("vision_tower.", "vision_tower.vision_model.")
    return name


def packs(model_config: PretrainedConfig) -> bool:
    """Whether sequences may be packed in one row, with only attention keeping them apart.

    False for models with recurrent layers, which carry a state along the row; for models whose image tokens attend to
    each other; and for models with their own code, where neither is known.
    """
    model_class = MODEL_MAPPING.get(type(model_config), None)
    return model_class is not None and not model_class._is_stateful and not family_of(model_config).attends_both_ways


def media_token_ids(model_config: PretrainedConfig) -> list[int]:
    """Return the placeholder ids of image and video tokens.

    A response must never contain one: the model would look for media that is not there. Empty for text models.
    """
    return [getattr(model_config, field) for field in family_of(model_config).media_token_fields]


def media_token_types(model_config: PretrainedConfig, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the model input that marks media tokens, by the name the model has for it: 0 text, 1 image, 2 video.

    Same shape as `input_ids`, int64; an empty dict for models that take none.
    """
    name = family_of(model_config).token_types
    if name is None:
        return {}
    token_types = torch.zeros_like(input_ids)
    for media_type, token_id in enumerate(media_token_ids(model_config), start=1):
        token_types[input_ids == token_id] = media_type
    return {name: token_types}
