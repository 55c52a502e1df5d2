# SPDX-License-Identifier: Apache-2.0
"""Reward for questions answered as `<think>...</think><answer>result</answer>`: right result, and form.

Needs the `mathruler` package, which knows when two mathematical expressions are equal.
"""

import re
from typing import Any

from verl.workers.reward.answers import is_right

REWARD_NAME = "r1v"
REWARD_TYPE = "sequential"

FORM = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def compute_score(reward_input: dict[str, Any], format_weight: float = 0.5) -> dict[str, float]:
    """Score one response; `overall` is `format_weight` of form and the rest of accuracy, all within [0, 1]."""
    response = reward_input.get("prefix", "") + reward_input["response"]
    form = float(FORM.fullmatch(response) is not None)
    accuracy = float(is_right(answer_in(response), reward_input["ground_truth"]))
    return {
        "overall": (1 - format_weight) * accuracy + format_weight * form,
        "format": form,
        "accuracy": accuracy,
    }


def answer_in(response: str) -> str:
    """What the last pair of tags holds, or the whole response without one.

    Tags in the thinking may quote the task, so they count only where none follow it.
    """
    for text in (response.rpartition("</think>")[2], response):
        start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
        if start >= 0:
            return text[start:].removeprefix("<answer>").partition("</answer>")[0].strip()
    return response.strip()
