# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_token_signals.py
"""Token signals: each against a value by hand, what becomes of importance, the controls, and what is logged."""

import math
import re
from itertools import groupby
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from bench_vgr import build_model, build_rows, passes_of_signals, variants_of
from PIL import Image
from torch.distributions import Categorical
from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig

from tests.batches import answer_at_random, make_prompts, response_logits
from tests.documents import LANGUAGES, tables_of
from tests.probe import RESPONSE_LENGTH, RESPONSES_PER_PROMPT, ProbeWorker, make_config, start_alone, start_two
from verl.algorithms.token_weights import (
    CONTROLS,
    MEASURED_STREAMS,
    TOKEN_SIGNALS,
    compute_token_weights,
    find_signal,
    measured_streams,
    signals_of,
)
from verl.data.image_noise import ImageNoise
from verl.data.vision import MediaHandle
from verl.models.attention_recorder import choose_layers, require_layers
from verl.protocol import DataProto
from verl.trainer.config import AlgorithmConfig, load_config
from verl.trainer.config_checks import effect_notes
from verl.trainer.main import prepare
from verl.trainer.metrics import compute_signal_metrics, compute_token_weight_metrics
from verl.trainer.token_kinds import TokenKind, TokenKinds
from verl.trainer.token_weigher import TokenWeigher, describe_token_weights
from verl.utils.attention_token_weights import weights_from_importance

ROOT = Path(__file__).resolve().parent.parent
LOG_ALL = "algorithm.token_signals_to_log=[vgr,vision_density,entropy,image_kl,hidden_cosine,uniform]"
COLLECT = "worker.rollout.collect_attentions=true"
NOISE = ImageNoise("patches", 0.5)
ATTENDS = f"{ROOT}/tests/signals.py:attends"


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight rows: the first four with images, the last four text only."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    return answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH)


def start(model_path: str, *overrides: str) -> ProbeWorker:
    return start_alone(make_config(model_path, COLLECT, LOG_ALL, *overrides))


@pytest.fixture(scope="module")
def measured(tiny_model_path: str, batch: DataProto, lone_process_group) -> dict[str, torch.Tensor]:
    """All that signals ask for, of the batch, packed."""
    return streams_of(start(tiny_model_path), batch)


def streams_of(worker, batch: DataProto) -> dict[str, torch.Tensor]:
    streams = dict(worker.compute_log_probs(batch.select(None, ["multi_modal_data", "uid"])).batch.items())
    return streams | {name: batch.batch[name] for name in ("response_mask", "responses", "rollout_log_probs")}


def importance_of(name: str, streams: dict[str, torch.Tensor]) -> torch.Tensor:
    return find_signal(name).importance(streams)


# ---- by hand ----


def test_the_pass_measures_what_the_signals_of_a_run_ask_for(measured: dict[str, torch.Tensor]) -> None:
    assert {"old_log_probs", *MEASURED_STREAMS} < set(measured)
    signal = dict(enable_token_weights=True, token_weight_signal="entropy", token_signals_to_log=["vgr"])
    assert measured_streams(AlgorithmConfig(**signal), True) == ["entropy", "attention_mass", "attention_keys"]
    assert measured_streams(AlgorithmConfig(**signal), False) == ["entropy"]
    assert measured_streams(AlgorithmConfig(token_weight_signal="image_kl"), False) == []
    assert list(signals_of(AlgorithmConfig(**signal))) == ["entropy", "vgr"]


