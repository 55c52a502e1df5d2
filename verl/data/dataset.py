# SPDX-License-Identifier: Apache-2.0
"""Turns the rows of a dataset into prompts: checked when loaded, tokenised and padded when drawn.

Shapes: B prompts, P prompt length (`data.max_prompt_length`).
"""

from __future__ import annotations

import glob
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Json,
    LargeList,
    List,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    load_dataset,
    load_from_disk,
)
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetsError
from jinja2 import meta
from PIL import Image
from torch.nn import functional
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from verl.config import ConfigValueError, did_you_mean, looks_local
from verl.data.prompt import PLACEHOLDERS, PromptEncoder
from verl.data.video import Video, VideoLimits, VideoOutline, VideoSource, load_video, outline_video
from verl.data.vision import UNREADABLE_IMAGE, ImageSource, open_image, process_image, target_size
from verl.models.position_ids import prompt_position_ids
from verl.models.registry import MODEL_FAMILIES, family_of
from verl.trainer.config import DATA_SUFFIXES, DataConfig, split_data_path

if TYPE_CHECKING:
    from transformers import ProcessorMixin

logger = logging.getLogger(__name__)

T = TypeVar("T")

ROWS_PER_PROCESS = 1000
"""Below this a further process takes longer to start than to work, and nobody needs a progress bar."""

MISMATCHES_SHOWN = 10

OPTIONS = (
    "prompt_key",
    "answer_key",
    "image_key",
    "video_key",
    "image_dir",
    "video_fps",
    "max_prompt_length",
    "format_prompt",
    "min_pixels",
    "max_pixels",
    "filter_overlong_prompts",
    "filter_overlong_prompts_workers",
)
"""Fields of the section `data` that a dataset reads."""


def load_rows(data_path: str) -> Dataset:
    """Load the rows that `data.train_files` or `data.val_files` names.

    Args:
        data_path: a data file, a folder of them (or one that `save_to_disk` wrote), or a dataset id on the hub; then,
            optionally, `@split`, where split may carry a slice as in `@train[:100]`. The default split is train.
            Which files of a folder are which split is the `datasets` library's rule: those with the split's name in
            theirs (`test-00000.parquet`, `test/0.jsonl`), or all of them train when none is named after a split.

    Raises:
        ValueError: nothing is there, or it has no such split or no rows.
    """
    path, split = split_data_path(data_path)
    split = split or "train"
    local = Path(path).expanduser()
    try:
        if local.exists():
            with _progress_bars(shown=False):
                if local.is_dir():
                    return _load_folder(local, split)
                if local.suffix not in DATA_SUFFIXES:
                    raise ValueError(f"{local.name} is none of {', '.join(DATA_SUFFIXES)}")
                return _load_files({"train": [local]}, split)
        if looks_local(path, DATA_SUFFIXES):
            raise FileNotFoundError(f"no such file or folder (looked for {local.absolute()})")
        return _load_from_hub(path, split)
    except (DatasetsError, OSError, ValueError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ValueError(f"cannot load the data {data_path!r}: {error}{cause}") from error


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Switch the bars of the `datasets` library, which are on or off for the whole process, for a while."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _load_files(files: Mapping[str, Sequence[Path]], split: str) -> Dataset:
    """Load a split out of data files by split, all of one type."""
    paths = [path for of_split in files.values() for path in of_split]
    suffixes = {".json" if path.suffix == ".jsonl" else path.suffix for path in paths}
    if len(suffixes) != 1:
        raise ValueError(f"it has files of several types ({', '.join(sorted(suffixes))}); name one of them")
    empty = [path.name for path in paths if path.stat().st_size == 0]
    if empty:
        raise ValueError(f"{', '.join(empty)} is empty")
    builder = suffixes.pop().removeprefix(".")
    # The library takes `[`, `*` and `?` for patterns.
    data_files = {name: [glob.escape(str(path)) for path in files[name]] for name in files}
    if builder == "csv":
        return _load_csv(data_files, split)
    rows = load_dataset(builder, data_files=data_files, split=split)
    return _as_written(rows, data_files, split) if builder == "json" else rows


def _load_csv(data_files: Mapping[str, Sequence[str]], split: str) -> Dataset:
    """All columns as the texts that they are in the file, null where a cell is empty.

    Left to guess types, pandas makes 7.0 of `007` and null of `NA`.
    """
    guessed = load_dataset("csv", data_files=dict(data_files), split=split)
    texts = Features({column: Value("string") for column in guessed.column_names})
    options = dict(features=texts, keep_default_na=False, na_values=[""])
    return load_dataset("csv", data_files=dict(data_files), split=split, **options)


def _as_written(rows: Dataset, data_files: Mapping[str, Sequence[str]], split: str) -> Dataset:
    """The rows of JSON files with the columns read anew that pyarrow does not leave as they were written.

    It makes moments of texts that look like dates, and floats of whole numbers beside others.
    """
    changed = {column: Json() for column, feature in rows.features.items() if _is_changed(feature)}
    if not changed:
        return rows
    features = Features({**rows.features, **changed})
    return load_dataset("json", data_files=dict(data_files), split=split, features=features)


def _is_changed(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_is_changed, feature.values()))
    if isinstance(feature, (List, LargeList)):
        return _is_changed(feature.feature)
    return isinstance(feature, Value) and feature.dtype.startswith(("timestamp", "date", "time", "duration", "float"))


