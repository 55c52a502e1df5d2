# SPDX-License-Identifier: Apache-2.0
"""The tiny vision-language model that tests load: `make_tiny_model(directory)` writes one in well under a second."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from tiny_qwen import build_model, build_processor, build_tokenizer, save_tiny

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
