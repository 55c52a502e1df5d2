# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_training_run.py
"""Whole runs: from the command line to checkpoints and curves, interrupted and resumed, and runs that must fail."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForImageTextToText

from tests.batches import ROWS, write_dataset
from tests.pool import run_shared, shared_processes
from tests.probe import WITH_CRITIC
from tests.processes import processes_marked
from tests.rewards import wait_for, weights_by_length
from tests.tiny import make_tiny_model
from verl.algorithms.policy_loss import POLICY_LOSSES, PolicyLossInputs
from verl.algorithms.token_weights import TOKEN_SIGNALS
from verl.protocol import DataProto
from verl.trainer.config import load_config
from verl.trainer.main import run
from verl.trainer.ray_trainer import RayDAPOTrainer
from verl.trainer.step_record import StepRecord
from verl.utils.attention_metrics import vgr_from_mass
from verl.utils.attention_token_weights import token_weights_from_vgr
from verl.utils.checkpoint import write_tracker
from verl.utils.checkpoint_folder import read_manifest
from verl.workers.actor.config import ActorConfig

ROOT = Path(__file__).resolve().parent.parent


def arguments(model_path: str, data_files: list[str], output: Path, *overrides: str) -> list[str]:
    return [
        *data_files,
        "data.rollout_batch_size=4",
        "data.mini_rollout_batch_size=2",
        "data.max_prompt_length=96",
        "data.max_response_length=10",
        "data.min_pixels=null",
        "data.filter_overlong_prompts_workers=1",
        "algorithm.use_kl_loss=true",
        "algorithm.kl_penalty=low_var_kl",
        f"worker.actor.model.model_path={model_path}",
        "worker.actor.global_batch_size=2",
        "worker.actor.micro_batch_size_per_device_for_update=2",
        "worker.actor.micro_batch_size_per_device_for_experience=4",
        "worker.actor.optim.lr=1e-3",
        "worker.actor.fsdp.mp_param_dtype=fp32",
        "worker.rollout.name=hf",
        "worker.rollout.n=4",
        "worker.rollout.dtype=fp32",
        "worker.rollout.disable_tqdm=true",
        f"worker.reward.reward_function={ROOT}/tests/rewards.py:compute_score",
        "trainer.logger=[file]",
        "trainer.n_gpus_per_node=1",
        "trainer.max_steps=3",
        f"trainer.save_checkpoint_path={output}",
        *overrides,
    ]


OFFLINE = {
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "SWANLAB_MODE": "offline",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Variables that keep the loggers' libraries from the network."""


