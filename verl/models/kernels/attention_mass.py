# SPDX-License-Identifier: Apache-2.0
"""How much attention response tokens give to the prompt's text and to its images, from rotated queries and keys.

Nothing quadratic in the length is stored and no attention mask is read. A `KeyPlan`, built from the kinds of the keys,
says which queries and keys of a padded or packed batch belong together. A response's query sees every key of its
prompt, so causality matters only among the keys of the response.

Shapes: N samples, R response columns, S sequence length, B batch rows, H heads, Hkv key heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from verl.utils.attention_metrics import KeyKind
from verl.utils.device_copies import to_device
from verl.utils.response_span import response_columns

# The kinds whose attention is summed come first, so that each sum runs over neighbours.
_KEY_ORDER = (KeyKind.TEXT, KeyKind.VISION, KeyKind.PROMPT, KeyKind.SINK, KeyKind.RESPONSE, KeyKind.PADDING)
_RANK_OF_KIND = torch.tensor(_KEY_ORDER).argsort()


class SamplePlan(NamedTuple):
    """Positions of the queries and keys of one sample. Plain integers: reading them does not wait for the device.

    In the plan's `key_positions` the sample's keys are ordered: text, vision, other prompt tokens, sink, response. The
    `end_of_` fields are offsets from the sample's first key.
    """

    row: int  # of the result
    batch_row: int  # of the query and key tensors
    first_query: int  # of the plan's query_positions and result_columns
    num_queries: int
    first_key: int  # of the plan's key_positions
    end_of_text: int
    end_of_vision: int
    end_of_prompt: int
    end_of_sink: int

    @property
    def queries(self) -> slice:
        """The sample's part of `KeyPlan.query_positions` and `KeyPlan.result_columns`."""
        return slice(self.first_query, self.first_query + self.num_queries)

    @property
    def keys(self) -> slice:
        """The sample's part of `KeyPlan.key_positions`."""
        return slice(self.first_key, self.first_key + self.end_of_sink + self.num_queries - 1)


@dataclass(frozen=True)
class KeyPlan:
    """The queries to measure, and the keys that each of them attends to.

    The queries of a sample are its last prompt token and its response tokens without the last: the positions whose
    outputs predict the response. Query i of a sample sees all keys of its prompt and the first i of its response; no
    query sees the last response key. A sample without response or without prompt is left out, and its row of the
    result stays 0.

    samples: the samples that have queries. num_samples: N, of the whole batch. response_length: R.
    query_positions: (Q,) int64, positions in the query tensor, sample after sample.
    result_columns: (Q,) int64, the response column that each query predicts.
    key_positions: (K,) int64, positions in the key tensor, sample after sample.
    table: (len(samples), 9) int64, `samples` as a tensor.
    longest_reach: the shortest sliding window, in tokens, through which every query still sees all its keys.
    """

    samples: tuple[SamplePlan, ...]
    num_samples: int
    response_length: int
    query_positions: torch.Tensor
    result_columns: torch.Tensor
    key_positions: torch.Tensor
    table: torch.Tensor
    longest_reach: int
    _on_devices: dict[torch.device, KeyPlan] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_kinds(cls, key_kinds: torch.Tensor, response_length: int) -> KeyPlan:
        """The plan of a padded batch.

        key_kinds: (N, S) integers of `KeyKind`, on any device; the plan is built on the CPU. The last
            `response_length` columns hold the response; padding may be anywhere.
        """
        rows = key_kinds.cpu()
        place = response_columns(key_kinds.shape[1], response_length)
        assert not bool((rows[:, : place.start] == KeyKind.RESPONSE).any()), "response keys among the prompt's columns"
        columns = [(row[place] == KeyKind.RESPONSE).nonzero().flatten() for row in rows]
        places = torch.arange(key_kinds.shape[1])
        return cls._from_spans([(index, places, row) for index, row in enumerate(rows)], columns, response_length)

    @classmethod
    def from_places(
        cls,
        key_kinds: torch.Tensor,
        places: Sequence[torch.Tensor],
        columns: Sequence[torch.Tensor],
        response_length: int,
    ) -> KeyPlan:
        """The plan of samples that are packed in a single batch row; they may share tokens.

        key_kinds: (total,) integers of `KeyKind`, on any device; the plan is built on the CPU.
        places: for each sample, the positions of its tokens, ascending.
        columns: for each sample, the columns of the result for its response tokens, ascending.
        response_length: R, above every column.
        """
        tokens = key_kinds.cpu()
        spans = [(0, own, tokens[own]) for own in places]
        for (_, _, kinds), own in zip(spans, columns, strict=True):
            assert len(own) == int((kinds == KeyKind.RESPONSE).sum()), "not one column for each response token"
            assert len(own) == 0 or int(own.max()) < response_length, f"a column is not below {response_length}"
        return cls._from_spans(spans, columns, response_length)

    @classmethod
    def _from_spans(
        cls, spans: list[tuple[int, torch.Tensor, torch.Tensor]], columns: Sequence[torch.Tensor], response_length: int
    ) -> KeyPlan:
        """spans: batch row, positions and kinds of each sample. columns: result columns of its response tokens."""
        samples: list[SamplePlan] = []
        nothing = torch.empty(0, dtype=torch.int64)
        queries, result_columns, keys = [nothing], [nothing], [nothing]
        first_query = first_key = longest_reach = 0
        for row, ((batch_row, places, kinds), own_columns) in enumerate(zip(spans, columns, strict=True)):
            ranks = _RANK_OF_KIND[kinds.long()]
            order = ranks.argsort(stable=True)
            positions = places[order]
            ends = torch.bincount(ranks, minlength=len(KeyKind)).cumsum(0).tolist()
            prompt, response = positions[: ends[3]], positions[ends[3] : ends[4]]
            if len(prompt) == 0 or len(response) == 0:
                continue

            assert prompt.max() < response[0], "a prompt key stands after the response's first"
            queries.append(torch.cat([prompt.max().view(1), response[:-1]]))
            keys.append(torch.cat([prompt, response[:-1]]))
            result_columns.append(own_columns)
            own = torch.cat([order[: ends[3]], order[ends[3] : ends[4]][:-1]])  # of its keys, as the sample counts
            longest_reach = max(longest_reach, int(own.max() - own.min()) + 1)
            samples.append(SamplePlan(row, batch_row, first_query, len(response), first_key, *ends[:4]))
            first_query += len(queries[-1])
            first_key += len(keys[-1])

        return cls(
            samples=tuple(samples),
            num_samples=len(spans),
            response_length=response_length,
            query_positions=torch.cat(queries),
            result_columns=torch.cat(result_columns),
            key_positions=torch.cat(keys),
            table=torch.tensor(samples, dtype=torch.int64).view(-1, len(SamplePlan._fields)),
            longest_reach=longest_reach,
        )

    def to(self, device: torch.device) -> KeyPlan:
        """The plan with its tensors on `device`; copied at the first call and kept."""
        if device not in self._on_devices:
            names = ("query_positions", "result_columns", "key_positions", "table")
            self._on_devices[device] = replace(
                self, **{name: to_device(getattr(self, name), device) for name in names}
            )
        return self._on_devices[device]


