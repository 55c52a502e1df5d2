# SPDX-License-Identifier: Apache-2.0
"""The tiny models that tests load, with images and without: each is written in well under a second."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import torch
from tiny_qwen import build_model, build_processor, build_tokenizer, save_tiny
from transformers import Qwen2Config, Qwen2ForCausalLM

CORPUS = (
    "What is the sum of the digits? What is in the picture?",
    "<think>I see 3 and 9. 3+9=12.</think> \\boxed{12}",
    "The quick brown fox jumps over the lazy dog. Answer in one word.",
)


def make_tiny_model(directory: str | Path, seed: int = 0, **sizes: int | bool) -> str:
    """Write a random Qwen2.5-VL (2 decoder layers, hidden size 64, 1 vision layer) and return its folder.

    `sizes` override the keyword arguments of `tiny_qwen.build_model`.
    """
    tokenizer = build_tokenizer(CORPUS)
    defaults = dict(hidden_size=64, num_layers=2, num_heads=4, vision_hidden_size=32, vision_depth=1, vision_heads=2)
    model = build_model(tokenizer, seed, **{**defaults, **sizes})
    return save_tiny(directory, model, build_processor(tokenizer))


def make_tiny_text_model(directory: str | Path) -> str:
    """Write a random Qwen2 (2 layers, hidden size 64) with the same tokenizer and return its folder."""
    tokenizer = build_tokenizer(CORPUS)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes, **ids))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)
