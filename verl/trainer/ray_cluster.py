# SPDX-License-Identifier: Apache-2.0
"""The Ray cluster of a run: one that is joined, or a new one on this machine that lets nobody else in.

Whoever reaches the ports of a Ray cluster can run code in it. So a cluster that the run starts asks for a token, and
one that is joined keeps what it has.
"""

import functools
import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.trainer.cluster_guard import ClusterGuard
from verl.trainer.config import PPOConfig
from verl.utils.termination import termination_kept_from_children

if TYPE_CHECKING:
    from ray._private.worker import RayContext

logger = logging.getLogger(__name__)

WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "true",
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Both want a group's GPUs to see each other, and Ray shows a process its own.
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Defaults for every process of a run; what the user has set stays."""

RAY_START_NOTE = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
"""Where `ray start` leaves the address of the cluster that this machine belongs to, and `ray stop` takes it away."""


def set_worker_environment() -> None:
    """Gives this process, and so those that it starts, the variables that the user has not set."""
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def joins_cluster() -> bool:
    """Whether the environment or this machine names a cluster that runs already."""
    return "RAY_ADDRESS" in os.environ or RAY_START_NOTE.exists()


@contextmanager
def ray_session(config: PPOConfig) -> Iterator[None]:
    """A Ray cluster for the run.

    The one this process is connected to already, or the one that `RAY_ADDRESS` or `ray start` on this machine names,
    or else a new one on this machine that ends with the run.
    """
    set_worker_environment()
    import ray

    if ray.is_initialized():
        cluster = nullcontext()
    elif joins_cluster():
        cluster = _joined_cluster()
    else:
        cluster = _own_cluster(config)
    with cluster:
        try:
            yield
        finally:
            if config.trainer.ray_timeline is not None:
                ray.timeline(config.trainer.ray_timeline)
                logger.info("Ray's timeline is in %s", config.trainer.ray_timeline)


@contextmanager
def _joined_cluster() -> Iterator[None]:
    import ray

    logger.info("joining the Ray cluster")
    _join_ray()
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_cluster(config: PPOConfig) -> Iterator[None]:
    import ray

    logger.info("starting Ray")
    with token_authentication(), ClusterGuard() as guard:
        with guard.takes_in():
            session = _start_ray(num_cpus=_cpus_of(config))
        guard.remember(session.address_info["session_dir"])
        try:
            yield
        finally:
            guard.end_helpers()
            ray.shutdown()


@contextmanager
def token_authentication() -> Iterator[None]:
    """Meanwhile, a Ray cluster that this process starts lets in only those who know a secret of this process.

    What the user has chosen by `RAY_AUTH_MODE` stays, and so does his own token (`RAY_AUTH_TOKEN` or
    `RAY_AUTH_TOKEN_PATH`). The secret is in the environment of this process and of the cluster's: other users cannot
    read it there, and unlike Ray's own token file it needs no home folder.
    """
    mode = _users_mode()
    if mode == "disabled":
        yield
        return
    os.environ.pop("RAY_AUTH_MODE", None)  # `ray.init` sets it; set before, Ray would make a token in the home folder
    is_users = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    if not is_users:
        os.environ["RAY_AUTH_TOKEN"] = _secret()
    try:
        yield
    finally:
        os.environ.pop("RAY_AUTH_MODE", None)
        if mode is not None:
            os.environ["RAY_AUTH_MODE"] = mode
        if not is_users:
            del os.environ["RAY_AUTH_TOKEN"]


def _users_mode() -> str | None:
    """`token` or `disabled`, as RAY_AUTH_MODE says; None where it is unset or empty.

    Raises:
        ValueError: it says anything else, which Ray would take for `disabled`.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() not in ("", "token", "disabled"):
        raise ValueError(
            f"RAY_AUTH_MODE={mode} is neither token nor disabled; unset it, and the cluster takes a token"
        )
    return mode.lower() or None


@functools.cache
def _secret() -> str:
    """256 random bits; one secret a process, since Ray reads a token once."""
    return secrets.token_hex(32)


def _cpus_of(config: PPOConfig) -> int:
    workers = config.trainer.nnodes * config.trainer.n_gpus_per_node
    # Workers mostly wait for each other and may share cores: the count is of processes, not of cores.
    return max(os.cpu_count() or 1, workers + config.worker.reward.num_cpus)


def _join_ray() -> None:
    import ray

    # As a job, this process has the values of the job's runtime environment; Ray refuses to be told them again.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    variables = {name: os.environ[name] for name in WORKER_ENVIRONMENT}
    with termination_kept_from_children():
        ray.init(logging_level="ERROR", runtime_env={"env_vars": variables})


def _start_ray(**options: Any) -> "RayContext":
    import ray

    try:
        # Where the user has said nothing, it asks for the token, and sets RAY_AUTH_MODE for the cluster's processes.
        with termination_kept_from_children():
            session = ray.init("local", include_dashboard=False, logging_level="ERROR", **options)
    except OSError as error:
        if "AF_UNIX" not in str(error):
            raise
        folder = os.environ.get("RAY_TMPDIR", tempfile.gettempdir())
        raise ValueError(
            f"Ray cannot make its sockets below {folder}, whose name is too long ({error}); set RAY_TMPDIR to a short "
            "folder, such as /tmp"
        ) from error
    if _users_mode() is None:
        ray.shutdown()
        raise ValueError(
            f"Ray {ray.__version__} would let anybody into the run's cluster: install the release of "
            "requirements.txt, which asks for a token, or set RAY_AUTH_MODE=disabled to do without one"
        )
    return session


def require_cluster() -> None:
    """Raise unless something answers at the Ray cluster that the run is to join; Ray itself would wait for minutes.

    Raises:
        ValueError: saying what named the cluster, and what to do; or RAY_AUTH_MODE is no mode.
    """
    _users_mode()
    if address := os.environ.get("RAY_ADDRESS"):
        source, remedy = "RAY_ADDRESS", "unset it to start a cluster for the run, or start that one"
    elif RAY_START_NOTE.exists():
        address, source = RAY_START_NOTE.read_text(encoding="utf-8").strip(), str(RAY_START_NOTE)
        remedy = "it was left by `ray start`: run `ray stop`, which takes it away, or start the cluster again"
    else:
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # such as `auto` and `local`, which Ray resolves by itself
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise ValueError(
            f"{source} names a Ray cluster at {address}, where nothing answers ({reason}); {remedy}"
        ) from error
