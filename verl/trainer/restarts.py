# SPDX-License-Identifier: Apache-2.0
"""Restarts a run from its last checkpoint when its processes are lost."""

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
"""How long to wait for a lost node, or another one in its place."""


def train_through_losses(
    config: PPOConfig, resources: Mapping[str, int], stop_request: StopRequest, train: Callable[[PPOConfig], None]
) -> None:
    """Calls `train` again after each loss of processes, `trainer.max_restarts` + 1 times at most.

    Other errors end the run: a retry would repeat a mistake, and the author of the reward function has to see its
    errors.

    Args:
        resources: the Ray resources that an attempt needs. After the loss of a node, the next attempt waits for them
            up to `NODE_WAIT_SECONDS`.
        train: called with the config of an attempt. Later attempts resume from the last checkpoint that the run saved;
            without one they start like the first.

    Raises:
        ProcessesLost: processes were lost with no restarts left, or after the run was asked to end.
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
            resumed = replace(config.trainer, load_checkpoint_path=None, find_last_checkpoint=True)
            config, place = replace(config, trainer=resumed), "from the last checkpoint"
        logger.warning("%s. The run goes on %s; restarts left: %d", news, place, restarts_left - 1)
        _wait_for(resources)


def _last_save(config: PPOConfig) -> int | None:
    """When the tracker was last written, in nanoseconds; every checkpoint writes it."""
    path = Path(config.trainer.save_checkpoint_path, CHECKPOINT_TRACKER)
    return path.stat().st_mtime_ns if path.exists() else None


def _wait_for(resources: Mapping[str, int]) -> None:
    """Waits for the resources; returns in any case, since starting processes reports what is missing."""
    deadline = time.monotonic() + NODE_WAIT_SECONDS
    while any(ray.cluster_resources().get(name, 0) < wanted for name, wanted in resources.items()):
        if time.monotonic() > deadline:
            return
        time.sleep(1)
