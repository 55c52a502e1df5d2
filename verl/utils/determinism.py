# SPDX-License-Identifier: Apache-2.0
"""What a process needs so that the same run gives the same numbers (`trainer.deterministic`)."""

from __future__ import annotations

import random

VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
}
"""Of the environment, read by cuBLAS and transformers when they first need them.

Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
"""


def set_determinism(is_deterministic: bool, seed: int) -> None:
    """Has torch choose algorithms that repeat themselves, and seeds the generators of this process; or not.

    Where torch has no such algorithm for an operation it warns once, by the operation's name.
    """
    # The driver reads VARIABLES before it loads these.
    import numpy as np
    import torch

    torch.use_deterministic_algorithms(is_deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = False
    if is_deterministic:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