def _load_folder(folder: Path, split: str) -> Dataset:
    if (folder / "state.json").is_file():
        if split != "train":
            raise ValueError(f"it was saved as one set without splits; leave @{split} out")
        return load_from_disk(str(folder))
    if (folder / "dataset_dict.json").is_file():
        splits: DatasetDict = load_from_disk(str(folder))
        if split not in splits:
            raise ValueError(f"no split {split!r} in it; its splits are {', '.join(splits)}")
        return splits[split]

    base_path = glob.escape(folder.resolve().as_posix())
    found = DataFilesDict.from_patterns(get_data_patterns(base_path), base_path=base_path)
    # Left out are the media that rows refer to; the library already passed over what the hub keeps beside the data.
    files = {name: [Path(path) for path in paths if path.endswith(DATA_SUFFIXES)] for name, paths in found.items()}
    files = {name: paths for name, paths in files.items() if paths}
    if not files:
        example = next(iter(found.values()))[0]
        raise ValueError(f"no {', '.join(DATA_SUFFIXES)} where its split names lead ({example}); name the data file")
    return _load_files(files, split)


def _load_from_hub(dataset_id: str, split: str) -> Dataset:
    try:
        return load_dataset(dataset_id, split=split)
    except OSError as error:
        raise FileNotFoundError("no such file or folder here, and from the hub it cannot be had") from error


@lru_cache
def _template(source: str) -> jinja2.Template:
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(source)


def _read_format_prompt(path: str) -> str:
    try:
        source = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"data.format_prompt={path} cannot be read as a UTF-8 text file: {error}") from error
    try:
        variables = meta.find_undeclared_variables(jinja2.Environment().parse(source))
        _template(source).render(content="")
    except jinja2.TemplateError as error:
        raise ValueError(f"data.format_prompt={path}: {error}; it may use one variable, {{{{ content }}}}") from error
    if "content" not in variables:
        raise ValueError(f"data.format_prompt={path} never uses {{{{ content }}}}: no prompt would hold its question")
    return source


def _with_options(config: DataConfig | None, options: dict[str, Any]) -> DataConfig:
    """The section with `options` over its fields; without one, over the defaults of EasyR1's class."""
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"RLHFDataset takes no {name}{did_you_mean(name, OPTIONS)}")
    defaults = {"max_prompt_length": 1024, "min_pixels": None, "max_pixels": None}
    try:
        return DataConfig(**{**defaults, **options}) if config is None else replace(config, **options)
    except ConfigValueError as error:
        raise error.under("data.") from None


