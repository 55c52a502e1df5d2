# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_value_update.py
"""The critic's values stand where they should, and its update depends neither on micro-batches nor on ranks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_qwen import build_model, build_processor, build_tokenizer, save_tiny
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.batches import answer_at_random, make_prompts
from tests.probe import (
    RESPONSE_LENGTH,
    RESPONSES_PER_PROMPT,
    WITH_CRITIC,
    ProbeWorker,
    make_config,
    start_alone,
    start_two,
    without_clock,
)
from tests.test_policy_update import largest_relative_difference
from tests.tiny import make_tiny_model
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.config import PPOConfig
from verl.utils.masked_ops import masked_mean
from verl.workers.actor.config import ModelConfig


def critic_config(model_path: str, *overrides: str) -> PPOConfig:
    return make_config(model_path, *WITH_CRITIC, "algorithm.disable_kl=true", *overrides)


def start_with_values(config: PPOConfig) -> ProbeWorker:
    """One rank whose value head is not zero."""
    worker = start_alone(config)
    worker.fill_value_head()
    return worker


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight rows: the first four with images, the last four text only, so one of two ranks has no image."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    return answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH)


@pytest.fixture(scope="module")
def two_critics(tiny_model_path: str, ray_cluster) -> Iterator[WorkerGroup]:
    sizes = [f"worker.{name}.micro_batch_size_per_device_for_update=2" for name in ("actor", "critic")]
    group = start_two(critic_config(tiny_model_path, *sizes))
    group.fill_value_head()
    yield group
    group.release()


def test_the_first_values_are_zero(tiny_model_path: str, batch: DataProto, lone_process_group) -> None:
    values = start_alone(critic_config(tiny_model_path)).compute_values(batch).batch["values"]
    assert values.dtype == torch.float32
    assert torch.equal(values, torch.zeros(len(batch), RESPONSE_LENGTH))


def test_values_are_those_of_a_plain_forward_of_each_row_alone_before_each_token(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """No padding, no batching, no trimming: each row's real tokens through the bare backbone, images and all."""
    worker = start_with_values(critic_config(tiny_model_path))
    values = worker.compute_values(batch).batch["values"]
    head = worker.weights("critic")
    processor = AutoProcessor.from_pretrained(tiny_model_path)
    backbone = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32).eval().model
    for index in range(len(batch)):
        row = batch[index]
        ids = row.batch["input_ids"][row.batch["attention_mask"].bool()][None]
        length = int(row.batch["response_mask"].sum())
        images = [handle.load() for handle in row.non_tensor_batch["multi_modal_data"] or []]
        media = processor.image_processor(images, return_tensors="pt") if images else {}
        token_types = (ids == backbone.config.image_token_id).long()
        with torch.no_grad():
            hidden = backbone(input_ids=ids, mm_token_type_ids=token_types, **media).last_hidden_state[0]
        expected = hidden @ head["value_head.weight"][0] + head["value_head.bias"]
        torch.testing.assert_close(values[index, :length], expected[-length - 1 : -1], atol=1e-5, rtol=1e-5)
        assert (values[index, length:] == 0).all()


