# SPDX-License-Identifier: Apache-2.0
"""Shows a model's attention while it answers, without training: VGR, weights and maps of every token, per layer.

    python scripts/inspect_attention.py --model Qwen/Qwen2.5-VL-3B-Instruct --image a.png --prompt "What is it?"
    python scripts/inspect_attention.py --model MODEL --responses answers.jsonl --layers last:4

The folder `--output` then holds `page.html`, every response with its tokens coloured by the weights that training
would give them; `tokens.jsonl`, a response a line with all numbers of its tokens; and `layers.json`, how well each
layer's attention says which tokens need the image, and the layers that follow from that.

A line of `--responses` has `prompt`, `images` (paths from its folder on) and, where they are known, `response` and
`answer`. A prompt without `<image>` begins with its images. Responses that are not given are decoded greedily.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging as transformers_logging

from verl.algorithms.token_weights import compute_token_weights, inverse_vgr
from verl.config import ConfigValueError
from verl.data.dataset import RLHFDataset, collate_fn
from verl.data.features import Featurizer
from verl.data.image_grids import ImageGrids
from verl.data.image_noise import ImageNoise
from verl.data.vision import MediaHandle
from verl.models.attention_maps import AttentionMap
from verl.models.attention_recorder import require_layers
from verl.models.loader import DTYPES, load_model
from verl.models.registry import family_of, media_token_ids
from verl.protocol import DataProto
from verl.report.layer_agreement import LayerReport, MeasuredResponse, compare_layers
from verl.report.numbers import correlation_text, number_text
from verl.report.pictures import picture_uris
from verl.report.token_map import Table, TokenMap, token_map_html
from verl.report.token_texts import token_texts
from verl.trainer.config import AlgorithmConfig, DataConfig
from verl.utils.attention_metrics import KeyVocabulary, vgr_from_mass
from verl.utils.tokenizer import eos_token_ids_of, get_processor, get_tokenizer
from verl.workers.actor.config import ActorConfig, ModelConfig
from verl.workers.actor.forward import MAPPED_ROWS, PolicyForward, SignalSettings
from verl.workers.rollout.base import Sampling, assemble_batch
from verl.workers.rollout.config import RolloutConfig
from verl.workers.rollout.hf_rollout import HFRollout

BLANK = ImageNoise("blank", 1.0)
GREEDY = Sampling(n=1, temperature=0, top_p=1.0, top_k=-1, ignore_eos=False)
ON_THE_PAGE = 32
"""Responses on the page; the numbers of all responses are written."""
GROUPS_SHOWN = 8
"""Columns of the page's table of layers."""


@dataclass(frozen=True)
class Measured:
    """The measurements of one response of T tokens; L layers, G groups of heads, V image tokens."""

    row: dict[str, Any]
    images: list[Image.Image]
    prompt: str
    response: str
    tokens: list[str]
    log_probs: np.ndarray
    """(T,)."""
    image_gain: np.ndarray
    """(T,), log-probability lost when the images are black."""
    vgr: np.ndarray
    """(T,), from the chosen layers."""
    weights: np.ndarray
    """(T,), the weights that training would give."""
    chosen: AttentionMap
    """The attention map of the chosen layers."""
    every: AttentionMap
    """The attention maps of all layers, with groups of heads."""
    keys: tuple[int, int]

    @property
    def for_comparison(self) -> MeasuredResponse:
        """The input of the comparison of layers."""
        return MeasuredResponse(self.every.layers, self.every.layer_masses, self.keys, self.image_gain)

    @property
    def vgr_by_layer(self) -> np.ndarray:
        """(L, T)."""
        return _vgr(self.every.layer_masses, self.keys)

    @property
    def vgr_by_group(self) -> np.ndarray:
        """(L, G), VGR of the whole response, from the mean masses of its tokens."""
        return _vgr(self.every.group_masses.mean(axis=2), self.keys)


