# SPDX-License-Identifier: Apache-2.0
"""The short supervised phase before reinforcement learning: a tiny model learns the form of an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import transformers
from picture_task import Example, encode_prompts
from tiny_qwen import END_OF_TURN
from tqdm import tqdm

WARMUP_STEPS = 50
LEARNING_RATE = 2e-3


def response_batch(
    tokenizer: transformers.PreTrainedTokenizerFast, responses: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenise responses with their end of turn, right-padded; returns ids and mask, (N, R) each."""
    encoded = tokenizer(
        [response + END_OF_TURN for response in responses],
        add_special_tokens=False,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    return encoded.input_ids, encoded.attention_mask


def response_loss(
    model: transformers.Qwen2_5_VLForConditionalGeneration,
    prompts: dict[str, torch.Tensor],
    responses: torch.Tensor,
    response_mask: torch.Tensor,
) -> torch.Tensor:
    """Mean cross-entropy (nats) of the real tokens of `responses` (N, R) after `prompts`; a scalar with gradient."""
    inputs = prompts | {
        "input_ids": torch.cat([prompts["input_ids"], responses], dim=1),  # (N, S)
        "attention_mask": torch.cat([prompts["attention_mask"], response_mask], dim=1),  # (N, S)
        # Without token types the model falls back to one-dimensional positions and says nothing.
        "mm_token_type_ids": torch.cat([prompts["mm_token_type_ids"], torch.zeros_like(responses)], dim=1),  # (N, S)
    }
    logits = model(**inputs, logits_to_keep=responses.shape[1] + 1).logits[:, :-1]  # (N, R, V)
    per_token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), responses, reduction="none")  # (N, R)
    return (per_token * response_mask).sum() / response_mask.sum()


def warm_start(
    model: transformers.Qwen2_5_VLForConditionalGeneration,
    processor: transformers.Qwen2_5_VLProcessor,
    draw: Callable[[], Sequence[Example]],
    steps: int,
) -> None:
    """Teach `model` the form of an answer by `steps` batches of supervised examples; updates it in place.

    It stops early on purpose, when the form is right and the reading is mediocre, so that there is something left for
    reinforcement learning to find.

    Args:
        draw: gives the next batch.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    model.train()
    bar = tqdm(range(steps), desc="warm start", unit="step")
    for _ in bar:
        examples = draw()
        prompts = encode_prompts(
            processor, [example.image for example in examples], [example.prompt for example in examples]
        )
        solutions = [example.solution for example in examples]
        responses, response_mask = response_batch(processor.tokenizer, solutions)  # (N, R)
        loss = response_loss(model, prompts, responses, response_mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
