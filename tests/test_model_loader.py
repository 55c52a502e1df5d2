# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_model_loader.py
"""Models load with the attention and the overrides that were asked for, or not at all."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen3Config, Qwen3ForCausalLM

from tests.batches import random_image
from verl.models.loader import keep_vision_tower_in_step, load_model, load_model_config
from verl.utils.tokenizer import get_processor
from verl.workers.actor.config import ModelConfig


def test_overrides_reach_the_config_and_attention_is_the_one_asked_for(tiny_model_path: str) -> None:
    overrides = {"text_config": {"rms_norm_eps": 0.5}, "attn_implementation": "eager"}
    config = ModelConfig(model_path=tiny_model_path, override_config=overrides)
    model = load_model(config, torch.float32, torch.float32)
    assert model.config.text_config.rms_norm_eps == 0.5
    assert model.config.text_config.vocab_size == load_model_config(
        ModelConfig(model_path=tiny_model_path)
    ).text_config.vocab_size
    assert model.config._attn_implementation == "eager"


def test_an_override_without_a_field_is_refused_by_name(tiny_model_path: str) -> None:
    config = ModelConfig(model_path=tiny_model_path, override_config={"hidden_size": 999})
    with pytest.raises(ValueError, match=r"override_config has hidden_size=999.*text_config: \{hidden_size"):
        load_model_config(config)


def test_a_text_model_loads_as_a_causal_model_and_has_no_tower_to_keep_in_step(tmp_path) -> None:
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=64, num_key_value_heads=1, head_dim=16, **sizes)).save_pretrained(tmp_path)
    model = load_model(ModelConfig(model_path=str(tmp_path)), torch.bfloat16, torch.bfloat16)
    assert type(model) is Qwen3ForCausalLM
    assert model.dtype == torch.bfloat16
    keep_vision_tower_in_step(model)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)


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


def test_a_batch_with_an_image_runs_the_tower_once_on_that_image(tiny_model_path: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32)
    keep_vision_tower_in_step(model)
    patches = []
    model.model.visual.register_forward_pre_hook(lambda _, args: patches.append(args[0].shape[0]))
    media = get_processor(tiny_model_path).image_processor([random_image((56, 56), 0)], return_tensors="pt")
    ids = torch.tensor([[20, *[model.config.image_token_id] * 4, 21]])
    model(input_ids=ids, position_ids=torch.arange(6).expand(4, 1, 6), **media)
    assert patches == [16]
