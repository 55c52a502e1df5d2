# SPDX-License-Identifier: Apache-2.0
"""The share of all weight that a signal puts on tokens that name the image's content: a tiny task, no training.

    python scripts/naming_share.py checkpoints/study/digits/data/{1,2,3}

Each folder holds `model` and `test.parquet`, as `scripts/make_digits.py` and `scripts/make_easy_vqa.py` write them.
The model answers held-out questions as in training, by sampling, and each signal weighs the tokens as it would there.
`agreement` is the rank correlation with `image_kl` over the tokens of a response, the mean of the responses.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers

from verl.algorithms.token_weights import MEASURED_STREAMS, compute_token_weights, find_signal
from verl.data.dataset import RLHFDataset, collate_fn
from verl.data.features import Featurizer
from verl.data.vision import MediaHandle
from verl.models.loader import DTYPES, load_model
from verl.protocol import DataProto
from verl.report.token_texts import token_texts
from verl.trainer.config import AlgorithmConfig
from verl.trainer.metrics import compute_signal_metrics
from verl.utils.attention_metrics import KeyVocabulary
from verl.utils.tokenizer import get_processor, get_tokenizer
from verl.workers.actor.config import ActorConfig, ModelConfig
from verl.workers.actor.forward import PolicyForward, SignalSettings
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.config import RolloutConfig
from verl.workers.rollout.hf_rollout import HFRollout

SIGNALS = ("uniform", "vgr", "vision_density", "entropy", "image_kl")
NAMING = re.compile(r"I see (?:a ([a-z]+) ([a-z]+)|(\d) and (\d)|(\d), (\d), (\d) and (\d))\.")
"""Its groups are the names."""
MAX_RESPONSE_LENGTH = 96  # tokens
BATCH_SIZE = 64


def names_of(texts: Sequence[str]) -> Iterator[bool]:
    """Whether each token, given by its text, is part of a name."""
    found = NAMING.search("".join(texts))
    spans = [] if found is None else [found.span(group) for group in range(1, NAMING.groups + 1) if found[group]]
    end = 0
    for text in texts:
        start, end = end, end + len(text)
        start += len(text) - len(text.lstrip())  # a token may begin with the space before a name
        yield any(first <= start < end <= last for first, last in spans)


def measure(folder: Path, num_rows: int, seed: int) -> dict[str, tuple[float, float]]:
    """Share of weight and agreement with `image_kl` by signal.

    Raises:
        ValueError: no response names anything.
    """
    path = str(folder / "model")
    tokenizer, processor = (get(path, trust_remote_code=False) for get in (get_tokenizer, get_processor))
    model = load_model(ModelConfig(model_path=path), DTYPES["fp32"], DTYPES["fp32"])
    dataset = RLHFDataset(
        str(folder / "test.parquet"),
        tokenizer,
        processor,
        model_config=model.config,
        max_prompt_length=64,
        min_pixels=None,
        max_pixels=None,
        filter_overlong_prompts=False,
    )
    prompts = DataProto.from_single_dict(collate_fn([dataset[row] for row in range(num_rows)]))
    handles = [
        [MediaHandle.put(image) for image in media["images"]] for media in prompts.non_tensor_batch["multi_modal_data"]
    ]
    prompts.non_tensor_batch["multi_modal_data"] = np.fromiter(handles, dtype=object, count=num_rows)
    device, featurizer = torch.device("cpu"), Featurizer(processor)
    config = RolloutConfig(name="hf", dtype="fp32")
    rollout = HFRollout(model, tokenizer, featurizer, config, MAX_RESPONSE_LENGTH, device)
    batch = rollout.generate(prompts, Sampling(n=1, temperature=1.0, top_p=1.0, top_k=-1, ignore_eos=False), seed)
    batch.non_tensor_batch["multi_modal_data"] = prompts.non_tensor_batch["multi_modal_data"]
    batch.non_tensor_batch["uid"] = np.arange(num_rows).astype(object)
    signals = SignalSettings(KeyVocabulary.of(model.config, processor))
    forward = PolicyForward(model, featurizer, device, ActorConfig(), signals=signals)
    with torch.no_grad():
        streams = forward.measure_all(batch, list(MEASURED_STREAMS), BATCH_SIZE)

    mask = batch.batch["response_mask"]  # (N, R)
    is_name = torch.zeros_like(mask, dtype=torch.bool)
    for row, (ids, own) in enumerate(zip(batch.batch["responses"], mask.bool(), strict=True)):
        is_name[row, own] = torch.tensor(list(names_of(token_texts(tokenizer, ids[own].tolist()))))
    if not is_name.any():
        raise ValueError(f"no response of {path} names what is seen, as {NAMING.pattern} reads it")
    importance = {name: find_signal(name).importance({**batch.batch, **streams}) for name in SIGNALS}
    agreement = compute_signal_metrics(importance, mask)
    measured = {}
    for name, values in importance.items():
        algorithm = AlgorithmConfig(enable_token_weights=True, token_weight_signal=name)
        weights = compute_token_weights(values, None, None, mask, algorithm, step=1)
        share = (weights[is_name].sum() / weights.sum()).item()
        measured[name] = share, agreement.get(f"signals/spearman/{name}_image_kl", float("nan"))
    return measured


def main(arguments: argparse.Namespace) -> None:
    """Print a Markdown table with a column for each folder."""
    columns = [measure(folder, arguments.rows, arguments.seed) for folder in arguments.folders]
    print("| weight on names, agreement | " + " | ".join(folder.name for folder in arguments.folders) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in SIGNALS:
        cells = [
            f"{share:.0%}" + ("" if np.isnan(agreement) else f", {agreement:.2f}")
            for share, agreement in (column[name] for column in columns)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of a warm start")
    parser.add_argument("--rows", type=int, default=256, help="held-out questions (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    return parser.parse_args(words)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main(parse())
