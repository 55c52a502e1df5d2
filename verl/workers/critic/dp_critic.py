# SPDX-License-Identifier: Apache-2.0
"""The data-parallel critic: values of a rank's rows, and the value update over all ranks.

Shapes: N sequences of this rank, R response length, W ranks.
"""

import torch

from verl.algorithms.value_loss import clipped_value_loss
from verl.protocol import DataProto
from verl.utils.masked_ops import aggregate_loss
from verl.workers.critic.config import CriticConfig
from verl.workers.response_forward import ResponseForward
from verl.workers.trained_model import TrainedModel


class ValueForward(ResponseForward):
    """The value before each response token: what the model expects of the rewards from that token on."""

    def __call__(self, rows: DataProto) -> torch.Tensor:
        layout = self.layout(rows)
        values = layout.at_labels(self.model(**self.inputs(rows, layout)).logits)  # (L, 1)
        return layout.as_stream(layout.of_all_ranks(values)[:, 0])  # (N, R)


class DataParallelPPOCritic(TrainedModel):
    """Fits the sharded value model to the returns of each step, with a clipped squared error."""

    area = "critic"
    config: CriticConfig

    def update_critic(self, data: DataProto) -> dict[str, float]:
        """`TrainedModel.update` on the value loss.

        Args:
            data: `input_ids`, `attention_mask`, `position_ids`, `responses`, `response_mask`, the `values` from before
                the update and the `returns` to fit; non-tensor `multi_modal_data`.

        Returns:
            `critic/*` metrics, the same on every rank: means over the mini-batch's real response tokens (`vf_loss` as
            `loss_avg_mode` has it), averaged over the optimizer steps.
        """
        return self.update(data)

    def _loss(
        self, rows: DataProto, num_tokens: torch.Tensor, num_sequences: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        device = self.forward.device
        response_mask = rows.batch["response_mask"].to(device)  # (N, R)
        counts = (num_tokens.to(device), num_sequences)

        def share(per_token: torch.Tensor, mode: str = "token") -> torch.Tensor:
            return aggregate_loss(per_token, response_mask, response_mask, mode, *counts)

        per_token_loss, per_token_metrics = clipped_value_loss(
            self.forward(rows),
            rows.batch["values"].to(device),
            rows.batch["returns"].to(device),
            self.config.cliprange_value,
        )
        loss = share(per_token_loss, self.config.loss_avg_mode)
        return loss, {"vf_loss": loss} | {name: share(values) for name, values in per_token_metrics.items()}
