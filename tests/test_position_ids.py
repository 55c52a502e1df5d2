# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_position_ids.py
"""Position ids are the model class's own, for every family that uses multimodal rope, and go on into the response."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    Idefics3Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLModel,
    Qwen3VLMoeConfig,
)

from verl.models.position_ids import extend_position_ids, prompt_position_ids
from verl.models.registry import family_of, media_token_ids, media_token_types

IMAGE, VIDEO, PAD, TEXT = 3, 4, 0, 9
TEXT_CONFIG = dict(
    vocab_size=10,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3]),
)
FAMILIES = [(Qwen2VLConfig, Qwen2VLModel), (Qwen2_5_VLConfig, Qwen2_5_VLModel), (Qwen3VLConfig, Qwen3VLModel)]


def make_config(config_class: type[PretrainedConfig]) -> PretrainedConfig:
    return config_class(
        text_config=TEXT_CONFIG,
        vision_config=dict(depth=1, num_heads=2, spatial_merge_size=2),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )


def two_image_prompt() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Padding, text, an image of 4 x 6 patches (2 x 3 tokens), text, one of 2 x 4 patches (1 x 2 tokens), text."""
    tokens = [PAD] * 3 + [TEXT] * 2 + [IMAGE] * 6 + [TEXT] + [IMAGE] * 2 + [TEXT] * 3
    input_ids = torch.tensor(tokens)  # (P,)
    return input_ids, (input_ids != PAD).long(), {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 4]])}


@pytest.mark.parametrize(("config_class", "model_class"), FAMILIES)
def test_rope_rows_are_those_of_a_model_instance(
    config_class: type[PretrainedConfig], model_class: type[torch.nn.Module]
) -> None:
    config = make_config(config_class)
    with torch.device("meta"):
        model = model_class(config)
    input_ids, attention_mask, mm_inputs = two_image_prompt()
    expected, _ = model.get_rope_index(
        input_ids[None],
        (input_ids == IMAGE).long()[None],
        attention_mask=attention_mask[None],
        **mm_inputs,
    )
    position_ids = prompt_position_ids(config, input_ids, attention_mask, mm_inputs)
    assert position_ids.dtype == torch.int64
    assert torch.equal(position_ids[1:], expected[:, 0])


@pytest.mark.parametrize("config_class", [config_class for config_class, _ in FAMILIES])
def test_positions_of_a_prompt_with_two_images_by_hand(config_class: type[PretrainedConfig]) -> None:
    """Text counts on by one. An image starts at the next position s: time s, height s + row, width s + column; the
    text after it starts at s plus the longer side in tokens. First image s = 2, 2 x 3 tokens, so text goes on at 5;
    second s = 6, 1 x 2 tokens, so text goes on at 8.
    """
    position_ids = prompt_position_ids(make_config(config_class), *two_image_prompt())
    text, time, height, width = position_ids.tolist()
    assert text == [0, 0, 0, *range(14)]
    assert time == [0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6, 8, 9, 10]
    assert height == [0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 6, 8, 9, 10]
    assert width == [0, 0, 0, 0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("config_class", [config_class for config_class, _ in FAMILIES])
def test_prompt_and_extension_are_the_positions_of_the_whole_sequence(config_class: type[PretrainedConfig]) -> None:
    config = make_config(config_class)
    input_ids, attention_mask, mm_inputs = two_image_prompt()
    whole_ids = torch.cat([input_ids, torch.full((5,), TEXT)])
    whole_mask = torch.cat([attention_mask, torch.ones(5, dtype=torch.long)])
    prompt = prompt_position_ids(config, input_ids, attention_mask, mm_inputs)[None]  # (1, 4, P)
    joined = torch.cat([prompt, extend_position_ids(prompt, 5)], dim=-1)
    assert torch.equal(joined[0], prompt_position_ids(config, whole_ids, whole_mask, mm_inputs))


@pytest.mark.parametrize(("config_class", "model_class"), FAMILIES[:2])
def test_a_response_goes_on_where_generation_does_even_after_a_long_video(
    config_class: type[PretrainedConfig], model_class: type[torch.nn.Module]
) -> None:
    """`generate` adds the model's own rope delta to a token's place in the sequence. Nine moments of one token are
    higher in time than the one token of text that follows. Later families write a time before each moment instead."""
    config = make_config(config_class)
    with torch.device("meta"):
        model = model_class(config)
    input_ids = torch.tensor([PAD, TEXT] + [VIDEO] * 9 + [TEXT])
    attention_mask = (input_ids != PAD).long()
    mm_inputs = {"video_grid_thw": torch.tensor([[9, 2, 2]])}
    prompt = prompt_position_ids(config, input_ids, attention_mask, mm_inputs)[None]
    types = media_token_types(config, input_ids)["mm_token_type_ids"][None]
    _, delta = model.get_rope_index(input_ids[None], types, attention_mask=attention_mask[None], **mm_inputs)
    following = extend_position_ids(prompt, 3)
    assert following[0, 0].tolist() == [11, 12, 13]
    for rope_row in following[0, 1:]:
        assert rope_row.tolist() == [11 + step + delta.item() for step in range(3)]


def test_a_prompt_without_images_has_four_equal_rows() -> None:
    input_ids = torch.tensor([PAD, PAD, TEXT, TEXT, TEXT])
    position_ids = prompt_position_ids(make_config(Qwen2_5_VLConfig), input_ids, (input_ids != PAD).long(), {})
    assert position_ids.tolist() == [[0, 0, 0, 1, 2]] * 4


def test_a_text_model_has_one_row_of_positions() -> None:
    attention_mask = torch.tensor([0, 0, 1, 1, 1])
    position_ids = prompt_position_ids(LlamaConfig(), torch.full((5,), TEXT), attention_mask, {})
    assert position_ids.tolist() == [0, 0, 0, 1, 2]
    assert extend_position_ids(position_ids[None], 3).tolist() == [[3, 4, 5]]


def test_media_tokens_are_marked_by_kind_and_only_where_the_model_takes_marks() -> None:
    input_ids = torch.tensor([[TEXT, IMAGE, VIDEO]])
    config = make_config(Qwen3VLConfig)
    assert media_token_ids(config) == [IMAGE, VIDEO]
    assert media_token_types(config, input_ids)["mm_token_type_ids"].tolist() == [[0, 1, 2]]
    assert media_token_ids(LlamaConfig()) == []
    assert media_token_types(LlamaConfig(), input_ids) == {}


def test_a_mixture_of_experts_differs_from_its_dense_model_only_in_how_it_holds_its_experts() -> None:
    dense, experts = family_of(Qwen3VLConfig()), family_of(Qwen3VLMoeConfig())
    assert (dense.transposed_weights, bool(experts.transposed_weights)) == ((), True)
    assert replace(experts, name=dense.name, model_types=dense.model_types, transposed_weights=()) == dense


def test_a_multimodal_model_of_no_known_family_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match="'idefics3' is a multimodal model of no known family.*qwen2_5_vl"):
        family_of(Idefics3Config())
