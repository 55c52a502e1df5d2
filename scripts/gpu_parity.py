# SPDX-License-Identifier: Apache-2.0
"""Compares a worker on a GPU with one on a CPU: one rank of each in this process, with the same rows and tiny models.

    python scripts/gpu_parity.py                           # every model family, in float32
    python scripts/gpu_parity.py Qwen2.5-VL Qwen2 --bf16   # some of them, computing in bf16

A line per family shows the differences: log-probabilities, attention masses, KL from a reference and values
(largest difference), gradients of policy and critic (norm of the difference over the norm); and the MiB that stay on
the GPU between phases, with everything offloaded, after a checkpoint was saved and loaded and the rollout engine
filled. A difference above its bound has a `!`, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import datasets
import torch
import torch.distributed as dist

from tests.batches import answer_at_random, with_random_weights
from tests.family_models import FAMILY_MODELS, make_family_model
from tests.probe import RESPONSE_LENGTH, WITH_CRITIC, ProbeWorker, make_config, run_of
from tests.test_families import make_family_prompts
from verl.protocol import DataProto
from verl.trainer.config import PPOConfig

MEBIBYTE = 2**20
SETTINGS = [
    *WITH_CRITIC,
    "algorithm.kl_penalty=full",
    "algorithm.enable_token_weights=true",
    "worker.rollout.collect_attentions=true",
]
OFFLOADED = [
    f"worker.{model}.offload.offload_{what}=true"
    for model, what in (
        ("actor", "params"),
        ("actor", "optimizer"),
        ("ref", "params"),
        ("critic", "params"),
        ("critic", "optimizer"),
    )
]
BF16 = [f"worker.{model}.fsdp.mp_param_dtype=bf16" for model in ("actor", "ref", "critic")]
HELD = "held_mib"
BOUNDS = {
    "fp32": dict(log_probs=3e-4, mass=3e-5, kl=1e-4, values=1e-3, actor_gradient=3e-3, critic_gradient=3e-3),
    "bf16": dict(log_probs=0.15, mass=0.03, kl=0.05, values=0.1, actor_gradient=0.15, critic_gradient=0.15),
}
"""Even with TF32 in the convolutions of vision towers, these bounds of float32 hold."""
HELD_BOUND = 80.0
"""MiB of workspaces that cuBLAS keeps; the models have less than five."""


def measure(config: PPOConfig, batch: DataProto, device: str, folder: Path) -> dict[str, torch.Tensor]:
    """The results of a worker on `device`, moved to the CPU, and the MiB that it holds there between phases."""
    worker = ProbeWorker(**run_of(config, 1), rank=0, world_size=1, local_rank=0, device=device)
    worker.init_model()
    worker.fill_value_head()
    passes = worker.compute_log_probs(batch).batch
    found = {
        "log_probs": passes["old_log_probs"],
        "mass": passes["attention_mass"],
        "kl": worker.compute_ref_kl(batch).batch["ref_kl"],
        "values": worker.compute_values(batch).batch["values"],
        "actor_gradient": _flat(worker.gradients(batch, "token")[0]),
        "critic_gradient": _flat(worker.critic_gradients(batch, "token")[0]),
    }
    worker.update_actor(batch)
    worker.save_checkpoint(str(folder), model_only=False)
    worker.saved_files(wait=True)
    worker.load_checkpoint(str(folder), model_only=False)
    worker.prepare_rollout_engine()
    worker.release_rollout_engine()
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    return {**found, HELD: torch.tensor(held / MEBIBYTE)}


def _flat(gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def compare(family: str, device: str, precision: str, folder: Path) -> dict[str, float]:
    """The differences between a worker on `device` and one on the CPU, by the names of `BOUNDS`, and `HELD`."""
    path = make_family_model(family, folder / "model")
    batch = with_random_weights(answer_at_random(make_family_prompts(path, folder), 2, RESPONSE_LENGTH))
    config = make_config(path, *SETTINGS, *OFFLOADED, *(BF16 if precision == "bf16" else []))
    expected, found = (measure(config, batch, place, folder / f"on_{place}") for place in ("cpu", device))
    distances = {name: _distance(name, found[name], expected[name]) for name in BOUNDS[precision]}
    return {**distances, HELD: float(found[HELD])}


def _distance(name: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = found.double() - expected.double()
    if name.endswith("gradient"):
        return float(difference.norm() / expected.double().norm())
    return float(difference.abs().max())


def beyond_bounds(distances: Mapping[str, float], precision: str) -> set[str]:
    """The names of differences above their bounds, including NaN."""
    bounds = {**BOUNDS[precision], HELD: HELD_BOUND}
    return {name for name, distance in distances.items() if not distance <= bounds[name]}


def run(families: Iterable[str], device: str, precision: str) -> bool:
    """Prints the lines; returns whether all differences are within their bounds."""
    is_fine = True
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
            distances = compare(family, device, precision, Path(folder))
        beyond = beyond_bounds(distances, precision)
        texts = [f"{name} {distance:.2g}{'!' * (name in beyond)}" for name, distance in distances.items()]
        print(f"{'FAILED' if beyond else 'ok':7}{family:13}{', '.join(texts)}", flush=True)
        is_fine = is_fine and not beyond
    return is_fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"out of {', '.join(FAMILY_MODELS)}; or all")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu compares a CPU with itself")
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - set(FAMILY_MODELS):
        parser.error(f"no such family: {', '.join(sorted(unknown))}; there are {', '.join(FAMILY_MODELS)}")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    backend = "gloo"
    if arguments.device == "cuda":
        torch.cuda.set_device(0)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    is_fine = run(arguments.families or FAMILY_MODELS, arguments.device, "bf16" if arguments.bf16 else "fp32")
    dist.destroy_process_group()
    sys.exit(not is_fine)


if __name__ == "__main__":
    main()
