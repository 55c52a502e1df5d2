# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_batch_plan.py
"""The batch plan: its numbers against sums done by hand, and the words of each rule that does not hold."""

import numpy as np
import pytest

from verl.trainer.config import DataConfig, PPOConfig, load_config
from verl.utils.batch_plan import BatchPlan, ModelPlan, training_steps
from verl.utils.seqlen_balancing import balanced_order
from verl.workers.actor.config import ActorConfig
from verl.workers.config import WorkerConfig
from verl.workers.rollout.config import RolloutConfig

SMALL = {
    "data.rollout_batch_size": 16,
    "worker.actor.global_batch_size": 8,
    "worker.actor.micro_batch_size_per_device_for_update": 4,
    "worker.actor.micro_batch_size_per_device_for_experience": 8,
    "worker.rollout.n": 4,
    "worker.rollout.name": "hf",
}


def config_of(**changes):
    """The small configuration with some keys changed; `__` stands for the dot."""
    values = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    return load_config([f"{key}={value}" for key, value in values.items()])


def refusal(world_size: int = 2, **changes) -> str:
    config = config_of(**changes)
    with pytest.raises(ValueError) as caught:
        BatchPlan.from_config(config, world_size)
    return str(caught.value)


def test_every_number_of_a_small_plan():
    """16 prompts x 4 = 64 sequences. Mini-batches of 8 prompts = 32 sequences: 16 / 8 = 2 of them. Two workers hold
    32 / 2 = 16 sequences of each, in 16 / 4 = 4 micro-batches. Three passes make 2 x 3 = 6 optimizer steps."""
    plan = BatchPlan.from_config(config_of(worker__actor__ppo_epochs=3), world_size=2)
    assert plan == BatchPlan(
        world_size=2,
        prompts_per_step=16,
        responses_per_prompt=4,
        sequences_per_step=64,
        prompts_per_draw=16,
        fewest_draws=1,
        most_draws=1,
        ranks_per_engine=1,
        ranks_per_row=1,
        ranks_per_critic_row=1,
        actor=ModelPlan(
            prompts_per_mini_batch=8,
            sequences_per_mini_batch=32,
            mini_batches=2,
            sequences_per_rank_per_mini_batch=16,
            update_micro_batch_size=4,
            update_micro_batches=4,
            experience_micro_batch_size=8,
            optimizer_steps_per_step=6,
        ),
        critic=None,
    )


def with_critic(**changes):
    """A critic in mini-batches of 4 prompts = 16 sequences, on two workers 8 each, in micro-batches of 2."""
    critic = {
        "algorithm__adv_estimator": "gae",
        "worker__critic__global_batch_size": 4,
        "worker__critic__micro_batch_size_per_device_for_update": 2,
        "worker__critic__micro_batch_size_per_device_for_experience": 16,
    }
    return config_of(**critic | changes)


def test_a_critic_has_numbers_of_its_own():
    """16 / 4 = 4 mini-batches, each worker's 8 sequences in 8 / 2 = 4 micro-batches, one pass. The actor's stay."""
    plan = BatchPlan.from_config(with_critic(), world_size=2)
    assert plan.actor == BatchPlan.from_config(config_of(), world_size=2).actor
    assert plan.critic == ModelPlan(
        prompts_per_mini_batch=4,
        sequences_per_mini_batch=16,
        mini_batches=4,
        sequences_per_rank_per_mini_batch=8,
        update_micro_batch_size=2,
        update_micro_batches=4,
        experience_micro_batch_size=16,
        optimizer_steps_per_step=4,
    )


@pytest.mark.parametrize(("actor", "critic"), [(16, 16), (8, 4), (4, 8), (8, 12), (6, 4), (12, 3)])
def test_rows_balanced_over_ranks_stay_in_the_mini_batches_of_both_models(actor, critic):
    """48 prompts x 4 on 2 workers: whatever the two sizes, no row changes its mini-batch of either model."""
    plan = BatchPlan.from_config(
        with_critic(
            data__rollout_batch_size=48,
            worker__actor__global_batch_size=actor,
            worker__critic__global_batch_size=critic,
        ),
        world_size=2,
    )
    lengths = np.random.RandomState(0).randint(10, 90, plan.sequences_per_step).tolist()
    order = balanced_order(lengths, plan.world_size, plan.num_balance_pieces)
    per_rank = plan.sequences_per_step // 2
    for model in (plan.actor, plan.critic):
        for place, row in enumerate(order):
            mini_batch = place % per_rank // model.sequences_per_rank_per_mini_batch
            assert mini_batch == row // model.sequences_per_mini_batch


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_parts_add_up_to_the_whole_on_any_number_of_workers(world_size):
    plan = BatchPlan.from_config(with_critic(), world_size)
    for model in (plan.actor, plan.critic):
        per_rank = model.update_micro_batches * model.update_micro_batch_size
        assert per_rank == model.sequences_per_rank_per_mini_batch
        assert per_rank * world_size * model.mini_batches == plan.sequences_per_step


