# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_attention_recorder.py
"""What the recorder measures is what eager attention maps and `generate` show, and the model never notices."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.vlm_zoo import (
    FAMILIES,
    IMAGE,
    PAD,
    SPECIAL,
    TEXT_CONFIG,
    VOCAB_SIZE,
    Family,
    Images,
    make_model,
    model_inputs,
    write_prompts,
)
from verl.models.attention_recorder import record_attention_mass, record_mass_at
from verl.models.position_ids import extend_position_ids, prompt_position_ids
from verl.utils.attention_metrics import KeyKind, count_keys, mass_from_attentions, vgr_from_mass
from verl.utils.attention_token_weights import (
    build_token_vgr_weights_for_batch,
    token_weights_from_lists,
    token_weights_from_vgr,
)
from verl.workers.actor.config import FSDPConfig
from verl.workers.fsdp2 import build_mesh, shard_model

RESPONSE_LENGTH = 4
PROMPTS = ("sptt1tttp", "stt2t1tttttp", "sttttttp", "s3p", "sptttt1ttp")
RESPONSE_LENGTHS = (4, 2, 4, 1, 0)
TOLERANCE = dict(atol=1e-5, rtol=0)
SHIFT_AT_LEAST = 0.1  # how far off the attention of the next query is, somewhere

QWEN = "Qwen2.5-VL"
FULL_LAYERS = {"Qwen3.5": [1, 3], "Gemma 3": [1, 3]}  # of the others all three


class Case(NamedTuple):
    """A model of one family, and a batch that it answered. N rows, S = P + R columns, R responses."""

    family: str
    model: PreTrainedModel
    inputs: dict[str, Any]
    kinds: torch.Tensor  # (N, S)
    generated: list[list[torch.Tensor]]
    """What `generate` showed, steps x layers of full attention."""

    @property
    def layers(self) -> list[int]:
        return FULL_LAYERS.get(self.family, [0, 1, 2])


def answered(family: str, prompts: Sequence[str] = PROMPTS, lengths: Sequence[int] = RESPONSE_LENGTHS) -> Case:
    """Prompts, left-padded, with what the model samples after them; responses are cut to `lengths`."""
    zoo = FAMILIES[family]
    model = make_model(zoo.class_name, zoo.config())
    prompt = write_prompts(zoo, prompts)
    inputs = model_inputs(zoo, prompt.input_ids, prompt.attention_mask, prompt.images)
    model.set_attn_implementation("eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        output = model.generate(
            **{name: value for name, value in inputs.items() if name != "position_ids"},
            do_sample=True,
            max_new_tokens=RESPONSE_LENGTH,
            min_new_tokens=RESPONSE_LENGTH,
            suppress_tokens=[PAD, *range(IMAGE - 1, VOCAB_SIZE)],
            output_attentions=True,
            return_dict_in_generate=True,
        )
    model.set_attn_implementation("sdpa")
    input_ids, kinds = with_responses(prompt.kinds, output.sequences, lengths)
    generated = [of_full_layers(family, by_layer) for by_layer in output.attentions]
    return Case(family, model, inputs_of(zoo, input_ids, kinds, prompt.images), kinds, generated)


def with_responses(
    prompt_kinds: torch.Tensor, sequences: torch.Tensor, lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and kinds (N, S) of sequences whose responses end after `lengths` tokens."""
    is_response = torch.arange(RESPONSE_LENGTH) < torch.tensor(lengths)[:, None]  # (N, R)
    kinds = torch.cat([prompt_kinds, is_response.to(torch.int8) * KeyKind.RESPONSE], dim=1)  # (N, S)
    return sequences.masked_fill(kinds == KeyKind.PADDING, PAD), kinds


def inputs_of(zoo: Family, input_ids: torch.Tensor, kinds: torch.Tensor, images: Images) -> dict[str, Any]:
    return model_inputs(zoo, input_ids, (kinds != KeyKind.PADDING).long(), images)


