# SPDX-License-Identifier: Apache-2.0
r"""Reads boxed answers and compares them with the truth, for reward functions; needs the `mathruler` package.

    box = find_box(sample["response"])
    accuracy = float(is_right(box and box.content, sample["ground_truth"]))

The reward process runs this file, which therefore loads neither torch nor transformers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from mathruler.grader import _normalize, grade_answer
from mathruler.math_normalize import normalize_answer

from verl.workers.reward.answer_cost import is_costly

BOX = r"\boxed{"

LONGEST_EXPRESSION = 2000
"""Characters; reading longer ones as mathematics takes seconds."""


class Box(NamedTuple):
    """Where `\\boxed{...}` stands in a text, and what it holds."""

    start: int
    end: int
    content: str


def find_box(text: str, before: int | None = None) -> Box | None:
    """The last `\\boxed{` that begins before an index, with everything up to its closing brace; None if none closes.

    An open box behind a closed one also gives None: a response that ends within its answer has not answered.
    """
    start = text.rfind(BOX, 0, before)
    if start < 0:
        return None
    depth = 0
    for index in range(start + len(BOX), len(text)):
        if text[index] == "{":
            depth += 1
        elif text[index] == "}" and depth:
            depth -= 1
        elif text[index] == "}":
            return Box(start, index + 1, text[start + len(BOX) : index].strip())
    return None


def is_right(answer: str | None, truth: Any) -> bool:
    """Whether an answer has the value of the truth: never without an answer, nor where the data lack the truth.

    Expressions that are too long or too costly to evaluate are right only if they read the same.
    """
    if answer is None or truth is None or (isinstance(truth, float) and math.isnan(truth)):
        return False
    truth = str(truth).strip()
    if not answer.strip() or not truth:
        return False
    if max(len(answer), len(truth)) > LONGEST_EXPRESSION:
        return normalize_answer(answer) == normalize_answer(truth)
    # Private in mathruler, but sympy gets this text: the raw one hides a cost, as `5{000}000!` does.
    expressions = _normalize(answer), _normalize(truth)
    if any(map(is_costly, expressions)):
        return normalize_answer(answer) == normalize_answer(truth) or expressions[0] == expressions[1]
    return grade_answer(answer, truth)