def test_a_draw_may_be_smaller_than_a_step():
    plan = BatchPlan.from_config(config_of(data__mini_rollout_batch_size=4), world_size=2)
    assert (plan.prompts_per_draw, plan.prompts_per_step) == (4, 16)
    assert (plan.fewest_draws, plan.most_draws) == (4, 4)
    assert plan.describe()[1] == "generation: 4 x 4 prompts"


def test_a_draw_need_not_divide_among_the_workers():
    """Two prompts for eight workers: the trainer pads the call."""
    plan = BatchPlan.from_config(config_of(data__mini_rollout_batch_size=2), world_size=8)
    assert plan.prompts_per_draw == 2


def test_a_filter_may_draw_more_than_a_step_needs():
    plan = BatchPlan.from_config(
        config_of(data__mini_rollout_batch_size=24, algorithm__online_filtering="true"), world_size=2
    )
    assert (plan.prompts_per_draw, plan.prompts_per_step) == (24, 16)


@pytest.mark.parametrize(
    ("most", "draws", "told"),
    [
        (20, (3, 20), "3 x 7 prompts, and up to 20 x 7 until enough groups carry signal"),
        (3, (3, 3), "3 x 7 prompts"),
        (0, (3, None), "3 x 7 prompts, and more until enough groups carry signal"),
        (-1, (3, None), "3 x 7 prompts, and more until enough groups carry signal"),
    ],
)
def test_a_filter_may_draw_as_often_as_it_is_allowed(most, draws, told):
    """16 prompts from draws of 7: three, if all are kept."""
    changes = {"data__mini_rollout_batch_size": 7, "algorithm__online_filtering": "true"}
    plan = BatchPlan.from_config(config_of(trainer__max_try_make_batch=most, **changes), world_size=2)
    assert (plan.fewest_draws, plan.most_draws) == draws
    assert plan.describe()[1] == f"generation: {told}"


def test_without_a_filter_the_number_of_draws_is_not_limited_by_tries():
    changes = {"data__mini_rollout_batch_size": 4, "trainer__max_try_make_batch": 1}
    assert BatchPlan.from_config(config_of(**changes), world_size=2).most_draws == 4


def test_the_plan_is_told_in_five_lines_with_its_numbers_and_in_three_more_for_a_critic():
    lines = BatchPlan.from_config(with_critic(), world_size=2).describe()
    assert lines[:5] == BatchPlan.from_config(config_of(), world_size=2).describe()
    assert "16 prompts x 4 responses = 64 sequences on 2 workers" in lines[0]
    assert "16 sequences = 4 micro-batches x 4" in lines[4]
    assert lines[5:] == [
        "values: 16 sequences at once on each worker",
        "critic update: 4 mini-batches of 4 prompts = 16 sequences; ppo_epochs=1, so 4 optimizer steps",
        "critic update, mini-batch on each worker: 8 sequences = 4 micro-batches x 2",
    ]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"data__rollout_batch_size": 10, "worker__actor__global_batch_size": 4},
            "worker.actor.global_batch_size=4 does not divide data.rollout_batch_size=10; use 2 or 5",
        ),
        (
            {"data__rollout_batch_size": 4},
            "worker.actor.global_batch_size=8 does not divide data.rollout_batch_size=4; use 2 or 4",
        ),
        (
            {"worker__actor__micro_batch_size_per_device_for_experience": 24},
            "worker.actor.micro_batch_size_per_device_for_experience=24 does not divide "
            "data.rollout_batch_size=16 x worker.rollout.n=4 = 64 sequences; use 16 or 32",
        ),
        (
            {"worker__actor__micro_batch_size_per_device_for_update": 6},
            "worker.actor.micro_batch_size_per_device_for_update=6 does not divide worker.actor.global_batch_size=8 x "
            "worker.rollout.n=4 / 2 workers = 16 sequences; use 4 or 8",
        ),
        (
            {"data__mini_rollout_batch_size": 5},
            "data.rollout_batch_size=16 is not a multiple of data.mini_rollout_batch_size=5, so generated responses "
            "would go unused; use 2 or 4",
        ),
        (
            {"data__mini_rollout_batch_size": 24},
            "data.rollout_batch_size=16 is not a multiple of data.mini_rollout_batch_size=24, so generated responses "
            "would go unused; use 8 or 16",
        ),
        (
            {"worker__rollout__name": "vllm", "worker__rollout__tensor_parallel_size": 4},
            "trainer.nnodes x trainer.n_gpus_per_node=2 is not a multiple of "
            "worker.rollout.tensor_parallel_size=4; use 4",
        ),
        (
            {
                "data__mini_rollout_batch_size": 4,
                "algorithm__online_filtering": "true",
                "trainer__max_try_make_batch": 3,
            },
            "trainer.max_try_make_batch=3 draws of 4 prompts never make data.rollout_batch_size=16; use 4 at the "
            "least, more for what algorithm.online_filtering drops, or 0 for any number",
        ),
        (
            {"worker__rollout__n": 1},
            "worker.rollout.n=1 leaves algorithm.adv_estimator=grpo nothing to compare: it needs worker.rollout.n=2 "
            "or more",
        ),
        (
            {"algorithm__adv_estimator": "gae", "worker__critic__global_batch_size": 5},
            "worker.critic.global_batch_size=5 does not divide data.rollout_batch_size=16; use 2 or 4",
        ),
    ],
)
def test_a_number_that_does_not_divide_is_refused_with_the_sum_and_what_to_use(changes, text):
    assert refusal(**changes) == text


