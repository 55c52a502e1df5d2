# SPDX-License-Identifier: Apache-2.0
"""The command line: `verl config=FILE key=value ...`, which is `python3 -m verl.trainer.main`."""

import logging
import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NoReturn

from verl.config import DRY_RUN, HELP
from verl.trainer.config import PPOConfig, load_config
from verl.trainer.config_checks import effect_notes
from verl.trainer.dry_run import dry_run
from verl.trainer.help_text import help_text
from verl.trainer.preparation import check_videos, fitting_model_config, prepare
from verl.trainer.ray_cluster import ray_session, set_worker_environment
from verl.trainer.stop_request import StopRequest
from verl.trainer.tracking import Tracker
from verl.utils.batch_plan import BatchPlan
from verl.utils.determinism import VARIABLES
from verl.utils.lasting_output import survive_lost_readers
from verl.utils.lean_imports import frozen_objects, import_modules
from verl.utils.run_lock import FolderRefused, locked_folder
from verl.workers.rollout.config import ENGINES, VARIABLES_ON_CPUS

if TYPE_CHECKING:
    from verl.single_controller.worker_processes import WorkerProcesses

logger = logging.getLogger("verl.trainer.main")  # __name__ is __main__ under `python -m`

TRAINER_MODULES = ("verl.data.loader", "verl.trainer.ray_trainer")
"""Modules that this process imports while Ray starts."""


def run(config: PPOConfig, processes: "WorkerProcesses | None" = None) -> None:
    """Trains as the config says, from the data on disk to the last checkpoint.

    Args:
        processes: existing worker processes to train in, for example from an earlier run; they are left running.
            None starts new ones and ends them with the run.

    Raises:
        ValueError: the config asks for something that is not available, its batch sizes do not fit together,
            `processes` do not fit the config, or (FolderRefused) the checkpoint folder is in use or not writable.
    """
    plan = prepare(config)
    for note in effect_notes(config):
        logger.warning(note)
    if processes is not None:
        _require_fit(config, plan, processes)
    set_worker_environment()  # before transformers is imported, which reads some of it
    stop_request = StopRequest(config.trainer.grace_s)
    with _own_folder(config), stop_request.listening(), ThreadPoolExecutor(max_workers=1) as background:
        # Ray takes seconds to start; this process would spend most of them waiting.
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
    """Locks the run's folder. A run that only validates saves nothing and takes no lock."""
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


def start_processes(config: PPOConfig, device: str) -> "WorkerProcesses":
    """Starts the worker processes. They import what workers need while the trainer reads its data.

    Args:
        device: "cuda" or "cpu".

    Raises:
        ValueError: the Ray cluster has too few GPUs or CPUs.
    """
    from verl.single_controller.worker_processes import WorkerProcesses

    nodes, workers_per_node = config.trainer.nnodes, config.trainer.n_gpus_per_node
    modules = worker_modules(config.worker.rollout.name)
    return WorkerProcesses(nodes, workers_per_node, device, modules, variables_of_workers(config, device))


def variables_of_workers(config: PPOConfig, device: str) -> dict[str, str]:
    """Of the environment, for libraries that read them when they are imported."""
    variables = dict(VARIABLES) if config.trainer.deterministic else {}
    if device == "cpu":
        of_engine = VARIABLES_ON_CPUS.get(config.worker.rollout.name, {})
        variables |= {name: value for name, value in of_engine.items() if name not in os.environ}
    return variables


def worker_modules(engine: str) -> list[str]:
    """The modules that worker processes import as soon as they start, given the rollout engine."""
    return ["verl.workers.fsdp_workers", ENGINES[engine].partition(":")[0]]


def _require_cpus(config: PPOConfig, plan: BatchPlan) -> None:
    """Raise unless the workers leave enough CPUs for the reward actor, which would otherwise wait for ever."""
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


