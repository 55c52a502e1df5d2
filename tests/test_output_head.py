# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_output_head.py
"""What takes the place of a model's output head sees the head's own inputs and weight, or the model is refused."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from tests.vlm_zoo import TEXT_CONFIG, make_model
from verl.models import output_head
from verl.models.output_head import capture_logits, forward_with_head, has_plain_head
from verl.models.value_model import ValueModel

IDS = torch.arange(1, 9)[None]


def qwen(**extra) -> transformers.PreTrainedModel:
    return make_model("Qwen2ForCausalLM", transformers.Qwen2Config(**TEXT_CONFIG, **extra))


def keep_all(states: torch.Tensor) -> torch.Tensor:
    return states


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keep", [3, torch.tensor([1, 4])])
def test_it_sees_the_hidden_states_of_the_positions_to_keep_and_the_weight(tied: bool, keep) -> None:
    model = qwen(tie_word_embeddings=tied)
    inputs = {"input_ids": IDS, "logits_to_keep": keep}
    with torch.no_grad():
        expected = model(**inputs).logits
        found = forward_with_head(model, lambda logits: logits.states @ logits.weight.T, inputs, keep_all)
        shape = forward_with_head(model, lambda logits: logits.states.new_zeros(7), inputs, keep_all).shape
    torch.testing.assert_close(found, expected)
    assert shape == (7,)


def test_afterwards_the_head_is_itself_again() -> None:
    model = qwen()
    before = model(input_ids=IDS).logits
    forward_with_head(model, lambda logits: logits.states, {"input_ids": IDS}, keep_all)
    with pytest.raises(ZeroDivisionError):
        forward_with_head(model, lambda logits: 1 / 0, {"input_ids": IDS}, keep_all)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_models_that_change_their_logits_have_no_plain_head() -> None:
    gemma = transformers.Gemma2Config(**TEXT_CONFIG, query_pre_attn_scalar=16)
    assert gemma.final_logit_softcapping == 30.0
    cohere = transformers.CohereConfig(**TEXT_CONFIG, logit_scale=0.06)
    assert not has_plain_head(make_model("Gemma2ForCausalLM", gemma))
    assert not has_plain_head(make_model("CohereForCausalLM", cohere))
    assert has_plain_head(qwen())


def test_a_head_with_an_adapter_is_not_plain_and_one_beside_adapters_is() -> None:
    on_head = get_peft_model(qwen(), LoraConfig(r=2, target_modules=["lm_head"]))
    elsewhere = get_peft_model(qwen(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert (has_plain_head(on_head), has_plain_head(elsewhere)) == (False, True)


def test_a_model_that_makes_its_logits_itself_gives_those() -> None:
    """The scalar head of a critic, and logits that are capped after the head."""
    gemma = make_model("Gemma2ForCausalLM", transformers.Gemma2Config(**TEXT_CONFIG, query_pre_attn_scalar=16))
    for model in (gemma, ValueModel(qwen())):
        with torch.no_grad():
            expected = model(input_ids=IDS).logits
            assert torch.equal(
                forward_with_head(model, lambda logits: logits.states, {"input_ids": IDS}, keep_all), expected
            )


def test_captured_logits_outlive_the_forward_and_changes_of_the_head() -> None:
    model, select = qwen(), lambda states: states[0, -2:]
    inputs = {"input_ids": IDS}
    expected = model(**inputs).logits[0, -2:]
    captured = capture_logits(model, inputs, select)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    torch.testing.assert_close(captured.states @ captured.weight.T, expected)
    assert captured.states.requires_grad is False


def test_a_model_that_changes_its_logits_without_a_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 with the field taken out of the names that are known."""
    monkeypatch.setattr(output_head, "LOGIT_CHANGES", ())
    config = transformers.Gemma2Config(**TEXT_CONFIG, query_pre_attn_scalar=16)
    model = make_model("Gemma2ForCausalLM", config)
    with pytest.raises(RuntimeError, match="Gemma2ForCausalLM gives other logits than its output head does"):
        forward_with_head(model, lambda logits: logits.states, {"input_ids": IDS}, keep_all)
