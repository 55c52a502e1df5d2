# SPDX-License-Identifier: Apache-2.0
"""Reward functions that the tests train with."""

REWARD_NAME = "tests"
REWARD_TYPE = "batch"


def compute_score(samples: list[dict], scale: float = 1.0) -> list[dict[str, float]]:
    """Rewards vowels, which a random model writes now and then, so groups differ."""
    return [
        {
            "overall": scale * sum(sample["response"].count(vowel) for vowel in "aeiou"),
            "with_image": float(bool(sample["images"])),
        }
        for sample in samples
    ]


def fail_in_training(samples: list[dict]) -> list[dict[str, float]]:
    """Passes the first validation and dies in the first step."""
    if samples[0]["split"] == "train":
        raise ZeroDivisionError("no grade for this one")
    return compute_score(samples)
