# SPDX-License-Identifier: Apache-2.0
"""The loss of a critic update: the clipped squared error of its values.

Shapes: N sequences of a micro-batch, R response length.
"""

import torch

from verl.algorithms.value_loss import clipped_value_loss
from verl.protocol import DataProto
from verl.utils.device_copies import to_device
from verl.utils.masked_ops import aggregate_loss
from verl.workers.critic.config import CriticConfig
from verl.workers.critic.forward import ValueForward


class ValueObjective:
    """The critic's `Objective`.

    Args:
        config: the critic's section.
        forward: the critic's forward pass.
    """

    def __init__(self, config: CriticConfig, forward: ValueForward) -> None:
        self.config = config
        self.forward = forward

    def __call__(
        self, rows: DataProto, num_tokens: torch.Tensor, num_sequences: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Reads from `rows` the streams that `DataParallelPPOCritic.update_critic` lists."""
        response_mask, old_values, returns = (
            to_device(rows.batch[name], self.forward.device) for name in ("response_mask", "values", "returns")
        )  # (N, R)
        counts = (to_device(num_tokens, self.forward.device), num_sequences)
        values = self.forward.measure(rows, ["values"])["values"]  # (N, R)
        per_token_loss, per_token_metrics = clipped_value_loss(values, old_values, returns, self.config)
        mode = self.config.loss_avg_mode
        loss = aggregate_loss(per_token_loss, response_mask, response_mask, mode, *counts)
        metrics = {
            name: aggregate_loss(per_token, response_mask, response_mask, "token", *counts)
            for name, per_token in per_token_metrics.items()
        }
        return loss, {"vf_loss": loss, **metrics}