class Inspector:
    """A model whose attention is measured while it answers.

    Args:
        arguments: of the command line.

    Raises:
        ValueError: the model takes no images, or lacks the requested layers or groups of heads.
        OSError: there is no model at the path.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.algorithm = AlgorithmConfig(
            enable_token_weights=True,
            token_weight_layers=arguments.layers,
            token_weight_clip=tuple(arguments.clip),
            token_weight_smooth_sigma=arguments.sigma,
            token_weight_conserve_mean=arguments.conserve_mean,
        )
        self.tokenizer = get_tokenizer(arguments.model, trust_remote_code=arguments.trust_remote_code)
        self.processor = get_processor(arguments.model, trust_remote_code=arguments.trust_remote_code)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = DTYPES[arguments.dtype or ("bf16" if self.device.type == "cuda" else "fp32")]
        source = ModelConfig(model_path=arguments.model, trust_remote_code=arguments.trust_remote_code)
        model = load_model(source, dtype, dtype).to(self.device)
        if self.processor is None or not family_of(model.config).has_vision_tower:
            raise ValueError(f"--model {arguments.model} takes no images, so that there is no attention on any")
        self.model = model
        self.eos_token_ids = eos_token_ids_of(model.generation_config, self.tokenizer)
        require_layers(model.config, self.algorithm.attention_layers)
        text_config = model.config.get_text_config()
        head_groups = arguments.head_groups or getattr(text_config, "num_key_value_heads", 1)
        vocabulary = KeyVocabulary.of(model.config, self.processor)
        self.chosen_layers = SignalSettings(vocabulary, self.algorithm.attention_layers)
        self.every_layer = SignalSettings(vocabulary, "all", head_groups=head_groups)
        featurizer = Featurizer(self.processor)
        config = RolloutConfig(name="hf", dtype="fp32", temperature=1.0)
        self.rollout = HFRollout(model, self.tokenizer, featurizer, config, arguments.max_tokens, self.device)
        self.forward = PolicyForward(model, featurizer, self.device, ActorConfig())

    def inspect(self, rows: Sequence[dict[str, Any]]) -> list[Measured]:
        """The measurements of all rows.

        Raises:
            ValueError: a row cannot be read or is too long; a response contains an image placeholder.
        """
        prompts, images = self._prompts(rows)
        batch = self._answered(prompts, rows)
        batch.batch[MAPPED_ROWS] = torch.ones(len(batch), dtype=torch.bool)
        every = self._measure(batch, self.every_layer, ["attention_maps"])
        wanted = ["log_probs", "attention_mass", "attention_keys", "attention_maps"]
        chosen = self._measure(batch, self.chosen_layers, wanted)
        blank = DataProto(batch=batch.batch, non_tensor_batch={**batch.non_tensor_batch})
        blank.non_tensor_batch["multi_modal_data"] = _objects(
            [None if own is None else [_blackened(handle) for handle in own] for own in self._media(batch)]
        )
        without_image = self._measure(blank, self.chosen_layers, ["log_probs"])["log_probs"]
        mass, keys = chosen["attention_mass"], chosen["attention_keys"]
        mask = batch.batch["response_mask"]
        last_step = self.algorithm.token_weight_warmup_steps + 1
        weights = compute_token_weights(inverse_vgr(mass, keys), None, None, mask, self.algorithm, last_step)
        vgr = vgr_from_mass(mass, keys)
        measured = []
        for place, row in enumerate(rows):
            own = mask[place].bool()
            ids = batch.batch["responses"][place][own].tolist()
            measured.append(
                Measured(
                    row=row,
                    images=images[place],
                    prompt=str(prompts.non_tensor_batch["prompt_text"][place]),
                    response=self.tokenizer.decode(ids, skip_special_tokens=False),
                    tokens=token_texts(self.tokenizer, ids),
                    log_probs=chosen["log_probs"][place][own].numpy(),
                    image_gain=(chosen["log_probs"] - without_image)[place][own].numpy(),
                    vgr=vgr[place][own].numpy(),
                    weights=weights[place][own].numpy(),
                    chosen=chosen["attention_maps"][place],
                    every=every["attention_maps"][place],
                    keys=tuple(keys[place].tolist()),
                )
            )
        return measured

    def _prompts(self, rows: Sequence[dict[str, Any]]) -> tuple[DataProto, list[list[Image.Image]]]:
        """The prompts as in training, and each prompt's images as given to the processor."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            known = ("prompt", "images", "answer")
            path.write_text("".join(json.dumps({key: row[key] for key in known}) + "\n" for row in rows), "utf-8")
            dataset = RLHFDataset(
                str(path),
                self.tokenizer,
                self.processor,
                model_config=self.model.config,
                max_prompt_length=self.arguments.max_prompt_tokens,
                min_pixels=self.arguments.min_pixels,
                max_pixels=self.arguments.max_pixels,
                filter_overlong_prompts=False,
            )
            prompts = DataProto.from_single_dict(collate_fn([dataset[place] for place in range(len(rows))]))
        images = [media["images"] if media else [] for media in prompts.non_tensor_batch["multi_modal_data"]]
        handles = [[MediaHandle.put(image) for image in own] or None for own in images]
        prompts.non_tensor_batch["multi_modal_data"] = _objects(handles)
        return prompts, images

    def _answered(self, prompts: DataProto, rows: Sequence[dict[str, Any]]) -> DataProto:
        """A batch with the rows' responses; missing responses are decoded."""
        missing = [place for place, row in enumerate(rows) if row["response"] is None]
        answers = {
            place: torch.tensor(self._ids_of(row["response"], place))
            for place, row in enumerate(rows)
            if row["response"] is not None
        }
        if missing:
            decoded = self.rollout.generate(prompts[missing], GREEDY, seed=0).batch
            for place, ids, mask in zip(missing, decoded["responses"], decoded["response_mask"], strict=True):
                answers[place] = ids[mask.bool()]
        ordered = [answers[place] for place in range(len(rows))]
        responses = pad_sequence(ordered, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(ids) for ids in ordered], batch_first=True)
        batch = assemble_batch(prompts, responses, mask, torch.zeros(responses.shape), n=1)
        batch.non_tensor_batch["multi_modal_data"] = prompts.non_tensor_batch["multi_modal_data"]
        batch.non_tensor_batch["uid"] = _objects(range(len(rows)))
        return batch

    def _ids_of(self, response: str, place: int) -> list[int]:
        ids = self.tokenizer.encode(response, add_special_tokens=False)
        banned = sorted(set(ids) & set(media_token_ids(self.model.config)))
        if banned:
            token = self.tokenizer.convert_ids_to_tokens(banned[0])
            raise ValueError(
                f"the response of row {place} holds {token}, which stands for an image that is not there; leave it out"
            )
        return ids if ids and ids[-1] in self.eos_token_ids else [*ids, self.tokenizer.eos_token_id]

    @staticmethod
    def _media(batch: DataProto) -> Sequence[list[MediaHandle] | None]:
        return batch.non_tensor_batch["multi_modal_data"]

    def _measure(self, batch: DataProto, settings: SignalSettings, wanted: list[str]) -> dict[str, Any]:
        self.forward.signals = settings
        return self.forward.measure_all(batch, wanted, self.arguments.batch_size)


