# SPDX-License-Identifier: Apache-2.0
"""The whole configuration of a run: data, algorithm, trainer and workers, and loading it.

Keys, defaults and merge order are EasyR1's, so that its YAML files and command lines work as they are.
"""

import glob
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from verl.config import ConfigSection, RetiredKey, absolute, looks_local
from verl.workers.actor.config import TrainedModelConfig
from verl.workers.config import WorkerConfig

TOKEN_SIGNAL_NAMES = ("vgr", "vision_density", "entropy", "image_kl", "hidden_cosine", "uniform")
"""The names that `verl/algorithms/token_weights.py` registers, repeated here so that reading them needs no torch."""

ATTENTION_SIGNALS = ("vgr", "vision_density")
"""The package's own signals that are computed from attention."""

ADV_ESTIMATORS = ("grpo", "grpo_passk", "rloo", "reinforce_plus_plus", "remax", "gae")
"""The names that `verl/algorithms/advantages.py` registers, repeated here so that reading them needs no torch."""

LayerChoice = str | tuple[int, ...]
"""`all`, `middle`, `last:K`, or numbers of layers."""

DATA_SUFFIXES = (".parquet", ".json", ".jsonl", ".arrow", ".csv")


def split_data_path(value: str) -> tuple[str, str]:
    """Path and split of `PATH` or `PATH@split`; the split is empty where none is given.

    A path that is there as a whole may have an `@` of its own.
    """
    if os.path.exists(os.path.expanduser(value)):
        return value, ""
    path, at, split = value.rpartition("@")
    return (path, split) if at and split else (value, "")


@dataclass(frozen=True)
class DataSource:
    """One item of `data.train_files` or `data.val_files`."""

    path: str
    """The path, with `@split` if given."""
    weight: float | None = None
    """Its share of the prompts, relative to the other items'; None where shares follow the numbers of rows."""


def data_sources(value: str | Sequence[str]) -> list[DataSource]:
    """The items of `data.train_files` or `data.val_files`: one path, or a list of paths with optional weights."""
    return [_data_source(item) for item in ([value] if isinstance(value, str) else value)]


def _data_source(item: str) -> DataSource:
    path, colon, weight = item.rpartition(":")
    if not colon or os.path.exists(os.path.expanduser(item)):
        return DataSource(item)
    try:
        return DataSource(path, float(weight))
    except ValueError:
        return DataSource(item)


