# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_fsdp2.py
"""What is sharded, in which precision it computes and adds up, what is clipped, and what moves between phases."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from tests.batches import answer_at_random, make_prompts
from tests.probe import (
    RESPONSE_LENGTH,
    RESPONSES_PER_PROMPT,
    WITH_CRITIC,
    ProbeWorker,
    make_config,
    start_alone,
    start_two,
)
from verl.models.loader import DTYPES
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.workers.fsdp2 import build_mesh, build_optimizer, build_scheduler, clip_gradients, resident
from verl.workers.fsdp_checkpoint import FSDPCheckpoint


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight rows: the first four with images, the last four text only."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    return answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH)


CASTS = [f"worker.{name}.fsdp.mp_param_dtype=bf16" for name in ("actor", "critic", "ref")]
"""Has fp32 models compute in bf16, which FSDP does on a single worker too."""


def global_norm(parameters: list[nn.Parameter]) -> float:
    """Written out: the root of the sum of all squared entries."""
    return sum(parameter.grad.detach().double().square().sum().item() for parameter in parameters) ** 0.5


def test_every_layer_of_both_towers_and_the_root_are_sharding_groups(tiny_model_path: str, lone_process_group) -> None:
    """The tiny model has two decoder layers and one vision block: gathered one by one, never all at once."""
    worker = start_alone(make_config(tiny_model_path, *CASTS))
    for model in (worker.actor.model, worker.ref_model):
        groups = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
        layers = {f"model.language_model.layers.{index}" for index in (0, 1)}
        assert groups == {"", "model.visual.blocks.0", *layers}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_worker_with_the_whole_model_in_its_own_precision_trains_without_fsdp_and_bit_for_bit_as_with_it(
    precision: str, tiny_model_path: str, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    """Checkpoints and the stream of weights too."""
    config = make_config(
        tiny_model_path,
        f"worker.actor.fsdp.torch_dtype={precision}",
        f"worker.actor.fsdp.mp_param_dtype={precision}",
        "worker.actor.micro_batch_size_per_device_for_update=2",
    )
    results = []
    for is_wrapped in (False, True):
        worker = start_alone(config)
        assert not any(isinstance(module, FSDPModule) for module in worker.actor.model.modules())
        if is_wrapped:
            _wrap(worker)
        norms = [worker.update_actor(batch)["actor/grad_norm"] for _ in range(2)]
        worker.save_checkpoint(str(tmp_path / str(is_wrapped)), False)
        log_probs = worker.compute_log_probs(batch).batch["old_log_probs"]
        results.append((norms, log_probs, worker.weights()))
    (norms, log_probs, weights), (other_norms, other_log_probs, other_weights) = results
    assert norms == other_norms
    assert torch.equal(log_probs, other_log_probs)
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    worker = start_alone(config)
    worker.load_checkpoint(str(tmp_path / "True"), False)  # of FSDP, by a worker without
    resumed = start_alone(config)
    resumed.load_checkpoint(str(tmp_path / "False"), False)
    for other in (worker, resumed):
        other.update_actor(batch)
    assert all(torch.equal(value, resumed.weights()[name]) for name, value in worker.weights().items())


def _wrap(worker: ProbeWorker) -> None:
    """Puts FSDP around a plain policy, and an optimizer over its shards."""
    actor, fsdp = worker.actor, worker.config.worker.actor.fsdp
    dtype = DTYPES[fsdp.mp_param_dtype]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = [module for module in actor.model.modules() if type(module).__name__ in actor.model._no_split_modules]
    for module in (*layers, actor.model):
        fully_shard(module, mesh=build_mesh(worker.device), mp_policy=policy)
    actor.optimizer = build_optimizer(actor.model, actor.config.optim)
    actor.scheduler = build_scheduler(actor.optimizer, actor.config.optim, worker.training_steps)
    actor.checkpoint = FSDPCheckpoint(actor.model, actor.optimizer, actor.scheduler, actor.checkpoint.pretrained_parts)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_layers_and_head_compute_in_mp_param_dtype(
    name: str, dtype: torch.dtype, tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    worker = start_alone(make_config(tiny_model_path, f"worker.actor.fsdp.mp_param_dtype={name}"))
    seen = []
    core = worker.actor.model.model
    inside = [core.visual.blocks[0].attn.qkv, core.language_model.layers[1].mlp.up_proj, worker.actor.model.lm_head]
    for module in inside:
        module.register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
    worker.compute_log_probs(batch)
    assert len(seen) >= len(inside)
    assert set(seen) == {dtype}


@pytest.mark.parametrize(("name", "is_rounded"), [("bf16", True), ("fp32", False)])
def test_gradients_of_two_ranks_add_up_in_mp_reduce_dtype(
    name: str, is_rounded: bool, tiny_model_path: str, batch: DataProto, ray_cluster
) -> None:
    """Each rank's gradient is bf16; the sum of two of them fits into bf16 only if it was rounded to it."""
    config = make_config(
        tiny_model_path,
        "worker.actor.fsdp.mp_param_dtype=bf16",
        f"worker.actor.fsdp.mp_reduce_dtype={name}",
        "worker.actor.micro_batch_size_per_device_for_update=4",
    )
    group = start_two(config)
    try:
        gradients, _ = group.gradients(batch, "token")
    finally:
        group.release()
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    rounded = all(torch.equal(gradient, gradient.bfloat16().float()) for gradient in gradients.values())
    assert rounded == is_rounded


