# SPDX-License-Identifier: Apache-2.0
"""Rollout with Hugging Face `generate`, on a plain copy of the policy: no engine to install, runs anywhere.

The copy gets its weights from the sharded policy's weight stream, like any engine. Each rank then generates on its
own, so ranks may stop at different lengths without waiting for each other.
"""

from collections.abc import Iterable

import torch
from torch import nn
from tqdm import tqdm
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from verl.data.features import Featurizer
from verl.models.loader import DTYPES, load_model
from verl.models.position_ids import extend_position_ids, swap_rope_rows
from verl.models.registry import media_token_ids, media_token_types
from verl.protocol import DataProto
from verl.trainer.config import PPOConfig
from verl.utils.tokenizer import eos_token_ids_of
from verl.workers.rollout.base import (
    Rollout,
    Sampling,
    assemble_batch,
    copy_weights,
    draw_not_finite,
    draw_seed,
    mask_responses,
)
from verl.workers.rollout.config import RolloutConfig


class HFRollout(Rollout):
    """Generates with `transformers`.

    Args:
        model: a plain (unsharded) copy of the policy, in `worker.rollout.dtype`.
        tokenizer: the policy's tokenizer.
        featurizer: turns images into model inputs; None for text-only models.
        config: `worker.rollout`. `max_num_batched_tokens` limits the tokens (prompts and responses at full length)
            that are generated together; the other engine keys have no effect.
        response_length: R, tokens.
        device: where to generate.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        featurizer: Featurizer | None,
        config: RolloutConfig,
        response_length: int,
        device: torch.device,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.featurizer = featurizer
        self.config = config
        self.response_length = response_length
        self.device = device
        self.pad_token_id = tokenizer.pad_token_id
        self.eos_token_ids = eos_token_ids_of(model.generation_config, tokenizer)
        # transformers takes unset options from the model's generation config. A repetition penalty of the checkpoint
        # would change the sampling distribution but not the loss, and its end-of-sequence ids would stop responses
        # that should run on.
        model.generation_config = GenerationConfig()
        self.banned_token_ids = media_token_ids(model.config)

    @classmethod
    def from_config(
        cls,
        config: PPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        featurizer: Featurizer | None,
        device: torch.device,
        with_videos: bool = False,
    ) -> "HFRollout":
        # Read from disk again, not copied from the shards: this gives correct buffers (rope); the weights are
        # replaced at the first sync.
        rollout = config.worker.rollout
        model = load_model(config.worker.actor.model, DTYPES[rollout.dtype], DTYPES[rollout.dtype])
        return cls(model, tokenizer, featurizer, rollout, config.data.max_response_length, device)

    def wake_weights(self) -> None:
        self.model.to(self.device)

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        copy_weights(self.model.state_dict(), weights)

    def wake_cache(self) -> None:
        """Nothing to do: `generate` creates its cache in every call."""

    def sleep(self) -> None:
        self.model.to("cpu")

    @torch.no_grad()
    def generate(self, prompts: DataProto, sampling: Sampling, seed: int) -> DataProto:
        prompt_length = prompts.batch["input_ids"].shape[1]
        rows = torch.arange(len(prompts)).repeat_interleave(sampling.n)  # (N,)
        rows_at_once = max(1, self.config.max_num_batched_tokens // (prompt_length + self.response_length))
        responses, log_probs = [], []
        cuda_devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda_devices):
            disable = True if self.config.disable_tqdm else None  # None shows the bar on a terminal only
            chunks = tqdm(rows.split(rows_at_once), desc="generate", leave=False, disable=disable)
            for index, chunk in enumerate(chunks):
                torch.manual_seed(draw_seed(seed, index))
                chunk_outputs = self._generate_rows(prompts, chunk, sampling, index * rows_at_once)
                responses.append(chunk_outputs[0])
                log_probs.append(chunk_outputs[1])
        home = prompts.batch["input_ids"].device
        responses, log_probs = torch.cat(responses).to(home), torch.cat(log_probs).to(home)  # (N, R) each
        response_mask = mask_responses(responses, self.eos_token_ids, sampling.ignore_eos)
        responses = responses.masked_fill(response_mask == 0, self.pad_token_id)
        return assemble_batch(prompts, responses, response_mask, log_probs, sampling.n)

    def _generate_rows(
        self, prompts: DataProto, rows: torch.Tensor, sampling: Sampling, first_row: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Responses (rows, R) int64 and the log-probabilities of their tokens (rows, R).

        Entries after an end-of-sequence token are arbitrary.

        Args:
            rows: for each response, the row of its prompt. All responses to a prompt share its prefill.
            first_row: the number of the first response in the whole batch, for errors.
        """
        rows, places = rows.unique_consecutive(return_inverse=True)
        places = places.to(self.device)
        inputs, cache, logits = self._prefill(prompts[rows])
        cache.reorder_cache(places)
        inputs = {name: value.index_select(-2, places) for name, value in inputs.items()}
        drawn = _LogProbsOfDraws(first_row)
        processors = LogitsProcessorList([*self._filters(sampling), drawn])
        scores = processors(inputs["input_ids"], logits[places])  # (rows, V)
        if sampling.temperature > 0:
            first_tokens = torch.multinomial(scores.softmax(dim=-1), 1)  # (rows, 1)
        else:
            first_tokens = scores.argmax(dim=-1, keepdim=True)
        sequences = torch.cat([inputs["input_ids"], first_tokens], dim=1)
        if self.response_length > 1:
            sequences = self._decode(sequences, inputs, cache, processors, sampling)
        responses = sequences[:, inputs["input_ids"].shape[1] :]
        missing = (0, self.response_length - responses.shape[1])
        responses = nn.functional.pad(responses, missing, value=self.pad_token_id)
        return responses, nn.functional.pad(drawn.log_probs(sequences), missing)

    def _prefill(self, prompts: DataProto) -> tuple[dict[str, torch.Tensor], Cache, torch.Tensor]:
        """Prefill: the model's inputs per prompt token, the cache, and the logits (prompts, V) after the prompts.

        Inputs are (prompts, tokens), or (4, prompts, tokens) for the positions of multimodal rope.
        """
        attention_mask = prompts.batch["attention_mask"]
        first = int(attention_mask.argmax(dim=1).min())  # columns before it are padding in every row
        inputs = {
            "input_ids": prompts.batch["input_ids"][:, first:],
            "attention_mask": attention_mask[:, first:],
            "position_ids": swap_rope_rows(prompts.batch["position_ids"][..., first:]),
        }
        media: dict[str, torch.Tensor] = {}
        if self.featurizer is not None:
            media = self.featurizer.featurize(prompts.non_tensor_batch["multi_modal_data"])
            inputs |= media_token_types(self.model.config, inputs["input_ids"])
        inputs, media = ({name: value.to(self.device) for name, value in part.items()} for part in (inputs, media))
        settings = GenerationConfig(max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
        result = self.model.generate(**inputs, **media, generation_config=settings)
        return inputs, result.past_key_values, result.logits[0]

    def _decode(
        self,
        sequences: torch.Tensor,
        inputs: dict[str, torch.Tensor],
        cache: Cache,
        processors: LogitsProcessorList,
        sampling: Sampling,
    ) -> torch.Tensor:
        """The complete sequences (rows, up to P + R), from (rows, P + 1).

        Args:
            inputs: the prompt tokens' inputs, for each row.
            cache: the prompts' cache, for each row.
        """
        # All response tokens are text, like the prompt's last one. `generate` continues from the given positions; its
        # own first position would be lower than the trainer's after a long video.
        first_inputs = {name: value[..., -1:] for name, value in inputs.items()}
        first_inputs["position_ids"] = swap_rope_rows(extend_position_ids(swap_rope_rows(inputs["position_ids"]), 1))
        inputs = {name: torch.cat([value, first_inputs[name]], dim=-1) for name, value in inputs.items()}
        settings = GenerationConfig(
            do_sample=sampling.temperature > 0,
            max_new_tokens=self.response_length - 1,
            eos_token_id=None if sampling.ignore_eos else self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            # transformers' top_k defaults to 50 and filters after our processors, but our last processor must see the
            # scores that are drawn from. So `_filters` apply top_k.
            top_k=0,
        )
        ended = torch.isin(sequences[:, -1], sequences.new_tensor(settings.eos_token_id or []))
        return self.model.generate(
            **{**inputs, "input_ids": sequences},
            past_key_values=cache,
            generation_config=settings,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([lambda *_: ended]),
        )

    def _filters(self, sampling: Sampling) -> list[LogitsProcessor]:
        filters: list[LogitsProcessor] = []
        if self.banned_token_ids:
            # A placeholder in a response would refer to an image that does not exist.
            filters.append(SuppressTokensLogitsProcessor(self.banned_token_ids, device=self.device))
        if sampling.temperature == 0:
            return filters
        filters.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            filters.append(TopPLogitsWarper(sampling.top_p))
        return filters


class _LogProbsOfDraws(LogitsProcessor):
    """Records the log-probability of each drawn token.

    A draw is seen in the ids of the next step, so only the scores of one step are held, never all of them.

    Args:
        first_row: the number of the first row in the whole batch, for errors.
    """

    def __init__(self, first_row: int) -> None:
        self.first_row = first_row
        self._of_steps: list[torch.Tensor] = []
        self._last: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._record_draws(input_ids)
        largest = scores.amax(dim=-1)  # (rows,)
        if not largest.isfinite().all():  # sampling would fail on the device, and greedy decoding would take any token
            row = self.first_row + int((~largest.isfinite()).nonzero()[0])
            raise draw_not_finite(row, len(self._of_steps), float("nan"))
        self._last = scores.log_softmax(dim=-1)  # (rows, V)
        return scores

    def _record_draws(self, input_ids: torch.Tensor) -> None:
        if self._last is not None:
            self._of_steps.append(self._last.gather(1, input_ids[:, -1:]))

    def log_probs(self, sequences: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (rows, steps) float32, given the result of `generate`; arbitrary after a row's end."""
        self._record_draws(sequences)
        return torch.cat(self._of_steps, dim=1)