def _vgr(masses: np.ndarray, keys: tuple[int, int]) -> np.ndarray:
    """(..., T) from (..., T, 2)."""
    flat = torch.from_numpy(masses.reshape(1, -1, 2))
    return vgr_from_mass(flat, torch.tensor([keys])).numpy().reshape(masses.shape[:-1])


def _blackened(handle: MediaHandle) -> MediaHandle:
    return MediaHandle.put(Image.fromarray(BLANK.degrade(np.asarray(handle.load()))))


def _objects(values: Sequence[Any]) -> np.ndarray:
    """(N,) of objects, also where they are lists."""
    return np.fromiter(values, dtype=object, count=len(values))


# ---- what is written ----


def numbers_of(measured: Measured, correlations: Sequence[float]) -> dict[str, Any]:
    """A line of `tokens.jsonl`."""
    tokens = zip(
        measured.tokens,
        measured.log_probs,
        measured.image_gain,
        measured.weights,
        measured.vgr,
        measured.vgr_by_layer.T,
        measured.chosen.vision,
        strict=True,
    )
    return {
        "prompt": measured.prompt,
        "images": measured.row["images"],
        "answer": measured.row["answer"],
        "response": measured.response,
        "layers": measured.every.layers,
        "weighted_layers": measured.chosen.layers,
        "text_tokens": measured.keys[0],
        "image_tokens": measured.keys[1],
        "rank_correlation_by_layer": _rounded(correlations),
        "vgr_by_layer_and_group": [_rounded(of_groups) for of_groups in measured.vgr_by_group],
        "tokens": [
            {
                "text": text,
                "log_prob": _rounded([log_prob])[0],
                "image_gain": _rounded([gain])[0],
                "weight": _rounded([weight])[0],
                "vgr": _rounded([vgr])[0],
                "vgr_by_layer": _rounded(by_layer),
                "attention": _rounded(vision),
            }
            for text, log_prob, gain, weight, vgr, by_layer, vision in tokens
        ],
    }


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]


