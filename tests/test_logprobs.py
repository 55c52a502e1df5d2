# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_logprobs.py
"""The frugal log-probabilities, entropy and KL equal the plain ones, in value and gradient."""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from verl.utils import logprobs
from verl.utils.logprobs import LazyLogits, log_probs_from_logits, token_statistics

SUPPRESSED = [0, 7]


class LiveFloat32(TorchDispatchMode):
    """Keeps count of the bytes of float32 tensors that operations inside made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def draw(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (3, 5, 11) that want a gradient, and labels that are not suppressed."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 5, 11, generator=generator)).to(dtype).requires_grad_()
    return logits, torch.randint(1, 7, (3, 5), generator=generator)


def draw_reference(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(1))).to(dtype)


def plain_distribution(logits: torch.Tensor, temperature: float, suppressed: list[int]) -> torch.Tensor:
    """Log-probabilities (..., V - len(suppressed)) of the ids that can be drawn."""
    allowed = [index for index in range(logits.shape[-1]) if index not in suppressed]
    return torch.log_softmax(logits.float()[..., allowed] / temperature, dim=-1)


def plain_log_probs(logits: torch.Tensor, labels: torch.Tensor, temperature: float, suppressed: list[int]):
    scaled = logits.float() / temperature
    allowed = torch.ones(logits.shape[-1], dtype=torch.bool)
    allowed[suppressed] = False
    log_probs = torch.log_softmax(scaled.masked_fill(~allowed, -math.inf), dim=-1)
    return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("suppressed", [[], SUPPRESSED])
def test_values_and_gradients_equal_log_softmax(dtype, temperature, suppressed):
    logits, labels = draw(dtype)
    upstream = torch.linspace(-1, 1, 15).view(3, 5)

    expected = plain_log_probs(logits, labels, temperature, suppressed)
    (expected_grad,) = torch.autograd.grad((expected * upstream).sum(), logits)
    log_probs = log_probs_from_logits(logits, labels, temperature, suppressed)
    (grad,) = torch.autograd.grad((log_probs * upstream).sum(), logits)

    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(grad, expected_grad, atol=1e-6 if dtype == torch.float32 else 4e-3, rtol=0)
    assert not grad[..., suppressed].any()


def test_by_hand():
    """Logits 0, ln 3 at temperature 1/2 become 0, 2 ln 3 = ln 9: probabilities 0.1 and 0.9.

    With a third id of the same weight as the second suppressed, nothing changes.
    """
    logits = torch.tensor([[[0.0, math.log(3.0), math.log(3.0)]] * 2])
    log_probs = log_probs_from_logits(logits, torch.tensor([[0, 1]]), temperature=0.5, suppressed_token_ids=[2])
    torch.testing.assert_close(log_probs.exp(), torch.tensor([[0.1, 0.9]]))


def test_without_a_gradient_the_values_are_the_same_bits():
    logits, labels = draw()
    with torch.no_grad():
        frozen = log_probs_from_logits(logits, labels, 0.7, SUPPRESSED)
    assert torch.equal(frozen, log_probs_from_logits(logits, labels, 0.7, SUPPRESSED).detach())


def test_the_callers_logits_are_left_as_they_were():
    logits, labels = draw()
    before = logits.detach().clone()
    log_probs_from_logits(logits.detach(), labels, 1.0, SUPPRESSED)
    assert torch.equal(logits.detach(), before)


def test_a_row_does_not_depend_on_its_neighbours():
    logits, labels = draw()
    together = log_probs_from_logits(logits, labels)
    alone = torch.cat([log_probs_from_logits(logits[row : row + 1], labels[row : row + 1]) for row in range(3)])
    assert torch.equal(together, alone)


def test_huge_logits_stay_finite():
    logits = torch.tensor([[[1e30, -1e30, 0.0]]], requires_grad=True)
    log_probs = log_probs_from_logits(logits, torch.tensor([[1]]), 1.0, [2])
    log_probs.sum().backward()
    assert torch.isfinite(log_probs).all()
    assert torch.isfinite(logits.grad).all()


def test_a_suppressed_label_has_the_lowest_log_prob_and_no_gradient_of_its_own():
    """The other ids have the gradient of -log-sum-exp; the suppressed id's logit plays no part."""
    logits, labels = draw()
    labels[:] = SUPPRESSED[0]
    log_probs = log_probs_from_logits(logits, labels, 1.0, SUPPRESSED)
    log_probs.sum().backward()
    assert log_probs.max().item() < -3e38
    assert not logits.grad[..., SUPPRESSED].any()


