# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_attention_mass.py
"""Every back end gives the masses that the definition gives, wherever prompts, images, padding and responses stand."""

import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from verl.models.kernels.attention_mass import (
    BACKENDS,
    KeyPlan,
    chunked,
    default_backend,
    normalised_layer_mean,
)
from verl.utils.attention_metrics import KeyKind

ROOT = Path(__file__).resolve().parent.parent
FAST = ["chunked", "triton"]
HEADS, KEY_HEADS, DIMENSION, RESPONSE_LENGTH = 4, 2, 16, 5
SCALING = DIMENSION**-0.5

# One character a token: . padding, s sink, t text, v vision, p other prompt tokens, r response.
SAMPLES = {
    "left-padded": "....spptvvvtttprrrrr",
    "right-padded, with a gap before the response": "sptvvvttp......rrrr.",
    "several images": "..stvvptvvvptvtrrrrr",
    "no image": "...spttttttttttrrr..",
    "no text": "..spvvvvvvvvvppr....",
    "a sink only": "..............srrrr.",
    "the image first": ".........svvttprrrrr",
    "a response of two": "..spttvvvttttttrr...",
    "a response of one, last column": "..spttvvvtttttt....r",
    "no response": "..spttvvvtttttt.....",
    "nothing but padding": "....................",
    "a gap within the response": "..sptvvvttttttprr.r.",
}
KIND_OF = {".": "PADDING", "s": "SINK", "t": "TEXT", "v": "VISION", "p": "PROMPT", "r": "RESPONSE"}


def kinds_of(sample: str) -> list[int]:
    return [KeyKind[KIND_OF[token]] for token in sample]


def padded_kinds() -> torch.Tensor:
    return torch.tensor([kinds_of(sample) for sample in SAMPLES.values()], dtype=torch.int8)


def draw(
    key_kinds: torch.Tensor, heads: int = HEADS, key_heads: int = KEY_HEADS, dimension: int = DIMENSION, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query (N, H, S, D) and key (N, Hkv, S, D) with scores up to about 10; all NaN where there is padding."""
    generator = torch.Generator().manual_seed(seed)
    num_samples, length = key_kinds.shape
    query = 3 * torch.randn(num_samples, heads, length, dimension, generator=generator)
    key = torch.randn(num_samples, key_heads, length, dimension, generator=generator)
    padding = (key_kinds == KeyKind.PADDING)[:, None, :, None]
    return query.masked_fill(padding, torch.nan), key.masked_fill(padding, torch.nan)


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.5},
    "sinks": {"sinks": torch.tensor([-1.0, 0.0, 2.0, 9.0])},
    "softcap and sinks": {"softcap": 5.0, "sinks": torch.tensor([-1.0, 0.0, 2.0, 9.0])},
}


def by_definition(query, key, key_kinds, response_length, scaling, softcap=None, sinks=None) -> torch.Tensor:
    """(N, R, 3) float64, score by score: every token attends to itself and to all real tokens before it."""
    num_samples, length = key_kinds.shape
    heads, group_size = query.shape[1], query.shape[1] // key.shape[1]
    masses = torch.zeros(num_samples, response_length, 3, dtype=torch.float64)
    for sample, kinds in enumerate(key_kinds.tolist()):
        for position in range(length - response_length, length):
            if kinds[position] != KeyKind.RESPONSE:
                continue
            before = [place for place in range(position) if kinds[place] != KeyKind.PADDING]
            predicting = before[-1]
            for head in range(heads):
                weights = []
                for place in before:
                    pairs = zip(query[sample, head, predicting], key[sample, head // group_size, place], strict=True)
                    score = scaling * sum(a.item() * b.item() for a, b in pairs)
                    weights.append(math.exp(softcap * math.tanh(score / softcap) if softcap else score))
                total = sum(weights) + (math.exp(sinks[head].item()) if sinks is not None else 0.0)
                for place, weight in zip(before, weights, strict=True):
                    column = position - (length - response_length)
                    if kinds[place] == KeyKind.TEXT:
                        masses[sample, column, 0] += weight / total / heads
                    if kinds[place] == KeyKind.VISION:
                        masses[sample, column, 1] += weight / total / heads
                    if kinds[place] in (KeyKind.TEXT, KeyKind.VISION, KeyKind.PROMPT):
                        masses[sample, column, 2] += weight / total / heads
    return masses


def measure(name: str, query: torch.Tensor, key: torch.Tensor, plan: KeyPlan, scaling: float = SCALING, **options):
    """The masses from a back end, on the GPU where there is one: there, Triton's kernels are not interpreted."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].to(device)
    return BACKENDS[name](query.to(device), key.to(device), plan, scaling, **options).cpu()


FLOAT32_ERROR = 2e-6
"""What float32 may cost. The terms of a score add up to about 20 in size, and sums are rounded to 2**-24 of that in an
order that processors choose: 1.2e-6 of a score, and no more of a mass. The promise to users is 1e-5."""


def assert_close(masses: torch.Tensor, expected: torch.Tensor, atol: float = FLOAT32_ERROR) -> None:
    torch.testing.assert_close(masses.double(), expected.double(), atol=atol, rtol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_reference_is_the_definition(options):
    key_kinds = padded_kinds()
    query, key = draw(key_kinds)
    expected = by_definition(query, key, key_kinds, RESPONSE_LENGTH, SCALING, **options)
    masses = measure("reference", query, key, KeyPlan.from_kinds(key_kinds, RESPONSE_LENGTH), **options)
    assert masses.dtype == torch.float64
    assert_close(masses, expected, atol=1e-12)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_back_ends_equal_the_reference_on_the_same_queries_and_keys(name, options, dtype):
    key_kinds = padded_kinds()
    query, key = (tensor.to(dtype) for tensor in draw(key_kinds))
    plan = KeyPlan.from_kinds(key_kinds, RESPONSE_LENGTH)
    masses = measure(name, query, key, plan, **options)
    assert masses.dtype == torch.float32
    assert_close(masses, measure("reference", query, key, plan, **options))


@pytest.mark.parametrize("name", BACKENDS)
def test_masses_by_hand_when_all_keys_are_alike(name):
    """Zero queries attend to all visible keys alike: 2 text, 3 vision, 1 other, 1 sink, then one more each row."""
    key_kinds = torch.tensor([kinds_of("..stvvvtprrr.")])
    query, key = draw(key_kinds)
    query = torch.zeros_like(query)
    masses = measure(name, query, key, KeyPlan.from_kinds(key_kinds, 4))
    expected = [[2 / 7, 3 / 7, 6 / 7], [2 / 8, 3 / 8, 6 / 8], [2 / 9, 3 / 9, 6 / 9], [0, 0, 0]]
    assert_close(masses, torch.tensor([expected], dtype=torch.float64))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (3, 3), (6, 2), (7, 1)])
