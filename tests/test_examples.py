# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_examples.py
"""The examples: every script is run up to its command and every key of it checked; one of each kind then trains."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from datasets import Dataset
from ray.runtime_env import RuntimeEnv

from tests.batches import ROWS, write_dataset
from tests.documents import LANGUAGES, text_of
from tests.pool import run_shared
from tests.tiny import make_tiny_model, make_tiny_text_model
from verl.trainer.config import DataConfig, PPOConfig, load_config
from verl.trainer.main import prepare
from verl.trainer.ray_cluster import WORKER_ENVIRONMENT
from verl.workers.reward.config import RewardConfig
from verl.workers.reward.user_function import load_reward_function

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
LAUNCHERS = ("multi_node.sh", "slurm.sh", "vgr.sh")
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.sh") if path.name not in LAUNCHERS)
TWIN = "qwen2_5_vl_7b_geo3k_grpo_vgr"
WEIGHTED_SCRIPTS = [f"{script}_vgr" for script in SCRIPTS if script != TWIN]
"""Those that vgr.sh makes of the others."""
CONFIGS = sorted(path.name for path in EXAMPLES.glob("*.yaml") if path.name != "runtime_env.yaml")

TO_INSTALL = () if importlib.util.find_spec("vllm") else ("worker.rollout.name=vllm needs vLLM",)
"""How the refusals begin that are right where not everything is installed."""

FROM_THE_SHELL = ("MODEL_PATH", "DATA_PATH", "NODE_RANK", "NNODES", "WAIT_SECONDS", "SLURM_JOB_ID")
"""What scripts read from their environment, and tests keep from reaching them by accident."""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples name their files from the repository's root."""
    monkeypatch.chdir(ROOT)


def words_that_run(script: str) -> list[str]:
    """Of a script's name. NAME_vgr without a file of its own is what vgr.sh makes of NAME."""
    if (EXAMPLES / f"{script}.sh").is_file():
        return [f"examples/{script}.sh"]
    return ["examples/vgr.sh", f"examples/{script.removesuffix('_vgr')}.sh"]


