# SPDX-License-Identifier: Apache-2.0
"""Host time for the images of a step, processed once per step or in every pass. The device may have to wait for it.

    OMP_NUM_THREADS=1 python scripts/bench_features.py             # 8 images of 2048 x 2048

Old log-probs, reference and update each go once through the same images, in micro-batches, and make a model's inputs
of them as the worker does, with Qwen-VL's processor. Wall clock and the process's own time of each pass, the median
over steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from tiny_qwen import build_processor, build_tokenizer
from transformers import ProcessorMixin, Qwen2VLImageProcessor

from verl.data.features import Featurizer
from verl.data.vision import MediaHandle

PASSES = ("old log-probs", "reference", "update")


def make_processor(size: int) -> ProcessorMixin:
    """That leaves images of `size` x `size` as large as they are."""
    processor = build_processor(build_tokenizer(["What is in the picture?"]))
    processor.image_processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=size**2)
    return processor


def make_handles(count: int, size: int) -> list[MediaHandle]:
    generator = np.random.default_rng(0)
    pixels = (generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count))
    return [MediaHandle.put(Image.fromarray(image)) for image in pixels]


def measure_step(featurizer: Featurizer, handles: list[MediaHandle], micro_batch: int) -> list[tuple[float, float]]:
    """Seconds of wall clock and of the process's own time, by pass."""
    featurizer.clear()
    figures = []
    for _ in PASSES:
        wall, own = time.perf_counter(), time.process_time()
        for first in range(0, len(handles), micro_batch):
            featurizer.featurize([[handle] for handle in handles[first : first + micro_batch]])
        figures.append((time.perf_counter() - wall, time.process_time() - own))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="of a step, on one worker")
    parser.add_argument("--size", type=int, default=2048, help="pixels of each side")
    parser.add_argument("--micro-batch", type=int, default=2, help="images at once")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    processor, handles = make_processor(arguments.size), make_handles(arguments.images, arguments.size)
    features = Featurizer(processor).featurize([handles])
    num_bytes = sum(value.nbytes for value in features.values())
    print(f"{arguments.images} images of {arguments.size} x {arguments.size}: {num_bytes / 2**20:.0f} MiB of features")
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}\n")
    print(f"| features | {' | '.join(PASSES)} |\n|{'---|' * (1 + len(PASSES))}")
    for name, capacity in (("kept", num_bytes), ("half of them kept", num_bytes // 2), ("made in every pass", 0)):
        featurizer = Featurizer(processor, capacity)
        steps = [measure_step(featurizer, handles, arguments.micro_batch) for _ in range(arguments.steps)]
        cells = []
        for of_pass in zip(*steps, strict=True):
            wall, own = (statistics.median(column) for column in zip(*of_pass, strict=True))
            cells.append(f"{wall:.2f} s, CPU {own:.2f} s")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
