# SPDX-License-Identifier: Apache-2.0
"""Makes the quickstart's task: `python scripts/make_digits.py --output DIR [--seed 0]`.

Writes DIR/train.parquet, DIR/test.parquet (real handwritten digits, two side by side, and a question about them) and
DIR/model, a tiny Qwen2.5-VL which a short supervised phase has taught the form of an answer and some of the reading.
Nothing is downloaded: the digits are the UCI set that scikit-learn carries (E. Alpaydin, C. Kaynak, CC BY 4.0).
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from digits_task import encode_prompts, generate_answers, score_answers
from PIL import Image
from sklearn.datasets import load_digits
from tiny_qwen import END_OF_TURN, build_model, build_processor, build_tokenizer, save_tiny
from tqdm import tqdm

QUESTION = "<image>What is the sum of the digits?"
DIGIT_PIXELS = 56  # two image tokens a side; the source has 8 x 8 pixels
# The set is ordered by writer. Its last writers are the test set, and no writer is on both sides of a line.
NUM_TRAIN_IMAGES = 1287
# Supervision sees the first eight of the ten training writers. Its length was chosen on the other two.
NUM_SUPERVISED_IMAGES = 1029

SFT_STEPS = 240
SFT_BATCH_SIZE = 32
SFT_WARMUP_STEPS = 50
SFT_LEARNING_RATE = 2e-3
NUM_SLICE_PAIRS = 128


class DigitImages:
    """The 1797 digits as dark strokes on white, `DIGIT_PIXELS` a side, with their labels."""

    def __init__(self) -> None:
        source = load_digits()
        self.labels: list[int] = source.target.tolist()
        self.images = [
            Image.fromarray((255 - image * 255 / 16).astype(np.uint8)).resize(
                (DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BICUBIC
            )
            for image in source.images
        ]

    def pair(self, left: int, right: int) -> Image.Image:
        """Put two digits side by side."""
        picture = Image.new("L", (2 * DIGIT_PIXELS, DIGIT_PIXELS))
        picture.paste(self.images[left], (0, 0))
        picture.paste(self.images[right], (DIGIT_PIXELS, 0))
        return picture


def solution(left: int, right: int) -> str:
    """Write the answer that supervision teaches: name the digits, add them, box the sum."""
    return f"<think>I see {left} and {right}. {left}+{right}={left + right}.</think> \\boxed{{{left + right}}}"


def build_split(digits: DigitImages, sources: range, rng: np.random.Generator) -> datasets.Dataset:
    """Pair the images of `sources` at random, each of them once on the left and once on the right.

    Columns: `images` (a list of one PNG), `prompt`, `answer` (str), and for the curious `digits` and `sources` (two
    integers each: the labels and the rows of scikit-learn's set).
    """
    pairs = np.stack([rng.permutation(sources), rng.permutation(sources)], axis=1).tolist()
    rows: dict[str, list] = {"images": [], "prompt": [], "answer": [], "digits": [], "sources": []}
    for left, right in pairs:
        png = io.BytesIO()
        digits.pair(left, right).save(png, format="PNG")
        labels = [digits.labels[left], digits.labels[right]]
        rows["images"].append([{"bytes": png.getvalue(), "path": None}])
        rows["prompt"].append(QUESTION)
        rows["answer"].append(str(sum(labels)))
        rows["digits"].append(labels)
        rows["sources"].append([left, right])
    integers = datasets.List(datasets.Value("int64"))
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        prompt=datasets.Value("string"),
        answer=datasets.Value("string"),
        digits=integers,
        sources=integers,
    )
    return datasets.Dataset.from_dict(rows, features=features)


def response_batch(
    tokenizer: transformers.PreTrainedTokenizerFast, responses: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenise responses with their end of turn, right-padded; returns ids and mask, (N, R) each."""
    encoded = tokenizer(
        [response + END_OF_TURN for response in responses],
        add_special_tokens=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    return encoded.input_ids, encoded.attention_mask


def response_loss(
    model: transformers.Qwen2_5_VLForConditionalGeneration,
    prompts: dict[str, torch.Tensor],
    responses: torch.Tensor,
    response_mask: torch.Tensor,
) -> torch.Tensor:
    """Mean cross-entropy (nats) of the real tokens of `responses` (N, R) after `prompts`; a scalar with gradient."""
    inputs = prompts | {
        "input_ids": torch.cat([prompts["input_ids"], responses], dim=1),  # (N, S)
        "attention_mask": torch.cat([prompts["attention_mask"], response_mask], dim=1),  # (N, S)
        # Without token types the model falls back to one-dimensional positions and says nothing.
        "mm_token_type_ids": torch.cat([prompts["mm_token_type_ids"], torch.zeros_like(responses)], dim=1),  # (N, S)
    }
    logits = model(**inputs, logits_to_keep=responses.shape[1] + 1).logits[:, :-1]  # (N, R, V)
    per_token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), responses, reduction="none")  # (N, R)
    return (per_token * response_mask).sum() / response_mask.sum()


def warm_start(
    model: transformers.Qwen2_5_VLForConditionalGeneration,
    processor: transformers.Qwen2_5_VLProcessor,
    digits: DigitImages,
    rng: np.random.Generator,
    steps: int,
) -> None:
    """Teach `model` the form of an answer by `steps` batches of supervised pairs; updates it in place.

    It stops early on purpose, when the form is right and the reading is mediocre, so that there is something left for
    reinforcement learning to find.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / SFT_WARMUP_STEPS))
    model.train()
    bar = tqdm(range(steps), desc="warm start", unit="step")
    for _ in bar:
        pairs = rng.integers(NUM_SUPERVISED_IMAGES, size=(SFT_BATCH_SIZE, 2)).tolist()
        labels = [(digits.labels[left], digits.labels[right]) for left, right in pairs]
        prompts = encode_prompts(processor, [digits.pair(*pair) for pair in pairs], QUESTION)
        responses, response_mask = response_batch(processor.tokenizer, [solution(*pair) for pair in labels])  # (N, R)
        loss = response_loss(model, prompts, responses, response_mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def main(output: Path, seed: int, steps: int = SFT_STEPS) -> None:
    """Write data and model under `output`. The same `seed` gives the same files; the test set ignores it."""
    digits = DigitImages()
    output.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    splits = {
        "train": (range(NUM_TRAIN_IMAGES), np.random.default_rng(seed)),
        "test": (range(NUM_TRAIN_IMAGES, len(digits.labels)), np.random.default_rng(0)),
    }
    for name, (sources, rng) in splits.items():
        build_split(digits, sources, rng).to_parquet(output / f"{name}.parquet")

    sums = [(left, right) for left in range(10) for right in range(10)]
    processor = build_processor(build_tokenizer([QUESTION.removeprefix("<image>"), *(solution(*s) for s in sums)]))
    model = build_model(processor.tokenizer, seed)
    warm_start(model, processor, digits, np.random.default_rng(seed), steps)

    slice_pairs = np.random.default_rng(0).integers(NUM_SUPERVISED_IMAGES, NUM_TRAIN_IMAGES, (NUM_SLICE_PAIRS, 2))
    answers = generate_answers(model, processor, [digits.pair(*pair) for pair in slice_pairs], QUESTION)
    marks = score_answers(answers, [str(digits.labels[left] + digits.labels[right]) for left, right in slice_pairs])
    print(f"warm start: {marks['accuracy']:.0%} right, {marks['format']:.0%} in form, on two writers it has not seen")
    # Written last: whoever finds it finds a finished folder.
    save_tiny(output / "model", model, processor)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments = parser.parse_args()
    main(arguments.output, arguments.seed)
