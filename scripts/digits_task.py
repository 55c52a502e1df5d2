# SPDX-License-Identifier: Apache-2.0
"""What making and judging the digits share: prompts as the trainer builds them, greedy answers and their marks."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

REWARD_FILE = Path(__file__).resolve().parent.parent / "examples" / "reward_function" / "digits.py"
MAX_RESPONSE_LENGTH = 40  # tokens; a right answer has 26 to 28
GENERATION_BATCH_SIZE = 128


def encode_prompts(processor: ProcessorMixin, images: Sequence[Image.Image], prompt: str) -> dict[str, torch.Tensor]:
    """Turn N images, each under the same one-image `prompt`, into model inputs: `input_ids` (N, P) and its company.

    `<image>` in the prompt becomes an image part of the one user turn, as in the trainer's dataset.
    """
    before, after = prompt.split("<image>")
    texts = [{"type": "text", "text": text} if text else None for text in (before, after)]
    content = [part for part in (texts[0], {"type": "image"}, texts[1]) if part is not None]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    rgb = [image.convert("RGB") for image in images]
    return dict(processor(text=[text] * len(rgb), images=rgb, padding=True, return_tensors="pt"))


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Image.Image], prompt: str
) -> list[str]:
    """Answer `prompt` about each image, greedily and without special tokens."""
    tokenizer = processor.tokenizer
    # A placeholder that the model makes up has no image behind it, and the next forward would fail on it.
    suppressed = [token for token in tokenizer.all_special_ids if token != tokenizer.eos_token_id]
    model.eval()
    answers = []
    for start in range(0, len(images), GENERATION_BATCH_SIZE):
        inputs = encode_prompts(processor, images[start : start + GENERATION_BATCH_SIZE], prompt)
        sequences = model.generate(
            **inputs, do_sample=False, max_new_tokens=MAX_RESPONSE_LENGTH, suppress_tokens=suppressed
        )  # (N, S)
        responses = sequences[:, inputs["input_ids"].shape[1] :]  # (N, R)
        answers += tokenizer.batch_decode(responses, skip_special_tokens=True)
    return answers


def score_answers(answers: Sequence[str], ground_truths: Sequence[str]) -> dict[str, float]:
    """Mark answers with the quickstart's own reward function; the mean of each of its keys."""
    compute_score = runpy.run_path(str(REWARD_FILE))["compute_score"]
    scores = compute_score(
        [{"response": answer, "ground_truth": truth} for answer, truth in zip(answers, ground_truths, strict=True)]
    )
    return {key: sum(score[key] for score in scores) / len(scores) for key in scores[0]}
