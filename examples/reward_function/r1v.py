# SPDX-License-Identifier: Apache-2.0
"""Reward for questions answered as `<think>...</think><answer>result</answer>`: right result, and form.

Needs the `mathruler` package, which knows when two mathematical expressions are equal.
"""

import re
from typing import Any

from mathruler.grader import grade_answer

REWARD_NAME = "r1v"
REWARD_TYPE = "sequential"

FORM = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def compute_score(reward_input: dict[str, Any], format_weight: float = 0.5) -> dict[str, float]:
    """Score one response; `overall` is `format_weight` of form and the rest of accuracy, all within [0, 1]."""
    response = reward_input.get("prefix", "") + reward_input["response"]
    form = float(FORM.fullmatch(response) is not None)
    answer = ANSWER.search(response)
    given = answer.group(1) if answer else response
    accuracy = float(grade_answer(given.strip(), str(reward_input["ground_truth"]).strip()))
    return {
        "overall": (1 - format_weight) * accuracy + format_weight * form,
        "format": form,
        "accuracy": accuracy,
    }
