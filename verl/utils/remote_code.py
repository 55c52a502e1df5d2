# SPDX-License-Identifier: Apache-2.0
"""The error for a model that needs its own Python code while `trust_remote_code` is false."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

TRUST_KEY = (
    "worker.actor.model.trust_remote_code=true (worker.critic.model.trust_remote_code for a critic's own model)"
)


@contextmanager
def refused_remote_code(path: str, remedy: str = TRUST_KEY) -> Iterator[None]:
    """Turns transformers' refusal to run the code of the model at `path` into an error that names the key to set.

    Args:
        remedy: the setting that allows the code.

    Raises:
        ValueError: transformers refused to run the code.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code=True" not in str(error):
            raise
        raise ValueError(
            f"{path} comes with Python code (auto_map in its configuration), which loading it would run with all your "
            f"rights; read the code and, if you trust it, set {remedy}"
        ) from None
