# SPDX-License-Identifier: Apache-2.0
"""Turns the rows of a dataset into prompts: checked when loaded, tokenised and padded when drawn.

Shapes: B prompts, P prompt length (`data.max_prompt_length`).
"""

from __future__ import annotations

import json
import logging
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from datasets import Audio, ClassLabel, Dataset, Json, LargeList, List, Mesh, Nifti, Pdf, Value
from datasets import Image as ImageFeature
from datasets import Video as VideoFeature
from jinja2 import meta
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from torch.nn import functional
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from verl.config import ConfigValueError, cut, did_you_mean
from verl.data.conversation import (
    PLACEHOLDERS,
    Message,
    as_text,
    count_placeholders,
    messages_of,
    wrap_question,
)
from verl.data.files import load_rows, progress_bars
from verl.data.headers import require_columns
from verl.data.prompt import PromptEncoder
from verl.data.video import Video, VideoLimits, VideoOutline, VideoSource, load_video, outline_video
from verl.data.vision import UNREADABLE_IMAGE, ImageSource, open_image, process_image, target_size
from verl.models.position_ids import prompt_position_ids
from verl.models.registry import MODEL_FAMILIES, family_of
from verl.trainer.config import DataConfig

if TYPE_CHECKING:
    from transformers import ProcessorMixin

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Resize(NamedTuple):
    """What `data.min_pixels` and `data.max_pixels` do to an image: its (width, height) before and after."""

    before: tuple[int, int]
    after: tuple[int, int]

    @property
    def enlarges(self) -> bool:
        """Whether the image gets more pixels."""
        return math.prod(self.after) > math.prod(self.before)

    @property
    def shrinks(self) -> bool:
        """Whether the image gets fewer pixels."""
        return math.prod(self.after) < math.prod(self.before)

    def __str__(self) -> str:
        before, after = (f"{width} x {height}" for width, height in self)
        return f"from {before} to {after}"


class PromptTooLong(ValueError):
    """A prompt has more tokens than `data.max_prompt_length`."""


MEDIA = (ImageFeature, VideoFeature, Audio, Pdf, Nifti, Mesh)
"""Features that `datasets` decodes when a row is read."""

ROWS_PER_PROCESS = 1000
"""Rows per process; for fewer rows, starting a process takes longer than the work, and no progress bar is needed."""

ROWS_SHOWN = 5
"""Largest number of rows that a message lists."""

LONGEST_REASON = 200
"""Largest number of characters of a row's error."""

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
    "check_media",
    "on_bad_row",
)
"""Fields of the section `data` that a dataset reads."""


TEMPLATES = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
"""The sandbox for format prompts: they see the question, but no Python internals."""


@lru_cache
def _template(source: str) -> jinja2.Template:
    return TEMPLATES.from_string(source)


def _read_format_prompt(path: str) -> str:
    try:
        source = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ValueError(f"data.format_prompt={path} cannot be read as a UTF-8 text file: {error}") from error
    try:
        variables = meta.find_undeclared_variables(TEMPLATES.parse(source))
        _template(source).render(content="")
    except (jinja2.TemplateError, TypeError, OverflowError) as error:  # an include; a range that is too long
        raise ValueError(f"data.format_prompt={path}: {error}; it may use one variable, {{{{ content }}}}") from error
    if "content" not in variables:
        raise ValueError(f"data.format_prompt={path} never uses {{{{ content }}}}: no prompt would hold its question")
    return source