def page_of(measured: Sequence[Measured], report: LayerReport, inspector: Inspector) -> str:
    """The page."""
    shown = measured[:ON_THE_PAGE]
    grids = ImageGrids(inspector.processor, inspector.model.config)
    uris = iter(picture_uris([image for one in shown for image in one.images]))
    samples = [
        TokenMap(
            tokens=one.tokens,
            weights=one.weights.tolist(),
            vgr=one.vgr.tolist(),
            prompt=one.prompt,
            images=[next(uris) for _ in one.images],
            maps=grids.lay_out(one.chosen.vision, one.images),
            answer=one.row["answer"] or None,
            title=f"response {number}",
        )
        for number, one in enumerate(shown, start=1)
    ]
    layers = ", ".join(map(str, measured[0].chosen.layers))
    notes = [f"{inspector.arguments.model}; weights and maps from layers {layers}.", *report.advice]
    if len(shown) < len(measured):
        notes.append(f"The first {len(shown)} of {len(measured)} responses are shown.")
    tables = [choice_table(report), layer_table(measured, report)]
    return token_map_html(samples, "What the model looks at", notes, tables, inspector.algorithm.token_weight_clip)


def choice_table(report: LayerReport) -> Table:
    rows = [
        [one.name, ", ".join(map(str, one.layers)), correlation_text(one.mean), number_text(one.standard_error)]
        for one in report.choices
    ]
    caption = "Rank correlation of a token's importance with the log-probability that it loses with black images"
    return Table(caption, ["choice", "layers", "mean over responses", "standard error"], rows)


def layer_table(measured: Sequence[Measured], report: LayerReport) -> Table:
    groups = np.stack([one.vgr_by_group for one in measured])[:, :, :GROUPS_SHOWN]  # (responses, L, G)
    rows = []
    for place, one in enumerate(report.by_layer):
        by_token = np.concatenate([response.vgr_by_layer[place] for response in measured])
        vgr = [_median(by_token), *(_median(groups[:, place, group]) for group in range(groups.shape[2]))]
        rows.append([str(one.layers[0]), correlation_text(one.mean), *map(number_text, vgr)])
    header = ["layer", "rank correlation", "VGR", *(f"heads {group}" for group in range(groups.shape[2]))]
    return Table("VGR of each layer and of its groups of heads, medians", header, rows)


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else float("nan")


def layers_of(report: LayerReport) -> dict[str, Any]:
    """The content of `layers.json`."""
    return {
        "advice": report.advice,
        "responses": report.num_responses,
        "tokens": report.num_tokens,
        "choices": [
            {
                "name": one.name,
                "layers": one.layers,
                "rank_correlation": _rounded([one.mean])[0],
                "standard_error": _rounded([one.standard_error])[0],
            }
            for one in (*report.choices, *report.by_layer)
        ],
    }


# ---- the command line ----


