# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of several vision-language families, and batches that each of them takes.

A prompt is written one character a token: s the first one, t text, p another prompt token (special, system turn), and
a digit for an image of that size, which becomes one or four placeholders per unit of size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2VLImageProcessor

from verl.utils.attention_metrics import KeyKind

VOCAB_SIZE, PAD, SPECIAL, IMAGE, VIDEO, START, END = 100, 0, 95, 96, 97, 98, 99
TEXT_IDS = range(1, 90)
TEXT_CONFIG = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    pad_token_id=PAD,
    bos_token_id=None,
    eos_token_id=None,
)
PIXELS = 16  # the side of a tile
TILE = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=PIXELS)
QWEN_MEDIA = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)

Images = Sequence[Sequence[int]]
"""The sizes of each row's images."""


# ---- images ----


def qwen_images(images: Images, **options: int) -> dict[str, torch.Tensor]:
    """Noise as Qwen's own image processor prepares it: an image of size n is n tokens wide."""
    processor = Qwen2VLImageProcessor(patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=28 * 28)
    generator = torch.Generator().manual_seed(0)
    noise = [
        torch.randint(0, 256, (3, 28, 28 * size), dtype=torch.uint8, generator=generator)
        for row in images
        for size in row
    ]
    return dict(processor(images=noise, return_tensors="pt", **options))


def tiles(images: Images) -> dict[str, torch.Tensor]:
    """One after the other, whatever row they belong to: an image of size n is n tiles."""
    number = sum(size for row in images for size in row)
    return {"pixel_values": torch.randn(number, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))}


def tiles_with_sizes(images: Images) -> dict[str, torch.Tensor]:
    pixels = tiles(images)
    return {**pixels, "image_sizes": torch.full((len(pixels["pixel_values"]), 2), PIXELS)}


def tiles_by_row(images: Images) -> dict[str, torch.Tensor]:
    """(N, most tiles of a row, ...), where rows with fewer are filled up with black ones."""
    per_row = [sum(row) for row in images]
    pixels = torch.zeros(len(images), max(per_row), 3, PIXELS, PIXELS)
    for row, own in zip(pixels, tiles(images)["pixel_values"].split(per_row), strict=True):
        row[: len(own)] = own
    return {"pixel_values": pixels}


# ---- models ----


def mrope() -> dict[str, Any]:
    """Rope settings for one config, whose sections a test may change."""
    return dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])


@dataclass(frozen=True)
class Family:
    """How to make a tiny model, and what it takes beside `input_ids` and `attention_mask`."""

    class_name: str
    config: Callable[[], PreTrainedConfig]
    images: Callable[[Images], dict[str, torch.Tensor]]
    tokens_per_unit: int
    type_ids: str | None = None
    """Name of the input that is 1 on image tokens."""
    makes_position_ids: bool = False
    """Whether the model makes good position ids of the attention mask itself, as multimodal rope has to be."""


def qwen2_vl() -> PreTrainedConfig:
    vision = dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=14)
    return transformers.Qwen2VLConfig(
        text_config={**TEXT_CONFIG, "rope_parameters": mrope()}, vision_config=vision, **QWEN_MEDIA
    )


def qwen2_5_vl() -> PreTrainedConfig:
    vision = dict(depth=2, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=32, patch_size=14)
    return transformers.Qwen2_5_VLConfig(
        text_config={**TEXT_CONFIG, "rope_parameters": mrope()},
        vision_config={**vision, "window_size": 56, "fullatt_block_indexes": [1]},
        **QWEN_MEDIA,
    )


def qwen3_vl() -> PreTrainedConfig:
    vision = dict(depth=2, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=32, patch_size=14)
    return transformers.Qwen3VLConfig(
        text_config={**TEXT_CONFIG, "rope_parameters": {**mrope(), "mrope_interleaved": True}},
        vision_config={**vision, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **QWEN_MEDIA,
    )


def qwen3_5() -> PreTrainedConfig:
    """Layers 1 and 3 attend, 0 and 2 are recurrent."""
    vision = dict(depth=1, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=32, patch_size=14)
    linear = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")} | dict(
        linear_key_head_dim=16, linear_value_head_dim=16
    )
    layers = dict(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2)
    rope = {**mrope(), "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    return transformers.Qwen3_5Config(
        text_config={**TEXT_CONFIG, **linear, **layers, "rope_parameters": rope},
        vision_config={**vision, "num_position_embeddings": 16},
        **QWEN_MEDIA,
    )


def glm4v() -> PreTrainedConfig:
    vision = dict(depth=1, hidden_size=32, out_hidden_size=64, num_heads=2, intermediate_size=32, patch_size=14)
    return transformers.Glm4vConfig(
        text_config={**TEXT_CONFIG, "rope_parameters": {**mrope(), "partial_rotary_factor": 1.0}},
        vision_config={**vision, "image_size": 28},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=START,
        video_end_token_id=END,
    )