def test_a_pass_makes_no_number_for_the_prompt_and_none_for_the_vocabulary(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    worker = start_alone(critic_config(tiny_model_path))
    assert not hasattr(worker.critic.model, "lm_head")
    shapes = []
    worker.critic.model.register_forward_hook(lambda _, __, output: shapes.append(output.logits.shape))
    worker.compute_values(batch)
    assert shapes and all(shape[1] <= RESPONSE_LENGTH + 1 and shape[2] == 1 for shape in shapes)


@pytest.mark.parametrize("loss_avg_mode", ["token", "seq"])
def test_many_micro_batches_give_the_gradient_of_one(
    loss_avg_mode: str, tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    whole, metrics = start_with_values(critic_config(tiny_model_path)).critic_gradients(batch, loss_avg_mode)
    assert all((gradient != 0).any() for name, gradient in whole.items() if "visual" in name)
    for size in (1, 2):
        split = f"worker.critic.micro_batch_size_per_device_for_update={size}"
        worker = start_with_values(critic_config(tiny_model_path, split))
        parts, metrics_of_parts = worker.critic_gradients(batch, loss_avg_mode)
        assert largest_relative_difference(whole, parts) < 1e-5
        assert metrics_of_parts == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("loss_avg_mode", ["token", "seq"])
def test_two_ranks_give_the_gradient_of_one_though_the_second_has_no_image(
    loss_avg_mode: str, tiny_model_path: str, batch: DataProto, lone_process_group, two_critics: WorkerGroup
) -> None:
    whole, metrics = start_with_values(critic_config(tiny_model_path)).critic_gradients(batch, loss_avg_mode)
    shared, shared_metrics = two_critics.critic_gradients(batch, loss_avg_mode)
    assert largest_relative_difference(whole, shared) < 1e-5
    assert shared_metrics == pytest.approx(metrics, rel=1e-5)


def test_two_ranks_give_the_values_of_one_in_the_order_of_the_rows(
    tiny_model_path: str, batch: DataProto, lone_process_group, two_critics: WorkerGroup
) -> None:
    whole = start_with_values(critic_config(tiny_model_path)).compute_values(batch).batch["values"]
    torch.testing.assert_close(two_critics.compute_values(batch).batch["values"], whole, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_mean_over_tokens_or_over_responses_of_the_clipped_squared_error(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """Written out from the critic's own values, with the clip range of 0.5."""
    worker = start_with_values(critic_config(tiny_model_path))
    values, streams = worker.compute_values(batch).batch["values"], batch.batch
    mask, old_values, returns = streams["response_mask"], streams["values"], streams["returns"]
    clipped = torch.minimum(torch.maximum(values, old_values - 0.5), old_values + 0.5)
    error = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    expected = {"token": masked_mean(error, mask), "seq": masked_mean(error, mask, dim=-1).mean()}
    for mode, loss in expected.items():
        _, metrics = worker.critic_gradients(batch, mode)
        assert metrics == pytest.approx(
            {
                "critic/vf_loss": loss.item(),
                "critic/vpred_mean": masked_mean(values, mask).item(),
                "critic/vf_clipfrac": masked_mean(
                    ((clipped - returns) ** 2 > (values - returns) ** 2).float(), mask
                ).item(),
            },
            rel=1e-5,
        )
        assert 0 < metrics["critic/vf_clipfrac"] < 1


def test_a_critic_of_a_constant_reward_learns_it(tiny_model_path: str, batch: DataProto, lone_process_group) -> None:
    """Returns of 2 everywhere, from values of 0: a step may gain from at most 0.5, and after some all values are 2."""
    config = critic_config(tiny_model_path, "worker.critic.optim.lr=3e-3", "worker.critic.optim.lr_warmup_steps=2")
    worker = start_alone(config)
    rows, mask = batch[list(range(len(batch)))], batch.batch["response_mask"].bool()
    rows.batch["returns"] = torch.full((len(batch), RESPONSE_LENGTH), 2.0)
    losses, rates = [], []
    for _ in range(25):
        rows.batch["values"] = worker.compute_values(rows).batch["values"]
        metrics = worker.update_critic(rows)
        losses.append(metrics["critic/vf_loss"])
        rates.append(metrics["critic/lr"])
    assert losses[0] == pytest.approx(2.0)
    assert losses[-1] < 0.02
    assert (worker.compute_values(rows).batch["values"][mask] - 2).abs().max() < 0.3
    assert rates[:4] == pytest.approx([0, 1.5e-3, 3e-3, 3e-3])
    assert metrics.pop("perf/tflops_critic") > 0
    names = ("vf_loss", "vf_clipfrac", "vpred_mean", "grad_norm", "lr", "skipped_steps")
    assert set(metrics) == {f"critic/{name}" for name in names}


def test_an_update_of_the_critic_leaves_the_actor_alone_and_the_other_way_round(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """They begin with the same weights, from the same files, and share none."""
    worker = start_alone(critic_config(tiny_model_path, "worker.critic.optim.lr=1e-3", "worker.actor.optim.lr=1e-3"))
    before = worker.weights()
    worker.update_critic(batch)
    worker.update_critic(batch)  # the head of the first was zero, and passed nothing on
    assert all(torch.equal(value, before[name]) for name, value in worker.weights().items())
    critic = worker.weights("critic")
    assert any(not torch.equal(value, critic[name]) for name, value in before.items() if name != "lm_head.weight")
    worker.update_actor(batch)
    assert all(torch.equal(value, critic[name]) for name, value in worker.weights("critic").items())


def test_a_checkpoint_keeps_the_critic_beside_the_actor_and_restores_it_exactly(
    tiny_model_path: str, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    config = critic_config(tiny_model_path, "worker.critic.optim.lr=1e-3", "worker.critic.optim.lr_warmup_steps=4")
    first = start_alone(config)
    first.update_critic(batch)
    first.update_critic(batch)
    first.save_checkpoint(str(tmp_path), model_only=False)
    expected = without_clock(first.update_critic(batch))
    second = start_alone(config)
    second.load_checkpoint(str(tmp_path), model_only=False)
    assert without_clock(second.update_critic(batch)) == expected
    after = first.weights("critic")
    assert all(torch.equal(value, after[name]) for name, value in second.weights("critic").items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["actor", "critic"]
    saved = torch.load(tmp_path / "critic" / "model_world_size_1_rank_0.pt", weights_only=False)
    assert saved.keys() == after.keys()
    assert '"ValueModel"' in (tmp_path / "critic" / "huggingface" / "config.json").read_text()
    assert (tmp_path / "critic" / "huggingface" / "tokenizer.json").exists()


def test_a_checkpoint_of_two_ranks_restores_the_critic_though_one_holds_nothing_of_its_head(
    batch: DataProto, two_critics: WorkerGroup, tmp_path: Path
) -> None:
    two_critics.update_critic(batch)  # so that there are moments to keep
    before = two_critics.weights("critic")[0]
    two_critics.save_checkpoint(str(tmp_path), model_only=False)
    two_critics.update_critic(batch)
    changed = two_critics.weights("critic")[0]
    assert not torch.equal(changed["value_head.weight"], before["value_head.weight"])
    two_critics.load_checkpoint(str(tmp_path), model_only=False)
    for weights in two_critics.weights("critic"):
        assert all(torch.equal(value, before[name]) for name, value in weights.items())
    assert len(list((tmp_path / "critic").glob("*_world_size_2_rank_*.pt"))) == 6
    two_critics.update_critic(batch)
    again = two_critics.weights("critic")[0]
    assert all(torch.equal(value, changed[name]) for name, value in again.items())
    two_critics.load_checkpoint(str(tmp_path), model_only=False)


def test_a_checkpoint_without_a_critic_is_refused_by_a_run_with_one(
    tiny_model_path: str, lone_process_group, tmp_path: Path
) -> None:
    start_alone(make_config(tiny_model_path)).save_checkpoint(str(tmp_path), model_only=False)
    worker = start_alone(critic_config(tiny_model_path))
    with pytest.raises(ValueError, match=r"/critic does not exist.* trained no critic.*algorithm.adv_estimator"):
        worker.load_checkpoint(str(tmp_path), model_only=False)


def test_a_critic_without_a_model_of_its_own_has_the_actors_as_the_actor_has_it(
    tiny_model_path: str, lone_process_group
) -> None:
    """Tokenizer, overrides and trust come with the path; how the model is trained stays the critic's own."""
    overrides = {"attn_implementation": "eager", "text_config": {"rms_norm_eps": 0.5}}
    actor = ModelConfig(tiny_model_path, "org/tokenizer", overrides, trust_remote_code=False)
    found = ModelConfig(enable_gradient_checkpointing=False, override_config={"a": 1}).with_default_model(actor)
    assert found == replace(actor, enable_gradient_checkpointing=False)
    own = ModelConfig("org/critic", override_config={"a": 1})
    assert own.with_default_model(actor) == own

    keys = "{attn_implementation: eager, text_config: {rms_norm_eps: 0.5}}"
    worker = start_alone(critic_config(tiny_model_path, f"worker.actor.model.override_config={keys}"))
    for model in (worker.actor.model, worker.critic.model):
        text_config = model.config.get_text_config()
        assert (text_config.rms_norm_eps, text_config._attn_implementation) == (0.5, "eager")


def test_a_critic_may_have_a_model_of_its_own_with_the_same_vocabulary(
    tiny_model_path: str, lone_process_group, tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1, num_layers=3)
    worker = start_alone(critic_config(tiny_model_path, f"worker.critic.model.model_path={other}"))
    weights = worker.weights("critic")
    expected = AutoModelForImageTextToText.from_pretrained(other, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items() if "value_head" not in name)

    tokenizer = build_tokenizer(["another text, other tokens"])
    model = build_model(
        tokenizer, 0, hidden_size=64, num_layers=2, num_heads=4, vision_hidden_size=32, vision_depth=1, vision_heads=2
    )
    stranger = save_tiny(tmp_path / "stranger", model, build_processor(tokenizer))
    with pytest.raises(ValueError, match=f"worker.critic.model.model_path={stranger} has another vocabulary"):
        start_alone(critic_config(tiny_model_path, f"worker.critic.model.model_path={stranger}"))