def _train(config: PPOConfig, plan: BatchPlan, processes: "WorkerProcesses", stop_request: StopRequest) -> None:
    logger.info("loading the tokenizer and the data")
    from verl.data.image_grids import ImageGrids
    from verl.data.loader import create_dataloader
    from verl.trainer.config_changes import config_changes
    from verl.trainer.ray_trainer import RayDAPOTrainer
    from verl.trainer.rewards import RewardClient
    from verl.trainer.token_weigher import describe_token_weights
    from verl.utils.batch_plan import training_steps
    from verl.utils.checkpoint import find_resume_point
    from verl.utils.checkpoint_folder import settle_checkpoints
    from verl.utils.tokenizer import get_processor, get_tokenizer, prefilled_text, text_decoder

    logger.info("running on %s: %d worker(s)", processes.device, plan.world_size)
    for line in plan.describe():
        logger.info(line)
    logger.info(describe_token_weights(config.algorithm, config.worker.rollout.collect_attentions))

    model, trainer_config = config.worker.actor.model, config.trainer
    source = (model.tokenizer_path, config.data.override_chat_template)
    uses_token_weights = config.algorithm.enable_token_weights
    with RewardClient(
        config.worker.reward, trainer_config.save_checkpoint_path, uses_token_weights=uses_token_weights
    ) as rewards:
        tokenizer = get_tokenizer(*source, trust_remote_code=model.trust_remote_code)
        processor = get_processor(*source, trust_remote_code=model.trust_remote_code)
        model_config = fitting_model_config(config, tokenizer)
        # So that a mistake in the user's file is reported before any data or model is loaded.
        rewards.load(text_decoder(tokenizer), prefilled_text(tokenizer))
        train_loader, val_loader = create_dataloader(config.data, tokenizer, processor, model_config)
        check_videos(config, *train_loader.dataset.datasets, *val_loader.dataset.datasets)
        steps = training_steps(config, train_loader.num_prompts)
        if not trainer_config.val_only:  # such a run may read the folder of a run that is saving
            settle_checkpoints(trainer_config.save_checkpoint_path)
        resume_point = find_resume_point(
            trainer_config.save_checkpoint_path,
            trainer_config.load_checkpoint_path,
            trainer_config.find_last_checkpoint,
        )
        for change in config_changes(config, resume_point):
            logger.warning("the run resumes with %s", change)
        with Tracker(
            trainer_config.logger,
            config.to_dict(),
            trainer_config.project_name,
            trainer_config.experiment_name,
            trainer_config.save_checkpoint_path,
            total_steps=steps,
            resume_point=resume_point,
            report=trainer_config.report,
            only_validates=trainer_config.val_only,
        ) as tracker:
            tracker.add_files(rewards.files)
            trainer = RayDAPOTrainer(
                config,
                plan,
                steps,
                tokenizer,
                None if processor is None else ImageGrids(processor, model_config),
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


def main() -> None:
    """Parses the command line and runs; a mistake in it ends with a readable message and exit code 2."""
    survive_lost_readers()  # before the loggers take sys.stderr
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("verl").setLevel(logging.INFO)
    arguments = sys.argv[1:]
    asks_for_help = [place for place, argument in enumerate(arguments) if argument in ("-h", HELP)]
    try:
        if asks_for_help:
            names = [argument for argument in arguments[asks_for_help[0] :] if not argument.startswith("-")]
            sys.stdout.write(help_text(PPOConfig, [name for name in names if "=" not in name]))
            return
        config = load_config([argument for argument in arguments if argument != DRY_RUN])
        if DRY_RUN in arguments:
            raise SystemExit(dry_run(config, sys.stdout))
        prepare(config)
    except ValueError as error:
        _refuse(error)
    try:
        run(config)
    except FolderRefused as error:
        _refuse(error)


def _refuse(error: ValueError) -> NoReturn:
    sys.stderr.write(f"{error}\n")
    raise SystemExit(2) from None


if __name__ == "__main__":
    main()