@dataclass(frozen=True)
class DataConfig(ConfigSection):
    """Which data, which columns, and how many rows at a time."""

    train_files: Any = ""
    """A file, a folder or a hub id, with an optional `@split`; or a list of them, each with an optional `:weight`, its
    share of the prompts."""
    val_files: Any = ""
    """The held-out set, in the same form, without weights."""
    prompt_key: str = "prompt"
    """Column of the question, a text or a list of chat messages; `<image>` and `<video>` mark the places of media."""
    answer_key: str = "answer"
    """Column of the answer, which the reward function sees as `ground_truth`."""
    image_key: str = "images"
    """Column that lists a row's images."""
    video_key: str = "videos"
    """Column that lists a row's videos."""
    image_dir: str | None = None
    """Folder that relative image and video paths start from, and that none may leave; null lets data name any file."""
    video_fps: float = 2.0
    """Frames per second taken from a video."""
    max_prompt_length: int = 512
    """Tokens of a prompt, images included; every prompt is padded to this length."""
    max_response_length: int = 512
    """Tokens of a response at most."""
    rollout_batch_size: int = 512
    """Prompts per training step."""
    mini_rollout_batch_size: int | None = None
    """Prompts per draw from the data and per generation call; null is `rollout_batch_size`."""
    val_batch_size: int = -1
    """Prompts that validation answers and scores at a time; -1 takes the whole set at once, with all its images."""
    format_prompt: str | None = None
    """Jinja file that turns a question, its variable `content`, into the prompt."""
    override_chat_template: str | None = None
    """File of a chat template that replaces the model's."""
    shuffle: bool = True
    """Draw the training rows in random order."""
    seed: int = 1
    """Seed of that order."""
    min_pixels: int | None = 262144
    """Smaller images are scaled up to this area; null sets no bound."""
    max_pixels: int | None = 4194304
    """Larger images are scaled down to this area; null sets no bound."""
    filter_overlong_prompts: bool = True
    """Drop rows whose prompt is longer than `max_prompt_length`."""
    filter_overlong_prompts_workers: int = 16
    """Processes that look for such rows, and for media that cannot be read."""
    check_media: bool = False
    """Decode every image and video before training, to find damaged ones."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be read when the data is loaded: end the run, or leave the row out with a
    warning."""
    media_cache_gb: float = 1.0
    """GiB of processed images and videos (`pixel_values`) that each worker keeps in host memory for the passes of a
    step. What does not fit is processed anew in each pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settle_data("train_files")
        self._settle_data("val_files")
        weighted = [source for source in data_sources(self.val_files) if source.weight is not None]
        self.require(not weighted, "val_files", "has weights, but every held-out row counts once")
        for key in ("format_prompt", "override_chat_template"):
            self.settle_path(key, "file")
        self.settle_path("image_dir", "folder")
        self.require_at_least(1, "max_prompt_length", "max_response_length", "rollout_batch_size", "max_pixels")
        self.require_at_least(1, "mini_rollout_batch_size", "filter_overlong_prompts_workers", "min_pixels")
        self.require_at_least(0, "seed", "media_cache_gb")
        self.require_above_0("video_fps")
        val_batch_size = self.val_batch_size
        self.require(val_batch_size == -1 or val_batch_size > 0, "val_batch_size", "is neither -1 nor above 0")
        self.refuse_contradictions()

    def _settle_data(self, key: str) -> None:
        """Make local paths absolute and leave hub ids as they are, splits and weights kept on both."""
        value = getattr(self, key)
        are_texts = isinstance(value, str) or (
            isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(item, str) for item in value)
        )
        self.require(are_texts, key, "is not a text, or a list of texts")
        sources = data_sources(value)
        is_lone = len(sources) == 1 and sources[0].weight is not None
        self.require(not is_lone, key, "has a weight, which means something beside other items only; leave it out")
        has_weight = [source.weight is not None for source in sources]
        self.require(all(has_weight) or not any(has_weight), key, "has weights on some of its items; give all one")
        above = "has a weight that is not a number above 0"
        self.require(all(source.weight is None or 0 < source.weight < math.inf for source in sources), key, above)
        settled = [self._settled_source(key, source) for source in sources]
        self.settle(key, settled[0] if isinstance(value, str) else settled)

    def _settled_source(self, key: str, source: "DataSource") -> str:
        path, split = split_data_path(source.path)
        is_form = not path.endswith("@") and ("@" not in path or os.path.exists(os.path.expanduser(path)))
        self.require(is_form, key, "has not the form PATH or PATH@split")
        if path and (looks_local(path, DATA_SUFFIXES) or os.path.exists(path)):
            path = absolute(path)
            self.require(os.path.exists(path), key, f"does not exist (looked for {path})")
        at, colon = "@" if split else "", "" if source.weight is None else f":{source.weight}"
        return f"{path}{at}{split}{colon}"


@dataclass(frozen=True)
class AlgorithmConfig(ConfigSection):
    """How rewards become advantages, and how far the policy may leave its reference."""

    gamma: float = 1.0
    """Discount per token."""
    lam: float = 1.0
    """Trace decay of generalised advantage estimation."""
    adv_estimator: str = "grpo"
    """Advantage estimator, by its name in `verl/algorithms/advantages.py`: `grpo`, `grpo_passk`, `rloo`,
    `reinforce_plus_plus`, `remax`, `gae`. Or a function of your own, `path.py:function`."""
    disable_kl: bool = False
    """No reference model and no KL term at all, whatever the other KL keys say."""
    use_kl_loss: bool = False
    """Put the KL term into the loss; false takes it off the reward."""
    kl_penalty: Literal["kl", "abs", "mse", "low_var_kl", "full"] = "kl"
    """How the KL divergence from the reference is measured: estimated from the sampled tokens, or by `full` over the
    whole vocabulary. For `full` in the reward the policy runs once more; in the loss the reference runs inside every
    update, in place of its own pass."""
    kl_coef: float = 1e-3
    """Weight of the KL term."""
    kl_type: Literal["fixed", "adaptive"] = "fixed"
    """Whether the weight of the in-reward KL term follows a target."""
    kl_horizon: float = 10000.0
    """Sequences over which the adaptive weight reacts."""
    kl_target: float = 0.1
    """The adaptive weight's target."""
    online_filtering: bool = False
    """Keep only groups whose mean of `filter_key` lies strictly between the bounds; draw until the step is full."""
    filter_key: str = "overall"
    """Key of the reward function's result that decides."""
    filter_low: float = 0.01
    """Lower bound."""
    filter_high: float = 0.99
    """Upper bound."""
    enable_token_weights: bool = False
    """Weight the tokens in the actor's loss: by the reward function's `token_weights` if it returns them, otherwise
    by a signal."""
    token_weight_signal: str = "vgr"
    """What makes a token important, by its name in `verl/algorithms/token_weights.py`: `vgr`, `vision_density`,
    `entropy`, `image_kl`, `hidden_cosine`, `uniform`. Or a function of your own, `path.py:function`."""
    token_weight_clip: tuple[float, float] = (0.2, 3.0)
    """Bounds of a signal's weight; a response's weights have mean one before they are clipped."""
    token_weight_smooth_sigma: float = 0.0
    """Width in tokens of a gaussian along the response that smooths importance; 0 leaves it as it is."""
    token_weight_top_share: float | None = None
    """Share of each response's tokens that get weight 1: the most important ones. The others get weight 0. null turns
    this off."""
    token_weight_conserve_mean: bool = False
    """Bring each response's mean weight back to one after clipping, or after the choice of the top share."""
    token_weight_warmup_steps: int = 0
    """Steps over which weights go from 1 to what the signal says; the reward function's are not warmed up."""
    token_weight_last_k_layers: int | None = None
    """Take attention from this many of the last full-attention layers; null takes it from all."""
    token_weight_layers: Any = None
    """Another form of `token_weight_last_k_layers`: `last:K`, `middle` (the middle third), `all`, or a list of layer
    numbers, counted from 0."""
    token_weight_image_noise: Literal["blank", "patches", "gaussian"] = "patches"
    """How `image_kl` degrades images: all black, black squares of 14 pixels, or noise."""
    token_weight_image_noise_share: float = 0.5
    """Share of the squares that are black, or of the variance that is noise."""
    token_weight_control: Literal["none", "shuffled", "inverse", "random"] = "none"
    """A control in place of the weights: shuffled within each response, by reciprocal importance, or log-normal
    numbers of the same mean and variance."""
    token_signals_to_log: list[str] = field(default_factory=list)
    """Further signals to measure and log, by the same names; they do not change the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settle_function("adv_estimator")
        self.settle_function("token_weight_signal")
        self.settle_functions("token_signals_to_log")
        self.require_between(0, 1, "gamma", "lam")
        self.require_at_least(0, "kl_coef")
        bounds = self.token_weight_clip
        are_bounds = len(bounds) == 2 and 0 <= bounds[0] <= 1 <= bounds[1]
        self.require(are_bounds, "token_weight_clip", "is not [low, high] with 0 <= low <= 1 <= high")
        self.require_at_least(0, "token_weight_smooth_sigma")
        self.require_at_least(1, "token_weight_last_k_layers")
        self.require_at_least(0, "token_weight_warmup_steps")
        share = self.token_weight_top_share
        self.require(share is None or 0 < share <= 1, "token_weight_top_share", "is not above 0 and at most 1")
        self.require_between(0, 1, "token_weight_image_noise_share")
        self._settle_layers()
        self.refuse_contradictions()

    def _settle_layers(self) -> None:
        """A list becomes a tuple of numbers."""
        layers = self.token_weight_layers
        if isinstance(layers, (list, tuple)):
            are_numbers = bool(layers) and all(type(number) is int and number >= 0 for number in layers)
            self.require(are_numbers, "token_weight_layers", "is not a list of layer numbers from 0 on")
            self.settle("token_weight_layers", tuple(sorted(set(layers))))
        elif layers is not None:
            is_known = layers in ("middle", "all") or bool(re.fullmatch(r"last:[1-9]\d*", str(layers)))
            self.require(is_known, "token_weight_layers", "is not last:K, middle, all or a list of layer numbers")

    @property
    def attention_layers(self) -> LayerChoice:
        """The layers that attention is taken from, however they were given."""
        if self.token_weight_last_k_layers is not None:
            return f"last:{self.token_weight_last_k_layers}"
        return self.token_weight_layers or "all"

    @property
    def needs_critic(self) -> bool:
        """Whether the advantage estimator compares rewards with the values of a critic."""
        return self.adv_estimator == "gae"

    @property
    def needs_baselines(self) -> bool:
        """Whether the advantage estimator compares rewards with the score of the prompt's greedy response."""
        return self.adv_estimator == "remax"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL term is part of the loss."""
        return self.use_kl_loss and not self.disable_kl

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL term is subtracted from the reward."""
        return not self.use_kl_loss and not self.disable_kl

    @property
    def full_kl_in_loss(self) -> bool:
        """Whether every update runs the reference too."""
        return self.kl_in_loss and self.kl_penalty == "full"

    @property
    def full_kl_in_reward(self) -> bool:
        """Whether a separate pass measures the KL over the whole vocabulary."""
        return self.kl_in_reward and self.kl_penalty == "full"

    @property
    def estimates_kl(self) -> bool:
        """Whether the KL is estimated from the reference's log-probabilities of the sampled tokens."""
        return not self.disable_kl and self.kl_penalty != "full"

    @property
    def kl_coef_adapts(self) -> bool:
        """Whether the coefficient follows the target. As in EasyR1, only the KL in the reward has an adaptive one."""
        return self.kl_type == "adaptive" and self.kl_in_reward