def test_gradients_are_sharded_after_every_micro_batch(
    tiny_model_path: str, batch: DataProto, lone_process_group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each backward pass but the first, and after the last, they are DTensors of the parameters' placement."""
    split = ["worker.actor.micro_batch_size_per_device_for_update=2", "worker.actor.dynamic_batching=false"]
    worker = start_alone(make_config(tiny_model_path, *split, *CASTS))
    seen: list[set[type]] = []
    plain_objective = worker.actor.objective

    def objective_with_a_look(*args):
        seen.append({type(parameter.grad) for parameter in worker.actor.model.parameters()})
        return plain_objective(*args)

    monkeypatch.setattr(worker.actor, "objective", objective_with_a_look)
    worker.gradients(batch, "token")
    assert seen == [{type(None)}] + 3 * [{DTensor}]


def test_clipping_scales_the_gradient_to_the_bound_and_tells_the_norm_before() -> None:
    """3 and 4 in two parameters have norm 5; a bound of 2 leaves 6/5 and 8/5, a bound of 10 leaves them alone."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))])
    for bound, expected in ((10.0, [3.0, 4.0]), (2.0, [1.2, 1.6])):
        model[0].grad, model[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
        assert clip_gradients(model, bound) == pytest.approx(5.0)
        assert [parameter.grad.item() for parameter in model] == pytest.approx(expected)


def test_the_optimizer_sees_gradients_within_max_grad_norm(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    worker = start_alone(make_config(tiny_model_path, "worker.actor.max_grad_norm=0.01"))
    norms = []
    parameters = list(worker.actor.model.parameters())
    worker.actor.optimizer.register_step_pre_hook(lambda *_: norms.append(global_norm(parameters)))
    metrics = worker.update_actor(batch)
    assert norms == [pytest.approx(0.01, rel=1e-3)]
    assert metrics["actor/grad_norm"] > 0.02


def test_two_ranks_without_any_image_work_as_one_does(
    tiny_model_path: str, batch: DataProto, lone_process_group, two_ranks: WorkerGroup
) -> None:
    text_only = batch[[4, 5, 6, 7]]
    alone = start_alone(make_config(tiny_model_path, "worker.actor.micro_batch_size_per_device_for_update=2"))
    whole, shared = alone.gradients(text_only, "token")[0], two_ranks.gradients(text_only, "token")[0]
    for name, gradient in whole.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-6, rtol=1e-4)


class Moves(TorchFunctionMode):
    """Writes down which tensors are sent to which device, and leaves them where they are: it may not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.device):
            self.made.append((args[1].type, id(args[0])))
            return args[0]
        return function(*args, **(kwargs or {}))


