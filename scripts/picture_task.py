# SPDX-License-Identifier: Apache-2.0
"""Common code of the tiny tasks: examples, prompts as in the trainer, answers, scores."""

from __future__ import annotations

import io
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

REWARD_FUNCTIONS = Path(__file__).resolve().parent.parent / "examples" / "reward_function"
MAX_RESPONSE_LENGTH = 40  # tokens; a right answer to two digits has 26 to 28
GENERATION_BATCH_SIZE = 128


@dataclass(frozen=True)
class Example:
    """A question about a picture, and an answer as supervision teaches it."""

    image: Image.Image
    prompt: str
    """With `<image>` in the picture's place."""
    answer: str
    """The ground truth that the reward function gets."""
    solution: str
    """The whole response."""
    facts: Mapping[str, list[int] | str] = field(default_factory=dict)
    """Further columns of the data, for the curious."""


def write_examples(examples: Sequence[Example], path: Path) -> None:
    """Write a Parquet file: `images` (a list of one PNG), `prompt`, `answer` (str) and the facts.

    Facts are lists of integers or texts, under the same names in all examples.
    """
    rows: dict[str, list] = {"images": [], "prompt": [], "answer": []}
    for example in examples:
        png = io.BytesIO()
        example.image.save(png, format="PNG")
        rows["images"].append([{"bytes": png.getvalue(), "path": None}])
        rows["prompt"].append(example.prompt)
        rows["answer"].append(example.answer)
        for name, fact in example.facts.items():
            rows.setdefault(name, []).append(fact)
    text = datasets.Value("string")
    features = {"images": datasets.List(datasets.Image()), "prompt": text, "answer": text}
    for name, fact in examples[0].facts.items():
        features[name] = text if isinstance(fact, str) else datasets.List(datasets.Value("int64"))
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)


def encode_prompts(
    processor: ProcessorMixin, images: Sequence[Image.Image], prompts: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Turn N images and their one-image prompts into model inputs: `input_ids` (N, P), left-padded, and its company.

    `<image>` in a prompt becomes an image part of the one user turn, as in the trainer's dataset.
    """
    texts = []
    for prompt in prompts:
        before, after = ({"type": "text", "text": text} if text else None for text in prompt.split("<image>"))
        content = [part for part in (before, {"type": "image"}, after) if part is not None]
        turn = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    rgb = [image.convert("RGB") for image in images]
    return dict(processor(text=texts, images=rgb, padding=True, return_tensors="pt"))


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    max_response_length: int = MAX_RESPONSE_LENGTH,
) -> list[str]:
    """Answer each prompt about its image, greedily and without special tokens.

    Args:
        max_response_length: tokens.
    """
    tokenizer = processor.tokenizer
    # A placeholder that the model makes up has no image behind it, and the next forward would fail on it.
    suppressed = [token for token in tokenizer.all_special_ids if token != tokenizer.eos_token_id]
    model.eval()
    answers = []
    for start in range(0, len(images), GENERATION_BATCH_SIZE):
        rows = slice(start, start + GENERATION_BATCH_SIZE)
        inputs = encode_prompts(processor, images[rows], prompts[rows])
        sequences = model.generate(
            **inputs, do_sample=False, max_new_tokens=max_response_length, suppress_tokens=suppressed
        )  # (N, S)
        responses = sequences[:, inputs["input_ids"].shape[1] :]  # (N, R)
        answers += tokenizer.batch_decode(responses, skip_special_tokens=True)
    return answers


def score_answers(
    answers: Sequence[str], ground_truths: Sequence[str], reward_function: str = "digits"
) -> dict[str, float]:
    """Mark answers with the task's own reward function; the mean of each of its keys.

    Args:
        reward_function: the name of its file in `examples/reward_function/`.
    """
    compute_score = runpy.run_path(str(REWARD_FUNCTIONS / f"{reward_function}.py"))["compute_score"]
    scores = compute_score(
        [{"response": answer, "ground_truth": truth} for answer, truth in zip(answers, ground_truths, strict=True)]
    )
    return {key: sum(score[key] for score in scores) / len(scores) for key in scores[0]}
