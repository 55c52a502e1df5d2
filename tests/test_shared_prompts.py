# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_shared_prompts.py
"""Rows that share their prompt give what packed rows give: streams and gradients, for every family that packs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.batches import answer_at_random, make_prompts
from tests.family_models import FAMILY_MODELS, make_family_model
from tests.probe import WITH_CRITIC, make_config, start_alone
from tests.test_families import make_family_prompts
from verl.models.token_layout import PackedLayout, PaddedLayout, SharedPromptLayout
from verl.protocol import DataProto
from verl.utils.seqlen_balancing import TokenCosts, balanced_order, prepare_dynamic_batch
from verl.workers.fsdp2 import full_tensor

N = 4
RESPONSE_LENGTH = 12
PACK, SHARE = (f"worker.actor.share_prompts={switch}" for switch in ("false", "true"))
WANTED = ["log_probs", "entropy", "image_kl", "attention_mass", "attention_keys", "hidden_cosine"]
SIGNALS = [
    "worker.rollout.collect_attentions=true",
    "algorithm.token_signals_to_log=[entropy,image_kl,hidden_cosine,vgr]",
]


def answered(prompts: DataProto) -> DataProto:
    """Groups of 4, 3, 1 and 4 rows, the second prompt's rows between others', and two groups of the same prompt."""
    batch = answer_at_random(prompts, N, RESPONSE_LENGTH)
    uids = np.array([f"group {row // N}" for row in range(len(batch))], dtype=object)
    uids[-2:] = "a group that looks like the one before"
    batch.non_tensor_batch["uid"] = uids
    order = [row for row in range(len(batch)) if row not in (7, 9, 10)]
    order[3], order[5] = order[5], order[3]
    return batch[order]


def streams_and_gradients(worker, batch: DataProto, wanted: list[str]) -> tuple[dict, dict]:
    forward = worker.actor.forward
    forward.model.train()
    forward.model.zero_grad()
    streams = forward.measure(batch, wanted)
    weights = torch.rand(streams["log_probs"].shape, generator=torch.Generator().manual_seed(0))
    (streams["log_probs"] * weights).sum().backward()
    gradients = {
        name: full_tensor(parameter.grad).clone()
        for name, parameter in forward.model.named_parameters()
        if parameter.grad is not None
    }
    return streams, gradients


def assert_same(one: dict, other: dict, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        torch.testing.assert_close(other[name], values, atol=tolerance, rtol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_family_that_packs_gives_the_same_streams_and_gradients(
    name: str, tmp_path: Path, lone_process_group
) -> None:
    path = make_family_model(name, tmp_path / "model")
    batch = answered(make_family_prompts(path, tmp_path))
    packed, shared = (start_alone(make_config(path, *SIGNALS, *more)) for more in ([PACK], [SHARE]))
    layouts = {type(worker.actor.forward._layout(batch)) for worker in (packed, shared)}
    if layouts == {PaddedLayout}:
        return
    assert layouts == {PackedLayout, SharedPromptLayout}
    shared.actor.forward.model.load_state_dict(packed.actor.forward.model.state_dict())
    one, of_one = streams_and_gradients(packed, batch, WANTED)
    other, of_other = streams_and_gradients(shared, batch, WANTED)
    assert_same(one, other, 1e-5)
    largest = max(gradient.abs().max() for gradient in of_one.values())
    assert_same(of_one, of_other, 1e-5 * float(largest))


def test_the_prompt_and_its_images_are_computed_once(tiny_model_path: str, tmp_path: Path, lone_process_group) -> None:
    batch = answered(make_prompts(tiny_model_path, tmp_path))
    forward = start_alone(make_config(tiny_model_path, SHARE)).actor.forward
    layout = forward._layout(batch)
    groups = set(batch.non_tensor_batch["uid"])
    lengths = batch.batch["attention_mask"].sum(dim=1)
    responses = batch.batch["response_mask"].sum(dim=1)
    first_rows = [list(batch.non_tensor_batch["uid"]).index(uid) for uid in groups]
    assert len(layout.input_ids) == responses.sum() + (lengths - responses)[first_rows].sum() < lengths.sum()
    media = forward._media(batch, layout)
    images = sum(len(batch.non_tensor_batch["multi_modal_data"][row] or []) for row in first_rows)
    assert len(media["image_grid_thw"]) == images


def test_an_update_moves_the_weights_as_a_packed_one_does(
    tiny_model_path: str, tmp_path: Path, lone_process_group
) -> None:
    """Two optimizer steps, with micro-batches that cut groups."""
    batch = answered(make_prompts(tiny_model_path, tmp_path))[list(range(12))]
    settings = [
        "data.rollout_batch_size=3",
        "worker.rollout.n=4",
        "worker.actor.global_batch_size=3",
        "worker.actor.micro_batch_size_per_device_for_update=1",
        "worker.actor.optim.lr=1e-3",
    ]
    weights = []
    for more in ([PACK], [SHARE]):
        worker = start_alone(make_config(tiny_model_path, *settings, *more))
        data = batch.select(
            [
                "input_ids",
                "attention_mask",
                "position_ids",
                "response_mask",
                "old_log_probs",
                "advantages",
                "ref_log_probs",
            ]
        )
        worker.update_actor(data)
        weights.append(worker.weights())
    # AdamW divides by the gradient's size, so that rounding shows where a gradient is almost zero.
    distances = [(weights[1][name] - value).abs().max().item() for name, value in weights[0].items()]
    assert max(distances) < 2e-4


def test_values_of_a_critic_are_the_same(tiny_model_path: str, tmp_path: Path, lone_process_group) -> None:
    batch = answered(make_prompts(tiny_model_path, tmp_path))
    values = []
    for share in ("false", "true"):
        worker = start_alone(make_config(tiny_model_path, *WITH_CRITIC, f"worker.critic.share_prompts={share}"))
        worker.fill_value_head()
        values.append(worker.compute_values(batch).batch["values"])
    torch.testing.assert_close(*values, atol=1e-5, rtol=0)


# ---- micro-batches and ranks ----


def costs_of(groups: list[tuple[int, list[int]]]) -> tuple[TokenCosts, list[int], list[str]]:
    """From prompt lengths and their response lengths."""
    prompts = [prompt for prompt, responses in groups for _ in responses]
    lengths = [prompt + response for prompt, responses in groups for response in responses]
    uids = [str(number) for number, (_, responses) in enumerate(groups) for _ in responses]
    return TokenCosts.from_groups(lengths, prompts, uids), lengths, uids


def batch_of(groups: list[tuple[int, list[int]]], prompt_length: int = 100, response_length: int = 50) -> DataProto:
    _, _, uids = costs_of(groups)
    prompts = torch.tensor([prompt for prompt, responses in groups for _ in responses])
    responses = torch.tensor([response for _, responses in groups for response in responses])
    response_mask = (torch.arange(response_length) < responses[:, None]).long()
    prompt_mask = (torch.arange(prompt_length) >= prompt_length - prompts[:, None]).long()
    tensors = {"attention_mask": torch.cat([prompt_mask, response_mask], dim=1), "response_mask": response_mask}
    return DataProto.from_dict(tensors, {"uid": np.array(uids, dtype=object)})


def test_costs_by_hand() -> None:
    costs, _, _ = costs_of([(10, [1, 2]), (20, [3])])
    assert costs.total([0]) == 11 and costs.total([0, 1]) == 13 and costs.total([1, 2]) == 35


@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_fit_hold_every_row_once_and_cut_no_group_that_fits(seed: int) -> None:
    random = np.random.default_rng(seed)
    groups = [(int(random.integers(5, 90)), random.integers(1, 50, random.integers(1, 9)).tolist()) for _ in range(12)]
    costs, _, uids = costs_of(groups)
    most = 260
    _, index_lists = prepare_dynamic_batch(batch_of(groups), most, shares_prompts=True)
    assert sorted(row for rows in index_lists for row in rows) == list(range(len(uids)))
    assert all(costs.total(rows) <= most for rows in index_lists)
    for number, (prompt, responses) in enumerate(groups):
        parts = [rows for rows in index_lists if any(uids[row] == str(number) for row in rows)]
        assert len(parts) == 1 or prompt + sum(responses) > most


def test_a_group_above_the_limit_is_cut_with_its_prompt_in_each_piece() -> None:
    groups = [(100, [50] * 6)]
    costs, _, _ = costs_of(groups)
    _, index_lists = prepare_dynamic_batch(batch_of(groups), 250, shares_prompts=True)
    assert [costs.total(rows) for rows in index_lists] == [250, 250]


def test_sharing_takes_fewer_micro_batches_than_packing() -> None:
    data = batch_of([(100, [25] * 8)] * 4)
    counts = [len(prepare_dynamic_batch(data, 600, shares_prompts=share)[1]) for share in (True, False)]
    assert counts == [2, 8]


def test_ranks_get_whole_groups_where_they_divide() -> None:
    groups = [(50, [10, 20]), (10, [5, 5]), (30, [40, 1]), (80, [3, 3])]
    costs, lengths, uids = costs_of(groups)
    order = balanced_order(lengths, 2, 1, costs)
    ranks = order[:4], order[4:]
    assert sorted(order) == list(range(8))
    assert all(len({uids[row] for row in rows}) == 2 for rows in ranks)
    assert [costs.total(rows) for rows in ranks] == [80 + 71, 20 + 86]


def test_groups_that_do_not_divide_over_the_ranks_are_cut() -> None:
    costs, lengths, _ = costs_of([(50, [10, 20, 30]), (10, [5, 5, 5])] * 2)
    order = balanced_order(lengths, 3, 2, costs)
    assert sorted(order) == list(range(12))
