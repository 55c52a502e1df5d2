# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_sequence_parallel.py
"""Ranks that share their rows (Ulysses) give what one rank gives: log-probs, attention masses, gradients, values."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.batches import answer_at_random, make_prompts, with_random_weights
from tests.family_models import make_family_model
from tests.probe import (
    RESPONSE_LENGTH,
    RESPONSES_PER_PROMPT,
    WITH_CRITIC,
    make_config,
    start_alone,
    start_group,
    start_two,
)
from tests.test_families import make_family_prompts
from tests.tiny import CORPUS, build_tokenizer, make_tiny_text_model
from tests.vlm_zoo import TEXT_CONFIG, make_model
from verl.models.attention_maps import AttentionMaps, MapRequest
from verl.models.attention_table import SAMPLES
from verl.models.kernels.attention_mass import KeyPlan
from verl.models.sequence_parallel import SequenceGroup, share_rows
from verl.protocol import DataProto
from verl.utils.batch_plan import BatchPlan
from verl.utils.seqlen_balancing import balanced_order

COLLECT = "worker.rollout.collect_attentions=true"
SHARED = ("worker.actor.ulysses_size=2", "worker.critic.ulysses_size=2")
PADDED = "worker.actor.padding_free=false"
FEW = ("worker.actor.global_batch_size=2", "worker.actor.micro_batch_size_per_device_for_update=1")
SMALL = tuple(f"worker.{model}.micro_batch_size_per_device_for_update=2" for model in ("actor", "critic"))


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight rows with token weights: the first four with images, the last four text only."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    return with_random_weights(answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=tolerance * value.abs().max().item() + 1e-9, rtol=0, msg=name
        )


@pytest.fixture(scope="module")
def pair(tiny_model_path: str, ray_cluster):
    """Two ranks that share every row, with a reference and a critic."""
    group = start_two(make_config(tiny_model_path, COLLECT, *WITH_CRITIC, *SMALL, *SHARED))
    group.fill_value_head()
    yield group
    group.release()


def test_two_ranks_that_share_rows_see_what_one_sees(
    tiny_model_path: str, batch: DataProto, pair, lone_process_group
) -> None:
    """Log-probs of policy and reference, and the masses, whose heads are on both ranks."""
    alone = start_alone(make_config(tiny_model_path, COLLECT))
    for compute in ("compute_log_probs", "compute_ref_log_probs"):
        expected = dict(getattr(alone, compute)(batch).batch.items())
        for name, value in getattr(pair, compute)(batch).batch.items():
            torch.testing.assert_close(value, expected.pop(name), atol=1e-5, rtol=0)
        assert not expected


def test_two_ranks_that_share_heads_see_the_maps_that_one_sees(
    tiny_model_path: str, batch: DataProto, pair, lone_process_group
) -> None:
    wanted = torch.tensor([True, False] * (len(batch) // 2))
    asked = DataProto(
        batch=batch.batch.clone(recurse=False).set("is_mapped", wanted), non_tensor_batch=batch.non_tensor_batch
    )
    alone = start_alone(make_config(tiny_model_path, COLLECT)).compute_log_probs(asked)
    shared = pair.compute_log_probs(asked)
    masses = shared.batch["attention_mass"]
    for row, (one, other) in enumerate(
        zip(*(found.non_tensor_batch["attention_maps"] for found in (alone, shared)), strict=True)
    ):
        assert (one is None) == (other is None) == (not wanted[row])
        if one is not None:
            assert other.vision == pytest.approx(one.vision, abs=1e-5)
            of_row = masses[row, batch.batch["response_mask"][row].bool()]
            assert other.layer_masses.mean(axis=0) == pytest.approx(of_row.numpy(), abs=1e-6)


def test_groups_of_heads_are_refused_where_ranks_share_the_heads() -> None:
    plan = KeyPlan.from_kinds(torch.tensor([[1, 2, 3, 5]]), 1)
    group = SequenceGroup(None, size=2, rank=0)
    AttentionMaps(plan, MapRequest(rows=(0,)), [0], group)
    with pytest.raises(ValueError, match="head_groups=2: groups of heads are not told apart where 2 ranks"):
        AttentionMaps(plan, MapRequest(rows=(0,), head_groups=2), [0], group)


@pytest.mark.parametrize("mode", ["token", "seq"])
@pytest.mark.parametrize("loss_type", ["default", "gspo"])
def test_two_ranks_that_share_rows_have_the_gradient_of_one(
    mode: str, loss_type: str, tiny_model_path: str, batch: DataProto, pair, lone_process_group
) -> None:
    """Vision tower included, whose every image both ranks see whole."""
    gradients, metrics = start_alone(make_config(tiny_model_path, COLLECT)).gradients(batch, mode, loss_type)
    shared, shared_metrics = pair.gradients(batch, mode, loss_type)
    assert any("visual" in name and value.abs().max() > 0 for name, value in gradients.items())
    assert shared_metrics == pytest.approx(metrics, rel=1e-5)
    assert_same(shared, gradients)


def test_two_ranks_that_share_rows_have_the_values_of_one(
    tiny_model_path: str, batch: DataProto, pair, lone_process_group
) -> None:
    alone = start_alone(make_config(tiny_model_path, *WITH_CRITIC))
    alone.fill_value_head()
    values, expected = (worker.compute_values(batch).batch["values"] for worker in (pair, alone))
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
    (shared, _), (gradients, _) = (worker.critic_gradients(batch, "token") for worker in (pair, alone))
    assert_same(shared, gradients)


def test_two_pairs_take_the_training_step_of_one_rank(
    tiny_model_path: str, batch: DataProto, ray_cluster, lone_process_group
) -> None:
    """Four ranks, two mini-batches, a full KL: rows are spread over the pairs as a run does it, and each counts once.

    The metrics are means over two optimizer steps; the second depends on the first.
    """
    keys = (
        COLLECT,
        "algorithm.kl_penalty=full",
        "worker.actor.global_batch_size=2",
        "worker.actor.micro_batch_size_per_device_for_update=1",
        "worker.actor.optim.lr=1e-3",
    )
    alone, group = (
        start_alone(make_config(tiny_model_path, *keys)),
        start_group(make_config(tiny_model_path, *keys, *SHARED), 4),
    )
    try:
        gradients, shared_gradients = (workers.gradients(batch, "token")[0] for workers in (alone, group))
        metrics = alone.update_actor(batch)
        lengths = batch.batch["attention_mask"].sum(dim=1).tolist()
        shared_metrics = group.update_actor(batch[balanced_order(lengths, num_ranks=4, num_mini_batches=2)])
    finally:
        group.release()
    assert_same(shared_gradients, gradients)
    for one in (metrics, shared_metrics):
        assert one.pop("perf/tflops_actor") > 0
    assert shared_metrics == pytest.approx(metrics, rel=1e-4)


def test_a_text_model_is_shared_too(tmp_path, batch: DataProto, ray_cluster, lone_process_group) -> None:
    path = make_tiny_text_model(tmp_path / "text")
    rows = batch[4:]
    rows.batch["position_ids"] = rows.batch["position_ids"][:, 0].clone()
    gradients, metrics = start_alone(make_config(path, *FEW)).gradients(rows, "token")
    group = start_two(make_config(path, *FEW, *SHARED))
    try:
        shared, shared_metrics = group.gradients(rows, "token")
    finally:
        group.release()
    assert shared_metrics == pytest.approx(metrics, rel=1e-5)
    assert_same(shared, gradients)


def test_a_model_with_windows_and_fewer_key_heads_than_ranks_is_shared_too(
    tmp_path, batch: DataProto, ray_cluster, lone_process_group
) -> None:
    """Two of four queries on each rank, and on both the only key: rows are longer than the window and need a mask."""
    tokenizer = build_tokenizer(CORPUS)
    text = dict(TEXT_CONFIG, vocab_size=len(tokenizer), num_key_value_heads=1, sliding_window=4)
    model = make_model("MistralForCausalLM", transformers.MistralConfig(**text))
    path = str(tmp_path / "windowed")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    rows = batch[4:]
    rows.batch["position_ids"] = rows.batch["position_ids"][:, 0].clone()
    group = start_two(make_config(path, *FEW, *SHARED))
    try:
        shared, _ = group.gradients(rows, "token")
    finally:
        group.release()
    gradients, _ = start_alone(make_config(path, *FEW, PADDED)).gradients(rows, "token")
    assert_same(shared, gradients)


def test_ranks_share_rows_of_every_family_that_packs(tmp_path, private_cache, ray_cluster, lone_process_group) -> None:
    """Qwen3-VL too, whose deeper layers are given features of the image tokens, which each rank has its own of."""
    few = ("worker.actor.micro_batch_size_per_device_for_update=1", COLLECT)
    group = None
    try:
        for name in ("Qwen3-VL", "GLM-4V", "InternVL", "LLaVA", "Mistral 3"):
            folder = tmp_path / name
            path = make_family_model(name, folder / "model")
            rows = answer_at_random(make_family_prompts(path, folder), RESPONSES_PER_PROMPT, RESPONSE_LENGTH)
            alone, config = start_alone(make_config(path, *few)), make_config(path, *few, *SHARED)
            if group is None:
                group = start_two(config)
            else:
                group.restart(config)
            masses, expected = (worker.compute_log_probs(rows).batch for worker in (group, alone))
            for stream, value in expected.items():
                torch.testing.assert_close(masses[stream], value, atol=1e-5, rtol=0, msg=f"{name}: {stream}")
            (shared, _), (gradients, _) = (worker.gradients(rows, "token") for worker in (group, alone))
            of_tower = [value for of, value in gradients.items() if "deepstack" in of]
            assert bool(of_tower) == (name == "Qwen3-VL") and all(value.abs().max() > 0 for value in of_tower)
            assert_same(shared, gradients)
    finally:
        if group is not None:
            group.release()


def test_heads_that_cannot_be_shared_are_refused_with_what_can() -> None:
    """Six heads over two key-value heads: two ranks halve both, six have one each of the repeated ones."""
    config = transformers.Qwen2Config(**{**TEXT_CONFIG, "num_attention_heads": 6, "num_key_value_heads": 2})
    model = make_model("Qwen2ForCausalLM", config)
    with pytest.raises(ValueError, match=r"ulysses_size=4: 6 attention heads and 2 key-value heads .*; use 1, 2, 6$"):
        share_rows(model, 4, SAMPLES)
    share_rows(model, 6, SAMPLES)


def test_ranks_that_do_not_come_in_whole_groups_are_refused(tiny_model_path: str) -> None:
    config = make_config(tiny_model_path, "worker.actor.ulysses_size=2")
    with pytest.raises(ValueError, match=r"=1 is not a multiple of worker.actor.ulysses_size=2; use 2"):
        BatchPlan.from_config(config, 1)


def test_a_slice_is_the_ranks_own_share() -> None:
    slices = [SequenceGroup(None, 3, rank).local_slice(12) for rank in range(3)]
    assert slices == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(AssertionError, match="13 tokens do not divide over 3 ranks"):
        SequenceGroup(None, 3, 0).local_slice(13)
