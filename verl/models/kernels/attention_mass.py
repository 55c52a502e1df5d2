# SPDX-License-Identifier: Apache-2.0
"""How much attention response tokens give to the prompt's text and to its images, from rotated queries and keys.

Nothing quadratic in the length is kept and no attention mask is read: a `KeyPlan`, made from the kinds of the keys,
says which queries and keys of a padded or packed batch belong together. A response's query sees every key of its own
prompt, so causality matters only among the response's own keys.

Shapes: N samples, R response columns, S sequence length, B batch rows, H heads, Hkv key heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from verl.utils.attention_metrics import KeyKind

# The kinds whose attention is summed come first, so that each sum is one over neighbours.
_KEY_ORDER = (KeyKind.TEXT, KeyKind.VISION, KeyKind.PROMPT, KeyKind.SINK, KeyKind.RESPONSE, KeyKind.PADDING)
_RANK_OF_KIND = torch.tensor(_KEY_ORDER).argsort()

_CPU_CHUNK = 2**18
_GPU_CHUNK = 2**27


@dataclass(frozen=True)
class SamplePlan:
    """Where the queries and keys of one sample are.

    index: row of the result. batch_row: row of the query and key tensors. queries: its part of the plan's
    `query_positions` and `result_columns`. keys: its part of `key_positions`, in the order text, vision, other prompt
    tokens, sink, response. num_text, num_vision: how many keys these kinds have. num_prompt: of the first three
    together. num_prompt_and_sink: of the first four; response keys are the rest.
    """

    index: int
    batch_row: int
    queries: slice
    keys: slice
    num_text: int
    num_vision: int
    num_prompt: int
    num_prompt_and_sink: int


@dataclass(frozen=True)
class KeyPlan:
    """Which queries to measure, and among which keys each shares its attention.

    The queries of a sample are its last prompt token and its response tokens but the last: the positions whose outputs
    predict the response. Query i of a sample sees all keys of its prompt and the first i of its response; nobody sees
    the last. A sample without response, or without prompt (no mass to measure, no query for its first token), is left
    out and its rows of the result stay 0.

    samples: those that have queries. num_samples: N, of the whole batch. response_length: R.
    query_positions: (Q,) int64, places in the query tensor, one sample after the other.
    result_columns: (Q,) int64, the response column that each query predicts.
    key_positions: (K,) int64, places in the key tensor, one sample after the other.
    """

    samples: tuple[SamplePlan, ...]
    num_samples: int
    response_length: int
    query_positions: torch.Tensor
    result_columns: torch.Tensor
    key_positions: torch.Tensor
    _on_devices: dict[torch.device, KeyPlan] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def from_kinds(cls, key_kinds: torch.Tensor, response_length: int) -> KeyPlan:
        """The plan of a padded batch.

        key_kinds: (N, S) integers of `KeyKind`, on any device; made once per forward, on the CPU. The last
            `response_length` columns are the response's; padding may stand anywhere.
        """
        rows = key_kinds.cpu()
        first_column = key_kinds.shape[1] - response_length
        assert not bool((rows[:, :first_column] == KeyKind.RESPONSE).any()), "response keys among the prompt's columns"
        columns = [(row[first_column:] == KeyKind.RESPONSE).nonzero().flatten() for row in rows]
        return cls._of([(index, 0, row) for index, row in enumerate(rows)], columns, response_length)

    @classmethod
    def from_packed_kinds(
        cls, key_kinds: torch.Tensor, cumulative_lengths: torch.Tensor | Sequence[int], response_length: int
    ) -> KeyPlan:
        """The plan of samples that lie end to end in a single batch row.

        key_kinds: (total,) integers of `KeyKind`, on any device.
        cumulative_lengths: (N + 1,) integers; sample n is the tokens from the nth of them to the one before the next.
        response_length: R; no response is longer. Each response's result begins at column 0.
        """
        tokens = key_kinds.cpu()
        borders = torch.as_tensor(cumulative_lengths).tolist()
        spans = [(0, start, tokens[start:end]) for start, end in zip(borders[:-1], borders[1:], strict=True)]
        columns = [torch.arange(int((kinds == KeyKind.RESPONSE).sum())) for _, _, kinds in spans]
        assert all(len(own) <= response_length for own in columns), f"a response is longer than {response_length}"
        return cls._of(spans, columns, response_length)

    @classmethod
    def _of(
        cls, spans: list[tuple[int, int, torch.Tensor]], columns: list[torch.Tensor], response_length: int
    ) -> KeyPlan:
        """spans: batch row, first position and kinds of each sample. columns: of the response tokens of each."""
        samples: list[SamplePlan] = []
        queries, result_columns, keys = [], [], []
        num_queries = num_keys = 0
        for index, ((batch_row, start, kinds), own_columns) in enumerate(zip(spans, columns, strict=True)):
            count = torch.bincount(kinds.long(), minlength=len(KeyKind)).tolist()
            num_prompt = count[KeyKind.TEXT] + count[KeyKind.VISION] + count[KeyKind.PROMPT]
            num_prompt_and_sink = num_prompt + count[KeyKind.SINK]
            num_responses = count[KeyKind.RESPONSE]
            if num_responses == 0 or num_prompt_and_sink == 0:
                continue

            positions = start + _RANK_OF_KIND[kinds.long()].argsort(stable=True)
            prompt = positions[:num_prompt_and_sink]
            response = positions[num_prompt_and_sink : num_prompt_and_sink + num_responses]
            assert prompt.max() < response[0], "a prompt key stands after the response began"
            queries.append(torch.cat([prompt.max().view(1), response[:-1]]))
            keys.append(torch.cat([prompt, response[:-1]]))
            result_columns.append(own_columns)
            samples.append(
                SamplePlan(
                    index,
                    batch_row,
                    slice(num_queries, num_queries + len(queries[-1])),
                    slice(num_keys, num_keys + len(keys[-1])),
                    count[KeyKind.TEXT],
                    count[KeyKind.VISION],
                    num_prompt,
                    num_prompt_and_sink,
                )
            )
            num_queries, num_keys = samples[-1].queries.stop, samples[-1].keys.stop

        def join(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat([torch.empty(0, dtype=torch.int64), *parts])

        return cls(tuple(samples), len(spans), response_length, join(queries), join(result_columns), join(keys))

    def to(self, device: torch.device) -> KeyPlan:
        """The plan with its tensors on `device`; copied at the first call and kept."""
        if device not in self._on_devices:
            self._on_devices[device] = KeyPlan(
                self.samples,
                self.num_samples,
                self.response_length,
                self.query_positions.to(device),
                self.result_columns.to(device),
                self.key_positions.to(device),
            )
        return self._on_devices[device]


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    plan: KeyPlan,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, all at once and in float64: what the other back ends are measured against.

    Arguments as in `chunked`; returns (N, R, 3) float64.
    """
    plan = plan.to(query.device)
    masses = query.new_zeros(plan.num_samples, plan.response_length, 3, dtype=torch.float64)
    for sample in plan.samples:
        own_query = query[sample.batch_row, :, plan.query_positions[sample.queries]].double()  # (H, Q, D)
        own_key = key[sample.batch_row, :, plan.key_positions[sample.keys]].double()  # (Hkv, K, D)
        own_key = own_key.repeat_interleave(query.shape[1] // key.shape[1], dim=0)  # (H, K, D)
        scores = own_query @ own_key.mT * scaling  # (H, Q, K)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)

        num_queries, num_keys = scores.shape[1:]
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        visible = visible.tril(sample.num_prompt_and_sink - 1)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, num_queries, 1)], dim=-1)
        attention = scores.softmax(dim=-1).mean(dim=0)  # (Q, K)
        masses[sample.index, plan.result_columns[sample.queries]] = _group_sums(attention, sample)
    return masses