def run_script(script: str, *arguments: str, programs: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs a script from the repository's root, where it finds `programs`, a folder, before all others."""
    shell = {name: value for name, value in os.environ.items() if name not in FROM_THE_SHELL}
    return subprocess.run(
        ["bash", *words_that_run(script), *arguments],
        cwd=ROOT,
        env={**shell, "PATH": f"{programs}{os.pathsep}{shell['PATH']}", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def words_for(program: str, folder: Path, script: str, *arguments: str, **variables: str) -> list[str]:
    """What a script hands to the program that it starts: runs it with one that only writes that down in `folder`."""
    stub = folder / program
    stub.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >'{folder}/words'\n")
    stub.chmod(0o755)
    finished = run_script(script, *arguments, programs=folder, **variables)
    assert finished.returncode == 0, finished.stderr
    return (folder / "words").read_text().split("\0")[:-1]


def arguments_of(folder: Path, script: str, *overrides: str, **variables: str) -> list[str]:
    """The arguments with which a script starts the trainer; data of the user's own are taken to be in `folder`."""
    words = words_for("python3", folder, script, *overrides, DATA_PATH=str(folder), **variables)
    assert words[:3] == ["-m", "verl.trainer.main", "config=examples/config.yaml"]
    return words[2:]


@pytest.fixture(scope="module", autouse=True)
def wandb_without_an_account() -> Iterator[None]:
    """The shipped configuration logs to wandb, which is refused without a key."""
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv("WANDB_MODE", "offline")
        yield


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Every script's arguments to the trainer, alone and with vgr.sh."""
    folder = tmp_path_factory.mktemp("programs")
    return {script: arguments_of(folder, script) for script in (*SCRIPTS, *WEIGHTED_SCRIPTS)}


@pytest.fixture(scope="module")
def settings_of(arguments: dict[str, list[str]]) -> Callable[[str], dict[str, Any]]:
    """(Script's name) to all its settings by key; skips where something in them is still to come."""

    @cache
    def settings(script: str) -> dict[str, Any] | str:
        try:
            return dict(leaves(load_config(arguments[script]).to_dict()))
        except ValueError as error:
            return str(error)

    def settings_or_skip(script: str) -> dict[str, Any]:
        found = settings(script)
        if isinstance(found, str):
            skip_if_not_installed(found)
        assert isinstance(found, dict), found
        return found

    return settings_or_skip


@pytest.fixture(scope="module")
def refusals(arguments: dict[str, list[str]]) -> dict[str, list[str]]:
    """What the trainer would say instead of starting, by script, a line a problem."""
    return {script: refusals_of(arguments[script]) for script in SCRIPTS}


def refusals_of(arguments: list[str]) -> list[str]:
    try:
        prepare(load_config(arguments))
    except ValueError as error:
        return str(error).splitlines()
    return []


def skip_if_not_installed(refusal: str) -> None:
    if refusal.startswith(TO_INSTALL):
        pytest.skip(refusal)


def leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(Key, value) of everything that is set, in mappings of free keys too, and of mappings as wholes."""
    for name, value in section.items():
        yield prefix + name, value
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")


# The configurations


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_is_accepted(name: str) -> None:
    """Data and models that a script makes first are replaced by hub ids, which are not looked for on the disk."""
    made_by_scripts = ["data.train_files=o/d", "data.val_files=o/d", "worker.actor.model.model_path=o/m"]
    assert isinstance(load_config([f"config=examples/{name}", *made_by_scripts]), PPOConfig)


USUAL_KEYS = {
    *(f"data.{key}" for key in DataConfig.__dataclass_fields__),
    *(f"algorithm.{key}" for key in ("adv_estimator", "disable_kl", "use_kl_loss", "kl_penalty", "kl_coef")),
    *(f"algorithm.{key}" for key in ("online_filtering", "filter_key", "filter_low", "filter_high")),
    "worker.actor.global_batch_size",
    "worker.actor.micro_batch_size_per_device_for_update",
    "worker.actor.micro_batch_size_per_device_for_experience",
    *(f"worker.actor.{key}" for key in ("max_grad_norm", "padding_free", "dynamic_batching", "ulysses_size")),
    *(f"worker.actor.model.{key}" for key in ("model_path", "enable_gradient_checkpointing", "trust_remote_code")),
    "worker.actor.model.freeze_vision_tower",
    *(f"worker.actor.model.lora.{key}" for key in ("rank", "alpha", "target_modules", "exclude_modules")),
    *(f"worker.actor.optim.{key}" for key in ("lr", "weight_decay", "strategy", "lr_warmup_ratio")),
    *(f"worker.actor.fsdp.{key}" for key in ("enable_full_shard", "enable_cpu_offload", "enable_rank0_init")),
    *(f"worker.actor.offload.{key}" for key in ("offload_params", "offload_optimizer")),
    *(f"worker.rollout.{key}" for key in ("n", "temperature", "top_p", "limit_images", "gpu_memory_utilization")),
    *(f"worker.rollout.{key}" for key in ("enforce_eager", "enable_chunked_prefill", "tensor_parallel_size")),
    *(f"worker.rollout.{key}" for key in ("disable_tqdm", "val_override_config")),
    "worker.ref.fsdp.enable_cpu_offload",
    "worker.reward.reward_function",
    *(f"trainer.{key}" for key in ("total_epochs", "project_name", "experiment_name", "logger", "nnodes")),
    *(f"trainer.{key}" for key in ("n_gpus_per_node", "max_try_make_batch", "val_freq", "val_generations_to_log")),
    *(f"trainer.{key}" for key in ("save_freq", "save_limit")),
}


def test_the_shipped_configuration_sets_the_keys_that_users_override() -> None:
    """The keys of the compatible command lines are there to be seen, and the values differ from the defaults."""
    sections = yaml.safe_load((EXAMPLES / "config.yaml").read_text())
    assert set(sections) == {"data", "algorithm", "worker", "trainer"}
    assert USUAL_KEYS - {key for key, _ in leaves(sections)} == set()
    config = load_config(["config=examples/config.yaml"])
    assert config.data.train_files == "hiyouga/math12k@train"
    assert config.worker.actor.global_batch_size == 128
    assert config.worker.rollout.val_override_config == {"temperature": 0.6, "top_p": 0.95, "n": 1}
    assert config.worker.actor.model.trust_remote_code is False
    assert config.trainer.logger == ["file", "wandb"]


def test_the_commands_in_the_shipped_configuration_can_run() -> None:
    lines = (EXAMPLES / "config.yaml").read_text().splitlines()
    commands = [line.split("verl.trainer.main ")[1].split() for line in lines if "verl.trainer.main " in line]
    assert len(commands) == 2
    for arguments in commands:
        assert [line for line in refusals_of(arguments) if not line.startswith(TO_INSTALL)] == []


# The scripts


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_every_script_is_valid_bash(path: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_starts_a_run_under_its_own_name(
    script: str, refusals: dict[str, list[str]], settings_of: Callable
) -> None:
    assert [line for line in refusals[script] if not line.startswith(TO_INSTALL)] == []
    settings = settings_of(script)
    assert settings["trainer.experiment_name"] == script
    reward = {key.removeprefix("worker.reward."): value for key, value in settings.items() if "worker.reward." in key}
    reward = {key: value for key, value in reward.items() if key in RewardConfig.__dataclass_fields__}
    function = load_reward_function(RewardConfig(**reward), decoder=None)  # finds the function, and its arguments fit
    if settings["algorithm.online_filtering"]:
        ((result,), _) = function._all([{"response": "Answer: 2", "response_length": 3, "ground_truth": "2"}])
        assert settings["algorithm.filter_key"] in result


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_names_only_what_differs_from_the_shipped_configuration(
    script: str, arguments: dict[str, list[str]], settings_of: Callable
) -> None:
    shipped = dict(leaves(load_config(["config=examples/config.yaml"]).to_dict()))
    settings = settings_of(script)
    keys = {argument.partition("=")[0] for argument in arguments[script][1:]} - {"worker.actor.model.model_path"}
    assert {key for key in keys if shipped.get(key) == settings[key]} == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_takes_another_model_and_hands_further_keys_on_behind_its_own(script: str, tmp_path: Path) -> None:
    """Where a key is given twice, the last counts."""
    overrides = ["trainer.experiment_name=my run", "worker.rollout.val_override_config={n: 3}"]
    given = arguments_of(tmp_path, script, *overrides, MODEL_PATH="org/other")
    assert given[-2:] == overrides
    assert [word for word in given if "model_path=" in word] == ["worker.actor.model.model_path=org/other"]


@pytest.mark.parametrize("weighted", WEIGHTED_SCRIPTS)
def test_vgr_adds_token_weights_to_a_script_and_changes_nothing_else(weighted: str, settings_of: Callable) -> None:
    plain, settings = settings_of(weighted.removesuffix("_vgr")), settings_of(weighted)
    differences = {key: value for key, value in settings.items() if value != plain[key] and type(value) is not dict}
    assert differences == {
        "algorithm.enable_token_weights": True,
        "algorithm.token_weight_last_k_layers": 8,
        "worker.rollout.collect_attentions": True,
        "trainer.experiment_name": weighted,
        "trainer.save_checkpoint_path": str(ROOT / "checkpoints" / "easy_r1" / weighted),
    }


def test_the_twin_is_what_vgr_makes_of_its_script(arguments: dict[str, list[str]], tmp_path: Path) -> None:
    script = f"examples/{TWIN.removesuffix('_vgr')}.sh"
    words = words_for("python3", tmp_path, "vgr", script)
    assert arguments[TWIN] == words[2:]


@pytest.mark.parametrize(
    ("arguments", "returncode", "says"),
    [
        (["--help"], 0, ""),
        ([], 2, "'' is no file"),
        (["examples/no_such_script.sh"], 2, "'examples/no_such_script.sh' is no file"),
    ],
)
def test_vgr_says_how_it_is_used(arguments: list[str], returncode: int, says: str) -> None:
    finished = subprocess.run(["bash", "examples/vgr.sh", *arguments], capture_output=True, text=True)
    assert finished.returncode == returncode
    assert says in finished.stderr
    assert "usage: bash examples/vgr.sh" in (finished.stderr if returncode else finished.stdout)


def test_the_names_that_users_of_easyr1_know_are_there() -> None:
    known = {
        "qwen2_5_7b_math_grpo",
        "qwen2_5_vl_3b_android_gui_grpo",
        "qwen2_5_vl_3b_clevr",
        "qwen2_5_vl_3b_geoqa8k",
        "qwen2_5_vl_7b_geo3k_grpo",
        "qwen3_4b_math_grpo",
        "qwen3_4b_math_grpo_lora",
        "qwen3_vl_30b_geo3k_grpo",
    }
    assert known - set(SCRIPTS) == set()


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_documents_name_every_script(language: str) -> None:
    text = text_of(language)
    named = {script for script in SCRIPTS if f"`{script}.sh`" in text}
    assert named == set(SCRIPTS)
    assert all(f"`{name}`" in text for name in (*LAUNCHERS, *CONFIGS, "runtime_env.yaml"))


# Several machines


@pytest.mark.ray
def test_a_script_runs_on_the_first_of_two_machines_once_both_are_there_and_both_end_with_it(tmp_path: Path) -> None:
    """Two Ray nodes on this machine; the script says how it was called and by how many nodes, and ends with 7.

    It also tries to get in without the token, which only the user can read and which goes with the cluster.
    """
    script, token = tmp_path / "script.sh", tmp_path / "token"
    count = "import ray; ray.init(logging_level='ERROR'); print(len(ray.nodes()))"
    script.write_text(
        f"""
        printf "%s\\n" "$@" >{tmp_path}/said
        python3 -c "{count}" >>{tmp_path}/said
        stat -c %a {token} >>{tmp_path}/said
        RAY_AUTH_MODE=disabled python3 -c "{count}" >>{tmp_path}/said 2>{tmp_path}/refused
        exit 7
        """
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="ray") as folder, ThreadPoolExecutor() as machines:  # a short path
        programs = Path(sys.executable).parent
        variables = dict(RAY_TMPDIR=folder, RAY_AUTH_MODE="", RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH=str(token))
        first, second = (
            machines.submit(
                run_script, "multi_node", head, str(script), "a=b c", programs=programs, NODE_RANK=rank, **variables
            )
            for rank in ("0", "1")
        )
        assert first.result().returncode == 7, first.result().stderr
        assert second.result().returncode == 0, second.result().stderr
    assert (tmp_path / "said").read_text().splitlines() == ["trainer.nnodes=2", "a=b c", "2", "600"]
    assert "AuthenticationError" in (tmp_path / "refused").read_text()
    assert not token.exists()


SRUN = """
# In the place of Slurm's: as many tasks as it is told, all on this machine; the first bad exit is its own.
for word in "$@"; do
    case $word in --ntasks=*) tasks=${word#*=} ;; esac
done
while [[ $1 = --* ]]; do shift; done
if [ "$1" = hostname ]; then
    echo "127.0.0.1 10.9.8.7"
    exit
fi
pids=()
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task "$@" &
    pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""


@pytest.mark.ray
def test_a_job_of_slurm_runs_a_script_on_the_first_of_its_machines_and_ends_as_the_script_does(tmp_path: Path) -> None:
    """Two Ray nodes on this machine, through a stand-in for `srun`; the script ends with 7."""
    programs = tmp_path / "programs"
    programs.mkdir()
    ours = {name: f'exec {Path(sys.executable).parent / name} "$@"' for name in ("python3", "ray")}
    for name, content in {"srun": SRUN, "scontrol": "printf 'one\\ntwo\\n'", **ours}.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{content}\n")
        (programs / name).chmod(0o755)
    script, activate = tmp_path / "script.sh", tmp_path / "activate"
    activate.write_text("export FROM_ACTIVATE=yes\n")
    count = "import ray; ray.init(logging_level='ERROR'); print(len(ray.nodes()))"
    script.write_text(
        f"""
        printf "%s\n" "$@" "$FROM_ACTIVATE" >{tmp_path}/said
        python3 -c "{count}" >>{tmp_path}/said
        exit 7
        """
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = dict(SLURM_JOB_ID="123456", SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_NUM_NODES="2", VERL_PORT=port)
    with tempfile.TemporaryDirectory(prefix="ray") as folder:  # a short path
        variables = dict(RAY_TMPDIR=folder, RAY_AUTH_MODE="", RAY_AUTH_TOKEN="", VERL_ACTIVATE=str(activate), **job)
        variables["RAY_AUTH_TOKEN_PATH"] = str(tmp_path / "token")
        finished = run_script("slurm", str(script), "a=b c", programs=programs, **variables)
    assert finished.returncode == 7, finished.stderr
    assert f"machine 0 is one, at 127.0.0.1:{port}" in finished.stdout
    assert (tmp_path / "said").read_text().splitlines() == ["trainer.nnodes=2", "a=b c", "yes", "2"]


@pytest.mark.parametrize(
    ("words", "job", "message"),
    [
        ([], "1", "SCRIPT is needed"),
        (["examples/vgr.sh"], "", "this is no job of Slurm: hand it to sbatch"),
        (["examples/nothing.sh"], "1", f"there is no script examples/nothing.sh in {ROOT}"),
    ],
)
def test_a_job_that_cannot_work_is_refused_with_the_usage(
    words: list[str], job: str, message: str, tmp_path: Path
) -> None:
    finished = run_script("slurm", *words, programs=tmp_path, SLURM_JOB_ID=job)
    assert finished.returncode == 2
    assert finished.stderr.startswith(message)
    assert "usage: sbatch [options of Slurm] examples/slurm.sh" in finished.stderr


def test_the_image_is_given_what_it_copies() -> None:
    """`.dockerignore` leaves everything else out; `COPY a b c/` has its sources before its target."""
    copied = [line.split()[1:-1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(sum(copied, [])) == sorted(let_in)
    assert all((ROOT / name).is_file() for name in let_in)


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o640)
    variables = dict(NODE_RANK="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="", RAY_AUTH_TOKEN_PATH=str(token))
    finished = run_script("multi_node", "127.0.0.1:9", "examples/vgr.sh", programs=tmp_path, **variables)
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"others can read the token in {token}; run chmod 600 on it\n")
    assert token.read_text() == "secret"


@pytest.mark.parametrize(
    ("words", "rank", "message"),
    [
        ([], "0", "HEAD and SCRIPT are needed"),
        (["10.0.0.1", "examples/vgr.sh"], "", "NODE_RANK= is not the number of a machine"),
        (["10.0.0.1", "examples/nothing.sh"], "1", f"there is no script examples/nothing.sh in {ROOT}"),
    ],
)
def test_a_cluster_command_that_cannot_work_is_refused_with_the_usage(
    words: list[str], rank: str, message: str, tmp_path: Path
) -> None:
    finished = run_script("multi_node", *words, programs=tmp_path, NODE_RANK=rank)
    assert finished.returncode == 2
    assert finished.stderr.startswith(message)
    assert "usage: NODE_RANK=N bash examples/multi_node.sh" in finished.stderr


def test_a_machine_waits_only_so_long_for_the_first(tmp_path: Path) -> None:
    script = "examples/vgr.sh"
    finished = run_script("multi_node", "127.0.0.1:9", script, programs=tmp_path, NODE_RANK="1", WAIT_SECONDS="1")
    assert finished.returncode == 1
    assert finished.stderr == "nothing answered at 127.0.0.1:9 within 1 s\n"


def test_the_runtime_environment_is_valid_and_leaves_behind_what_git_does() -> None:
    settings = yaml.safe_load((EXAMPLES / "runtime_env.yaml").read_text())
    environment = RuntimeEnv(**settings)
    assert set(environment) - {"_ray_commit"} == {"working_dir", "excludes", "env_vars"}
    ignored = {line for line in (ROOT / ".gitignore").read_text().splitlines() if line and not line.startswith("#")}
    caches = {"__pycache__/", "*.py[cod]", "*.egg-info/", "build/", "dist/"}
    caches |= {".pytest_cache/", ".ruff_cache/", ".mypy_cache/"}
    excluded = {pattern.strip("/") for pattern in settings["excludes"]}
    assert {pattern.strip("/") for pattern in ignored - caches} | {".git"} == excluded


IN_A_JOB = """
import json, os, ray, sys
from verl.trainer.config import load_config
from verl.trainer.ray_cluster import ray_session

with ray_session(load_config([])):
    sys.stdout.write(json.dumps(ray.get(ray.remote(lambda: dict(os.environ)).remote())))
"""


def test_a_job_with_the_runtime_environment_hands_it_on_with_the_trainers_own_variables(ray_cluster) -> None:
    """The process is started as Ray's job server starts one: with the variables, and told of them in JSON."""
    variables = yaml.safe_load((EXAMPLES / "runtime_env.yaml").read_text())["env_vars"] | {"NCCL_DEBUG": "INFO"}
    job = {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": variables}}),
    }
    command = [sys.executable, "-c", IN_A_JOB]
    finished = subprocess.run(command, env={**os.environ, **variables, **job}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    in_a_worker = json.loads(finished.stdout)
    expected = WORKER_ENVIRONMENT | variables
    assert {name for name in WORKER_ENVIRONMENT if expected[name] != WORKER_ENVIRONMENT[name]} == {"NCCL_DEBUG"}
    assert {name: in_a_worker.get(name) for name in expected} == expected


# Runs


def tiny(folder: Path, data_files: list[str], model: str) -> list[str]:
    """Overrides that swap data and model for tiny ones and leave the algorithm to the script."""
    return [
        *data_files,
        "data.prompt_key=prompt",
        "data.max_prompt_length=512",
        "data.max_response_length=10",
        "data.rollout_batch_size=4",
        "data.mini_rollout_batch_size=2",
        "data.min_pixels=null",
        "data.filter_overlong_prompts_workers=1",
        f"worker.actor.model.model_path={model}",
        "worker.actor.global_batch_size=2",
        "worker.actor.micro_batch_size_per_device_for_update=4",
        "worker.actor.micro_batch_size_per_device_for_experience=8",
        "worker.actor.fsdp.mp_param_dtype=fp32",
        "worker.actor.offload.offload_params=false",
        "worker.ref.fsdp.enable_cpu_offload=false",
        "worker.rollout.name=hf",
        "worker.rollout.n=4",
        "worker.rollout.dtype=fp32",
        "worker.rollout.disable_tqdm=true",
        f"worker.reward.reward_function={ROOT}/tests/rewards.py:compute_score",
        "trainer.logger=[file]",
        "trainer.n_gpus_per_node=1",
        "trainer.max_steps=2",
        "trainer.val_before_train=false",
        f"trainer.save_checkpoint_path={folder}",
    ]


@pytest.fixture(scope="module")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    train = write_dataset(folder / "train.parquet", ROWS, copies=3)
    (folder / "val").mkdir()
    return [f"data.train_files={train}", f"data.val_files={write_dataset(folder / 'val' / 'val.parquet', ROWS[:2])}"]


@pytest.fixture(scope="module")
def model_of_eight_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As many layers as vgr.sh takes attention from."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), num_layers=8)


CLIPPED = {"actor/pg_clipfrac_higher", "actor/pg_clipfrac_lower"}
KL_LOSS = {"actor/kl_loss", "actor/kl_coef"}
WEIGHTED = {"token_weights/weighted_rows", "vgr/mean"}


@pytest.mark.parametrize(
    ("script", "present", "absent"),
    [
        ("qwen2_5_vl_7b_geo3k_grpo", CLIPPED | KL_LOSS, WEIGHTED),
        (TWIN, CLIPPED | KL_LOSS | WEIGHTED, set()),
        ("qwen2_5_vl_7b_geo3k_dapo_vgr", CLIPPED | WEIGHTED, KL_LOSS),
        ("qwen2_5_vl_7b_geo3k_gspo_vgr", CLIPPED | KL_LOSS | WEIGHTED, set()),
        ("qwen2_5_vl_7b_geo3k_cispo_vgr", KL_LOSS | WEIGHTED, CLIPPED),
        ("qwen2_5_vl_7b_geo3k_sapo_vgr", KL_LOSS | WEIGHTED, CLIPPED),
        ("qwen2_5_vl_7b_geo3k_reinforce_vgr", CLIPPED | WEIGHTED | {"actor/kl_penalty"}, {"actor/kl_loss"}),
        ("qwen2_5_vl_7b_multi_image_vgr", CLIPPED | KL_LOSS | WEIGHTED, set()),
        ("qwen3_vl_4b_geo3k_grpo_lora_vgr", CLIPPED | KL_LOSS | WEIGHTED, set()),
    ],
)
def test_a_script_of_each_kind_trains_a_tiny_model(
    script: str,
    present: set[str],
    absent: set[str],
    data_files: list[str],
    model_of_eight_layers: str,
    tmp_path: Path,
    ray_cluster,
) -> None:
    """With the arguments that it hands to the trainer."""
    overrides = tiny(tmp_path / "run", data_files, model_of_eight_layers)
    if "_dapo" in script:  # the tests' reward counts vowels
        overrides += ["algorithm.filter_key=overall", "algorithm.filter_high=1000"]
    given = arguments_of(tmp_path, script, *overrides)
    for refusal in refusals_of(given):
        skip_if_not_installed(refusal)
    run_shared(load_config(given))
    records = steps_of(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2]
    for record in records:
        metrics = {key.replace(".", "/"): value for key, value in leaves(record)}
        assert present <= set(metrics) and not absent & set(metrics)
        assert math.isfinite(metrics["actor/pg_loss"]) and metrics["actor/grad_norm"] > 0
        if script.endswith("_vgr"):
            assert metrics["token_weights/weighted_rows"] > 0
    assert (tmp_path / "run" / "global_step_2" / "actor").is_dir()


@pytest.mark.ray
def test_a_script_starts_the_trainer_and_ends_with_it(
    data_files: list[str], model_of_eight_layers: str, tmp_path: Path
) -> None:
    overrides = tiny(tmp_path / "run", data_files, model_of_eight_layers)
    finished = run_script(TWIN, *overrides, programs=Path(sys.executable).parent)
    assert finished.returncode == 0, finished.stderr
    assert [record["step"] for record in steps_of(tmp_path / "run")] == [1, 2]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "experiment_log.jsonl").read_text().splitlines()]
    return [record for record in records if "actor" in record]


def test_a_script_without_images_trains_a_model_that_takes_none(tmp_path: Path, ray_cluster) -> None:
    """Data without a column of images; with VGR token weights every token weighs 1."""
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS if not row["images"]]
    Dataset.from_list(rows * 4).to_parquet(str(tmp_path / "data.parquet"))
    data_files = [f"data.{split}_files={tmp_path}/data.parquet" for split in ("train", "val")]
    overrides = tiny(tmp_path / "run", data_files, make_tiny_text_model(tmp_path / "model"))
    overrides += ["algorithm.enable_token_weights=true", "worker.rollout.collect_attentions=true"]
    run_shared(load_config(arguments_of(tmp_path, "qwen2_5_7b_math_grpo", *overrides, "trainer.max_steps=1")))
    record = json.loads((tmp_path / "run" / "experiment_log.jsonl").read_text().splitlines()[0])
    assert record["step"] == 1 and record["actor"]["grad_norm"] > 0
    assert record["token_weights"]["weighted_rows"] == 0
    assert record["token_weights"]["mean"] == 1