def adam_with_state(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def moments_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize(("with_model", "with_optimizer"), [(True, True), (True, False), (False, True)])
def test_what_is_offloaded_is_sent_to_the_device_and_back_also_after_an_exception(
    with_model: bool, with_optimizer: bool, raises: bool
) -> None:
    model = nn.Linear(2, 3)
    optimizer = adam_with_state(model)
    tensors = [*model.parameters()] if with_model else []
    tensors += moments_of(optimizer) if with_optimizer else []
    parts = (model if with_model else None, optimizer if with_optimizer else None)
    with Moves() as moves:
        try:
            with resident(torch.device("cuda"), *parts):
                sent = list(moves.made)
                if raises:
                    raise KeyError("in the middle of a phase")
        except KeyError:
            assert raises
    assert sorted(sent) == sorted(("cuda", id(tensor)) for tensor in tensors)
    assert sorted(moves.made[len(sent) :]) == sorted(("cpu", id(tensor)) for tensor in tensors)


@pytest.mark.parametrize("switch", ["true", "false"])
def test_each_phase_fetches_what_it_needs_of_what_is_offloaded_and_nothing_else(
    switch: str, tiny_model_path: str, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    """On a CPU nothing moves, but every phase asks for it, once before and once after."""
    offloads = [f"worker.{name}.offload.offload_params" for name in ("actor", "critic", "ref")]
    offloads += [f"worker.{name}.offload.offload_optimizer" for name in ("actor", "critic")]
    overrides = [f"{key}={switch}" for key in offloads]
    worker = start_alone(make_config(tiny_model_path, *WITH_CRITIC, *CASTS, *overrides))
    worker.update_actor(batch)  # the optimizer has no state before
    worker.update_critic(batch)
    parts = {"reference": set(map(id, worker.ref_model.parameters()))}
    for name, trained in worker.trained.items():
        parts[f"{name} parameters"] = set(map(id, trained.model.parameters()))
        parts[f"{name} moments"] = set(map(id, moments_of(trained.optimizer)))
    both = parts.keys() - {"reference"}
    phases = {
        "prepare_rollout_engine": ((), {"actor parameters"}),
        "compute_log_probs": ((batch,), {"actor parameters"}),
        "compute_ref_log_probs": ((batch,), {"reference"}),
        "compute_values": ((batch,), {"critic parameters"}),
        "update_actor": ((batch,), {"actor parameters", "actor moments"}),
        "update_critic": ((batch,), {"critic parameters", "critic moments"}),
        "save_checkpoint": ((str(tmp_path), False), both),
        "load_checkpoint": ((str(tmp_path), True), both),
    }
    for phase, (arguments, expected) in phases.items():
        with Moves() as moves:
            getattr(worker, phase)(*arguments)
        moved = [tensor for _, tensor in moves.made]
        fetched = {name for name, tensors in parts.items() if tensors <= set(moved)}
        touched = {name for name, tensors in parts.items() if tensors & set(moved)}
        assert fetched == touched == (expected if switch == "true" else set()), phase
        assert all(moved.count(tensor) == 2 for name in fetched for tensor in parts[name]), phase


def test_what_fsdp_keeps_in_host_memory_is_not_moved_between_phases_too(
    tiny_model_path: str, batch: DataProto, lone_process_group, tmp_path: Path
) -> None:
    """It would meet a parameter on the device where it expects one on the CPU."""
    keys = [f"worker.{name}.offload.offload_params=true" for name in ("actor", "critic", "ref")]
    keys += [f"worker.{name}.offload.offload_optimizer=true" for name in ("actor", "critic")]
    keys += [f"worker.{name}.fsdp.enable_cpu_offload=true" for name in ("actor", "critic", "ref")]
    worker = start_alone(make_config(tiny_model_path, *WITH_CRITIC, *CASTS, *keys))
    worker.update_actor(batch)
    worker.update_critic(batch)
    with Moves() as moves:
        worker.prepare_rollout_engine()
        worker.update_actor(batch)
        worker.update_critic(batch)
        worker.compute_ref_log_probs(batch)
        worker.save_checkpoint(str(tmp_path), False)
    trained = [parameter for model in worker.trained.values() for parameter in model.model.parameters()]
    resting = [*trained, *worker.ref_model.parameters()]
    resting += [moment for model in worker.trained.values() for moment in moments_of(model.optimizer)]
    assert {id(tensor) for tensor in resting} & {tensor for _, tensor in moves.made} == set()
