# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_attention_token_weights.py
"""Weights are what the definition says, for a real model's answers too, and nothing but the attention changes them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.batches import random_image
from verl.algorithms.token_weights import compute_token_weights, inverse_vgr
from verl.trainer.config import AlgorithmConfig
from verl.utils.attention_metrics import (
    KeyVocabulary,
    compute_attention_metrics_for_batch,
    count_keys,
    mass_from_attentions,
    vgr_from_mass,
)
from verl.utils.attention_token_weights import (
    align_token_weights,
    build_token_vgr_weights_for_batch,
    token_weights_from_lists,
    token_weights_from_vgr,
)

UNCLIPPED = (0.0, math.inf)


def choose(
    lists: list | None,
    mass: torch.Tensor | None,
    keys: torch.Tensor | None,
    mask: torch.Tensor,
    clip_range: tuple[float, float],
    smooth_sigma: float,
) -> torch.Tensor | None:
    """What the trainer makes of VGR and of the reward function's lists."""
    clip_range = (clip_range[0], min(clip_range[1], 1e30))  # the configuration takes no infinity
    algorithm = AlgorithmConfig(token_weight_clip=clip_range, token_weight_smooth_sigma=smooth_sigma)
    importance = None if mass is None else inverse_vgr(mass, keys)
    return compute_token_weights(importance, lists, None, mask, algorithm, step=1)


def weights_of(vgr: list[float], **options) -> list[float]:
    """Of one response without padding."""
    return token_weights_from_vgr(torch.tensor([vgr]), torch.ones(1, len(vgr)), **options)[0].tolist()


# ---- from VGR ----


def test_weights_by_hand():
    """1 / VGR is 1, 0.25 and 4, of mean 1.75: 0.571428, 0.142857 and 2.285714; the second is clipped."""
    weights = token_weights_from_vgr(torch.tensor([[1.0, 4.0, 0.25]]), torch.ones(1, 3))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor([[0.571428571, 0.2, 2.285714286]]))


def test_smoothing_by_hand():
    """1 / VGR is 1, 2 and 4; a gaussian of width one gives a neighbour 0.606531 and the one after it 0.135335.

    (1 + 1.213061 + 0.541341) / 1.741866 = 1.581294, (0.606531 + 2 + 2.426123) / 2.213061 = 2.274070 and
    (0.135335 + 1.213061 + 4) / 1.741866 = 3.070498, of mean 2.308621.
    """
    expected = [0.684952, 0.985034, 1.330014]
    assert weights_of([1.0, 0.5, 0.25], smooth_sigma=1.0) == pytest.approx(expected, abs=2e-6)


def test_a_narrow_gaussian_still_reaches_one_neighbour_on_each_side():
    """Width 0.3: three times that is less than a token. exp(-1 / 0.18) = 0.003866 of a neighbour counts, so that 1, 1,
    1, 2, 1 becomes 1, 1, 1.011598 / 1.007732 = 1.003836, 2.007732 / 1.007732 = 1.992328, 1.007732 / 1.003866 =
    1.003851, of mean 1.200003."""
    expected = [0.833331, 0.833331, 0.836528, 1.660269, 0.836540]
    assert weights_of([1.0, 1.0, 1.0, 0.5, 1.0], smooth_sigma=0.3) == pytest.approx(expected, abs=2e-6)


def by_definition(vgr: list[float], clip_range: tuple[float, float] = (0.2, 3.0), sigma: float = 0.0) -> list[float]:
    """DESIGN's items four and five for the tokens of one response, in double precision and one at a time."""
    places = [place for place, value in enumerate(vgr) if math.isfinite(value)]
    raw = {place: 1 / (vgr[place] + 1e-12) for place in places}
    if sigma > 0:
        half = max(1, math.floor(3 * sigma))
        smooth = {}
        for place in places:
            near = {other: math.exp(-((other - place) ** 2) / (2 * sigma**2)) for other in places}
            near = {other: value for other, value in near.items() if abs(other - place) <= half}
            smooth[place] = sum(raw[other] * value for other, value in near.items()) / sum(near.values())
        raw = smooth
    mean = sum(raw.values()) / max(len(raw), 1)
    low, high = clip_range
    return [min(max(raw[place] / mean, low), high) if place in raw else 1.0 for place in range(len(vgr))]