def command(*args: str, mark: str = "", cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Runs the trainer as a user does; every process it starts carries `mark` in its environment."""
    return subprocess.run(
        [sys.executable, "-m", "verl.trainer.main", *args],
        cwd=cwd,
        env={**os.environ, **variables, "VERL_TEST_MARK": mark},
        capture_output=True,
        text=True,
        timeout=400,
    )


def lines_of(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def flat_names(record: dict) -> set[str]:
    return {f"{area}/{name}" for area, values in record.items() if isinstance(values, dict) for name in values}


def weights_at(folder: Path, step: int, model: str = "actor") -> dict[str, torch.Tensor]:
    return torch.load(folder / f"global_step_{step}" / model / "model_world_size_1_rank_0.pt")


def is_changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.ray
def test_three_steps_on_two_workers_leave_logs_checkpoints_and_curves(
    tiny_model_path: str, data_files: list[str], tmp_path: Path
) -> None:
    mark = uuid.uuid4().hex
    args = arguments(
        tiny_model_path,
        data_files,
        tmp_path,
        "trainer.logger=[console,file,tensorboard,wandb,swanlab,mlflow]",
        "trainer.n_gpus_per_node=2",
        "trainer.val_freq=2",
        "trainer.val_generations_to_log=2",
        "trainer.save_freq=1",
        "trainer.save_limit=2",
        "worker.actor.offload.offload_params=true",
        "worker.actor.offload.offload_optimizer=true",
        "worker.rollout.val_override_config={temperature: 0.5, n: 2}",
    )
    finished = command(*args, mark=mark, cwd=tmp_path, PYTHONPATH=str(ROOT), **OFFLINE)
    assert finished.returncode == 0, finished.stderr
    assert "running on cpu: 2 worker" in finished.stderr
    assert processes_marked(mark) == []

    records = lines_of(tmp_path / "experiment_log.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 3]
    expected = {
        *(f"actor/{name}" for name in ("pg_loss", "ppo_kl", "entropy_loss", "pg_clipfrac_higher")),
        *(f"actor/{name}" for name in ("pg_clipfrac_lower", "grad_norm", "lr", "kl_loss", "kl_coef")),
        *(f"global_seqlen/{n}" for n in ("min", "max", "minmax_diff", "balanced_min", "balanced_max", "mean")),
        *(f"response_length/{name}" for name in ("mean", "max", "min", "clip_ratio")),
        *(f"timing_s/{name}" for name in ("gen", "reward", "old", "ref", "adv", "update_actor", "step")),
        *(f"perf/{name}" for name in ("total_num_tokens", "time_per_step", "throughput", "cpu_memory_used_gb")),
        "reward/overall",
        "reward/with_image",
    }
    assert expected <= flat_names(records[1])
    assert not {"vgr", "attention", "token_weights"} & set(records[1])  # VGR is off unless asked for
    assert set(records[1]["critic"]) == {"score", "rewards", "advantages", "returns"}
    assert {"val/reward_score", "val/overall_reward", "val/with_image_reward"} <= flat_names(records[0])
    assert records[0]["val"]["with_image_reward"] == pytest.approx(3 / 5)

    steps = sorted(path.name for path in tmp_path.glob("global_step_*"))
    assert "global_step_3" in steps and len(steps) == 2
    tracker = json.loads((tmp_path / "checkpoint_tracker.json").read_text())
    assert tracker["last_global_step"] == 3
    scores = {record["step"]: record["val"]["reward_score"] for record in records[1:] if "val" in record}
    assert set(scores) == {2, 3}
    assert tracker["best_global_step"] == max(scores, key=scores.get)
    assert tracker["best_val_reward_score"] == pytest.approx(max(scores.values()), abs=1e-4)
    assert (tmp_path / "global_step_3" / "dataloader.pt").exists()
    assert len(list((tmp_path / "global_step_3" / "actor").glob("*_world_size_2_rank_*.pt"))) == 6
    assert "[prompt]" in (tmp_path / "generations.log").read_text()
    val_rewards = lines_of(tmp_path / "val_rewards.jsonl")
    assert [line["step"] for line in val_rewards] == [0, 2, 3]
    with_image = val_rewards[0]["rewards"]["with_image"]
    assert len(with_image) % 5 == 0 and sum(with_image) / len(with_image) == pytest.approx(3 / 5)

    assert list((tmp_path / "tensorboard_log").rglob("events.out.tfevents.*"))
    ids = json.loads((tmp_path / "run_ids.json").read_text())
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{ids['wandb']}/run-{ids['wandb']}.wandb"))) == 1
    assert len(list(tmp_path.glob(f"swanlab_log/run-*-{ids['swanlab']}/media/text/*.txt"))) == 6
    assert len(list(tmp_path.glob(f"mlruns/1/{ids['mlflow']}/artifacts/val/generations/step_*.txt"))) == 3
    assert "training goes on" not in finished.stderr

    summary = finished.stderr.partition("easy_r1/demo ended at step 3 of 3\n")[2]
    tokens = sum(int(record["perf"]["total_num_tokens"]) for record in records if "perf" in record)
    assert f" s, {tokens:,} tokens" in summary
    first, last = (f"{record['val']['reward_score']:.3f}" for record in (records[0], records[-1]))
    assert f"\nheld-out reward  {first} (step 0)  {last} (step 3)  " in summary
    listed = {Path(path) for path in re.findall(r"  (/.+)$", summary, re.MULTILINE)}
    assert all(path.exists() for path in listed)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    forgotten = [path for path in written if not listed & {path, *path.parents} - {tmp_path}]
    # The lock says nothing, and the others are the libraries' own, beside the runs that they keep.
    assert {path.name for path in forgotten} <= {"run.lock", "debug.log", "debug-internal.log", ".gitignore"}
    for name in ("wandb", "swanlab"):
        assert [path for path in listed if ids[name] in path.name], name


def test_token_weights_follow_their_rows_through_balancing_to_the_update(
    tiny_model_path: str, tokenizer, data_files: list[str], tmp_path: Path, ray_cluster
) -> None:
    """Two workers, rows reordered. Samples with the answer 1 get weights from the reward function, the other ones with
    images from VGR, and those without an image weigh 1."""
    batches, reordered = [], []
    balance, update = RayDAPOTrainer._balance_across_ranks, RayDAPOTrainer._update_actor

    def compare(trainer: RayDAPOTrainer, batch: DataProto, record: StepRecord) -> DataProto:
        before = batch.batch["input_ids"].clone()
        batch = balance(trainer, batch, record)
        reordered.append(not torch.equal(batch.batch["input_ids"], before))
        return batch

    def keep(trainer: RayDAPOTrainer, batch: DataProto, record: StepRecord) -> None:
        batches.append(batch)
        update(trainer, batch, record)

    args = arguments(
        tiny_model_path,
        data_files,
        tmp_path,
        "algorithm.enable_token_weights=true",
        "worker.rollout.collect_attentions=true",
        f"worker.reward.reward_function={ROOT}/tests/rewards.py:weigh_some",
        "trainer.n_gpus_per_node=2",
        "trainer.max_steps=2",
        "trainer.val_freq=1",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RayDAPOTrainer, "_balance_across_ranks", compare)
        patch.setattr(RayDAPOTrainer, "_update_actor", keep)
        run_shared(load_config(args))
    assert any(reordered)

    kinds, given = set(), []
    for batch in batches:
        tensors = batch.batch
        given.append(float((batch.non_tensor_batch["ground_truth"] == "1").mean()))
        vgr = vgr_from_mass(tensors["attention_mass"], tensors["attention_keys"])
        by_vgr = token_weights_from_vgr(vgr, tensors["response_mask"])
        for index, truth in enumerate(batch.non_tensor_batch["ground_truth"]):
            length = int(tensors["response_mask"][index].sum())
            weights = tensors["token_weights"][index]
            tokens = [tokenizer.decode([token]) for token in tensors["responses"][index, :length].tolist()]
            expected = {"1": torch.tensor(weights_by_length(tokens)), "2": by_vgr[index, :length]}
            torch.testing.assert_close(weights[:length], expected.get(truth, torch.ones(length)))
            assert (weights[length:] == 0).all()
            kinds.add((truth, bool((weights[:length] != 1).any())))
    assert {("1", True), ("2", True), ("3", False), ("4", False)} <= kinds

    records = lines_of(tmp_path / "experiment_log.jsonl")
    shares = [record["token_weights"]["from_reward"] for record in records if "actor" in record]
    assert shares == pytest.approx(given) and any(0 < share < 1 for share in shares)
    for record in records:
        assert "token_weights" not in record.get("reward", {})
        assert "token_weights_reward" not in record.get("val", {})
        if "actor" in record:
            assert set(record["vgr"]) == {"mean", "median", "p10", "p90"}
            assert set(record["attention"]) == {"text_mass", "vision_mass", "aei_text", "aei_vision"}
            assert record["token_weights"]["std"] > 0
            assert 0 < record["token_weights"]["weighted_rows"] < 1


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_never_interrupted(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, caplog
) -> None:
    """With a KL coefficient that adapts, which is part of what has to be taken up."""
    options = [
        "trainer.val_before_train=false",
        "algorithm.use_kl_loss=false",
        "algorithm.kl_type=adaptive",
        "algorithm.kl_horizon=64",
        "algorithm.kl_coef=0.5",
    ]
    run_shared(load_config(arguments(tiny_model_path, data_files, tmp_path / "whole", *options)))
    for steps in (2, 3):
        until = f"trainer.max_steps={steps}"
        run_shared(load_config(arguments(tiny_model_path, data_files, tmp_path / "parts", *options, until)))
    resumed_with = [told for told in caplog.messages if "resumes with" in told]
    assert resumed_with == ["the run resumes with trainer.max_steps=3, which was 2"]
    assert is_changed(weights_at(tmp_path / "parts", 2), weights_at(tmp_path / "parts", 3))
    assert not is_changed(weights_at(tmp_path / "whole", 3), weights_at(tmp_path / "parts", 3))
    whole, parts = (
        {record["step"]: record for record in lines_of(tmp_path / name / "experiment_log.jsonl") if "actor" in record}
        for name in ("whole", "parts")
    )
    assert list(whole) == list(parts) == [1, 2, 3]
    for step, record in whole.items():  # the first two say that a seed repeats a run
        for area in ("actor", "critic", "reward", "response_length", "global_seqlen"):
            assert parts[step][area] == record[area]
    coefficients = [record["actor"]["kl_coef"] for record in whole.values()]
    assert coefficients[0] == 0.5 and len(set(coefficients)) == 3


@pytest.mark.parametrize("control", ["shuffled", "random"])
def test_a_resumed_run_draws_the_controls_of_one_that_was_never_interrupted(
    control: str, tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster
) -> None:
    options = [
        "trainer.val_before_train=false",
        "algorithm.disable_kl=true",
        "algorithm.enable_token_weights=true",
        "worker.rollout.collect_attentions=true",
        f"algorithm.token_weight_control={control}",
    ]
    for name, steps in (("whole", 2), ("parts", 1), ("parts", 2)):
        until = f"trainer.max_steps={steps}"
        run_shared(load_config(arguments(tiny_model_path, data_files, tmp_path / name, *options, until)))
    assert not is_changed(weights_at(tmp_path / "whole", 2), weights_at(tmp_path / "parts", 2))
    whole, parts = (
        [record for record in lines_of(tmp_path / name / "experiment_log.jsonl") if "actor" in record]
        for name in ("whole", "parts")
    )
    assert [record["step"] for record in parts] == [1, 2]
    for area in ("token_weights", "actor", "reward"):
        assert [record[area] for record in whole] == [record[area] for record in parts]
    assert all(record["token_weights"]["std"] > 1e-4 for record in whole)


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_a_run_with_the_kl_over_the_whole_vocabulary_by_way_of_the_reward_or_the_loss(
    place: str, tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster
) -> None:
    """Two workers and offload, so that both models have to be brought in; other estimator and loss than the default's.

    The KL is exactly zero before the first update and above it afterwards. In the loss there is no reference pass.
    """
    args = arguments(
        tiny_model_path,
        data_files,
        tmp_path,
        "algorithm.kl_penalty=full",
        f"algorithm.use_kl_loss={str(place == 'loss').lower()}",
        "algorithm.adv_estimator=rloo",
        "worker.actor.loss_type=gspo_token",
        "worker.actor.loss_avg_mode=seq",
        "worker.actor.offload.offload_params=true",
        "worker.ref.offload.offload_params=true",
        "worker.ref.fsdp.torch_dtype=fp32",
        "worker.ref.fsdp.mp_param_dtype=fp32",
        "trainer.n_gpus_per_node=2",
        "trainer.max_steps=2",
        "trainer.val_before_train=false",
    )
    run_shared(load_config(args))
    first, second = (record for record in lines_of(tmp_path / "experiment_log.jsonl") if "actor" in record)
    name = "kl_penalty" if place == "reward" else "kl_loss"
    assert ("ref" in first["timing_s"]) is (place == "reward")
    assert 1e-6 < second["actor"][name] < 10
    if place == "reward":
        assert first["actor"][name] == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def runs_with_critic(
    tiny_model_path: str, data_files: list[str], tmp_path_factory: pytest.TempPathFactory, ray_cluster
) -> tuple[Path, Path]:
    """Folders of a run of three steps with a critic, and of the same run interrupted after two.

    The actor is updated from the second step on. KL is in the reward, so that tokens differ in their rewards.
    """
    folder = tmp_path_factory.mktemp("critic")
    settings = [
        "algorithm.adv_estimator=gae",
        "algorithm.use_kl_loss=false",
        "algorithm.lam=0.9",
        "worker.critic.global_batch_size=4",
        "worker.critic.micro_batch_size_per_device_for_update=2",
        "worker.critic.micro_batch_size_per_device_for_experience=4",
        "worker.critic.optim.lr=1e-3",
        "worker.critic.fsdp.mp_param_dtype=fp32",
        "trainer.critic_warmup=2",
        "trainer.val_before_train=false",
        "trainer.save_freq=1",
    ]
    for name, lengths in (("whole", (3,)), ("parts", (2, 3))):
        for steps in lengths:
            args = arguments(tiny_model_path, data_files, folder / name, *settings, f"trainer.max_steps={steps}")
            run_shared(load_config(args))
    return folder / "whole", folder / "parts"


def test_a_run_with_a_critic_trains_it_from_the_first_step_and_logs_what_it_expected(
    runs_with_critic: tuple[Path, Path], tiny_model_path: str
) -> None:
    """In the first step the untrained critic's values are all 0; the actor waits for the second."""
    whole, _ = runs_with_critic
    records = {record["step"]: record for record in lines_of(whole / "experiment_log.jsonl") if "critic" in record}
    assert list(records) == [1, 2, 3]
    for step, record in records.items():
        names = {name for name in flat_names(record) if name.startswith("critic/")}
        losses = {"vf_loss", "vf_clipfrac", "vpred_mean", "grad_norm", "lr", "skipped_steps", "vf_explained_var"}
        spreads = {"score", "rewards", "advantages", "returns", "values"}
        assert names == {f"critic/{name}" for name in losses | spreads}
        assert {"values", "update_critic"} <= set(record["timing_s"])
        assert {"values", "update_critic"} <= set(record["timing_per_token_ms"])
        assert "cpu_memory_used_gb" in record["perf"]
        assert ("update_actor" in record["timing_s"]) is (step >= 2)
        assert (record["critic"]["values"] == {"mean": 0, "max": 0, "min": 0}) is (step == 1)
    initial = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32).state_dict()
    assert not is_changed(weights_at(whole, 1, "actor"), initial)
    assert is_changed(weights_at(whole, 1, "actor"), weights_at(whole, 2, "actor"))
    assert (weights_at(whole, 1, "critic")["value_head.weight"] != 0).any()
    assert is_changed(weights_at(whole, 1, "critic"), weights_at(whole, 2, "critic"))


