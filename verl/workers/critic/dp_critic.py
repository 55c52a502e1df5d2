# SPDX-License-Identifier: Apache-2.0
"""The data-parallel critic: the value update over all ranks.

Shapes: N sequences of this rank, R response length.
"""

from collections.abc import Sequence

from verl.protocol import DataProto
from verl.utils.batch_plan import ModelPlan
from verl.workers.critic.config import CriticConfig
from verl.workers.critic.forward import ValueForward
from verl.workers.critic.objective import ValueObjective
from verl.workers.fsdp_checkpoint import SavesPretrained
from verl.workers.trained_model import TrainedModel


class DataParallelPPOCritic(TrainedModel):
    """Fits the value model to the returns of each step, with a clipped squared error.

    Args:
        config: the critic's section.
        plan: the critic's batch sizes.
        forward: the critic's forward pass.
        training_steps, pretrained_parts: as in `TrainedModel`.
    """

    area = "critic"
    objective: ValueObjective

    def __init__(
        self,
        config: CriticConfig,
        plan: ModelPlan,
        forward: ValueForward,
        training_steps: int,
        pretrained_parts: Sequence[SavesPretrained],
    ) -> None:
        super().__init__(forward, ValueObjective(config, forward), config, plan, training_steps, pretrained_parts)

    def update_critic(self, data: DataProto) -> dict[str, float]:
        """`TrainedModel.update` on the critic's objective.

        Args:
            data: `input_ids`, `attention_mask`, `position_ids`, `response_mask`, the `values` from before the update
                and the `returns` to fit; non-tensor `multi_modal_data`, and `uid` if packed rows share prompts.

        Returns:
            `critic/*` metrics, the same on every rank: means over the mini-batch's real response tokens (`vf_loss`
            averaged by `loss_avg_mode`), averaged over the optimizer steps.
        """
        return self.update(data)