def of_full_layers(family: str, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Without Gemma's sliding layers. Qwen3.5's recurrent layers have no attention anyway."""
    return [maps[layer] for layer in FULL_LAYERS[family]] if family == "Gemma 3" else list(maps)


def eager_maps(case: Case, inputs: dict[str, Any] | None = None) -> list[torch.Tensor]:
    """Attention maps (N, H, S, S) of the full-attention layers, teacher-forced."""
    case.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = case.model(**(inputs or case.inputs), output_attentions=True, use_cache=False).attentions
    finally:
        case.model.set_attn_implementation("sdpa")
    return of_full_layers(case.family, attentions)


def by_definition(maps: Sequence[torch.Tensor], kinds: torch.Tensor, query_shift: int = 0) -> torch.Tensor:
    """(N, R, 2) float64, token by token: attention maps (N, H, S, S) of some layers, at the query before the token.

    Heads are averaged, then the sum over the prompt without its first token is made 1, then layers are averaged.
    `query_shift` of 1 takes the query one real token later.
    """
    num_rows, length = kinds.shape
    mass = torch.zeros(num_rows, RESPONSE_LENGTH, 2, dtype=torch.float64)
    for row in range(num_rows):
        real = [column for column in range(length) if kinds[row, column] != KeyKind.PADDING]
        for place, column in enumerate(real):
            if kinds[row, column] != KeyKind.RESPONSE:
                continue
            query = real[place - 1 + query_shift]
            for attention in maps:
                to_key = attention[row, :, query].double().mean(dim=0)  # (S,)
                text, vision, other = (
                    to_key[kinds[row] == kind].sum() for kind in (KeyKind.TEXT, KeyKind.VISION, KeyKind.PROMPT)
                )
                share = torch.stack([text, vision]) / (text + vision + other)
                mass[row, column - (length - RESPONSE_LENGTH)] += share / len(maps)
    return mass


def record(
    model: nn.Module, inputs: dict[str, Any], kinds: torch.Tensor, last_k_layers: int | None = None
) -> torch.Tensor:
    with torch.no_grad(), record_attention_mass(model, kinds, RESPONSE_LENGTH, last_k_layers) as recorder:
        model(**inputs, use_cache=False)
    return recorder.mass()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return answered(request.param)


@pytest.fixture(scope="module")
def qwen() -> Case:
    return answered(QWEN)


# ---- the same numbers, three ways ----


@pytest.mark.parametrize("last_k_layers", [1, 2, None, 99])
def test_recorder_eager_maps_and_generate_agree_on_every_response_token(case: Case, last_k_layers: int | None):
    maps = eager_maps(case)
    maps = maps if last_k_layers is None else maps[-last_k_layers:]
    expected = by_definition(maps, case.kinds)
    generated = mass_from_attentions(case.generated, case.kinds, RESPONSE_LENGTH, last_k_layers)
    torch.testing.assert_close(generated.double(), expected, **TOLERANCE)
    for implementation in ("sdpa", "eager"):
        case.model.set_attn_implementation(implementation)
        recorded = record(case.model, case.inputs, case.kinds, last_k_layers)
        case.model.set_attn_implementation("sdpa")
        assert recorded.dtype == torch.float32
        torch.testing.assert_close(recorded.double(), expected, **TOLERANCE)

    next_query = by_definition(maps, case.kinds, query_shift=1)
    assert (next_query - expected).abs().max() > SHIFT_AT_LEAST


def test_rows_have_the_mass_that_their_prompt_allows(case: Case):
    """No text or no image in the prompt, no mass there; no response token, no mass at all."""
    text, vision = record(case.model, case.inputs, case.kinds).unbind(dim=2)
    is_response = case.kinds[:, -RESPONSE_LENGTH:] == KeyKind.RESPONSE
    assert not text[~is_response].any() and not vision[~is_response].any()
    has_text = (case.kinds == KeyKind.TEXT).any(dim=1)
    has_image = (case.kinds == KeyKind.VISION).any(dim=1)
    assert has_text.tolist() == [True, True, True, False, True]
    assert has_image.tolist() == [True, True, False, True, True]
    assert ((text > 0) == (is_response & has_text[:, None])).all()
    assert ((vision > 0) == (is_response & has_image[:, None])).all()


def test_padding_prompts_on_the_right_changes_nothing(case: Case):
    """The same prompts and responses, with the padding between them.

    Only recurrent layers, and windows that count columns, notice such padding: there the eager maps decide.
    """
    zoo = FAMILIES[case.family]
    prompt = write_prompts(zoo, PROMPTS, padding="right")
    sequences = torch.cat([prompt.input_ids, case.inputs["input_ids"][:, -RESPONSE_LENGTH:]], dim=1)
    input_ids, kinds = with_responses(prompt.kinds, sequences, RESPONSE_LENGTHS)
    assert all(
        torch.equal(ids[own > 0], expected[other > 0])
        for ids, own, expected, other in zip(input_ids, kinds, case.inputs["input_ids"], case.kinds, strict=True)
    )
    inputs = inputs_of(zoo, input_ids, kinds, prompt.images)
    recorded = record(case.model, inputs, kinds)
    torch.testing.assert_close(recorded.double(), by_definition(eager_maps(case, inputs), kinds), **TOLERANCE)
    if case.family not in FULL_LAYERS:
        torch.testing.assert_close(recorded, record(case.model, case.inputs, case.kinds), **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_without_any_image_is_measured(family: str):
    case = answered(family, ["sptttp", "sttttttttp"], [2, 4])
    assert "pixel_values" not in case.inputs
    recorded = record(case.model, case.inputs, case.kinds)
    torch.testing.assert_close(recorded.double(), by_definition(eager_maps(case), case.kinds), **TOLERANCE)
    assert not recorded[..., 1].any()


@pytest.mark.parametrize("last_k_layers", [None, 1, 2])
def test_the_notebooks_weights_are_trainings_where_layers_with_a_window_are_none_or_left_out(
    last_k_layers: int | None,
):
    """Gemma 3's layers 0 and 2 are such. None still counts as a layer, so that two last ones can only be had without.

    Its tokens are told apart as in a notebook, by a processor.
    """
    case = answered("Gemma 3")
    keys = count_keys(case.kinds)
    response_mask = (case.kinds[:, -RESPONSE_LENGTH:] == KeyKind.RESPONSE).long()
    mass = record(case.model, case.inputs, case.kinds, last_k_layers)
    in_training = token_weights_from_vgr(vgr_from_mass(mass, keys), response_mask, (0.2, 3.0))
    tokenizer = SimpleNamespace(
        convert_tokens_to_ids={}.get, pad_token_id=PAD, all_special_tokens=["special"], all_special_ids=[SPECIAL]
    )
    processor = SimpleNamespace(tokenizer=tokenizer, image_token_id=IMAGE)
    ids = case.inputs["input_ids"]
    left_out = case.generated
    none = [[None, first, None, last] for first, last in left_out]
    for attentions in [left_out] if last_k_layers == 2 else [left_out, none]:
        lists, _ = build_token_vgr_weights_for_batch(
            attentions, ids[:, :-RESPONSE_LENGTH], ids, processor, last_k_layers=last_k_layers
        )
        assert [len(of_row) for of_row in lists] == list(RESPONSE_LENGTHS)
        weights, _ = token_weights_from_lists(lists, response_mask)
        torch.testing.assert_close(weights, in_training, atol=1e-5, rtol=0)
    assert (in_training[response_mask.bool()] != 1).sum() >= 6


def test_only_layers_of_full_attention_count(case: Case):
    for last_k_layers in (1, 2, 3, None):
        with record_attention_mass(case.model, case.kinds, RESPONSE_LENGTH, last_k_layers) as recorder:
            pass
        assert recorder.layers == (case.layers if last_k_layers is None else case.layers[-last_k_layers:])


def test_samples_packed_into_one_row_give_the_masses_and_weights_of_padded_ones(qwen: Case):
    """With the text positions as a first row of position ids, transformers keeps the samples apart."""
    ids, kinds = qwen.inputs["input_ids"], qwen.kinds
    is_real = kinds != KeyKind.PADDING
    grids, parts, images = qwen.inputs["image_grid_thw"], [], 0
    for row, prompt in enumerate(PROMPTS):
        own = ids[row, :-RESPONSE_LENGTH][is_real[row, :-RESPONSE_LENGTH]]
        number = sum(character.isdigit() for character in prompt)
        media = {"image_grid_thw": grids[images : images + number]} if number else {}
        images += number
        positions = prompt_position_ids(qwen.model.config, own, torch.ones_like(own), media)  # (4, own)
        parts.append(torch.cat([positions, extend_position_ids(positions, RESPONSE_LENGTHS[row])], dim=1))
    position_ids = torch.cat(parts, dim=1)[:, None]  # (4, 1, total)
    places = torch.arange(int(is_real.sum())).split(is_real.sum(dim=1).tolist())
    columns = [torch.arange(length) for length in RESPONSE_LENGTHS]
    inputs = {name: qwen.inputs[name] for name in ("pixel_values", "image_grid_thw")}
    inputs |= {"input_ids": ids[is_real][None], "position_ids": position_ids, "attention_mask": None}

    for last_k_layers in (1, None):
        packed = partial(record_mass_at, qwen.model, kinds[is_real], places, columns)
        with torch.no_grad(), packed(RESPONSE_LENGTH, last_k_layers) as recorder:
            qwen.model(**inputs, use_cache=False)
        expected = record(qwen.model, qwen.inputs, kinds, last_k_layers)
        torch.testing.assert_close(recorder.mass(), expected, **TOLERANCE)
        response_mask = kinds[:, -RESPONSE_LENGTH:] == KeyKind.RESPONSE
        weights, expected_weights = (
            token_weights_from_vgr(vgr_from_mass(mass, count_keys(kinds)), response_mask, (0.0, math.inf))
            for mass in (recorder.mass(), expected)
        )
        torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=0)


def test_in_bfloat16_the_mass_is_that_of_the_models_own_queries_and_keys(monkeypatch: pytest.MonkeyPatch):
    """Products are made in float32."""
    case = answered(QWEN)
    model = case.model.bfloat16()
    recorded, expected = recorded_and_expected_of_own_queries(model, case.inputs, case.kinds, monkeypatch)
    torch.testing.assert_close(recorded, expected, atol=1e-6, rtol=0)


def recorded_and_expected_of_own_queries(
    model: PreTrainedModel, inputs: dict[str, Any], kinds: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mass in one forward of a bfloat16 model, and the float64 mass of the same queries and keys.

    A function in the table keeps them, in the place of the model's own. Whoever put one there does not lose it.
    """
    implementation = model.config.get_text_config()._attn_implementation
    attend, seen = ALL_ATTENTION_FUNCTIONS[implementation], []

    def keep(module, query, key, *args, **kwargs):
        if hasattr(module, "layer_idx"):
            seen.append((query.cpu(), key.cpu()))
        return attend(module, query, key, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, implementation, keep)
    recorded = record(model, inputs, kinds)
    assert ALL_ATTENTION_FUNCTIONS[implementation] is keep
    assert len(seen) == 3 and seen[0][0].dtype == torch.bfloat16
    maps = [causal_maps(query, key, kinds != KeyKind.PADDING) for query, key in seen]
    return recorded.cpu().double(), by_definition(maps, kinds)


def causal_maps(query: torch.Tensor, key: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """(N, H, S, S) float64: each token attends to the real ones up to itself."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5
    visible = is_real[:, None, None, :] & torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)


# ---- attention with something added ----


def text_case(class_name: str, implementation: str = "sdpa", **config: Any) -> Case:
    """A text model, for whose recorder token kinds are but labels."""
    config_class = getattr(transformers, class_name.replace("ForCausalLM", "Config"))
    model = make_model(class_name, config_class(**{**TEXT_CONFIG, **config}), implementation)
    return Case(class_name, model, *text_batch(PROMPTS), [])


def text_batch(prompts: Sequence[str]) -> tuple[dict[str, Any], torch.Tensor]:
    """Model inputs and kinds (N, S), images being tokens like others."""
    zoo = FAMILIES["LLaVA"]
    prompt = write_prompts(zoo, prompts)
    sequences = nn.functional.pad(prompt.input_ids, (0, RESPONSE_LENGTH), value=7)
    input_ids, kinds = with_responses(prompt.kinds, sequences, RESPONSE_LENGTHS)
    return inputs_of(zoo, input_ids, kinds, images=()), kinds


def recorded_and_expected(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """From one eager forward."""
    case.model.set_attn_implementation("eager")
    with torch.no_grad(), record_attention_mass(case.model, case.kinds, RESPONSE_LENGTH) as recorder:
        maps = case.model(**case.inputs, output_attentions=True, use_cache=False).attentions
    return recorder.mass().double(), by_definition([maps[layer] for layer in recorder.layers], case.kinds)


def test_a_cap_on_the_scores_is_honoured():
    """Gemma 2: the sharp scores here are far above the cap. Its scale is its own, too."""
    layers = dict(layer_types=["full_attention"] * 3, query_pre_attn_scalar=4, attn_logit_softcapping=2.0)
    recorded, expected = recorded_and_expected(text_case("Gemma2ForCausalLM", **layers))
    torch.testing.assert_close(recorded, expected, **TOLERANCE)


def test_attention_that_goes_to_a_heads_own_sink_is_left_out():
    """gpt-oss: the sinks differ between heads, and so does what they leave to the tokens."""
    layers = dict(layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=4)
    rope = dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0))
    experts = dict(num_local_experts=2, num_experts_per_tok=1)
    case = text_case("GptOssForCausalLM", "eager", **layers, **rope, **experts)
    with torch.no_grad():
        for layer in case.model.model.layers:
            layer.self_attn.sinks.copy_(torch.tensor([-3.0, 2.0, 6.0, 12.0]))
    recorded, expected = recorded_and_expected(case)
    torch.testing.assert_close(recorded, expected, **TOLERANCE)


def test_a_window_has_to_hold_prompt_and_response():
    """The longest sample has 22 prompt tokens and 2 response tokens; of the last, nothing is measured."""
    case = text_case("MistralForCausalLM", sliding_window=23)
    assert (case.kinds != KeyKind.PADDING).sum(dim=1).max() == 24 and case.kinds.shape[1] == 26
    expected = by_definition(eager_maps(case), case.kinds)
    torch.testing.assert_close(record(case.model, case.inputs, case.kinds).double(), expected, **TOLERANCE)

    narrow = text_case("MistralForCausalLM", sliding_window=22)
    with pytest.raises(RuntimeError, match=r"layer 0 of MistralForCausalLM with attn_implementation='sdpa'.* 22 tok"):
        record(narrow.model, narrow.inputs, narrow.kinds)
    with pytest.raises(RuntimeError, match="layer 2 of MistralForCausalLM.*collect_attentions=false"):
        record(narrow.model, narrow.inputs, narrow.kinds, 1)


def test_a_window_that_only_the_models_mask_has_is_seen_too():
    narrow = text_case("PhimoeForCausalLM", sliding_window=22)
    with pytest.raises(RuntimeError, match="layer 0 of PhimoeForCausalLM .* window of 22 tokens"):
        record(narrow.model, narrow.inputs, narrow.kinds)


@pytest.mark.parametrize("option", ["position_bias", "indices", "block_indices"])
def test_attention_that_cannot_be_measured_is_refused(qwen: Case, option: str):
    module = qwen.model.get_decoder().layers[2].self_attn
    query = torch.zeros(*qwen.kinds.shape, 4, 16).transpose(1, 2)
    with record_attention_mass(qwen.model, qwen.kinds, RESPONSE_LENGTH) as recorder:
        recorder.observe(module, query, query, **{option: None})
        with pytest.raises(RuntimeError, match=f"layer 1 of Qwen2_5_VLFor.* {option}"):
            recorder.observe(qwen.model.get_decoder().layers[1].self_attn, query, query, **{option: query})


# ---- the model does not notice ----


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_models_output_is_the_same_to_the_bit(case: Case, implementation: str):
    case.model.set_attn_implementation(implementation)
    with torch.no_grad():
        expected = case.model(**case.inputs, use_cache=False).logits
        with record_attention_mass(case.model, case.kinds, RESPONSE_LENGTH):
            recorded = case.model(**case.inputs, use_cache=False).logits
        after = case.model(**case.inputs, use_cache=False).logits
    case.model.set_attn_implementation("sdpa")
    assert torch.equal(recorded, expected) and torch.equal(after, expected)


def gradients(case: Case, run_backward: Callable[[torch.Tensor], None] = torch.Tensor.backward) -> list[torch.Tensor]:
    case.model.zero_grad()
    logits = case.model(**case.inputs, use_cache=False).logits
    run_backward(logits[case.inputs["attention_mask"].bool()].square().mean())
    return [parameter.grad for parameter in case.model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", [QWEN, "Qwen3-VL", "Qwen3.5", "Gemma 3", "LLaVA"])
def test_gradient_checkpointing_changes_neither_mass_nor_gradient(family: str, use_reentrant: bool):
    """Layers run a second time in the backward pass, which is inside the context here."""
    case = answered(family)
    expected_mass = record(case.model, case.inputs, case.kinds)
    case.model.train()
    case.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    case.model.enable_input_require_grads()
    expected_gradients = gradients(case)
    assert len(expected_gradients) > 20

    with record_attention_mass(case.model, case.kinds, RESPONSE_LENGTH) as recorder:
        recorded_gradients = gradients(case)
    assert not recorder.mass().requires_grad
    assert torch.equal(recorder.mass(), expected_mass)
    assert all(torch.equal(*pair) for pair in zip(recorded_gradients, expected_gradients, strict=True))


def test_layers_may_run_again_on_another_thread():
    """As they do on a GPU, whose backward pass has a thread of its own."""
    case = answered(QWEN)
    expected_mass = record(case.model, case.inputs, case.kinds)
    case.model.train()
    case.model.gradient_checkpointing_enable({"use_reentrant": False})
    expected_gradients = gradients(case)

    def run_backward(loss: torch.Tensor) -> None:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    with record_attention_mass(case.model, case.kinds, RESPONSE_LENGTH) as recorder:
        recorded_gradients = gradients(case, run_backward)
    assert torch.equal(recorder.mass(), expected_mass)
    assert all(torch.equal(*pair) for pair in zip(recorded_gradients, expected_gradients, strict=True))


@pytest.fixture
def plain_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' table as it comes: a test before may have had it extended for packed rows."""
    monkeypatch.delitem(vars(ALL_ATTENTION_FUNCTIONS), "get_interface", raising=False)


def state_of_the_table() -> tuple[dict[str, Any], dict[str, Callable], Callable]:
    return (
        dict(vars(ALL_ATTENTION_FUNCTIONS)),
        dict(ALL_ATTENTION_FUNCTIONS.items()),
        ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None),
    )


def test_the_table_of_attention_functions_is_what_it_was(qwen: Case, plain_table, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "somebodys", lambda *args, **kwargs: None)
    before = state_of_the_table()
    with record_attention_mass(qwen.model, qwen.kinds, RESPONSE_LENGTH):
        assert state_of_the_table() != before
    assert state_of_the_table() == before

    with pytest.raises(TypeError), record_attention_mass(qwen.model, qwen.kinds, RESPONSE_LENGTH):
        qwen.model(input_ids="no ids")
    assert state_of_the_table() == before

    with pytest.raises(RuntimeError), record_attention_mass(qwen.model, qwen.kinds[:, 1:], RESPONSE_LENGTH):
        qwen.model(**qwen.inputs)
    assert state_of_the_table() == before


def test_each_tower_gets_its_own_eager_function(qwen: Case):
    """A modeling file may have several; the arguments arrive as they were given."""

    def attend(*args, **kwargs):
        return args, kwargs

    module, args, kwargs = nn.Linear(1, 1), (1, 2, 3), dict(attention_mask=4, scaling=5)
    with record_attention_mass(qwen.model, qwen.kinds, RESPONSE_LENGTH):
        handed_out = ALL_ATTENTION_FUNCTIONS.get_interface("eager", attend)
        assert handed_out(module, *args, **kwargs) == ((module, *args), kwargs)


def test_contexts_may_be_nested(qwen: Case, plain_table):
    before = state_of_the_table()
    with torch.no_grad(), record_attention_mass(qwen.model, qwen.kinds, RESPONSE_LENGTH) as outer:
        with record_attention_mass(qwen.model, qwen.kinds, RESPONSE_LENGTH, layers=1) as inner:
            qwen.model(**qwen.inputs)
    assert torch.equal(outer.mass(), record(qwen.model, qwen.inputs, qwen.kinds))
    assert torch.equal(inner.mass(), record(qwen.model, qwen.inputs, qwen.kinds, 1))
    assert state_of_the_table() == before


# ---- what cannot be measured is said ----


def test_a_layer_that_was_not_seen_is_named(qwen: Case, monkeypatch: pytest.MonkeyPatch):
    with record_attention_mass(qwen.model, qwen.kinds, RESPONSE_LENGTH) as recorder:
        pass
    with pytest.raises(RuntimeError, match=r"Qwen2_5_VLForConditionalGeneration .*'sdpa'.* \[0, 1, 2\].*no forward"):
        recorder.mass()

    skipped = qwen.model.get_decoder().layers[1].self_attn
    monkeypatch.setattr(skipped, "forward", lambda hidden_states, **kwargs: (hidden_states, None))
    with pytest.raises(RuntimeError, match=r"no attention of layers \[1\], of \[0, 1, 2\].*token_weight_layers"):
        record(qwen.model, qwen.inputs, qwen.kinds)
    assert record(qwen.model, qwen.inputs, qwen.kinds, 1).any()


def test_a_model_with_a_table_of_its_own_is_refused():
    case = text_case("DogeForCausalLM")
    with pytest.raises(RuntimeError, match=r"DogeForCausalLM .*\[0, 1, 2\].*common table.*collect_attentions=false"):
        record(case.model, case.inputs, case.kinds)


def test_a_model_without_full_attention_is_refused():
    case = text_case("Gemma2ForCausalLM", layer_types=["sliding_attention"] * 3)
    with pytest.raises(RuntimeError, match="Gemma2ForCausalLM has no layer of full attention"):
        record(case.model, case.inputs, case.kinds)


def test_a_layer_whose_type_nobody_tells_is_refused():
    case = text_case("Gemma2ForCausalLM", layer_types=["full_attention"] * 3)
    case.model.config.layer_types = ["full_attention"] * 2
    with pytest.raises(RuntimeError, match="Gemma2ForCausalLM has a layer 2, .* only 2 entries; give its config"):
        record(case.model, case.inputs, case.kinds)


@pytest.mark.parametrize("last_k_layers", [0, -1])
def test_there_is_no_last_zero_layers(qwen: Case, last_k_layers: int):
    with pytest.raises(ValueError, match=f"layers={last_k_layers} is no number"):
        record(qwen.model, qwen.inputs, qwen.kinds, last_k_layers)


def test_a_second_forward_in_one_context_is_refused(qwen: Case):
    """Which of the two the mass should be of, nobody could tell. The first one's is kept."""
    with torch.no_grad(), record_attention_mass(qwen.model, qwen.kinds, RESPONSE_LENGTH, 2) as recorder:
        qwen.model(**qwen.inputs)
        with pytest.raises(RuntimeError, match="layer 1 of Qwen2_5_VLFor.* ran twice.*one forward"):
            qwen.model(**qwen.inputs)
    assert torch.equal(recorder.mass(), record(qwen.model, qwen.inputs, qwen.kinds, 2))


def test_a_forward_of_another_shape_is_refused(qwen: Case):
    """Fewer rows, columns that were cut off, and a prompt whose keys wait in a cache."""
    rows, columns = qwen.kinds.shape
    for kinds in (qwen.kinds[:3], qwen.kinds[:, 2:]):
        with pytest.raises(RuntimeError, match=rf"\({rows}, {columns}\) and \({rows}, {columns}\).*\({len(kinds)}, "):
            record(qwen.model, qwen.inputs, kinds)

    case = text_case("MistralForCausalLM")
    prompt, response = (
        {name: value[:, columns] for name, value in case.inputs.items()}
        for columns in (slice(None, -RESPONSE_LENGTH), slice(-RESPONSE_LENGTH, None))
    )
    response["attention_mask"] = case.inputs["attention_mask"]
    with torch.no_grad():
        cache = case.model(**prompt, use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="without a cache"):
            with record_attention_mass(case.model, case.kinds[:, -RESPONSE_LENGTH:], RESPONSE_LENGTH):
                case.model(**response, past_key_values=cache)


# ---- whatever is wrapped around the model ----


def test_adapters_and_data_parallel_wrappers_are_looked_through(lone_process_group):
    case = answered(QWEN)
    expected = record(case.model, case.inputs, case.kinds)
    with_adapters = get_peft_model(case.model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    wrapped = DistributedDataParallel(with_adapters)
    assert torch.equal(record(wrapped, case.inputs, case.kinds), expected)
    with record_attention_mass(wrapped, case.kinds, RESPONSE_LENGTH) as recorder:
        pass
    with pytest.raises(RuntimeError, match="^Qwen2_5_VLForConditionalGeneration "):
        recorder.mass()


def test_a_compiled_model_is_measured_anew_in_every_context():
    """No tap outlives its context, and other kinds of keys are not compiled for once more."""
    case = text_case("LlamaForCausalLM", num_hidden_layers=1)
    counter = CompileCounter()
    compiled = torch.compile(case.model, backend=counter)
    frames = []
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[1:] + PROMPTS[:1]):
        batch = text_batch(prompts)
        expected = record(case.model, *batch)
        assert torch.equal(record(compiled, *batch), expected)
        with torch.no_grad():
            logits = compiled(**batch[0], use_cache=False).logits
            assert torch.equal(logits, case.model(**batch[0], use_cache=False).logits)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] == frames[2] > 0

    with record_attention_mass(compiled, case.kinds, RESPONSE_LENGTH) as recorder:
        pass
    with pytest.raises(RuntimeError, match="^LlamaForCausalLM "):
        recorder.mass()


@pytest.mark.parametrize("family", ["Qwen2-VL", QWEN, "Qwen3-VL"])
def test_a_sharded_model_gives_the_same_mass(family: str, lone_process_group):
    case = answered(family)
    expected = record(case.model, case.inputs, case.kinds)
    config = FSDPConfig(mp_param_dtype="fp32", mp_reduce_dtype="fp32")
    shard_model(case.model, build_mesh(torch.device("cpu")), config)
    assert torch.equal(record(case.model, case.inputs, case.kinds), expected)
