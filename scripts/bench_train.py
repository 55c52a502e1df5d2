# SPDX-License-Identifier: Apache-2.0
"""Measures each switch: tokens per second and peak memory of rollout, log-prob pass and update, in one table.

    OMP_NUM_THREADS=1 python scripts/bench_train.py                # tiny model, one worker, on CPU: minutes
    OMP_NUM_THREADS=1 python scripts/bench_train.py --workers 2    # also the switches that need several
    python scripts/bench_train.py --shape 7b --engine vllm         # the shape of Qwen2.5-VL-7B, on GPUs
    python scripts/bench_train.py --shape 2b                       # its proportions, on one GPU of 80 GB

Every switch is turned against the defaults, for the same rows: half of the prompts with an image, responses of random
lengths. On a CPU both runs exist together and take turns, and a ratio is the median over turns; on GPUs they run one
after the other. Weights are random. Tokens are of whole sequences, or, in the rollout, of responses.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Ray reads these when it is imported.
os.environ.update(RAY_AUTH_TOKEN=secrets.token_hex(), RAY_USAGE_STATS_ENABLED="0")

import numpy as np
import ray
import torch
from bench_rollout import SIZES, make_prompts
from process_memory import forget_peak, status_of_process

from verl.algorithms.policy_loss import POLICY_LOSSES
from verl.models.flops import peak_flops
from verl.protocol import DataProto
from verl.single_controller.dispatch import DP_COMPUTE_PROTO, Dispatch, register
from verl.single_controller.worker_group import WorkerGroup
from verl.single_controller.worker_processes import WorkerProcesses, detect_device
from verl.trainer.config import PPOConfig, load_config
from verl.trainer.main import worker_modules
from verl.utils.batch_plan import BatchPlan
from verl.workers.fsdp_workers import FSDPWorker
from verl.workers.rollout.base import Sampling, assemble_batch

MEBIBYTE = 2**20
PHASES = ("rollout", "log-probs", "update")
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": SIZES,
    # The proportions of 7b, in a size that one device of 80 GB trains with AdamW in float32.
    "2b": dict(
        hidden_size=2048,
        intermediate_size=11008,
        num_layers=20,
        num_heads=16,
        num_kv_heads=2,
        vision_hidden_size=1280,
        vision_intermediate_size=3420,
        vision_depth=16,
        vision_heads=16,
        vocab_size=151936,
    ),
    "7b": dict(
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        vision_hidden_size=1280,
        vision_intermediate_size=3420,
        vision_depth=32,
        vision_heads=16,
        vocab_size=152064,
    ),
}
ACTOR = "worker.actor"
SWITCHES: dict[str, list[str]] = {
    "padding_free=false": [f"{ACTOR}.padding_free=false"],
    "dynamic_batching=false": [f"{ACTOR}.dynamic_batching=false"],
    "padding_free=false dynamic_batching=false": [f"{ACTOR}.padding_free=false", f"{ACTOR}.dynamic_batching=false"],
    "media_cache_gb=0": ["data.media_cache_gb=0"],
    "share_prompts=false": [f"{ACTOR}.share_prompts=false"],
    "enable_gradient_checkpointing=false": [f"{ACTOR}.model.enable_gradient_checkpointing=false"],
    "collect_attentions=true (VGR)": ["worker.rollout.collect_attentions=true"],
    "collect_attentions=true, last layer": [
        "worker.rollout.collect_attentions=true",
        "algorithm.token_weight_last_k_layers=1",
    ],
    "kl_penalty=full in the loss": [
        "algorithm.disable_kl=false",
        "algorithm.use_kl_loss=true",
        "algorithm.kl_penalty=full",
    ],
    "lora.rank=16": [f"{ACTOR}.model.lora.rank=16"],
    "freeze_vision_tower=true": [f"{ACTOR}.model.freeze_vision_tower=true"],
    "adamw_bf16": [f"{ACTOR}.optim.strategy=adamw_bf16", f"{ACTOR}.fsdp.torch_dtype=bf16"],
}
ON_GPUS = {
    "offload_params, offload_optimizer": [f"{ACTOR}.offload.offload_{what}=true" for what in ("params", "optimizer")],
    "enable_cpu_offload=true": [f"{ACTOR}.fsdp.enable_cpu_offload=true"],
}
WITH_SEVERAL_WORKERS = {
    "ulysses_size=2": [f"{ACTOR}.ulysses_size=2"],
    "fsdp_size=1": [f"{ACTOR}.fsdp.fsdp_size=1"],
    "enable_full_shard=false": [f"{ACTOR}.fsdp.enable_full_shard=false"],
}


class MeasuredWorker(FSDPWorker):
    """The worker of a run, with time and memory measurements."""

    @register(Dispatch(DP_COMPUTE_PROTO.split, list), shared_by="engine")
    def measure_rollout(self, data: DataProto) -> dict[str, float]:
        return self._measure(lambda: self.generate_sequences(data))

    @register(Dispatch(DP_COMPUTE_PROTO.split, list), shared_by="actor")
    def measure(self, phase: str, data: DataProto) -> dict[str, float]:
        passes = {"log-probs": self.compute_log_probs, "update": self.update_actor}
        return self._measure(lambda: passes[phase](data))

    def _measure(self, run: Callable[[], Any]) -> dict[str, float]:
        """Seconds, MiB in use before, peak MiB above that, and the TFLOP/s and MFU of an update."""
        clock = time.perf_counter
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() / MEBIBYTE
        else:
            forget_peak()
            before = status_of_process("VmRSS")
            if self.world_size == 1:
                clock = time.process_time  # which other processes disturb less
        start = clock()
        result = run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / MEBIBYTE
        else:
            peak = status_of_process("VmHWM")
        told = {name: result[f"perf/{name}_actor"] for name in ("tflops", "mfu") if f"perf/{name}_actor" in result}
        return {"seconds": clock() - start, "held": before, "peak": peak - before, **told}


# ---- what is measured ----


def config_of(arguments: argparse.Namespace, model_path: str, switch: list[str]) -> PPOConfig:
    dtype = "bf16" if arguments.device == "cuda" else "fp32"
    return load_config(
        [
            f"data.rollout_batch_size={arguments.prompts}",
            f"data.max_prompt_length={arguments.prompt_length}",
            f"data.max_response_length={arguments.response_length}",
            "algorithm.disable_kl=true",
            f"algorithm.adv_estimator={'grpo' if arguments.n > 1 else 'reinforce_plus_plus'}",
            f"{ACTOR}.model.model_path={model_path}",
            f"{ACTOR}.global_batch_size={arguments.prompts}",
            f"{ACTOR}.micro_batch_size_per_device_for_update={arguments.micro_batch_size}",
            f"{ACTOR}.micro_batch_size_per_device_for_experience={arguments.micro_batch_size}",
            f"{ACTOR}.fsdp.mp_param_dtype={dtype}",
            f"worker.ref.fsdp.mp_param_dtype={dtype}",
            f"worker.ref.fsdp.torch_dtype={dtype}",
            f"worker.rollout.name={arguments.engine}",
            f"worker.rollout.n={arguments.n}",
            f"worker.rollout.dtype={dtype}",
            "worker.rollout.tensor_parallel_size=1",
            "worker.rollout.disable_tqdm=true",
            f"trainer.n_gpus_per_node={arguments.workers}",
            *switch,
        ]
    )


def start(config: PPOConfig, arguments: argparse.Namespace) -> WorkerGroup:
    plan = BatchPlan.from_config(config, arguments.workers)
    group = WorkerGroup(
        WorkerProcesses(1, arguments.workers, arguments.device, worker_modules(config.worker.rollout.name)),
        MeasuredWorker,
        shares=plan.shares,
        config=config,
        plan=plan,
        policy_loss=POLICY_LOSSES[config.worker.actor.loss_type],
        signal_streams=(),
        training_steps=10,
    )
    group.init_model()
    return group


def rows_of(prompts: DataProto, arguments: argparse.Namespace) -> DataProto:
    """Sequences with responses of random lengths, as workers get them after a rollout."""
    generator = torch.Generator().manual_seed(0)
    count, length = len(prompts) * arguments.n, arguments.response_length
    responses = torch.randint(260, 290, (count, length), generator=generator)
    shortest = length if arguments.fill else length // 8
    lengths = torch.randint(shortest, length + 1, (count, 1), generator=generator)
    rows = assemble_batch(
        prompts, responses, (torch.arange(length) < lengths).long(), torch.zeros(count, length), arguments.n
    )
    for name in ("old_log_probs", "advantages"):
        rows.batch[name] = torch.randn(count, length, generator=generator)
    del rows.batch["prompts"], rows.batch["rollout_log_probs"]
    rows.non_tensor_batch["multi_modal_data"] = prompts.non_tensor_batch["multi_modal_data"].repeat(arguments.n)
    rows.non_tensor_batch["uid"] = np.arange(len(prompts)).repeat(arguments.n).astype(object)
    return rows


def measure(
    switches: list[list[str]], model_path: str, arguments: argparse.Namespace
) -> list[dict[str, list[dict[str, float]]]]:
    """Measurements of each run, by phase and turn; the first turn is not counted."""
    prompts = make_prompts(model_path, arguments.prompts, arguments.prompt_length, arguments.fill)
    inputs = prompts.select(
        ["input_ids", "attention_mask", "position_ids"], ["raw_prompt_ids", "multi_modal_data"], []
    )
    sampling = Sampling(n=arguments.n, temperature=1.0, top_p=1.0, top_k=-1, ignore_eos=True)
    rows = rows_of(prompts, arguments)
    groups: list[WorkerGroup] = []
    results: list[dict[str, list[dict[str, float]]]] = [{phase: [] for phase in PHASES} for _ in switches]
    try:
        for switch in switches:
            groups.append(start(config_of(arguments, model_path, switch), arguments))
        for turn in range(arguments.repeats + 1):
            inputs.meta_info = {"sampling": sampling, "seed_parts": (0, turn)}
            for group, result in zip(groups, results, strict=True):
                group.prepare_rollout_engine()
                measured = {"rollout": group.measure_rollout(inputs)}
                group.release_rollout_engine()
                measured |= {phase: group.measure(phase, rows) for phase in PHASES[1:]}
                if turn == 0:
                    continue
                for phase, of_workers in measured.items():
                    result[phase].append({key: max(one[key] for one in of_workers) for key in of_workers[0]})
    finally:
        for group in groups:
            group.processes.shutdown()
    return results


# ---- the table ----


def row_of(name: str, result: dict, baseline: dict, tokens: dict[str, int]) -> str:
    cells = [name]
    for phase in PHASES:
        seconds = [turn["seconds"] for turn in result[phase]]
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(baseline[phase], result[phase], strict=True)]
        speed = f"{tokens[phase] / statistics.median(seconds):.0f} tokens/s"
        if result is not baseline:
            speed += f" ({statistics.median(ratios):.2f} x)"
        cells.append(speed)
    for phase in PHASES:
        turns = result[phase]
        cells.append(f"{max(turn['held'] for turn in turns):.0f} + {max(turn['peak'] for turn in turns):.0f} MiB")
    update = result["update"]
    cells.append(f"{statistics.median(turn['tflops'] for turn in update):.3g}")
    cells.append(f"{statistics.median(turn['mfu'] for turn in update):.1%}" if "mfu" in update[0] else "-")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--n", type=int, default=4, help="responses a prompt")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--response-length", type=int, default=128)
    parser.add_argument("--fill", action="store_true", help="prompts and responses of the full lengths")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="switches whose names begin so; all by default")
    arguments = parser.parse_args()
    unknown = unknown_switches(arguments.only or [])
    if unknown:
        known = ", ".join(SWITCHES | ON_GPUS | WITH_SEVERAL_WORKERS)
        parser.error(f"no switch begins with {' or '.join(unknown)}; --only takes beginnings of: {known}")

    from tests.tiny import make_tiny_model

    ray.init("local", num_cpus=max(8, 2 * arguments.workers), include_dashboard=False, logging_level="ERROR")
    arguments.device = detect_device()
    switches = SWITCHES | (ON_GPUS if arguments.device == "cuda" else {})
    switches |= WITH_SEVERAL_WORKERS if arguments.workers > 1 else {}
    if arguments.only is not None:
        switches = {name: keys for name, keys in switches.items() if name.startswith(tuple(arguments.only))}
        if arguments.only and not switches:
            parser.error(f"--only {' '.join(arguments.only)} leaves no switch: they need a GPU, or --workers 2")
    with tempfile.TemporaryDirectory() as folder:
        model_path = make_tiny_model(folder, **SHAPES[arguments.shape])
        rows = rows_of(make_prompts(model_path, arguments.prompts, arguments.prompt_length, arguments.fill), arguments)
        tokens = print_head(rows, arguments)
        if arguments.device == "cuda":
            (baseline,) = measure([[]], model_path, arguments)
            print(row_of("defaults", baseline, baseline, tokens), flush=True)
            for name, keys in switches.items():
                (result,) = measure([keys], model_path, arguments)
                print(row_of(name, result, baseline, tokens), flush=True)
        else:
            for index, (name, keys) in enumerate(switches.items()):
                baseline, result = measure([[], keys], model_path, arguments)
                if index == 0:
                    print(row_of("defaults", baseline, baseline, tokens))
                print(row_of(name, result, baseline, tokens), flush=True)
    ray.shutdown()


def unknown_switches(beginnings: list[str]) -> list[str]:
    """Those with which the name of no switch begins."""
    names = SWITCHES | ON_GPUS | WITH_SEVERAL_WORKERS
    return [beginning for beginning in beginnings if not any(name.startswith(beginning) for name in names)]


def print_head(rows: DataProto, arguments: argparse.Namespace) -> dict[str, int]:
    """Prints what is measured and the head of the table; returns each phase's tokens."""
    of_rows = int(rows.batch["attention_mask"].sum())
    tokens = {"rollout": arguments.response_length * arguments.prompts * arguments.n}
    tokens |= dict.fromkeys(PHASES[1:], of_rows)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    setting = f"{arguments.shape}, {arguments.workers} worker(s) on {where}, {arguments.engine} rollout"
    print(f"\n{setting}, torch {torch.__version__}")
    print(f"{len(rows)} sequences of {of_rows / len(rows):.0f} tokens in the mean; memory: held before + on top\n")
    if arguments.device == "cuda" and peak_flops(where) is None:
        print(f"no MFU: the peak of {where} is not known\n")
    memory = [f"{phase}: memory" for phase in PHASES]
    print(f"| {' | '.join(['switch', *PHASES, *memory, 'update: TFLOP/s', 'MFU'])} |")
    print(f"|{'---|' * (2 * len(PHASES) + 3)}", flush=True)
    return tokens


if __name__ == "__main__":
    main()