def draw_vgr(rows: int = 12, length: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """VGR (N, R) over some orders of magnitude, one in ten of them undefined, and masks of 0 to R tokens."""
    generator = torch.Generator().manual_seed(0)
    vgr = torch.randn(rows, length, generator=generator).mul(1.5).exp()
    vgr[torch.rand(rows, length, generator=generator) < 0.05] = torch.nan
    vgr[torch.rand(rows, length, generator=generator) < 0.05] = torch.inf
    lengths = torch.tensor([0, 1, 2, 3, length, *torch.randint(4, length, (rows - 5,), generator=generator)])
    return vgr, (torch.arange(length) < lengths[:, None]).long()


@pytest.mark.parametrize("clip_range", [(0.2, 3.0), UNCLIPPED, (1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.3, 0.5, 1.0, 2.5, 10.0, 1e6])
def test_weights_are_those_of_the_definition(sigma, clip_range):
    vgr, mask = draw_vgr()
    weights = token_weights_from_vgr(vgr, mask, clip_range, sigma)
    for row, length in enumerate(mask.sum(1).tolist()):
        expected = by_definition(vgr[row, :length].double().tolist(), clip_range, sigma)
        assert weights[row, :length].tolist() == pytest.approx(expected, rel=2e-7)
        assert not weights[row, length:].any()


def test_a_responses_weights_have_mean_one_before_they_are_clipped():
    """Over the tokens that have a VGR; the others weigh one, so that they do not move it."""
    vgr, mask = draw_vgr()
    for sigma in (0.0, 2.0):
        weights = token_weights_from_vgr(vgr, mask, UNCLIPPED, sigma)
        means = weights.double().sum(1)[1:] / mask.sum(1)[1:]
        torch.testing.assert_close(means, torch.ones_like(means), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sigma", [0.0, 0.4, 3.0])
def test_equal_vgr_weighs_exactly_one(sigma):
    """Whatever the value and however many there are, though sums of equal numbers are rounded."""
    generator = torch.Generator().manual_seed(0)
    for length in (*range(1, 30), 997):
        vgr = torch.rand(20, 1, generator=generator).mul(12).sub(6).exp().expand(20, length)
        for clip_range in ((0.2, 3.0), (1.0, 1.0)):
            weights = token_weights_from_vgr(vgr, torch.ones(20, length), clip_range, sigma)
            assert torch.equal(weights, torch.ones(20, length))


@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("vgr", [0.0, 1e-8, 3.0, 1e30, math.nan, math.inf, -math.inf])
def test_a_single_token_weighs_exactly_one(vgr, sigma):
    assert weights_of([vgr], smooth_sigma=sigma) == [1.0]


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_tokens_without_vgr_weigh_one_and_change_no_other(sigma):
    """Between two others they leave a gap, which smoothing sees; at the end nothing sees them."""
    rest = weights_of([2.0, 0.5, 1.0], smooth_sigma=sigma)
    for undefined in (math.nan, math.inf, -math.inf):
        assert weights_of([2.0, 0.5, 1.0, undefined, undefined], smooth_sigma=sigma) == [*rest, 1.0, 1.0]
        assert weights_of([undefined, 2.0, 0.5, 1.0], smooth_sigma=sigma) == [1.0, *rest]
    assert weights_of([math.nan, math.inf], smooth_sigma=sigma) == [1.0, 1.0]


def test_smoothing_keeps_distances_across_a_gap():
    """Two tokens apart in the response, so 0.135335 of each reaches the other with a width of one."""
    share = math.exp(-2)
    raw = [(1 + 4 * share) / (1 + share), (4 + share) / (1 + share)]
    expected = [raw[0] / (sum(raw) / 2), 1.0, raw[1] / (sum(raw) / 2)]
    weights = weights_of([1.0, math.nan, 0.25], smooth_sigma=1.0)
    assert weights == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_nothing_outside_a_response_reaches_it(sigma):
    vgr, mask = draw_vgr()
    expected = token_weights_from_vgr(vgr, mask, smooth_sigma=sigma)
    for outside in (1e-6, 0.0, 1e6, math.nan, math.inf):
        filled = torch.where(mask.bool(), vgr, outside)
        assert torch.equal(token_weights_from_vgr(filled, mask, smooth_sigma=sigma), expected)


@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_the_order_of_rows_and_the_length_of_the_padding_do_not_matter(sigma):
    vgr, mask = draw_vgr()
    expected = token_weights_from_vgr(vgr, mask, smooth_sigma=sigma)
    assert torch.equal(token_weights_from_vgr(vgr.flip(0), mask.flip(0), smooth_sigma=sigma), expected.flip(0))
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = token_weights_from_vgr(vgr[row : row + 1, :length], mask[row : row + 1, :length], smooth_sigma=sigma)
        assert torch.equal(alone, expected[row : row + 1, :length])
    longer = [torch.nn.functional.pad(tensor, (0, 100)) for tensor in (vgr, mask)]
    assert torch.equal(token_weights_from_vgr(*longer, smooth_sigma=sigma)[:, :40], expected)


def test_the_more_a_token_looks_at_images_the_more_it_weighs():
    vgr, mask = draw_vgr()
    weights = token_weights_from_vgr(vgr, mask, UNCLIPPED)[4]
    defined = vgr[4].isfinite()
    assert torch.equal(weights[defined].argsort(), vgr[4][defined].argsort(descending=True))


def test_a_vgr_of_zero_has_the_highest_weight_and_no_infinite_one():
    """1 / VGR is 1e12 and three times 1, of mean 2.5e11; two zeros are equal, and weigh one where they are alone."""
    assert weights_of([0.0, 1.0, 1.0, 1.0], clip_range=UNCLIPPED) == pytest.approx([4.0, 4e-12, 4e-12, 4e-12])
    assert weights_of([0.0, 1.0, 1.0, 1.0]) == pytest.approx([3.0, 0.2, 0.2, 0.2])
    assert weights_of([0.0, 0.0]) == [1.0, 1.0]


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_a_batch_without_tokens_has_no_weights(sigma, shape):
    weights = token_weights_from_vgr(torch.zeros(shape), torch.ones(shape), smooth_sigma=sigma)
    assert (weights.shape, weights.dtype) == (shape, torch.float32)


@pytest.mark.parametrize("clip_range", [(3.0, 0.2), (0.2, 0.9), (1.1, 3.0), (-1.0, 3.0), (math.nan, 3.0)])
def test_bounds_that_leave_out_one_are_an_error(clip_range):
    with pytest.raises(ValueError, match=r"clip_range=.* is not \(low, high\) with 0 <= low <= 1 <= high"):
        weights_of([1.0, 2.0], clip_range=clip_range)


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf])
def test_a_width_that_is_no_number_of_tokens_is_an_error(sigma):
    with pytest.raises(ValueError, match=f"smooth_sigma={sigma}"):
        weights_of([1.0, 2.0], smooth_sigma=sigma)


# ---- from a reward function ----

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])


