# SPDX-License-Identifier: Apache-2.0
"""Reward of `scripts/make_easy_vqa.py`: is the boxed word right, and is the answer in form?"""

from __future__ import annotations

import re
from typing import Any

REWARD_NAME = "easy_vqa"
REWARD_TYPE = "batch"

FORM = re.compile(r"<think>.*</think>\s*\\boxed\{[a-z]+\}", re.DOTALL)
BOXED = re.compile(r"\\boxed\{([a-z]+)\}")


def compute_score(reward_inputs: list[dict[str, Any]], format_weight: float = 0.1) -> list[dict[str, float]]:
    """Score a batch of responses; each score is 0 or 1, `overall` their mean weighted by `format_weight`."""
    scores = []
    for reward_input in reward_inputs:
        response = (reward_input.get("prefix", "") + reward_input["response"]).strip()
        boxed = BOXED.findall(response)
        accuracy = float(bool(boxed) and boxed[-1] == reward_input["ground_truth"])
        in_form = float(FORM.fullmatch(response) is not None)
        overall = (1 - format_weight) * accuracy + format_weight * in_form
        scores.append({"overall": overall, "format": in_form, "accuracy": accuracy})
    return scores
