# SPDX-License-Identifier: Apache-2.0
"""The files beside a checkpoint's weights, written so that older transformers and other engines can read them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""File names of tokenizers and processors."""


class OriginalFiles:
    """A model's original tokenizer and processor files, which checkpoints copy unchanged.

    The tokenizer files that transformers 5 writes name classes that older versions and some engines do not know.

    Args:
        path: folder or hub id of the tokenizer and processor.
        loaded: the loaded tokenizer or processor, which is saved if there are no files to copy.
    """

    def __init__(self, path: str, loaded: PreTrainedTokenizerBase | ProcessorMixin) -> None:
        self.path = path
        self.loaded = loaded

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the files into `folder`."""
        files = [file for file in map(self._file, TOKENIZER_FILES) if file is not None]
        if not any(Path(file).name.startswith(("tokenizer", "vocab")) for file in files):
            self.loaded.save_pretrained(folder)
        Path(folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, Path(folder) / Path(file).name)

    def _file(self, name: str) -> str | None:
        return cached_file(
            self.path,
            name,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )


class GenerationSettings:
    """A model's generation config, which checkpoints keep as it is.

    transformers loads configs that it refuses to save, such as a temperature without `do_sample`. Published models
    have them.
    """

    def __init__(self, config: GenerationConfig) -> None:
        self.config = config

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the file into `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.config.to_json_file(Path(folder) / GENERATION_CONFIG_NAME)


def apply_umask(folder: str | Path) -> None:
    """Gives the weight files in `folder` the usual mode; safetensors makes them readable by the owner only."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in Path(folder).glob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def add_legacy_rope(folder: str | Path) -> None:
    """Adds the rope fields of transformers 4 to the `config.json` in `folder`, which has the fields of transformers 5.

    Without them transformers 4 silently uses the default base frequency.
    """
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(with_legacy_rope(config), indent=2) + "\n", encoding="utf-8")


def with_legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Adds the fields to the config and its `text_config`; existing fields stay. Vision towers had no such fields."""
    if isinstance(config.get("text_config"), dict):
        config = {**config, "text_config": with_legacy_rope(config["text_config"])}
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return config
    legacy: dict[str, Any] = {}
    if "full_attention" in rope:  # one entry for each kind of layer, as Gemma 3 has them
        legacy |= {"rope_local_base_freq": rope.get("sliding_attention", {}).get("rope_theta")}
        rope = rope["full_attention"]
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    legacy |= {
        "rope_theta": rope.get("rope_theta"),
        "partial_rotary_factor": rope.get("partial_rotary_factor"),
        "rope_scaling": None if scaling in ({}, {"rope_type": "default"}) else scaling,
    }
    return {**{name: value for name, value in legacy.items() if value is not None}, **config}
