# SPDX-License-Identifier: Apache-2.0
"""The command line: `python3 -m verl.trainer.main config=FILE key=value ...`."""

import logging
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NoReturn

from verl.trainer.config import PPOConfig, load_config
from verl.trainer.config_checks import attention_for_signals, effect_notes, has_built_in_algorithms, require_available
from verl.trainer.ray_cluster import ray_session, require_cluster, set_worker_environment
from verl.trainer.stop_request import StopRequest
from verl.trainer.tracking import Tracker, require_loggers
from verl.utils.batch_plan import BatchPlan
from verl.utils.checkpoint import refuse_to_start_anew
from verl.utils.determinism import VARIABLES
from verl.utils.lasting_output import outlive_readers
from verl.utils.lean_imports import frozen_objects, import_modules
from verl.utils.run_lock import FolderInUse, locked_folder
from verl.workers.rollout.config import ENGINES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from verl.data.dataset import RLHFDataset
    from verl.single_controller.worker_processes import WorkerProcesses

logger = logging.getLogger("verl.trainer.main")  # __name__ is __main__ under `python -m`

TRAINER_MODULES = ("verl.data.loader", "verl.trainer.ray_trainer")
"""What this process imports while Ray starts."""


def run(config: PPOConfig, processes: "WorkerProcesses | None" = None) -> None:
    """Trains as the config says, from the data on disk to the last checkpoint.

    Args:
        processes: where to train, such as those of the run before; they live on, for the next. None starts new ones,
            and ends them with the run.

    Raises:
        ValueError: the config asks for what this version lacks, its batch numbers do not fit together, `processes`
            do not fit the config, or (FolderInUse) another run has the folder of the checkpoints.
    """
    plan = prepare(config)
    if processes is not None:
        _require_fit(config, plan, processes)
    set_worker_environment()  # before transformers is imported, which reads some of it
    stop_request = StopRequest(config.trainer.grace_s)
    with _own_folder(config), stop_request.listening(), ThreadPoolExecutor(max_workers=1) as background:
        # Ray takes seconds to start, most of which this process would only wait.
        imports = background.submit(import_modules, TRAINER_MODULES)
        with ray_session(config):
            _require_cpus(config, plan)
            _train_on_cluster(config, plan, processes, stop_request, imports)


def _train_on_cluster(
    config: PPOConfig,
    plan: BatchPlan,
    processes: "WorkerProcesses | None",
    stop_request: StopRequest,
    imports: Future,
) -> None:
    from verl.single_controller.worker_processes import detect_device
    from verl.trainer.restarts import train_through_losses

    device = detect_device()  # for good: a cluster that has lost its GPUs is waited for

    def train(attempt: PPOConfig) -> None:
        is_given = processes is not None and processes.alive
        with nullcontext(processes) if is_given else start_processes(attempt, device) as places:
            imports.result()
            with frozen_objects():
                _train(attempt, plan, places, stop_request)

    resources = {"CPU": _cpus_wanted(config, plan), "GPU": plan.world_size if device == "cuda" else 0}
    train_through_losses(config, resources, stop_request, train)


def _own_folder(config: PPOConfig) -> AbstractContextManager:
    """A run that only validates saves nothing, and may look at the folder of a run that does."""
    return nullcontext() if config.trainer.val_only else locked_folder(config.trainer.save_checkpoint_path)


def _require_fit(config: PPOConfig, plan: BatchPlan, processes: "WorkerProcesses") -> None:
    if processes.world_size != plan.world_size:
        raise ValueError(
            f"trainer.nnodes x trainer.n_gpus_per_node asks for {plan.world_size} workers, but the processes given to "
            f"run() are {processes.world_size}"
        )
    if config.worker.rollout.name == "vllm":
        raise ValueError(
            "worker.rollout.name=vllm needs processes of the run's own, since an engine lives as long as its process; "
            "call run() without processes"
        )


def prepare(config: PPOConfig) -> BatchPlan:
    """The run's batch numbers; everything that can be refused without starting a process is refused here."""
    require_available(config)
    require_cluster()
    require_loggers(config.trainer.logger)
    if not config.trainer.val_only:  # which may look at the folder of another run
        places = (config.trainer.save_checkpoint_path, config.trainer.load_checkpoint_path)
        refuse_to_start_anew(*places, config.trainer.find_last_checkpoint)
    plan = BatchPlan.from_config(config, config.trainer.nnodes * config.trainer.n_gpus_per_node)
    if not has_built_in_algorithms(config):
        _require_algorithms(config)
    return plan


def _require_algorithms(config: PPOConfig) -> None:
    # The registries load torch, so every other mistake is told first.
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

    find_signal(config.algorithm.token_weight_signal)  # also where nothing is weighed
    signals_of(config.algorithm)
    problems = list(attention_for_signals(config, lambda name: find_signal(name).needs_attention))
    if problems:
        raise ValueError("\n".join(problems))


def start_processes(config: PPOConfig, device: str) -> "WorkerProcesses":
    """Processes for the workers, which import what these need while the trainer reads its data.

    Args:
        device: "cuda" or "cpu".

    Raises:
        ValueError: the Ray cluster is too small for them.
    """
    from verl.single_controller.worker_processes import WorkerProcesses

    nodes, workers_per_node = config.trainer.nnodes, config.trainer.n_gpus_per_node
    modules = worker_modules(config.worker.rollout.name)
    return WorkerProcesses(nodes, workers_per_node, device, modules, VARIABLES if config.trainer.deterministic else {})


