# SPDX-License-Identifier: Apache-2.0
"""The trainer's side of the reward function: what is sent to its process, and what comes back.

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
"""In the run's folder: what the reward function prints."""

FAILURES_SHOWN = 3
"""Of one batch."""

GROWTH_TO_TELL = 2 * 2**30
"""Bytes; a function that has also doubled what it held after its first batch is told of."""

GIB = 2**30


class RewardClient:
    """Has batches scored in a process of their own. Requests are answered in their order.

    A context manager: the process starts with it, and ends with it. `load` comes first.

    Args:
        config: the function, and how many CPUs its process takes.
        folder: of the run; `LOG_FILE` in it is for what the function prints.
        limits: what the process may have.
        uses_token_weights: whether tokens are weighted; if not, one warning says that returned weights are left out.
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
        """What the function prints; the second file is there once the first was full."""
        paths = (self._log_file, f"{self._log_file}.1")
        return [WrittenFile("output of the reward function", Path(path)) for path in paths]

    def load(self, decoder: TextDecoder, prefix: str = "") -> None:
        """Has the process run the user's file, with the variables and in the folder of this one.

        Args:
            decoder: turns token ids into text there.
            prefix: what the chat template writes of every answer.

        Raises:
            ValueError: the file or the function is not what it has to be, or the folder is not there.
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

        The metrics `reward/*` are means over every sample received in the step: with filtered groups, over those that
        are dropped too, as in EasyR1. `reward/retried` counts the calls that failed and then gave a result.
        `perf/reward_memory_gb` is what the function's process and its children hold after a batch. The time recorded
        is the wait that nothing else hid.

        Raises:
            RuntimeError: the function raised, or its process or node is gone.
        """
        with record.timed("reward"):
            scored, memory = self._answer(request, batch, f"step {record.step}")
            batch = batch.union(place_scores(batch, scored))
        self._tell_of_unused_weights(scored)
        numbers = numbers_by_key(batch)
        record.average({f"reward/{key}": values for key, values in numbers.items()})
        if "retried" not in numbers:  # else the name is the function's own
            record.count("reward/retried", len(scored.failures))
        record.average({"perf/reward_memory_gb": [memory / GIB]})
        return batch

    def _tell_of_unused_weights(self, scored: Scored) -> None:
        if self._warns_of_token_weights and any(TOKEN_WEIGHTS in result for result in scored.results):
            self._warns_of_token_weights = False
            logger.warning(
                "the reward function returns %s, which do nothing: algorithm.enable_token_weights=true uses them",
                TOKEN_WEIGHTS,
            )

    def totals(self, batch: DataProto, step: int, record: StepRecord) -> torch.Tensor:
        """(N,) float32: the score of each row of a batch of training, which shows in no metric.

        Raises:
            RuntimeError: as `receive` does.
        """
        with record.timed("reward"):
            scored, _ = self._answer(self._send(batch, step, "train"), batch, f"the baselines of step {step}")
            return _totals(scored)

    def validate(self, batch: DataProto, step: int) -> tuple[list[float], list[dict[str, Any]]]:
        """The score of each row of a held-out batch, and what the function returned of it.

        Raises:
            RuntimeError: as `receive` does.
        """
        scored, _ = self._answer(self._send(batch, step, "val"), batch, f"the validation after step {step}")
        return _totals(scored).tolist(), scored.results

    def _send(self, batch: DataProto, step: int, split: str, streams: tuple[str, ...] = ()) -> ray.ObjectRef:
        return self._process.score(reward_inputs(batch, self._config, step, split, streams))

    def _answer(self, request: ray.ObjectRef, batch: DataProto, of: str) -> tuple[Scored, int]:
        """What was said of a batch, and the bytes that the process and its children held then."""
        scored, memory = self._process.answer(request, f"scoring {len(batch)} samples of {of}", num_samples=len(batch))
        for failure in scored.failures[:FAILURES_SHOWN]:
            logger.warning(failure)
        if len(scored.failures) > FAILURES_SHOWN:
            logger.warning(
                "%d more calls of the reward function failed and were made again",
                len(scored.failures) - FAILURES_SHOWN,
            )
        self._growth.look_at(memory)
        return scored, memory


class _Growth:
    """Warns when the process holds twice what it held after its first batch, and at every doubling after that."""

    def __init__(self, config: RewardConfig) -> None:
        self._function = config.reward_function
        self._first: int | None = None
        self._next = 0

    def look_at(self, memory: int) -> None:
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
    """What the reward function said of the batch's rows and can be averaged. Reads: `reward_results`."""
    return without_token_weights(values_by_key(batch.non_tensor_batch["reward_results"]))


def _totals(scored: Scored) -> torch.Tensor:
    """(N,) float32, what each sample is rewarded with."""
    if scored.token_level_scores is not None:
        return torch.tensor(scored.token_level_scores).sum(dim=-1)
    return torch.tensor([result["overall"] for result in scored.results])
