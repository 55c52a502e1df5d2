# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_pretended_cuda.py
"""A worker on a pretended CUDA device mixes no places, works nowhere else, and seldom lets the host wait."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.batches import answer_at_random, uids_of, with_random_weights
from tests.family_models import make_family_model
from tests.pretended_cuda import Findings, describe, place_of, pretended_cuda
from tests.probe import RESPONSE_LENGTH, WITH_CRITIC, ProbeWorker, make_config, run_of, start_alone
from tests.test_families import make_family_prompts
from verl.protocol import DataProto
from verl.trainer.config import PPOConfig
from verl.workers.rollout.base import Sampling

pytestmark = pytest.mark.usefixtures("private_cache", "lone_process_group")

OFFLOADED = [
    f"worker.{model}.offload.offload_{what}=true"
    for model, what in (("actor", "params"), ("actor", "optimizer"), ("ref", "params"))
]
CRITIC_OFFLOADED = [f"worker.critic.offload.offload_{what}=true" for what in ("params", "optimizer")]
VGR = [
    "worker.rollout.collect_attentions=true",
    "algorithm.enable_token_weights=true",
    "algorithm.token_weight_last_k_layers=1",
]
LORA = ["worker.actor.model.lora.rank=4", "worker.actor.optim.strategy=adamw_bf16"]
SAMPLING = Sampling(n=2, temperature=1.0, top_p=0.9, top_k=20, ignore_eos=False)

OF_TRANSFORMERS = 26
"""Waits of one forward and backward of Qwen2.5-VL with two vision layers, in transformers: under SDPA its tower reads
the images' borders on the device, three times a layer, and it checks the number of their tokens there."""


def start_on_device(config: PPOConfig) -> ProbeWorker:
    worker = ProbeWorker(**run_of(config, 1), rank=0, world_size=1, local_rank=0, device="cuda")
    worker.init_model()
    return worker


def train_one_step(worker: ProbeWorker, prompts: DataProto) -> DataProto:
    """Every phase of a step, in their order; the batch with what the passes without gradient gave."""
    prompts.meta_info = {"sampling": SAMPLING, "seed_parts": (0,)}
    worker.prepare_rollout_engine()
    batch = worker.generate_sequences(prompts)
    worker.release_rollout_engine()
    batch.non_tensor_batch["multi_modal_data"] = prompts.non_tensor_batch["multi_modal_data"].repeat(2)
    batch.non_tensor_batch["uid"] = uids_of(len(batch), 2)
    batch.union(worker.compute_log_probs(batch))
    if worker.reference is not None:
        batch.union(worker.compute_ref_log_probs(batch))
    if worker.config.algorithm.enable_token_weights:
        with_random_weights(batch)
    if worker.config.algorithm.needs_critic:
        batch.union(worker.compute_values(batch))
        batch.batch["returns"] = torch.ones_like(batch.batch["values"])
        worker.update_critic(batch)
    batch.batch["advantages"] = torch.ones_like(batch.batch["old_log_probs"])
    worker.update_actor(batch)
    return batch


