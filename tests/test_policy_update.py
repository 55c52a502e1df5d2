# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_policy_update.py
"""The gradient of a mini-batch depends neither on micro-batches nor on ranks, and equals one written out by hand."""

from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.batches import answer_at_random, make_prompts, response_logits
from tests.probe import RESPONSE_LENGTH, RESPONSES_PER_PROMPT, make_config, start_alone
from verl.data.features import Featurizer
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.workers.rollout.base import Sampling


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight rows: the first four with images, the last four text only, so one of two ranks has no image."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    return answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH)


def largest_relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(
        ((left[name] - right[name]).abs().max() / left[name].abs().max().clamp(min=1e-8)).item() for name in left
    )


@pytest.mark.parametrize("loss_avg_mode", ["token", "seq"])
def test_many_micro_batches_give_the_gradient_of_one(
    loss_avg_mode: str, tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    whole, metrics = start_alone(make_config(tiny_model_path)).gradients(batch, loss_avg_mode)
    for size in (1, 2):
        split = f"worker.actor.micro_batch_size_per_device_for_update={size}"
        parts, metrics_of_parts = start_alone(make_config(tiny_model_path, split)).gradients(batch, loss_avg_mode)
        assert largest_relative_difference(whole, parts) < 1e-5
        assert metrics_of_parts == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("loss_avg_mode", ["token", "seq"])
def test_two_ranks_give_the_gradient_of_one_though_the_second_has_no_image(
    loss_avg_mode: str, tiny_model_path: str, batch: DataProto, lone_process_group, two_ranks: WorkerGroup
) -> None:
    whole, metrics = start_alone(make_config(tiny_model_path)).gradients(batch, loss_avg_mode)
    shared, shared_metrics = two_ranks.gradients(batch, loss_avg_mode)
    assert largest_relative_difference(whole, shared) < 1e-5
    assert shared_metrics == pytest.approx(metrics, rel=1e-5)


def test_two_ranks_give_the_log_probs_of_one_in_the_order_of_the_rows(
    tiny_model_path: str, batch: DataProto, lone_process_group, two_ranks: WorkerGroup
) -> None:
    alone = start_alone(make_config(tiny_model_path))
    for compute in ("compute_log_probs", "compute_ref_log_probs"):
        whole, shared = getattr(alone, compute)(batch).batch, getattr(two_ranks, compute)(batch).batch
        for name in whole.keys():
            torch.testing.assert_close(shared[name], whole[name], atol=1e-5, rtol=1e-5)


def test_recomputing_activations_changes_no_gradient(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """Checkpointing is on by default; layers are then run twice, which shows in the number of their forwards."""
    results, forwards = [], []
    for switch in ("true", "false"):
        config = make_config(tiny_model_path, f"worker.actor.model.enable_gradient_checkpointing={switch}")
        worker = start_alone(config)
        calls = []
        first_layer = worker.actor.model.model.language_model.layers[0]
        first_layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        results.append(worker.gradients(batch, "token")[0])
        forwards.append(len(calls))
    assert largest_relative_difference(*results) < 1e-6
    assert forwards == [2, 1]


def test_log_prob_passes_take_a_smaller_last_micro_batch(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    worker = start_alone(make_config(tiny_model_path))
    whole, parts = (worker.actor.forward.measure_all(batch, ["log_probs"], size)["log_probs"] for size in (8, 3))
    torch.testing.assert_close(parts, whole)


def test_token_and_seq_averaging_differ(tiny_model_path: str, batch: DataProto, lone_process_group) -> None:
    worker = start_alone(make_config(tiny_model_path))
    gradients = [worker.gradients(batch, mode)[0] for mode in ("token", "seq")]
    assert largest_relative_difference(*gradients) > 1e-2


def test_log_probs_are_those_of_a_plain_forward_of_each_row_alone(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """No padding, no batching, no trimming: each row's real tokens through the bare model, images and all."""
    worker = start_alone(make_config(tiny_model_path))
    log_probs = worker.compute_log_probs(batch).batch["old_log_probs"]
    for index, logits in enumerate(plain_logits(tiny_model_path, batch)):
        length = len(logits)
        chosen = batch.batch["responses"][index, :length, None]
        expected = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        torch.testing.assert_close(log_probs[index, :length], expected, atol=1e-5, rtol=1e-5)
        assert (log_probs[index, length:] == 0).all()


@torch.no_grad()
def plain_logits(model_path: str, batch: DataProto) -> list[torch.Tensor]:
    """Of each row, (length, V)."""
    model = AutoModelForImageTextToText.from_pretrained(model_path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model_path)
    return [response_logits(model, processor, batch[index]) for index in range(len(batch))]


def test_the_entropy_metric_is_the_entropy_of_the_distribution_that_is_sampled_from(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """The mean over all response tokens, at the sampler's temperature and without the ids that are never drawn."""
    worker = start_alone(make_config(tiny_model_path, "worker.rollout.temperature=0.3"))
    _, metrics = worker.gradients(batch, "seq")
    of_rows = [Categorical(logits=logits / 0.3).entropy() for logits in plain_logits(tiny_model_path, batch)]
    assert metrics["actor/entropy_loss"] == pytest.approx(torch.cat(of_rows).mean().item(), rel=1e-5)


def test_logits_are_made_for_response_positions_only(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """Packed, just those; padded, the longest response's and the position before it, of every row at once."""
    num_tokens = int(batch.batch["response_mask"].sum())
    for switch, at_most in (("true", num_tokens), ("false", 8 * (RESPONSE_LENGTH + 1))):
        worker = start_alone(make_config(tiny_model_path, f"worker.actor.padding_free={switch}"))
        positions = []
        worker.actor.model.lm_head.register_forward_pre_hook(
            lambda _, inputs, positions=positions: positions.append(inputs[0].shape[:2].numel())
        )
        worker.compute_log_probs(batch)
        assert num_tokens <= sum(positions) <= at_most


@pytest.mark.parametrize("padding_free", ["true", "false"])
def test_an_update_knows_how_many_operations_it_takes(
    padding_free: str, tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """Those of its real tokens, response tokens and images in two passes, however they are cut: padding is no work."""
    worker = start_alone(
        make_config(
            tiny_model_path,
            "worker.actor.ppo_epochs=2",
            "worker.actor.micro_batch_size_per_device_for_update=2",
            "worker.actor.share_prompts=false",
            f"worker.actor.padding_free={padding_free}",
        )
    )
    metrics = worker.update_actor(batch)
    lengths = batch.batch["attention_mask"].sum(dim=1).tolist()
    media = Featurizer(worker.processor).featurize(batch.non_tensor_batch["multi_modal_data"])
    forward = worker.actor.forward
    expected = forward.counter.count(lengths, int(batch.batch["response_mask"].sum()), media)
    assert forward.work.training == pytest.approx(2 * expected.training)
    assert metrics["perf/tflops_actor"] > 0
    assert "perf/mfu_actor" not in metrics


def test_an_update_moves_the_policy_towards_rewarded_responses(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """Equal old log-probs, advantage +1 on row 0 and -1 on row 1: the first becomes likelier, the second less so."""
    config = make_config(tiny_model_path, "worker.actor.optim.lr=1e-3", "algorithm.kl_coef=0")
    worker = start_alone(config)
    rows = batch[[0, 1] * 4]
    before = worker.compute_log_probs(rows).batch["old_log_probs"]
    rows.batch["old_log_probs"] = before
    rows.batch["advantages"] = torch.tensor([1.0, -1.0] * 4)[:, None].expand(8, RESPONSE_LENGTH).contiguous()
    metrics = worker.update_actor(rows)
    change = (worker.compute_log_probs(rows).batch["old_log_probs"] - before).sum(dim=1)
    assert change[0] > 0 > change[1]
    assert metrics["actor/ppo_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["actor/lr"] == pytest.approx(1e-3)


def test_an_image_is_processed_once_a_step_from_the_rollout_to_the_update(
    tiny_model_path: str, tmp_path: Path, lone_process_group, processed_images: list
) -> None:
    """Rollout, log-probs, reference and update; `media_cache_gb=0` has each of them process it."""
    prompts = make_prompts(tiny_model_path, tmp_path)
    num_images = sum(len(media or []) for media in prompts.non_tensor_batch["multi_modal_data"])
    batch = answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH)
    sampling = Sampling(n=2, temperature=1.0, top_p=1.0, top_k=-1, ignore_eos=False)
    prompts.meta_info = {"sampling": sampling, "seed_parts": (0,)}
    for gibibytes, passes in ((1.0, 1), (0.0, 4)):
        at_once = "worker.actor.micro_batch_size_per_device_for_experience=8"  # no pass cuts a group
        worker = start_alone(make_config(tiny_model_path, at_once, f"data.media_cache_gb={gibibytes}"))
        for _ in range(2):
            processed_images.clear()
            worker.prepare_rollout_engine()
            worker.generate_sequences(prompts)
            worker.release_rollout_engine()
            worker.compute_log_probs(batch)
            worker.compute_ref_log_probs(batch)
            worker.update_actor(batch)
            assert len(processed_images) == passes * num_images


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(
    tiny_model_path: str, batch: DataProto, lone_process_group, caplog
) -> None:
    worker = start_alone(make_config(tiny_model_path))
    before = worker.weights()
    rows = batch[list(range(8))]
    rows.batch["advantages"] = torch.full((8, RESPONSE_LENGTH), float("nan"))
    metrics = worker.update_actor(rows)
    assert metrics["actor/grad_norm"] != metrics["actor/grad_norm"]
    assert "skipped" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in worker.weights().items())


def test_warm_up_starts_at_zero_and_cosine_ends_at_its_floor(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    config = make_config(
        tiny_model_path,
        "worker.actor.optim.lr=1e-3",
        "worker.actor.optim.lr_scheduler_type=cosine",
        "worker.actor.optim.lr_warmup_ratio=0.2",
        "worker.actor.optim.min_lr_ratio=0.1",
    )
    scheduler = start_alone(config).actor.scheduler
    rates = []
    for _ in range(11):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    assert rates[6] == pytest.approx(5.5e-4)
    assert rates[10] == pytest.approx(1e-4)


def test_mixed_precision_keeps_master_weights_in_fp32_and_log_probs_close(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    precise = start_alone(make_config(tiny_model_path)).compute_log_probs(batch).batch["old_log_probs"]
    worker = start_alone(make_config(tiny_model_path, "worker.actor.fsdp.mp_param_dtype=bf16"))
    assert all(parameter.dtype == torch.float32 for parameter in worker.actor.model.parameters())
    rounded = worker.compute_log_probs(batch).batch["old_log_probs"]
    assert 0 < (rounded - precise).abs().max() < 0.1


def test_every_pass_over_the_batch_makes_its_optimizer_steps_and_the_schedule_advances_once(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """8 rows in 2 mini-batches of 2 prompts x 2 responses: 2 optimizer steps a pass."""
    for passes in (1, 2):
        worker = start_alone(
            make_config(
                tiny_model_path,
                f"worker.actor.ppo_epochs={passes}",
                "worker.actor.global_batch_size=2",
                "worker.actor.micro_batch_size_per_device_for_update=4",
            )
        )
        steps = []
        worker.actor.optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        worker.update_actor(batch)
        assert len(steps) == 2 * passes
        assert worker.actor.scheduler.last_epoch == 1
