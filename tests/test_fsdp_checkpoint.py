# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_fsdp_checkpoint.py
"""What is saved comes back exactly, what is not saved is not left over, and this run's settings stay in force."""

import gc
import threading
from pathlib import Path

import pytest
import torch
from process_memory import status_of_process

from tests.batches import answer_at_random, make_prompts
from tests.probe import RESPONSE_LENGTH, RESPONSES_PER_PROMPT, make_config, start_alone, without_clock
from tests.tiny import make_tiny_model
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.utils.checkpoint import is_model_only
from verl.workers.fsdp2 import full_tensor


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight rows: the first four with images, the last four text only."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    return answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH)


@pytest.mark.parametrize(
    "precision",
    [
        (),
        ("worker.actor.fsdp.mp_param_dtype=bf16",),
        ("worker.actor.optim.strategy=adamw_bf16",),
        ("worker.actor.optim.strategy=adamw_bf16", "worker.actor.fsdp.torch_dtype=bf16"),
    ],
    ids=["fp32", "computed in bf16 by FSDP", "states in bf16", "weights and states in bf16"],
)
def test_a_checkpoint_restores_weights_optimizer_and_schedule_exactly(
    precision: tuple[str, ...], tiny_model_path: str, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    rate = ("worker.actor.optim.lr=1e-3", "worker.actor.optim.lr_warmup_steps=4")
    config = make_config(tiny_model_path, *rate, *precision)
    first = start_alone(config)
    first.update_actor(batch)
    first.update_actor(batch)
    first.save_checkpoint(str(tmp_path), model_only=False)
    expected = without_clock(first.update_actor(batch))
    second = start_alone(config)
    second.load_checkpoint(str(tmp_path), model_only=False)
    assert without_clock(second.update_actor(batch)) == expected
    after = first.weights()
    assert all(torch.equal(value, after[name]) for name, value in second.weights().items())
    saved = torch.load(tmp_path / "actor" / "model_world_size_1_rank_0.pt", weights_only=False)
    assert saved.keys() == after.keys()
    assert all(type(value) is torch.Tensor for value in saved.values())
    assert (tmp_path / "actor" / "huggingface" / "config.json").exists()


def test_a_resume_takes_no_memory_beside_the_weights_and_states_that_it_restores(
    batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    """Three times the weights, those included; torch's own function for it takes eight. What files are mapped to does
    not count: the system takes it back at any time."""
    model_path = make_tiny_model(tmp_path / "model", hidden_size=256, vocab_size=20_000)
    config = make_config(model_path, "algorithm.disable_kl=true")
    first = start_alone(config)
    first.update_actor(batch)
    first.save_checkpoint(str(tmp_path / "checkpoint"), model_only=False)
    first.saved_files(wait=True)
    del first
    worker = start_alone(config)
    weights = sum(parameter.nbytes for parameter in worker.actor.model.parameters()) / 2**20
    gc.collect()
    before, peak, is_over = status_of_process("RssAnon"), [0.0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.002):
            peak.append(status_of_process("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    worker.load_checkpoint(str(tmp_path / "checkpoint"), model_only=False)
    is_over.set()
    watcher.join()
    assert weights > 40
    assert max(peak) - before < 3.5 * weights


def test_a_checkpoint_of_two_ranks_has_a_file_a_rank_and_restores_both(
    batch: DataProto, two_ranks: WorkerGroup, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    before = two_ranks.weights()[0]
    two_ranks.save_checkpoint(folder, model_only=False)
    two_ranks.update_actor(batch)
    assert any(not torch.equal(value, before[name]) for name, value in two_ranks.weights()[0].items())
    two_ranks.load_checkpoint(folder, model_only=False)
    for weights in two_ranks.weights():
        assert all(torch.equal(value, before[name]) for name, value in weights.items())
    names = sorted(path.name for path in (tmp_path / "actor").glob("*.pt"))
    assert names == sorted(
        f"{kind}_world_size_2_rank_{rank}.pt" for kind in ("model", "optim", "extra_state") for rank in (0, 1)
    )


def test_the_generators_of_every_rank_go_on_where_they_were(two_ranks: WorkerGroup, tmp_path: Path) -> None:
    """Whatever comes to draw from them repeats itself in a resumed run."""
    two_ranks.save_checkpoint(str(tmp_path), model_only=False)
    drawn = two_ranks.draw_random(2)
    again = two_ranks.draw_random(2)
    assert all(first[kind] != second[kind] for first, second in zip(drawn, again, strict=True) for kind in range(3))
    two_ranks.load_checkpoint(str(tmp_path), model_only=False)
    assert two_ranks.draw_random(2) == drawn


def test_saving_the_model_only_over_a_full_checkpoint_leaves_nothing_of_it(
    tiny_model_path: str, lone_process_group, tmp_path: Path
) -> None:
    worker = start_alone(make_config(tiny_model_path))
    folder = str(tmp_path)
    worker.save_checkpoint(folder, model_only=False)
    assert not is_model_only(folder)
    worker.save_checkpoint(folder, model_only=True)
    assert [path.name for path in tmp_path.rglob("*.pt")] == ["model_world_size_1_rank_0.pt"]
    assert is_model_only(folder)


def test_a_resumed_run_goes_on_with_its_own_rate_and_the_moments_and_the_schedule_of_the_checkpoint(
    tiny_model_path: str, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    """Warm-up over 4 steps: the third step, the first after resuming, runs at 2/4 of the new rate."""
    warm_up = "worker.actor.optim.lr_warmup_steps=4"
    first = start_alone(make_config(tiny_model_path, warm_up, "worker.actor.optim.lr=1e-3"))
    first.update_actor(batch)
    first.update_actor(batch)
    first.save_checkpoint(str(tmp_path), model_only=False)
    settings = ["worker.actor.optim.lr=4e-4", "worker.actor.optim.weight_decay=0.25"]
    second = start_alone(make_config(tiny_model_path, warm_up, *settings))
    second.load_checkpoint(str(tmp_path), model_only=False)
    (group,) = second.actor.optimizer.param_groups
    assert group["weight_decay"] == 0.25
    assert group["lr"] == pytest.approx(2e-4)
    restored_states, saved_states = (worker.actor.optimizer.state.values() for worker in (second, first))
    for restored, saved in zip(restored_states, saved_states, strict=True):
        assert all(torch.equal(full_tensor(restored[name]), full_tensor(saved[name])) for name in saved)
    assert [second.update_actor(batch)["actor/lr"] for _ in range(3)] == pytest.approx([2e-4, 3e-4, 4e-4])


STATES_IN_BF16 = ("worker.actor.optim.strategy=adamw_bf16",)
ALL_IN_BF16 = (*STATES_IN_BF16, "worker.actor.fsdp.torch_dtype=bf16")


@pytest.mark.parametrize("resumed_with", [(), STATES_IN_BF16], ids=["fp32", "states in bf16"])
def test_weights_in_fp32_take_over_what_those_in_bf16_lacked(
    resumed_with: tuple[str, ...], tiny_model_path: str, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    rate = "worker.actor.optim.lr=1e-5"
    first = start_alone(make_config(tiny_model_path, rate, *ALL_IN_BF16))
    first.update_actor(batch)
    first.save_checkpoint(str(tmp_path), model_only=False)
    second = start_alone(make_config(tiny_model_path, rate, *resumed_with))
    second.load_checkpoint(str(tmp_path), model_only=False)
    resumed, states = dict(second.actor.model.named_parameters()), second.actor.optimizer.state
    lacked = 0
    for name, parameter in first.actor.model.named_parameters():
        state = first.actor.optimizer.state[parameter]
        exact = full_tensor(parameter).float() + full_tensor(state["compensation"]).float()
        lacked += (exact != full_tensor(parameter)).sum().item()
        assert torch.equal(full_tensor(resumed[name]), exact)
        assert "compensation" not in states[resumed[name]]
        assert torch.equal(full_tensor(states[resumed[name]]["exp_avg"]).bfloat16(), full_tensor(state["exp_avg"]))
    assert lacked > 1000
    second.update_actor(batch)


@pytest.mark.parametrize("saved_with", [(), STATES_IN_BF16], ids=["fp32", "states in bf16"])
def test_weights_in_bf16_go_on_from_moments_of_another_precision_and_lose_no_small_step(
    saved_with: tuple[str, ...], tiny_model_path: str, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    rate = "worker.actor.optim.lr=1e-6"
    first = start_alone(make_config(tiny_model_path, rate, *saved_with))
    first.update_actor(batch)
    first.save_checkpoint(str(tmp_path), model_only=False)
    second = start_alone(make_config(tiny_model_path, rate, *ALL_IN_BF16))
    second.load_checkpoint(str(tmp_path), model_only=False)
    pairs = list(zip(first.actor.model.parameters(), second.actor.model.parameters(), strict=True))
    for saved, parameter in pairs:
        moment = second.actor.optimizer.state[parameter]["exp_avg"]
        assert torch.equal(full_tensor(moment), full_tensor(first.actor.optimizer.state[saved]["exp_avg"]).bfloat16())
    second.update_actor(batch)
    for _, parameter in pairs:
        assert full_tensor(second.actor.optimizer.state[parameter]["compensation"]).count_nonzero() > 0


@pytest.mark.parametrize(("saved", "resumed"), [("true", "false"), ("false", "true")], ids=["thawed", "frozen"])
def test_a_vision_tower_that_is_frozen_or_trained_from_here_on_begins_without_moments(
    saved: str, resumed: str, tiny_model_path: str, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    first, second = (
        start_alone(make_config(tiny_model_path, f"worker.actor.model.freeze_vision_tower={switch}"))
        for switch in (saved, resumed)
    )
    first.update_actor(batch)
    first.save_checkpoint(str(tmp_path), model_only=False)
    second.load_checkpoint(str(tmp_path), model_only=False)
    with_state = {
        name for name, value in second.actor.model.named_parameters() if value in second.actor.optimizer.state
    }
    assert with_state == {name for name, _ in second.actor.model.named_parameters() if ".visual." not in name}
    second.update_actor(batch)
    steps = {
        (".visual." in name, int(full_tensor(second.actor.optimizer.state[value]["step"])))
        for name, value in second.actor.model.named_parameters()
        if value.requires_grad
    }
    assert steps == ({(False, 2), (True, 1)} if resumed == "false" else {(False, 2)})


def test_saving_before_the_first_step_changes_nothing_for_the_run_or_the_one_that_resumes_it(
    tiny_model_path: str, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    config = make_config(tiny_model_path, "worker.actor.optim.lr=1e-3")
    untouched, saved, resumed = start_alone(config), start_alone(config), start_alone(config)
    saved.save_checkpoint(str(tmp_path), model_only=False)
    resumed.load_checkpoint(str(tmp_path), model_only=False)
    for worker in (saved, resumed):
        assert not worker.actor.optimizer.state
    for worker in (untouched, saved, resumed):
        worker.update_actor(batch)
        assert {int(full_tensor(state["step"])) for state in worker.actor.optimizer.state.values()} == {1}
    expected = untouched.weights()
    for worker in (saved, resumed):
        assert all(torch.equal(value, expected[name]) for name, value in worker.weights().items())
