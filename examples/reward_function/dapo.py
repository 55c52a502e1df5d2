# SPDX-License-Identifier: Apache-2.0
"""Reward of DAPO (arXiv 2503.14476): right or wrong, and less for a response that comes near the length limit.

Fits `examples/format_prompt/dapo.jinja`, which asks for a last line "Answer: result". Needs the `mathruler` package,
which knows when two mathematical expressions are equal.
"""

import re
from typing import Any

from verl.workers.reward.answers import find_box, is_right

REWARD_NAME = "dapo"
REWARD_TYPE = "batch"

ANSWER = re.compile(r"\banswer\**\s*:(.*)", re.IGNORECASE)

OPENING = re.compile(r"\\\[|\\\(|\$\$?|```\w*|\\begin\{\w+\*?\}")
"""What may stand on a line of its own between "Answer:" and the answer."""


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
        accuracy = 1.0 if is_right(answer_in(sample["response"]), sample["ground_truth"]) else -1.0
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


def answer_in(response: str) -> str | None:
    """The first line behind the last "Answer:" that holds more than an opening of display mathematics.

    If a box begins in that line, it is what the box holds, up to its end on any line. Without such a line it is what
    the last box of the response holds. None if the box is missing or open.
    """
    answers = list(ANSWER.finditer(response))
    end = answers[-1].start(1) if answers else len(response)
    for line in response[end:].split("\n"):
        end += len(line)
        text = line.strip(" *\r\t").rstrip(".* ")
        if r"\boxed{" in text:
            break
        if text and not OPENING.fullmatch(text):
            return text
        end += 1
    box = find_box(response, before=end)
    return box and box.content


def overlong_penalty(length: int, max_length: int, buffer_length: int) -> float:
    """Soft overlong punishment (eq. 13): 0 until the last `buffer_length` tokens, over which it falls to -1."""
    tokens_in_buffer = length - (max_length - buffer_length)
    if tokens_in_buffer <= 0:
        return 0.0
    return -1.0 if length > max_length else -tokens_in_buffer / buffer_length
