# SPDX-License-Identifier: Apache-2.0
"""Says what to set where a model comes with Python code of its own and is not trusted to run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

TRUST_KEY = (
    "worker.actor.model.trust_remote_code=true (worker.critic.model.trust_remote_code for a critic's own model)"
)


@contextmanager
def refused_remote_code(path: str, remedy: str = TRUST_KEY) -> Iterator[None]:
    """Puts transformers' refusal to run the code of the model at `path` into the words of this project.

    Args:
        remedy: what sets that the code is run.

    Raises:
        ValueError: transformers refused.
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
