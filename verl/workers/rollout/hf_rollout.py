# SPDX-License-Identifier: Apache-2.0
"""Rollout with Hugging Face `generate`, on a plain copy of the policy: no engine to install, runs anywhere.

The copy is filled from the sharded policy's weight stream, as any engine's weights are. Each rank then generates on
its own, so ranks may stop at different lengths without waiting for each other.
"""

from collections.abc import Iterable

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

from verl.data.vision import featurize
from verl.models.registry import media_token_ids, media_token_types
from verl.protocol import DataProto
from verl.workers.rollout.base import (
    Rollout,
    Sampling,
    assemble_batch,
    copy_weights,
    draw_seed,
    eos_token_ids_of,
    mask_responses,
)
from verl.workers.rollout.config import RolloutConfig


class HFRollout(Rollout):
    """Generates with `transformers`.

    Args:
        model: a plain (unsharded) copy of the policy, in `worker.rollout.dtype`.
        tokenizer, processor: of the policy; the processor is None for text models.
        config: `worker.rollout`; of its engine keys, `max_num_batched_tokens` bounds prompts plus responses (in
            tokens at full length) generated side by side, the others are for engines.
        response_length: R, tokens.
        device: where to generate.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        processor: ProcessorMixin | None,
        config: RolloutConfig,
        response_length: int,
        device: torch.device,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.config = config
        self.response_length = response_length
        self.device = device
        self.pad_token_id = tokenizer.pad_token_id
        self.eos_token_ids = eos_token_ids_of(model.generation_config, tokenizer)
        # transformers fills what a call leaves unset from the model's own settings: a repetition penalty that the
        # checkpoint ships would bend the samples away from the policy that the loss sees, and end-of-sequence ids
        # would stop responses that are to run on.
        model.generation_config = GenerationConfig()
        self.banned_token_ids = media_token_ids(model.config)

    def wake(self) -> None:
        self.model.to(self.device)

    def sleep(self) -> None:
        self.model.to("cpu")

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        copy_weights(self.model.state_dict(), weights)

    @torch.no_grad()
    def generate(self, prompts: DataProto, sampling: Sampling, seed: int) -> DataProto:
        prompt_length = prompts.batch["input_ids"].shape[1]
        rows = torch.arange(len(prompts)).repeat_interleave(sampling.n)  # (N,)
        rows_at_once = max(1, self.config.max_num_batched_tokens // (prompt_length + self.response_length))
        generation_config = self._generation_config(sampling)
        responses = []
        cuda_devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda_devices):
            disable = True if self.config.disable_tqdm else None  # None shows the bar on a terminal only
            chunks = tqdm(rows.split(rows_at_once), desc="generate", leave=False, disable=disable)
            for index, chunk in enumerate(chunks):
                torch.manual_seed(draw_seed(seed, index))
                responses.append(self._generate_rows(prompts[chunk], generation_config))
        responses = torch.cat(responses).to(prompts.batch["input_ids"].device)  # (N, R)
        response_mask = mask_responses(responses, self.eos_token_ids, sampling.ignore_eos)
        return assemble_batch(prompts, responses, response_mask, sampling.n)

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        greedy = sampling.temperature == 0
        filters = dict(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            # transformers spells "no limit" 0, and defaults to 50.
            top_k=max(sampling.top_k, 0),
        )
        return GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=self.response_length,
            eos_token_id=None if sampling.ignore_eos else self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            # A placeholder in a response would claim an image that is not there.
            suppress_tokens=self.banned_token_ids or None,
            **({} if greedy else filters),
        )

    def _generate_rows(self, rows: DataProto, generation_config: GenerationConfig) -> torch.Tensor:
        """(rows, R) int64 right-padded responses, one for each row."""
        attention_mask = rows.batch["attention_mask"]
        first = int(attention_mask.argmax(dim=1).min())  # columns before it are padding in every row
        input_ids = rows.batch["input_ids"][:, first:].to(self.device)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask[:, first:].to(self.device)}
        if self.processor is not None:
            media = featurize(rows.non_tensor_batch["multi_modal_data"], self.processor.image_processor)
            inputs.update({key: value.to(self.device) for key, value in media.items()})
            inputs.update(media_token_types(self.model.config, input_ids))
        sequences = self.model.generate(**inputs, generation_config=generation_config)
        new_tokens = sequences[:, input_ids.shape[1] :]
        return nn.functional.pad(
            new_tokens, (0, self.response_length - new_tokens.shape[1]), value=self.pad_token_id
        )