@pytest.mark.parametrize("dimension", [8, 24, 128])
def test_heads_share_keys_in_groups_of_any_size_and_any_dimension(name, heads, key_heads, dimension):
    key_kinds = padded_kinds()[:3]
    query, key = draw(key_kinds, heads, key_heads, dimension)
    plan = KeyPlan.from_kinds(key_kinds, RESPONSE_LENGTH)
    scaling = dimension**-0.5
    assert_close(measure(name, query, key, plan, scaling), measure("reference", query, key, plan, scaling))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_sample_whose_highest_scores_come_late_and_early(name, dtype):
    """Many blocks of every kind; scores climb by 20 from first key to last, or fall."""
    length = 700
    sample = "." * 3 + "s" + "t" * 150 + "v" * 200 + "p" * 70 + "t" * 76 + "r" * 200
    key_kinds = torch.tensor([kinds_of(sample)] * 2)
    query, key = draw(key_kinds, heads=2, key_heads=1)
    key[:, :, :, 0] = torch.linspace(-4, 4, length)
    query[:, 0, :, 0], query[:, 1, :, 0] = 10.0, -10.0
    query, key = query.to(dtype), key.to(dtype)
    plan = KeyPlan.from_kinds(key_kinds, 200)
    masses = measure(name, query, key, plan)
    assert masses.isfinite().all()
    assert_close(masses, measure("reference", query, key, plan), atol=1e-6)


