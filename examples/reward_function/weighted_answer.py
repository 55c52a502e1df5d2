# SPDX-License-Identifier: Apache-2.0
"""Reward for a boxed answer that also says which tokens matter: those of the answer count more in the loss.

Use with `algorithm.enable_token_weights=true`; any rule of your own takes the place of `weights_of_tokens`.
Needs the `mathruler` package, which knows when two mathematical expressions are equal.
"""

from itertools import accumulate
from typing import Any

from verl.workers.reward.answers import find_box, is_right

REWARD_NAME = "weighted_answer"
REWARD_TYPE = "sequential"


def compute_score(reward_input: dict[str, Any], answer_weight: float = 2.0) -> dict[str, Any]:
    """Score one response by its boxed answer, 0 or 1, and weigh its tokens."""
    box = find_box(reward_input["response"])
    accuracy = float(is_right(box and box.content, reward_input["ground_truth"]))
    weights = weights_of_tokens(reward_input["response_tokens"], answer_weight)
    return {"overall": accuracy, "accuracy": accuracy, "token_weights": weights}


def weights_of_tokens(tokens: list[str], answer_weight: float) -> list[float] | None:
    """One weight per token: `answer_weight` times as much on those that write the boxed answer, with mean one.

    None, which leaves the sample to VGR if attention is collected, where nothing is boxed.
    """
    box = find_box("".join(tokens))
    if box is None:
        return None
    ends = list(accumulate(len(token) for token in tokens))
    starts = [0, *ends[:-1]]
    raw = [
        answer_weight if start < box.end and end > box.start else 1.0 for start, end in zip(starts, ends, strict=True)
    ]
    mean = sum(raw) / len(raw)
    return [weight / mean for weight in raw]
