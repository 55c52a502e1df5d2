# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_weighted_update.py
"""Token weights from log-prob pass to gradient: measured there, attached by the trainer, applied in the loss."""

import logging
import math
from tempfile import gettempdir

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.batches import answer_at_random, make_prompts, response_logits, with_random_weights
from tests.probe import RESPONSE_LENGTH, RESPONSES_PER_PROMPT, ProbeWorker, make_config, start_alone, start_two
from verl.algorithms.policy_loss import POLICY_LOSSES
from verl.models.attention_recorder import record_attention_mass
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.trainer.ray_trainer import RayDAPOTrainer
from verl.trainer.stop_request import StopRequest
from verl.trainer.tracking import Tracker
from verl.utils.batch_plan import BatchPlan

COLLECT = "worker.rollout.collect_attentions=true"


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight rows with token weights: the first four with images, the last four text only."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    return with_random_weights(answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH))


def with_weights(batch: DataProto, token_weights: torch.Tensor | None) -> DataProto:
    """A copy of the batch with other weights, or without."""
    copy = batch[list(range(len(batch)))]
    del copy.batch["token_weights"]
    if token_weights is not None:
        copy.batch["token_weights"] = token_weights
    return copy


def largest_relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(
        ((left[name] - right[name]).abs().max() / left[name].abs().max().clamp(min=1e-8)).item() for name in left
    )


# ---- in the loss ----


