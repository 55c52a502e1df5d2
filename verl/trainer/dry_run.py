# SPDX-License-Identifier: Apache-2.0
"""`--dry-run`: shows a run's configuration, batches and machine, reads the first rows of its data, and trains nothing.

It starts no process, loads no weights, and leaves the run's folder as it is. What transformers and datasets download
goes into their caches, which the run then uses.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from verl.config import cut
from verl.trainer.config import PPOConfig, data_sources
from verl.trainer.config_changes import config_changes
from verl.trainer.config_checks import effect_notes
from verl.trainer.preparation import check_videos, fitting_model_config, prepare
from verl.trainer.ray_cluster import joins_cluster, set_worker_environment
from verl.utils.batch_plan import BatchPlan, training_steps
from verl.utils.checkpoint import find_resume_point
from verl.utils.lean_imports import import_modules
from verl.utils.machine_memory import memory_in_use
from verl.utils.masking import masked
from verl.utils.run_lock import require_free_folder

if TYPE_CHECKING:
    from verl.data.dataset import RLHFDataset

ROWS_READ = 8
"""How many rows to read from the beginning of each data file."""

LONGEST_PROMPT_SHOWN = 100
"""Characters."""

PACKAGES = ("verl", "torch", "transformers", "ray", "datasets", "vllm", "flash-attn")

GIB = 2**30


def dry_run(config: PPOConfig, output: TextIO) -> int:
    """Writes what the run would do. Returns the exit code: 2 if the run would be refused, otherwise 0."""
    import yaml

    report = Report(output)
    report.section("configuration", yaml.safe_dump(masked(config.to_dict()), sort_keys=False, allow_unicode=True))
    workers = config.trainer.nnodes * config.trainer.n_gpus_per_node
    with report.collects_refusals():
        prepare(config)
    with report.collects_refusals():
        report.section("batches", *BatchPlan.from_config(config, workers).describe())
    with report.collects_refusals():
        report.section("machine", *describe_machine(config.trainer.save_checkpoint_path))
        _require_devices(config)
    if not report.refusals:  # without a model and data there is nothing to read
        _read_data(config, report)
    if not config.trainer.val_only:  # which may look at the folder of a run that is saving
        with report.collects_refusals():
            require_free_folder(config.trainer.save_checkpoint_path)
    with report.collects_refusals():
        report.section("start", *_start_of(config))
    notes = effect_notes(config)
    if notes:
        report.section("notes", *notes)
    report.section(
        "not checked",
        "the reward function, which runs in a process of its own",
        "the model's weights",
        f"rows after the first {ROWS_READ} of each file",
        *(["whether the Ray cluster that the run joins is large enough"] if joins_cluster() else []),
    )
    report.section("refused", *(report.refusals or ["nothing"]))
    return 2 if report.refusals else 0


class Report:
    """Sections of lines, each written as soon as it is known, and the reasons why the run would be refused."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self.refusals: list[str] = []

    def section(self, title: str, *lines: str) -> None:
        """Writes a title and lines below it."""
        self._output.write("\n".join([f"# {title}", *(line.rstrip("\n") for line in lines)]) + "\n\n")
        self._output.flush()

    @contextmanager
    def collects_refusals(self) -> Iterator[None]:
        """Inside, an error that would end the run is recorded as a refusal instead."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            if str(error) not in self.refusals:
                self.refusals.append(str(error))


def describe_machine(folder: str) -> list[str]:
    """CPUs, memory, GPUs, free space on the disk of `folder` (which may not exist yet), and versions of packages."""
    import torch

    used, total = memory_in_use()
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB" for gpu in gpus]
    there = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    installed = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    return [
        f"CPUs: {os.cpu_count()}",
        f"memory: {total / GIB:.1f} GiB, {(total - used) / GIB:.1f} GiB free",
        f"GPUs: {len(names)} ({'; '.join(dict.fromkeys(names))})" if names else "GPUs: none",
        f"disk: {shutil.disk_usage(there).free / GIB:.1f} GiB free at {folder}",
        f"versions: Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in installed.items()),
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _require_devices(config: PPOConfig) -> None:
    """A Ray cluster that the run starts has this machine's GPUs, and as many CPUs as it needs."""
    import torch

    if torch.cuda.device_count() > 0 and not joins_cluster():
        from verl.single_controller.worker_processes import require_devices

        require_devices(config.trainer.nnodes, config.trainer.n_gpus_per_node, "GPU", torch.cuda.device_count())