def test_lists_are_filled_up_with_ones_and_padding_is_zero():
    weights, is_given = token_weights_from_lists([[0.5, 2, 0], [0.25], None, []], MASK)
    assert (weights.dtype, is_given.dtype) == (torch.float32, torch.bool)
    assert weights.tolist() == [[0.5, 2.0, 0.0, 0.0], [0.25, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0] * 4]
    assert is_given.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    "given",
    [
        (0.5, 2.0),
        np.array([0.5, 2.0]),
        np.array([0.5, 2.0], dtype=np.float16),
        [np.float32(0.5), np.int64(2)],
        torch.tensor([0.5, 2.0]),
        torch.tensor([0.5, 2.0], dtype=torch.bfloat16, requires_grad=True),
    ],
)
def test_any_row_of_numbers_is_a_list(given):
    weights, _ = token_weights_from_lists([given, None, None, None], MASK)
    assert weights[0].tolist() == [0.5, 2.0, 1.0, 0.0]
    assert not weights.requires_grad


@pytest.mark.parametrize(
    "bad, message",
    [
        ([1.0, math.nan], "sample 1 has nan at token 1"),
        ([math.inf], "sample 1 has inf at token 0"),
        ([1e39], r"sample 1 has 1e\+39 at token 0"),
        ([10**400], "sample 1 has 1000"),
        ([1.0, -0.5], "sample 1 has -0.5 at token 1"),
        (np.array([1.0, -0.5]), "sample 1 has -0.5 at token 1"),
        ([True, 1.0], "sample 1 has True at token 0"),
        (np.array([True]), "sample 1 has True at token 0"),
        (["1.0"], "sample 1 has '1.0' at token 0"),
        ([None], "sample 1 has None at token 0"),
        ([[1.0, 1.0]], r"sample 1 has \[1.0, 1.0\] at token 0"),
        (torch.ones(1, 2), r"sample 1 has \[1.0, 1.0\] at token 0"),
        ([1j], "sample 1 has 1j at token 0"),
        ("11", "sample 1 is '11'; it must be a list of numbers"),
        (1.0, "sample 1 is 1.0; it must be a list of numbers"),
        (torch.tensor(1.0), r"sample 1 is tensor\(1.\); it must be a list of numbers"),
        (True, "sample 1 is True; it must be a list of numbers"),
        ({0: 1.0}, "sample 1 is {0: 1.0}; it must be a list of numbers"),
        ([1.0] * 3, "sample 1 has 3 weights for a response of 2 tokens"),
    ],
)
def test_what_cannot_be_weights_is_an_error_that_names_the_sample(bad, message):
    with pytest.raises(ValueError, match=message):
        token_weights_from_lists([None, bad, None, None], MASK)


