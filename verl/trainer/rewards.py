# SPDX-License-Identifier: Apache-2.0
"""The trainer's client of the reward function: sends batches to its process and receives the scores.

Shapes: N rows, R response length.
"""

import logging
import os
from pathlib import Path
from typing import Any, Self

import ray
import torch

from verl.protocol import DataProto
from verl.trainer.reward_actor import RewardActor
from verl.trainer.sinks import WrittenFile
from verl.trainer.step_record import StepRecord
from verl.workers.reward.config import RewardConfig
from verl.workers.reward.function import place_scores, reward_inputs
from verl.workers.reward.process import variables_of_run
from verl.workers.reward.results import TOKEN_WEIGHTS, Scored, values_by_key, without_token_weights
from verl.workers.reward.supervision import Limits
from verl.workers.reward.user_function import TextDecoder

logger = logging.getLogger(__name__)

LOG_FILE = "reward.log"
"""File in the run's folder with the output of the reward function."""

FAILURES_SHOWN = 3
"""Largest number of failures that are logged per batch."""

GROWTH_TO_TELL = 2 * 2**30
"""Bytes; a warning follows if the function's memory has doubled since the first batch, and grown by this at least."""

GIB = 2**30


class RewardClient:
    """Scores batches in a separate process. Requests are answered in order.

    A context manager: the process starts with it, and ends with it. `load` comes first.

    Args:
        config: names the function, and how many CPUs its process takes.
        folder: the run's folder; the function's output goes to `LOG_FILE` in it.
        limits: the process's limits of time and memory.
        uses_token_weights: whether tokens are weighted; if not, returned weights cause one warning.
    """

    def __init__(
        self, config: RewardConfig, folder: str, limits: Limits | None = None, uses_token_weights: bool = True
    ) -> None:
        self._config = config
        self._warns_of_token_weights = not uses_token_weights
        self._log_file = os.path.join(folder, LOG_FILE)
        self._process = RewardActor(config, self._log_file, limits or Limits())
        self._growth = _Growth(config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()

    def files(self) -> list[WrittenFile]:
        """The files with the function's output; the second exists once the first was full."""
        paths = (self._log_file, f"{self._log_file}.1")
        return [WrittenFile("output of the reward function", Path(path)) for path in paths]

    def load(self, decoder: TextDecoder, prefix: str = "") -> None:
        """Loads the user's file in the process, with this process's environment and working folder.

        Args:
            decoder: turns token ids into text.
            prefix: the part of every answer that the chat template writes.

        Raises:
            ValueError: the file or the function is not valid, or the folder does not exist.
            RuntimeError: the process or its node is gone.
        """
        run = (variables_of_run(), os.getcwd())
        try:
            self._process.answer(self._process.load(decoder, prefix, *run), "loading its file")
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def send(self, batch: DataProto, step: int) -> ray.ObjectRef:
        """Starts scoring a batch of training; reads what `reward_inputs` reads."""
        return self._send(batch, step, "train", self._config.streams)

    def receive(self, batch: DataProto, request: ray.ObjectRef, record: StepRecord) -> DataProto:
        """Adds: `token_level_scores`, and `reward_results`, each row's own dict from the reward function.

        The metrics `reward/*` are means over every sample received in the step, as in EasyR1: filtered groups count
        too. `reward/retried` counts the calls that failed once and then succeeded. `perf/reward_memory_gb` is the
        memory of the function's process and its children after a batch. The recorded time is only the wait that other
        work did not hide.

        Raises:
            RuntimeError: the function raised, or its process or node is gone.
        """
        with record.timed("reward"):
            scored, memory = self._answer(request, batch, f"step {record.step}")
            batch = batch.union(place_scores(batch, scored))
        self._warn_of_unused_weights(scored)
        numbers = numbers_by_key(batch)
        record.average({f"reward/{key}": values for key, values in numbers.items()})
        if "retried" not in numbers:  # otherwise the function returns a key of this name
            record.count("reward/retried", len(scored.failures))
        record.average({"perf/reward_memory_gb": [memory / GIB]})
        return batch

    def _warn_of_unused_weights(self, scored: Scored) -> None:
        if self._warns_of_token_weights and any(TOKEN_WEIGHTS in result for result in scored.results):
            self._warns_of_token_weights = False
            logger.warning(
                "the reward function returns %s, which have no effect: algorithm.enable_token_weights=true uses them",
                TOKEN_WEIGHTS,
            )

    def totals(self, batch: DataProto, step: int, record: StepRecord) -> torch.Tensor:
        """(N,) float32: the score of each row of a training batch, without recording metrics.

        Raises:
            RuntimeError: as `receive` does.
        """
        with record.timed("reward"):
            scored, _ = self._answer(self._send(batch, step, "train"), batch, f"the baselines of step {step}")
            return _totals(scored)

    def validate(self, batch: DataProto, step: int) -> tuple[list[float], list[dict[str, Any]]]:
        """The score and the function's result for each row of a held-out batch.

        Raises:
            RuntimeError: as `receive` does.
        """
        scored, _ = self._answer(self._send(batch, step, "val"), batch, f"the validation after step {step}")
        return _totals(scored).tolist(), scored.results

    def _send(self, batch: DataProto, step: int, split: str, streams: tuple[str, ...] = ()) -> ray.ObjectRef:
        return self._process.score(reward_inputs(batch, self._config, step, split, streams))

    def _answer(self, request: ray.ObjectRef, batch: DataProto, source: str) -> tuple[Scored, int]:
        """The scores of a batch, and the memory of the process and its children afterwards, in bytes."""
        task = f"scoring {len(batch)} samples of {source}"
        scored, memory = self._process.answer(request, task, num_samples=len(batch))
        for failure in scored.failures[:FAILURES_SHOWN]:
            logger.warning(failure)
        if len(scored.failures) > FAILURES_SHOWN:
            logger.warning(
                "%d more calls of the reward function failed and were made again",
                len(scored.failures) - FAILURES_SHOWN,
            )
        self._growth.check(memory)
        return scored, memory


class _Growth:
    """Warns when the process's memory has doubled since its first batch and grown by `GROWTH_TO_TELL` at least, and at
    every further doubling."""

    def __init__(self, config: RewardConfig) -> None:
        self._function = config.reward_function
        self._first: int | None = None
        self._next = 0

    def check(self, memory: int) -> None:
        """memory: bytes after a batch."""
        if self._first is None:
            self._first, self._next = memory, max(2 * memory, memory + GROWTH_TO_TELL)
        elif memory >= self._next:
            self._next = 2 * memory
            logger.warning(
                "the reward function %s and its children hold %.1f GiB, %.1f after the first batch; look for what it "
                "keeps from call to call",
                self._function,
                memory / GIB,
                self._first / GIB,
            )


def numbers_by_key(batch: DataProto) -> dict[str, list[float]]:
    """The numeric values that the reward function returned, by key. Reads: `reward_results`."""
    return without_token_weights(values_by_key(batch.non_tensor_batch["reward_results"]))


def _totals(scored: Scored) -> torch.Tensor:
    """(N,) float32, the reward of each sample."""
    if scored.token_level_scores is not None:
        return torch.tensor(scored.token_level_scores).sum(dim=-1)
    return torch.tensor([result["overall"] for result in scored.results])
