# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of token signals: a plain log-prob pass, one per signal, and one with eager attention maps.

    OMP_NUM_THREADS=1 python scripts/bench_vgr.py                  # the small model, on CPU: minutes
    python scripts/bench_vgr.py --shape 7b --lengths 8192          # the shape of Qwen2.5-VL-7B, on a GPU

Times are side by side in one process: every repeat runs each variant once, the figure is the median over repeats of
the ratio to the plain pass of the same repeat. Peaks are measured in a fresh process for each variant. Weights are
random; one sequence of T tokens, T/4 of them response (2048 with --shape 7b), T/2 image placeholders. A cell says so
where the eager maps are larger than the memory that is free, or where a pass runs out of memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from process_memory import forget_peak, status_of_process

from verl.algorithms.token_weights import MEASURED_STREAMS, TOKEN_SIGNALS, find_signal
from verl.models.kernels.attention_mass import default_backend
from verl.models.registry import media_token_ids
from verl.protocol import DataProto
from verl.utils.attention_metrics import KeyVocabulary
from verl.utils.logprobs import log_probs_from_logits
from verl.utils.machine_memory import memory_in_use
from verl.workers.actor.config import ActorConfig
from verl.workers.actor.forward import PolicyForward, SignalSettings

MEBIBYTE, GIBIBYTE = 2**20, 2**30
IMAGE, VISION_START, VISION_END = 1, 2, 3
SHAPES = {
    "small": dict(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        mrope_section=[8, 12, 12],
    ),
    "7b": dict(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        mrope_section=[16, 24, 24],
    ),
}
PLAIN, EAGER = "plain", "eager maps"
OUT_OF_MEMORY = "out of memory"


def build_model(shape: str, device: torch.device) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights; float32 on CPU, bfloat16 on GPU. The vision tower is one tiny layer that never runs."""
    sizes = dict(SHAPES[shape])
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=sizes.pop("mrope_section"))
    config = Qwen2_5_VLConfig(
        text_config=dict(
            **sizes, max_position_embeddings=32768, rope_parameters=rope, bos_token_id=None, eos_token_id=None
        ),
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32),
        image_token_id=IMAGE,
        video_token_id=IMAGE,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def build_rows(length: int, response_length: int) -> DataProto:
    """One sequence without padding: some text, T/2 image tokens, text up to the response."""
    generator = torch.Generator().manual_seed(length)
    input_ids = torch.randint(10, 1024, (1, length), generator=generator)
    input_ids[0, 16 : 16 + length // 2] = IMAGE
    return DataProto.from_dict(
        {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "position_ids": torch.arange(length).expand(1, 4, length).contiguous(),
            "responses": input_ids[:, -response_length:].contiguous(),
            "response_mask": torch.ones(1, response_length, dtype=torch.int64),
        },
        {"uid": np.array(["prompt"], dtype=object)},
    )


def passes_of_signals() -> dict[str, list[str]]:
    """The streams of each pass, by the signals that it serves; the plain log-prob pass comes first."""
    names: dict[tuple[str, ...], list[str]] = {(): [PLAIN]}
    for name in TOKEN_SIGNALS:
        wanted = tuple(stream for stream in MEASURED_STREAMS if stream in find_signal(name).streams)
        names.setdefault(wanted, []).append(f"`{name}`")
    return {", ".join(signals): ["log_probs", *wanted] for wanted, signals in names.items()}


def variants_of(
    model: Qwen2_5_VLForConditionalGeneration, rows: DataProto, device: torch.device
) -> dict[str, Callable[[], object]]:
    """The passes to compare, by name, the plain one first."""
    vocabulary = KeyVocabulary((IMAGE,), {"vision_start": VISION_START, "vision_end": VISION_END}, ())
    num_layers = model.config.text_config.num_hidden_layers
    variants: dict[str, Callable[[], object]] = {}
    for label, wanted in passes_of_signals().items():
        by_attention = "attention_mass" in wanted
        for count in sorted({1, min(4, num_layers), num_layers}) if by_attention else [num_layers]:
            settings = SignalSettings(vocabulary, f"last:{count}")
            forward = PolicyForward(model, None, device, ActorConfig(), signals=settings)
            layers = f", {count} of {num_layers} layers" if by_attention else ""
            variants[label + layers] = partial(forward.measure, rows, wanted)
    variants[EAGER] = lambda: eager_pass(model, rows, device)
    return variants


def eager_pass(model: Qwen2_5_VLForConditionalGeneration, rows: DataProto, device: torch.device) -> torch.Tensor:
    """The same log-probs from a forward that also returns every layer's attention map, without using the maps."""
    response_length = rows.batch["responses"].shape[1]
    model.set_attn_implementation("eager")
    try:
        output = model(
            input_ids=rows.batch["input_ids"].to(device),
            attention_mask=rows.batch["attention_mask"].to(device),
            position_ids=rows.batch["position_ids"].transpose(0, 1).to(device),
            use_cache=False,
            logits_to_keep=response_length + 1,
            output_attentions=True,
        )
    finally:
        model.set_attn_implementation("sdpa")
    assert len(output.attentions) == model.config.text_config.num_hidden_layers
    return log_probs_from_logits(
        output.logits[:, :-1], rows.batch["responses"].to(device), 1.0, media_token_ids(model.config)
    )


def bytes_of_eager_maps(config: Qwen2_5_VLConfig, length: int, dtype: torch.dtype) -> int:
    """Bytes of the maps of an eager pass: (T, T) for each layer and head."""
    text = config.text_config
    return text.num_hidden_layers * text.num_attention_heads * length**2 * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    in_use, total = memory_in_use()
    return total - in_use


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall time on a GPU; the process's own time on a CPU, which other processes disturb less."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    run()
    return time.process_time() - start