@dataclass(frozen=True)
class TrainerConfig(ConfigSection):
    """How long a run is, on how many devices, what it logs and what it keeps."""

    total_epochs: int = 15
    """Passes over the training set, unless `max_steps` is given; `algorithm.online_filtering` makes more of them."""
    max_steps: int | None = None
    """Training steps; null follows from `total_epochs`."""
    project_name: str = "easy_r1"
    """Name under which loggers and the checkpoint folder group runs."""
    experiment_name: str = "demo"
    """Name of this run."""
    logger: list[Literal["console", "file", "mlflow", "swanlab", "tensorboard", "wandb"]] = field(
        default_factory=lambda: ["console", "wandb"]
    )
    """Where metrics and sampled generations go: one name or a list."""
    nnodes: int = 1
    """Machines of the Ray cluster to use."""
    n_gpus_per_node: int | None = None
    """Workers per machine: one a GPU, or CPU processes where there are no GPUs. null takes the GPUs of this machine,
    or one process where it has none."""
    max_try_make_batch: int = 20
    """Generation calls allowed to fill one step when groups are filtered; 0 or less allows any number."""
    critic_warmup: int = 0
    """The policy is updated from this step on."""
    val_freq: int = -1
    """Steps between validations; 0 or less validates only at the end."""
    val_before_train: bool = True
    """Validate before the first step."""
    val_only: bool = False
    """End after that first validation."""
    val_generations_to_log: int = 0
    """Validation responses to log in full."""
    train_generations_to_log: int = 0
    """Training responses to log in full, of each step that is validated and of the last."""
    report: bool = False
    """Write `report.html` into the run's folder after every validation and at the end: the curves, what the token
    weights did, and the logged responses token by token."""
    save_freq: int = -1
    """Steps between checkpoints; 0 or less saves only at the end."""
    save_limit: int = -1
    """Checkpoints to keep; 0 or less keeps all."""
    save_model_only: bool = False
    """Leave optimizer and schedule out of the checkpoint."""
    save_async: bool = False
    """Copy what a checkpoint holds to host memory and write it while training goes on."""
    save_checkpoint_path: str | None = None
    """Folder of the checkpoints; null is `checkpoints/<project_name>/<experiment_name>`."""
    load_checkpoint_path: str | None = None
    """A `global_step_<N>` folder to resume from."""
    deterministic: bool = False
    """Have workers choose algorithms that repeat themselves, at some cost in speed on a GPU, and seed their
    generators, so that a run with the same seeds gives the same numbers. What holds where: docs/en/checkpoints.md."""
    ray_timeline: str | None = None
    """File for Ray's timeline of the run."""
    find_last_checkpoint: bool = True
    """Resume from the newest checkpoint in `save_checkpoint_path` when `load_checkpoint_path` is null."""
    max_skipped_steps: int = 10
    """Steps in a row whose optimizer steps were all skipped, for gradients that are not finite: the last of them ends
    the run with an error, unsaved; 0 never ends it."""
    max_uninformative_steps: int = 20
    """Steps in a row without any advantage other than 0, after which a warning says so; 0 never warns."""
    max_restarts: int = 0
    """Times that the run goes on by itself, from its last checkpoint, after a process or a node of it was lost."""
    grace_s: float = 300.0
    """Seconds that a run has to finish its step and save after SIGTERM or Ctrl-C; then it ends at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "total_epochs", "max_steps", "nnodes", "n_gpus_per_node")
        self.require_at_least(0, "critic_warmup", "val_generations_to_log", "train_generations_to_log", "max_restarts")
        self.require_at_least(0, "max_skipped_steps", "max_uninformative_steps")
        self.require_above_0("grace_s")
        if self.n_gpus_per_node is None:
            self.settle("n_gpus_per_node", max(1, _visible_gpus()))
        if self.save_checkpoint_path is None:
            self.settle("save_checkpoint_path", os.path.join("checkpoints", self.project_name, self.experiment_name))
        self.settle_path("save_checkpoint_path", "output")
        self.settle_path("ray_timeline", "output")
        self.settle_path("load_checkpoint_path", "folder")
        if self.load_checkpoint_path is not None:
            is_step = "global_step_" in os.path.basename(self.load_checkpoint_path)
            self.require(is_step, "load_checkpoint_path", "is not a checkpoint's own folder, global_step_<N>")
        self.refuse_contradictions()


@dataclass(frozen=True)
class PPOConfig(ConfigSection):
    """The whole configuration of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_contradictions()

    @property
    def trained_models(self) -> dict[str, TrainedModelConfig]:
        """The sections of the models that the run trains, by their keys."""
        models = {"worker.actor": self.worker.actor}
        return models | {"worker.critic": self.worker.critic} if self.algorithm.needs_critic else models

    @property
    def needs_reference_model(self) -> bool:
        """Whether the reference is a model of its own, not the policy without its adapters."""
        return not self.algorithm.disable_kl and self.worker.actor.model.lora.rank == 0

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain dictionaries, for loggers."""
        return asdict(self)


def _visible_gpus() -> int:
    """GPUs of this machine that a process may use, counted without CUDA or torch."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None:
        return len([name for name in names.split(",") if name.strip() not in ("", "-1")])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _retired_keys() -> dict[str, RetiredKey]:
    """Keys of EasyR1 and its older releases that have no field here."""
    keys = {
        "worker.reward.reward_type": RetiredKey(
            "is not read: the constant REWARD_TYPE in the reward function's file decides",
            allowed=("batch", "sequential", "function"),
        )
    }
    renamed = {
        "worker.reward.score_function": "worker.reward.reward_function",
        "worker.reward.score_function_kwargs": "worker.reward.reward_function_kwargs",
        "worker.actor.ulysses_sequence_parallel_size": "worker.actor.ulysses_size",
        "worker.critic.ulysses_sequence_parallel_size": "worker.critic.ulysses_size",
        "worker.actor.optim.warmup_style": "worker.actor.optim.lr_scheduler_type",
        "worker.critic.optim.warmup_style": "worker.critic.optim.lr_scheduler_type",
        "trainer.total_episodes": "trainer.total_epochs",
    }
    for old, new in renamed.items():
        keys[old] = RetiredKey(f"is an old key, read as {new}", moved_to=new)
    derived = {
        "worker.actor.global_batch_size_per_device": "the batch sizes and the number of workers",
        "worker.critic.global_batch_size_per_device": "the batch sizes and the number of workers",
        "worker.actor.optim.training_steps": "trainer.max_steps or trainer.total_epochs",
        "worker.critic.optim.training_steps": "trainer.max_steps or trainer.total_epochs",
        "worker.rollout.prompt_length": "data.max_prompt_length",
        "worker.rollout.response_length": "data.max_response_length",
        "worker.rollout.trust_remote_code": "worker.actor.model.trust_remote_code",
        "worker.reward.reward_function_name": "worker.reward.reward_function",
    }
    for name in ("disable_kl", "use_kl_loss", "kl_penalty", "kl_coef"):
        derived[f"worker.actor.{name}"] = f"algorithm.{name}"
    for name in (
        "micro_batch_size_per_device_for_experience",
        "padding_free",
        "dynamic_batching",
        "ulysses_size",
        "use_torch_compile",
    ):
        derived[f"worker.ref.{name}"] = f"worker.actor.{name}"
    for key, origin in derived.items():
        keys[key] = RetiredKey(f"is ignored: it follows from {origin}")
    return keys


