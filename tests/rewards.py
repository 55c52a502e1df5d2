# SPDX-License-Identifier: Apache-2.0
"""Reward functions that the tests train with."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import NoReturn

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


def weigh_some(samples: list[dict]) -> list[dict]:
    """Vowels again; samples whose answer is 1 also weigh each of their tokens by its length."""
    results = compute_score(samples)
    for sample, result in zip(samples, results, strict=True):
        if sample["ground_truth"] == "1":
            result["token_weights"] = weights_by_length(sample["response_tokens"])
    return results


def pass_or_fail(samples: list[dict], folder: str) -> list[dict]:
    """Answers 1 and 3 are right for some responses, 2 always and 4 never; what was scored in training is noted down.

    `overall` is no share of right responses, so that only `accuracy` can decide about groups. Samples with the answer
    1 also weigh each of their tokens by its length.
    """
    always = {"2": 1.0, "4": 0.0}
    results = []
    for sample in samples:
        lucky = float(sum(map(ord, sample["response"])) % 2)
        accuracy = always.get(sample["ground_truth"], lucky)
        results.append({"overall": accuracy - 2 + sample["response_length"] / 100, "accuracy": accuracy})
        if sample["ground_truth"] == "1":
            results[-1]["token_weights"] = weights_by_length(sample["response_tokens"])
    if samples[0]["split"] == "train":
        with Path(folder, f"scored_{samples[0]['step']}.jsonl").open("a") as file:
            for sample, result in zip(samples, results, strict=True):
                seen = [sample["uid"], sample["ground_truth"], sample["response"], result["accuracy"]]
                file.write(json.dumps(seen) + "\n")
    return results


def weights_by_length(tokens: list[str]) -> list[float]:
    return [0.5 * len(token) for token in tokens]


def fail_in_training(samples: list[dict]) -> list[dict[str, float]]:
    """Passes the first validation and dies in the first step."""
    if samples[0]["split"] == "train":
        raise ZeroDivisionError("no grade for this one")
    return compute_score(samples)


def fail_in_last_validation(samples: list[dict]) -> list[dict[str, float]]:
    """Passes training and dies in the validation after it."""
    if samples[0]["split"] == "val" and samples[0]["step"] > 0:
        raise ZeroDivisionError("no grade for this one")
    return compute_score(samples)


def die(samples: list[dict]) -> NoReturn:
    """Ends its process as a crash in native code would."""
    os._exit(1)


SCORES_OF_VALIDATIONS = {1: 0.3, 2: 0.9, 3: 0.2, 4: 0.5, 5: 0.8}
"""By step: the second is the best."""


def follow_a_plan(samples: list[dict], folder: str) -> list[dict[str, float]]:
    """Validation scores by the table above; in training, vowels until the fourth step, and then all the same.

    In training it notes that it has begun, with what it was given, and ends only when the log-prob passes have.
    """
    step = samples[0]["step"]
    if samples[0]["split"] == "val":
        return [{"overall": SCORES_OF_VALIDATIONS[step]} for _ in samples]
    texts = [[sample["prompt"], sample["response"]] for sample in samples]
    Path(folder, f"rewards_began_{step}.tmp").write_text(json.dumps(texts))
    Path(folder, f"rewards_began_{step}.tmp").rename(Path(folder, f"rewards_began_{step}"))
    wait_for(Path(folder, f"passes_ended_{step}"))
    return [{"overall": 1.0} for _ in samples] if step >= 4 else compute_score(samples)


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} was not there after {seconds} s")
        time.sleep(0.02)


def start_a_server(samples: list[dict]) -> list[dict[str, float]]:
    """Leaves a process behind, as a sandbox or a judge may."""
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return compute_score(samples)


def praise_all(samples: list[dict]) -> list[dict[str, float]]:
    """Tells no answers apart."""
    return [{"overall": 1.0} for _ in samples]
