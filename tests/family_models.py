# SPDX-License-Identifier: Apache-2.0
"""A tiny random checkpoint of every model family: real configs and processors, a tokenizer of our own corpus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from tiny_qwen import CHAT_TEMPLATE
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from tests import vlm_zoo
from tests.tiny import CORPUS, build_tokenizer

PIXELS = vlm_zoo.PIXELS
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class FamilyModel:
    """How to make a checkpoint."""

    class_name: str
    config: Callable[[], PreTrainedConfig]
    build_processor: Callable[[PreTrainedTokenizerFast], ProcessorMixin] | None = None
    """None for models of text alone."""
    ids: dict[str, str] = field(default_factory=dict)
    """Tokens by the config field that has their id."""
    tokens: dict[str, str] = field(default_factory=dict)
    """Special tokens that the tokenizer has beside Qwen's, by the names that the family's tokenizer has for them."""
    image_mark: str = QWEN_IMAGE
    """What its chat template writes for an image."""


def text_config(config_class: type[PreTrainedConfig], **options: object) -> PreTrainedConfig:
    return config_class(**{**vlm_zoo.TEXT_CONFIG, **options})


EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)
SHARED = dict(shared_expert_intermediate_size=32)


def qwen3_vl_moe() -> PreTrainedConfig:
    dense = vlm_zoo.qwen3_vl().to_dict()
    text = {**vlm_zoo.TEXT_CONFIG, **EXPERTS, "rope_parameters": dense["text_config"]["rope_parameters"]}
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=dense["vision_config"], **vlm_zoo.QWEN_MEDIA)


def qwen3_5_moe() -> PreTrainedConfig:
    dense = vlm_zoo.qwen3_5().to_dict()
    text = {**dense["text_config"], **EXPERTS, **SHARED, "model_type": "qwen3_5_moe_text"}
    return transformers.Qwen3_5MoeConfig(text_config=text, vision_config=dense["vision_config"], **vlm_zoo.QWEN_MEDIA)


# ---- processors ----

QWEN_PATCHES = dict(patch_size=14, merge_size=2, temporal_patch_size=2)
SMALLEST = dict(shortest_edge=28 * 28, longest_edge=28 * 28 * 64)


def qwen_processor(processor: str, video_processor: str, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    return getattr(transformers, processor)(
        transformers.Qwen2VLImageProcessor(size=SMALLEST, **QWEN_PATCHES),
        tokenizer,
        getattr(transformers, video_processor)(size=SMALLEST, **QWEN_PATCHES),
        chat_template=tokenizer.chat_template,
    )


def glm_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    return transformers.Glm4vProcessor(
        transformers.Glm4vImageProcessor(size=SMALLEST, **QWEN_PATCHES),
        tokenizer,
        transformers.Glm4vVideoProcessor(size=SMALLEST, **QWEN_PATCHES),
        chat_template=tokenizer.chat_template,
    )


def llava_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """2 x 2 patches and the class token that the model drops."""
    size = dict(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(**size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def internvl_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """Up to three tiles of four tokens, and one of the whole image if there is more than one."""
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size={"height": PIXELS, "width": PIXELS}, max_patches=3),
        tokenizer,
        transformers.InternVLVideoProcessor(size={"height": PIXELS, "width": PIXELS}),
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )


def gemma_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    return transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size={"height": PIXELS, "width": PIXELS}),
        tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )


def mistral_processor(tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    """Images of any shape, at most 16 pixels long: two tokens of 8 x 8 pixels."""
    return transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": PIXELS}, patch_size=4),
        tokenizer,
        patch_size=4,
        spatial_merge_size=2,
        chat_template=tokenizer.chat_template,
    )


# ---- families ----

QWEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
GLM_IDS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
GEMMA_IDS = {
    "image_token_id": "<image_soft_token>",
    "boi_token_index": "<start_of_image>",
    "eoi_token_index": "<end_of_image>",
}
QWEN = partial(FamilyModel, ids=QWEN_IDS)
QWEN3_PROCESSOR = partial(qwen_processor, "Qwen3VLProcessor", "Qwen3VLVideoProcessor")

IMAGE_TEXT_MODELS = {
    "Qwen2-VL": QWEN(
        "Qwen2VLForConditionalGeneration",
        vlm_zoo.qwen2_vl,
        partial(qwen_processor, "Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    ),
    "Qwen2.5-VL": QWEN(
        "Qwen2_5_VLForConditionalGeneration",
        vlm_zoo.qwen2_5_vl,
        partial(qwen_processor, "Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    ),
    "Qwen3-VL": QWEN("Qwen3VLForConditionalGeneration", vlm_zoo.qwen3_vl, QWEN3_PROCESSOR),
    "Qwen3-VL-MoE": QWEN("Qwen3VLMoeForConditionalGeneration", qwen3_vl_moe, QWEN3_PROCESSOR),
    "Qwen3.5": QWEN("Qwen3_5ForConditionalGeneration", vlm_zoo.qwen3_5, QWEN3_PROCESSOR),
    "Qwen3.5-MoE": QWEN("Qwen3_5MoeForConditionalGeneration", qwen3_5_moe, QWEN3_PROCESSOR),
    "GLM-4V": FamilyModel(
        "Glm4vForConditionalGeneration",
        vlm_zoo.glm4v,
        glm_processor,
        GLM_IDS,
        {name.replace("_id", ""): token for name, token in GLM_IDS.items()},
        "<|begin_of_image|><|image|><|end_of_image|>",
    ),
    "LLaVA": FamilyModel(
        "LlavaForConditionalGeneration",
        vlm_zoo.llava,
        llava_processor,
        dict(image_token_id="<image>"),
        dict(image_token="<image>"),
        "<image>",
    ),
    "InternVL": FamilyModel(
        "InternVLForConditionalGeneration",
        vlm_zoo.internvl,
        internvl_processor,
        dict(image_token_id="<IMG_CONTEXT>"),
        dict(
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        "<IMG_CONTEXT>",
    ),
    "Gemma 3": FamilyModel(
        "Gemma3ForConditionalGeneration",
        vlm_zoo.gemma3,
        gemma_processor,
        GEMMA_IDS,
        dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"),
        "<start_of_image>",
    ),
    "Mistral 3": FamilyModel(
        "Mistral3ForConditionalGeneration",
        vlm_zoo.mistral3,
        mistral_processor,
        dict(image_token_id="[IMG]"),
        dict(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]"),
        "[IMG]",
    ),
}
TEXT_MODELS = {
    "Qwen2": FamilyModel("Qwen2ForCausalLM", partial(text_config, transformers.Qwen2Config)),
    "Qwen2-MoE": FamilyModel(
        "Qwen2MoeForCausalLM", partial(text_config, transformers.Qwen2MoeConfig, **EXPERTS, **SHARED)
    ),
    "Qwen3": FamilyModel("Qwen3ForCausalLM", partial(text_config, transformers.Qwen3Config)),
    "Qwen3-MoE": FamilyModel("Qwen3MoeForCausalLM", partial(text_config, transformers.Qwen3MoeConfig, **EXPERTS)),
}
FAMILY_MODELS = IMAGE_TEXT_MODELS | TEXT_MODELS


def make_family_tokenizer(family: FamilyModel) -> PreTrainedTokenizerFast:
    plain = build_tokenizer(CORPUS)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain._tokenizer,
        eos_token=plain.eos_token,
        pad_token=plain.pad_token,
        extra_special_tokens={
            **{f"qwen_{index}": token for index, token in enumerate(plain.all_special_tokens)},
            **family.tokens,
        },
        chat_template=CHAT_TEMPLATE.replace(QWEN_IMAGE, family.image_mark),
        padding_side="left",
    )


def show_images(model: PreTrainedModel) -> None:
    """Makes one image tell from another in what a fresh model says; Gemma's projector begins at zero."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and ("patch_embed" in name or "multi_modal_projector" in name):
            torch.nn.init.normal_(weight, std=0.4, generator=generator)


def make_family_model(name: str, directory: Path) -> str:
    """Write a random checkpoint of the family, with its processor if it has one, and return its folder."""
    family = FAMILY_MODELS[name]
    tokenizer = make_family_tokenizer(family)
    config = family.config()
    text = config.get_text_config()
    text.vocab_size = len(tokenizer)
    for holder in (config, text):
        holder.pad_token_id, holder.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    for config_field, token in family.ids.items():
        setattr(config, config_field, tokenizer.convert_tokens_to_ids(token))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, family.class_name)(config)
    vlm_zoo.sharpen(model)
    show_images(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    (tokenizer if family.build_processor is None else family.build_processor(tokenizer)).save_pretrained(directory)
    return str(directory)
