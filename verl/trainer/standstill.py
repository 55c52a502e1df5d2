# SPDX-License-Identifier: Apache-2.0
"""Detects that training makes no progress: skipped optimizer steps, or batches without any signal.

Shapes: N rows, R response length.
"""

import json
import logging
from collections import Counter
from pathlib import Path

from verl.config import cut
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.config import TrainerConfig
from verl.trainer.sinks import WrittenFile
from verl.trainer.step_record import StepRecord
from verl.utils.batch_plan import BatchPlan, ModelPlan
from verl.utils.writing import naming_write_errors

logger = logging.getLogger(__name__)

SKIPPED_SAMPLES = "skipped_samples.jsonl"
"""File in the run's folder that lists the prompts of skipped mini-batches, one a line."""


class Standstill:
    """Counts consecutive steps that changed nothing, since the start of the run or its last resume.

    Args:
        config: gives the limits and the run's folder.
        plan: tells which rows form a mini-batch.
        workers: know which mini-batches they skipped.
    """

    def __init__(self, config: TrainerConfig, plan: BatchPlan, workers: WorkerGroup) -> None:
        self.config = config
        self.world_size = plan.world_size
        self.plans: dict[str, ModelPlan | None] = {"actor": plan.actor, "critic": plan.critic}
        self.workers = workers
        self.skipped = Counter()
        self.uninformative = 0

    def watch(self, batch: DataProto, record: StepRecord) -> None:
        """Checks a step after its updates. If the actor was updated, adds the metric `actor/uninformative_steps`: the
        number of consecutive steps, including this one, in which every advantage was 0.

        Reads: `response_mask`, `advantages` (N, R), `uid`, `prompt_text`.

        Raises:
            RuntimeError: all optimizer steps of a model were skipped in `trainer.max_skipped_steps` steps in a row.
        """
        has_signal = bool((batch.batch["advantages"] * batch.batch["response_mask"]).any())
        prompts = dict(zip(batch.non_tensor_batch["uid"], batch.non_tensor_batch["prompt_text"], strict=True))
        metrics = record.metrics
        if "actor/lr" in metrics:
            self._count_uninformative(has_signal, record)
        for model, plan in self.plans.items():
            skipped = metrics.get(f"{model}/skipped_steps")
            if skipped is None:  # the model was not updated
                continue
            if skipped:
                self._name_samples(model, plan, batch.non_tensor_batch["uid"], prompts, record.step)
            self.skipped[model] = self.skipped[model] + 1 if skipped == plan.optimizer_steps_per_step else 0
            self._require_progress(model, record.step)

    def files(self) -> list[WrittenFile]:
        """The file that lists samples of skipped mini-batches."""
        return [WrittenFile("samples of skipped updates", Path(self.config.save_checkpoint_path, SKIPPED_SAMPLES))]

    def _count_uninformative(self, has_signal: bool, record: StepRecord) -> None:
        self.uninformative = 0 if has_signal else self.uninformative + 1
        record.add({"actor/uninformative_steps": self.uninformative})
        if self.uninformative == self.config.max_uninformative_steps > 0:
            logger.warning(
                "in %d steps in a row, up to step %d, every advantage was 0: the policy learns nothing "
                "(trainer.max_uninformative_steps). If rewards and entropy fell to 0, it has collapsed: go on from an "
                "earlier checkpoint with a lower worker.actor.optim.lr. Else the prompts are too easy or too hard for "
                "it, or the reward function tells no answers apart",
                self.uninformative,
                record.step,
            )

    def _name_samples(self, model: str, plan: ModelPlan, uids, prompts: dict[str, str], step: int) -> None:
        path = Path(self.config.save_checkpoint_path, SKIPPED_SAMPLES)
        for number in sorted(set(self.workers.skipped_mini_batches(model)[0])):
            rows = Counter(uids[row] for row in plan.rows_of_mini_batch(number, self.world_size))
            with naming_write_errors(path), open(path, "a", encoding="utf-8") as file:
                for uid, count in rows.items():
                    place = {"step": step, "model": model, "mini_batch": number, "uid": uid, "responses": count}
                    file.write(json.dumps({**place, "prompt": cut(prompts[uid], 500)}, ensure_ascii=False) + "\n")

    def _require_progress(self, model: str, step: int) -> None:
        limit = self.config.max_skipped_steps
        if self.skipped[model] < limit or limit == 0:
            return
        raise RuntimeError(
            f"in trainer.max_skipped_steps={limit} steps in a row, up to step {step}, every optimizer step of the "
            f"{model} was skipped, for its gradient was not finite; step {step} is not saved. {SKIPPED_SAMPLES} in "
            f"the run's folder names the samples: look at their rewards. Or lower worker.{model}.optim.lr and go on "
            "from an earlier checkpoint (trainer.load_checkpoint_path)"
        )
