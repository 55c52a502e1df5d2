# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_weight_sync.py
"""The stream of whole weights that rollout engines take in, with adapters merged on the way."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from verl.workers.actor.config import FSDPConfig
from verl.workers.fsdp2 import build_mesh, shard_model
from verl.workers.weight_sync import stream_weights


def load(path: str, dtype: torch.dtype = torch.float32):
    return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)


def with_adapters(model, **settings):
    """Every linear layer adapted, with an update that is not zero, as after some training; wrapped by peft."""
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["plain", "rank-stabilised"])
@pytest.mark.parametrize("sharded", [False, True])
def test_adapters_come_merged_under_the_names_of_the_model_without_them(
    settings: dict, sharded: bool, tiny_model_path: str, lone_process_group
) -> None:
    """Against peft's own merge of a copy."""
    wrapped = with_adapters(load(tiny_model_path), **settings)
    expected = copy.deepcopy(wrapped).merge_and_unload().state_dict()
    model = wrapped.get_base_model()
    plain = load(tiny_model_path).state_dict()
    if sharded:
        shard_model(model, build_mesh(torch.device("cpu")), FSDPConfig(mp_param_dtype="fp32"))
    streamed = dict(stream_weights(model))
    assert list(streamed) == list(plain)
    for name, value in streamed.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    changed = [name for name, value in streamed.items() if not torch.equal(value, plain[name])]
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.language_model.embed_tokens.weight" not in changed


def test_an_update_finer_than_the_weights_below_it_is_not_rounded_to_them(tiny_model_path: str) -> None:
    """The stream's reader may hold the weights in float32; in bf16 it would get something else."""
    model = with_adapters(load(tiny_model_path, torch.bfloat16)).get_base_model()
    merged = dict(stream_weights(model))["model.language_model.layers.0.self_attn.q_proj.weight"]
    layer = model.model.language_model.layers[0].self_attn.q_proj
    expected = layer.weight.float() + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(merged, expected)
    assert not torch.equal(merged, merged.bfloat16().float())


def test_streaming_leaves_base_weights_and_adapters_apart(tiny_model_path: str) -> None:
    model = with_adapters(load(tiny_model_path)).get_base_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in stream_weights(model):
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
