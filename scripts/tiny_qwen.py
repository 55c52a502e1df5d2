# SPDX-License-Identifier: Apache-2.0
"""Builds a tiny Qwen2.5-VL from nothing: real transformers classes, own byte-level tokenizer, under a million weights.

The quickstart trains one, the tests use a smaller one. The folder written loads like any checkpoint from the hub.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

END_OF_TURN = "<|im_end|>"
PAD = "<|endoftext|>"
SPECIAL_TOKENS = (
    PAD,
    "<|im_start|>",
    END_OF_TURN,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The layout of Qwen's chats, without its default system turn: a tiny model should not spend half its prompt on one.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}{{ '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant{{ '\\n' }}
{%- endif -%}
"""
PATCH_SIZE = 14  # pixels
MERGE_SIZE = 2  # patches on each side that become one image token


def build_tokenizer(corpus: Iterable[str], vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `corpus`, with Qwen's special tokens first and every digit a token.

    Any text can be encoded; words of the corpus become short. `vocab_size` is a ceiling that a small corpus does not
    reach. Left padding, as generation needs.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus, "system\n", "user\n", "assistant\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (END_OF_TURN, PAD)],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    """Wrap `tokenizer` in Qwen2.5-VL's processor, with the lower pixel limit at a single image token."""
    sizes = dict(patch_size=PATCH_SIZE, merge_size=MERGE_SIZE, temporal_patch_size=2)
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=(PATCH_SIZE * MERGE_SIZE) ** 2, **sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    *,
    hidden_size: int = 128,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    vision_hidden_size: int = 64,
    vision_depth: int = 2,
    vision_heads: int = 4,
    intermediate_size: int | None = None,
    vision_intermediate_size: int | None = None,
    vocab_size: int | None = None,
    tie_word_embeddings: bool = False,
) -> Qwen2_5_VLForConditionalGeneration:
    """Make a randomly initialised float32 model for `tokenizer`; the same `seed` gives the same weights.

    MLPs are twice as wide as the hidden size where not said otherwise, and the vocabulary is the tokenizer's; a larger
    one has ids without tokens. `hidden_size / num_heads` must be a multiple of 16, so that the rotary
    frequencies divide over time, height and width in Qwen's proportion of 2 : 3 : 3. The last vision layer sees the
    whole image, the others windows of 112 pixels.
    """
    head_dim = hidden_size // num_heads
    if head_dim * num_heads != hidden_size or head_dim % 16:
        raise ValueError(f"hidden_size={hidden_size} / num_heads={num_heads} is not a multiple of 16")
    section = head_dim // 16
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocab_size or len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size or 2 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            max_position_embeddings=1024,
            rope_parameters=dict(
                rope_type="default", rope_theta=10000.0, mrope_section=[2 * section, 3 * section, 3 * section]
            ),
            bos_token_id=None,
            eos_token_id=ids[END_OF_TURN],
            pad_token_id=ids[PAD],
            tie_word_embeddings=tie_word_embeddings,
        ),
        vision_config=dict(
            depth=vision_depth,
            hidden_size=vision_hidden_size,
            intermediate_size=vision_intermediate_size or 2 * vision_hidden_size,
            num_heads=vision_heads,
            out_hidden_size=hidden_size,
            patch_size=PATCH_SIZE,
            spatial_merge_size=MERGE_SIZE,
            window_size=112,
            fullatt_block_indexes=[vision_depth - 1],
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids[END_OF_TURN]
    model.generation_config.pad_token_id = ids[PAD]
    return model


def save_tiny(directory: str | Path, model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor) -> str:
    """Write model, tokenizer and processor as one Hugging Face folder and return its path."""
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return str(directory)
