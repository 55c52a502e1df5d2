# SPDX-License-Identifier: Apache-2.0
"""Loads a Hugging Face model for training, with the right auto class and attention, and no missing weights."""

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.utils import is_flash_attn_2_available

from verl.models.registry import family_of
from verl.models.value_model import ValueModel
from verl.utils.device_copies import to_device
from verl.utils.remote_code import refused_remote_code
from verl.workers.actor.config import ModelConfig

logger = logging.getLogger(__name__)

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """The model's Hugging Face config with `override_config` applied.

    `attn_implementation` may be among the overrides though it is no field of the config; `load_model` reads it.

    Raises:
        ValueError: the model's config has no field for an override, or the model needs its own code and
            `trust_remote_code` is false.
    """
    overrides = {key: value for key, value in config.override_config.items() if key != "attn_implementation"}
    with refused_remote_code(config.model_path):
        model_config, unused = AutoConfig.from_pretrained(
            config.model_path, trust_remote_code=config.trust_remote_code, return_unused_kwargs=True, **overrides
        )
    if unused:
        name, value = next(iter(unused.items()))
        raise ValueError(
            f"model.override_config has {name}={value!r}, but {type(model_config).__name__}, the config of "
            f"{config.model_path}, has no such field; a field of a part is written below it, such as "
            f"text_config: {{{name}: ...}}"
        )
    return model_config