def _read_data(config: PPOConfig, report: Report) -> None:
    set_worker_environment()  # before transformers is imported, which reads some of it
    import_modules(["verl.data.loader"])
    from verl.data.dataset import RLHFDataset
    from verl.data.headers import require_full_batch
    from verl.utils.tokenizer import get_processor, get_tokenizer

    model, data = config.worker.actor.model, config.data
    source = (model.tokenizer_path, data.override_chat_template)
    # The first rows may all be too long, or damaged, where the whole set is not.
    row_config = replace(data, filter_overlong_prompts=False, check_media=False)
    with report.collects_refusals():
        tokenizer = get_tokenizer(*source, trust_remote_code=model.trust_remote_code)
        processor = get_processor(*source, trust_remote_code=model.trust_remote_code)
        options = dict(config=row_config, model_config=fitting_model_config(config, tokenizer), first_rows=ROWS_READ)

        def first_rows_of(path: str) -> RLHFDataset:
            return RLHFDataset(path, tokenizer, processor, **options)

        num_prompts = _read_files(config, "train_files", first_rows_of, report)
        with report.collects_refusals():
            require_full_batch(num_prompts, data.mini_rollout_batch_size or data.rollout_batch_size)
            steps = training_steps(config, num_prompts)
            # What is dropped for its length is not known yet.
            report.section(
                "steps", str(steps) if config.trainer.max_steps else f"{steps}, or fewer if rows are dropped"
            )
        _read_files(config, "val_files", first_rows_of, report)


def _read_files(config: PPOConfig, key: str, first_rows_of: Callable[[str], RLHFDataset], report: Report) -> int:
    """Shows the first rows of the files under a key of `data`; returns the number of their rows in all."""
    num_rows = 0
    for source in data_sources(getattr(config.data, key)):
        dataset = first_rows_of(source.path)
        check_videos(config, dataset)
        num_rows += dataset.rows_in_files
        report.section(
            f"data.{key}: {source.path}, {dataset.rows_in_files} rows",
            *(_describe_row(config, dataset, index, report) for index in range(len(dataset))),
        )
    return num_rows


def _describe_row(config: PPOConfig, dataset: RLHFDataset, index: int, report: Report) -> str:
    from verl.data.dataset import PromptTooLong

    data = config.data
    if index in dataset.skipped:
        return f"row {index}: left out (data.on_bad_row=skip)"
    try:
        row = dataset[index]
    except PromptTooLong as error:
        if data.filter_overlong_prompts:
            return f"row {index}: left out, longer than data.max_prompt_length={data.max_prompt_length}"
        report.refusals.append(str(error))
    except ValueError as error:
        if data.on_bad_row == "skip" and (data.filter_overlong_prompts or data.check_media):
            return f"row {index}: left out (data.on_bad_row=skip), {error}"
        report.refusals.append(str(error))
    else:
        media = row["multi_modal_data"] or {}
        counts = [f", {kind}: {len(media[kind])}" for kind in ("images", "videos") if media.get(kind)]
        text = " ".join(row["prompt_text"].split())
        tokens = int(row["attention_mask"].sum())
        return f"row {index}: {tokens} tokens{''.join(counts)}; {cut(text, LONGEST_PROMPT_SHOWN)}"
    return f"row {index}: refused"


def _start_of(config: PPOConfig) -> list[str]:
    trainer = config.trainer
    point = find_resume_point(trainer.save_checkpoint_path, trainer.load_checkpoint_path, trainer.find_last_checkpoint)
    if point is None:
        return ["step 0, with the model's own weights"]
    return [f"step {point.step}, from {point.folder}", *config_changes(config, point)]
