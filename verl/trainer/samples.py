# SPDX-License-Identifier: Apache-2.0
"""Chooses the few responses that a run shows, and logs them: as texts, and as token maps for the report.

Shapes: N rows, R response length, T tokens of one response.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from verl.data.image_grids import ImageGrids
from verl.data.vision import MediaHandle
from verl.protocol import DataProto
from verl.report.pictures import picture_uris
from verl.report.token_map import TokenMap
from verl.report.token_texts import token_texts
from verl.trainer.config import PPOConfig
from verl.trainer.sinks import Generation
from verl.trainer.streams import maps_samples
from verl.trainer.token_weigher import TokenWeigher
from verl.trainer.tracking import Tracker
from verl.trainer.validator import ValidationResult
from verl.utils.attention_metrics import vgr_from_mass
from verl.utils.masked_ops import masked_mean
from verl.utils.response_span import response_token_ids
from verl.workers.reward.results import values_by_key


class SampleLogger:
    """Hands samples of training and of the held-out set to the loggers.

    Args:
        config: the run's configuration.
        training_steps: number of steps of the run.
        tokenizer: the policy's tokenizer.
        grids: positions of image tokens on their images; None for a text-only model.
        weigher: computes the weights that held-out tokens would get.
        tracker: where samples go.
    """

    def __init__(
        self,
        config: PPOConfig,
        training_steps: int,
        tokenizer: PreTrainedTokenizerBase,
        grids: ImageGrids | None,
        weigher: TokenWeigher,
        tracker: Tracker,
    ) -> None:
        self.config = config
        self.training_steps = training_steps
        self.tokenizer = tokenizer
        self.grids = grids
        self.weigher = weigher
        self.tracker = tracker

    def chosen(self, batch: DataProto, step: int) -> torch.Tensor:
        """(N,) bool: the training rows to show, at steps with a validation and at the last step.

        Their prompts differ, as long as there are enough. The choice depends on the step alone and uses none of the
        random generators of training.

        Reads: `uid`.
        """
        trainer = self.config.trainer
        is_chosen = torch.zeros(len(batch), dtype=torch.bool)
        if step == self.training_steps or is_due(step, trainer.val_freq):
            order = np.random.RandomState(step).permutation(len(batch))
            uids = batch.non_tensor_batch["uid"]
            seen: Counter[str] = Counter()
            turns = []  # 0 for the first response of a prompt, 1 for its second
            for uid in uids[order]:
                turns.append(seen[uid])
                seen[uid] += 1
            rows = order[np.argsort(turns, kind="stable")][: trainer.train_generations_to_log]
            is_chosen[rows.tolist()] = True
        return is_chosen

    def log_training(self, batch: DataProto, step: int) -> None:
        """Shows the chosen rows of a step.

        Reads: `uid`, `responses`, `response_mask`, `prompt_text`, `ground_truth`, `token_level_scores`, `advantages`;
        for token maps `multi_modal_data`, `attention_mass`, `attention_keys`, `attention_maps`, and in weighted runs
        `token_weights`.
        """
        rows = self.chosen(batch, step).nonzero()[:, 0].tolist()
        if not rows:
            return
        shown = batch[rows]
        streams = shown.batch
        scores = streams["token_level_scores"].sum(-1).tolist()
        self.tracker.log_generations(_generations(shown, scores, self.tokenizer), step, "train")
        if maps_samples(self.config):
            mask = streams["response_mask"]
            weights = streams["token_weights"] if self.config.algorithm.enable_token_weights else mask.float()
            advantages = masked_mean(streams["advantages"], mask, dim=-1).tolist()
            self.tracker.log_token_maps(self._token_maps(shown, weights, scores, advantages), step, "train")

    def log_validation(self, result: ValidationResult, measured: DataProto | None, step: int) -> None:
        """Shows the chosen rows of a validation after `step`, with the weights that the next step would give them.

        Args:
            measured: `result.rows` with `multi_modal_data` and the streams of the log-prob pass; None if no token maps
                are shown.
        """
        if not len(result.rows):
            return
        self.tracker.log_generations(_generations(result.rows, result.scores, self.tokenizer), step, "val")
        if measured is not None:
            weights = self.weigher.preview(measured, values_by_key(result.results), step + 1)
            self.tracker.log_token_maps(self._token_maps(measured, weights, result.scores), step, "val")

    def _token_maps(
        self,
        rows: DataProto,
        weights: torch.Tensor,
        scores: Sequence[float],
        advantages: Sequence[float] | None = None,
    ) -> list[TokenMap]:
        streams, objects = rows.batch, rows.non_tensor_batch
        is_token = streams["response_mask"].bool()
        vgr = vgr_from_mass(streams["attention_mass"], streams["attention_keys"])  # (N, R)
        token_ids = response_token_ids(streams["responses"], streams["response_mask"])
        images = [self._images_of(handles) for handles in objects["multi_modal_data"]]
        uris = iter(picture_uris([image for pictures in images for image in pictures]))
        maps = []
        for row, pictures in enumerate(images):
            attention = objects["attention_maps"][row]
            maps.append(
                TokenMap(
                    tokens=token_texts(self.tokenizer, token_ids[row].tolist()),
                    weights=weights[row, is_token[row]].tolist(),
                    vgr=vgr[row, is_token[row]].tolist(),
                    prompt=str(objects["prompt_text"][row]),
                    images=[next(uris) for _ in pictures],
                    maps=self.grids.lay_out(attention.vision, pictures) if pictures and attention is not None else (),
                    answer=str(objects["ground_truth"][row]),
                    reward=scores[row],
                    advantage=None if advantages is None else advantages[row],
                    title=f"Sample {row + 1}",
                )
            )
        return maps

    def _images_of(self, handles: Sequence[MediaHandle] | None) -> list[Image.Image]:
        """The images of a prompt, as given to the processor. Empty for a prompt with videos, whose tokens mix with the
        image tokens."""
        handles = handles or ()
        return [] if any(handle.is_video for handle in handles) else [handle.load() for handle in handles]


def is_due(step: int, frequency: int) -> bool:
    """Whether something that recurs every `frequency` steps is due; 0 or less is never."""
    return frequency > 0 and step % frequency == 0


def _generations(rows: DataProto, scores: Sequence[float], tokenizer: PreTrainedTokenizerBase) -> list[Generation]:
    token_ids = response_token_ids(rows.batch["responses"], rows.batch["response_mask"])
    texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    objects = rows.non_tensor_batch
    truths = map(str, objects["ground_truth"])
    return [Generation(*sample) for sample in zip(objects["prompt_text"], texts, truths, scores, strict=True)]