def require_nothing(findings: Findings) -> None:
    for events in (findings.mixes, findings.host_work, findings.collectives):
        assert not events, describe(events)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("Qwen2.5-VL", [*OFFLOADED, *VGR]),
        ("Qwen3-VL", [*OFFLOADED, *CRITIC_OFFLOADED, *WITH_CRITIC, "algorithm.disable_kl=true"]),
        ("Qwen2.5-VL", [*OFFLOADED, *LORA]),
        ("Gemma 3", [*OFFLOADED, *VGR, "worker.actor.padding_free=true"]),
    ],
    ids=["everything offloaded", "critic", "adapters and states in bf16", "padded"],
)
def test_a_step_and_a_resume_work_on_the_device_alone_and_rest_on_the_host(
    family: str, overrides: list[str], tmp_path: Path
) -> None:
    """Nothing runs outside `resident()`, where the weights are on the host: it would be work of the host, or a mix."""
    path = make_family_model(family, tmp_path / "model")
    prompts = make_family_prompts(path, tmp_path)
    config = make_config(path, "data.max_response_length=4", *overrides)
    with pretended_cuda() as findings:
        worker = start_on_device(config)
        batch = train_one_step(worker, prompts)
        worker.save_checkpoint(str(tmp_path), model_only=False)
        worker.saved_files(wait=True)
        worker.load_checkpoint(str(tmp_path), model_only=False)
        worker.update_actor(batch)
        worker.gradients(batch, "token")
        worker.shift_weights(0)
        assert worker.places() == {"parameters": {"cpu"}, "states": {"cpu"}, "buffers": {"cpu"}}
        assert {place_of(stream) for stream in batch.batch.values()} == {"cpu"}
    require_nothing(findings)
    on_host = train_one_step(start_alone(config), prompts).batch
    assert batch.batch.keys() == on_host.keys()
    for name, stream in on_host.items():
        torch.testing.assert_close(batch.batch[name], stream, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("packed", [True, False])
def test_in_a_micro_batch_the_host_waits_for_transformers_alone(packed: bool, tmp_path: Path) -> None:
    """A pass fetches each of its streams once, however many micro-batches it has."""
    path = make_family_model("Qwen2.5-VL", tmp_path / "model")
    batch = answer_at_random(make_family_prompts(path, tmp_path), 2, RESPONSE_LENGTH)
    common = [*VGR, f"worker.actor.padding_free={str(packed).lower()}", "worker.rollout.importance_cap=2.0"]
    with_random_weights(batch).batch["importance_weights"] = torch.ones(batch.batch["responses"].shape)
    with pretended_cuda() as findings:
        worker = start_on_device(make_config(path, *common, "algorithm.token_signals_to_log=[entropy,hidden_cosine]"))
        rows = batch[[0, 1, 4, 5]]

        def waits_of(run: Callable[[], object]) -> tuple[int, int]:
            """Our own, and transformers'."""
            findings.clear()
            run()
            ours = {event: count for event, count in findings.waits.items() if event.is_ours}
            return sum(ours.values()), sum(findings.waits.values()) - sum(ours.values())

        def update() -> None:
            loss, _ = worker.actor.objective(rows, torch.tensor(30.0), 4)
            loss.backward()

        streams = ["log_probs", *worker.signal_streams]
        with torch.no_grad():
            of_log_probs = waits_of(lambda: worker.actor.forward.measure(rows, streams))
        of_update = waits_of(update)
        assert (of_log_probs[0], of_update[0]) == (0, 0), describe(findings.waits)
        assert max(of_log_probs[1], of_update[1]) <= OF_TRANSFORMERS, describe(findings.waits)
        passes = [
            waits_of(lambda size=size: worker.actor.forward.measure_all(batch, ["log_probs", "entropy"], size))[0]
            for size in (8, 2)
        ]
        assert passes == [2, 2], describe(findings.waits)


@pytest.mark.parametrize(
    ("what", "run"),
    [
        ("mixes", lambda here, there: here + there),
        ("mixes", lambda here, there: here.numpy()),
        ("waits", lambda here, there: here.sum().item()),
        ("waits", lambda here, there: here.tolist()),
        ("waits", lambda here, there: bool(here.any())),
        ("waits", lambda here, there: here[here > 0]),
        ("waits", lambda here, there: here.cpu()),
        ("waits", lambda here, there: there.to("cuda")),
        ("waits", lambda here, there: torch.tensor([1.0], device="cuda")),
        ("host_work", lambda here, there: there @ there),
        ("collectives", lambda here, there: dist.all_reduce(torch.ones(2, 3).T)),
    ],
)
def test_what_a_device_would_refuse_or_wait_for_is_found(what: str, run: Callable) -> None:
    with pretended_cuda() as findings:
        here, there = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
        run(here, there)
    assert {name for name, events in vars(findings).items() if events} == {what}


def test_what_a_device_takes_without_a_wait_is_not_found() -> None:
    with pretended_cuda() as findings:
        here, there = torch.ones(2, 2, device="cuda", requires_grad=True), torch.ones(2, 2)
        sent = there.pin_memory().to("cuda", non_blocking=True)
        product = (here @ sent * torch.tensor(2.0)).sum()
        product.backward()
        assert here.device == sent.device == here.grad.device == torch.device("cuda", 0)
        assert there.device == torch.device("cpu") and not there.is_cuda
    assert findings == Findings()