def chunked(
    query: torch.Tensor,
    key: torch.Tensor,
    plan: KeyPlan,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    chunk_elements: int | None = None,
) -> torch.Tensor:
    """Attention mass in float32 with plain torch operations, some queries at a time.

    query: (B, H, S, D); key: (B, Hkv, S, D), any floating type, as they enter the attention (after rotary embedding).
    plan: which of them belong together.
    scaling: what their products are multiplied by.
    softcap: scores x become softcap * tanh(x / softcap), as in Gemma 2.
    sinks: (H,) one more score for every query of a head, whose attention goes nowhere, as in gpt-oss.
    chunk_elements: how many scores are held at a time.

    Returns (N, R, 3) float32: attention, mean over the heads, on text keys, on vision keys, and on all keys of the
    prompt but the sink; 0 where there is no response token.
    """
    plan = plan.to(query.device)
    heads, dimension = query.shape[1], query.shape[3]
    key_heads = key.shape[1]
    if chunk_elements is None:
        chunk_elements = _CPU_CHUNK if query.device.type == "cpu" else _GPU_CHUNK
    masses = query.new_zeros(plan.num_samples, plan.response_length, 3, dtype=torch.float32)
    for sample in plan.samples:
        query_positions = plan.query_positions[sample.queries]
        columns = plan.result_columns[sample.queries]
        own_key = key[sample.batch_row].index_select(1, plan.key_positions[sample.keys]).float().mT  # (Hkv, D, K)
        rows = max(1, chunk_elements // (heads * own_key.shape[2]))
        for first in range(0, len(columns), rows):
            chunk = slice(first, first + rows)
            own_query = query[sample.batch_row].index_select(1, query_positions[chunk]).float() * scaling  # (H, c, D)
            length = own_query.shape[1]
            num_keys = sample.num_prompt_and_sink + first + length - 1  # the last of these queries sees so many
            scores = own_query.reshape(key_heads, -1, dimension) @ own_key[..., :num_keys]
            scores = scores.view(heads, length, num_keys)
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            future = torch.ones(length, length - 1, dtype=torch.bool, device=query.device).triu()
            scores[..., num_keys - (length - 1) :].masked_fill_(future, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks.float().view(-1, 1, 1).expand(-1, length, 1)], dim=-1)
            attention = scores.softmax(dim=-1).mean(dim=0)  # (c, K)
            masses[sample.index, columns[chunk]] = _group_sums(attention, sample)
    return masses