def test_the_workers_must_share_a_mini_batch_evenly():
    """5 workers cannot share 8 x 4 = 32 sequences; n = 4 has no factor 5, so the prompts must be a multiple of 5."""
    text = refusal(world_size=5)
    assert text == (
        "worker.actor.global_batch_size=8 x worker.rollout.n=4 = 32 sequences is not a multiple of 5 workers; "
        "use 5 or 10"
    )


@pytest.mark.parametrize("part", ["actor", "ref"])
def test_sharding_groups_must_be_of_equal_size(part):
    """Eight workers in groups of 3 would leave two over; eight or more in a group are all in one."""
    key = f"worker__{part}__fsdp__fsdp_size"
    assert refusal(8, **{key: 3}) == f"worker.{part}.fsdp.fsdp_size=3 does not divide 8 workers; use 2 or 4"
    for size in (-1, 1, 2, 4, 8, 12):
        BatchPlan.from_config(config_of(**{key: size}), world_size=8)
    BatchPlan.from_config(config_of(algorithm__disable_kl="true", worker__ref__fsdp__fsdp_size=3), world_size=8)


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("workers", [2, 3, 8])
def test_the_values_an_error_offers_do_hold(n, workers):
    """Whatever is refused, the numbers after `use` pass the rule that refused."""
    for prompts in range(1, 13):
        if prompts * n % workers == 0:
            continue
        actor = ActorConfig(global_batch_size=prompts, micro_batch_size_per_device_for_experience=1)
        worker = WorkerConfig(actor=actor, rollout=RolloutConfig(n=n))
        with pytest.raises(ValueError) as caught:
            BatchPlan.from_config(PPOConfig(data=DataConfig(rollout_batch_size=prompts), worker=worker), workers)
        offered = str(caught.value).split("; use ")[1].split(" or ")
        assert all(int(value) * n % workers == 0 for value in offered)


def test_hf_rollout_does_not_ask_about_tensor_parallelism():
    BatchPlan.from_config(config_of(worker__rollout__tensor_parallel_size=7), world_size=2)


@pytest.mark.parametrize(
    ("changes", "prompts", "steps"),
    [
        ({}, 100, 6 * 15),  # 100 // 16 = 6 draws an epoch
        ({"trainer__total_epochs": 2}, 16, 2),
        ({"trainer__max_steps": 3}, 1, 3),
        ({"data__mini_rollout_batch_size": 4, "trainer__total_epochs": 1}, 62, 3),  # 15 draws x 4 = 60; 60 // 16 = 3
        ({"data__mini_rollout_batch_size": 24, "trainer__total_epochs": 1}, 70, 3),  # 2 draws x 24 = 48; 48 // 16 = 3
        ({"algorithm__online_filtering": "true", "trainer__total_epochs": 1}, 100, 6),  # as if all were kept
    ],
)
def test_training_steps_follow_from_the_data(changes, prompts, steps):
    assert training_steps(config_of(**changes), prompts) == steps


def test_too_few_prompts_for_one_step_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="holds 15 usable prompts, fewer than one step of data.rollout_batch_size=16"):
        training_steps(config_of(), 15)