class RLHFDataset(torch.utils.data.Dataset):
    """Prompts with their images, videos and answers, one item a row.

    An item is a dict of `input_ids`, `attention_mask` (P,) int64, padded on the left; `position_ids` (P,), or (4, P)
    for multimodal rope; `raw_prompt_ids`, the unpadded ids with one placeholder for each medium; `prompt_text`, what
    the user turn says; `ground_truth`; `multi_modal_data`, {"images": [PIL images, resized], "videos": [`Video`]} or
    None; `image_grid_thw`, an array (images, 3), the patches of each image, or None without images and for families
    without such a grid; `extra`, a dict of the row's other columns.

    When a dataset has an image or video column, all its rows go through the processor, those without media as well.

    Args:
        data_path: see `load_rows`.
        tokenizer: pads on the left.
        processor: None for a model of text alone.
        config: the section `data`, of which the fields in `OPTIONS` are read. Images and videos are a list in each
            row, null or empty for none; every `<image>` and `<video>` in the prompt stands for one of them, in order.
            A video is a file (path or bytes) or the list of its frames.
        model_config: the model's config; read from where the tokenizer came from if None and there is a processor.
        truncation: "error" alone: a prompt cut short would lose the opening of the answer, or its question.
        options: any of `OPTIONS`, as EasyR1's callers give them; they override `config`. Without a config prompts have
            at most 1024 tokens, and images stay as large as they are.

    Raises:
        ValueError: when loading, for an option that is none or cannot be taken, a column that is not there, a prompt
            that is no text, placeholders that do not match the media, media that the model does not take, a file that
            is not there, no row left. When drawing, for a row that cannot be decoded or is longer than P. Messages
            count rows from 0, as `load_rows` returns them: within a slice, and with those that are later dropped for
            their length.
    """

    def __init__(
        self,
        data_path: str,
        tokenizer: PreTrainedTokenizerBase,
        processor: ProcessorMixin | None,
        *,
        config: DataConfig | None = None,
        model_config: PretrainedConfig | None = None,
        truncation: str = "error",
        **options: Any,
    ) -> None:
        if truncation != "error":
            raise ValueError(
                f"truncation={truncation!r} would cut prompts short; use 'error', and filter_overlong_prompts=True "
                "to drop long rows"
            )
        self.config = _with_options(config, options)
        self.data_path = data_path
        self.tokenizer = tokenizer
        self.processor = processor
        template = self.config.format_prompt
        self.format_prompt = None if template is None else _read_format_prompt(template)
        if model_config is None and processor is not None:
            model_config = AutoConfig.from_pretrained(tokenizer.name_or_path)
        self.model_config = model_config or PretrainedConfig()
        self.encoder = PromptEncoder(tokenizer, processor, self.model_config)
        self.video_limits = VideoLimits(self.config.video_fps, self.config.min_pixels, self.config.max_pixels)

        rows = load_rows(data_path)
        self._check_columns(rows)
        # Media are read as arrow, which hands them out as they were stored: nothing decodes one before it is drawn.
        self._media_keys = {
            kind: key
            for kind, key in (("image", self.config.image_key), ("video", self.config.video_key))
            if key in rows.column_names
        }
        columns = list(self._media_keys.values())
        self._media = rows.select_columns(columns).with_format("arrow") if columns else None
        self._rows = rows.remove_columns(columns)
        self._row_numbers = np.arange(len(rows))  # as loaded; rows that are dropped leave gaps
        self._check_prompts()
        if processor is None:
            self._media, self._media_keys = None, {}  # columns without media read as none at all
        if self.config.filter_overlong_prompts:
            self._drop_overlong(self.config.filter_overlong_prompts_workers)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_videos(self) -> bool:
        """Whether any row that can be drawn has a video."""
        return "video" in self._media_keys and _has_any(self._media, self._media_keys["video"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._labelled(self._rows[index])
        prompt_text = self._prompt_text(row.pop(self.config.prompt_key))
        images = self._read(index, "image", self._load_image)
        videos = self._read(index, "video", self._load_video)
        chat_text = self._chat_text(prompt_text)
        with self._naming(index):
            raw_prompt_ids = self.encoder.raw_ids(chat_text, len(images), len(videos))
            model_inputs = self.encoder.model_inputs(
                chat_text, [image.size for image in images], [video.outline for video in videos]
            )
        input_ids, grids = model_inputs["input_ids"][0], model_inputs.get("image_grid_thw")
        self._require_fit(index, len(input_ids))
        padding = (self.config.max_prompt_length - len(input_ids), 0)
        attention_mask = functional.pad(torch.ones_like(input_ids), padding)  # (P,)
        input_ids = functional.pad(input_ids, padding, value=self.tokenizer.pad_token_id)  # (P,)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": prompt_position_ids(self.model_config, input_ids, attention_mask, model_inputs),
            "raw_prompt_ids": raw_prompt_ids,
            "prompt_text": prompt_text,
            "ground_truth": row.pop(self.config.answer_key),
            "multi_modal_data": {"images": images, "videos": videos} if images or videos else None,
            "image_grid_thw": None if grids is None else grids.numpy(),
            "extra": row,
        }

    # ---- one row ----

    def _labelled(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with the names of class labels in the place of their numbers."""
        labels = {name: kind for name, kind in self._rows.features.items() if isinstance(kind, ClassLabel)}
        return {
            name: labels[name].int2str(value) if name in labels and value is not None else value
            for name, value in row.items()
        }

    def _prompt_text(self, prompt: str) -> str:
        return prompt if self.format_prompt is None else _template(self.format_prompt).render(content=prompt)

    def _chat_text(self, prompt_text: str) -> str:
        return self.encoder.chat_text(prompt_text, by_processor=self._media is not None)

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Errors of what follows name the row."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self._name(index)}: {error}") from error

    def _read(self, index: int, kind: str, read: Callable[[Any], T]) -> list[T]:
        """Apply `read` to each medium of a kind in a row, naming the row when one of them cannot be read."""
        if kind not in self._media_keys:
            return []
        results = []
        for position, source in enumerate(self._media[index].column(self._media_keys[kind])[0].as_py() or []):
            try:
                results.append(read(source))
            except UNREADABLE_IMAGE as error:
                raise ValueError(f"{self._name(index)}: {kind} {position} cannot be read: {error}") from error
        return results

    def _load_image(self, source: ImageSource) -> Image.Image:
        return process_image(open_image(source, self.config.image_dir), self.config.min_pixels, self.config.max_pixels)

    def _image_size(self, source: ImageSource) -> tuple[int, int]:
        return target_size(
            *open_image(source, self.config.image_dir).size, self.config.min_pixels, self.config.max_pixels
        )

    def _load_video(self, source: VideoSource) -> Video:
        return load_video(source, self.config.image_dir, self.video_limits)

    def _video_outline(self, source: VideoSource) -> VideoOutline:
        return outline_video(source, self.config.image_dir, self.video_limits)

    def _require_fit(self, index: int, length: int) -> None:
        longest = self.config.max_prompt_length
        if length > longest:
            raise ValueError(
                f"{self._name(index)} has {length} tokens, data.max_prompt_length={longest}; raise it, lower "
                "data.max_pixels, or set data.filter_overlong_prompts=true to drop such rows"
            )

    def _name(self, index: int) -> str:
        return f"row {self._row_numbers[index]} of {self.data_path!r}"

    # ---- the whole set ----

    def _check_columns(self, rows: Dataset) -> None:
        columns = ", ".join(rows.column_names)
        for option, key in (("prompt_key", self.config.prompt_key), ("answer_key", self.config.answer_key)):
            if key not in rows.column_names:
                raise ValueError(f"data.{option}={key} is no column of {self.data_path!r}; it has {columns}")
        for kind, key in (("image", self.config.image_key), ("video", self.config.video_key)):
            feature = rows.features.get(key, Value("null"))
            if not isinstance(feature, (List, LargeList)) and feature != Value("null"):
                raise ValueError(
                    f"data.{kind}_key={key}: each row of {self.data_path!r} needs a list of {kind}s there, "
                    f"not {feature}"
                )
        family = family_of(self.model_config)
        if self.processor is not None and not family.takes_videos and _has_any(rows, self.config.video_key):
            able = ", ".join(other.name for other in MODEL_FAMILIES if other.takes_videos)
            raise ValueError(
                f"data.video_key={self.config.video_key}: {self.data_path!r} has videos, which cannot be trained on "
                f"with a model of the family {family.name}; use one of {able}, or name another column to ignore them"
            )

    def _check_prompts(self) -> None:
        """Every prompt is a text and has as many placeholders as its row has media, kind by kind."""
        counts = {
            kind: _entry_counts(self._media, self._media_keys[kind]) if kind in self._media_keys else [0] * len(self)
            for kind in PLACEHOLDERS
        }
        for kind, of_rows in counts.items():
            if self.processor is None and any(of_rows):
                row = next(index for index, count in enumerate(of_rows) if count)
                raise ValueError(
                    f"{self._name(row)} has {kind}s, but {self.tokenizer.name_or_path!r} is a model of text alone, "
                    "with no processor; use a vision-language model (worker.actor.model.model_path)"
                )
        for index, prompt in enumerate(self._rows[self.config.prompt_key]):
            if not isinstance(prompt, str):
                raise ValueError(
                    f"{self._name(index)}: data.prompt_key={self.config.prompt_key} is {prompt!r}, not a text"
                )
        if self.processor is None:
            return
        for kind, placeholder in PLACEHOLDERS.items():
            found = [self._prompt_text(prompt).count(placeholder) for prompt in self._rows[self.config.prompt_key]]
            mismatches = [
                f"row {index}: {number} placeholders, {media} {kind}s"
                for index, (number, media) in enumerate(zip(found, counts[kind], strict=True))
                if number != media
            ]
            if mismatches:
                key = self.config.image_key if kind == "image" else self.config.video_key
                column = "" if kind in self._media_keys else f" There is no column data.{kind}_key={key}."
                more = "; ..." if len(mismatches) > MISMATCHES_SHOWN else ""
                raise ValueError(
                    f"{len(mismatches)} of {len(self)} rows of {self.data_path!r} have another number of "
                    f"{placeholder} in the prompt (after data.format_prompt) than {kind}s.{column} "
                    f"{'; '.join(mismatches[:MISMATCHES_SHOWN])}{more}"
                )

    def _drop_overlong(self, workers: int) -> None:
        processes = min(workers, len(self) // ROWS_PER_PROCESS)
        with _progress_bars(shown=len(self) >= ROWS_PER_PROCESS):
            lengths = self._rows.select_columns([self.config.prompt_key]).map(
                self._measure,
                with_indices=True,
                remove_columns=[self.config.prompt_key],
                num_proc=processes if processes > 1 else None,
                # Image files and limits may have changed since a cached result was written.
                load_from_cache_file=False,
                new_fingerprint=uuid.uuid4().hex,
                desc="counting prompt tokens",
            )
        lengths = np.asarray(lengths["length"])
        kept = np.flatnonzero(lengths <= self.config.max_prompt_length)
        if len(kept) == 0:
            longest = self.config.max_prompt_length
            raise ValueError(
                f"every row of {self.data_path!r} is longer than data.max_prompt_length={longest}: "
                f"{lengths.min()} to {lengths.max()} tokens; raise it or lower data.max_pixels"
            )
        logger.info(
            "%s: kept %d of %d prompts, dropped %d longer than data.max_prompt_length=%d",
            self.data_path,
            len(kept),
            len(lengths),
            len(lengths) - len(kept),
            self.config.max_prompt_length,
        )
        self._rows = self._rows.select(kept)
        self._media = None if self._media is None else self._media.select(kept)
        self._row_numbers = self._row_numbers[kept]

    def _measure(self, row: dict[str, Any], index: int) -> dict[str, int]:
        sizes = self._read(index, "image", self._image_size)
        outlines = self._read(index, "video", self._video_outline)
        chat_text = self._chat_text(self._prompt_text(row[self.config.prompt_key]))
        with self._naming(index):
            raw_prompt_ids = self.encoder.raw_ids(chat_text, len(sizes), len(outlines))
            return {"length": self.encoder.length(chat_text, raw_prompt_ids, sizes, outlines)}


def collate_fn(features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor | np.ndarray]:
    """Stack B items: tensors to (B, ...), everything else to an object array (B,) that never becomes 2-D."""
    batch = {}
    for key in features[0]:
        values = [feature[key] for feature in features]
        if isinstance(values[0], torch.Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = np.fromiter(values, dtype=object, count=len(values))
    return batch


def _has_any(rows: Dataset, column: str) -> bool:
    return column in rows.column_names and any(_entry_counts(rows, column))


def _entry_counts(rows: Dataset, column: str) -> list[int]:
    """How many entries each row of a column has: the length of a list, 0 for null, 1 for anything else."""
    values = rows.select_columns([column]).with_format("arrow")[:].column(column)
    if isinstance(values.type, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        return pa.compute.fill_null(pa.compute.list_value_length(values), 0).to_pylist()
    return [int(valid) for valid in values.is_valid().to_pylist()]
