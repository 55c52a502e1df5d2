# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_full_kl.py
"""The KL over the whole vocabulary, in the reward and in the loss: equal to two bare models, however it is cut."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.batches import answer_at_random, make_prompts, response_logits, with_random_weights
from tests.probe import RESPONSE_LENGTH, RESPONSES_PER_PROMPT, ProbeWorker, make_config, start_alone, start_two
from verl.protocol import DataProto
from verl.trainer.config import PPOConfig

TEMPERATURE, COEFFICIENT, AWAY = 0.7, 0.1, 2.0
"""Of the sampler; of the KL loss; what the policy's weights are multiplied by."""


def full_kl(model_path: str, *overrides: str) -> PPOConfig:
    temperature = f"worker.rollout.temperature={TEMPERATURE}"
    return make_config(model_path, "algorithm.kl_penalty=full", temperature, *overrides)


def start_away(config: PPOConfig) -> ProbeWorker:
    worker = start_alone(config)
    worker.scale_weights(AWAY)
    return worker


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight rows with token weights and without the reference's log-probs, four of them with images."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    batch = with_random_weights(answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH))
    del batch.batch["ref_log_probs"]
    return batch


def log_distribution(logits: torch.Tensor) -> torch.Tensor:
    """Over the ids that can be sampled: minus infinity times zero has no gradient."""
    return (logits[:, logits[0].isfinite()] / TEMPERATURE).log_softmax(-1)


@pytest.fixture(scope="module")
def expected(tiny_model_path: str, batch: DataProto) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """KL of each row's tokens from two bare models, and the gradient of its weighted token mean."""
    processor = AutoProcessor.from_pretrained(tiny_model_path)
    policy, reference = (
        AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32) for _ in range(2)
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(AWAY)
    of_rows = []
    for index in range(len(batch)):
        row = batch[index]
        with torch.no_grad():
            log_q = log_distribution(response_logits(reference, processor, row))
        log_p = log_distribution(response_logits(policy, processor, row))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # (length,)
        (kl * row.batch["token_weights"][: len(kl)]).sum().div(batch.batch["response_mask"].sum()).backward()
        of_rows.append(kl.detach())
    return of_rows, {name: value.grad for name, value in policy.named_parameters() if value.grad is not None}


def test_in_the_reward_it_is_that_of_two_bare_models_row_by_row(
    tiny_model_path: str, batch: DataProto, expected, lone_process_group
) -> None:
    kl = start_away(full_kl(tiny_model_path)).compute_ref_kl(batch).batch["ref_kl"]
    assert kl.dtype == torch.float32
    for index, of_row in enumerate(expected[0]):
        assert of_row.min() > 1e-4
        torch.testing.assert_close(kl[index, : len(of_row)], of_row, atol=1e-5, rtol=1e-4)
        assert (kl[index, len(of_row) :] == 0).all()


def test_in_the_loss_its_weighted_gradient_is_that_of_two_bare_models(
    tiny_model_path: str, batch: DataProto, expected, lone_process_group
) -> None:
    """Without advantages only the KL loss is left; the reference itself gets no gradient."""
    worker = start_away(full_kl(tiny_model_path))
    rows = batch[list(range(8))]
    rows.batch["advantages"] = torch.zeros(8, RESPONSE_LENGTH)
    gradients, metrics = worker.gradients(rows, "token")
    of_rows, of_parameters = expected
    weighted = [kl * weights[: len(kl)] for kl, weights in zip(of_rows, rows.batch["token_weights"], strict=True)]
    assert metrics["actor/kl_loss"] == pytest.approx((torch.cat(weighted).sum() / len(torch.cat(weighted))).item())
    for name, value in of_parameters.items():
        torch.testing.assert_close(gradients[name], COEFFICIENT * value, atol=1e-6, rtol=1e-3)
    assert all(parameter.grad is None for parameter in worker.ref_model.parameters())


@pytest.mark.parametrize("loss_avg_mode", ["token", "seq"])
def test_neither_micro_batches_nor_ranks_change_it(
    loss_avg_mode: str, tiny_model_path: str, batch: DataProto, lone_process_group, two_ranks_away
) -> None:
    whole = start_away(full_kl(tiny_model_path))
    gradients, metrics = whole.gradients(batch, loss_avg_mode)
    one_by_one = start_away(full_kl(tiny_model_path, "worker.actor.micro_batch_size_per_device_for_update=1"))
    for workers in (one_by_one, two_ranks_away):
        others, other_metrics = workers.gradients(batch, loss_avg_mode)
        assert other_metrics == pytest.approx(metrics, rel=1e-5)
        for name, value in gradients.items():
            torch.testing.assert_close(others[name], value, atol=1e-5 * value.abs().max().item() + 1e-9, rtol=0)
    kl = whole.compute_ref_kl(batch).batch["ref_kl"]
    torch.testing.assert_close(two_ranks_away.compute_ref_kl(batch).batch["ref_kl"], kl, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def two_ranks_away(tiny_model_path: str, ray_cluster):
    group = start_two(full_kl(tiny_model_path, "worker.actor.micro_batch_size_per_device_for_update=2"))
    group.scale_weights(AWAY)
    yield group
    group.release()


def test_a_policy_that_has_not_moved_yet_has_none(tiny_model_path: str, batch: DataProto, lone_process_group) -> None:
    worker = start_alone(full_kl(tiny_model_path))
    assert worker.compute_ref_kl(batch).batch["ref_kl"].abs().max() < 1e-6
    _, metrics = worker.gradients(batch, "token")
    assert metrics["actor/kl_loss"] == pytest.approx(0, abs=1e-6)


def test_a_kl_loss_brings_a_policy_that_moved_away_back_to_its_reference(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    worker = start_away(
        full_kl(
            tiny_model_path,
            "algorithm.kl_coef=10",
            "worker.actor.optim.lr=1e-3",
            "algorithm.enable_token_weights=true",
        )
    )
    rows = batch[list(range(8))]
    rows.batch["advantages"] = torch.zeros(8, RESPONSE_LENGTH)
    losses = [worker.update_actor(rows)["actor/kl_loss"] for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