def _group_sums(attention: torch.Tensor, sample: SamplePlan) -> torch.Tensor:
    """attention: (Q, K) on keys in the plan's order. Returns (Q, 3): on text, vision, the prompt without the sink."""
    sizes = [sample.num_text, sample.num_vision, sample.num_prompt - sample.num_text - sample.num_vision]
    text, vision, other = (part.sum(dim=-1) for part in attention[:, : sample.num_prompt].split(sizes, dim=-1))
    return torch.stack([text, vision, text + vision + other], dim=-1)


BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"reference": reference, "chunked": chunked}


def default_backend(device: torch.device) -> str:
    """The name of the fastest of `BACKENDS` on `device`."""
    return "triton" if device.type == "cuda" else "chunked"


def normalised_layer_mean(masses: torch.Tensor) -> torch.Tensor:
    """Mean over layers of each one's attention to text and vision, as shares of that to the prompt without the sink.

    masses: (L, N, R, 3) of the layers, from a back end. Returns (N, R, 2) float32. A token that gives the prompt
    nothing in a layer adds 0 there.
    """
    prompt = masses[..., 2:]  # (L, N, R, 1)
    shares = torch.where(prompt == 0, 0.0, masses[..., :2] / prompt)  # (L, N, R, 2)
    return shares.mean(dim=0).float()
