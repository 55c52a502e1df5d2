# SPDX-License-Identifier: Apache-2.0
"""Makes a process deterministic (`trainer.deterministic`)."""

from __future__ import annotations

import random

VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
}
"""Environment variables that cuBLAS and transformers read at first use.

Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
"""


def set_determinism(is_deterministic: bool, seed: int) -> None:
    """If asked to, makes torch use deterministic algorithms and seeds the random generators of this process.

    If torch has no deterministic algorithm for an operation, it warns once.
    """
    # Imported here: the driver reads VARIABLES before it loads torch.
    import numpy as np
    import torch

    torch.use_deterministic_algorithms(is_deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = False
    if is_deterministic:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