@pytest.mark.parametrize("loss_avg_mode", ["token", "seq"])
def test_weights_of_one_train_bit_for_bit_like_no_weights(
    loss_avg_mode: str, tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """Two mini-batches, KL loss on; three floats, since the mask is an integer where there are no weights."""
    results = []
    for weights in (None, torch.ones(8, RESPONSE_LENGTH), batch.batch["token_weights"]):
        worker = start_alone(
            make_config(
                tiny_model_path,
                "worker.actor.global_batch_size=2",
                "worker.actor.micro_batch_size_per_device_for_update=2",
                "worker.actor.optim.lr=1e-3",
                f"worker.actor.loss_avg_mode={loss_avg_mode}",
                f"algorithm.enable_token_weights={str(weights is not None).lower()}",
            )
        )
        metrics = worker.update_actor(with_weights(batch, weights))
        actor_metrics = {name: value for name, value in metrics.items() if name.startswith("actor/")}
        results.append((actor_metrics, worker.weights()))
    (metrics_off, off), (metrics_of_ones, ones), (_, weighted) = results
    assert metrics_of_ones == metrics_off
    assert all(torch.equal(value, off[name]) for name, value in ones.items())
    assert any(not torch.equal(value, off[name]) for name, value in weighted.items())


@pytest.mark.parametrize("loss_avg_mode", ["token", "seq"])
def test_the_weighted_gradient_is_the_sum_of_weight_times_advantage_times_that_of_the_log_prob(
    loss_avg_mode: str, tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """With old log-probs equal to the current ones the ratio is 1 and nothing is clipped, so by hand

    d loss = - sum_t w_t A_t d log pi_t / c_t,

    where c is the number of all tokens, or the number of all rows times the number of the row's tokens. The right side
    comes from the bare model, row by row without padding.
    """
    worker = start_alone(make_config(tiny_model_path, "algorithm.kl_coef=0"))
    rows = with_weights(batch, batch.batch["token_weights"])
    rows.batch["old_log_probs"] = worker.compute_log_probs(rows).batch["old_log_probs"]
    gradients, _ = worker.gradients(rows, loss_avg_mode)

    processor = AutoProcessor.from_pretrained(tiny_model_path)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32)
    lengths = rows.batch["response_mask"].sum(dim=1).tolist()
    for index, length in enumerate(lengths):
        row = rows[index]
        log_probs = response_logits(model, processor, row).log_softmax(-1)
        chosen = log_probs.gather(1, row.batch["responses"][:length, None])[:, 0]
        count = sum(lengths) if loss_avg_mode == "token" else len(lengths) * length
        factors = row.batch["token_weights"][:length] * row.batch["advantages"][:length] / count
        (-(factors * chosen).sum()).backward()
    expected = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert largest_relative_difference(expected, {name: gradients[name] for name in expected}) < 1e-4


def test_the_kl_loss_is_weighted_too(tiny_model_path: str, batch: DataProto, lone_process_group) -> None:
    """Without advantages only the KL loss is left: twice the weights, twice its gradient; no weight, no gradient."""
    worker = start_alone(make_config(tiny_model_path))
    rows = with_weights(batch, None)
    rows.batch["advantages"] = torch.zeros(8, RESPONSE_LENGTH)
    plain, metrics = worker.gradients(rows, "token")
    doubled, doubled_metrics = worker.gradients(with_weights_of(rows, 2.0), "token")
    assert metrics["actor/kl_loss"] > 0
    assert doubled_metrics["actor/kl_loss"] == pytest.approx(2 * metrics["actor/kl_loss"], rel=1e-6)
    assert largest_relative_difference({name: 2 * value for name, value in plain.items()}, doubled) < 1e-6
    silent, _ = worker.gradients(with_weights_of(rows, 0.0), "token")
    assert all((value == 0).all() for value in silent.values())


def with_weights_of(rows: DataProto, weight: float) -> DataProto:
    return with_stream(rows, "token_weights", torch.full((len(rows), RESPONSE_LENGTH), weight))


def test_ratios_and_metrics_keep_the_binary_mask(tiny_model_path: str, batch: DataProto, lone_process_group) -> None:
    worker = start_alone(make_config(tiny_model_path))
    _, plain = worker.gradients(with_weights(batch, None), "token")
    _, weighted = worker.gradients(batch, "token")
    kept = {"actor/entropy_loss", "actor/ppo_kl", "actor/pg_clipfrac_higher", "actor/pg_clipfrac_lower"}
    assert {name for name in plain if plain[name] == weighted[name]} == kept


@pytest.mark.parametrize("loss_type", sorted(POLICY_LOSSES))
@pytest.mark.parametrize("loss_avg_mode", ["token", "seq"])
def test_the_weighted_gradient_is_that_of_one_batch_on_one_rank_however_it_is_cut(
    loss_avg_mode: str,
    loss_type: str,
    batch: DataProto,
    at_once: ProbeWorker,
    one_by_one: ProbeWorker,
    two_ranks: WorkerGroup,
) -> None:
    whole, metrics = at_once.gradients(batch, loss_avg_mode, loss_type)
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    for gradients, other_metrics in (
        one_by_one.gradients(batch, loss_avg_mode, loss_type),
        two_ranks.gradients(batch, loss_avg_mode, loss_type),
        one_by_one.gradients(batch[order], loss_avg_mode, loss_type),
    ):
        assert largest_relative_difference(whole, gradients) < 1e-5
        assert other_metrics == pytest.approx(metrics, rel=1e-5)


@pytest.fixture(scope="module")
def at_once(tiny_model_path: str, lone_process_group) -> ProbeWorker:
    return start_alone(make_config(tiny_model_path))


@pytest.fixture(scope="module")
def one_by_one(tiny_model_path: str, lone_process_group) -> ProbeWorker:
    return start_alone(make_config(tiny_model_path, "worker.actor.micro_batch_size_per_device_for_update=1"))


@pytest.mark.parametrize("with_token_weights", [False, True])
@pytest.mark.parametrize("loss_avg_mode", ["token", "seq"])
def test_importance_weights_are_as_advantages_times_them_and_leave_the_kl_loss_alone(
    loss_avg_mode: str,
    with_token_weights: bool,
    batch: DataProto,
    at_once: ProbeWorker,
    one_by_one: ProbeWorker,
    two_ranks: WorkerGroup,
) -> None:
    """Weights above 0 leave every advantage its sign, at which the loss is linear in it, clipped or not.

    With token weights they multiply: the policy loss uses the product of both.
    """
    rows = with_weights(batch, batch.batch["token_weights"] if with_token_weights else None)
    weights = 0.1 + 1.9 * torch.rand(8, RESPONSE_LENGTH, generator=torch.Generator().manual_seed(3))
    plain, plain_metrics = at_once.gradients(rows, loss_avg_mode)
    with_scaled_advantages = with_stream(rows, "advantages", rows.batch["advantages"] * weights)
    scaled, scaled_metrics = at_once.gradients(with_scaled_advantages, loss_avg_mode)
    assert largest_relative_difference(plain, scaled) > 1e-2
    for worker in (at_once, one_by_one, two_ranks):
        gradients, metrics = worker.gradients(with_stream(rows, "importance_weights", weights), loss_avg_mode)
        assert largest_relative_difference(scaled, gradients) < 1e-5
        assert metrics == pytest.approx({**scaled_metrics, "actor/kl_loss": plain_metrics["actor/kl_loss"]}, rel=1e-5)

    product = weights * rows.batch["token_weights"] if with_token_weights else weights
    _, metrics_of_product = at_once.gradients(with_stream(rows, "token_weights", product), loss_avg_mode)
    assert metrics_of_product["actor/pg_loss"] == pytest.approx(scaled_metrics["actor/pg_loss"], rel=1e-5)
    assert metrics_of_product["actor/kl_loss"] != pytest.approx(plain_metrics["actor/kl_loss"], rel=1e-2)


def test_the_switches_decide_whether_weights_take_part(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """Importance weights of a half halve the policy loss where the cap is set; weights that are off are refused."""
    still = ("worker.actor.optim.lr=0", "worker.actor.optim.weight_decay=0")
    plain = with_weights(batch, None)
    halved = with_stream(plain, "importance_weights", torch.full((8, RESPONSE_LENGTH), 0.5))
    losses = [
        start_alone(make_config(tiny_model_path, *still, *settings)).update_actor(rows)["actor/pg_loss"]
        for rows, settings in ((plain, ()), (halved, ("worker.rollout.importance_cap=2.0",)))
    ]
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-6)
    worker = start_alone(make_config(tiny_model_path))
    for rows, switch in ((halved, "worker.rollout.importance_cap"), (batch, "algorithm.enable_token_weights=true")):
        with pytest.raises(ValueError, match=f"which take no part in the loss without {switch}"):
            worker.update_actor(rows)


def with_stream(rows: DataProto, name: str, values: torch.Tensor) -> DataProto:
    copy = rows[list(range(len(rows)))]
    copy.batch[name] = values
    return copy


def test_every_loss_has_a_gradient_of_its_own_and_weights_change_it(batch: DataProto, at_once: ProbeWorker) -> None:
    unweighted = with_weights(batch, None)
    gradients = {name: at_once.gradients(batch, "token", name)[0] for name in POLICY_LOSSES}
    for name, weighted in gradients.items():
        plain, _ = at_once.gradients(unweighted, "token", name)
        assert largest_relative_difference(plain, weighted) > 1e-2
        assert all(
            largest_relative_difference(weighted, other) > 1e-2
            for other_name, other in gradients.items()
            if other_name != name
        )


@pytest.mark.parametrize(
    ("loss_type", "setting"),
    [
        *((name, {key: 0.01}) for name in ("default", "cispo") for key in ("clip_ratio_low", "clip_ratio_high")),
        ("default", {"clip_ratio_dual": 1.01}),
        ("sapo", {"tau_positive": 5.0}),
        ("sapo", {"tau_negative": 5.0}),
    ],
)
def test_the_settings_of_a_loss_reach_it(
    loss_type: str, setting: dict[str, float], batch: DataProto, at_once: ProbeWorker
) -> None:
    rows = with_weights(batch, None)
    noise = torch.randn(8, RESPONSE_LENGTH, generator=torch.Generator().manual_seed(2))
    rows.batch["old_log_probs"] = at_once.compute_log_probs(rows).batch["old_log_probs"] + noise
    plain, _ = at_once.gradients(rows, "token", loss_type)
    other, _ = at_once.gradients(rows, "token", loss_type, **setting)
    assert largest_relative_difference(plain, other) > 1e-3


@pytest.mark.parametrize("width", [RESPONSE_LENGTH - 5, RESPONSE_LENGTH + 3])
def test_weights_of_another_length_are_padded_with_one_or_cut(
    width: int, tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    worker = start_alone(make_config(tiny_model_path))
    given = torch.full((8, width), 0.5)
    aligned = nn.functional.pad(given, (0, RESPONSE_LENGTH - width), value=1.0)  # a negative pad cuts
    gradients, metrics = worker.gradients(with_weights(batch, given), "token")
    expected, expected_metrics = worker.gradients(with_weights(batch, aligned), "token")
    assert metrics == expected_metrics
    assert all(torch.equal(value, expected[name]) for name, value in gradients.items())


# ---- from the log-prob pass ----


def collected(worker: ProbeWorker | WorkerGroup, batch: DataProto) -> dict[str, torch.Tensor]:
    return dict(worker.compute_log_probs(with_weights(batch, None)).batch.items())


def test_attention_comes_with_the_very_log_probs_of_a_pass_without_it(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    plain = collected(start_alone(make_config(tiny_model_path)), batch)
    measured = collected(start_alone(make_config(tiny_model_path, COLLECT)), batch)
    assert set(plain) == {"old_log_probs"}
    assert set(measured) == {"old_log_probs", "attention_mass", "attention_keys"}
    assert torch.equal(plain["old_log_probs"], measured["old_log_probs"])

    is_response = batch.batch["response_mask"].bool()
    mass, keys = measured["attention_mass"], measured["attention_keys"]
    assert mass.dtype == torch.float32 and mass.shape == (8, RESPONSE_LENGTH, 2)
    assert keys.dtype == torch.int64
    assert keys[:, 1].tolist() == [6, 6, 9, 9, 0, 0, 0, 0]  # image tokens: 56x84; 112x56 and 28x28; none
    assert (mass[~is_response] == 0).all()
    assert (mass[is_response][:, 0] > 0).all()
    assert ((mass[..., 1] > 0) == (is_response & (keys[:, 1:] > 0))).all()
    assert (mass.sum(-1) < 1 + 1e-6).all()


def test_only_the_last_layers_that_are_asked_for_are_measured(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """Of the model's two: the number reaches the recorder, and the mean over both layers is another."""
    padded = "worker.actor.padding_free=false"
    worker = start_alone(make_config(tiny_model_path, COLLECT, padded, "algorithm.token_weight_last_k_layers=1"))
    last = collected(worker, batch)["attention_mass"]
    both = collected(start_alone(make_config(tiny_model_path, COLLECT)), batch)["attention_mass"]
    assert (last - both).abs().max() > 1e-3

    rows = repadded(batch, 0)
    response_length = int(rows.batch["response_mask"].sum(dim=1).max())
    kinds = worker.actor.forward.signals.vocabulary.classify(
        rows.batch["input_ids"], rows.batch["attention_mask"], RESPONSE_LENGTH
    )
    kinds = kinds[:, : kinds.shape[1] - (RESPONSE_LENGTH - response_length)]  # the forward cuts common padding off
    model = worker.actor.model
    with torch.no_grad(), record_attention_mass(model, kinds, response_length, layers=1) as recorder:
        worker.actor.forward.measure(rows, ["log_probs"])
    torch.testing.assert_close(last[:, :response_length], recorder.mass(), atol=1e-6, rtol=0)


def test_token_weights_depend_neither_on_micro_batches_nor_on_ranks_row_order_or_padding(
    tiny_model_path: str, batch: DataProto, lone_process_group, ray_cluster
) -> None:
    trainer = weigher()
    whole = trainer._maybe_compute_token_weights(*inputs(collected(alone(tiny_model_path, 8), batch), batch))
    is_response = batch.batch["response_mask"].bool()
    assert (whole[:4][is_response[:4]] != 1).float().mean() > 0.9
    assert (whole[4:][is_response[4:]] == 1).all()

    group = start_two(make_config(tiny_model_path, COLLECT, "worker.actor.micro_batch_size_per_device_for_update=2"))
    try:
        shared = collected(group, batch)
    finally:
        group.release()
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    unpadded, longer = repadded(batch, 0), repadded(batch, 17)
    for streams, rows, expected in (
        (collected(alone(tiny_model_path, 1), batch), batch, whole),
        (collected(alone(tiny_model_path, 2), batch), batch, whole),
        (shared, batch, whole),
        (collected(alone(tiny_model_path, 2), batch[order]), batch[order], whole[order]),
        (collected(alone(tiny_model_path, 8), unpadded), unpadded, whole),
        (collected(alone(tiny_model_path, 8), longer), longer, whole),
    ):
        weights = trainer._maybe_compute_token_weights(*inputs(streams, rows))
        torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)


def alone(model_path: str, micro_batch_size: int) -> ProbeWorker:
    size = f"worker.actor.micro_batch_size_per_device_for_experience={micro_batch_size}"
    return start_alone(make_config(model_path, COLLECT, size))


def repadded(batch: DataProto, columns: int) -> DataProto:
    """The same rows with `columns` of left padding before the longest prompt."""
    first = int(batch.batch["attention_mask"].argmax(dim=1).min())
    copy = batch[list(range(len(batch)))]
    for name in ("input_ids", "attention_mask", "position_ids"):
        copy.batch[name] = nn.functional.pad(batch.batch[name][..., first:], (columns, 0))
    return copy


# ---- in the trainer ----


def weigher(*overrides: str) -> RayDAPOTrainer:
    """A trainer that has not started anything: weights need its configuration alone."""
    config = make_config("no model", "algorithm.enable_token_weights=true", COLLECT, *overrides)
    return RayDAPOTrainer(
        config,
        BatchPlan.from_config(config, 1),
        training_steps=1,
        tokenizer=None,
        grids=None,
        train_loader=None,
        val_loader=(),
        rewards=None,
        processes=None,
        tracker=Tracker([], {}, "project", "experiment", gettempdir(), total_steps=1),
        resume_point=None,
        stop_request=StopRequest(config.trainer.grace_s),
    )


def inputs(streams: dict[str, torch.Tensor], batch: DataProto) -> tuple[DataProto, dict[str, list]]:
    response_mask = batch.batch["response_mask"]
    return DataProto.from_dict({**streams, "response_mask": response_mask}), {"overall": [0.0] * len(batch)}


@pytest.fixture
def measured() -> DataProto:
    """Three responses of 3, 2 and 1 tokens; the last has no image. VGR of the first: 2, 1, 4 (up to 1e-6)."""
    mass = torch.zeros(3, 3, 2)
    mass[0] = torch.tensor([[0.2, 0.4], [0.1, 0.4], [0.4, 0.4]])  # 10 text keys, 40 image keys: VGR = 4 text / vision
    mass[1, :2] = torch.tensor([[0.3, 0.3], [0.1, 0.3]])
    mass[2, :1] = torch.tensor([0.9, 0.0])
    return DataProto.from_dict(
        {
            "attention_mass": mass,
            "attention_keys": torch.tensor([[10, 40], [10, 40], [10, 0]]),
            "response_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]),
        }
    )


def test_weights_come_from_attention_where_the_reward_function_gives_none(measured: DataProto) -> None:
    """1 / VGR of the first row is 1/2, 1, 1/4 with mean 7/12; of the second 1/4, 3/4 with mean 1/2. The third has no
    image."""
    weights = weigher()._maybe_compute_token_weights(measured, {"overall": [0.0, 0.0, 0.0]})
    expected = torch.tensor([[6 / 7, 12 / 7, 3 / 7], [0.5, 1.5, 0], [1, 0, 0]])
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-6)


def test_clip_and_smoothing_of_the_configuration_are_used(measured: DataProto) -> None:
    clipped = weigher("algorithm.token_weight_clip=[0.5,1.5]")._maybe_compute_token_weights(measured, {})
    expected = torch.tensor([[6 / 7, 1.5, 0.5], [0.5, 1.5, 0], [1, 0, 0]])
    torch.testing.assert_close(clipped, expected, atol=1e-6, rtol=1e-6)
    smooth = weigher("algorithm.token_weight_smooth_sigma=5")._maybe_compute_token_weights(measured, {})
    assert smooth[0].std() < 0.1 * clipped[0].std()


def test_a_number_in_place_of_the_reward_functions_weights_is_an_error_that_names_the_sample(
    measured: DataProto,
) -> None:
    values = {"overall": [0.0, 0.0, 0.0], "token_weights": [None, 0.5, None]}
    with pytest.raises(ValueError, match="sample 1 is 0.5; it must be a list of numbers"):
        weigher()._maybe_compute_token_weights(measured, values)


def test_weights_of_the_reward_function_go_before_attention_sample_by_sample(measured: DataProto) -> None:
    """The first list is short, so its last token weighs 1; the second sample has none and takes its VGR weights."""
    values = {"overall": [0.0, 0.0, 0.0], "token_weights": [[0.25, 5.0], None, [0.0]]}
    weights = weigher()._maybe_compute_token_weights(measured, values)
    expected = torch.tensor([[0.25, 5.0, 1.0], [0.5, 1.5, 0], [0, 0, 0]])
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-6)


def test_without_attention_samples_without_weights_of_their_own_weigh_one(measured: DataProto) -> None:
    values = {"token_weights": [None, [0.5, 2.0], None]}
    weights = weigher("worker.rollout.collect_attentions=false")._maybe_compute_token_weights(
        measured.select(["response_mask"]), values
    )
    assert torch.equal(weights, torch.tensor([[1.0, 1.0, 1.0], [0.5, 2.0, 0.0], [1.0, 0.0, 0.0]]))


@pytest.mark.parametrize("values", [{}, {"token_weights": [None, None, None]}])
def test_nothing_to_weigh_by_is_one_warning_that_says_what_to_switch_on(
    values: dict, measured: DataProto, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = weigher("worker.rollout.collect_attentions=false")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert trainer._maybe_compute_token_weights(measured.select(["response_mask"]), values) is None
    (record,) = caplog.records
    assert "worker.rollout.collect_attentions=true" in record.getMessage()
    assert "token_weights" in record.getMessage()


def test_weights_that_do_nothing_or_take_weight_away_are_told_once(
    measured: DataProto, caplog: pytest.LogCaptureFixture
) -> None:
    ones = {"token_weights": [[1.0, 1.0, 1.0], [1.0, 1.0], [1.0]]}
    low = {"token_weights": [[0.5, 0.5, 0.5], [0.5, 0.5], [0.5]]}
    for values, message in ((ones, "every token of step 1 weighs 1"), (low, "token_weights/mean is 0.50 in step 1")):
        trainer = weigher()
        trainer.state.global_step = 1
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                trainer._maybe_compute_token_weights(measured, values)
        (record,) = caplog.records
        assert message in record.getMessage()


@pytest.mark.parametrize("weights", [[math.nan], [-0.1], [1.0, 1.0, 1.0, 1.0]])
def test_weights_that_cannot_be_are_refused_with_their_sample(weights: list[float], measured: DataProto) -> None:
    with pytest.raises(ValueError, match="token_weights.*sample 0"):
        weigher()._maybe_compute_token_weights(measured, {"token_weights": [weights, None, None]})


def test_weights_that_are_not_enabled_are_not_computed(measured: DataProto) -> None:
    trainer = weigher("algorithm.enable_token_weights=false")
    assert trainer._maybe_compute_token_weights(measured, {"token_weights": [[2.0], [2.0], [2.0]]}) is None