@torch.no_grad()
def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    plan: KeyPlan,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, in one piece and in float64; tests compare the other back ends with it.

    Arguments as in `chunked`; returns (N, R, 3) float64.
    """
    plan = plan.to(query.device)
    masses = query.new_zeros(plan.num_samples, plan.response_length, 3, dtype=torch.float64)
    for sample in plan.samples:
        sample_query = query[sample.batch_row, :, plan.query_positions[sample.queries]].double()  # (H, Q, D)
        sample_key = key[sample.batch_row, :, plan.key_positions[sample.keys]].double()  # (Hkv, K, D)
        sample_key = sample_key.repeat_interleave(query.shape[1] // key.shape[1], dim=0)  # (H, K, D)
        scores = sample_query @ sample_key.mT * scaling  # (H, Q, K)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device).tril(sample.end_of_sink - 1)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, sample.num_queries, 1)], dim=-1)

        attention = scores.softmax(dim=-1).mean(dim=0)  # (Q, K)
        text = attention[:, : sample.end_of_text].sum(dim=-1)
        vision = attention[:, sample.end_of_text : sample.end_of_vision].sum(dim=-1)
        prompt = attention[:, : sample.end_of_prompt].sum(dim=-1)
        masses[sample.row, plan.result_columns[sample.queries]] = torch.stack([text, vision, prompt], dim=-1)
    return masses


@torch.no_grad()
def chunked(
    query: torch.Tensor,
    key: torch.Tensor,
    plan: KeyPlan,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Attention mass with plain torch operations, one block of scores at a time, in float32.

    The softmax is computed online (Milakov and Gimelshein, arXiv 1805.02867): when a block raises a query's highest
    score, the earlier sums are rescaled. A block holds keys of one kind, so that it adds to one sum.

    query: (B, H, S, D); key: (B, Hkv, S, D), any floating type, as they enter the attention (after rotary embedding).
    plan: says which queries and keys belong together.
    scaling: factor of the query-key products.
    softcap: scores x become softcap * tanh(x / softcap), as in Gemma 2.
    sinks: (H,) an extra score per head in the softmax, whose share goes to no key, as in gpt-oss.
    block: number of queries and of keys in a block, for all heads; None suits the device.

    Returns (N, R, 3) float32: attention, mean over the heads, to text keys, to vision keys, and to all keys of the
    prompt without the sink; 0 where there is no response token. No gradient flows through it.
    """
    plan = plan.to(query.device)
    block_queries, block_keys = block or _block_size(query)
    masses = query.new_zeros(plan.num_samples, plan.response_length, 3, dtype=torch.float32)
    for sample in plan.samples:
        sample_query = _gather(query[sample.batch_row], plan.query_positions[sample.queries])  # (H, Q, D)
        sample_query = sample_query.float() * scaling
        sample_key = _gather(key[sample.batch_row], plan.key_positions[sample.keys])  # (Hkv, K, D)
        sample_key = sample_key.float().mT.contiguous()  # (Hkv, D, K)
        columns = plan.result_columns[sample.queries]
        for first in range(0, sample.num_queries, block_queries):
            rows = slice(first, first + block_queries)
            masses[sample.row, columns[rows]] = _masses_of_queries(
                sample_query[:, rows], sample_key, first, sample, softcap, sinks, block_keys
            )
    return masses


