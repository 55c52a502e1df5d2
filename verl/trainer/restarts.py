# SPDX-License-Identifier: Apache-2.0
"""A run that goes on by itself, from its last checkpoint, when processes of it are lost."""

import gc
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import ray

from verl.single_controller.lost_processes import ProcessesLost
from verl.trainer.config import PPOConfig
from verl.trainer.stop_request import StopRequest
from verl.utils.checkpoint import CHECKPOINT_TRACKER

logger = logging.getLogger(__name__)

NODE_WAIT_SECONDS = 600
"""For a node that comes back, or another in its place."""


def train_through_losses(
    config: PPOConfig, resources: Mapping[str, int], stop_request: StopRequest, train: Callable[[PPOConfig], None]
) -> None:
    """Calls `train` until it ends in another way than by lost processes, `trainer.max_restarts` + 1 times at most.

    Whatever else it raises is not tried again: a mistake would be made again, and the reward function's errors are
    told to whoever wrote it.

    Args:
        resources: what an attempt takes of the Ray cluster. Where a node was lost, they are waited for up to
            `NODE_WAIT_SECONDS`, from nodes that come back or others.
        train: is given the config of an attempt: the later ones go on from the last checkpoint that the run saved, and
            begin as the first did where there is none.

    Raises:
        ProcessesLost: once more than that, or when the run was asked to end anyway.
    """
    beginning = _last_save(config)
    for restarts_left in reversed(range(config.trainer.max_restarts + 1)):
        try:
            train(config)
            return
        except ProcessesLost as error:
            if restarts_left == 0 or stop_request:
                raise
            news = error.news
        stop_request.end_at_once()
        gc.collect()  # a traceback holds the attempt's batches and loaders
        place = "as it began, since it has saved nothing"
        if _last_save(config) != beginning:
            going_on = replace(config.trainer, load_checkpoint_path=None, find_last_checkpoint=True)
            config, place = replace(config, trainer=going_on), "from the last checkpoint"
        logger.warning("%s. The run goes on %s; restarts left: %d", news, place, restarts_left - 1)
        _wait_for(resources)


def _last_save(config: PPOConfig) -> int | None:
    """When the tracker was written, as it is after each checkpoint, in nanoseconds."""
    path = Path(config.trainer.save_checkpoint_path, CHECKPOINT_TRACKER)
    return path.stat().st_mtime_ns if path.exists() else None


def _wait_for(resources: Mapping[str, int]) -> None:
    """Returns in any case: who starts processes then tells what is missing."""
    deadline = time.monotonic() + NODE_WAIT_SECONDS
    while any(ray.cluster_resources().get(name, 0) < wanted for name, wanted in resources.items()):
        if time.monotonic() > deadline:
            return
        time.sleep(1)
