# SPDX-License-Identifier: Apache-2.0
"""Merges a checkpoint into a model to load and serve: `python3 scripts/model_merger.py --local_dir CHECKPOINT/actor`.

Joins the ranks' shards, or a low-rank adapter and its base model, and writes the weights, beside config and processor,
into `CHECKPOINT/actor/huggingface`, which transformers' `from_pretrained` and vLLM load. Takes
checkpoints of this trainer and of EasyR1, from any number of ranks. Needs no GPU, and host memory of about twice the
size of the weights.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import HfApi
from peft import PeftConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from verl.models.loader import DTYPES, policy_class
from verl.models.registry import MODEL_FAMILIES
from verl.models.saved_files import GenerationSettings, add_legacy_rope, apply_umask
from verl.models.value_model import ValueModel
from verl.utils.checkpoint import model_file
from verl.utils.remote_code import refused_remote_code
from verl.utils.safe_load import load_tensors
from verl.utils.shards import assemble

ADAPTER = "lora_adapter"
DESCRIPTION = "huggingface"
DTYPE_NAMES = ("bfloat16", "float16", "float32")


# ---- shards to whole tensors ----


def rank_files(local_dir: Path) -> list[Path]:
    """The weight files of all ranks, in rank order.

    Raises:
        ValueError: there are none, a rank's file is missing, or the files come from runs with different numbers of
            ranks.
    """
    matches = [re.fullmatch(r"model_world_size_(\d+)_rank_(\d+)\.pt", path.name) for path in local_dir.glob("*.pt")]
    numbers = [(int(match[1]), int(match[2])) for match in matches if match is not None]
    if not numbers:
        below = sorted({path.parent.name for path in local_dir.glob("*/model_world_size_*_rank_*.pt")})
        hint = f"; give one of the folders below it that have: {', '.join(below)}" if below else ""
        raise ValueError(f"--local_dir={local_dir} has no file {model_file('<W>', '<r>')}{hint}")
    world_size = max(number for number, _ in numbers)
    expected = [local_dir / model_file(world_size, rank) for rank in range(world_size)]
    strangers = sorted(model_file(*pair) for pair in numbers if pair[0] != world_size)
    if strangers:
        raise ValueError(
            f"--local_dir={local_dir} has files of runs with different numbers of ranks: of {world_size}, and also "
            f"{', '.join(strangers)}; move the files away that are not of the run you mean"
        )
    missing = [path.name for path in expected if not path.exists()]
    if missing:
        raise ValueError(
            f"--local_dir={local_dir} lacks {', '.join(missing)}: it takes the files of all {world_size} ranks; copy "
            "the files of other machines here"
        )
    return expected


def read_whole_tensors(local_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, whole tensor) of the checkpoint's model, one at a time; files are mapped, not read.

    Raises:
        ValueError: as in `rank_files` and `load_tensors`, a tensor that not every file has, or an unknown sharding.
    """
    files = rank_files(local_dir)
    ranks = [load_tensors(path, mmap=True) for path in files]
    for path, state in zip(files, ranks, strict=True):
        if state.keys() != ranks[0].keys():
            name = min(state.keys() ^ ranks[0].keys())
            raise ValueError(f"{files[0]} and {path} are not of one checkpoint: only one of them has {name}")
    for name in ranks[0]:
        try:
            yield name, assemble([state[name] for state in ranks])
        except ValueError as error:
            raise ValueError(f"{name} in {local_dir}: {error}") from error


# ---- tensors to a model ----