@pytest.mark.parametrize("block", [(1, 1), (1, 100), (2, 3), (3, 2), (4, 7), (100, 1)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_size_of_the_blocks_does_not_matter(block, options):
    key_kinds = padded_kinds()
    query, key = draw(key_kinds)
    plan = KeyPlan.from_kinds(key_kinds, RESPONSE_LENGTH)
    expected = measure("reference", query, key, plan, **options)
    assert_close(measure("chunked", query, key, plan, **options, block=block), expected)


def packed(key_kinds: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, list[int], list[torch.Tensor]]:
    """The real tokens of all samples end to end: kinds (total,), borders, and each tensor as (1, heads, total, D)."""
    real = key_kinds != KeyKind.PADDING
    borders = [0, *real.sum(dim=1).cumsum(dim=0).tolist()]
    return key_kinds[real], borders, [tensor.transpose(1, 2)[real].transpose(0, 1)[None] for tensor in tensors]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_packed_batch_gives_what_the_padded_one_gives(name):
    samples = [sample for name, sample in SAMPLES.items() if "last column" not in name and "within" not in name]
    key_kinds = torch.tensor([kinds_of(sample) for sample in samples])
    query, key = draw(key_kinds)
    kinds, borders, (packed_query, packed_key) = packed(key_kinds, query, key)

    plan = KeyPlan.from_kinds(key_kinds, RESPONSE_LENGTH)
    places = [torch.arange(start, end) for start, end in pairwise(borders)]
    columns = [(row[-RESPONSE_LENGTH:] == KeyKind.RESPONSE).nonzero()[:, 0] for row in key_kinds]
    packed_plan = KeyPlan.from_places(kinds, places, columns, RESPONSE_LENGTH)
    masses = measure(name, packed_query, packed_key, packed_plan)
    assert torch.equal(masses, measure(name, query, key, plan))


@pytest.mark.parametrize("name", BACKENDS)
def test_the_layout_of_the_memory_does_not_matter(name):
    key_kinds = padded_kinds()
    query, key = draw(key_kinds)
    plan = KeyPlan.from_kinds(key_kinds, RESPONSE_LENGTH)
    expected = measure(name, query, key, plan)
    as_projected = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key)]
    dimension_first = [tensor.mT.contiguous().mT for tensor in (query, key)]
    for strided_query, strided_key in (as_projected, dimension_first):
        assert not strided_query.is_contiguous()
        assert torch.equal(measure(name, strided_query, strided_key, plan), expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_token_does_not_depend_on_the_ones_after_it(name):
    key_kinds = padded_kinds()[:1]
    query, key = draw(key_kinds)
    plan = KeyPlan.from_kinds(key_kinds, RESPONSE_LENGTH)
    before = measure(name, query, key, plan)
    query[:, :, -3:], key[:, :, -3:] = 7.0, -7.0
    after = measure(name, query, key, plan)
    # The tokens at columns 2 and on have changed; column 3 is the first that one of them predicts.
    assert torch.equal(after[:, :3], before[:, :3])
    assert (after[:, 3:] != before[:, 3:]).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("response_length", [0, 3])
def test_a_batch_without_responses_has_masses_of_zero(name, response_length):
    key_kinds = torch.tensor([kinds_of("..sptvt..."), kinds_of("sptttvt...")])
    query, key = draw(key_kinds)
    masses = measure(name, query, key, KeyPlan.from_kinds(key_kinds, response_length))
    assert torch.equal(masses, torch.zeros(2, response_length, 3, dtype=masses.dtype))


@pytest.mark.parametrize("name", BACKENDS)
def test_masses_are_measured_without_a_gradient(name):
    key_kinds = padded_kinds()
    query, key = (tensor.requires_grad_() for tensor in draw(key_kinds))
    plan = KeyPlan.from_kinds(key_kinds, RESPONSE_LENGTH)
    masses = measure(name, query, key, plan)
    assert not masses.requires_grad
    assert torch.equal(masses, measure(name, query.detach(), key.detach(), plan))


def test_nothing_quadratic_is_made():
    """With 2048 tokens, the scores of a response of 512 would be 8 million numbers; a block of them is 2**18."""

    class LargestTensor(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    key_kinds = torch.tensor([kinds_of("s" + "v" * 1000 + "t" * 535 + "r" * 512)])
    query, key = torch.randn(1, 8, 2048, 8), torch.randn(1, 2, 2048, 8)
    plan = KeyPlan.from_kinds(key_kinds, 512)
    with LargestTensor() as largest:
        chunked(query, key, plan, 1.0)
    assert 0 < largest.numel <= 2**18


def test_a_response_key_among_the_prompts_columns_is_refused():
    with pytest.raises(AssertionError, match="response keys among the prompt's columns"):
        KeyPlan.from_kinds(torch.tensor([kinds_of("sttrrrr")]), 3)


def test_a_prompt_key_after_the_response_began_is_refused():
    with pytest.raises(AssertionError, match="a prompt key stands after the response's first"):
        KeyPlan.from_kinds(torch.tensor([kinds_of("sttrrtr")]), 4)


def test_columns_that_do_not_fit_a_packed_response_or_the_result_are_refused():
    kinds, places = torch.tensor(kinds_of("strrstrrrr")), [torch.arange(4), torch.arange(4, 10)]
    with pytest.raises(AssertionError, match="a column is not below 3"):
        KeyPlan.from_places(kinds, places, [torch.arange(2), torch.arange(4)], 3)
    with pytest.raises(AssertionError, match="not one column for each response token"):
        KeyPlan.from_places(kinds, places, [torch.arange(2), torch.arange(3)], 4)


def test_layers_are_normalised_by_the_prompt_mass_before_they_are_averaged():
    """(0.2, 0.4) / 0.8 and (0.1, 0.1) / 0.2 average to (0.375, 0.5), which the mean of the masses does not give.

    A layer without mass on the prompt adds 0; a broken one shows.
    """
    first = torch.tensor([[[0.2, 0.4, 0.8], [0.0, 0.0, 0.0], [0.3, 0.1, 0.5], [0.0, 0.0, 0.0]]])
    second = torch.tensor([[[0.1, 0.1, 0.2], [0.1, 0.3, 0.5], [torch.nan, 0.1, torch.nan], [0.0, 0.0, 0.0]]])
    mean = normalised_layer_mean(torch.stack([first, second]))
    assert mean.shape == (1, 4, 2)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean[0, [0, 1, 3]], torch.tensor([[0.375, 0.5], [0.1, 0.3], [0.0, 0.0]]))
    assert mean[0, 2].isnan().all()


def test_cpus_run_torch_operations_and_gpus_the_kernel():
    assert default_backend(torch.device("cpu")) == "chunked"
    assert default_backend(torch.device("cuda:0")) == "triton"


def test_the_plan_is_copied_to_a_device_once():
    plan = KeyPlan.from_kinds(padded_kinds(), RESPONSE_LENGTH)
    there = plan.to(torch.device("meta"))
    assert there.table.device.type == "meta"
    assert there is plan.to(torch.device("meta"))
    assert there.samples == plan.samples


def in_a_fresh_python(program: str, *arguments: str, **environment: str) -> str:
    """What the program prints, in a process that does not interpret Triton's kernels."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_without_triton_the_other_back_ends_work_and_asking_for_it_says_what_is_missing():
    output = in_a_fresh_python("""
import sys
sys.modules["triton"] = None  # makes `import triton` fail
import torch
from verl.models.kernels.attention_mass import BACKENDS, KeyPlan
query = torch.ones(1, 1, 3, 4)
plan = KeyPlan.from_kinds(torch.tensor([[1, 2, 5]]), 1)
print(BACKENDS["chunked"](query, query, plan, 1.0).tolist())
try:
    BACKENDS["triton"](query, query, plan, 1.0)
except ImportError as error:
    print(error)
""")
    assert "[[[0.5, 0.0, 0.5]]]" in output
    assert "attention back end 'triton' needs the package triton" in output
    assert "use 'chunked' instead" in output


COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from verl.models.kernels.attention_mass_triton import attention_mass_kernel, block_sizes

capability, dtype, element_size, dimension, with_extras = json.loads(sys.argv[1])
blocks = block_sizes(dimension, element_size)
options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
constants = dict(
    query_stride_dimension=1, key_stride_dimension=1, GROUP_SIZE=7, DIMENSION=dimension,
    HAS_SOFTCAP=with_extras, HAS_SINKS=with_extras, **blocks,
)
types = dict(query="*" + dtype, key="*" + dtype, masses="*fp32", sinks="*fp32", scaling="fp32", softcap="fp32")
types |= {name: "*i64" for name in ("table", "query_positions", "result_columns", "key_positions")}
types |= {name: "constexpr" for name in constants}
names = attention_mass_kernel.arg_names
signature = {name: types.get(name, "i32") for name in names}
# What a launch finds out by itself: torch's memory begins at multiples of 16 bytes, and rows of heads are as long.
aligned = [name for name, kind in signature.items() if kind[0] == "*" or kind == "i32" and "mass" not in name]
attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
compiled = triton.compile(
    ASTSource(attention_mass_kernel, signature, constants, attributes),
    target=GPUTarget("cuda", capability, 32),
    options=options,
)
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(compiled.asm["cubin"])
    file.flush()
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
print(json.dumps({
    "stack": int(re.search(r"STACK:(\\d+)", usage)[1]),
    "local": int(re.search(r"LOCAL:(\\d+)", usage)[1]),
    "shared": compiled.metadata.shared,
    "tensor core": len(re.findall(r"mma\\.sync|wgmma\\.mma_async", compiled.asm["ptx"])),
    "loads ahead": len(re.findall(r"cp\\.async\\.c[ag]", compiled.asm["ptx"])),
}))
"""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "element_size", "dimension", "with_extras"),
    [("bf16", 2, 128, False), ("bf16", 2, 128, True), ("bf16", 2, 256, False), ("fp32", 4, 64, False)],
)
def test_the_kernel_compiles_for_real_gpus(capability, dtype, element_size, dimension, with_extras, tmp_path):
    """For Ampere and Hopper, without one at hand. A stack would mean that registers spill to memory."""
    variant = json.dumps([capability, dtype, element_size, dimension, with_extras])
    figures = json.loads(in_a_fresh_python(COMPILE, variant, TRITON_CACHE_DIR=str(tmp_path)))
    assert figures["stack"] == figures["local"] == 0
    assert figures["shared"] <= 99 * 1024
    assert figures["loads ahead"] > 0
    assert (figures["tensor core"] > 0) == (dtype == "bf16")
