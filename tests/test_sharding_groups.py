# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_sharding_groups.py
"""Ranks that share a model, ranks that repeat it and ranks that are sent it: all train one and the same."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.batches import answer_at_random, make_prompts
from tests.probe import RESPONSE_LENGTH, RESPONSES_PER_PROMPT, ProbeWorker, make_config, run_of, start_alone
from tests.tiny import make_tiny_model
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.workers.actor.config import FSDPConfig

MICRO_BATCHES = "worker.actor.micro_batch_size_per_device_for_update=2"
FAST = ("worker.actor.optim.lr=1e-3", "algorithm.disable_kl=true")
BF16 = ("worker.actor.optim.strategy=adamw_bf16", "worker.actor.fsdp.torch_dtype=bf16")


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight rows: the first four with images, the last four text only."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    return answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH)


@pytest.fixture(scope="module")
def pair(tiny_model_path: str, ray_cluster) -> WorkerGroup:
    """Two ranks that each test starts anew."""
    group = WorkerGroup(ProbeWorker, 1, 2, "cpu", **run_of(make_config(tiny_model_path, MICRO_BATCHES), 2))
    yield group
    group.shutdown()


def assert_same_gradients(alone: dict[str, torch.Tensor], shared: dict[str, torch.Tensor]) -> None:
    assert alone.keys() == shared.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-6, rtol=1e-4)


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name, value in left.items() if not torch.equal(value, right[name])] == []


def test_replicas_train_as_shards_and_as_one_rank_do(
    tiny_model_path: str, batch: DataProto, lone_process_group, pair: WorkerGroup
) -> None:
    """Gradients, the norm that is clipped, and weights after the update. With `fsdp_size=1` nothing is sharded.

    The first step of AdamW has the length of the rate whatever a gradient's, so that one near 0 may turn its weight
    either way: a gradient's error counts where the gradient is larger than that.
    """
    before = start_alone(make_config(tiny_model_path, MICRO_BATCHES, *FAST))
    gradients, _ = before.gradients(batch, "token")
    metrics = before.update_actor(batch)
    weights = before.weights()
    for size in (-1, 1):
        pair.restart(make_config(tiny_model_path, MICRO_BATCHES, *FAST, f"worker.actor.fsdp.fsdp_size={size}"))
        assert_same_gradients(gradients, pair.gradients(batch, "token")[0])
        assert pair.update_actor(batch) == pytest.approx(metrics, rel=1e-5)
        first, second = pair.weights()
        assert_equal(first, second)
        for name, gradient in gradients.items():
            settled = gradient.abs() > 1e-5
            torch.testing.assert_close(first[name][settled], weights[name][settled], atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [-1, 1])
def test_a_checkpoint_of_two_ranks_in_bf16_goes_on_exactly(
    size: int, tiny_model_path: str, batch: DataProto, pair: WorkerGroup, tmp_path: Path
) -> None:
    config = make_config(tiny_model_path, MICRO_BATCHES, *FAST, *BF16, f"worker.actor.fsdp.fsdp_size={size}")
    pair.restart(config)
    pair.update_actor(batch)
    pair.save_checkpoint(str(tmp_path), model_only=False)
    metrics = pair.update_actor(batch)
    expected, _ = pair.weights()
    pair.restart(config)
    pair.load_checkpoint(str(tmp_path), model_only=False)
    assert pair.update_actor(batch) == metrics
    for weights in pair.weights():
        assert_equal(weights, expected)
    assert {value.dtype for value in expected.values()} == {torch.bfloat16}


def test_what_rank_0_reads_and_sends_is_what_every_rank_would_read(
    tiny_model_path: str, batch: DataProto, pair: WorkerGroup
) -> None:
    after = []
    for switch in ("true", "false"):
        keys = [f"worker.{name}.fsdp.enable_rank0_init={switch}" for name in ("actor", "ref")]
        pair.restart(make_config(tiny_model_path, MICRO_BATCHES, "worker.actor.optim.lr=1e-3", *keys))
        reference = pair.compute_ref_log_probs(batch).batch["ref_log_probs"]
        metrics = pair.update_actor(batch)
        after.append({"ref": reference, **pair.weights()[1]})
    assert_equal(*after)
    assert metrics["actor/grad_norm"] > 0


@pytest.mark.parametrize("size", [-1, 1])
@pytest.mark.parametrize("with_critic", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_only_rank_0_opens_the_weights_and_both_hold_them_and_every_buffer(
    tied: bool, with_critic: bool, size: int, pair: WorkerGroup, tmp_path: Path
) -> None:
    """The second rank's folder has none. Rope frequencies are in no file: built from the configuration alone they
    would be left to chance."""
    whole = make_tiny_model(tmp_path / "whole", tie_word_embeddings=tied)
    bare = shutil.copytree(whole, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*"))
    fsdp = {switch: FSDPConfig(fsdp_size=size, enable_rank0_init=switch) for switch in (True, False)}
    sent, received = pair.tensors_of([whole, str(bare)], fsdp[True], with_critic)
    read, _ = pair.tensors_of([whole, whole], fsdp[False], with_critic)
    assert any("inv_freq" in name for name in read)
    assert_equal(sent, read)
    assert_equal(received, read)
    if tied and not with_critic:
        assert torch.equal(received["lm_head.weight"], received["model.language_model.embed_tokens.weight"])


def test_two_groups_of_two_train_as_one_rank_does_and_resume_exactly(
    tiny_model_path: str, batch: DataProto, lone_process_group, ray_cluster, tmp_path: Path
) -> None:
    """Four ranks, each with two rows: sharded within a pair, repeated between pairs."""
    before = start_alone(make_config(tiny_model_path, MICRO_BATCHES))
    gradients, metrics = before.gradients(batch, "token")
    sizes = [f"worker.{name}.fsdp.fsdp_size=2" for name in ("actor", "ref")]
    config = make_config(tiny_model_path, MICRO_BATCHES, *sizes, *BF16, "worker.actor.optim.lr=1e-3")
    group = WorkerGroup(ProbeWorker, 1, 4, "cpu", **run_of(config, 4))
    try:
        group.restart(make_config(tiny_model_path, MICRO_BATCHES, *sizes))
        shared, shared_metrics = group.gradients(batch, "token")
        assert_same_gradients(gradients, shared)
        assert shared_metrics == pytest.approx(metrics, rel=1e-5)
        group.restart(config)
        group.update_actor(batch)
        group.save_checkpoint(str(tmp_path), model_only=False)
        group.update_actor(batch)
        expected = group.weights()
        group.load_checkpoint(str(tmp_path), model_only=False)
        group.update_actor(batch)
        for weights in group.weights():
            assert_equal(weights, expected[0])
    finally:
        group.shutdown()


def test_a_checkpoint_of_other_sharding_groups_is_refused_by_name(
    tiny_model_path: str, pair: WorkerGroup, tmp_path: Path
) -> None:
    """The last of these tests: a group does not outlive a refusal."""
    pair.restart(make_config(tiny_model_path, MICRO_BATCHES, *FAST, "worker.actor.fsdp.fsdp_size=1"))
    pair.save_checkpoint(str(tmp_path), model_only=True)
    pair.restart(make_config(tiny_model_path, MICRO_BATCHES, *FAST))
    with pytest.raises(ValueError, match="groups of 1 workers.* have 2; resume with worker.actor.fsdp.fsdp_size=1"):
        pair.load_checkpoint(str(tmp_path), model_only=True)
