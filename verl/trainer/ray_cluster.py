# SPDX-License-Identifier: Apache-2.0
"""The Ray cluster of a run: an existing one, or a new one on this machine that is protected by a token.

Anyone who reaches the ports of a Ray cluster can run code in it. So a cluster that the run starts asks for a token; an
existing cluster keeps its own setting.
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
from verl.utils.termination import block_sigterm_in_children

if TYPE_CHECKING:
    from ray._private.worker import RayContext

logger = logging.getLogger(__name__)

WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "true",
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Both need the GPUs of a group to see each other, but Ray shows each process only its own.
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Default environment variables for every process of a run; variables that the user has set stay."""

RAY_START_NOTE = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
"""File in which `ray start` writes the address of this machine's cluster; `ray stop` removes it."""


def set_worker_environment() -> None:
    """Sets the default variables for this process and its children, unless the user has set them."""
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def joins_cluster() -> bool:
    """Whether the environment or this machine names a running cluster."""
    return "RAY_ADDRESS" in os.environ or RAY_START_NOTE.exists()


@contextmanager
def ray_session(config: PPOConfig) -> Iterator[None]:
    """A Ray cluster for the run.

    In this order: the cluster that this process is connected to; the one that `RAY_ADDRESS` or `ray start` on this
    machine names; a new one on this machine, which ends with the run.
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
                _write_timeline(config.trainer.ray_timeline)


def _write_timeline(path: str) -> None:
    """Writes Ray's timeline. A failure is a warning: the run has ended, perhaps with an error of its own."""
    import ray

    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        ray.timeline(path)
    except OSError as error:
        logger.warning("trainer.ray_timeline=%s could not be written: %s", path, error)
    else:
        logger.info("Ray's timeline is in %s", path)


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
        with guard.mark_children():
            session = _start_ray(num_cpus=_cpus_of(config))
        guard.remember(session.address_info["session_dir"])
        try:
            yield
        finally:
            guard.end_helpers()
            ray.shutdown()


@contextmanager
def token_authentication() -> Iterator[None]:
    """Inside, a Ray cluster that this process starts asks for a token that only this process and the cluster know.

    `RAY_AUTH_MODE` and the user's own token (`RAY_AUTH_TOKEN` or `RAY_AUTH_TOKEN_PATH`) have priority. The token is
    in the environment of this process and of the cluster's processes. Other users cannot read it there, and unlike
    Ray's own token file it needs no home folder.
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
    """The user's RAY_AUTH_MODE, `token` or `disabled`; None if it is unset or empty.

    Raises:
        ValueError: it has another value, which Ray would read as `disabled`.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() not in ("", "token", "disabled"):
        raise ValueError(
            f"RAY_AUTH_MODE={mode} is neither token nor disabled; unset it, and the cluster takes a token"
        )
    return mode.lower() or None


@functools.cache
def _secret() -> str:
    """256 random bits; one token per process, since Ray reads the token once."""
    return secrets.token_hex(32)


def _cpus_of(config: PPOConfig) -> int:
    workers = config.trainer.nnodes * config.trainer.n_gpus_per_node
    # Workers mostly wait for each other and may share cores: the count is of processes, not of cores.
    return max(os.cpu_count() or 1, workers + config.worker.reward.num_cpus)


def _join_ray() -> None:
    import ray

    # Inside a Ray job this process already has the job's runtime environment; Ray refuses to be given it again.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    variables = {name: os.environ[name] for name in WORKER_ENVIRONMENT}
    with block_sigterm_in_children():
        ray.init(logging_level="ERROR", runtime_env={"env_vars": variables})


def _start_ray(**options: Any) -> "RayContext":
    import ray

    try:
        # Unless the user chose a mode, this asks for the token and sets RAY_AUTH_MODE for the cluster's processes.
        with block_sigterm_in_children():
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
    """Raise unless the Ray cluster that the run is to join answers; Ray itself would wait for minutes.

    Raises:
        ValueError: no answer; the message says what named the cluster and what to do. Or RAY_AUTH_MODE is no mode.
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
