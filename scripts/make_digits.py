# SPDX-License-Identifier: Apache-2.0
"""Makes the quickstart's task: `python scripts/make_digits.py --output DIR [--seed 0]`.

Writes DIR/train.parquet, DIR/test.parquet (real handwritten digits side by side, and a question about them) and
DIR/model, a tiny Qwen2.5-VL which a short supervised phase has taught the form of an answer and some of the reading.
Nothing is downloaded: the digits are the UCI set that scikit-learn carries (E. Alpaydin, C. Kaynak, CC BY 4.0).

`--form long` has four digits, and answers of 60 to 100 tokens; four of these name a digit of the picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import transformers
from picture_task import MAX_RESPONSE_LENGTH, Example, generate_answers, score_answers, write_examples
from PIL import Image
from sklearn.datasets import load_digits
from tiny_qwen import build_model, build_processor, build_tokenizer, save_tiny
from warm_start import warm_start

QUESTION = "<image>What is the sum of the digits?"
DIGIT_PIXELS = 56  # two image tokens a side; the source has 8 x 8 pixels
# The set is ordered by writer. Its last writers are the test set, and no writer is on both sides of a line.
NUM_TRAIN_IMAGES = 1287
# Supervision sees the first eight of the ten training writers. Its length was chosen on the other two.
NUM_SUPERVISED_IMAGES = 1029

SFT_BATCH_SIZE = 32
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

    def side_by_side(self, *indices: int) -> Image.Image:
        """Put digits in a row."""
        picture = Image.new("L", (len(indices) * DIGIT_PIXELS, DIGIT_PIXELS))
        for place, index in enumerate(indices):
            picture.paste(self.images[index], (place * DIGIT_PIXELS, 0))
        return picture


def solution(left: int, right: int) -> str:
    """Write the answer that supervision teaches: name the digits, add them, box the sum."""
    return f"<think>I see {left} and {right}. {left}+{right}={left + right}.</think> \\boxed{{{left + right}}}"


def long_solution(*digits: int) -> str:
    """Name the digits, then add them one by one in words: only the first sentence has to look."""
    named = f"{', '.join(map(str, digits[:-1]))} and {digits[-1]}"
    total, steps = digits[0], [f"We start with {digits[0]}."]
    for digit in digits[1:]:
        steps.append(f"We add {digit} to {total} and get {total + digit}.")
        total += digit
    steps.append(f"So the sum of the {len(digits)} digits is {total}.")
    return f"<think>I see {named}. {' '.join(steps)}</think> \\boxed{{{total}}}"


@dataclass(frozen=True)
class Form:
    """The form of a row and its answer."""

    num_digits: int
    solution: Callable[..., str]
    sft_steps: int
    """Length of the warm start."""
    max_response_length: int
    """Tokens."""

    def example(self, digits: DigitImages, indices: Sequence[int]) -> Example:
        """The row of these images, the first on the left."""
        labels = [digits.labels[index] for index in indices]
        facts = {"digits": labels, "sources": list(indices)}
        image, answer = digits.side_by_side(*indices), str(sum(labels))
        return Example(image, QUESTION, answer, self.solution(*labels), facts)


FORMS = {
    "short": Form(2, solution, sft_steps=240, max_response_length=MAX_RESPONSE_LENGTH),
    "long": Form(4, long_solution, sft_steps=400, max_response_length=96),
}


def build_split(
    digits: DigitImages, sources: range, rng: np.random.Generator, form: Form, num_rows: int | None = None
) -> list[Example]:
    """Combine the images of `sources` at random. Each image is used once in every position, then again for more rows.

    The facts are `digits` and `sources`: the labels and the rows of scikit-learn's set.

    Args:
        num_rows: null is one round, as many as there are images.
    """
    rows: list[list[int]] = []
    while len(rows) < (num_rows or len(sources)):
        rows += np.stack([rng.permutation(sources) for _ in range(form.num_digits)], axis=1).tolist()
    return [form.example(digits, row) for row in rows[:num_rows]]


def main(
    output: Path, seed: int, steps: int | None = None, form: Form = FORMS["short"], held_out: int | None = None
) -> None:
    """Write data and model under `output`. The same `seed` gives the same files; the test set ignores it.

    Args:
        steps: number of steps of the warm start; null takes the form's number.
        held_out: rows of the test set; null is one for each of its images.
    """
    digits = DigitImages()
    output.mkdir(parents=True, exist_ok=True)
    test_images = range(NUM_TRAIN_IMAGES, len(digits.labels))
    splits = {
        "train": build_split(digits, range(NUM_TRAIN_IMAGES), np.random.default_rng(seed), form),
        "test": build_split(digits, test_images, np.random.default_rng(0), form, held_out),
    }
    for name, examples in splits.items():
        write_examples(examples, output / f"{name}.parquet")

    numbers = np.ndindex((10,) * form.num_digits)
    corpus = [QUESTION.removeprefix("<image>"), *(form.solution(*map(int, row)) for row in numbers)]
    processor = build_processor(build_tokenizer(corpus))
    model = build_model(processor.tokenizer, seed)
    rng = np.random.default_rng(seed)

    def draw() -> list[Example]:
        rows = rng.integers(NUM_SUPERVISED_IMAGES, size=(SFT_BATCH_SIZE, form.num_digits)).tolist()
        return [form.example(digits, row) for row in rows]

    warm_start(model, processor, draw, form.sft_steps if steps is None else steps)

    unseen = np.random.default_rng(0).integers(
        NUM_SUPERVISED_IMAGES, NUM_TRAIN_IMAGES, (NUM_SLICE_PAIRS, form.num_digits)
    )
    examples = [form.example(digits, row) for row in unseen.tolist()]
    images, prompts = [example.image for example in examples], [QUESTION] * len(examples)
    answers = generate_answers(model, processor, images, prompts, form.max_response_length)
    marks = score_answers(answers, [example.answer for example in examples])
    print(f"warm start: {marks['accuracy']:.0%} right, {marks['format']:.0%} in form, on two writers it has not seen")
    # Written last: whoever finds it finds a finished folder.
    save_tiny(output / "model", model, processor)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--form", choices=FORMS, default="short", help="of the answers (%(default)s)")
    parser.add_argument("--held-out", type=int, help="rows of the test set; by default one for each of its 510 images")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments = parser.parse_args()
    main(arguments.output, arguments.seed, form=FORMS[arguments.form], held_out=arguments.held_out)