def worker_modules(engine: str) -> list[str]:
    """What worker processes import as soon as they start: all that a worker with this rollout engine needs."""
    return ["verl.workers.fsdp_workers", ENGINES[engine].partition(":")[0]]


def _require_cpus(config: PPOConfig, plan: BatchPlan) -> None:
    """The reward actor waits for ever where the workers leave it no CPU: say so first."""
    import ray

    wanted, present = _cpus_wanted(config, plan), int(ray.cluster_resources().get("CPU", 0))
    if wanted > present:
        raise ValueError(
            f"{plan.world_size} workers (trainer.nnodes x trainer.n_gpus_per_node) with one CPU each and "
            f"worker.reward.num_cpus={config.worker.reward.num_cpus} ask for {wanted} CPUs, but Ray sees {present}; "
            "lower them or add nodes"
        )


def _cpus_wanted(config: PPOConfig, plan: BatchPlan) -> int:
    return plan.world_size + config.worker.reward.num_cpus


def check_videos(config: PPOConfig, *datasets: "RLHFDataset") -> None:
    """Refuse data that the rollout engine would only refuse when the first row with a video is drawn."""
    from verl.models.registry import family_of
    from verl.workers.rollout.base import require_videos

    for dataset in datasets:
        if dataset.has_videos:
            try:
                require_videos(config.worker.rollout.name, family_of(dataset.model_config))
            except ValueError as error:
                raise ValueError(f"{dataset.data_path!r} has videos: {error}") from None


def _train(config: PPOConfig, plan: BatchPlan, processes: "WorkerProcesses", stop_request: StopRequest) -> None:
    logger.info("loading the tokenizer and the data")
    from verl.data.loader import create_dataloader
    from verl.trainer.ray_trainer import RayDAPOTrainer
    from verl.trainer.rewards import RewardClient
    from verl.utils.batch_plan import training_steps
    from verl.utils.checkpoint import find_resume_point
    from verl.utils.checkpoint_folder import settle_checkpoints
    from verl.utils.tokenizer import get_processor, get_tokenizer, prefilled_text, text_decoder

    logger.info("running on %s: %d worker(s)", processes.device, plan.world_size)
    for line in plan.describe():
        logger.info(line)
    for note in effect_notes(config):
        logger.warning(note)

    model, trainer_config = config.worker.actor.model, config.trainer
    source = (model.tokenizer_path, config.data.override_chat_template)
    with RewardClient(config.worker.reward, trainer_config.save_checkpoint_path) as rewards:
        tokenizer = get_tokenizer(*source, trust_remote_code=model.trust_remote_code)
        processor = get_processor(*source, trust_remote_code=model.trust_remote_code)
        model_config = _fitting_model_config(config, tokenizer)
        # A mistake in the user's file is told before any data or model is loaded.
        rewards.load(text_decoder(tokenizer), prefilled_text(tokenizer))
        train_loader, val_loader = create_dataloader(config.data, tokenizer, processor, model_config)
        check_videos(config, *train_loader.dataset.datasets, *val_loader.dataset.datasets)
        steps = training_steps(config, train_loader.num_prompts)
        if not trainer_config.val_only:  # which may look at the folder of a run that is saving
            settle_checkpoints(trainer_config.save_checkpoint_path)
        resume_point = find_resume_point(
            trainer_config.save_checkpoint_path,
            trainer_config.load_checkpoint_path,
            trainer_config.find_last_checkpoint,
        )
        with Tracker(
            trainer_config.logger,
            config.to_dict(),
            trainer_config.project_name,
            trainer_config.experiment_name,
            trainer_config.save_checkpoint_path,
            total_steps=steps,
            resume_point=resume_point,
        ) as tracker:
            trainer = RayDAPOTrainer(
                config,
                plan,
                steps,
                tokenizer,
                train_loader,
                val_loader,
                rewards,
                processes,
                tracker,
                resume_point,
                stop_request,
            )
            try:
                trainer.init_workers()
                trainer.fit()
            finally:
                trainer.shutdown()


def _fitting_model_config(config: PPOConfig, tokenizer: "PreTrainedTokenizerBase") -> "PretrainedConfig":
    """The policy's, once tokenizer and run are known to fit it.

    Raises:
        ValueError: they do not.
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


USAGE = """\
usage: python3 -m verl.trainer.main [config=FILE] [key=value ...]

Trains a vision-language model with reinforcement learning. FILE is a YAML file of keys; key=value sets one key and
overrides the file, as in worker.rollout.n=8. Four keys are required: data.train_files, data.val_files,
worker.actor.model.model_path and worker.reward.reward_function.

Keys begin with data, algorithm, worker or trainer. examples/config.yaml has the usual ones, and the config.py files of
the package describe all of them.
"""


def main() -> None:
    """Parses the command line and runs; a mistake in it ends with a readable message and exit code 2."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.stdout.write(USAGE)
        return
    outlive_readers()  # before the loggers take sys.stderr
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("verl").setLevel(logging.INFO)
    try:
        config = load_config(sys.argv[1:])
        prepare(config)
    except ValueError as error:
        _refuse(error)
    try:
        run(config)
    except FolderInUse as error:
        _refuse(error)


def _refuse(error: ValueError) -> NoReturn:
    sys.stderr.write(f"{error}\n")
    raise SystemExit(2) from None


if __name__ == "__main__":
    main()