_ATTENTION_KEYS = "algorithm.enable_token_weights=true with worker.rollout.collect_attentions=true"

REMEDIES = {
    "vgr": f"VGR token weights are {_ATTENTION_KEYS}",
    "token_weights": f"VGR token weights are {_ATTENTION_KEYS}",
    "entropy_coeff": "the loss has no entropy term, leave it out",
    "entropy_coef": "the loss has no entropy term, leave it out",
    **{
        name: f"write {key}"
        for key, names in {
            "data.rollout_batch_size": ("batch_size", "train_batch_size"),
            "worker.actor.global_batch_size": ("ppo_mini_batch_size", "mini_batch_size"),
            "worker.actor.micro_batch_size_per_device_for_update": (
                "ppo_micro_batch_size",
                "ppo_micro_batch_size_per_gpu",
                "per_device_train_batch_size",
            ),
            "worker.actor.micro_batch_size_per_device_for_experience": ("log_prob_micro_batch_size_per_gpu",),
            "worker.actor.model.model_path": ("model", "model_name_or_path", "path"),
            "worker.actor.clip_ratio_low and worker.actor.clip_ratio_high": ("clip_ratio", "clip_range", "epsilon"),
            "algorithm.kl_coef": ("kl_loss_coef", "beta"),
            "algorithm.kl_penalty": ("kl_loss_type",),
            "algorithm.use_kl_loss=false, which puts the KL into the reward,": ("use_kl_in_reward",),
            "worker.rollout.n": ("num_generations", "group_size", "rollout_n"),
            "worker.reward.reward_function": ("reward_fn", "compute_score", "custom_reward_function"),
            "trainer.val_freq": ("test_freq", "eval_freq", "eval_steps"),
            "trainer.save_freq": ("save_steps",),
            "trainer.save_checkpoint_path": ("output_dir", "default_local_dir"),
            "trainer.total_epochs": ("epochs", "num_epochs", "num_train_epochs"),
            "trainer.n_gpus_per_node": ("n_gpus", "num_gpus"),
            "trainer.logger=[console,wandb]": ("wandb", "report_to"),
        }.items()
        for name in names
    },
}
"""What to write instead of an unknown key, by the last part of the key; includes keys of other trainers."""


def load_config(argv: Sequence[str]) -> PPOConfig:
    """Build the configuration from the command-line arguments.

    `config=FILE` names a YAML file, `a.b.c=value` sets one key; the order is dataclass default < YAML < command line.
    Paths come out absolute. Keys of older releases are taken with one warning each.

    Raises:
        ValueError: names each wrong key, its value, and what would be right.
    """
    from verl.config_loading import load_sections  # OmegaConf, which workers that unpickle a config do without

    return load_sections(PPOConfig, argv, _retired_keys(), REMEDIES)
