# SPDX-License-Identifier: Apache-2.0
"""Reward for finding what to tap on a screenshot: does the point that the response names lie in the target's box?

A row of the data holds
    images: one screenshot,
    problem: the instruction after its image, as in "<image>Turn on the flashlight.",
    answer: the target's box [left, top, right, bottom], as a list of numbers or as its text.

Points and boxes count in thousandths of the screenshot's width and height, from its top left corner: whatever size the
picture is scaled to, they stay the same. It is also how Qwen3-VL points.
"""

import json
import re
from typing import Any

REWARD_NAME = "android_gui"
REWARD_TYPE = "batch"

CLICK = re.compile(r"click\(\s*(\d+)\s*,\s*(\d+)\s*\)")


def compute_score(reward_inputs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Score each response 1 where its only click is in the box, edges included, else 0.

    A response of several clicks scores 0, or covering the screen would pay.

    Raises:
        ValueError: the ground truth is not a box.
    """
    scores = []
    for sample in reward_inputs:
        left, top, right, bottom = read_box(sample["ground_truth"])
        clicks = [(int(x), int(y)) for x, y in CLICK.findall(sample["response"])]
        hit = float(len(clicks) == 1 and left <= clicks[0][0] <= right and top <= clicks[0][1] <= bottom)
        scores.append({"overall": hit, "accuracy": hit})
    return scores


def read_box(answer: Any) -> tuple[float, float, float, float]:
    """`[left, top, right, bottom]`, or the text of it, as four numbers."""
    try:
        left, top, right, bottom = map(float, json.loads(answer) if isinstance(answer, str) else answer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"ground truth {answer!r} is not a box [left, top, right, bottom]") from error
    if not (0 <= left <= right <= 1000 and 0 <= top <= bottom <= 1000):
        raise ValueError(f"ground truth {answer!r} is not a box in thousandths: 0 <= left <= right <= 1000, so for y")
    return left, top, right, bottom
