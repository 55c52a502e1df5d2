# SPDX-License-Identifier: Apache-2.0
"""Reward for problems answered as `<think>...</think> ... \\boxed{result}`: right result, and a little for the form.

Needs the `mathruler` package, which knows when two mathematical expressions are equal.
"""

import re
from typing import Any

from verl.workers.reward.answers import find_box, is_right

REWARD_NAME = "math"
REWARD_TYPE = "batch"

FORM = re.compile(r"\s*<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)


def compute_score(reward_inputs: list[dict[str, Any]], format_weight: float = 0.1) -> list[dict[str, float]]:
    """Score each response; `overall` is `format_weight` of form and the rest of accuracy, all within [0, 1]."""
    scores = []
    for sample in reward_inputs:
        response = sample.get("prefix", "") + sample["response"]
        form = float(FORM.fullmatch(response) is not None)
        box = find_box(response)
        accuracy = float(is_right(box and box.content, sample["ground_truth"]))
        overall = (1 - format_weight) * accuracy + format_weight * form
        scores.append({"overall": overall, "format": form, "accuracy": accuracy})
    return scores
