# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_sharding_groups.py
"""Ranks that share a model, ranks that repeat it and ranks that are sent it: all train one and the same."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.batches import answer_at_random, make_prompts
from tests.probe import (
    RESPONSE_LENGTH,
    RESPONSES_PER_PROMPT,
    make_config,
    start_alone,
    start_group,
    without_clock,
)
from tests.tiny import make_tiny_model
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.config import PPOConfig
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
def ranks(tiny_model_path: str, ray_cluster) -> WorkerGroup:
    """Four ranks that each test starts anew: as many as two groups of two need."""
    group = start_group(make_config(tiny_model_path, MICRO_BATCHES), 4)
    yield group
    group.release()


def assert_same_gradients(alone: dict[str, torch.Tensor], shared: dict[str, torch.Tensor]) -> None:
    assert alone.keys() == shared.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-6, rtol=1e-4)


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name, value in left.items() if not torch.equal(value, right[name])] == []


def test_groups_of_any_size_train_as_one_rank_does(
    tiny_model_path: str, batch: DataProto, lone_process_group, ranks: WorkerGroup
) -> None:
    """Gradients, the norm that is clipped, and weights after the update. In groups of one nothing is sharded.

    The first step of AdamW has the length of the rate whatever a gradient's, so that one near 0 may turn its weight
    either way: a gradient's error counts where the gradient is larger than that. Nor has it rounded states behind it.
    """
    alone = start_alone(make_config(tiny_model_path, MICRO_BATCHES, *FAST))
    gradients, _ = alone.gradients(batch, "token")
    metrics = without_clock(alone.update_actor(batch))
    weights = alone.weights()
    for size, strategy in ((-1, "adamw"), (1, "adamw"), (2, "adamw"), (2, "adamw_bf16")):
        keys = (f"worker.actor.fsdp.fsdp_size={size}", f"worker.actor.optim.strategy={strategy}")
        ranks.restart(make_config(tiny_model_path, MICRO_BATCHES, *FAST, *keys))
        assert_same_gradients(gradients, ranks.gradients(batch, "token")[0])
        assert without_clock(ranks.update_actor(batch)) == pytest.approx(metrics, rel=1e-5)
        first, *others = ranks.weights()
        for other in others:
            assert_equal(first, other)
        for name, gradient in gradients.items():
            settled = gradient.abs() > 1e-5
            torch.testing.assert_close(first[name][settled], weights[name][settled], atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [-1, 2])
def test_a_checkpoint_in_bf16_goes_on_exactly(
    size: int, tiny_model_path: str, batch: DataProto, ranks: WorkerGroup, tmp_path: Path
) -> None:
    config = make_config(tiny_model_path, MICRO_BATCHES, *FAST, *BF16, f"worker.actor.fsdp.fsdp_size={size}")
    ranks.restart(config)
    ranks.update_actor(batch)
    ranks.save_checkpoint(str(tmp_path), model_only=False)
    metrics = without_clock(ranks.update_actor(batch))
    expected = ranks.weights()[0]
    ranks.restart(config)
    ranks.load_checkpoint(str(tmp_path), model_only=False)
    assert without_clock(ranks.update_actor(batch)) == metrics
    for weights in ranks.weights():
        assert_equal(weights, expected)
    assert {value.dtype for value in expected.values()} == {torch.bfloat16}


def test_ranks_go_on_from_moments_of_another_optimizer_and_precision_and_of_a_frozen_tower(
    tiny_model_path: str, batch: DataProto, ranks: WorkerGroup, tmp_path: Path
) -> None:
    """From float32 to bf16 and back, where weights take over what those in bf16 lacked, and the tower is thawed."""
    frozen = "worker.actor.model.freeze_vision_tower=true"
    configs = [make_config(tiny_model_path, MICRO_BATCHES, *FAST, *keys) for keys in ((frozen,), (frozen, *BF16), ())]
    for index, config in enumerate(configs):
        ranks.restart(config)
        if index > 0:
            ranks.load_checkpoint(str(tmp_path / str(index - 1)), model_only=False)
        before = ranks.weights()[0]
        ranks.update_actor(batch)
        first, *others = ranks.weights()
        for other in others:
            assert_equal(first, other)
        moved = {name for name, value in first.items() if not torch.equal(value, before[name])}
        assert any(name.startswith("model.visual.") for name in moved) == (config is configs[-1])
        ranks.save_checkpoint(str(tmp_path / str(index)), model_only=False)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert (before[name] != before[name].bfloat16()).float().mean() > 0.5


def test_what_rank_0_reads_and_sends_is_what_every_rank_would_read(
    tiny_model_path: str, batch: DataProto, ranks: WorkerGroup
) -> None:
    after = []
    for switch in ("true", "false"):
        keys = [f"worker.{name}.fsdp.enable_rank0_init={switch}" for name in ("actor", "ref")]
        ranks.restart(make_config(tiny_model_path, MICRO_BATCHES, "worker.actor.optim.lr=1e-3", *keys))
        reference = ranks.compute_ref_log_probs(batch).batch["ref_log_probs"]
        metrics = ranks.update_actor(batch)
        after.append({"ref": reference, **ranks.weights()[3]})
    assert_equal(*after)
    assert metrics["actor/grad_norm"] > 0


@pytest.mark.parametrize("size", [-1, 2])
@pytest.mark.parametrize("with_critic", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_only_rank_0_opens_the_weights_and_all_hold_them_and_every_buffer(
    tied: bool, with_critic: bool, size: int, ranks: WorkerGroup, tmp_path: Path
) -> None:
    """The folder of the others has none. Rope frequencies are in no file: built from the configuration alone they
    would be left to chance."""
    whole = make_tiny_model(tmp_path / "whole", tie_word_embeddings=tied)
    bare = shutil.copytree(whole, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*"))
    fsdp = {switch: FSDPConfig(fsdp_size=size, enable_rank0_init=switch) for switch in (True, False)}
    read = ranks.tensors_of([whole] * 4, fsdp[False], with_critic)[0]
    assert any("inv_freq" in name for name in read)
    for held in ranks.tensors_of([whole] + [str(bare)] * 3, fsdp[True], with_critic):
        assert_equal(held, read)
        if tied and not with_critic:
            assert torch.equal(held["lm_head.weight"], held["model.language_model.embed_tokens.weight"])


@pytest.mark.parametrize("precision", [(), BF16], ids=["fp32", "bf16"])
def test_a_checkpoint_goes_on_in_other_sharding_groups_and_on_other_numbers_of_workers(
    precision: tuple[str, ...],
    tiny_model_path: str,
    batch: DataProto,
    ranks: WorkerGroup,
    lone_process_group,
    tmp_path: Path,
) -> None:
    """From two groups of two to one of four, to a single worker, and back to four."""

    def config(*keys: str) -> PPOConfig:
        return make_config(tiny_model_path, MICRO_BATCHES, *FAST, *precision, *keys)

    ranks.restart(config("worker.actor.fsdp.fsdp_size=2"))
    ranks.update_actor(batch)
    weights, states = ranks.weights()[0], ranks.states()[0]
    assert any(name.endswith("exp_avg_sq") and value.any() for name, value in states.items())
    ranks.save_checkpoint(str(tmp_path / "0"), model_only=False)
    expected = without_clock(ranks.update_actor(batch))

    ranks.restart(config())
    ranks.load_checkpoint(str(tmp_path / "0"), model_only=False)
    for rank in range(4):
        assert_equal(ranks.weights()[rank], weights)
        assert_equal(ranks.states()[rank], states)
    ranks.save_checkpoint(str(tmp_path / "1"), model_only=False)
    assert without_clock(ranks.update_actor(batch)) == pytest.approx(expected, rel=1e-3, abs=1e-5)

    alone = start_alone(config())
    alone.load_checkpoint(str(tmp_path / "1"), model_only=False)
    assert_equal(alone.weights(), weights)
    assert_equal(alone.states(), states)
    alone.save_checkpoint(str(tmp_path / "2"), model_only=False)

    ranks.restart(config())
    ranks.load_checkpoint(str(tmp_path / "2"), model_only=False)
    assert_equal(ranks.weights()[3], weights)
    assert_equal(ranks.states()[3], states)


def test_a_model_that_is_not_the_one_that_rank_0_sends_is_refused_by_the_tensor(
    tiny_model_path: str, ranks: WorkerGroup, tmp_path: Path
) -> None:
    """The last of these tests: ranks do not outlive it."""
    other = make_tiny_model(tmp_path, vision_depth=2)
    with pytest.raises(ValueError, match=r"model\.visual\.blocks\.1\..* and None in the one read from its files"):
        ranks.tensors_of([tiny_model_path] + [other] * 3, FSDPConfig(), False)
