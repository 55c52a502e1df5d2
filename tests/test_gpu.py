# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_gpu.py
"""What only a CUDA device can show: the run goes there by itself, offloaded memory comes back, kernels are right."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.utils import is_flash_attn_2_available

from tests.batches import ROWS, answer_at_random, make_prompts, uids_of, write_dataset
from tests.probe import RESPONSE_LENGTH, RESPONSES_PER_PROMPT, make_config, start_group
from tests.test_attention_recorder import QWEN, answered, record, recorded_and_expected_of_own_queries
from tests.test_sharding_groups import BF16
from tests.test_training_run import arguments, command, lines_of
from tests.tiny import make_tiny_model
from verl.models.kernels.attention_mass import BACKENDS, KeyPlan, default_backend
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.single_controller.worker_processes import WorkerProcesses
from verl.trainer.main import worker_modules
from verl.utils.attention_metrics import KeyKind
from verl.workers.fsdp2 import resident
from verl.workers.rollout.base import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ray,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_run_goes_to_the_gpu_by_itself_in_bf16_with_everything_offloaded_between_phases(
    tiny_model_path: str, tmp_path: Path
) -> None:
    train = write_dataset(tmp_path / "train.parquet", ROWS, copies=2)
    args = arguments(
        tiny_model_path,
        [f"data.train_files={train}", f"data.val_files={train}"],
        tmp_path / "run",
        "worker.actor.fsdp.mp_param_dtype=bf16",
        "worker.rollout.dtype=bf16",
        "worker.actor.offload.offload_params=true",
        "worker.actor.offload.offload_optimizer=true",
        "worker.ref.offload.offload_params=true",
        "trainer.max_steps=2",
    )
    finished = command(*args)
    assert finished.returncode == 0, finished.stderr
    assert "running on cuda: 1 worker" in finished.stderr
    steps = [record for record in lines_of(tmp_path / "run" / "experiment_log.jsonl") if "actor" in record]
    assert len(steps) == 2
    assert all(record["perf"]["max_memory_allocated_gb"] > 0 for record in steps)
    assert all(record["actor"]["grad_norm"] > 0 for record in steps)


@pytest.mark.parametrize("raises", [False, True])
def test_model_and_optimizer_rest_on_the_cpu_and_work_on_the_gpu_also_after_an_exception(raises: bool) -> None:
    model = nn.Linear(64, 64).cuda()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(torch.ones(1, 64, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def places() -> set[str]:
        moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return {tensor.device.type for tensor in (*model.parameters(), *moments)}

    step()
    for _ in range(2):
        try:
            with resident(torch.device("cuda"), model, optimizer):
                assert places() == {"cuda"}
                step()
                if raises:
                    raise KeyError("in the middle of a phase")
        except KeyError:
            assert raises
        assert places() == {"cpu"}


@pytest.mark.parametrize("precision", [(), BF16], ids=["fp32", "bf16"])
def test_a_model_that_fsdp_keeps_in_host_memory_trains_as_one_on_the_gpu(
    precision: tuple[str, ...], tiny_model_path: str, tmp_path: Path, ray_cluster
) -> None:
    """Over two micro-batches, with what would move between phases by itself asked for too; on two GPUs if there are.

    Between phases everything is on the CPU either way, but for buffers that FSDP leaves where it computes. What the
    engine is given from either place, and what a checkpoint brings back, are exact.
    """
    prompts = make_prompts(tiny_model_path, tmp_path)
    batch = answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH)
    workers = min(2, torch.cuda.device_count())
    weights, gradients, norms = {}, {}, {}
    common = [
        "worker.actor.micro_batch_size_per_device_for_update=2",
        "worker.actor.optim.lr=1e-3",
        *(f"worker.{name}.offload.offload_params=true" for name in ("actor", "ref")),
        "worker.actor.offload.offload_optimizer=true",
        *precision,
    ]
    resting = {
        "cuda": {"parameters": {"cpu"}, "states": {"cpu"}, "buffers": {"cpu"}},
        "cpu": {"parameters": {"cpu"}, "states": {"cpu"}, "buffers": {"cuda"}},
    }
    with WorkerProcesses(1, workers, "cuda", worker_modules("hf")) as processes:
        group = start_group(make_config(tiny_model_path, *common), workers, processes)
        for home, switch in (("cuda", "false"), ("cpu", "true")):
            keys = [f"worker.{name}.fsdp.enable_cpu_offload={switch}" for name in ("actor", "ref")]
            config = make_config(tiny_model_path, *common, *keys)
            group.restart(config)
            gradients[home], _ = group.gradients(batch, "token")
            group.update_actor(batch)
            assert all(place == resting[home] for place in group.places())
            weights[home] = weights_of_engine(group)
            group.save_checkpoint(str(tmp_path / home), model_only=False)
            norms[home] = group.update_actor(batch)["actor/grad_norm"]
            group.restart(config)
            group.load_checkpoint(str(tmp_path / home), model_only=False)
            assert all(place == resting[home] for place in group.places())
            assert all(torch.equal(value, weights[home][name]) for name, value in weights_of_engine(group).items())
            assert group.update_actor(batch)["actor/grad_norm"] == pytest.approx(norms[home], rel=1e-2)
    assert norms["cpu"] == pytest.approx(norms["cuda"], rel=1e-2)
    for name, value in weights["cuda"].items():
        settled = gradients["cuda"][name].abs() > 1e-4  # the first step of AdamW has one length for all gradients
        torch.testing.assert_close(weights["cpu"][name][settled], value[settled], atol=1e-4, rtol=2**-7)


def weights_of_engine(group: WorkerGroup) -> dict[str, torch.Tensor]:
    group.prepare_rollout_engine()
    weights = group.rollout_weights()[0]
    group.release_rollout_engine()
    return weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "key_heads", "dimension"), [(28, 4, 128), (16, 8, 256), (12, 2, 80)])
@pytest.mark.parametrize("extras", [False, True])
def test_the_attention_kernel_equals_the_reference_and_keeps_no_scores(
    dtype: torch.dtype, heads: int, key_heads: int, dimension: int, extras: bool
) -> None:
    """Two samples of 2048 columns, padded differently; an attention matrix of one would be 16 MB a head."""
    length, response_length = 2048, 512
    key_kinds = torch.full((2, length), KeyKind.TEXT, dtype=torch.int8)
    key_kinds[0, 0] = KeyKind.SINK
    key_kinds[1, :301], key_kinds[1, 300] = KeyKind.PADDING, KeyKind.SINK
    key_kinds[:, 400:1100] = KeyKind.VISION
    key_kinds[:, 1400:1420] = KeyKind.PROMPT
    key_kinds[:, -response_length:] = KeyKind.RESPONSE
    key_kinds[1, -100:] = KeyKind.PADDING
    plan = KeyPlan.from_kinds(key_kinds, response_length)

    torch.manual_seed(0)
    query = 3 * torch.randn(2, length, heads, dimension, dtype=dtype, device="cuda").transpose(1, 2)
    key = torch.randn(2, length, key_heads, dimension, dtype=dtype, device="cuda").transpose(1, 2)
    options = {"softcap": 20.0, "sinks": torch.randn(heads, device="cuda")} if extras else {}
    arguments = (query, key, plan, dimension**-0.5)

    plan.to(query.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    masses = BACKENDS[default_backend(query.device)](*arguments, **options)
    extra_memory = torch.cuda.max_memory_allocated() - before
    expected = BACKENDS["reference"](*arguments, **options)
    torch.testing.assert_close(masses.double(), expected, atol=2e-6, rtol=0)
    assert extra_memory < 2 * 2**20


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs FlashAttention 2")
def test_under_flash_attention_2_the_mass_is_that_of_the_models_own_queries_and_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a left-padded batch in bfloat16. SDPA is the looser measure: queries and keys of a layer have the rounding of
    the attention before it, which is another one there. On a CPU eager attention and SDPA are up to 0.0033 apart."""
    case = answered(QWEN)
    model = case.model.cuda().bfloat16()
    inputs = {name: value.cuda() for name, value in case.inputs.items()}
    under_sdpa = record(model, inputs, case.kinds)
    model.set_attn_implementation("flash_attention_2")
    recorded, expected = recorded_and_expected_of_own_queries(model, inputs, case.kinds, monkeypatch)
    torch.testing.assert_close(recorded, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(recorded, under_sdpa.cpu().double(), atol=0.02, rtol=0)


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_sleeps_while_the_actor_trains_and_wakes_with_its_weights(tmp_path: Path, ray_cluster) -> None:
    """Its cache goes and comes back with it; after each update its log-probabilities are the trainer's."""
    model_path = make_tiny_model(tmp_path / "model", hidden_size=128)  # heads of 32, the least that its kernels take
    config = make_config(
        model_path,
        "algorithm.disable_kl=true",
        "worker.actor.offload.offload_params=true",
        "worker.actor.offload.offload_optimizer=true",
        "worker.rollout.name=vllm",
        "worker.rollout.tensor_parallel_size=1",
        "worker.rollout.gpu_memory_utilization=0.4",
        "worker.rollout.enforce_eager=true",
        "worker.rollout.disable_tqdm=true",
    )
    prompts = make_prompts(model_path, tmp_path)
    greedy = Sampling(n=1, temperature=0.0, top_p=1.0, top_k=-1, ignore_eos=False)
    request = DataProto(prompts.batch, prompts.non_tensor_batch, {"sampling": greedy, "seed_parts": (0,)})
    with WorkerProcesses(1, 1, "cuda", worker_modules("vllm")) as processes:
        group = start_group(config, 1, processes)
        total = torch.cuda.get_device_properties(0).total_memory
        for update in range(3):
            asleep = torch.cuda.mem_get_info()[0]
            group.prepare_rollout_engine()
            awake = torch.cuda.mem_get_info()[0]
            assert asleep - awake > 0.2 * total, "the engine's cache comes back when it wakes"
            batch = group.generate_sequences(request)
            group.release_rollout_engine()
            assert torch.cuda.mem_get_info()[0] - awake > 0.2 * total, "and goes when it sleeps"
            batch.non_tensor_batch["multi_modal_data"] = prompts.non_tensor_batch["multi_modal_data"]
            batch.non_tensor_batch["uid"] = uids_of(len(batch), 1)
            of_trainer = group.compute_log_probs(batch).batch["old_log_probs"]
            of_engine = batch.batch["rollout_log_probs"]
            distance = (of_trainer - of_engine)[batch.batch["response_mask"].bool()].abs()
            assert distance.max() < 1e-3
            group.shift_weights(update)