def load_generation_config(path: str, model_config: PretrainedConfig) -> GenerationConfig:
    """The checkpoint's generation config, or the default if it has none."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # a checkpoint without one
        return GenerationConfig.from_model_config(model_config)


def policy_class(model_config: PretrainedConfig) -> type[AutoModelForImageTextToText] | type[AutoModelForCausalLM]:
    """The auto class of a policy: image-text if transformers has one for this config, otherwise causal."""
    is_image_text = type(model_config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if is_image_text else AutoModelForCausalLM


def load_model(
    config: ModelConfig, dtype: torch.dtype, compute_dtype: torch.dtype, with_weights: bool = True
) -> nn.Module:
    """Loads a policy on the CPU, with its weights or as empty modules.

    Image-text models load as `AutoModelForImageTextToText`, all others as `AutoModelForCausalLM`. Attention is
    FlashAttention 2 if a GPU and the package are present and the model computes in half precision without a special
    mask, otherwise PyTorch's SDPA. `override_config.attn_implementation` overrides this.

    Args:
        config: `worker.actor.model`, or the critic's.
        dtype: precision of the parameters.
        compute_dtype: precision of the forward pass; mixed precision may differ from `dtype`.
        with_weights: false opens no file of weights and leaves every tensor on the meta device.

    Raises:
        OSError: `model_path` is neither a folder with a model nor a reachable hub id (transformers says which).
        ValueError: its files lack weights of the model, or have weights of another shape.
    """
    return _load(config, dtype, compute_dtype, with_weights, needs_head=True)


def _load(
    config: ModelConfig, dtype: torch.dtype, compute_dtype: torch.dtype, with_weights: bool, needs_head: bool
) -> nn.Module:
    model_config = load_model_config(config)
    is_half = compute_dtype in (torch.float16, torch.bfloat16)
    can_flash = is_half and is_flash_attn_2_available() and not family_of(model_config).attends_both_ways
    default_attention = "flash_attention_2" if can_flash else "sdpa"
    auto_class = policy_class(model_config)
    settings = dict(
        dtype=dtype,
        attn_implementation=config.override_config.get("attn_implementation", default_attention),
        trust_remote_code=config.trust_remote_code,
    )
    if with_weights:
        model, report = auto_class.from_pretrained(
            config.model_path,
            config=model_config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported all the same, and refused below by name
            **settings,
        )
        _require_all_weights(model, report, config.model_path, needs_head)
        return model
    with torch.device("meta"):
        return auto_class.from_config(model_config, **settings).eval()  # as `from_pretrained` leaves it


def load_value_model(
    config: ModelConfig, dtype: torch.dtype, compute_dtype: torch.dtype, with_weights: bool = True
) -> ValueModel:
    """Loads a critic on the CPU, with a policy's weights and a value head of zeros. Arguments as in `load_model`.

    The files are read as a policy: only then does transformers know every name that the weights may have.
    """
    return ValueModel(_load(config, dtype, compute_dtype, with_weights, needs_head=False))


def _require_all_weights(model: nn.Module, report: dict[str, Any], path: str, needs_head: bool) -> None:
    """Refuses a model whose files lack weights, and warns once of unused weights in the files.

    Args:
        report: what `from_pretrained` reports of the names; tied and optional weights are not in it.
        needs_head: False if the output head is not used and may be missing.
    """
    head = model.get_output_embeddings()
    head_ids = set() if head is None or needs_head else {id(parameter) for parameter in head.parameters()}
    unused = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in head_ids}
    missing, unexpected = sorted(set(report["missing_keys"]) - unused), sorted(report["unexpected_keys"])
    if report["mismatched_keys"]:
        name, in_files, in_model = sorted(report["mismatched_keys"])[0]
        count = len(report["mismatched_keys"])
        raise ValueError(
            f"{count} weights in the files of {path} have another shape than the model's, such as {name}: "
            f"{tuple(in_files)}, not {tuple(in_model)}; config and weights are of different models"
        )
    if missing:
        others = f"; its files have {_some(unexpected)}, which the model does not" if unexpected else ""
        raise ValueError(
            f"the files of {path} lack {len(missing)} of the {len(list(model.parameters()))} weights of "
            f"{type(model).__name__}: {_some(missing)}{others}. Save the model whole, under these names"
        )
    if unexpected:
        logger.warning("%s has weights that %s does not use: %s", path, type(model).__name__, _some(unexpected))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def require_room_for_tokens(tokenizer: Any, model_config: PretrainedConfig, tokenizer_path: str, path: str) -> None:
    """Raise unless the model has an embedding for every token.

    Raises:
        ValueError: it has not; the message gives both numbers.
    """
    last = max(tokenizer.get_vocab().values())
    rows = model_config.get_text_config().vocab_size
    if last >= rows:
        raise ValueError(
            f"the tokenizer of {tokenizer_path} has tokens up to id {last}, but {path} has embeddings for {rows}; use "
            "the model's own tokenizer, or resize the embeddings (model.resize_token_embeddings) and save the model"
        )


def keep_vision_tower_in_step(model: nn.Module) -> None:
    """Makes the vision tower run exactly once in every forward: on images and videos together if there are both, on a
    tiny blank image, times zero, if there are none.

    Under FSDP2 each run of the tower gathers and scatters its parameters. Ranks with other media in their rows would
    run it more often or not at all, and wait for each other for ever (or crash, on gloo). The result is unchanged;
    without media the tower's gradient is exactly zero instead of missing, on any number of ranks.

    Call it before sharding. Models without a vision tower stay as they are. A tower is run by `get_image_features`,
    which all known families have.
    """
    blank_image = family_of(model.config).blank_image
    if blank_image is None:
        return
    core = model.model

    def run_tower_once(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        has_images, has_videos = (kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos"))
        if has_images and has_videos:
            return args, _with_media_encoded(core, kwargs)
        if has_images or has_videos or kwargs.get("past_key_values") is not None:
            return None
        embeds = core.get_input_embeddings()(kwargs["input_ids"])
        inputs = {name: to_device(value, embeds.device) for name, value in blank_image(model.config).items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(embeds.dtype)
        features = core.get_image_features(**inputs, return_dict=True)
        # Qwen3-VL also feeds deeper layers from the tower; they need a gradient path too.
        outputs = tree_leaves([features.pooler_output, features.get("deepstack_features") or []])
        blank = sum(output.mean() for output in outputs)
        return args, {**kwargs, "input_ids": None, "inputs_embeds": embeds + 0.0 * blank}

    core.register_forward_pre_hook(run_tower_once, with_kwargs=True)


def _with_media_encoded(core: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Replaces the pixels in a forward's arguments by the features of one run of the tower on images and videos.

    Towers that take both treat a video as an image with several time steps.
    """
    pixels = torch.cat([kwargs["pixel_values"], kwargs["pixel_values_videos"]])
    grids = torch.cat([kwargs["image_grid_thw"], kwargs["video_grid_thw"]])
    features = core.get_image_features(pixels, grids, return_dict=True)
    deeper = features.get("deepstack_features") or []  # by layer, then by image
    num_images = len(kwargs["image_grid_thw"])
    encoded = {
        kind: SimpleNamespace(
            pooler_output=features.pooler_output[own], deepstack_features=[layer[own] for layer in deeper]
        )
        for kind, own in (("image", slice(num_images)), ("video", slice(num_images, None)))
    }
    return {**kwargs, "pixel_values": None, "pixel_values_videos": None, "mm_encoder_outputs": encoded}
