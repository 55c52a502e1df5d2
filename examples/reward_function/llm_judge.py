# SPDX-License-Identifier: Apache-2.0
"""Reward by a judge: a language model behind an OpenAI-compatible server says whether the answer is right.

Start one with `vllm serve Qwen/Qwen3-8B`, and train with

    worker.reward.reward_function=examples/reward_function/llm_judge.py:compute_score
    'worker.reward.reward_function_kwargs={url: "http://localhost:8000/v1", model: Qwen/Qwen3-8B}'
    worker.reward.max_concurrency=64 worker.reward.timeout_s=60

JUDGE_API_KEY in the environment is sent as the key. A request that fails or takes too long is made once more.
"""

import os
import re
from functools import cache
from typing import Any

import httpx2

REWARD_NAME = "llm_judge"
REWARD_TYPE = "sequential"

QUESTION = """\
Question: {prompt}

Reference answer: {ground_truth}

Answer to grade: {response}

Does the answer to grade say the same as the reference answer? Reply with one word, YES or NO.
"""


async def compute_score(sample: dict[str, Any], url: str, model: str) -> dict[str, float]:
    """Score one response 1 or 0. A reply whose last line is neither yes nor no scores 0 and shows in `unclear`."""
    reply = await client().post(
        f"{url}/chat/completions",
        json={
            "model": model,
            "messages": [{"role": "user", "content": QUESTION.format_map(sample)}],
            "temperature": 0,
        },
    )
    reply.raise_for_status()
    lines = (reply.json()["choices"][0]["message"]["content"] or "").strip().splitlines()
    verdict = re.fullmatch(r"\W*(YES|NO)\W*", lines[-1], re.IGNORECASE) if lines else None
    accuracy = float(verdict is not None and verdict[1].upper() == "YES")
    return {"overall": accuracy, "accuracy": accuracy, "unclear": float(verdict is None)}


@cache
def client() -> httpx2.AsyncClient:
    """One for all calls, which share its connections."""
    key = os.environ.get("JUDGE_API_KEY")
    return httpx2.AsyncClient(headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=600)