def test_a_view_of_the_models_logits_passes_its_gradient_on():
    """The forward pass hands over all but the last position; that one's gradient is zero."""
    logits, labels = draw()
    log_probs_from_logits(logits[:, :-1], labels[:, :-1]).sum().backward()
    (expected,) = torch.autograd.grad(plain_log_probs(logits, labels, 1.0, [])[:, :-1].sum(), logits)
    torch.testing.assert_close(logits.grad, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("suppressed", [[], SUPPRESSED])
def test_entropy_and_kl_equal_their_definitions_and_all_gradients_add_up(dtype, temperature, suppressed):
    logits, labels = draw(dtype)
    ref_logits = draw_reference(dtype)
    upstream, kl_upstream = torch.linspace(-1, 1, 15).view(3, 5), torch.linspace(2, -1, 15).view(3, 5)

    log_p = plain_distribution(logits, temperature, suppressed)
    log_q = plain_distribution(ref_logits, temperature, suppressed)
    entropy, kl = -(log_p.exp() * log_p).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
    log_probs = plain_log_probs(logits, labels, temperature, suppressed)
    (expected_grad,) = torch.autograd.grad((log_probs * upstream + kl * kl_upstream).sum(), logits)
    found = token_statistics(logits, labels, temperature, suppressed, ref_logits)
    (grad,) = torch.autograd.grad((found.log_probs * upstream + found.kl * kl_upstream).sum(), logits)

    assert {found.log_probs.dtype, found.entropy.dtype, found.kl.dtype} == {torch.float32}
    torch.testing.assert_close(found.entropy, entropy.detach(), atol=2e-6, rtol=0)
    torch.testing.assert_close(found.kl, kl, atol=1e-5, rtol=0)
    torch.testing.assert_close(grad, expected_grad, atol=1e-5 if dtype == torch.float32 else 4e-2, rtol=0)
    assert not grad[..., suppressed].any()
    assert not found.entropy.requires_grad


def test_entropy_and_kl_by_hand():
    """Policy (1/2, 1/4, 1/4), reference (1/4, 1/4, 1/2), a fourth id with half of all the weight suppressed.

    Entropy 1/2 ln 2 + 1/2 ln 4 = 3/2 ln 2; KL 1/2 ln 2 + 0 - 1/4 ln 2 = 1/4 ln 2. In logit v the KL has the slope
    p (ln p / q - KL): 1/2 (1 - 1/4) ln 2 = 3/8 ln 2, -1/16 ln 2 and 1/4 (-1 - 1/4) ln 2 = -5/16 ln 2.
    """
    logits = torch.tensor([[[0.5, 0.25, 0.25, 1.0]]]).log().requires_grad_()
    ref_logits = torch.tensor([[[0.25, 0.25, 0.5, 1.0]]]).log()
    found = token_statistics(logits, torch.tensor([[0]]), suppressed_token_ids=[3], ref_logits=ref_logits)
    found.kl.sum().backward()
    assert found.entropy.item() == pytest.approx(1.5 * math.log(2), abs=1e-6)
    assert found.kl.item() == pytest.approx(0.25 * math.log(2), abs=1e-6)
    expected = math.log(2) * torch.tensor([[[3 / 8, -1 / 16, -5 / 16, 0.0]]])
    torch.testing.assert_close(logits.grad, expected, atol=1e-6, rtol=0)


def test_entropy_lies_between_that_of_certainty_and_that_of_no_idea():
    """ln 9 for nine ids that can be drawn; hotter sampling is more uncertain."""
    labels = torch.tensor([[1]])
    certain = torch.zeros(1, 1, 11).index_fill_(-1, torch.tensor([3]), 1e4)
    assert token_statistics(certain, labels, 1.0, SUPPRESSED).entropy.item() == 0.0
    none = token_statistics(torch.zeros(1, 1, 11), labels, 1.0, SUPPRESSED).entropy.item()
    assert none == pytest.approx(math.log(9), abs=1e-6)
    logits, labels = draw()
    entropies = [token_statistics(logits, labels, temperature).entropy.mean() for temperature in (0.5, 1.0, 2.0)]
    assert entropies == sorted(entropies)


def test_a_policy_that_is_its_reference_has_a_kl_of_zero_and_no_slope():
    logits, labels = draw()
    found = token_statistics(logits, labels, 0.7, SUPPRESSED, logits.detach())
    found.kl.sum().backward()
    assert not found.kl.any()
    assert not logits.grad.any()


def test_one_sample_estimates_average_to_the_full_kl():
    """Over what the policy draws, log p - log q has the KL as its mean: 4000 draws, five standard errors."""
    logits, labels = draw()
    full = token_statistics(logits, labels, 0.7, SUPPRESSED, draw_reference()).kl.detach()
    log_p, log_q = (plain_distribution(each, 0.7, SUPPRESSED).detach() for each in (logits, draw_reference()))
    draws = torch.multinomial(log_p.exp().flatten(0, 1), 4000, True, generator=torch.Generator().manual_seed(0))
    samples = (log_p - log_q).flatten(0, 1).gather(1, draws)  # (15, 4000)
    error = samples.std(dim=1) / 4000**0.5
    assert ((samples.mean(dim=1) - full.flatten()).abs() < 5 * error).all()


def test_the_log_probs_are_the_same_bits_with_and_without_the_statistics():
    logits, labels = draw()
    plain = log_probs_from_logits(logits, labels, 0.7, SUPPRESSED)
    with_entropy = token_statistics(logits, labels, 0.7, SUPPRESSED)
    assert with_entropy.kl is None
    with_kl = token_statistics(logits, labels, 0.7, SUPPRESSED, draw_reference())
    for found in (with_entropy, with_kl):
        assert torch.equal(found.log_probs, plain)
    gradients = [torch.autograd.grad(each.sum(), logits)[0] for each in (plain, with_entropy.log_probs)]
    assert torch.equal(*gradients)


def test_huge_logits_leave_entropy_and_kl_without_a_nan():
    logits = torch.tensor([[[1e30, -1e30, 0.0, 1e30]]], requires_grad=True)
    found = token_statistics(logits, torch.tensor([[0]]), 1.0, [3], torch.tensor([[[0.0, 1e30, 1.0, -1e30]]]))
    (found.log_probs + found.kl).sum().backward()
    assert found.entropy.item() == 0.0
    assert found.kl.item() == pytest.approx(1e30)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("ref_logits", [None, draw_reference(torch.bfloat16)])
def test_no_float32_copy_of_the_logits_waits_for_the_backward_pass(ref_logits):
    logits, labels = draw(torch.bfloat16)
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_statistics(logits, labels, 0.7, SUPPRESSED, ref_logits)
    assert not [tensor.shape for tensor in kept if tensor.dtype == torch.float32 and tensor.shape[-1] == 11]


@pytest.mark.parametrize("at_once", [1, 2, 5, 9])
def test_any_number_of_positions_at_once_gives_the_same_bits(at_once, monkeypatch):
    (logits, labels), ref_logits = draw(), draw_reference()
    upstream = torch.linspace(-1, 1, 15).view(3, 5)

    def everything() -> list[torch.Tensor]:
        found = token_statistics(logits, labels, 0.7, SUPPRESSED, ref_logits)
        (grad,) = torch.autograd.grad((found.log_probs * upstream + found.kl).sum(), logits)
        return [found.log_probs, found.entropy, found.kl, grad]

    expected = everything()
    monkeypatch.setattr(logprobs, "POSITIONS_AT_ONCE", at_once)
    assert all(torch.equal(*pair) for pair in zip(everything(), expected, strict=True))


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("with_reference", [False, True])
def test_no_more_than_four_pieces_of_the_logits_are_held_in_float32_at_a_time(num_rows, with_reference, monkeypatch):
    """Forward and backward, even where one row is the whole batch: pieces of 8 positions x 500 ids x 4 bytes.

    Half a piece is left for the numbers that there are one a token of.
    """
    monkeypatch.setattr(logprobs, "POSITIONS_AT_ONCE", 8)
    logits = torch.randn(num_rows, 50, 500).bfloat16().requires_grad_()
    labels = torch.randint(1, 7, (num_rows, 50))
    ref_logits = torch.randn(num_rows, 50, 500).bfloat16() if with_reference else None
    with LiveFloat32() as live:
        found = token_statistics(logits, labels, 0.7, SUPPRESSED, ref_logits)
        (found.log_probs + (found.kl if with_reference else 0)).sum().backward()
    assert 8 * 500 * 4 < live.peak < 4.5 * 8 * 500 * 4


# ---- from hidden states ----


def draw_head(seed: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> LazyLogits:
    """Hidden states (3, 5, 6) and a head of 11 ids, all with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 5, 6), (11, 6), (11,))
    hidden_states, weight, own_bias = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    )
    return LazyLogits(hidden_states, weight, own_bias if bias else None)


def logits_of(head: LazyLogits) -> torch.Tensor:
    return torch.nn.functional.linear(head.states, head.weight, head.bias)


@pytest.mark.parametrize("at_once", [1, 4, 512])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_reference", [True, False])
def test_hidden_states_and_head_give_what_their_logits_give(at_once, bias, with_reference, monkeypatch):
    """Values, and the gradients of hidden states, weight and bias."""
    monkeypatch.setattr(logprobs, "POSITIONS_AT_ONCE", at_once)
    _, labels = draw()
    upstream = torch.linspace(-1, 1, 15).view(3, 5)
    head = draw_head(0, bias)
    reference = draw_head(1, bias) if with_reference else None
    ref_logits = None if reference is None else logits_of(reference).detach()
    wanted = [tensor for tensor in (head.states, head.weight, head.bias) if tensor is not None]

    def everything(logits, ref_logits) -> list[torch.Tensor]:
        found = token_statistics(logits, labels, 0.7, SUPPRESSED, ref_logits)
        loss = (found.log_probs * upstream).sum() + (0 if found.kl is None else (found.kl * upstream).sum())
        values = [found.log_probs, found.entropy] + ([] if found.kl is None else [found.kl])
        return [*values, *torch.autograd.grad(loss, wanted)]

    expected = everything(logits_of(head), ref_logits)
    for found, value in zip(everything(head, reference), expected, strict=True):
        torch.testing.assert_close(found, value, atol=1e-5, rtol=1e-5)
    assert torch.equal(log_probs_from_logits(head, labels, 0.7, SUPPRESSED), everything(head, None)[0])


def test_a_frozen_head_costs_no_gradient_of_its_own():
    head = draw_head(0)
    frozen = LazyLogits(head.states, head.weight.detach(), head.bias.detach())
    log_probs_from_logits(frozen, draw()[1]).sum().backward()
    of_frozen = head.states.grad.clone()
    head.states.grad = None
    log_probs_from_logits(head, draw()[1]).sum().backward()
    assert torch.equal(head.states.grad, of_frozen)


def test_pieces_of_the_heads_gradient_add_up_beyond_the_precision_of_bf16(monkeypatch):
    """2,000 positions that all pull alike, one at a time: a bf16 sum stands still at 256 times a summand."""
    monkeypatch.setattr(logprobs, "POSITIONS_AT_ONCE", 1)
    hidden_states = torch.ones(2000, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    log_probs_from_logits(LazyLogits(hidden_states, weight), torch.zeros(2000, dtype=torch.int64)).sum().backward()
    assert weight.grad.tolist() == [[1000.0], [-1000.0]]


def test_the_logits_of_all_positions_are_never_there_at_once(monkeypatch):
    """In any precision, forward and backward: of 60 positions x 500 ids, pieces of 8 positions live at a time."""
    monkeypatch.setattr(logprobs, "POSITIONS_AT_ONCE", 8)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            return result

    head = LazyLogits(torch.randn(60, 4).requires_grad_(), torch.randn(500, 4).requires_grad_())
    with Sizes():
        token_statistics(head, torch.randint(1, 7, (60,)), 0.7, SUPPRESSED, head).log_probs.sum().backward()
    assert max(sizes) == 8 * 500


def test_no_positions_give_no_numbers_and_a_gradient_of_zero():
    """A rank whose slice of a row has prompt tokens alone; its peers wait for its backward pass."""
    head = draw_head(0)
    none = LazyLogits(head.states[:0, 0], head.weight, head.bias)
    found = token_statistics(none, torch.empty(0, dtype=torch.int64), 0.7, SUPPRESSED)
    assert found.log_probs.shape == found.entropy.shape == (0,)
    found.log_probs.sum().backward()
    for tensor in (head.states, head.weight, head.bias):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("from_head", [True, False])
def test_labels_of_other_positions_than_the_logits_are_refused(from_head):
    """Else the first of them would be taken, where a model keeps positions that were not asked for."""
    head = draw_head(0)
    given = head if from_head else logits_of(head)
    with pytest.raises(AssertionError, match=r"labels are \(3, 4\), but logits of \(3, 5\)"):
        log_probs_from_logits(given, torch.ones(3, 4, dtype=torch.int64))
