# SPDX-License-Identifier: Apache-2.0
"""The control for VGR: trains like `verl.trainer.main`, but with each response's weights in random order.

    python scripts/shuffled_weights.py config=examples/quickstart.yaml trainer.save_checkpoint_path=checkpoints/control

Mean, spread and clipping of the weights stay what they were, so the size of the updates does; only which token gets
which weight is lost. What VGR gains beyond this control, it gains by looking.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from verl.protocol import DataProto
from verl.trainer import main
from verl.trainer.ray_trainer import RayDAPOTrainer

ordered_weights = RayDAPOTrainer._maybe_compute_token_weights


def shuffled_weights(
    trainer: RayDAPOTrainer, batch: DataProto, reward_metrics: dict[str, list[Any]]
) -> torch.Tensor | None:
    """The trainer's weights (N, R), permuted within each response by a generator seeded with the step."""
    weights = ordered_weights(trainer, batch, reward_metrics)
    if weights is None:
        return None
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    shuffled = weights.clone()
    for row, length in enumerate(batch.batch["response_mask"].sum(dim=1).tolist()):
        order = torch.randperm(length, generator=generator)
        shuffled[row, :length] = weights[row, order]
    return shuffled


if __name__ == "__main__":
    RayDAPOTrainer._maybe_compute_token_weights = shuffled_weights
    main.main()