def _gather(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The tokens at `positions` of `states` (H, S, D), as (H, positions, D) contiguous.

    Models compute queries and keys token by token, so the heads of a token are neighbours in memory. On a CPU,
    `index_select` copies whole tokens several times faster than one head after another.
    """
    return states.transpose(0, 1).index_select(0, positions).transpose(0, 1).contiguous()


def _block_size(query: torch.Tensor) -> tuple[int, int]:
    # On a CPU the scores of a block (1 MB) and its keys fit the core's cache; a GPU prefers few, large operations.
    num_scores, block_keys = (2**18, 512) if query.device.type == "cpu" else (2**26, 4096)
    return max(1, num_scores // (query.shape[1] * block_keys)), block_keys


def _masses_of_queries(
    query: torch.Tensor,
    key: torch.Tensor,
    first: int,
    sample: SamplePlan,
    softcap: float | None,
    sinks: torch.Tensor | None,
    block_keys: int,
) -> torch.Tensor:
    """Masses (Q, 3) of consecutive scaled queries (H, Q, D), which begin at query `first` of the sample.

    key: (Hkv, D, K), all keys of the sample.
    """
    heads, length, dimension = query.shape
    query = query.reshape(key.shape[0], -1, dimension)  # (Hkv, H / Hkv * Q, D)
    num_common = sample.end_of_sink + first  # keys that the first query sees; each further query sees one more
    starts = (0, sample.end_of_text, sample.end_of_vision, sample.end_of_prompt)
    ends = (sample.end_of_text, sample.end_of_vision, sample.end_of_prompt, num_common + length - 1)

    # The extra score enters the last sum as one key. Where there is none it is -inf, and the first block wipes it out.
    highest = query.new_full((heads, length, 1), -torch.inf)
    if sinks is not None:
        highest = sinks.float().view(-1, 1, 1).expand_as(highest)
    sums = query.new_zeros(4, heads, length)
    sums[3] = 1.0

    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for left in range(start, end, block_keys):
            right = min(left + block_keys, end)
            scores = torch.bmm(query, key[..., left:right]).view(heads, length, -1)  # (H, Q, k)
            if softcap is not None:
                scores.div_(softcap).tanh_().mul_(softcap)
            if right > num_common:
                future = torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device).triu(num_common - left)
                scores.masked_fill_(future, -torch.inf)
            higher = torch.maximum(highest, scores.amax(dim=-1, keepdim=True))
            sums *= (highest - higher).exp_().squeeze(-1)
            sums[group] += scores.sub_(higher).exp_().sum(dim=-1)
            highest = higher

    text, vision, other = (sums[:3] / sums.sum(dim=0)).mean(dim=1)  # (Q,) each
    return torch.stack([text, vision, text + vision + other], dim=-1)


@torch.no_grad()
def triton(
    query: torch.Tensor,
    key: torch.Tensor,
    plan: KeyPlan,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention mass from one kernel that writes no scores to memory. Arguments and result as in `chunked`.

    Products of bfloat16 or float16 are accumulated in float32; float32 products are not rounded to TF32.

    Raises ImportError if the package `triton` is missing.
    """
    try:
        from verl.models.kernels import attention_mass_triton
    except ImportError as error:
        raise ImportError(
            "attention back end 'triton' needs the package triton, which CUDA builds of torch bring along; "
            "use 'chunked' instead"
        ) from error
    return attention_mass_triton.launch(query, key, plan, scaling, softcap, sinks)


BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"reference": reference, "chunked": chunked, "triton": triton}


def default_backend(device: torch.device) -> str:
    """The name of the fastest of `BACKENDS` on `device`."""
    return "triton" if device.type == "cuda" else "chunked"


def normalised_layer_mean(masses: torch.Tensor) -> torch.Tensor:
    """Mean over layers of the attention to text and vision, as shares of the attention to the prompt without the sink.

    masses: (L, N, R, 3) of the layers, from a back end. Returns (N, R, 2) float32. A token without attention to the
    prompt in a layer adds 0 there.
    """
    prompt = masses[..., 2:]  # (L, N, R, 1)
    shares = torch.where(prompt == 0, 0.0, masses[..., :2] / prompt)  # (L, N, R, 2)
    return shares.mean(dim=0).float()
