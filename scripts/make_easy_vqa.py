# SPDX-License-Identifier: Apache-2.0
"""Makes questions about coloured shapes: `python scripts/make_easy_vqa.py --output DIR [--seed 0]`.

Writes DIR/train.parquet, DIR/test.parquet and DIR/model, as `scripts/make_digits.py` does. Pictures and questions are
easy-VQA's (Victor Zhou, MIT; `pip install easy-vqa==1.0`): 4,000 pictures to train on and 1,000 held out, each with
one shape, and questions on its shape, its colour and what is there. A third of the rows asks for each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import transformers
from picture_task import Example, generate_answers, score_answers, write_examples
from PIL import Image
from tiny_qwen import build_model, build_processor, build_tokenizer, save_tiny
from warm_start import warm_start

PICTURE_PIXELS = 112  # four image tokens a side; the source has 64 x 64 pixels
NUM_TRAIN, NUM_HELD_OUT = 2001, 2001  # rows, a third of each kind
# Supervision sees the first pictures of the training set, and is judged on questions about the last ones.
NUM_SUPERVISED_PICTURES, NUM_SLICE_PICTURES = 3000, 500
NUM_SLICE_ROWS = 126

SFT_STEPS = 520
SFT_BATCH_SIZE = 32
# The model reads colours well or not at all, which leaves nothing for reinforcement learning to sharpen. So half the
# pictures of the last supervised steps are given the next colour's name, and the model wavers between the two.
CONFUSED_STEPS = 120
CONFUSED_SHARE = 0.5
VOCAB_SIZE = 500  # the words of the questions are a token each

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
NAMES = SHAPES + COLORS
KINDS = ("shape", "color", "presence")


@dataclass(frozen=True)
class Question:
    """One of easy-VQA's."""

    text: str
    answer: str
    picture: int
    """Its number in the split."""

    @property
    def kind(self) -> str:
        """The kind of question, one of `KINDS`."""
        if self.answer in ("yes", "no"):
            return "presence"
        return "shape" if self.answer in SHAPES else "color"

    @property
    def words(self) -> list[str]:
        """The words, without the question mark."""
        return self.text.rstrip("?").split()

    @property
    def is_negated(self) -> bool:
        """Whether `yes` says that something is missing."""
        return "not" in self.words or "no" in self.words


