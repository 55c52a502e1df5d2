# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_dry_run.py
"""What `--dry-run` shows and refuses: the run's own words, and neither a process nor a file of the run's."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.batches import ROWS, write_dataset
from tests.test_training_run import ROOT, arguments, command
from verl.data.loader import create_dataloader
from verl.trainer.config import PPOConfig, load_config
from verl.trainer.dry_run import dry_run
from verl.trainer.preparation import prepare
from verl.utils.batch_plan import BatchPlan
from verl.utils.checkpoint import find_resume_point
from verl.utils.run_lock import FolderInUse, locked_folder, require_free_folder
from verl.utils.tokenizer import get_processor, get_tokenizer

PROGRAM = """
import os, sys

folder = sys.argv.pop(1)
started = []
STARTS = ("subprocess.Popen", "os.system", "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn")


def hear(event, args):
    if event in STARTS:
        started.append((event, str(args)))
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if str(args[0]).startswith(folder):
            started.append((event, str(args)))


sys.addaudithook(hear)
from verl.trainer.main import main

try:
    main()
finally:
    assert not started, started
    assert not {"vllm", "verl.workers.fsdp_workers"} & set(sys.modules)
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized()
"""


@pytest.fixture
def args_of(tiny_model_path: str, data_files: list[str], tmp_path: Path) -> Callable[..., list[str]]:
    return lambda *overrides: arguments(tiny_model_path, data_files, tmp_path / "run", *overrides)


def report_of(config: PPOConfig) -> tuple[int, str]:
    output = io.StringIO()
    code = dry_run(config, output)
    return code, output.getvalue()


def sections(report: str) -> dict[str, list[str]]:
    parts = [part.split("\n") for part in report.removeprefix("# ").removesuffix("\n\n").split("\n\n# ")]
    return {title: lines for title, *lines in parts}


def refusals_of(config: PPOConfig) -> list[str]:
    code, report = report_of(config)
    refused = sections(report)["refused"]
    assert code == (0 if refused == ["nothing"] else 2)
    return refused


def test_the_whole_report_of_a_run_that_could_start(args_of, tmp_path: Path) -> None:
    """In a program that hears of every process started and every file of the folder opened to be written."""
    args = args_of("worker.reward.reward_function_kwargs={api_key: sesame, url: 'https://me:hush@judge'}")
    before = sorted(tmp_path.rglob("*"))
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *args, "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert finished.returncode == 0, finished.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert "sesame" not in finished.stdout + finished.stderr and "hush" not in finished.stdout + finished.stderr

    config = load_config(args)
    found = sections(finished.stdout)
    shown = yaml.safe_load("\n".join(found.pop("configuration")))
    expected = json.loads(json.dumps(config.to_dict()))  # tuples as lists
    kwargs = shown["worker"]["reward"].pop("reward_function_kwargs")
    del expected["worker"]["reward"]["reward_function_kwargs"]
    assert shown == expected
    assert kwargs == {"api_key": "***", "url": "https://***@judge"}

    machine = found.pop("machine")
    assert [line.partition(":")[0] for line in machine] == ["CPUs", "memory", "GPUs", "disk", "versions"]
    assert machine[3].endswith(f"GiB free at {tmp_path}/run")
    prompts = [
        "row 0: 22 tokens, images: 1; <image>What is in the picture?",
        "row 1: 31 tokens, images: 2; <image>and<image>What is the sum of the digits?",
        "row 2: 14 tokens; Answer in one word.",
        "row 3: 12 tokens; The quick brown fox",
    ]
    assert found == {
        "batches": BatchPlan.from_config(config, 1).describe(),
        f"data.train_files: {config.data.train_files}, 24 rows": numbered(prompts * 2),
        "steps": ["3"],
        f"data.val_files: {config.data.val_files}, 5 rows": numbered([*prompts, prompts[0]]),
        "start": ["step 0, with the model's own weights"],
        "not checked": [
            "the reward function, which runs in a process of its own",
            "the model's weights",
            "rows after the first 8 of each file",
        ],
        "refused": ["nothing"],
    }


def numbered(rows: list[str]) -> list[str]:
    return [f"row {number}: {row.partition(': ')[2]}" for number, row in enumerate(rows)]


def test_a_mistake_on_the_command_line_is_told_as_by_the_run(args_of) -> None:
    dry, real = (command(*args_of("trainer.save_frq=1"), *more) for more in (["--dry-run"], []))
    assert (dry.returncode, dry.stdout, dry.stderr) == (real.returncode, real.stdout, real.stderr)
    assert dry.returncode == 2


@pytest.mark.parametrize(
    "override",
    [
        "worker.actor.global_batch_size=3",
        "worker.rollout.n=1",
        "data.train_files=''",
        "worker.hybrid_engine=false",
        "algorithm.adv_estimator=no_such",
    ],
)
def test_what_prepare_refuses_is_refused_with_its_words(override: str, args_of) -> None:
    config = load_config(args_of(override))
    with pytest.raises(ValueError) as caught:
        prepare(config)
    assert refusals_of(config) == str(caught.value).split("\n")


def test_all_that_is_wrong_is_told_at_once(args_of, tmp_path: Path) -> None:
    """A batch size, a logger, a checkpoint that is not whole."""
    folder = tmp_path / "run" / "global_step_1"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    config = load_config(
        args_of(
            "worker.actor.global_batch_size=3", "worker.hybrid_engine=false", f"trainer.load_checkpoint_path={folder}"
        )
    )
    messages = []
    for check in (
        lambda: prepare(config),
        lambda: BatchPlan.from_config(config, 1),
        lambda: find_resume_point(config.trainer.save_checkpoint_path, str(folder), True),
    ):
        with pytest.raises(ValueError) as caught:
            check()
        messages.append(str(caught.value))
    assert refusals_of(config) == messages
    assert len(set(messages)) == 3


@pytest.mark.parametrize(
    ("rows", "overrides"),
    [
        ([{**ROWS[0], "prompt": "No placeholder."}], []),
        ([ROWS[2]], ["data.max_prompt_length=5", "data.filter_overlong_prompts=false"]),
        ([ROWS[2]], ["data.rollout_batch_size=40", "data.mini_rollout_batch_size=null"]),
        ([ROWS[2]], ["data.answer_key=no_such"]),
    ],
    ids=["no placeholder", "too long", "too few", "no column"],
)
def test_what_the_loader_refuses_is_refused_with_its_words(rows, overrides, args_of, tmp_path: Path) -> None:
    """Of a prompt that is too long, the run only hears when it is drawn."""
    train = write_dataset(tmp_path / "train.parquet", rows, copies=4)
    config = load_config(args_of(f"data.train_files={train}", *overrides))
    model = config.worker.actor.model.model_path
    with pytest.raises(ValueError) as caught:
        train_loader, _ = create_dataloader(config.data, get_tokenizer(model), get_processor(model))
        train_loader.draw()
    refused = "\n".join(refusals_of(config))
    assert str(caught.value).partition(" has ")[2] in refused


def test_rows_that_the_run_would_leave_out_are_refused_by_no_one(args_of, tmp_path: Path) -> None:
    train = write_dataset(tmp_path / "train.parquet", [ROWS[2], ROWS[1], ROWS[0]])
    (tmp_path / "2_0.png").write_bytes(b"no picture")
    overrides = ["data.max_prompt_length=24", "data.on_bad_row=skip", "data.rollout_batch_size=2"]
    config = load_config(args_of(f"data.train_files={train}", "worker.actor.global_batch_size=2", *overrides))
    code, report = report_of(config)
    rows = sections(report)[f"data.train_files: {train}, 3 rows"]
    assert rows[1] == "row 1: left out, longer than data.max_prompt_length=24"
    assert rows[2].startswith("row 2: left out (data.on_bad_row=skip), row 2 of ")
    assert code == 0


def test_a_folder_in_use_is_refused_without_touching_its_lock(args_of, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = f"""
from verl.utils.run_lock import locked_folder
with locked_folder({str(folder)!r}):
    print("locked", flush=True)
    input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, **pipes) as owner:
        assert owner.stdout.readline() == "locked\n"
        content = (folder / "run.lock").read_text()
        with pytest.raises(FolderInUse) as caught, locked_folder(str(folder)):
            pass
        assert refusals_of(load_config(args_of())) == [str(caught.value)]
        assert (folder / "run.lock").read_text() == content
        assert refusals_of(load_config(args_of("trainer.val_only=true"))) == ["nothing"]
        owner.communicate("\n")
    require_free_folder(str(folder))
    assert refusals_of(load_config(args_of())) == ["nothing"]