def rows_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows with `prompt`, `images` (whole paths), `response` (None where it is to be decoded) and `answer`.

    Raises:
        ValueError: a line is no row, or a required field is missing.
    """
    if arguments.responses is None:
        return [_row(vars(arguments) | {"images": arguments.image or []}, Path.cwd(), "the command line")]
    lines = arguments.responses.read_text(encoding="utf-8").split("\n")  # JSON may hold other separators as they are
    rows = [
        _row(given, arguments.responses.parent, f"line {number} of {arguments.responses}")
        for number, given in _objects_of(lines, arguments.responses)
    ]
    if not rows:
        raise ValueError(f"{arguments.responses} has no lines")
    return rows


def _objects_of(lines: Sequence[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is no JSON: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"line {number} of {path} is {type(given).__name__}; it must be an object with a prompt")
        yield number, given


def _row(given: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    prompt, images, response = given.get("prompt"), given.get("images") or [], given.get("response")
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: prompt is {prompt!r:.80}; it must be a text")
    if response is not None and not isinstance(response, str):
        raise ValueError(f"{where}: response is {response!r:.80}; it must be a text, or left out to be decoded")
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError(f"{where}: images is {images!r:.80}; it must be a list of paths")
    if given.get("videos"):
        raise ValueError(f"{where}: it has videos, whose tokens cannot be laid over pictures; give images alone")
    if images and "<image>" not in prompt:
        prompt = "<image>" * len(images) + prompt
    paths = [str((folder / path).resolve()) for path in images]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise ValueError(f"{where}: there is no image {missing[0]}")
    answer = given.get("answer")
    return {"prompt": prompt, "images": paths, "response": response, "answer": "" if answer is None else str(answer)}


def layer_choice(text: str) -> Any:
    """`last:K`, `middle` and `all` as they are, numbers with commas between them as a list."""
    return [int(number) for number in text.split(",")] if text.replace(",", "").isdigit() else text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--prompt", help="the question")
    parser.add_argument("--image", action="append", metavar="PATH", help="once for each image of the prompt")
    parser.add_argument("--response", help="the answer to look at, in place of the model's own")
    many = "many prompts, in place of the three above"
    parser.add_argument("--responses", type=Path, metavar="FILE.jsonl", help=many)
    parser.add_argument("--output", type=Path, default=Path("attention"), help="output folder")
    parser.add_argument(
        "--layers", type=layer_choice, default="all", help="for weights and maps: last:K, middle, all, or 3,5,7"
    )
    groups = "of neighbouring heads, told apart in each layer; as many as key heads if not given"
    parser.add_argument("--head-groups", type=int, metavar="G", help=groups)
    algorithm, data = AlgorithmConfig(), DataConfig()
    bounds = "algorithm.token_weight_clip"
    parser.add_argument(
        "--clip", type=float, nargs=2, metavar=("LOW", "HIGH"), default=algorithm.token_weight_clip, help=bounds
    )
    width = "algorithm.token_weight_smooth_sigma"
    parser.add_argument("--sigma", type=float, default=algorithm.token_weight_smooth_sigma, help=width)
    parser.add_argument("--conserve-mean", action="store_true", help="algorithm.token_weight_conserve_mean")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a response that is decoded")
    parser.add_argument("--max-prompt-tokens", type=int, default=8192)
    for name in ("min_pixels", "max_pixels"):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(data, name), help=f"of an image, data.{name}"
        )
    parser.add_argument("--batch-size", type=int, default=4, help="responses in one pass, at full length")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU and fp32 on a CPU if not given")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    arguments = parser.parse_args(argv)
    if (arguments.prompt is None) == (arguments.responses is None):
        parser.error("give --prompt, or --responses with many")
    if arguments.responses is not None and (arguments.image or arguments.response is not None):
        parser.error("--responses has the images and responses of its prompts; leave --image and --response out")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        rows = rows_of(arguments)
        inspector = Inspector(arguments)
        measured = inspector.inspect(rows)
    except (OSError, ValueError, ConfigValueError) as error:
        print(f"inspect_attention: {error}", file=sys.stderr)
        return 2
    report = compare_layers([one.for_comparison for one in measured])
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "tokens.jsonl").open("w", encoding="utf-8") as file:
        for place, one in enumerate(measured):
            correlations = [layer.correlations[place] for layer in report.by_layer]
            file.write(json.dumps(numbers_of(one, correlations), ensure_ascii=False) + "\n")
    (arguments.output / "layers.json").write_text(json.dumps(layers_of(report), indent=1) + "\n", encoding="utf-8")
    (arguments.output / "page.html").write_text(page_of(measured, report, inspector), encoding="utf-8")
    for table in (choice_table(report), layer_table(measured, report)):
        print_table(table)
    print("\n".join(report.advice))
    print(f"\n{arguments.output / 'page.html'}, with tokens.jsonl and layers.json beside it")
    return 0


def print_table(table: Table) -> None:
    lines = [table.header, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.header))]
    print(f"{table.caption}\n")
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print()


if __name__ == "__main__":
    sys.exit(main())