def _with_options(config: DataConfig | None, options: dict[str, Any]) -> DataConfig:
    """The section `data` with `options` as overrides. Without a section, EasyR1's defaults are overridden."""
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
    for multimodal rope; `raw_prompt_ids`, the unpadded ids with one placeholder per image or video; `prompt_text`,
    the prompt as text; `ground_truth`; `multi_modal_data`, {"images": [PIL images, resized], "videos": [`Video`]} or
    None; `image_grid_thw`, an array (images, 3), the patches of each image, or None without images or without such a
    grid in the family; `extra`, a dict of the row's other columns.

    If a dataset has an image or video column, all rows go through the processor, also rows without media. Other
    columns of media are in `extra` undecoded, as they are stored.

    Rows that cannot be read are refused, or skipped with a warning (`data.on_bad_row`). Loading checks all prompts;
    with `data.filter_overlong_prompts` also the headers of media, and with `data.check_media` their pixels. A skipped
    row keeps its index, so that the order of the other rows does not change: see `skipped`.

    Args:
        data_path: see `load_rows`.
        tokenizer: pads on the left.
        processor: None for a text-only model.
        config: the section `data`; the fields in `OPTIONS` are read. Images and videos are a list in each row, null or
            empty for none. Every `<image>` and `<video>` in the prompt stands for one of them, in order; in a row
            without media it is text. A video is a file (path or bytes) or a list of frames. Prompts are texts or chat
            messages (`conversation.py`).
        model_config: the model's config; None reads it from the tokenizer's path, if there is a processor.
        first_rows: number of rows to take from the beginning; None takes all.
        truncation: only "error": a truncated prompt would lose its question or the opening of the answer.
        options: any of `OPTIONS`, as EasyR1's callers pass them; they override `config`. Without a config, prompts
            have at most 1024 tokens, and images keep their size.

    Raises:
        ValueError: when loading: an unknown or invalid option, a missing column, a prompt that is neither a text nor a
            chat, placeholders that do not match the media, media that the model does not take, a missing file, no row
            left. When drawing: a row that cannot be decoded, or is longer than P (`PromptTooLong`). Messages count
            rows from 0 in the order of `load_rows`: within a slice, before long prompts are dropped.
    """

    def __init__(
        self,
        data_path: str,
        tokenizer: PreTrainedTokenizerBase,
        processor: ProcessorMixin | None,
        *,
        config: DataConfig | None = None,
        model_config: PretrainedConfig | None = None,
        first_rows: int | None = None,
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
            model_config = AutoConfig.from_pretrained(tokenizer.name_or_path, trust_remote_code=False)
        self.model_config = model_config or PretrainedConfig()
        self.encoder = PromptEncoder(tokenizer, processor, self.model_config)
        if not self.encoder.has_chat_template:
            raise ValueError(
                f"the tokenizer of {cut(str(tokenizer.name_or_path))!r} has no chat template, which formats the "
                "prompts; name a file with one as data.override_chat_template"
            )
        self.video_limits = VideoLimits(self.config.video_fps, self.config.min_pixels, self.config.max_pixels)

        rows = load_rows(data_path)
        self.rows_in_files = len(rows)
        """Number of rows before any is dropped."""
        if first_rows is not None:
            rows = rows.select(range(min(first_rows, len(rows))))
        self._check_columns(rows)
        # Media are read as arrow, which returns them as stored: nothing is decoded before it is drawn.
        self._media_keys = {
            kind: key
            for kind, key in (("image", self.config.image_key), ("video", self.config.video_key))
            if key in rows.column_names
        }
        columns = list(self._media_keys.values())
        undecoded = [name for name in rows.column_names if name not in columns and _has_media(rows.features[name])]
        self._media = rows.select_columns(columns).with_format("arrow") if columns else None
        self._undecoded = rows.select_columns(undecoded).with_format("arrow") if undecoded else None
        self._rows = rows.remove_columns([*columns, *undecoded])
        self._row_numbers = np.arange(len(rows))  # numbers before dropping; dropped rows leave gaps
        self.skipped: frozenset[int] = frozenset()
        """Indices of rows that cannot be read and must not be drawn."""
        self._check_prompts()
        self._report_missing_answers()
        if processor is None:
            self._media, self._media_keys = None, {}  # columns without media count as missing
        if self.config.filter_overlong_prompts:
            self._drop_overlong()
        if self.config.check_media and self._media is not None:
            self._check_media()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_videos(self) -> bool:
        """Whether any usable row has a video."""
        return "video" in self._media_keys and _has_any(self._media, self._media_keys["video"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._labelled(self._rows[index])
        if self._undecoded is not None:
            stored = self._undecoded[index].to_pylist()[0]
            row |= {name: _as_written(value, self._undecoded.features[name]) for name, value in stored.items()}
        images = self._read(index, "image", self._load_image)
        videos = self._read(index, "video", self._load_video)
        with self._naming(index):
            messages = self._messages(row.pop(self.config.prompt_key))
            chat_text = self._chat_text(messages, len(images), len(videos))
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
            "prompt_text": as_text(messages),
            "ground_truth": row.pop(self.config.answer_key),
            "multi_modal_data": {"images": images, "videos": videos} if images or videos else None,
            "image_grid_thw": None if grids is None else grids.numpy(),
            "extra": row,
        }

    # ---- one row ----

    def _labelled(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with class labels as names instead of numbers."""
        labels = {name: kind for name, kind in self._rows.features.items() if isinstance(kind, ClassLabel)}
        return {
            name: labels[name].int2str(value) if name in labels and value is not None else value
            for name, value in row.items()
        }

    def _messages(self, prompt: Any) -> list[Message]:
        messages = messages_of(prompt)
        if self.format_prompt is None:
            return messages
        return wrap_question(prompt, messages, self._formatted)

    def _formatted(self, question: str) -> str:
        try:
            return _template(self.format_prompt).render(content=question)
        except SecurityError as error:
            raise ValueError(f"data.format_prompt={self.config.format_prompt}: {error}") from error

    def _chat_text(self, messages: list[Message], num_images: int, num_videos: int) -> str:
        kinds = [kind for kind, number in (("image", num_images), ("video", num_videos)) if number > 0]
        return self.encoder.chat_text(messages, kinds, by_processor=self._media is not None)

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Inside, errors of template, tokenizer and processor become a ValueError that names the row."""
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"{self._name(index)}: {kind}{cut(str(error), LONGEST_REASON)}") from error

    def _read(self, index: int, kind: str, read: Callable[[Any], T]) -> list[T]:
        """Apply `read` to each image or video of a row; an error names the row."""
        if kind not in self._media_keys:
            return []
        results = []
        for position, source in enumerate(self._entries(index, kind)):
            try:
                results.append(read(source))
            except UNREADABLE_IMAGE as error:
                reason = cut(str(error), LONGEST_REASON)
                raise ValueError(f"{self._name(index)}: {kind} {position} cannot be read: {reason}") from error
        return results

    def _entries(self, index: int, kind: str) -> list[Any]:
        """The images or videos of a row, as they are stored.

        Raises:
            ValueError: the row has no list of them. Only a column of JSON values can have such rows beside others.
        """
        key = self._media_keys[kind]
        entries = _as_written(self._media[index].column(key)[0].as_py(), self._media.features[key])
        if not isinstance(entries, (list, type(None))):
            raise ValueError(
                f"{self._name(index)}: data.{kind}_key={key} has to be a list of {kind}s, not {cut(repr(entries), 80)}"
            )
        return entries or []

    def _load_image(self, source: ImageSource) -> Image.Image:
        return process_image(open_image(source, self.config.image_dir), self.config.min_pixels, self.config.max_pixels)

    def _resize(self, source: ImageSource) -> Resize:
        """Sizes before and after resizing, from the image's header alone."""
        before = open_image(source, self.config.image_dir).size
        return Resize(before, target_size(*before, self.config.min_pixels, self.config.max_pixels))

    def _load_video(self, source: VideoSource) -> Video:
        return load_video(source, self.config.image_dir, self.video_limits)

    def _video_outline(self, source: VideoSource) -> VideoOutline:
        return outline_video(source, self.config.image_dir, self.video_limits)

    def _require_fit(self, index: int, length: int) -> None:
        longest = self.config.max_prompt_length
        if length > longest:
            raise PromptTooLong(
                f"{self._name(index)} has {length} tokens, data.max_prompt_length={longest}; raise it, "
                f"{self._size_remedy(index)}or set data.filter_overlong_prompts=true to drop such rows"
            )

    def _size_remedy(self, index: int) -> str:
        """How to make the media of a row smaller, as part of an error message; empty for a row without media."""
        enlarged = next((one for one in self._read(index, "image", self._resize) if one.enlarges), None)
        if enlarged is not None:
            return f"lower data.min_pixels={self.config.min_pixels}, which enlarges an image {enlarged}, "
        has_media = any(self._read(index, kind, lambda source: source) for kind in self._media_keys)
        return "lower data.max_pixels, " if has_media else ""

    def _name(self, index: int) -> str:
        return f"row {self._row_numbers[index]} of {cut(self.data_path)!r}"

    # ---- the whole set ----

    def _check_columns(self, rows: Dataset) -> None:
        require_columns(rows.column_names, self.data_path, self.config)
        for kind, key in (("image", self.config.image_key), ("video", self.config.video_key)):
            feature = rows.features.get(key, Value("null"))
            # The values of a JSON column may be of any kind; `_check_prompts` looks at each.
            if not isinstance(feature, (List, LargeList, Json)) and feature != Value("null"):
                raise ValueError(
                    f"data.{kind}_key={key}: each row of {cut(self.data_path)!r} needs a list of {kind}s there, "
                    f"not {cut(str(feature), 200)}"
                )
        family = family_of(self.model_config)
        if self.processor is not None and not family.takes_videos and _has_any(rows, self.config.video_key):
            able = ", ".join(other.name for other in MODEL_FAMILIES if other.takes_videos)
            raise ValueError(
                f"data.video_key={self.config.video_key}: {self.data_path!r} has videos, which cannot be trained on "
                f"with a model of the family {family.name}; use one of {able}, or name another column to ignore them"
            )

    def _check_prompts(self) -> None:
        """Check that every row has lists of media, and as a prompt a text or a chat with as many placeholders."""
        counts = {
            kind: _entry_counts(self._media, self._media_keys[kind]) if kind in self._media_keys else [0] * len(self)
            for kind in PLACEHOLDERS
        }
        self._require_processor(counts)
        json_kinds = [kind for kind, key in self._media_keys.items() if isinstance(self._media.features[key], Json)]
        problems: dict[int, str] = {}
        placeholders: dict[str, dict[int, int]] = {kind: {} for kind in PLACEHOLDERS}
        for index, prompt in enumerate(self._rows[self.config.prompt_key]):
            try:
                for kind in json_kinds:
                    self._entries(index, kind)
                with self._naming(index):
                    messages = self._messages(prompt)
            except ValueError as error:
                problems[index] = str(error)
                continue
            for kind in PLACEHOLDERS:
                placeholders[kind][index] = count_placeholders(messages, kind)
        for kind in PLACEHOLDERS if self.processor is not None else ():
            problems |= self._mismatches(kind, placeholders[kind], counts[kind])
        self._skip(problems)

    def _report_missing_answers(self) -> None:
        """Warn about rows whose answer is null, unless all are: a reward function may need no answers."""
        key = self.config.answer_key
        answers = self._rows.select_columns([key]).with_format("arrow")[:].column(key)
        missing = np.flatnonzero(answers.is_null().to_numpy())
        if 0 < len(missing) < len(self):
            logger.warning(
                "%s: the answer (data.answer_key=%s) is null in %d of %d rows; the first is row %d",
                *(self.data_path, key, len(missing), len(self), self._row_numbers[missing[0]]),
            )

    def _require_processor(self, counts: Mapping[str, Sequence[int]]) -> None:
        for kind, row_counts in counts.items():
            if self.processor is None and any(row_counts):
                row = next(index for index, count in enumerate(row_counts) if count)
                raise ValueError(
                    f"{self._name(row)} has {kind}s, but {self.tokenizer.name_or_path!r} is a text-only model, "
                    "without a processor; use a vision-language model (worker.actor.model.model_path)"
                )

    def _mismatches(self, kind: str, placeholders: Mapping[int, int], counts: Sequence[int]) -> dict[int, str]:
        """Errors of the rows whose number of placeholders differs from their number of media of a kind.

        In a row without media of the kind a placeholder is text; one warning reports such rows.

        Raises:
            ValueError: there are placeholders, but no column of such media.
        """
        placeholder = PLACEHOLDERS[kind]
        texts = [index for index, number in placeholders.items() if number > 0 and counts[index] == 0]
        if texts and kind not in self._media_keys:
            key = self.config.image_key if kind == "image" else self.config.video_key
            raise ValueError(
                f"{len(texts)} of {len(self)} rows of {cut(self.data_path)!r} have {placeholder} in the prompt, but "
                f"there is no column data.{kind}_key={key}; name the column, or write \\{placeholder} for the word"
            )
        if texts:
            logger.warning(
                "%s: %s is read as text in %d rows without %ss; the first is row %d",
                *(self.data_path, placeholder, len(texts), kind, self._row_numbers[texts[0]]),
            )
        return {
            index: f"{self._name(index)}: {number} {placeholder} in the prompt (after data.format_prompt), but "
            f"{counts[index]} {kind}s"
            for index, number in placeholders.items()
            if counts[index] > 0 and number != counts[index]
        }

    def _drop_overlong(self) -> None:
        measured = self._map_rows(self._measure, "counting prompt tokens")
        self._log_resized(measured)
        problems = {index: text for index, text in enumerate(measured["problem"]) if text}
        self._skip(problems)
        lengths = np.asarray(measured["length"])
        longest = self.config.max_prompt_length
        readable = [index for index in range(len(self)) if index not in self.skipped]
        fitting = [index for index in readable if lengths[index] <= longest]
        if not fitting:
            way = self._size_remedy(readable[int(lengths[readable].argmin())])
            raise ValueError(
                f"every row of {cut(self.data_path)!r} is longer than data.max_prompt_length={longest}: "
                f"{lengths[readable].min()} to {lengths[readable].max()} tokens; {way}or raise it"
            )
        logger.info(
            "%s: kept %d of %d prompts, dropped %d longer than data.max_prompt_length=%d",
            *(self.data_path, len(fitting), len(readable), len(readable) - len(fitting), longest),
        )
        self._keep(sorted({*fitting, *self.skipped}))

    def _log_resized(self, measured: Dataset) -> None:
        """Log how many images `data.min_pixels` enlarges and `data.max_pixels` shrinks, with the first of each."""
        num_images = sum(measured["images"])
        for name, key in (("enlarged", "min_pixels"), ("shrunk", "max_pixels")):
            count, first = sum(measured[name]), next(filter(None, measured[f"first_{name}"]), "")
            if count:
                remedy = f"; data.{key}=null leaves images as they are" if name == "enlarged" else ""
                logger.info(
                    f"{self.data_path}: data.{key}={getattr(self.config, key)} has {count} of {num_images} images "
                    f"{name}, the first {first} pixels{remedy}"
                )

    def _check_media(self) -> None:
        """Build every item once, to find rows that fail."""
        texts = self._map_rows(self._find_problem, "checking media")["problem"]
        self._skip({index: text for index, text in enumerate(texts) if text})

    def _keep(self, indices: Sequence[int]) -> None:
        if len(indices) == len(self):
            return
        self.skipped = frozenset(place for place, index in enumerate(indices) if index in self.skipped)
        self._rows = self._rows.select(indices)
        self._media = None if self._media is None else self._media.select(indices)
        self._undecoded = None if self._undecoded is None else self._undecoded.select(indices)
        self._row_numbers = self._row_numbers[indices]

    def _skip(self, problems: Mapping[int, str]) -> None:
        """Mark bad rows as skipped and warn about them, or refuse the dataset."""
        problems = {index: text for index, text in problems.items() if index not in self.skipped}
        if not problems:
            return
        texts = list(problems.values())
        shown = "; ".join(texts[:ROWS_SHOWN])
        if len(shown) > 2 * LONGEST_REASON:
            texts, shown = texts[:1], texts[0]
        more = len(problems) - min(len(texts), ROWS_SHOWN)
        shown += f"; and {more} more" if more > 0 else ""
        if self.config.on_bad_row == "error":
            several = f"{len(problems)} of {len(self)} rows cannot be read: " if len(problems) > 1 else ""
            raise ValueError(f"{several}{shown}")
        self.skipped |= set(problems)
        if len(self.skipped) == len(self):
            raise ValueError(f"no row of {cut(self.data_path)!r} can be read: {shown}")
        logger.warning("data.on_bad_row=skip leaves out %d of %d rows: %s", len(problems), len(self), shown)

    def _map_rows(self, function: Callable[[dict[str, Any], int], dict[str, Any]], label: str) -> Dataset:
        """Apply a function to each row's prompt and index; large sets use several processes and a progress bar."""
        processes = min(self.config.filter_overlong_prompts_workers, len(self) // ROWS_PER_PROCESS)
        with progress_bars(shown=len(self) >= ROWS_PER_PROCESS):
            return self._rows.select_columns([self.config.prompt_key]).map(
                function,
                with_indices=True,
                remove_columns=[self.config.prompt_key],
                num_proc=processes if processes > 1 else None,
                # A few numbers a row. A file of them would lie beside the data, and never be read again: images and
                # limits may have changed by then.
                keep_in_memory=True,
                load_from_cache_file=False,
                new_fingerprint=uuid.uuid4().hex,
                desc=label,
            )

    def _measure(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        """A row's prompt length and resized images, from the headers of its media, or its error."""
        length, problem, resizes = 0, "", []
        try:
            resizes = self._read(index, "image", self._resize)
            length = self._length(row[self.config.prompt_key], index, [one.after for one in resizes])
        except ValueError as error:
            problem = str(error)
        enlarged, shrunk = [one for one in resizes if one.enlarges], [one for one in resizes if one.shrinks]
        return {
            "length": length,
            "problem": problem,
            "images": len(resizes),
            "enlarged": len(enlarged),
            "shrunk": len(shrunk),
            "first_enlarged": str(enlarged[0]) if enlarged else "",
            "first_shrunk": str(shrunk[0]) if shrunk else "",
        }

    def _length(self, prompt: Any, index: int, sizes: Sequence[tuple[int, int]]) -> int:
        """sizes: (width, height) of the resized images."""
        outlines = self._read(index, "video", self._video_outline)
        with self._naming(index):
            chat_text = self._chat_text(self._messages(prompt), len(sizes), len(outlines))
            raw_prompt_ids = self.encoder.raw_ids(chat_text, len(sizes), len(outlines))
            return self.encoder.length(chat_text, raw_prompt_ids, sizes, outlines)

    def _find_problem(self, row: dict[str, Any], index: int) -> dict[str, str]:
        try:
            self[index]
        except ValueError as error:
            return {"problem": str(error)}
        return {"problem": ""}


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
    """Number of entries in each row of a column: the length of a list, 0 for null, 1 for anything else."""
    values = rows.select_columns([column]).with_format("arrow")[:].column(column)
    if isinstance(rows.features[column], Json):
        entries = (_as_written(value.as_py(), Json()) for value in values)
        return [len(value) if isinstance(value, list) else int(value is not None) for value in entries]
    if isinstance(values.type, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        return pa.compute.fill_null(pa.compute.list_value_length(values), 0).to_pylist()
    return [int(valid) for valid in values.is_valid().to_pylist()]


def _as_written(value: Any, feature: Any) -> Any:
    """A value that was read as arrow, with the JSON texts in it decoded. Media stay as they are stored.

    `datasets` stores values as JSON texts where a column mixes kinds, such as paths and dicts.
    """
    if value is None:
        return None
    if isinstance(feature, Json):
        return json.loads(value)
    if isinstance(feature, Mapping):
        return {name: _as_written(value[name], kind) for name, kind in feature.items()}
    if isinstance(feature, (List, LargeList)):
        return [_as_written(one, feature.feature) for one in value]
    return value


def _has_media(feature: Any) -> bool:
    """Whether a column holds media that `datasets` would decode: images, sounds, videos, documents."""
    if isinstance(feature, Mapping):
        return any(map(_has_media, feature.values()))
    if isinstance(feature, (List, LargeList)):
        return _has_media(feature.feature)
    return isinstance(feature, MEDIA)
