# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_frozen_vision.py
"""A frozen vision tower stays as it is and costs no gradient, and all the rest trains as it would without."""

from pathlib import Path

import pytest
import torch

from tests.batches import answer_at_random, make_prompts
from tests.probe import (
    RESPONSE_LENGTH,
    RESPONSES_PER_PROMPT,
    WITH_CRITIC,
    make_config,
    start_alone,
    start_two,
    without_clock,
)
from tests.tiny import make_tiny_text_model
from verl.models.loader import load_model
from verl.models.trainable import choose_trainable
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.workers.actor.config import ModelConfig

FROZEN = ("worker.actor.model.freeze_vision_tower=true", "worker.critic.model.freeze_vision_tower=true")
FAST = ("worker.actor.optim.lr=1e-2", "worker.critic.optim.lr=1e-2")
TOWER = "model.visual."


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, ray_cluster, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight rows: the first four with images, the last four text only, so one of two ranks has no image."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    return answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH)


def test_the_tower_has_neither_gradient_nor_optimizer_state_and_does_not_move(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    worker = start_alone(make_config(tiny_model_path, *WITH_CRITIC, *FROZEN, *FAST))
    worker.fill_value_head()
    for name, update in (("actor", worker.update_actor), ("critic", worker.update_critic)):
        trained, before = worker.trained[name], worker.weights(name)
        gradients_seen = []
        trained.optimizer.register_step_pre_hook(
            lambda *_, model=trained.model, seen=gradients_seen: seen.extend(
                part for part, parameter in model.named_parameters() if parameter.grad is not None
            )
        )
        update(batch)
        outside = {part for part in before if not part.startswith(TOWER)}
        assert 0 < len(outside) < len(before)
        assert set(gradients_seen) == outside
        assert len(trained.optimizer.state) == len(outside)
        moved = {part for part, value in worker.weights(name).items() if not torch.equal(value, before[part])}
        assert moved and moved <= outside


@pytest.mark.parametrize("rows", [list(range(8)), [4, 5, 6, 7] * 2], ids=["some images", "no image"])
def test_every_other_gradient_is_what_it_would_be_with_the_tower_training(
    rows: list[int], tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    frozen, whole = (start_alone(make_config(tiny_model_path, *WITH_CRITIC, *keys)) for keys in (FROZEN, ()))
    for compute in ("gradients", "critic_gradients"):
        for worker in (frozen, whole):
            worker.fill_value_head()
        (found, metrics), (expected, expected_metrics) = (
            getattr(worker, compute)(batch[rows], "token") for worker in (frozen, whole)
        )
        assert metrics == expected_metrics
        assert found.keys() == {name for name in expected if not name.startswith(TOWER)}
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.fixture(scope="module")
def two_frozen(tiny_model_path: str, ray_cluster):
    micro = [f"worker.{name}.micro_batch_size_per_device_for_update=2" for name in ("actor", "critic")]
    group = start_two(make_config(tiny_model_path, *WITH_CRITIC, *FROZEN, *micro))
    group.fill_value_head()
    yield group
    group.release()


def test_two_ranks_give_the_gradient_of_one_though_the_second_has_no_image(
    tiny_model_path: str, batch: DataProto, lone_process_group, two_frozen: WorkerGroup
) -> None:
    alone = start_alone(make_config(tiny_model_path, *WITH_CRITIC, *FROZEN))
    alone.fill_value_head()
    for compute in ("gradients", "critic_gradients"):
        (whole, metrics), (shared, shared_metrics) = (
            getattr(workers, compute)(batch, "token") for workers in (alone, two_frozen)
        )
        assert shared_metrics == pytest.approx(metrics, rel=1e-5)
        assert shared.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(shared[name], value, atol=1e-5 * value.abs().max().item() + 1e-9, rtol=0)


def test_a_checkpoint_holds_the_tower_too_and_resumes_exactly(
    tiny_model_path: str, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    config = make_config(tiny_model_path, *FROZEN, *FAST)
    first = start_alone(config)
    first.update_actor(batch)
    first.save_checkpoint(str(tmp_path), model_only=False)
    expected = without_clock(first.update_actor(batch))
    saved = torch.load(tmp_path / "actor" / "model_world_size_1_rank_0.pt")
    assert saved.keys() == first.weights().keys()
    second = start_alone(config)
    second.load_checkpoint(str(tmp_path), model_only=False)
    assert without_clock(second.update_actor(batch)) == expected
    after = first.weights()
    assert all(torch.equal(value, after[name]) for name, value in second.weights().items())


def test_a_model_without_a_tower_trains_whole(tmp_path: Path) -> None:
    config = ModelConfig(model_path=make_tiny_text_model(tmp_path), freeze_vision_tower=True)
    model = load_model(config, torch.float32, torch.float32)
    choose_trainable(model, config)
    assert all(parameter.requires_grad for parameter in model.parameters())