def test_one_entry_is_needed_for_each_sample():
    with pytest.raises(ValueError, match="3 entries for 4 samples"):
        token_weights_from_lists([None] * 3, MASK)


def test_the_reward_functions_weights_come_before_attention_and_attention_before_ones():
    """VGR is 1 and 4 in every row with images, so that weights are 1.6 and 0.4; the last row has no image.

    A given weight is used as it is, however far out of bounds.
    """
    mass = torch.tensor([[0.3, 0.6], [0.4, 0.2]]).expand(4, 2, 2)
    keys, mask = torch.tensor([[2, 4], [2, 4], [2, 4], [2, 0]]), torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]])
    lists = [None, [9.0], None, None]

    both = choose(lists, mass, keys, mask, (0.2, 3.0), 0.0)
    torch.testing.assert_close(both, torch.tensor([[1.6, 0.4], [9.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    no_lists = [[], [9.0], np.array([]), torch.tensor([])]
    assert torch.equal(choose(no_lists, mass, keys, mask, (0.2, 3.0), 0.0), both)
    attention = choose(None, mass, keys, mask, (0.2, 3.0), 0.0)
    torch.testing.assert_close(attention[:2], torch.tensor([[1.6, 0.4]] * 2))
    given = choose(lists, None, None, mask, (0.2, 3.0), 0.0)
    assert given.tolist() == [[1.0, 1.0], [9.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    assert choose(None, None, None, mask, (0.2, 3.0), 0.0) is None
    for nothing in ([None] * 4, [[]] * 4):
        assert torch.equal(choose(nothing, mass, keys, mask, (0.2, 3.0), 0.0), attention)
        assert choose(nothing, None, None, mask, (0.2, 3.0), 0.0) is None
    clipped = choose(None, mass, keys, mask, (0.5, 1.5), 0.0)
    torch.testing.assert_close(clipped[0], torch.tensor([1.5, 0.5]))
    smooth = choose(None, mass, keys, mask, (0.2, 3.0), 1.0)
    assert smooth[0, 0] < attention[0, 0]


@pytest.mark.parametrize(
    "length, expected",
    [(2, [0.5, 2.0, 1.0, 1.0]), (4, [0.5, 2.0, 0.5, 2.0]), (6, [0.5, 2.0, 0.5, 2.0]), (0, [1.0] * 4)],
)
def test_weights_are_brought_to_the_masks_length(length, expected):
    weights = torch.tensor([[0.5, 2.0] * 3, [0.5, 2.0] * 3], dtype=torch.float64)[:, :length]
    aligned = align_token_weights(weights, torch.ones(2, 4, dtype=torch.int64))
    assert aligned.dtype == torch.float32
    assert aligned.tolist() == [expected] * 2


# ---- from what a real model generated ----

NEW_TOKENS = 10
CONVERSATIONS = [
    ([(56, 84)], "<|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user\n{}What is in the picture?"),
    ([(112, 56), (28, 28)], "<|im_start|>user\n{}and{}What is the sum of the digits?"),
    ([], "<|im_start|>user\nWhat is the sum of the digits?"),
    ([(28, 56)], "{}"),
    ([(84, 84)], "<|im_start|>{}"),
]
WHAT_IS_THERE = ["both", "both", "no image", "both", "no text"]


@pytest.fixture(scope="module")
def generated(tiny_model_path: str) -> SimpleNamespace:
    """Answers to five prompts of different lengths, their attention maps, and the maps of one pass over the whole.

    Queries are sharpened, since the attention of a random model is nearly even. The fourth prompt begins with its
    image, the last ends with it. The second answer ends early.
    """
    processor = AutoProcessor.from_pretrained(tiny_model_path)
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_path, attn_implementation="eager").eval()
    for layer in model.get_decoder().layers:
        layer.self_attn.q_proj.weight.data *= 40
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    texts = [text.format(image, image) + end * (place < 4) for place, (_, text) in enumerate(CONVERSATIONS)]
    sizes = [size for images, _ in CONVERSATIONS for size in images]
    images = [random_image(size, seed) for seed, size in enumerate(sizes)]
    prompts = processor(text=texts, images=images, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(
        **prompts,
        do_sample=True,
        max_new_tokens=NEW_TOKENS,
        suppress_tokens=[*range(8)],
        output_attentions=True,
        return_dict_in_generate=True,
    )
    input_ids, sequences = prompts["input_ids"], output.sequences
    new_mask = torch.ones(len(sequences), NEW_TOKENS, dtype=torch.int64)
    inputs = {name: value for name, value in prompts.items() if name not in ("attention_mask", "mm_token_type_ids")}
    inputs |= {"input_ids": sequences, "attention_mask": torch.cat([prompts["attention_mask"], new_mask], dim=1)}
    if "mm_token_type_ids" in prompts:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(prompts["mm_token_type_ids"], (0, NEW_TOKENS))
    with torch.no_grad():
        whole_maps = torch.stack(model(**inputs, output_attentions=True).attentions)  # (L, N, H, S, S)
    sequences = sequences.clone()
    tokenizer = processor.tokenizer
    sequences[1, -4], sequences[1, -3:] = tokenizer.eos_token_id, tokenizer.pad_token_id
    return SimpleNamespace(
        processor=processor,
        config=model.config,
        image_grid_thw=prompts["image_grid_thw"],
        attentions=output.attentions,
        whole_maps=whole_maps,
        input_ids=input_ids,
        sequences=sequences,
        lengths=[NEW_TOKENS, NEW_TOKENS - 3, NEW_TOKENS, NEW_TOKENS, NEW_TOKENS],
    )


def vgr_by_definition(
    generated: SimpleNamespace, row: int, shift: int = 0, last_k_layers: int = 99, exclude_special: bool = True
) -> tuple[list[float], list[float], list[float]]:
    """DESIGN's items one to three from the maps of one pass over the whole sequence: VGR and masses.

    Kinds of keys are told by the words of the tokens. `shift` takes later queries, to show that they are wrong.
    """
    prompt_length = generated.input_ids.shape[1]
    tokens = generated.processor.tokenizer.convert_ids_to_tokens(generated.input_ids[row])
    places = [place for place, token in enumerate(tokens) if token != "<|endoftext|>"]
    sink, places = places[0], places[1:]
    assert places == list(range(sink + 1, prompt_length))
    vision = [place for place in places if tokens[place] == "<|image_pad|>"]
    is_system_turn = tokens[sink + 1 : sink + 2] == ["system"]
    begin = tokens.index("<|im_end|>") + 1 if is_system_turn else 0
    text = [
        place
        for place in places
        if place not in vision and place >= begin and not (exclude_special and tokens[place].startswith("<|"))
    ]
    epsilon = 1e-6 / max(len(text) + len(vision), 1)
    vgr, text_masses, vision_masses = [], [], []
    for place in range(generated.lengths[row]):
        query = prompt_length - 1 + place + shift
        of_layers = []
        for attention in generated.whole_maps[-last_k_layers:, row].double():
            heads_mean = attention[:, query].mean(0).tolist()
            total = sum(heads_mean[key] for key in places)
            of_layers.append([sum(heads_mean[key] for key in kind) / total for kind in (text, vision)])
        text_mass, vision_mass = (sum(masses) / len(masses) for masses in zip(*of_layers, strict=True))
        text_masses.append(text_mass)
        vision_masses.append(vision_mass)
        is_defined = text and vision
        vgr.append(text_mass / len(text) / (vision_mass / len(vision) + epsilon) if is_defined else math.nan)
    return vgr, text_masses, vision_masses


def build(generated: SimpleNamespace, **options) -> tuple[list[list[float]], dict[str, list[list[float]]]]:
    arguments = (generated.attentions, generated.input_ids, generated.sequences, generated.processor)
    return build_token_vgr_weights_for_batch(*arguments, image_grid_thw=generated.image_grid_thw, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"last_k_layers": 1}, {"smooth_sigma": 1.0}, {"clip_range": (0.5, 1.2)}, {"exclude_special": False}],
)
def test_weights_of_a_real_batch_are_those_of_the_definition(generated, options):
    """Left-padded prompts of different lengths and image sizes, measured while they were answered. The reference
    takes the maps of one pass over prompts and answers, in double precision, and finds its keys by their words."""
    of_maps = {name: value for name, value in options.items() if name in ("last_k_layers", "exclude_special")}
    clip_range, sigma = options.get("clip_range", (0.2, 3.0)), options.get("smooth_sigma", 0.0)
    weights, debug = build(generated, **options)
    for row, (of_row, what_is_there) in enumerate(zip(weights, WHAT_IS_THERE, strict=True)):
        vgr, text_mass, vision_mass = vgr_by_definition(generated, row, **of_maps)
        assert debug["p_text"][row] == pytest.approx(text_mass, abs=1e-5)
        assert debug["p_vision"][row] == pytest.approx(vision_mass, abs=1e-5)
        assert debug["vgr_token"][row] == pytest.approx(vgr, rel=1e-4, nan_ok=True)
        assert of_row == pytest.approx(by_definition(vgr, clip_range, sigma), rel=1e-4)
        if what_is_there == "both":
            assert max(of_row) - min(of_row) > 0.1
        elif not (what_is_there == "no text" and "exclude_special" in options):
            assert of_row == [1.0] * NEW_TOKENS


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_query_is_the_one_that_predicts_the_token(generated, shift):
    """A reference that takes one row further on, the query of the token itself, or one row before is far off."""
    weights, _ = build(generated)
    vgr, _, _ = vgr_by_definition(generated, 0, shift)
    assert max(abs(a - b) for a, b in zip(weights[0], by_definition(vgr), strict=True)) > 0.1


def test_the_list_form_differs_from_the_tensor_form_in_nothing(generated):
    attention_mask = (generated.sequences != generated.processor.tokenizer.pad_token_id).long()
    vocabulary = KeyVocabulary.of(generated.config, generated.processor)
    kinds = vocabulary.classify(generated.sequences, attention_mask, NEW_TOKENS)
    mass = mass_from_attentions(generated.attentions, kinds, NEW_TOKENS, 1)
    keys, response_mask = count_keys(kinds), attention_mask[:, -NEW_TOKENS:]
    vgr = vgr_from_mass(mass, keys)
    weights = token_weights_from_vgr(vgr, response_mask, (0.5, 2.0), 0.7)

    lists, debug = build(generated, last_k_layers=1, clip_range=(0.5, 2.0), smooth_sigma=0.7)

    assert torch.equal(token_weights_from_lists(lists, response_mask)[0], weights)
    tensors = {"vgr_token": vgr, "p_text": mass[..., 0], "p_vision": mass[..., 1]}
    assert debug.keys() == tensors.keys()
    for name, values in tensors.items():
        for row, (of_row, length) in enumerate(zip(debug[name], generated.lengths, strict=True)):
            torch.testing.assert_close(torch.tensor(of_row), values[row, :length], rtol=0, atol=0, equal_nan=True)
    chosen = choose(None, mass, keys, response_mask, (0.5, 2.0), 0.7)
    assert torch.equal(chosen, weights)


def test_a_tokenizer_without_the_texts_of_its_special_tokens_gives_the_same_weights(generated):
    tokenizer = generated.processor.tokenizer
    names = ("all_special_ids", "bos_token_id", "eos_token_id", "pad_token_id", "convert_tokens_to_ids", "encode")
    with_ids_alone = SimpleNamespace(**{name: getattr(tokenizer, name) for name in names})
    arguments = (generated.attentions, generated.input_ids, generated.sequences)
    expected, _ = build_token_vgr_weights_for_batch(*arguments, generated.processor)
    given, _ = build_token_vgr_weights_for_batch(*arguments, SimpleNamespace(tokenizer=with_ids_alone))
    assert given == expected


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_four_arguments_give_the_weights_of_training_whatever_the_vgr_and_the_number_of_keys(sigma):
    """Of masses whose VGR goes from 1e-4 to 1e4. An epsilon of any moment would show at the low end."""
    vgr = torch.logspace(-4, 4, 33, dtype=torch.float64)
    for text, vision in ((3, 5), (40, 16_000)):
        keys = torch.tensor([[text, vision]])
        share = vgr * text / (vgr * text + vision)  # of the text
        mass = torch.stack([share, 1 - share], dim=1)[None].float()
        mask = torch.ones(1, 33)
        in_training = choose(None, mass, keys, mask, UNCLIPPED, sigma)
        measured = vgr_from_mass(mass, keys)
        assert torch.equal(token_weights_from_vgr(measured, mask, UNCLIPPED, sigma), in_training)
        if sigma == 0:
            inverse = 1 / measured.double()
            torch.testing.assert_close(in_training, (inverse / inverse.mean()).float(), rtol=1.2e-7, atol=0)


def test_metrics_are_the_means_of_what_the_tokens_show(generated):
    arguments = (generated.attentions, generated.input_ids, generated.sequences, generated.processor)
    metrics = compute_attention_metrics_for_batch(*arguments, last_k_layers=2)
    _, debug = build(generated, last_k_layers=2)
    for name, of_tokens in (("text_mass", "p_text"), ("vision_mass", "p_vision"), ("vgr", "vgr_token")):
        means = [sum(values) / len(values) for values in debug[of_tokens]]
        assert metrics[name] == pytest.approx(means, rel=1e-5, nan_ok=True)


def with_other_maps(generated: SimpleNamespace, change) -> SimpleNamespace:
    maps = [[change(attention) for attention in by_layer] for by_layer in generated.attentions]
    return SimpleNamespace(**{**vars(generated), "attentions": maps})


def test_longer_padding_changes_no_weight(generated):
    """Seven more columns on the left of every prompt, which get no attention, and three more after the answers."""
    wider = with_other_maps(generated, lambda attention: torch.nn.functional.pad(attention, (7, 0)))
    pad = generated.processor.tokenizer.pad_token_id
    wider.input_ids = torch.nn.functional.pad(generated.input_ids, (7, 0), value=pad)
    wider.sequences = torch.nn.functional.pad(generated.sequences, (7, 3), value=pad)
    for options in ({}, {"smooth_sigma": 1.0}):
        weights, _ = build(wider, **options)
        expected, _ = build(generated, **options)
        for of_row, expected_of_row in zip(weights, expected, strict=True):
            assert of_row == pytest.approx(expected_of_row, abs=1e-6)


def test_the_order_of_samples_changes_no_weight(generated):
    flipped = with_other_maps(generated, lambda attention: attention.flip(0))
    flipped.input_ids, flipped.sequences = generated.input_ids.flip(0), generated.sequences.flip(0)
    assert build(flipped)[0] == build(generated)[0][::-1]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_responses(generated, length):
    """Nothing, one token, which weighs one, or two."""
    short = SimpleNamespace(**vars(generated))
    short.sequences = generated.sequences[:, : generated.input_ids.shape[1] + length]
    weights, debug = build(short, smooth_sigma=0.5)
    for lists in (weights, *debug.values()):
        assert [len(of_row) for of_row in lists] == [length] * 5
    if length == 1:
        assert weights == [[1.0]] * 5
    if length == 2:
        assert [of_row != [1.0, 1.0] for of_row in weights] == [what == "both" for what in WHAT_IS_THERE]


@pytest.mark.parametrize("nothing", [None, (), []])
def test_without_attentions_there_are_no_weights(generated, nothing):
    arguments = (generated.input_ids, generated.sequences, generated.processor)
    weights, debug = build_token_vgr_weights_for_batch(nothing, *arguments)
    assert weights == [[]] * 5
    assert debug == {"vgr_token": [[]] * 5, "p_text": [[]] * 5, "p_vision": [[]] * 5}
    weights[0].append(1.0)
    assert weights[1] == []


def test_attentions_of_the_last_layers_alone_will_do(generated):
    """Whoever kept only what is needed, to save memory, gets what the rest would have given."""
    last = SimpleNamespace(**vars(generated))
    last.attentions = [[None, by_layer[-1]] for by_layer in generated.attentions]
    assert build(last)[0] == build(last, last_k_layers=1)[0] == build(generated, last_k_layers=1)[0]
    with pytest.raises(ValueError, match=r"has layers \[1\] of 2, but last_k_layers=2 needs \[0\]"):
        build(last, last_k_layers=2)


def test_too_few_steps_are_an_error(generated):
    short = SimpleNamespace(**vars(generated))
    short.attentions = generated.attentions[:-1]
    with pytest.raises(ValueError, match="has 9 steps for responses of up to 10 tokens"):
        build(short)


def test_a_processor_may_be_next_to_nothing():
    """A tokenizer with ids and a look-up. The prompt is a turn's start, a word, an image of two tokens between its
    marks, a word. The first new token gives the words 0.1 and 0.3 and each image token 0.2, so 0.2 and 0.2 on average;
    the second 0.4 and 0.4 against 0.1 each. VGR 1 and 4, weights 1.6 and 0.4."""
    names = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    look_up = {name: place for place, name in enumerate(names)}.get
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=9, bos_token_id=None, convert_tokens_to_ids=look_up)
    processor = SimpleNamespace(tokenizer=tokenizer)
    prompt = [0, 20, 2, 4, 4, 3, 21]
    input_ids, sequences = torch.tensor([prompt]), torch.tensor([[*prompt, 22, 1]])
    first = torch.zeros(1, 1, 7, 7)
    first[0, 0, -1] = torch.tensor([0.0, 0.1, 0.1, 0.2, 0.2, 0.1, 0.3])
    second = torch.tensor([0.0, 0.4, 0.0, 0.1, 0.1, 0.0, 0.4, 0.0])[None, None, None]

    weights, debug = build_token_vgr_weights_for_batch([[first], [second]], input_ids, sequences, processor)

    assert weights == [pytest.approx([1.6, 0.4], rel=1e-5)]
    assert debug["vgr_token"] == [pytest.approx([1.0, 4.0], rel=1e-5)]
    assert debug["p_text"] == [pytest.approx([0.4, 0.8])]
    assert debug["p_vision"] == [pytest.approx([0.4, 0.2])]
