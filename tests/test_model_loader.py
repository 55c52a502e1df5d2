# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_model_loader.py
"""Models load with the attention and the overrides that were asked for, or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen3Config, Qwen3ForCausalLM

from tests.batches import random_image
from tests.family_models import FAMILY_MODELS, IMAGE_TEXT_MODELS, make_family_model
from tests.tiny import make_tiny_model
from verl.models.loader import (
    keep_vision_tower_in_step,
    load_model,
    load_model_config,
    load_value_model,
    require_room_for_tokens,
)
from verl.models.position_ids import prompt_position_ids
from verl.models.registry import media_token_types
from verl.utils.tokenizer import get_processor, get_tokenizer
from verl.workers.actor.config import ModelConfig


def write_text_model(folder) -> str:
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=64, num_key_value_heads=1, head_dim=16, **sizes)).save_pretrained(folder)
    return str(folder)


def layout(model: torch.nn.Module) -> list[tuple]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors]


def test_overrides_reach_the_config_and_attention_is_the_one_asked_for(tiny_model_path: str) -> None:
    overrides = {"text_config": {"rms_norm_eps": 0.5}, "attn_implementation": "eager"}
    config = ModelConfig(model_path=tiny_model_path, override_config=overrides)
    model = load_model(config, torch.float32, torch.float32)
    assert model.config.text_config.rms_norm_eps == 0.5
    assert (
        model.config.text_config.vocab_size
        == load_model_config(ModelConfig(model_path=tiny_model_path)).text_config.vocab_size
    )
    assert model.config._attn_implementation == "eager"


def test_an_override_without_a_field_is_refused_by_name(tiny_model_path: str) -> None:
    config = ModelConfig(model_path=tiny_model_path, override_config={"hidden_size": 999})
    with pytest.raises(ValueError, match=r"override_config has hidden_size=999.*text_config: \{hidden_size"):
        load_model_config(config)


def test_a_text_model_loads_as_a_causal_model_and_has_no_tower_to_keep_in_step(tmp_path) -> None:
    model = load_model(ModelConfig(model_path=write_text_model(tmp_path)), torch.bfloat16, torch.bfloat16)
    assert type(model) is Qwen3ForCausalLM
    assert model.dtype == torch.bfloat16
    keep_vision_tower_in_step(model)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load", [load_model, load_value_model])
@pytest.mark.parametrize("kind", ["image-text", "tied", "text"])
def test_a_model_without_weights_is_the_same_but_for_them_and_opens_no_file_of_them(
    kind: str, load: Callable, dtype: torch.dtype, tiny_model_path: str, tmp_path
) -> None:
    """Names, ties, shapes, precisions of parameters and buffers; the mode of every module; the configuration."""
    path = {"image-text": tiny_model_path, "tied": tmp_path, "text": tmp_path}[kind]
    if kind == "tied":
        make_tiny_model(tmp_path, tie_word_embeddings=True)
    if kind == "text":
        write_text_model(tmp_path)
    whole = load(ModelConfig(model_path=str(path)), dtype, dtype)
    bare_path = shutil.copytree(path, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors*"))
    bare = load(ModelConfig(model_path=str(bare_path)), dtype, dtype, with_weights=False)

    assert layout(bare) == layout(whole)
    assert {tensor.device.type for tensor in (*bare.parameters(), *bare.buffers())} == {"meta"}
    modes = [[(name, module.training) for name, module in model.named_modules()] for model in (bare, whole)]
    assert modes[0] == modes[1]
    left_out = {"_name_or_path", "dtype"}
    settings = [{**model.config.to_dict(), **dict.fromkeys(left_out)} for model in (bare, whole)]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_a_model_of_any_family_is_laid_out_without_weights_as_with_them(name: str, tmp_path) -> None:
    """In bf16, in which some could keep parts in float32; and no module holds a tensor that rank 0 would not send."""
    config = ModelConfig(model_path=make_family_model(name, tmp_path))
    whole, bare = (load_model(config, torch.bfloat16, torch.bfloat16, with_weights) for with_weights in (True, False))
    assert layout(bare) == layout(whole)
    hidden = {
        f"{path}.{name}"
        for path, module in bare.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    }
    assert hidden == set()


@pytest.mark.parametrize("kind", ["image-text", "tied", "text"])
def test_a_value_model_has_the_backbone_of_the_policy_and_a_head_at_zero(kind: str, tiny_model_path: str, tmp_path):
    """What is under `model.` in the policy stands there under the same names; of the vocabulary there is only the
    embedding."""
    path = tiny_model_path
    if kind == "tied":
        path = make_tiny_model(tmp_path, tie_word_embeddings=True)
    if kind == "text":
        path = write_text_model(tmp_path)
    arguments = (ModelConfig(model_path=path), torch.float32, torch.float32)
    value_model, policy = load_value_model(*arguments), load_model(*arguments)
    weights = value_model.state_dict()
    expected = {name: value for name, value in policy.state_dict().items() if name.startswith("model.")}
    head = {name: weights.pop(name) for name in ("value_head.weight", "value_head.bias")}
    assert all((value == 0).all() for value in head.values())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert dict(value_model.named_buffers()).keys() == dict(policy.named_buffers()).keys()


def test_a_value_model_answers_for_the_last_positions_and_its_head_computes_in_float32(tmp_path) -> None:
    """bf16 has 8 bits: rounded to it, values would be off by up to 1 in 256. The backbone's own output is taken as it
    is."""
    model = load_value_model(ModelConfig(model_path=write_text_model(tmp_path)), torch.bfloat16, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.value_head.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    ids = torch.arange(20)[None]
    hidden = model.model(ids).last_hidden_state.double()
    exact = hidden @ model.value_head.weight[0].double() + model.value_head.bias.double()
    values = model(input_ids=ids).logits
    assert (values.dtype, values.shape) == (torch.float32, (1, 20, 1))
    torch.testing.assert_close(values[..., 0].double(), exact, atol=1e-5, rtol=1e-5)
    assert not torch.equal(values, values.bfloat16().float())
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=3).logits, values[:, -3:])


def test_the_blank_image_changes_no_logit_and_gives_the_tower_a_gradient_of_zero(tiny_model_path: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32)
    ids = torch.arange(20, 30)[None]
    inputs = {"input_ids": ids, "position_ids": torch.arange(10).expand(4, 1, 10)}
    plain = model(**inputs).logits
    keep_vision_tower_in_step(model)
    kept = model(**inputs).logits
    assert torch.equal(kept, plain)
    kept.sum().backward()
    assert all((weight.grad == 0).all() for weight in model.model.visual.parameters())
    assert (model.lm_head.weight.grad != 0).any()


@pytest.mark.parametrize("name", IMAGE_TEXT_MODELS)
def test_the_blank_image_of_every_family_reaches_all_of_its_tower_and_changes_no_logit(name: str, tmp_path) -> None:
    """All that images move: parameters for which an image gives a gradient get one of zero from the blank image."""
    path = make_family_model(name, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    processor = get_processor(path)
    ids, mask = torch.arange(20, 30), torch.ones(10, dtype=torch.long)
    position_ids = prompt_position_ids(model.config, ids, mask, {})
    text = {
        "input_ids": ids[None],
        "attention_mask": mask[None],
        "position_ids": position_ids[None] if position_ids.dim() == 1 else position_ids[:, None],
        **media_token_types(model.config, ids[None]),
    }
    plain = model(**text).logits
    images = [[random_image((56, 56), 0)]]
    shown = processor(text=[f"a{processor.image_token}a"], images=images, return_tensors="pt")
    model(**shown).logits.sum().backward()
    of_images = {key for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    keep_vision_tower_in_step(model)
    kept = model(**text).logits
    torch.testing.assert_close(kept, plain, atol=0, rtol=0)
    kept.sum().backward()
    of_blank = {key for key, value in model.named_parameters() if value.grad is not None}
    assert of_images - of_blank == set()


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Qwen3-VL-MoE", "Qwen3.5"])
def test_images_and_videos_go_through_the_tower_in_one_run_with_the_same_logits(name: str, tmp_path) -> None:
    path = make_family_model(name, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    processor = get_processor(path)
    frames = np.stack([np.asarray(random_image((56, 56), seed)) for seed in range(4)])
    shown = processor(
        text=[f"a{processor.video_token}b{processor.image_token}c"],
        images=[random_image((56, 84), 9)],
        videos=[frames],
        video_metadata=[{"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3]}],
        do_sample_frames=False,
        return_tensors="pt",
    )
    plain = model(**shown).logits
    keep_vision_tower_in_step(model)
    runs = []
    model.model.visual.register_forward_pre_hook(lambda _, args: runs.append(args[0].shape[0]))
    torch.testing.assert_close(model(**shown).logits, plain, atol=1e-5, rtol=1e-5)
    assert runs == [2 * 16 + 24]


def test_a_batch_with_an_image_runs_the_tower_once_on_that_image(tiny_model_path: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32)
    keep_vision_tower_in_step(model)
    patches = []
    model.model.visual.register_forward_pre_hook(lambda _, args: patches.append(args[0].shape[0]))
    media = get_processor(tiny_model_path).image_processor([random_image((56, 56), 0)], return_tensors="pt")
    ids = torch.tensor([[20, *[model.config.image_token_id] * 4, 21]])
    model(input_ids=ids, position_ids=torch.arange(6).expand(4, 1, 6), **media)
    assert patches == [16]


# ---- weights that do not fit ----


def with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> ModelConfig:
    """A text model whose file of weights is changed after it was written."""
    path = write_text_model(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return ModelConfig(model_path=path)


HEAD = "lm_head.weight"
LAYER = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("load", [load_model, load_value_model])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: {f"module.{name}": value for name, value in weights.items()},
            "lack .* module.lm_head.weight",
        ),
        (
            lambda weights: {name: value for name, value in weights.items() if "mlp" not in name},
            "lack 3 of the 14 .*mlp",
        ),
        (lambda weights: {**weights, LAYER: weights[LAYER][:4].clone()}, r"q_proj.weight: \(4, 32\), not \(32, 32\)"),
    ],
)
def test_weights_that_are_missing_or_of_another_shape_are_refused_by_name(load, change, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        load(with_weights(tmp_path, change), torch.float32, torch.float32)


def test_a_missing_head_is_a_matter_of_the_policy_alone(tmp_path) -> None:
    config = with_weights(tmp_path, lambda weights: {name: weights[name] for name in weights if name != HEAD})
    load_value_model(config, torch.float32, torch.float32)
    with pytest.raises(ValueError, match=f"lack 1 of the 14 weights of Qwen3ForCausalLM: {HEAD}"):
        load_model(config, torch.float32, torch.float32)


def test_weights_that_nobody_uses_are_told_once(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    config = with_weights(tmp_path, lambda weights: {**weights, "extra.a": torch.ones(1), "extra.b": torch.ones(1)})
    load_model(config, torch.float32, torch.float32)
    (record,) = [record for record in caplog.records if record.name == "verl.models.loader"]
    assert record.getMessage().endswith("has weights that Qwen3ForCausalLM does not use: extra.a, extra.b")


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused_with_both_numbers(tiny_model_path: str) -> None:
    tokenizer, config = get_tokenizer(tiny_model_path), load_model_config(ModelConfig(model_path=tiny_model_path))
    require_room_for_tokens(tokenizer, config, "t", "m")
    last = max(tokenizer.get_vocab().values())
    config.text_config.vocab_size = last
    with pytest.raises(
        ValueError, match=f"the tokenizer of t has tokens up to id {last}, but m has embeddings for {last};"
    ):
        require_room_for_tokens(tokenizer, config, "t", "m")