@dataclass(frozen=True)
class Split:
    """Half of easy-VQA."""

    questions: Sequence[Question]
    paths: dict[int, str]
    """File of each picture, by its number."""
    seen: dict[int, str]
    """The content of each picture: `red circle`."""

    def example(self, question: Question, seen: str | None = None) -> Example:
        """The row of a question.

        Args:
            seen: the content that the solution states; null is the true content.
        """
        picture = Image.open(self.paths[question.picture]).convert("RGB")
        picture = picture.resize((PICTURE_PIXELS, PICTURE_PIXELS), Image.Resampling.BICUBIC)
        facts = {"kind": question.kind, "seen": self.seen[question.picture], "sources": [question.picture]}
        text = solution(seen or self.seen[question.picture], question)
        return Example(picture, f"<image>{question.text}", question.answer, text, facts)

    def of_kinds(self, rng: np.random.Generator, num_rows: int, pictures: range) -> list[Question]:
        """Equally many questions of each kind, without repetition, in random order."""
        chosen: list[Question] = []
        for kind in KINDS:
            of_kind = [one for one in self.questions if one.kind == kind and one.picture in pictures]
            chosen += [of_kind[index] for index in rng.choice(len(of_kind), num_rows // len(KINDS), replace=False)]
        return [chosen[index] for index in rng.permutation(len(chosen))]


def confused(seen: str) -> str:
    """The same shape in the next colour."""
    color, shape = seen.split()
    return f"{COLORS[(COLORS.index(color) + 1) % len(COLORS)]} {shape}"


def answer_from(seen: str, question: Question) -> str:
    """The answer to a question about a picture with this content."""
    color, shape = seen.split()
    if question.kind != "presence":
        return {"color": color, "shape": shape}[question.kind]
    is_there = any(word in (color, shape) for word in question.words)
    return "no" if is_there == question.is_negated else "yes"


def solution(seen: str, question: Question) -> str:
    """Write the answer for the supervised phase: the content, the question, the boxed answer."""
    if question.kind == "presence":
        subject = next(f"{word} shape" if word in COLORS else word for word in question.words if word in NAMES)
        asked = f"if a {subject} is {'not ' if question.is_negated else ''}there"
    else:
        asked = f"its {question.kind}"
    return f"<think>I see a {seen}. The question is {asked}.</think> \\boxed{{{answer_from(seen, question)}}}"


def what_is_seen(questions: Sequence[Question]) -> dict[int, str]:
    """Colour and shape by picture, from questions and answers; omits pictures for which either is unknown."""
    names: dict[int, set[str]] = {}
    for question in questions:
        told = names.setdefault(question.picture, set())
        if question.kind != "presence" or question.answer == ("no" if question.is_negated else "yes"):
            told |= {word for word in (*question.words, question.answer) if word in NAMES}
    # Colours are before shapes: "blue rectangle".
    return {
        picture: " ".join(sorted(told, key=SHAPES.__contains__)) for picture, told in names.items() if len(told) == 2
    }


def read_split(name: str) -> Split:
    """Read `train` or `test`, without questions about pictures whose content is unknown."""
    import easy_vqa

    get_questions, get_paths = {
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
    }[name]
    questions = [Question(*row) for row in zip(*get_questions(), strict=True)]
    seen = what_is_seen(questions)
    return Split([question for question in questions if question.picture in seen], get_paths(), seen)


def main(output: Path, seed: int, steps: int = SFT_STEPS) -> None:
    """Write data and model under `output`. The same `seed` gives the same files; the test set ignores it.

    Args:
        steps: of the warm start.
    """
    output.mkdir(parents=True, exist_ok=True)
    train, test = read_split("train"), read_split("test")
    rows = {
        "train": (train, train.of_kinds(np.random.default_rng(seed), NUM_TRAIN, range(len(train.paths)))),
        "test": (test, test.of_kinds(np.random.default_rng(0), NUM_HELD_OUT, range(len(test.paths)))),
    }
    for name, (split, questions) in rows.items():
        write_examples([split.example(question) for question in questions], output / f"{name}.parquet")

    texts = {text for one in train.questions for text in (one.text, solution(train.seen[one.picture], one))}
    processor = build_processor(build_tokenizer(sorted(texts), VOCAB_SIZE))
    model = build_model(processor.tokenizer, seed)
    rng = np.random.default_rng(seed)
    supervised = range(NUM_SUPERVISED_PICTURES)
    lessons = {kind: [q for q in train.questions if q.kind == kind and q.picture in supervised] for kind in KINDS}

    shares = iter([0.0] * (steps - CONFUSED_STEPS) + [CONFUSED_SHARE] * CONFUSED_STEPS)

    def draw() -> list[Example]:
        kinds = rng.choice(KINDS, SFT_BATCH_SIZE)
        questions = [lessons[kind][rng.integers(len(lessons[kind]))] for kind in kinds]
        share = next(shares)
        right = [train.seen[question.picture] for question in questions]
        said = [confused(seen) if rng.random() < share else seen for seen in right]
        return [train.example(*lesson) for lesson in zip(questions, said, strict=True)]

    warm_start(model, processor, draw, steps)

    unseen = range(len(train.paths) - NUM_SLICE_PICTURES, len(train.paths))
    slice_ = [train.example(one) for one in train.of_kinds(np.random.default_rng(0), NUM_SLICE_ROWS, unseen)]
    answers = generate_answers(
        model, processor, [example.image for example in slice_], [example.prompt for example in slice_]
    )
    marks = score_answers(answers, [example.answer for example in slice_], "easy_vqa")
    print(f"warm start: {marks['accuracy']:.0%} right, {marks['format']:.0%} in form, on pictures it has not seen")
    # Written last: whoever finds it finds a finished folder.
    save_tiny(output / "model", model, processor)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=SFT_STEPS, help="of the warm start (%(default)s)")
    if find_spec("easy_vqa") is None:
        sys.exit("easy-VQA is not installed: pip install easy-vqa==1.0")
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arguments = parser.parse_args()
    main(arguments.output, arguments.seed, arguments.steps)