def merge(
    local_dir: Path, dtype: torch.dtype, base_model: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a checkpoint, in `dtype` on the CPU, ready to run.

    A critic becomes transformers' token classification with one label: the value of each position is its logit.

    Args:
        local_dir: `.../global_step_<N>/actor` or `critic`.
        base_model: the base model of a low-rank adapter, if the path in its config does not exist.
        trust_remote_code: allows code that comes with the model.

    Raises:
        ValueError: files are missing or do not fit together, the weights do not fit the model of
            `huggingface/config.json`, a base model is needed and not found, or the model needs its own code and
            `trust_remote_code` is false.
    """
    description = local_dir / DESCRIPTION
    if not (description / "config.json").exists():
        raise ValueError(f"{description / 'config.json'} does not exist: it says which model the weights are of")
    with refused_remote_code(str(description), "--trust_remote_code"):
        config = AutoConfig.from_pretrained(description, trust_remote_code=trust_remote_code)
    options = dict(dtype=dtype, trust_remote_code=trust_remote_code)
    if (local_dir / ADAPTER).is_dir():
        return _merge_adapter(local_dir / ADAPTER, config, base_model, options)
    if base_model is not None:
        raise ValueError(f"--base_model={base_model} is for low-rank adapters, but {local_dir} has no {ADAPTER}/")
    return _merge_shards(local_dir, config, options)


def _merge_shards(local_dir: Path, config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    architecture = (config.architectures or [""])[0]
    is_value_model = architecture == ValueModel.__name__
    auto_class = policy_class(config)
    if is_value_model or architecture.endswith("ForTokenClassification"):
        auto_class = AutoModelForTokenClassification
        if type(config) not in auto_class._model_mapping:
            raise ValueError(
                f"{local_dir} is a critic on a {config.model_type} model, and transformers has no class that gives a "
                "number per token on one. A run that resumes goes on with it; in Python, read_whole_tensors gives "
                f"the state dict of {ValueModel.__module__}.{ValueModel.__name__}"
            )
        config.num_labels = 1
    with init_empty_weights(include_buffers=False):  # what is in no state dict, such as rope tables, is made here
        model = auto_class.from_config(config, **options)
    state = {}
    for name, value in read_whole_tensors(local_dir):
        if ".lora_A." in name:
            raise ValueError(f"{local_dir} holds adapters ({name}), but not their folder {ADAPTER}/")
        if is_value_model:
            name = _name_in_classifier(name, model.base_model_prefix)
        state[name] = value.to(options["dtype"]) if value.is_floating_point() else value
    if _shapes(state) == _shapes(model.state_dict()):
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        return model.eval()
    # Names or shapes of published checkpoints and of older transformers, as EasyR1's: loading one brings them in.
    model, report = type(model).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=options["dtype"],
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the report has them
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        listed = "; ".join(f"{kind.replace('_', ' ')}: {_some_of(names)}" for kind, names in wrong.items())
        raise ValueError(f"the weights in {local_dir} do not fit a {type(model).__name__}: {listed}")
    return model


def _merge_adapter(
    adapter: Path, config: PretrainedConfig, base_model: str | None, options: dict[str, Any]
) -> PreTrainedModel:
    """The base model's frozen weights plus the adapter's update."""
    adapter_config = PeftConfig.from_pretrained(adapter)
    base = base_model or adapter_config.base_model_name_or_path
    try:
        model = policy_class(config).from_pretrained(base, config=config, **options)
    except OSError as error:
        raise ValueError(
            f"{base}, the base model that {adapter / 'adapter_config.json'} names, was not found; --base_model says "
            "where it is"
            if base_model is None
            else f"--base_model={base} was not found: it takes a folder with a model, or a hub id"
        ) from error
    adapter_config.base_model_name_or_path = base
    adapted = get_peft_model(model, adapter_config)
    report = adapted.load_adapter(adapter, adapter_name="default")
    if report.missing_keys or report.unexpected_keys:
        raise ValueError(
            f"the weights in {adapter} do not fit its adapter_config.json and {base}: "
            f"missing {_some_of(report.missing_keys)}; unexpected {_some_of(report.unexpected_keys)}"
        )
    return adapted.merge_and_unload().eval()


def _name_in_classifier(name: str, prefix: str) -> str:
    """Converts a `ValueModel`'s weight name to the name in transformers' token classification."""
    owner, _, rest = name.partition(".")
    return {"value_head": f"score.{rest}", "model": f"{prefix}.{rest}"}.get(owner, name)


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _some_of(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) or "none"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


# ---- a model to a folder, and the folder to the hub ----


def save_pretrained_with_generation_config(
    model: PreTrainedModel, path: str | os.PathLike[str], generation_config: GenerationConfig | None, **kwargs: Any
) -> None:
    """`model.save_pretrained(path, **kwargs)`, with `generation_config` in place of the model's own unless None.

    It is written unchanged, even if transformers would refuse to save it, for example a temperature without
    sampling.
    """
    if generation_config is None:
        model.save_pretrained(path, **kwargs)
    else:
        model.generation_config = GenerationConfig()  # one that it does not refuse
        model.save_pretrained(path, **kwargs)
        model.generation_config = generation_config
        GenerationSettings(generation_config).save_pretrained(path)


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes weights and config into `folder`; an existing generation config and all other files stay."""
    kept = GenerationConfig.from_pretrained(folder) if (folder / GENERATION_CONFIG_NAME).exists() else None
    families = (family for family in MODEL_FAMILIES if model.config.model_type in family.model_types)
    transposed = next((family.transposed_weights for family in families), ())
    options = {}
    if transposed:
        # transformers reads them either way round and writes them as it holds them; vLLM reads the published way only.
        state = model.state_dict().items()
        turned = {name: value.transpose(-1, -2) if name.endswith(transposed) else value for name, value in state}
        options = dict(state_dict=turned, save_original_format=False)
    save_pretrained_with_generation_config(model, folder, kept, **options)
    add_legacy_rope(folder)
    apply_umask(folder)


def upload(folder: Path, repo: str, public: bool) -> str:
    """Uploads a folder to the hub, into a new repository or over the files of an old one; returns its address.

    Raises:
        ValueError: the repository is public, and `public` is false.
    """
    api = HfApi()
    url = api.create_repo(repo, private=not public, exist_ok=True)
    if not public and not api.model_info(url.repo_id).private:
        raise ValueError(f"--hf_upload_path={repo} is a public repository; name another, or allow it with --public")
    api.upload_folder(repo_id=url.repo_id, folder_path=folder)
    return url


def main(arguments: argparse.Namespace) -> None:
    """Merges, writes and, if asked, uploads.

    Raises:
        ValueError: as in `merge` and `upload`, or `local_dir` is the output folder itself.
    """
    local_dir = arguments.local_dir
    folder = local_dir / DESCRIPTION
    if local_dir.resolve().name == DESCRIPTION:
        raise ValueError(f"--local_dir={local_dir} is where the model is written; give the folder above it")
    model = merge(local_dir, DTYPES[arguments.dtype], arguments.base_model, arguments.trust_remote_code)
    save(model, folder)
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters in {arguments.dtype}: {folder}")
    if arguments.hf_upload_path is not None:
        print(f"uploaded to {upload(folder, arguments.hf_upload_path, arguments.public)}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options; what it cannot read ends the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_dir", type=Path, required=True, help="global_step_<N>/actor, or critic")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default=DTYPE_NAMES[0], help="of the weights (%(default)s)")
    parser.add_argument("--base_model", help="what a low-rank adapter adapts, if not where its config says")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--hf_upload_path", metavar="USER/NAME", help="hub repository for the result, made private")
    parser.add_argument("--public", action="store_true", help="make it public instead, or upload to one that is")
    arguments = parser.parse_args(words)
    if arguments.public and arguments.hf_upload_path is None:
        parser.error("--public says how to upload; --hf_upload_path says where to")
    return arguments


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # It warns, once a rank and mesh, that shards read outside a run cannot be compiled.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    try:
        main(parse())
    except ValueError as error:
        sys.exit(f"error: {error}")