def gemma3() -> PreTrainedConfig:
    """Layers 1 and 3 see everything, 0 and 2 the last four tokens."""
    layers = dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=4)
    return transformers.Gemma3Config(
        text_config={**TEXT_CONFIG, **layers, "query_pre_attn_scalar": 16},
        vision_config={**TILE, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def llava() -> PreTrainedConfig:
    return transformers.LlavaConfig(
        text_config={**TEXT_CONFIG, "model_type": "llama"},
        vision_config={**TILE, "patch_size": 8, "projection_dim": 32, "model_type": "clip_vision_model"},
        vision_feature_layer=-1,
        image_token_index=IMAGE,
        image_seq_length=4,
    )


def mistral3() -> PreTrainedConfig:
    return transformers.Mistral3Config(
        text_config={**TEXT_CONFIG, "model_type": "mistral", "sliding_window": None},
        vision_config={**TILE, "patch_size": 4, "head_dim": 16, "model_type": "pixtral"},
        image_token_index=IMAGE,
    )


def internvl() -> PreTrainedConfig:
    tile = {**TILE, "image_size": (PIXELS, PIXELS), "patch_size": (4, 4)}
    return transformers.InternVLConfig(
        text_config={**TEXT_CONFIG, "model_type": "qwen2"},
        vision_config=tile,
        image_token_id=IMAGE,
        image_seq_length=4,
    )


def smolvlm() -> PreTrainedConfig:
    return transformers.SmolVLMConfig(
        text_config={**TEXT_CONFIG, "model_type": "llama"},
        vision_config={**TILE, "patch_size": 4},
        scale_factor=2,
        image_token_id=IMAGE,
        pad_token_id=PAD,
    )


QWEN = partial(Family, images=qwen_images, tokens_per_unit=1, type_ids="mm_token_type_ids", makes_position_ids=True)
FAMILIES = {
    "Qwen2-VL": QWEN("Qwen2VLForConditionalGeneration", qwen2_vl),
    "Qwen2.5-VL": QWEN("Qwen2_5_VLForConditionalGeneration", qwen2_5_vl),
    "Qwen3-VL": QWEN("Qwen3VLForConditionalGeneration", qwen3_vl),
    "Qwen3.5": QWEN("Qwen3_5ForConditionalGeneration", qwen3_5),
    "GLM-4V": QWEN("Glm4vForConditionalGeneration", glm4v),
    "Gemma 3": Family("Gemma3ForConditionalGeneration", gemma3, tiles, 4, type_ids="token_type_ids"),
    "LLaVA": Family("LlavaForConditionalGeneration", llava, tiles, 4),
    "Mistral 3": Family("Mistral3ForConditionalGeneration", mistral3, tiles_with_sizes, 4),
    "InternVL": Family("InternVLForConditionalGeneration", internvl, tiles, 4),
    "SmolVLM": Family("SmolVLMForConditionalGeneration", smolvlm, tiles_by_row, 4),
}


def make_model(class_name: str, config: PreTrainedConfig, implementation: str = "sdpa") -> PreTrainedModel:
    """A random float32 model in evaluation mode whose attention is far from even."""
    config._attn_implementation = implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, class_name)(config).eval()
    model.generation_config.eos_token_id = None
    sharpen(model)
    return model


@torch.no_grad()
def sharpen(model: PreTrainedModel) -> None:
    """Takes a fresh model's attention away from even, so that positions and masks show in what it says."""
    for name, parameter in model.get_decoder().named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter *= 12
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter += 2


# ---- batches ----


@dataclass
class PromptBatch:
    """Prompts of one width, and the images they show. Shapes: N rows, P columns."""

    input_ids: torch.Tensor  # (N, P)
    kinds: torch.Tensor  # (N, P) of KeyKind
    images: Images

    @property
    def attention_mask(self) -> torch.Tensor:
        """(N, P), 0 on padding."""
        return (self.kinds != KeyKind.PADDING).long()


def write_prompts(family: Family, prompts: Sequence[str], padding: str = "left") -> PromptBatch:
    """The prompts as ids and kinds, padded on one side to the longest."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt in prompts:
        tokens: list[tuple[int, int]] = []
        for character in prompt:
            text = int(torch.randint(TEXT_IDS.start, TEXT_IDS.stop, (1,), generator=generator))
            if character.isdigit():
                tokens += [(IMAGE, KeyKind.VISION)] * (int(character) * family.tokens_per_unit)
            else:
                kind = {"s": KeyKind.SINK, "t": KeyKind.TEXT, "p": KeyKind.PROMPT}[character]
                tokens.append((SPECIAL if character == "p" else text, kind))
        rows.append(tokens)
    width = max(len(row) for row in rows)
    padded = []
    for row in rows:
        filler = [(PAD, KeyKind.PADDING)] * (width - len(row))
        padded.append(filler + row if padding == "left" else row + filler)
    table = torch.tensor(padded)  # (N, P, 2)
    images = [[int(character) for character in prompt if character.isdigit()] for prompt in prompts]
    return PromptBatch(table[..., 0], table[..., 1].to(torch.int8), images)


def model_inputs(
    family: Family, input_ids: torch.Tensor, attention_mask: torch.Tensor, images: Images
) -> dict[str, Any]:
    """All that a forward or `generate` of the family takes for (N, S) ids."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if any(images):
        inputs |= family.images(images)
    if family.type_ids is not None:
        inputs[family.type_ids] = (input_ids == IMAGE).long()
    if not family.makes_position_ids:
        inputs["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return inputs
