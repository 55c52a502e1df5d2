# SPDX-License-Identifier: Apache-2.0
"""Reward of DAPO (arXiv 2503.14476): right or wrong, and less for a response that comes near the length limit.

Fits `examples/format_prompt/dapo.jinja`, which asks for a last line "Answer: result". Needs the `mathruler` package,
which knows when two mathematical expressions are equal.
"""

import re
from typing import Any

from mathruler.grader import extract_boxed_content, grade_answer

REWARD_NAME = "dapo"
REWARD_TYPE = "batch"

ANSWER = re.compile(r"\banswer\**\s*:\**\s*(.*)", re.IGNORECASE)


def compute_score(
    reward_inputs: list[dict[str, Any]],
    max_response_length: int,
    overlong_buffer_length: int,
    overlong_penalty_factor: float,
) -> list[dict[str, float]]:
    """Score each response; `overall` is `accuracy`, 1 or -1, plus `overlong_penalty_factor` times `overlong`.

    `accuracy_normalized` is 1 or 0, for `algorithm.filter_key`, whose bounds are shares of right responses.
    """
    scores = []
    for sample in reward_inputs:
        accuracy = 1.0 if grade_answer(answer_in(sample["response"]), str(sample["ground_truth"])) else -1.0
        overlong = overlong_penalty(sample["response_length"], max_response_length, overlong_buffer_length)
        scores.append(
            {
                "overall": accuracy + overlong_penalty_factor * overlong,
                "accuracy": accuracy,
                "overlong": overlong,
                "accuracy_normalized": (accuracy + 1) / 2,
            }
        )
    return scores


def answer_in(response: str) -> str:
    """What follows the last "Answer:", and of that, or of a response without it, what is boxed."""
    answers = ANSWER.findall(response)
    if answers and r"\boxed{" not in answers[-1]:
        return answers[-1].lstrip(" *").rstrip(" *.")
    return extract_boxed_content(answers[-1] if answers else response)


def overlong_penalty(length: int, max_length: int, buffer_length: int) -> float:
    """Soft overlong punishment (eq. 13): 0 until the last `buffer_length` tokens, over which it falls to -1."""
    tokens_in_buffer = length - (max_length - buffer_length)
    if tokens_in_buffer <= 0:
        return 0.0
    return -1.0 if length > max_length else -tokens_in_buffer / buffer_length
