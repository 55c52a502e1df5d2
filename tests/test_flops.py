# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_flops.py
"""The count of operations is torch's own, taken from a real forward, and the devices are not taken for one another."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from tests.vlm_zoo import FAMILIES, TEXT_CONFIG, make_model, model_inputs, write_prompts
from verl.models.flops import FlopCounter, peak_flops

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def counted_by_torch(model: torch.nn.Module, inputs: dict) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, use_cache=False)
    return counter.get_total_flops()


def above_the_diagonal(counter: FlopCounter, length: int) -> float:
    """What eager attention computes and throws away: pairs of a query and a later key, in each layer."""
    return 4 * counter.attention_width * len(counter.layer_types) * (length * (length - 1) // 2)


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
@pytest.mark.parametrize("prompt", ["st1tttt", "st3tt", "st2t1t"])
def test_an_image_text_model_takes_as_many_operations_as_torch_counts(name: str, prompt: str) -> None:
    """Tower, merger, deeper inputs and windows included; one image, a larger one, two."""
    family = FAMILIES[name]
    model = make_model(family.class_name, family.config(), "eager")
    prompts = write_prompts(family, (prompt,))
    inputs = model_inputs(family, prompts.input_ids, prompts.attention_mask, prompts.images)
    counter, length = FlopCounter(model, model.model.visual), prompts.input_ids.shape[1]
    work = counter.count([length], length, inputs)
    assert work.forward + above_the_diagonal(counter, length) == counted_by_torch(model, inputs)


@pytest.mark.parametrize(("family", "extra"), [("Qwen2", {}), ("Qwen3", {}), ("Qwen2", {"tie_word_embeddings": True})])
def test_a_text_model_takes_as_many_operations_as_torch_counts(family: str, extra: dict) -> None:
    config = getattr(transformers, f"{family}Config")(**TEXT_CONFIG, **extra)
    model = make_model(f"{family}ForCausalLM", config, "eager")
    counter = FlopCounter(model, None)
    work = counter.count([17], 5, {})
    expected = counted_by_torch(model, {"input_ids": torch.arange(1, 18)[None], "logits_to_keep": 5})
    assert work.forward + above_the_diagonal(counter, 17) == expected


def test_of_experts_only_those_that_a_token_goes_to_are_counted() -> None:
    """torch counts no grouped products, so the experts' share is written out: 17 tokens, 2 of 4 experts, each with

    three matrices of 64 x 32, in three layers, and two operations a weight.
    """
    model = make_model("Qwen3MoeForCausalLM", transformers.Qwen3MoeConfig(**TEXT_CONFIG, **MOE), "eager")
    counter = FlopCounter(model, None)
    work = counter.count([17], 17, {})
    expected = counted_by_torch(model, {"input_ids": torch.arange(1, 18)[None]})
    assert work.forward + above_the_diagonal(counter, 17) - expected == 17 * 2 * 3 * 64 * 32 * 3 * 2


@pytest.mark.parametrize("layer", ["full_attention", "sliding_attention"])
def test_a_sample_in_two_pieces_takes_as_many_operations_as_whole(layer: str) -> None:
    config = transformers.Gemma2Config(
        **TEXT_CONFIG, sliding_window=4, query_pre_attn_scalar=16, layer_types=[layer] * 3
    )
    counter = FlopCounter(make_model("Gemma2ForCausalLM", config), None)
    assert counter.count([7, 5], 3, {}, prefixes=[0, 7]) == counter.count([12], 3, {})
    assert counter.count([7, 5, 5], 3, {}, prefixes=[0, 7, 7]).forward < counter.count([12, 12], 3, {}).forward


def test_samples_of_a_window_see_no_further() -> None:
    """Window 4, ten tokens: 1 + 2 + 3 and then seven times 4 keys, where without it there are 55."""
    plain = FlopCounter(make_model("MistralForCausalLM", transformers.MistralConfig(**TEXT_CONFIG)), None)
    config = transformers.Gemma2Config(
        **TEXT_CONFIG, sliding_window=4, query_pre_attn_scalar=16, layer_types=["sliding_attention"] * 3
    )
    windowed = FlopCounter(make_model("Gemma2ForCausalLM", config), None)
    for counter, pairs in ((plain, 55), (windowed, 34)):
        of_tokens = 10 * counter.per_token.forward
        assert counter.count([10], 0, {}).forward - of_tokens == 3 * pairs * 4 * 64


def test_a_backward_pass_adds_what_trains_twice_and_what_is_frozen_once() -> None:
    """Of a model with adapters: its own weights pass gradients on and have none, the adapters have both."""
    model = make_model("Qwen2ForCausalLM", transformers.Qwen2Config(**TEXT_CONFIG))
    whole = FlopCounter(model, None).count([8], 8, {})
    assert whole.training == 3 * whole.forward
    adapted = FlopCounter(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])), None).count([8], 8, {})
    adapters = 3 * 2 * (64 * 2 + 2 * 64) * 8
    attention = 4 * 64 * 36 * 3
    assert adapted.trained == adapters + attention
    assert adapted.frozen == whole.forward - attention
    assert adapted.training == 3 * (adapters + attention) + 2 * (whole.forward - attention)


def test_a_frozen_tower_costs_its_forward_alone() -> None:
    family = FAMILIES["Qwen2.5-VL"]
    model = make_model(family.class_name, family.config())
    media = {"image_grid_thw": torch.tensor([[1, 4, 6]])}
    trained = FlopCounter(model, model.model.visual).count([9], 3, media)
    model.model.visual.requires_grad_(False)
    frozen = FlopCounter(model, model.model.visual).count([9], 3, media)
    assert frozen.forward == trained.forward
    assert trained.training - frozen.training == 2 * frozen.outside > 0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA H20-3e", 148.0),
    ],
)
def test_devices_are_told_apart_by_whole_words(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flops("NVIDIA GeForce RTX 4090") is None
    assert peak_flops("cpu") is None
