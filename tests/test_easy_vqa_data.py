# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_easy_vqa_data.py
"""Questions about coloured shapes: what a picture shows, what is asked, the answer that is taught, the reward."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from make_easy_vqa import KINDS, Question, Split, answer_from, confused, solution, what_is_seen
from picture_task import score_answers
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("text", "answer", "kind", "asked"),
    [
        ("what color is the circle?", "teal", "color", "its color"),
        ("what is the teal shape?", "circle", "shape", "its shape"),
        ("is there a teal shape in the image?", "yes", "presence", "if a teal shape is there"),
        ("is no triangle present?", "yes", "presence", "if a triangle is not there"),
        ("does the image not contain a red shape?", "yes", "presence", "if a red shape is not there"),
    ],
)
def test_an_answer_says_what_is_seen_and_what_is_asked(text: str, answer: str, kind: str, asked: str) -> None:
    question = Question(text, answer, 0)
    assert question.kind == kind
    taught = solution("teal circle", question)
    assert taught == f"<think>I see a teal circle. The question is {asked}.</think> \\boxed{{{answer}}}"
    assert score_answers([taught], [answer], "easy_vqa") == {"overall": 1, "format": 1, "accuracy": 1}


@pytest.mark.parametrize(
    ("response", "accuracy", "in_form"),
    [
        ("<think>I see a red circle.</think> \\boxed{red}", 0, 1),
        ("\\boxed{teal}", 1, 0),
        ("<think>teal</think> teal", 0, 0),
        ("<think>.</think> \\boxed{red} or \\boxed{teal}", 1, 0),
        ("", 0, 0),
    ],
)
def test_the_reward_is_the_word_and_a_little_for_the_form(response: str, accuracy: float, in_form: float) -> None:
    """overall = 0.9 accuracy + 0.1 format, for the true answer teal."""
    compute_score = runpy.run_path(str(ROOT / "examples/reward_function/easy_vqa.py"))["compute_score"]
    (score,) = compute_score([{"response": response, "ground_truth": "teal"}])
    assert score == pytest.approx({"overall": 0.9 * accuracy + 0.1 * in_form, "format": in_form, "accuracy": accuracy})


@pytest.mark.parametrize(
    ("text", "of_teal_circle", "of_yellow_circle"),
    [
        ("what color is the shape?", "teal", "yellow"),
        ("what shape is present?", "circle", "circle"),
        ("is there a teal shape?", "yes", "no"),
        ("is no teal shape present?", "no", "yes"),
        ("is there not a circle in the image?", "no", "no"),
        ("does the image contain a triangle?", "no", "no"),
    ],
)
def test_answers_follow_from_what_is_said_to_be_seen(text: str, of_teal_circle: str, of_yellow_circle: str) -> None:
    question = Question(text, of_teal_circle, 0)
    assert answer_from("teal circle", question) == of_teal_circle
    assert confused("teal circle") == "yellow circle" and confused("yellow circle") == "black circle"
    assert answer_from(confused("teal circle"), question) == of_yellow_circle


def test_what_is_in_a_picture_follows_from_its_questions() -> None:
    """Picture 0 by a question and its answer, 1 by two that say yes, 2 by one that does not say no; 3 is left open."""
    questions = [
        Question("what color is the circle?", "red", 0),
        Question("is a teal shape present?", "yes", 1),
        Question("is there a triangle?", "yes", 1),
        Question("is there a circle?", "no", 1),
        Question("is there not a black shape?", "no", 2),
        Question("does the image contain a rectangle?", "yes", 2),
        Question("is no blue shape present?", "no", 3),
        Question("is there not a circle?", "yes", 3),
    ]
    assert what_is_seen(questions) == {0: "red circle", 1: "teal triangle", 2: "black rectangle"}


def test_rows_are_a_third_of_each_kind_from_the_pictures_that_are_allowed(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
    texts = {"color": ("what color is the shape?", "red"), "shape": ("what shape is present?", "circle")}
    texts["presence"] = ("is there a circle?", "yes")
    questions = [Question(*texts[kind], picture) for kind in KINDS for picture in range(8)]
    split = Split(questions, {0: str(tmp_path / "0.png")}, dict.fromkeys(range(8), "red circle"))
    chosen = split.of_kinds(np.random.default_rng(0), 9, range(4))
    assert sorted(question.kind for question in chosen) == ["color"] * 3 + ["presence"] * 3 + ["shape"] * 3
    assert len(set(chosen)) == 9 and all(question.picture < 4 for question in chosen)
    example = split.example(questions[0])
    assert example.image.size == (112, 112)
    assert example.prompt.startswith("<image>what")
    assert example.facts == {"kind": questions[0].kind, "seen": "red circle", "sources": [0]}