def test_attention_signals_by_hand() -> None:
    """Text 0.3 on 10 keys, image 0.6 on 40: densities 0.03 and 0.015, VGR 2; the second row has no image."""
    streams = {
        "attention_mass": torch.tensor([[[0.3, 0.6]], [[0.3, 0.0]]]),
        "attention_keys": torch.tensor([[10, 40], [10, 0]]),
        "response_mask": torch.ones(2, 1),
    }
    vgr, density = importance_of("vgr", streams), importance_of("vision_density", streams)
    torch.testing.assert_close(vgr[0], torch.tensor([0.5], dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(density[0], torch.tensor([0.015], dtype=torch.float64), atol=1e-9, rtol=0)
    assert vgr[1].isnan().all() and density[1].isnan().all()


@torch.no_grad()
def test_vgr_and_vision_density_are_those_of_eager_attention_row_by_row_in_float64(
    tiny_model_path: str, batch: DataProto, measured: dict[str, torch.Tensor]
) -> None:
    """The attention maps of transformers, of each row alone, and the definition: in every layer the mean over heads,
    as a share of the attention to the prompt without its first token; then the mean over layers; then densities."""
    model = AutoModelForImageTextToText.from_pretrained(
        tiny_model_path, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    processor = AutoProcessor.from_pretrained(tiny_model_path)
    special_ids = torch.tensor(list(processor.tokenizer.get_added_vocab().values()))
    vgr, density = importance_of("vgr", measured), importance_of("vision_density", measured)
    for index in range(len(batch)):
        row = batch[index]
        ids = row.batch["input_ids"][row.batch["attention_mask"].bool()]
        length = int(row.batch["response_mask"].sum())
        num_prompt = len(ids) - length
        prompt, is_image = ids[:num_prompt], ids[None] == model.config.image_token_id
        assert "system" not in processor.tokenizer.decode(prompt)
        handles = row.non_tensor_batch["multi_modal_data"]
        if not handles:
            assert vgr[index, :length].isnan().all() and density[index, :length].isnan().all()
            continue
        media = processor.image_processor([handle.load() for handle in handles], return_tensors="pt")
        inputs = dict(input_ids=ids[None], mm_token_type_ids=is_image.long(), **media)
        maps = model(**inputs, output_attentions=True).attentions
        is_vision = is_image[0, :num_prompt]
        is_text = ~torch.isin(prompt, special_ids)
        is_text[0] = False
        shares = []
        for of_heads in maps:  # (1, heads, tokens, tokens)
            attention = of_heads[0].mean(0)[num_prompt - 1 : -1, :num_prompt]  # (length, prompt)
            of_prompt = attention[:, 1:].sum(-1)
            shares.append([attention[:, which].sum(-1) / of_prompt for which in (is_text, is_vision)])
        text, vision = (sum(of_layers) / len(maps) for of_layers in zip(*shares, strict=True))
        text_density, vision_density = text / is_text.sum(), vision / is_vision.sum()
        eps = 1e-6 / (is_text.sum() + is_vision.sum())
        torch.testing.assert_close(density[index, :length], vision_density, atol=0, rtol=1e-4)
        torch.testing.assert_close(vgr[index, :length], (vision_density + eps) / text_density, atol=0, rtol=1e-4)
        assert vgr[index, :length].std() > 1e-4 or length < 2


@torch.no_grad()
def test_entropy_and_image_kl_are_those_of_the_bare_model_row_by_row_in_float64(
    tiny_model_path: str, batch: DataProto, measured: dict[str, torch.Tensor]
) -> None:
    """The other side of the KL is the same row with pictures that are spoilt before they reach the processor."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float64).eval()
    processor = AutoProcessor.from_pretrained(tiny_model_path)
    entropy, image_kl = importance_of("entropy", measured), importance_of("image_kl", measured)
    for index in range(len(batch)):
        row = batch[index]
        logits = response_logits(model, processor, row)  # (length, V)
        length = len(logits)
        torch.testing.assert_close(entropy[index, :length], Categorical(logits=logits).entropy(), atol=1e-5, rtol=1e-5)
        handles = row.non_tensor_batch["multi_modal_data"]
        if not handles:
            assert (image_kl[index] == 0).all()
            continue
        spoilt = [Image.fromarray(NOISE.degrade(np.asarray(handle.load()))) for handle in handles]
        row.non_tensor_batch["multi_modal_data"] = [MediaHandle.put(image) for image in spoilt]
        log_p, log_q = logits.log_softmax(-1), response_logits(model, processor, row).log_softmax(-1)
        ratio = torch.where(log_p.isfinite(), log_p - log_q, 0)
        expected = (log_p.exp() * ratio).sum(-1)
        assert expected.min() > 1e-6
        torch.testing.assert_close(image_kl[index, :length], expected, atol=1e-6, rtol=1e-3)


@torch.no_grad()
def test_hidden_cosine_is_that_of_the_bare_models_last_states_in_float64(
    tiny_model_path: str, batch: DataProto, measured: dict[str, torch.Tensor]
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float64).eval()
    processor = AutoProcessor.from_pretrained(tiny_model_path)
    importance = importance_of("hidden_cosine", measured)
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for index in range(len(batch)):
            row = batch[index]
            length = len(response_logits(model, processor, row))
            states = seen.pop()[0]  # (tokens, H)
            ids = row.batch["input_ids"][row.batch["attention_mask"].bool()]
            is_image = ids == model.config.image_token_id
            if not is_image.any():
                assert importance[index, :length].isnan().all()
                continue
            own, image = states[-length - 1 : -1], states[is_image].mean(0)
            cosine = (own @ image) / (own.norm(dim=-1) * image.norm())
            torch.testing.assert_close(importance[index, :length], (1 + cosine) / 2, atol=1e-5, rtol=0)
    finally:
        hook.remove()


def test_rows_without_an_image_weigh_one_by_every_signal_that_looks_for_one(
    batch: DataProto, measured: dict[str, torch.Tensor]
) -> None:
    is_response = batch.batch["response_mask"].bool()
    for name in ("vgr", "vision_density", "image_kl", "hidden_cosine", "uniform"):
        weights = weights_from_importance(importance_of(name, measured), is_response)
        assert (weights[4:][is_response[4:]] == 1).all(), name
        assert (weights[~is_response] == 0).all()
        assert (weights[:4][is_response[:4]] != 1).any() == (name != "uniform"), name
    weights = weights_from_importance(importance_of("entropy", measured), is_response)
    assert (weights[4:][is_response[4:]] != 1).any()


def test_image_kl_without_an_image_is_zero_even_where_two_passes_differ(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """On a GPU, and with experts that other rows share, the same row need not come out twice with the same bits."""
    worker = start(tiny_model_path)
    embedding = worker.actor.forward.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, states: states + 0.01 * torch.randn_like(states))
    try:
        image_kl = worker.measured(batch.select(None, ["multi_modal_data", "uid"]), ["image_kl"]).batch["image_kl"]
    finally:
        hook.remove()
    assert (image_kl[:4].abs().amax(1) > 0).all() and (image_kl[4:] == 0).all()


@pytest.mark.parametrize("noise", ["blank", "gaussian"])
def test_the_noise_of_the_configuration_spoils_the_images(
    noise: str, tiny_model_path: str, batch: DataProto, measured: dict[str, torch.Tensor]
) -> None:
    other = streams_of(start(tiny_model_path, f"algorithm.token_weight_image_noise={noise}"), batch)
    assert ((other["image_kl"] - measured["image_kl"])[:4].abs().amax(1) > 1e-6).all()
    assert torch.equal(other["old_log_probs"], measured["old_log_probs"])


# ---- independent of layout, micro-batches and ranks ----


def test_streams_do_not_depend_on_padding_micro_batches_order_or_ranks(
    tiny_model_path: str, batch: DataProto, measured: dict[str, torch.Tensor], ray_cluster
) -> None:
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    one_by_one = "worker.actor.micro_batch_size_per_device_for_experience=1"
    padded = start(tiny_model_path, "worker.actor.padding_free=false", "worker.actor.dynamic_batching=false")
    small = "worker.actor.micro_batch_size_per_device_for_update=2"
    two = start_two(make_config(tiny_model_path, COLLECT, LOG_ALL, small))
    sharing = start_two(make_config(tiny_model_path, COLLECT, LOG_ALL, small, "worker.actor.ulysses_size=2"))
    try:
        results = [
            (streams_of(padded, batch), slice(None)),
            (streams_of(start(tiny_model_path, one_by_one), batch[order]), order),
            (streams_of(two, batch), slice(None)),
            (streams_of(sharing, batch), slice(None)),
        ]
    finally:
        two.release()
        sharing.release()
    for streams, rows in results:
        for name in MEASURED_STREAMS:
            expected = measured[name][rows]
            torch.testing.assert_close(streams[name], expected, atol=1e-5, rtol=1e-4, equal_nan=True, msg=name)


# ---- from importance to weights ----


def shaped(importance: list[float], **options) -> list[float]:
    """Of one response without padding."""
    given = torch.tensor([importance], dtype=torch.float64)
    return weights_from_importance(given, torch.ones(1, len(importance)), **options)[0].tolist()


def test_the_top_share_weighs_one_and_the_rest_nothing_or_all_of_the_mean() -> None:
    """Of five tokens 0.4 are two; the third has no importance and takes no part, so that 0.4 of four are two too."""
    assert shaped([5, 1, 9, 2, 3], top_share=0.4) == [1, 0, 1, 0, 0]
    assert shaped([5, 1, math.nan, 2, 5], top_share=0.4) == [1, 0, 1, 0, 1]
    assert shaped([5, 1, 9, 2, 3], top_share=0.4, conserve_mean=True) == [2.5, 0, 2.5, 0, 0]
    assert shaped([2, 2, 2, 2], top_share=0.5) == [1, 1, 0, 0]
    assert shaped(list(range(30)), top_share=0.1) == [0] * 27 + [1] * 3
    assert shaped([0.0, 0.0], top_share=0.5) == [1, 1]
    assert shaped([3.0, 1.0], top_share=1.0) == [1, 1]


def test_the_conserved_mean_by_hand() -> None:
    """Of 1, 1, 1, 17 the mean is 5: weights 0.2, 0.2, 0.2, 3 after clipping, of mean 0.9. Three tokens then share 1 of
    the sum of 4, a third each, at c = 5/3."""
    assert shaped([1, 1, 1, 17]) == pytest.approx([0.2, 0.2, 0.2, 3.0])
    assert shaped([1, 1, 1, 17], conserve_mean=True) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 3.0], abs=1e-6)


def test_the_conserved_mean_is_one_and_keeps_the_order_however_the_importance_spreads() -> None:
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 1.0, 3.0):
        importance = (spread * torch.randn(50, 40, generator=generator)).exp()
        lengths = torch.randint(4, 41, (50, 1), generator=generator)
        mask = torch.arange(40) < lengths
        weights = weights_from_importance(importance, mask, conserve_mean=True)
        means = weights.sum(1) / lengths[:, 0]
        torch.testing.assert_close(means, torch.ones(50), atol=1e-5, rtol=0)
        assert weights[mask].min() >= 0.2 and weights.max() <= 3.0 + 1e-6
        order = torch.where(mask, importance, -1).argsort(1)
        in_order = weights.gather(1, order)
        assert (in_order.diff(dim=1) >= -1e-6).all()


@pytest.mark.parametrize(
    ("importance", "options", "message"),
    [
        ([1.0, -2.0], {}, "token 1 of response 0 has importance -2.0, not between 0 and 1e100"),
        ([1e308, 1.0], {}, "token 0 of response 0 has importance 1e.308, not between 0 and 1e100"),
        ([1.0], {"top_share": 0.0}, "top_share=0.0 is not above 0"),
        ([1.0], {"top_share": 1.5}, "top_share=1.5 is not above 0"),
    ],
)
def test_what_cannot_be_importance_is_refused(importance: list[float], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shaped(importance, **options)


RESPONSES = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 11], [3, 4, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
IMPORTANCE = torch.tensor([[1.0, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1], [1.0, 3, 9, 9, 9, 9]], dtype=torch.float64)


def weigh(step: int = 1, lists: list | None = None, rows=slice(None), **algorithm) -> torch.Tensor:
    given = None if lists is None else [lists[row] for row in range(len(MASK))[rows]] if rows != slice(None) else lists
    return compute_token_weights(
        IMPORTANCE[rows], given, RESPONSES[rows], MASK[rows], AlgorithmConfig(**algorithm), step
    )


@pytest.mark.parametrize(
    ("key", "value"), [("clip", [0.5, 1.5]), ("smooth_sigma", 1.0), ("conserve_mean", True), ("top_share", 0.4)]
)
def test_each_key_of_the_configuration_shapes_the_weights(key: str, value) -> None:
    option = {"clip": "clip_range"}.get(key, key)
    algorithm = {"token_weight_clip": [0.2, 1.2], f"token_weight_{key}": value}
    options = {"clip_range": [0.2, 1.2], option: value}
    assert torch.equal(weigh(**algorithm), weights_from_importance(IMPORTANCE, MASK, **options))
    assert not torch.equal(weigh(**algorithm), weigh(token_weight_clip=[0.2, 1.2]))


def test_weights_warm_up_from_one() -> None:
    final = weigh()
    assert torch.equal(weigh(1, token_weight_warmup_steps=4), MASK.float())
    torch.testing.assert_close(weigh(3, token_weight_warmup_steps=4), 1 * MASK + 0.5 * (final - MASK))
    assert torch.equal(weigh(5, token_weight_warmup_steps=4), final)
    given = weigh(1, [[9.0], None, None], token_weight_warmup_steps=4)
    assert given[0, 0] == 9.0 and (given[1] == 1).all()


def test_shuffled_weights_are_the_same_numbers_on_other_tokens_of_their_response() -> None:
    final, shuffled = weigh(), weigh(token_weight_control="shuffled")
    assert torch.equal(final.sort(1).values, shuffled.sort(1).values)
    assert not torch.equal(final[:2], shuffled[:2])
    assert (shuffled[MASK == 0] == 0).all()
    given = weigh(lists=[None, None, [7.0, 8.0]], token_weight_control="shuffled")
    assert sorted(given[2, :2].tolist()) == [7.0, 8.0]


@pytest.mark.parametrize("control", ["shuffled", "random"])
def test_a_control_is_drawn_anew_in_each_step_and_knows_rows_by_their_tokens(control: str) -> None:
    """So that a resumed run, other ranks and other orders of rows draw the same."""
    first = weigh(1, token_weight_control=control)
    assert torch.equal(first, weigh(1, token_weight_control=control))
    assert not torch.equal(first, weigh(2, token_weight_control=control))
    for row in range(3):
        assert torch.equal(weigh(1, rows=slice(row, row + 1), token_weight_control=control)[0], first[row])
    assert not torch.equal(first[0], first[1].flip(0))


def test_inverse_weights_have_the_reciprocal_importance_and_are_shaped_alike() -> None:
    """1/1 and 1/3 have mean 2/3: weights 1.5 and 0.5. Given weights of 2 and 4 become 4 and 2, of mean 3 as before."""
    inverse = weigh(token_weight_control="inverse")
    torch.testing.assert_close(inverse[2, :2], torch.tensor([1.5, 0.5]))
    assert (inverse[0].diff() < 0).all()
    given = weigh(lists=[None, None, [2.0, 4.0]], token_weight_control="inverse")
    torch.testing.assert_close(given[2, :2], torch.tensor([4.0, 2.0]))
    assert torch.equal(given[:2], inverse[:2])


def test_the_reciprocal_of_next_to_nothing_does_not_outweigh_the_rest() -> None:
    """0 counts as a hundredth of the largest, 4: 25 beside 0.25 and 0.5. What is undefined stays so and weighs 1."""
    importance = torch.tensor([[4.0, 2.0, 0.0, math.nan, math.inf]], dtype=torch.float64)
    config = AlgorithmConfig(token_weight_control="inverse", token_weight_clip=(0.0, 100.0))
    weights = compute_token_weights(importance, None, torch.ones(1, 5), torch.ones(1, 5), config, 1)
    mean = (0.25 + 0.5 + 25) / 3
    torch.testing.assert_close(weights, torch.tensor([[0.25 / mean, 0.5 / mean, 25 / mean, 1.0, 1.0]]))


@pytest.mark.parametrize("length", [2, 3, 12, 400])
@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_random_weights_have_the_mean_and_the_variance_of_each_response(length: int, spread: float) -> None:
    """Also where clipping has left the mean other than one, and of a few tokens."""
    generator = torch.Generator().manual_seed(length)
    importance = (spread * torch.randn(20, length, generator=generator, dtype=torch.float64)).exp()
    responses, mask = torch.randint(0, 1000, (20, length), generator=generator), torch.ones(20, length)
    real, drawn = (
        compute_token_weights(
            importance, None, responses, mask, AlgorithmConfig(token_weight_control=control), 1
        ).double()
        for control in ("none", "random")
    )
    torch.testing.assert_close(drawn.mean(1), real.mean(1), atol=1e-6, rtol=0)
    deviations = [weights.std(1, correction=0) for weights in (drawn, real)]
    torch.testing.assert_close(*deviations, atol=1e-6, rtol=1e-5)
    assert (drawn >= 0).all() and not torch.equal(drawn, real)


def test_random_weights_for_weights_that_lie_on_one_token_alone_do_too() -> None:
    lists = [[0.0, 5.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]]
    responses, mask = torch.arange(8).view(2, 4), torch.ones(2, 4)
    config = AlgorithmConfig(token_weight_control="random")
    drawn = compute_token_weights(None, lists, responses, mask, config, 1)
    torch.testing.assert_close(drawn.sort(1).values, torch.tensor([[0.0, 0, 0, 5], [0.0, 0, 0, 3]]), atol=1e-5, rtol=0)


def test_random_weights_know_nothing_of_the_real_ones() -> None:
    """Over 400 responses of 100 tokens; each response has its own."""
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(400, 100, generator=generator, dtype=torch.float64) + 0.05
    responses = torch.randint(0, 1000, (400, 100), generator=generator)
    mask = torch.ones(400, 100)
    real, drawn = (
        compute_token_weights(importance, None, responses, mask, AlgorithmConfig(token_weight_control=control), 1)
        for control in ("none", "random")
    )
    assert (drawn > 0).all()
    correlation = torch.corrcoef(torch.stack([real.flatten(), drawn.flatten()]))[0, 1]
    assert abs(correlation) < 0.02
    constant = compute_token_weights(
        mask.double(), None, responses, mask, AlgorithmConfig(token_weight_control="random"), 1
    )
    assert (constant == 1).all()


# ---- signals of one's own ----


def test_a_signal_in_a_file_is_found_by_the_names_of_its_arguments(measured: dict[str, torch.Tensor]) -> None:
    signal = find_signal(f"{ROOT}/tests/signals.py:surprise")
    assert (signal.name, signal.streams, signal.needs_attention) == (
        "surprise",
        ("old_log_probs", "rollout_log_probs"),
        False,
    )
    expected = -0.5 * (measured["old_log_probs"] + measured["rollout_log_probs"])
    torch.testing.assert_close(signal.importance(measured), expected.double())


def test_a_signal_that_asks_for_the_unknown_or_returns_another_shape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("def a(entropi):\n    return entropi\ndef b(entropy):\n    return entropy[:, :1]\n")
    with pytest.raises(ValueError, match="s.py:a asks for entropi; it may ask for entropy, image_kl"):
        find_signal(f"{tmp_path}/s.py:a")
    streams = {"entropy": torch.ones(2, 3), "response_mask": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"the token signal b returned \(2, 1\); it must return a tensor \(2, 3\)"):
        find_signal(f"{tmp_path}/s.py:b").importance(streams)
    (tmp_path / "t.py").write_text("def b(entropy):\n    return entropy\n")
    both = [f"{tmp_path}/s.py:b", f"{tmp_path}/t.py:b"]
    with pytest.raises(ValueError, match="two token signals are named b"):
        signals_of(AlgorithmConfig(token_signals_to_log=both))
    (tmp_path / "u.py").write_text(
        "import numpy as np\nf = np.exp\ndef g(entropy, /):\n    return entropy\n"
        "def h(entropy):\n    return -entropy\ndef k(entropy):\n    raise KeyError('oops')\n"
    )
    for name, message in (("f", "does not say what its arguments are"), ("g", "takes arguments by position")):
        with pytest.raises(ValueError, match=f"u.py:{name} {message}"):
            find_signal(f"{tmp_path}/u.py:{name}")
    with pytest.raises(ValueError, match="h gives token 0 of response 0 the importance -1; it must be 0 or above"):
        find_signal(f"{tmp_path}/u.py:h").importance(streams)
    with pytest.raises(RuntimeError, match="the token signal k raised KeyError: 'oops'"):
        find_signal(f"{tmp_path}/u.py:k").importance(streams)


def test_a_signal_that_writes_into_what_it_is_given_changes_nothing_and_runs_once_a_step(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text(
        "calls = []\ndef spoiler(old_log_probs):\n    calls.append(1)\n    return old_log_probs.neg_() + len(calls)\n"
    )
    name = f"{tmp_path}/s.py:spoiler"
    config = load_config(
        [
            "algorithm.enable_token_weights=true",
            f"algorithm.token_weight_signal={name}",
            LOG_ALL.replace("vgr,vision_density,", ""),
        ]
    )
    weigher = TokenWeigher(config, None)
    log_probs = -torch.rand(3, 6)
    streams = {"old_log_probs": log_probs.clone(), "response_mask": MASK, "responses": RESPONSES}
    streams |= dict.fromkeys(("entropy", "image_kl", "hidden_cosine"), torch.rand(3, 6))
    batch = DataProto.from_dict(streams)
    for step in (1, 2):
        batch.batch["token_weights"] = weigher.weights(batch, {}, step)
        expected = weights_from_importance(-log_probs + step, MASK)
        torch.testing.assert_close(batch.batch["token_weights"], expected)
        mean = (step - log_probs)[MASK.bool()].mean().item()
        assert weigher.metrics(batch)["signals/spoiler/mean"] == pytest.approx(mean, rel=1e-5)
    assert torch.equal(batch.batch["old_log_probs"], log_probs)


# ---- the configuration ----


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("algorithm.token_weight_signal=vrg", "algorithm.token_weight_signal=vrg is not one of vgr, .* mean vgr"),
        ("algorithm.token_signals_to_log=[entropie]", "entropie is not one of vgr, .*; did you mean entropy"),
        ("algorithm.token_signals_to_log=[vgr]", "token_signals_to_log has vgr, which needs worker.rollout.collect"),
        (f"algorithm.token_signals_to_log=[{ROOT}/tests/no.py:f]", "token_signals_to_log=.* names no file"),
        (
            f"algorithm.token_signals_to_log=[{ATTENDS}]",
            "to_log has .*:attends, which needs worker.rollout.collect",
        ),
        (f"algorithm.token_weight_signal={ATTENDS}", "signal=.*:attends needs worker.rollout.collect"),
        (
            "algorithm.token_weight_control=random",
            "random draws log-normal numbers for token_weight_top_share",
        ),
    ],
)
def test_signals_that_a_run_cannot_have_are_refused_before_it_starts(
    argument: str, message: str, tiny_model_path: str, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text("{}")
    files = [f"data.train_files={tmp_path}/d.jsonl", f"data.val_files={tmp_path}/d.jsonl"]
    reward = f"worker.reward.reward_function={ROOT}/tests/rewards.py:compute_score"
    sizes = ["trainer.n_gpus_per_node=1", "worker.rollout.n=8", "worker.rollout.name=hf", "trainer.logger=[file]"]
    model = f"worker.actor.model.model_path={tiny_model_path}"
    on = ["algorithm.enable_token_weights=true", "algorithm.token_weight_top_share=0.4"]
    prepare(load_config([*files, reward, model, *sizes, *on]))
    with pytest.raises(ValueError, match=message):
        prepare(load_config([*files, reward, model, *sizes, *on, argument]))


def test_layers_are_chosen_in_every_form() -> None:
    full = [1, 3, 5, 7, 9, 11, 13]
    for choice, expected in (
        ("all", full),
        ("last:2", [11, 13]),
        ("last:99", full),
        ("middle", [5, 7, 9]),
        ((3, 13), [3, 13]),
        (None, full),
        (1, [13]),
    ):
        assert choose_layers(full, choice) == expected
    assert choose_layers([4], "middle") == [4]
    with pytest.raises(ValueError, match=r"token_weight_layers=\[2, 3\]: \[2\] are no full-attention layers"):
        choose_layers(full, (2, 3))


def test_layers_in_the_configuration() -> None:
    for given, expected in (
        (None, "all"),
        ("middle", "middle"),
        ("last:3", "last:3"),
        ([7, 2, 2], (2, 7)),
    ):
        assert AlgorithmConfig(token_weight_layers=given).attention_layers == expected
    assert AlgorithmConfig(token_weight_last_k_layers=2).attention_layers == "last:2"
    assert load_config(["algorithm.token_weight_layers=[1,2]"]).algorithm.attention_layers == (1, 2)
    for wrong in ("last:0", "first", [], [-1], ["2"], 3):
        with pytest.raises(ValueError, match="token_weight_layers=.* is not"):
            AlgorithmConfig(token_weight_layers=wrong)
    config = PretrainedConfig(num_hidden_layers=2)
    require_layers(config, (0, 1))
    with pytest.raises(ValueError, match=r"\[99\] are no full-attention layers of this model, which has \[0, 1\]"):
        require_layers(config, (1, 99))
    with pytest.raises(ValueError, match="is given beside token_weight_last_k_layers=2; use one of them"):
        AlgorithmConfig(token_weight_layers="all", token_weight_last_k_layers=2)


def test_the_layers_of_the_configuration_are_measured(
    tiny_model_path: str, batch: DataProto, measured: dict[str, torch.Tensor], lone_process_group
) -> None:
    """The mass over both layers of the tiny model is the mean of the masses of each."""
    masses = [
        streams_of(start(tiny_model_path, f"algorithm.token_weight_layers={layers}"), batch)["attention_mass"]
        for layers in ("[0]", "last:1")
    ]
    assert (masses[0] - masses[1]).abs().max() > 1e-3
    torch.testing.assert_close((masses[0] + masses[1]) / 2, measured["attention_mass"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_documents_list_the_signals_that_there_are(language: str) -> None:
    first_cells = [re.findall(r"^\| (.*?) \|", table, re.M)[1:] for table in tables_of(language)]
    (signals,) = (cells for cells in first_cells if "`path.py:function`" in cells)
    assert signals == [*(f"`{name}`" for name in TOKEN_SIGNALS), "`path.py:function`"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_documents_tell_the_cost_of_every_signal_as_the_benchmark_has_them(language: str) -> None:
    (costs,) = (table for table in tables_of(language) if "T=512" in table)
    rows = [re.findall(r"`(\w+)`", row) for row in costs.splitlines()[2:]]
    passes = [re.findall(r"`(\w+)`", label) for label in passes_of_signals()]
    assert sorted(name for names in passes for name in names) == sorted(TOKEN_SIGNALS)
    assert [names for names, _ in groupby(rows)] == [*passes, []]


@torch.no_grad()
def test_every_pass_of_the_benchmark_runs() -> None:
    device = torch.device("cpu")
    for run in variants_of(build_model("small", device), build_rows(64, 16), device).values():
        run()


def test_the_controls_of_the_configuration_are_those_that_there_are_and_another_is_an_error() -> None:
    assert get_args(get_type_hints(AlgorithmConfig)["token_weight_control"]) == tuple(CONTROLS)
    with pytest.raises(
        ValueError, match="token_weight_control=reversed is not one of none, shuffled, inverse, random"
    ):
        AlgorithmConfig(token_weight_control="reversed")
    config = AlgorithmConfig()
    object.__setattr__(config, "token_weight_control", "reversed")  # as where a choice is added to the keys alone
    with pytest.raises(KeyError, match="reversed"):
        compute_token_weights(IMPORTANCE, None, RESPONSES, MASK, config, 1)


# ---- what is logged ----


def test_signal_metrics_by_hand() -> None:
    """Ranks of a: 1 2 3 4 and 1 2; of b: 1 3 2 4, of correlation 1 - 6 * 2 / (4 * 15) = 0.8, and 2 1, of -1."""
    nan = math.nan
    importance = {
        "a": torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 9.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]),
        "b": torch.tensor([[0.1, 0.3, 0.2, 0.9], [0.8, 0.7, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]]),
        "none": torch.full((3, 4), nan),
    }
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    metrics = compute_signal_metrics(importance, mask)
    assert metrics["signals/a/mean"] == pytest.approx(2.8)
    assert metrics["signals/spearman/a_b"] == pytest.approx((0.8 - 1) / 2)
    names = {f"signals/{name}/{part}" for name in "ab" for part in ("mean", "std", "p10", "p90")}
    assert set(metrics) == {*names, "signals/spearman/a_b"}
    numbers = np.array([1, 2, 3, 4, 5, 9, 1, 1, 1, 1], dtype=float)
    assert metrics["signals/a/std"] == pytest.approx(numbers.std())
    assert metrics["signals/a/p90"] == pytest.approx(np.quantile(numbers, 0.9))


def test_token_kinds_and_the_shares_of_weight_on_them(tiny_model_path: str) -> None:
    tokenizer = AutoProcessor.from_pretrained(tiny_model_path).tokenizer
    texts = {"7": TokenKind.DIGIT, "a": TokenKind.WORD, "<": TokenKind.MARKUP, " ": TokenKind.MARKUP}
    ids = [tokenizer.encode(text, add_special_tokens=False)[0] for text in texts] + [tokenizer.eos_token_id]
    kinds = TokenKinds(tokenizer)
    assert kinds.classify(torch.tensor(ids)).tolist() == [*texts.values(), TokenKind.MARKUP]
    batch = DataProto.from_dict(
        {
            "responses": torch.tensor([ids]),
            "response_mask": torch.tensor([[1, 1, 1, 0, 1]]),
            "token_weights": torch.tensor([[3.0, 0.5, 0.3, 9.0, 0.2]]),
        }
    )
    metrics = compute_token_weight_metrics(batch, (0.2, 3.0), kinds)
    shares = {"digit": (0.75, 0.25), "word": (0.125, 0.25), "markup": (0.125, 0.5)}
    for name, (share, tokens) in shares.items():
        assert metrics[f"token_weights/{name}_share"] == pytest.approx(share)
        assert metrics[f"token_weights/{name}_tokens"] == pytest.approx(tokens)
    assert metrics["token_weights/top10_share"] == pytest.approx(0.75)


# ---- noise ----


def test_noise_spoils_what_it_says_and_the_same_picture_alike() -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (70, 100, 3), dtype=np.uint8)
    frames = np.stack([pixels, pixels[::-1]])
    for kind in ("blank", "patches", "gaussian"):
        noise = ImageNoise(kind, 0.4)
        spoilt = noise.degrade(pixels)
        assert (spoilt.shape, spoilt.dtype) == (pixels.shape, np.uint8)
        assert np.array_equal(spoilt, noise.degrade(pixels.copy()))
        assert noise.degrade(frames).shape == frames.shape
    assert not ImageNoise("blank", 0.4).degrade(pixels).any()

    spoilt = ImageNoise("patches", 0.4).degrade(pixels)
    is_black = (spoilt == 0).all(-1)
    assert (spoilt[~is_black] == pixels[~is_black]).all()
    squares = [is_black[y : y + 14, x : x + 14] for y in range(0, 70, 14) for x in range(0, 100, 14)]
    assert {square.all() or not square.any() for square in squares} == {True}
    assert sum(square.all() for square in squares) == round(0.4 * 40)

    grey = np.full((200, 200, 3), 128, dtype=np.uint8)
    noisy = ImageNoise("gaussian", 0.04).degrade(grey) / 127.5 - 1
    assert noisy.std() == pytest.approx(0.2, rel=0.02)
    assert (ImageNoise("gaussian", 0.0).degrade(pixels) == pixels).all()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "token weights off: all tokens weigh the same"),
        (
            {"enable_token_weights": True},
            "token weights on: vgr, all layers, clip 0.2 to 3; weights from the reward function take precedence",
        ),
        (
            {"enable_token_weights": True, "token_weight_layers": "last:2", "token_weight_control": "shuffled"},
            "token weights on: vgr, layers last:2, clip 0.2 to 3, control shuffled;",
        ),
        (
            {"enable_token_weights": True, "token_weight_signal": "entropy", "token_weight_top_share": 0.25},
            "token weights on: entropy, the top 25% of a response's tokens;",
        ),
    ],
)
def test_a_run_says_in_a_line_how_tokens_are_weighted(settings: dict, told: str) -> None:
    assert describe_token_weights(AlgorithmConfig(**settings), is_measured=True).startswith(told)


def test_weights_without_attention_are_said_to_be_the_reward_functions_alone() -> None:
    told = describe_token_weights(AlgorithmConfig(enable_token_weights=True), is_measured=False)
    assert told == "token weights on: only from the reward function; all other tokens weigh 1"
    weighted = ["algorithm.use_kl_loss=true", "algorithm.enable_token_weights=true"]
    (note,) = effect_notes(load_config(weighted))
    assert "weights tokens only by what the reward function returns" in note
    assert effect_notes(load_config([*weighted, "worker.rollout.collect_attentions=true"])) == []
