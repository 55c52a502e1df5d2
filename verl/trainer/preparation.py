# SPDX-License-Identifier: Apache-2.0
"""Checks before a run starts any process or loads any weights."""

from typing import TYPE_CHECKING

from verl.data.headers import check_headers
from verl.trainer.config import PPOConfig
from verl.trainer.config_checks import attention_for_signals, has_built_in_algorithms, require_available
from verl.trainer.ray_cluster import require_cluster
from verl.trainer.tracking import require_loggers
from verl.utils.batch_plan import BatchPlan
from verl.utils.checkpoint import refuse_to_start_anew
from verl.utils.user_code import require_defined

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from verl.data.dataset import RLHFDataset


def prepare(config: PPOConfig) -> BatchPlan:
    """Makes every check that needs no process, and returns the run's batch plan."""
    require_available(config)
    require_cluster()
    require_loggers(config.trainer.logger)
    require_defined(config.worker.reward.reward_function, "worker.reward.reward_function")
    check_headers(config.data)
    if not config.trainer.val_only:  # such a run may read the folder of another run
        places = (config.trainer.save_checkpoint_path, config.trainer.load_checkpoint_path)
        refuse_to_start_anew(*places, config.trainer.find_last_checkpoint)
    plan = BatchPlan.from_config(config, config.trainer.nnodes * config.trainer.n_gpus_per_node)
    if not has_built_in_algorithms(config):
        _require_algorithms(config)
    return plan


def _require_algorithms(config: PPOConfig) -> None:
    # The registries load torch, so every other mistake is reported first.
    from verl.algorithms.advantages import ADVANTAGE_ESTIMATORS
    from verl.algorithms.policy_loss import POLICY_LOSSES

    checks = (
        lambda: ADVANTAGE_ESTIMATORS.find(config.algorithm.adv_estimator),
        lambda: POLICY_LOSSES.find(config.worker.actor.loss_type),
        lambda: _require_signals(config),
    )
    problems = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def _require_signals(config: PPOConfig) -> None:
    from verl.algorithms.token_weights import find_signal, signals_of

    find_signal(config.algorithm.token_weight_signal)  # checked even if token weights are off
    signals_of(config.algorithm)
    problems = list(attention_for_signals(config, lambda name: find_signal(name).needs_attention))
    if problems:
        raise ValueError("\n".join(problems))


def check_videos(config: PPOConfig, *datasets: "RLHFDataset") -> None:
    """Refuse videos that the rollout engine cannot read; without this, it fails when it draws the first one."""
    from verl.models.registry import family_of
    from verl.workers.rollout.base import require_videos

    for dataset in datasets:
        if dataset.has_videos:
            try:
                require_videos(config.worker.rollout.name, family_of(dataset.model_config))
            except ValueError as error:
                raise ValueError(f"{dataset.data_path!r} has videos: {error}") from None


def fitting_model_config(config: PPOConfig, tokenizer: "PreTrainedTokenizerBase") -> "PretrainedConfig":
    """The policy's Hugging Face config, after checking that the tokenizer and the run's settings fit it.

    Raises:
        ValueError: they do not fit.
    """
    from verl.models.attention_recorder import require_layers
    from verl.models.loader import load_generation_config, load_model_config, require_room_for_tokens
    from verl.utils.tokenizer import eos_token_ids_of, warn_of_other_turn_ends

    model = config.worker.actor.model
    model_config = load_model_config(model)
    require_room_for_tokens(tokenizer, model_config, model.tokenizer_path, model.model_path)
    if config.worker.rollout.collect_attentions:
        require_layers(model_config, config.algorithm.attention_layers)
    generation_config = load_generation_config(model.model_path, model_config)
    warn_of_other_turn_ends(tokenizer, eos_token_ids_of(generation_config, tokenizer))
    return model_config
