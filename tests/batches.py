# SPDX-License-Identifier: Apache-2.0
"""Small batches of real prompts for tests: images of several sizes and text-only rows, through the real dataset."""

import math
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from verl.data.dataset import RLHFDataset, collate_fn
from verl.data.vision import MediaHandle
from verl.protocol import DataProto
from verl.utils.tokenizer import get_processor, get_tokenizer
from verl.workers.rollout.base import assemble_batch

PROMPT_LENGTH = 96

ROWS = [
    {"images": [(56, 84)], "prompt": "<image>What is in the picture?", "answer": "1"},
    {"images": [(112, 56), (28, 28)], "prompt": "<image>and<image>What is the sum of the digits?", "answer": "2"},
    {"images": [], "prompt": "Answer in one word.", "answer": "3"},
    {"images": [], "prompt": "The quick brown fox", "answer": "4"},
]


def random_image(size: tuple[int, int], seed: int) -> Image.Image:
    """An RGB image of (width, height) `size`, uniform noise."""
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_dataset(path: Path, rows: list[dict], copies: int = 1) -> str:
    """A parquet file of `rows`, whose images are given as sizes; returns its path."""
    records = []
    for index, row in enumerate(rows * copies):
        images = [random_image(size, seed=10 * index + place) for place, size in enumerate(row["images"])]
        for place, image in enumerate(images):
            image.save(path.parent / f"{index}_{place}.png")
        names = [str(path.parent / f"{index}_{place}.png") for place in range(len(images))]
        records.append({**row, "images": names})
    Dataset.from_list(records).to_parquet(str(path))
    return str(path)


def make_prompts(model_path: str, folder: Path, rows: list[dict] | None = None) -> DataProto:
    """B rows of prompts, left-padded to `PROMPT_LENGTH`, as the trainer hands them to a rollout engine."""
    tokenizer, processor = get_tokenizer(model_path), get_processor(model_path)
    dataset = RLHFDataset(
        write_dataset(folder / "prompts.parquet", rows or ROWS),
        tokenizer,
        processor,
        max_prompt_length=PROMPT_LENGTH,
        min_pixels=None,
        max_pixels=None,
        filter_overlong_prompts_workers=1,
    )
    return prompts_of(dataset)


def prompts_of(dataset: RLHFDataset) -> DataProto:
    """All rows of a dataset, as the trainer hands them to a rollout engine."""
    prompts = DataProto.from_single_dict(collate_fn([dataset[index] for index in range(len(dataset))]))
    media = [
        None if media is None else [MediaHandle.put(medium) for medium in (*media["images"], *media["videos"])]
        for media in prompts.non_tensor_batch["multi_modal_data"]
    ]
    return DataProto(
        batch=prompts.batch,
        non_tensor_batch={**prompts.non_tensor_batch, "multi_modal_data": media},
    )


def answer_at_random(prompts: DataProto, n: int, response_length: int, seed: int = 0) -> DataProto:
    """A batch as a rollout returns it, with random words of random lengths as responses, and all loss streams."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(prompts) * n
    responses = torch.randint(260, 290, (num_rows, response_length), generator=generator)
    lengths = torch.randint(1, response_length + 1, (num_rows,), generator=generator)
    response_mask = (torch.arange(response_length) < lengths[:, None]).long()
    batch = assemble_batch(prompts, responses, response_mask, torch.zeros(num_rows, response_length), n)
    for name in ("old_log_probs", "ref_log_probs", "advantages", "values", "returns"):
        batch.batch[name] = torch.randn(num_rows, response_length, generator=generator)
    batch.batch["old_log_probs"] -= 4
    batch.batch["ref_log_probs"] -= 4
    batch.non_tensor_batch["multi_modal_data"] = prompts.non_tensor_batch["multi_modal_data"].repeat(n)
    batch.non_tensor_batch["uid"] = uids_of(num_rows, n)
    return batch


def uids_of(num_rows: int, n: int) -> np.ndarray:
    """Names of the prompts of rows in groups of `n`."""
    return np.array([f"prompt {row // n}" for row in range(num_rows)], dtype=object)


def with_random_weights(batch: DataProto, seed: int = 1) -> DataProto:
    """The batch itself, with `token_weights` between the usual bounds."""
    generator = torch.Generator().manual_seed(seed)
    batch.batch["token_weights"] = 0.2 + 2.8 * torch.rand(batch.batch["responses"].shape, generator=generator)
    return batch


def response_logits(model: PreTrainedModel, processor: ProcessorMixin, row: DataProto) -> torch.Tensor:
    """Logits (length, V) of a row's real response tokens from a bare model: no padding, no batching, no trimming.

    Ids that are never sampled have minus infinity.
    """
    ids = row.batch["input_ids"][row.batch["attention_mask"].bool()][None]
    images = [handle.load() for handle in row.non_tensor_batch["multi_modal_data"] or []]
    media = processor.image_processor(images, return_tensors="pt") if images else {}
    banned = torch.tensor([model.config.image_token_id, model.config.video_token_id])
    logits = model(input_ids=ids, mm_token_type_ids=(ids == banned[0]).long(), **media).logits[0]
    length = int(row.batch["response_mask"].sum())
    return logits.index_fill(1, banned, -math.inf)[-length - 1 : -1]