@torch.no_grad()
def measure_times(
    variants: dict[str, Callable[[], object]], device: torch.device, repeats: int, eager_repeats: int
) -> dict[str, tuple[float, float]]:
    """Seconds (median) and ratio to the plain pass (median of the ratios within a repeat), by variant; nothing for a
    variant that runs out of memory."""
    first = next(iter(variants))
    times: dict[str, list[float]] = {name: [] for name, run in variants.items() if fits_in_memory(run)}
    for repeat in range(repeats):
        names = [name for name in times if name != EAGER or repeat < eager_repeats]
        for name in names if repeat % 2 == 0 else reversed(names):
            times[name].append(seconds_of(variants[name], device))
    return {
        name: (
            statistics.median(seconds),
            statistics.median(one / plain for one, plain in zip(seconds, times[first], strict=False)),
        )
        for name, seconds in times.items()
        if seconds
    }


def fits_in_memory(run: Callable[[], object]) -> bool:
    """Whether the pass runs without running out of memory; it also serves as warm-up."""
    try:
        run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


@torch.no_grad()
def measure_peak(
    model: Qwen2_5_VLForConditionalGeneration, arguments: argparse.Namespace, device: torch.device
) -> float:
    """MiB that one pass needs beyond what the process holds before it; a short pass has loaded what loads once."""
    (length,), name = arguments.lengths, arguments.peak
    variants_of(model, build_rows(64, 16), device)[name]()
    variants = variants_of(model, build_rows(length, response_length_of(arguments.shape, length)), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variants[name]()
        return (torch.cuda.max_memory_allocated() - before) / MEBIBYTE
    forget_peak()
    before = status_of_process("VmRSS")
    variants[name]()
    return status_of_process("VmHWM") - before


def peak_in_a_fresh_process(arguments: argparse.Namespace, length: int, name: str) -> float:
    """MiB; NaN where the pass runs out of memory there, beside this process."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    command = [sys.executable, __file__, "--shape", arguments.shape, "--peak", name, "--lengths", str(length)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if "OutOfMemoryError" in finished.stderr:
        return math.nan
    if finished.returncode != 0:
        raise RuntimeError(f"the pass {name!r} at T={length} failed:\n{finished.stderr[-2000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def table_of(results: dict[int, dict[str, dict[str, float] | str]]) -> str:
    """Markdown: a row for each pass, a column for each T with time and peak memory."""
    head = ["pass", *(f"T={length}" for length in results)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in next(iter(results.values())):
        cells = [cell_text(name, by_variant[name]) for by_variant in results.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def cell_text(name: str, figures: dict[str, float] | str) -> str:
    """figures: the measurements, or a text that explains why there are none."""
    if isinstance(figures, str):
        return figures
    time = f"{figures['seconds']:.2f} s" if name.startswith(PLAIN) else ratio_text(figures["ratio"])
    memory = OUT_OF_MEMORY if math.isnan(figures["peak"]) else f"{figures['peak']:.0f} MiB"
    return f"{time}, {memory}"


def ratio_text(ratio: float) -> str:
    return f"{ratio:.1f} x" if ratio > 1.95 else f"{100 * (ratio - 1):+.1f} %"


def draw(results: dict[int, dict[str, dict[str, float] | str]], path: Path, title: str) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")  # not pyplot, which would look for a display
    times, peaks = figure.subplots(1, 2)
    for name in next(iter(results.values())):
        lengths = [length for length, by_variant in results.items() if not isinstance(by_variant[name], str)]
        times.plot(
            lengths, [results[length][name]["ratio"] for length in lengths], marker="o", label=name.replace("`", "")
        )
        peaks.plot(lengths, [results[length][name]["peak"] for length in lengths], marker="o")
    times.set(xlabel="tokens", ylabel="time / plain pass", xscale="log", yscale="log", title=title)
    peaks.set(xlabel="tokens", ylabel="peak memory of the pass [MiB]", xscale="log", yscale="log")
    for axis in (times, peaks):
        axis.set_xticks(list(results), [str(length) for length in results])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    times.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--eager-repeats", type=int, default=1, help="0 leaves the eager pass out")
    parser.add_argument("--output", type=Path, default=Path("bench_vgr.png"), help="the picture")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    model = build_model(arguments.shape, device)
    if arguments.peak:
        print(json.dumps(measure_peak(model, arguments, device)))
        return

    place = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    title = f"{arguments.shape} on {place}, {default_backend(device)} back end"
    results: dict[int, dict[str, dict[str, float] | str]] = {}
    for length in arguments.lengths:
        variants = variants_of(model, build_rows(length, response_length_of(arguments.shape, length)), device)
        results[length] = dict.fromkeys(variants, OUT_OF_MEMORY)
        size = bytes_of_eager_maps(model.config, length, model.dtype)
        if not arguments.eager_repeats:
            del variants[EAGER], results[length][EAGER]
        elif size > free_bytes(device):
            del variants[EAGER]
            results[length][EAGER] = f"left out: {size / GIBIBYTE:.0f} GiB of maps"
        times = measure_times(variants, device, arguments.repeats, arguments.eager_repeats)
        for name, (seconds, ratio) in times.items():
            peak = peak_in_a_fresh_process(arguments, length, name)
            results[length][name] = {"seconds": seconds, "ratio": ratio, "peak": peak}
        print(f"T={length}: " + json.dumps(results[length]), flush=True)
    print(f"\n{title}; torch {torch.__version__}\n\n{table_of(results)}")
    draw(results, arguments.output, title)
    print(f"\npicture: {arguments.output}")


def response_length_of(shape: str, length: int) -> int:
    return 2048 if shape == "7b" else length // 4


if __name__ == "__main__":
    main()