def test_a_checkpoint_has_the_critic_beside_the_actor_in_the_same_files(runs_with_critic: tuple[Path, Path]) -> None:
    files = {
        model: {path.name for path in (runs_with_critic[0] / "global_step_3" / model).iterdir()}
        for model in ("actor", "critic")
    }
    kinds = ("model", "optim", "extra_state")
    assert files["critic"] == files["actor"] == {*(f"{kind}_world_size_1_rank_0.pt" for kind in kinds), "huggingface"}


def test_a_resumed_run_with_a_critic_ends_with_the_weights_of_one_that_was_never_interrupted(
    runs_with_critic: tuple[Path, Path],
) -> None:
    whole, parts = runs_with_critic
    for model in ("actor", "critic"):
        assert is_changed(weights_at(parts, 2, model), weights_at(parts, 3, model))
        assert not is_changed(weights_at(whole, 3, model), weights_at(parts, 3, model))
    last = [lines_of(folder / "experiment_log.jsonl")[-2] for folder in (whole, parts)]
    assert last[0]["step"] == last[1]["step"] == 3
    for area in ("actor", "critic", "reward"):
        assert last[0][area] == last[1][area]


def test_a_checkpoint_of_another_program_goes_on_with_its_model_and_starts_the_data_anew(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """As EasyR1's: no manifest, and a data loader of torchdata's."""
    for steps in (1, 2):
        run_shared(load_config(arguments(tiny_model_path, data_files, tmp_path, f"trainer.max_steps={steps}")))
        if steps == 1:
            (tmp_path / "global_step_1" / "manifest.json").unlink()
            torch.save({"_snapshot": {"_main_snapshot": {}}}, tmp_path / "global_step_1" / "dataloader.pt")
    assert "dataloader.pt was written by another program: the data starts from its first epoch" in caplog.text
    assert [line["step"] for line in lines_of(tmp_path / "experiment_log.jsonl") if "actor" in line] == [1, 2]


def test_a_checkpoint_without_room_ends_the_run_before_it_is_begun(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for is the size of weights, moments and step counts in float32, and of nothing twice."""
    disk_usage = shutil.disk_usage

    def almost_full(path: str) -> Any:
        usage = disk_usage(path)
        return usage._replace(free=1000) if str(path) == str(tmp_path) else usage

    monkeypatch.setattr(shutil, "disk_usage", almost_full)
    settings = ["trainer.max_steps=1", "trainer.val_before_train=false"]
    with pytest.raises(
        RuntimeError, match=r"global_step_1 needs ([\d.]+) MiB, and its file system has 0.0 MiB"
    ) as ended:
        run_shared(load_config(arguments(tiny_model_path, data_files, tmp_path, *settings)))
    assert not list(tmp_path.glob("global_step_*"))
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_path)
    expected = 3 * 4 * sum(parameter.numel() for parameter in model.parameters()) / 2**20
    assert float(re.search(r"needs ([\d.]+) MiB", str(ended.value))[1]) == pytest.approx(expected, rel=0.02)


def test_deterministic_runs_of_one_seed_agree_to_the_last_bit(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster
) -> None:
    """On two workers: all that is logged, but for clocks and memory, and every file of weights and states."""
    records = []
    for name in ("one", "other"):
        settings = ["trainer.deterministic=true", "trainer.n_gpus_per_node=2", "trainer.max_steps=2"]
        run_shared(load_config(arguments(tiny_model_path, data_files, tmp_path / name, *settings)))
        modes = [
            actor.__ray_call__.remote(lambda _: torch.are_deterministic_algorithms_enabled())
            for actor in shared_processes(2)._actors
        ]
        assert ray.get(modes) == [True, True]
        lines = lines_of(tmp_path / name / "experiment_log.jsonl")
        clocks = ("timing_s", "timing_per_token_ms", "perf")
        records.append([{area: values for area, values in line.items() if area not in clocks} for line in lines])
    assert records[0] == records[1]
    saved = [read_manifest(tmp_path / name / "global_step_2").files for name in ("one", "other")]
    assert all(saved[0][name] == saved[1][name] for name in saved[0] if name.endswith(".pt"))


def test_a_loss_that_only_the_users_own_program_registers_trains_in_the_workers(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that no worker could import, as one of a script's `__main__` is: it travels to them by value."""

    def plain_policy_gradient(inputs: PolicyLossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -inputs.advantages * inputs.log_probs, {"seen": torch.full_like(inputs.advantages, 0.25)}

    monkeypatch.setitem(POLICY_LOSSES, "plain", plain_policy_gradient)
    settings = ["worker.actor.loss_type=plain", "trainer.val_before_train=false", "trainer.max_steps=1"]
    run_shared(load_config(arguments(tiny_model_path, data_files, tmp_path, *settings)))
    record = lines_of(tmp_path / "experiment_log.jsonl")[0]
    assert record["actor"]["seen"] == pytest.approx(0.25)
    assert record["actor"]["grad_norm"] > 0


def test_a_signal_that_only_the_users_own_program_registers_weighs_tokens(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers are told what to measure for it, and need not know it."""
    monkeypatch.setitem(TOKEN_SIGNALS, "mine", lambda entropy, response_mask: entropy * response_mask)
    settings = ["algorithm.enable_token_weights=true", "algorithm.token_weight_signal=mine", "trainer.max_steps=1"]
    run_shared(
        load_config(arguments(tiny_model_path, data_files, tmp_path, *settings, "trainer.val_before_train=false"))
    )
    (record,) = (record for record in lines_of(tmp_path / "experiment_log.jsonl") if "actor" in record)
    assert record["token_weights"]["std"] > 0
    assert record["token_weights"]["weighted_rows"] > 0.5


@dataclass(frozen=True)
class ActorWithAKnob(ActorConfig):
    floor: float = -1.0
    """Advantages below this count as this."""


def floored_policy_gradient(inputs: PolicyLossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    advantages = inputs.advantages.clamp(min=inputs.config.floor)
    return -advantages * inputs.log_probs, {"floor": torch.full_like(advantages, inputs.config.floor)}


def test_a_loss_with_a_knob_of_its_own_is_one_function_and_one_field(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICY_LOSSES, "floored", floored_policy_gradient)
    settings = ["worker.actor.loss_type=floored", "trainer.val_before_train=false", "trainer.max_steps=1"]
    config = load_config(arguments(tiny_model_path, data_files, tmp_path, *settings))
    actor = ActorWithAKnob(**vars(config.worker.actor), floor=0.25)
    run_shared(replace(config, worker=replace(config.worker, actor=actor)))
    (record,) = (record for record in lines_of(tmp_path / "experiment_log.jsonl") if "actor" in record)
    assert record["actor"]["floor"] == pytest.approx(0.25)


def test_an_estimator_and_a_loss_in_a_users_file_train(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster
) -> None:
    """Each process loads the file by itself. The loss has a helper beside it, and reads a knob of the package."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def _sum(rewards):\n"
        "    return rewards.sum(-1, keepdim=True)\n"
        "def rewards_alone(inputs):\n"
        "    advantages = _sum(inputs.token_level_rewards) * inputs.response_mask + 2.0 * inputs.config.gamma\n"
        "    return advantages, advantages\n"
        "def plain(inputs):\n"
        "    knob = torch.full_like(inputs.advantages, inputs.config.clip_ratio_high)\n"
        "    return -inputs.advantages * inputs.log_probs, {'knob': knob}\n"
    )
    settings = [
        f"worker.actor.loss_type={tmp_path}/mine.py:plain",
        f"algorithm.adv_estimator={tmp_path}/mine.py:rewards_alone",
        "worker.actor.clip_ratio_high=0.5",
        "trainer.val_before_train=false",
        "trainer.max_steps=1",
    ]
    run_shared(load_config(arguments(tiny_model_path, data_files, tmp_path / "run", *settings)))
    (record,) = (record for record in lines_of(tmp_path / "run" / "experiment_log.jsonl") if "actor" in record)
    assert record["actor"]["knob"] == pytest.approx(0.5)
    assert record["critic"]["advantages"]["mean"] == pytest.approx(record["critic"]["returns"]["mean"])
    assert record["critic"]["advantages"]["min"] >= 2.0
    assert record["actor"]["grad_norm"] > 0


def test_a_checkpoint_of_the_model_only_can_be_resumed_with_a_fresh_optimizer(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster, caplog
) -> None:
    """Of the actor's and of the critic's."""
    settings = [*WITH_CRITIC, "trainer.save_model_only=true", "trainer.val_before_train=false"]
    args = arguments(tiny_model_path, data_files, tmp_path, *settings)
    run_shared(load_config([*args, "trainer.max_steps=1"]))
    folder = tmp_path / "global_step_1"
    for model in ("actor", "critic"):
        files = {path.name for path in (folder / model).iterdir()}
        assert files == {"model_world_size_1_rank_0.pt", "huggingface"}
    adaptive = ["algorithm.use_kl_loss=false", "algorithm.kl_type=adaptive"]
    run_shared(load_config([*args, "trainer.max_steps=2", f"trainer.load_checkpoint_path={folder}", *adaptive]))
    assert "model only" in caplog.text
    assert "kl_coef.json does not exist: the KL coefficient starts from algorithm.kl_coef" in caplog.text

    elsewhere = tmp_path / "elsewhere"
    again = [f"trainer.load_checkpoint_path={folder}", f"trainer.save_checkpoint_path={elsewhere}"]
    run_shared(load_config([*args, "trainer.max_steps=1", *again]))
    assert "has reached the run's last step, 1" in caplog.text
    assert json.loads((elsewhere / "checkpoint_tracker.json").read_text())["last_global_step"] == 1
    for model in ("actor", "critic"):
        assert is_changed(weights_at(tmp_path, 1, model), weights_at(tmp_path, 2, model))
        assert not is_changed(weights_at(tmp_path, 1, model), weights_at(elsewhere, 1, model))


def test_a_cluster_without_a_cpu_for_the_rewards_is_refused_before_workers_start(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster
) -> None:
    args = arguments(tiny_model_path, data_files, tmp_path, "worker.reward.num_cpus=40")
    with pytest.raises(ValueError, match=r"1 workers .* worker.reward.num_cpus=40 ask for 41 CPUs, but Ray sees 16"):
        run(load_config(args))


def test_processes_that_do_not_fit_the_run_are_refused(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster
) -> None:
    args = arguments(tiny_model_path, data_files, tmp_path, "trainer.n_gpus_per_node=2")
    with pytest.raises(ValueError, match=r"asks for 2 workers, but the processes given to run\(\) are 1"):
        run(load_config(args), shared_processes(1))


def test_val_only_validates_once_and_neither_trains_nor_saves(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster
) -> None:
    run_shared(load_config(arguments(tiny_model_path, data_files, tmp_path, "trainer.val_only=true")))
    records = lines_of(tmp_path / "experiment_log.jsonl")
    assert len(records) == 1 and "val" in records[0]
    assert not list(tmp_path.glob("global_step_*"))


EQUAL_LENGTH = 10
"""Tokens of every response in the planned run, which goes past the end of sequence."""


@pytest.fixture(scope="module")
def planned_run(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory, ray_cluster) -> list[str]:
    """Arguments of a run of four steps on the same four prompts that has ended.

    The actor is updated from the third step on; KL is in the reward; rewards come from `follow_a_plan`. Each log-prob
    pass waits for the rewards to begin, and the rewards wait for the passes to end.
    """
    folder = tmp_path_factory.mktemp("planned")
    data = write_dataset(folder / "data.parquet", ROWS)
    args = arguments(
        tiny_model_path,
        [f"data.train_files={data}", f"data.val_files={data}"],
        folder,
        "algorithm.use_kl_loss=false",
        "algorithm.kl_penalty=kl",
        "algorithm.kl_coef=0.5",
        "worker.actor.optim.lr=1e-2",
        "worker.ref.fsdp.torch_dtype=fp32",
        "worker.ref.fsdp.mp_param_dtype=fp32",
        "worker.rollout.ignore_eos=true",
        f"worker.reward.reward_function={ROOT}/tests/rewards.py:follow_a_plan",
        f"worker.reward.reward_function_kwargs={{folder: {folder}}}",
        "trainer.critic_warmup=3",
        "trainer.val_before_train=false",
        "trainer.val_freq=1",
        "trainer.save_freq=1",
        "trainer.save_limit=2",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RayDAPOTrainer, "_compute_log_probs", _meet_the_rewards(folder))
        run_shared(load_config([*args, "trainer.max_steps=4"]))
    return args


def _meet_the_rewards(folder: Path):
    compute_log_probs = RayDAPOTrainer._compute_log_probs

    def compute(trainer: RayDAPOTrainer, batch, record):
        wait_for(folder / f"rewards_began_{record.step}")
        batch = compute_log_probs(trainer, batch, record)
        (folder / f"passes_ended_{record.step}").touch()
        return batch

    return compute


def output_of(args: list[str]) -> Path:
    (path,) = (arg.partition("=")[2] for arg in args if arg.startswith("trainer.save_checkpoint_path="))
    return Path(path)


def test_rewards_are_computed_while_the_log_prob_passes_run(planned_run: list[str]) -> None:
    """Had either waited for the other, the fixture's run would have ended with a timeout."""
    folder = output_of(planned_run)
    assert all((folder / f"passes_ended_{step}").exists() for step in (1, 2, 3, 4))


def test_the_same_prompts_get_other_responses_in_another_step(planned_run: list[str]) -> None:
    """Steps 1 and 2 have the same weights and the same prompts; only the draws can differ."""
    first, second = (json.loads((output_of(planned_run) / f"rewards_began_{step}").read_text()) for step in (1, 2))
    assert sorted(prompt for prompt, _ in first) == sorted(prompt for prompt, _ in second)
    assert not {response for _, response in first} & {response for _, response in second}


def test_steps_before_critic_warmup_leave_the_actor_alone(planned_run: list[str], tiny_model_path: str) -> None:
    """Steps 1 and 2 of 4; what they log under actor/ is the KL that went into the reward."""
    folder = output_of(planned_run)
    updates = ["update_actor" in record["timing_s"] for record in lines_of(folder / "experiment_log.jsonl")]
    assert updates == [False, False, True, True]
    for record, updated in zip(lines_of(folder / "experiment_log.jsonl"), updates, strict=True):
        assert (set(record["actor"]) == {"kl_penalty", "kl_coef"}) is not updated
    initial = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32).state_dict()
    assert not is_changed(weights_at(folder, 2), initial)
    assert is_changed(weights_at(folder, 4), initial)


def test_kl_in_the_reward_is_taken_off_every_score_and_makes_no_advantage_alone(
    planned_run: list[str],
) -> None:
    """All responses have 10 tokens, so the mean reward is the mean score less kl_coef * 10 * the mean KL of a token.

    Before the first update policy and reference are the same. In step 4 all scores are equal, and the rewards are not.
    """
    records = lines_of(output_of(planned_run) / "experiment_log.jsonl")
    for record in records:
        kl = record["actor"]["kl_penalty"]
        assert record["actor"]["kl_coef"] == 0.5
        expected = record["critic"]["score"]["mean"] - 0.5 * EQUAL_LENGTH * kl
        assert record["critic"]["rewards"]["mean"] == pytest.approx(expected, abs=1e-5)
        assert abs(kl) < 1e-5 if record["step"] <= 3 else kl > 1e-3
    assert records[3]["critic"]["score"]["min"] == records[3]["critic"]["score"]["max"] == 1
    assert records[3]["critic"]["rewards"]["min"] < records[3]["critic"]["rewards"]["max"] - 1e-3
    assert records[3]["critic"]["advantages"] == {"mean": 0, "max": 0, "min": 0}


def test_the_best_checkpoint_is_kept_and_known_to_a_run_that_goes_on_from_a_later_one(
    planned_run: list[str],
) -> None:
    """Scores .3, .9, .2, .5, then .8: with two places, step 2 keeps one for good."""
    folder = output_of(planned_run)
    assert sorted(path.name for path in folder.glob("global_step_*")) == ["global_step_2", "global_step_4"]
    for step in (4, 5):
        if step == 5:
            for name in ("rewards_began_5", "passes_ended_5"):
                (folder / name).touch()
            start = f"trainer.load_checkpoint_path={folder}/global_step_4"
            run_shared(load_config([*planned_run, "trainer.max_steps=5", start]))
        tracker = json.loads((folder / "checkpoint_tracker.json").read_text())
        assert (tracker["best_global_step"], tracker["best_val_reward_score"]) == (2, 0.9)
        assert tracker["last_global_step"] == step
    assert sorted(path.name for path in folder.glob("global_step_*")) == ["global_step_2", "global_step_5"]

    # Step 5 was the best, and the run goes back and takes it again: what its old weights scored is forgotten.
    write_tracker(str(folder), last_global_step=5, best_global_step=5, best_val_reward_score=0.95)
    start = f"trainer.load_checkpoint_path={folder}/global_step_2"
    run_shared(load_config([*planned_run, "trainer.max_steps=5", start]))
    tracker = json.loads((folder / "checkpoint_tracker.json").read_text())
    assert (tracker["best_global_step"], tracker["best_val_reward_score"]) == (5, 0.8)


def test_a_last_validation_that_fails_loses_no_training(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster
) -> None:
    reward = f"worker.reward.reward_function={ROOT}/tests/rewards.py:fail_in_last_validation"
    settings = [reward, "trainer.max_steps=1", "trainer.save_freq=-1", "trainer.val_freq=-1"]
    with pytest.raises(RuntimeError, match="no grade for this one"):
        run_shared(load_config(arguments(tiny_model_path, data_files, tmp_path, *settings)))
    assert read_manifest(tmp_path / "global_step_1") is not None
    tracker = json.loads((tmp_path / "checkpoint_tracker.json").read_text())
    assert tracker["last_global_step"] == 1


@pytest.mark.ray
def test_a_failure_during_generation_ends_the_run_with_its_own_message_and_no_process_left(
    data_files: list[str], tmp_path: Path
) -> None:
    """Weights that are not numbers, as a broken checkpoint has them: there is nothing to sample from."""
    mark = uuid.uuid4().hex
    broken = make_tiny_model(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(broken, dtype=torch.float32)
    model.model.language_model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(broken)
    finished = command(*arguments(broken, data_files, tmp_path / "run"), mark=mark)
    assert finished.returncode == 1
    assert "the policy's weights, or its logits in worker.rollout.dtype, are not finite" in finished.stderr
    assert "in generate_sequences" in finished.stderr
    assert "shut down" not in finished.stderr
    assert processes_marked(mark) == []


@pytest.mark.ray
def test_a_reward_function_that_raises_ends_the_run_with_the_sample_named_and_no_process_left(
    tiny_model_path: str, data_files: list[str], tmp_path: Path
) -> None:
    mark = uuid.uuid4().hex
    reward = f"worker.reward.reward_function={ROOT}/tests/rewards.py:fail_in_training"
    finished = command(*arguments(tiny_model_path, data_files, tmp_path, reward), mark=mark)
    assert finished.returncode == 1
    assert "ZeroDivisionError: no grade for this one" in finished.stderr
    assert "for sample 0 (uid" in finished.stderr
    assert "in fail_in_training" in finished.stderr
    assert processes_marked(mark) == []


def test_the_death_of_the_reward_functions_process_ends_the_run_with_its_node(
    tiny_model_path: str, data_files: list[str], tmp_path: Path, ray_cluster
) -> None:
    reward = f"worker.reward.reward_function={ROOT}/tests/rewards.py:die"
    args = arguments(tiny_model_path, data_files, tmp_path, reward, "trainer.val_before_train=false")
    with pytest.raises(RuntimeError, match=r"^the reward function's process on node [\d.]+ \(Ray node \w+\) died "):
        run_shared(load_config(args))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("worker.actor.optim.learning_rate=1", "did you mean 'worker.actor.optim.lr'"),
        ("worker.actor.global_batch_size=3", "worker.actor.global_batch_size=3 does not divide"),
        ("worker.hybrid_engine=false", "worker.hybrid_engine=false asks for engine and trainer in processes"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message_and_exit_code_2_within_seconds(
    override: str, message: str, tiny_model_path: str, data_files: list[str], tmp_path: Path
) -> None:
    start = time.monotonic()
    finished = command(*arguments(tiny_model_path, data_files, tmp_path, override))
    assert finished.returncode == 2
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert time.monotonic() - start < 20
