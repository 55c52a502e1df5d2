# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_token_layout.py
"""Rows packed end to end give what padded rows give, and no sample sees another."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from itertools import accumulate, pairwise

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import modeling_flash_attention_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.batches import answer_at_random, make_prompts, with_random_weights
from tests.family_models import EXPERTS, SHARED
from tests.probe import (
    RESPONSE_LENGTH,
    RESPONSES_PER_PROMPT,
    WITH_CRITIC,
    ProbeWorker,
    make_config,
    start_alone,
    start_two,
)
from tests.tiny import make_tiny_text_model
from tests.vlm_zoo import FAMILIES, TEXT_CONFIG, make_model, model_inputs, write_prompts
from verl.models.attention_table import NOT_A_MASK, SAMPLES, PackedSamples, extend_attention
from verl.models.position_ids import prompt_position_ids
from verl.models.token_layout import PackedLayout, PaddedLayout, why_not_packed
from verl.protocol import DataProto

COLLECT = "worker.rollout.collect_attentions=true"
PADDED, PACKED = "worker.actor.padding_free=false", "worker.actor.padding_free=true"
PROMPTS = ("sptt1tttp", "stt2t1tttttp", "sttttttp", "s3p", "sptttt1ttptttt")


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight rows with token weights: four with images, one of them two, and four of text alone."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    return with_random_weights(answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH))


@pytest.fixture(scope="module")
def text_batch(batch: DataProto) -> DataProto:
    """The four rows of text alone, as a text model's: one position a token."""
    rows = batch[4:]
    rows.batch["position_ids"] = rows.batch["position_ids"][:, 0].clone()
    return rows


def assert_same_training(config_of_padded: list[str], config_of_packed: list[str], path: str, rows: DataProto) -> None:
    padded, packed = (start_alone(make_config(path, COLLECT, *keys)) for keys in (config_of_padded, config_of_packed))
    assert (padded.actor.forward.packs, packed.actor.forward.packs) == (False, True)
    expected, found = (dict(worker.compute_log_probs(rows).batch.items()) for worker in (padded, packed))
    assert set(expected) == {"old_log_probs", "attention_mass", "attention_keys"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)
    for mode in ("token", "seq"):
        (gradients, metrics), (others, other_metrics) = (worker.gradients(rows, mode) for worker in (padded, packed))
        assert other_metrics == pytest.approx(metrics, rel=1e-5)
        for name, value in gradients.items():
            torch.testing.assert_close(others[name], value, atol=1e-5 * value.abs().max().item() + 1e-9, rtol=0)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_packed_rows_train_as_padded_rows_do(
    checkpointing: str, tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """Also where layers run once more in the backward pass, long after the forward."""
    switch = f"worker.actor.model.enable_gradient_checkpointing={checkpointing}"
    assert_same_training([PADDED, switch], [PACKED, switch], tiny_model_path, batch)


def test_packed_rows_of_a_text_model_train_as_padded_rows_do(tmp_path, text_batch, lone_process_group) -> None:
    few = ["worker.actor.micro_batch_size_per_device_for_update=4"]
    few.append("worker.actor.global_batch_size=2")
    assert_same_training([PADDED, *few], [PACKED, *few], make_tiny_text_model(tmp_path / "text"), text_batch)


def test_packed_rows_have_the_values_of_padded_rows(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    workers = []
    for switch in ("false", "true"):
        worker = start_alone(make_config(tiny_model_path, *WITH_CRITIC, f"worker.critic.padding_free={switch}"))
        worker.fill_value_head()
        workers.append(worker)
    assert [worker.critic.forward.packs for worker in workers] == [False, True]
    values, others = (worker.compute_values(batch).batch["values"] for worker in workers)
    torch.testing.assert_close(others, values, atol=1e-5, rtol=0)
    (gradients, _), (other_gradients, _) = (worker.critic_gradients(batch, "token") for worker in workers)
    for name, value in gradients.items():
        torch.testing.assert_close(
            other_gradients[name], value, atol=1e-5 * value.abs().max().item() + 1e-9, rtol=0, msg=name
        )


def test_a_full_kl_is_the_same_packed(tiny_model_path: str, batch: DataProto, lone_process_group) -> None:
    found = []
    for switch in (PADDED, PACKED):
        worker = start_alone(make_config(tiny_model_path, "algorithm.kl_penalty=full", switch))
        worker.scale_weights(2.0)
        found.append((worker.compute_ref_kl(batch).batch["ref_kl"], worker.gradients(batch, "token")))
    (kl, (gradients, _)), (other_kl, (others, _)) = found
    assert kl.abs().max() > 1e-3
    torch.testing.assert_close(other_kl, kl, atol=1e-5, rtol=1e-4)
    for name, value in gradients.items():
        torch.testing.assert_close(others[name], value, atol=1e-5 * value.abs().max().item() + 1e-9, rtol=0)


def test_rows_without_a_response_take_no_part(tiny_model_path: str, batch: DataProto, lone_process_group) -> None:
    """Each is a micro-batch of its own, in which nothing is to be predicted."""
    rows = DataProto.concat([batch[:1], batch[4:6], batch[7:]])
    rows.batch = rows.batch.clone()
    rows.batch["response_mask"][:2] = 0
    rows.batch["attention_mask"][:2, -RESPONSE_LENGTH:] = 0
    few = ["worker.actor.micro_batch_size_per_device_for_update=1", "worker.actor.dynamic_batching=false"]
    few += ["worker.actor.micro_batch_size_per_device_for_experience=1"]
    assert_same_training([PADDED, *few], [PACKED, *few], tiny_model_path, rows)
    found = start_alone(make_config(tiny_model_path, PADDED, COLLECT, *few)).compute_log_probs(rows).batch
    for stream in ("old_log_probs", "attention_mass"):
        assert not found[stream][:2].any()
        assert found[stream][2:].any()


@pytest.mark.parametrize("turns", ["between", "behind"])
@pytest.mark.parametrize("layout", [[PADDED], [PACKED, "worker.actor.share_prompts=false"], [PACKED]])
def test_tokens_of_other_turns_move_no_stream_to_another_token(
    layout: list[str], turns: str, tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """A tool's tokens between two turns of a response, or behind its last, are read by the model and not the policy's.

    Taken for such, they leave the streams of all other tokens as they were.
    """
    wanted = ["log_probs", "entropy", "image_kl", "attention_mass", "attention_keys", "hidden_cosine"]
    signals = "algorithm.token_signals_to_log=[image_kl,hidden_cosine,entropy]"
    worker = start_alone(make_config(tiny_model_path, COLLECT, signals, *layout))
    rows = batch[torch.arange(len(batch))]
    whole = worker.measured(rows, wanted).batch
    mask = rows.batch["response_mask"]
    for row in mask:
        length = int(row.sum())
        if length >= 3:
            row[1 if turns == "between" else length - 1] = 0
    assert (mask.sum(1) < batch.batch["response_mask"].sum(1)).sum() >= 5
    found = worker.measured(rows, wanted).batch
    assert torch.equal(found["attention_keys"], whole["attention_keys"])
    for name in set(wanted) - {"attention_keys"}:
        is_response = mask.bool() if name != "attention_mass" else mask[:, :, None].bool()
        expected = torch.where(is_response, whole[name], 0)
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4, equal_nan=True, msg=name)


def test_both_layouts_hold_the_same_tokens_in_the_same_order(batch: DataProto) -> None:
    is_response = batch.batch["response_mask"].bool()
    labels = batch.batch["responses"][is_response]
    values = torch.arange(len(labels), dtype=torch.float32)
    for layout in (PaddedLayout(batch), PackedLayout(batch)):
        assert torch.equal(layout.labels(), labels)
        streams = layout.as_streams(["up", "down"], torch.stack([values, -values], dim=-1))
        assert torch.equal(streams["up"][is_response], values)
        assert torch.equal(streams["down"], -streams["up"])
        assert (streams["up"][~is_response] == 0).all()
        pairs = torch.stack([streams["up"], streams["down"]], dim=-1)  # (N, R, 2)
        assert torch.equal(layout.pad_masses(pairs[:, : layout.length]), pairs)
    packed = PackedLayout(batch)
    assert len(packed.input_ids) == packed.borders[-1] == batch.batch["attention_mask"].sum()
    for row, (start, end) in enumerate(pairwise(packed.borders)):
        is_real = batch.batch["attention_mask"][row].bool()
        assert torch.equal(packed.input_ids[start:end], batch.batch["input_ids"][row][is_real])
        assert torch.equal(packed.position_ids[:, start:end], batch.batch["position_ids"][row][:, is_real])


# ---- every family that can be packed ----


def packed_logits(model: nn.Module, family, input_ids, attention_mask, images) -> torch.Tensor:
    """(T, V) of all rows' real tokens end to end."""
    inputs = model_inputs(family, input_ids, attention_mask, images)
    positions = [
        prompt_position_ids(model.config, ids, mask, grid_of(inputs, images, row))
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True))
    ]
    is_real = attention_mask.bool()
    position_ids = torch.cat([own[..., real] for own, real in zip(positions, is_real, strict=True)], dim=-1)
    lengths = attention_mask.sum(dim=1).cumsum(0).tolist()
    media = {
        name: value for name, value in inputs.items() if name in ("pixel_values", "image_grid_thw", "image_sizes")
    }
    extend_attention()
    with torch.no_grad():
        return model(
            input_ids=input_ids[is_real][None],
            attention_mask=torch.empty(NOT_A_MASK),
            position_ids=position_ids.unsqueeze(-2),
            use_cache=False,
            **{SAMPLES: PackedSamples((0, *lengths))},
            **media,
        ).logits[0]


def grid_of(inputs, images, row: int) -> dict[str, torch.Tensor]:
    if "image_grid_thw" not in inputs:
        return {}
    first = sum(len(own) for own in images[:row])
    return {"image_grid_thw": inputs["image_grid_thw"][first : first + len(images[row])]} if images[row] else {}


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL"])
def test_a_family_says_of_packed_prompts_what_it_says_of_padded_ones(name: str) -> None:
    family = FAMILIES[name]
    model = make_model(family.class_name, family.config())
    assert why_not_packed(model) is None
    prompts = write_prompts(family, PROMPTS)
    with torch.no_grad():
        inputs = model_inputs(family, prompts.input_ids, prompts.attention_mask, prompts.images)
        padded = model(**inputs, use_cache=False).logits[prompts.attention_mask.bool()]
    found = packed_logits(model, family, prompts.input_ids, prompts.attention_mask, prompts.images)
    torch.testing.assert_close(found, padded, atol=1e-5, rtol=1e-5)


def packed_logits_of(model: nn.Module, rows: list[torch.Tensor]) -> torch.Tensor:
    """(T, V) of a text model's rows end to end."""
    extend_attention()
    lengths = [len(row) for row in rows]
    return model(
        input_ids=torch.cat(rows)[None],
        attention_mask=torch.empty(NOT_A_MASK),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        use_cache=False,
        **{SAMPLES: PackedSamples(tuple(accumulate(lengths, initial=0)))},
    ).logits[0]


@pytest.mark.parametrize(
    ("config_class", "extra"),
    [
        ("Qwen2Config", {}),
        ("Qwen3Config", {}),
        ("MistralConfig", {"sliding_window": 4}),
        ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
        ("Qwen2MoeConfig", {"use_sliding_window": True, "sliding_window": 4, **EXPERTS, **SHARED}),
        ("PhimoeConfig", {"sliding_window": 4}),
        ("Gemma2Config", {"sliding_window": 4, "query_pre_attn_scalar": 16}),
    ],
)
def test_text_models_with_windows_and_experts_keep_their_samples_apart(config_class: str, extra: dict) -> None:
    """Rows of 14, 9 and 5 tokens: a window of four tokens is shorter than each."""
    config = getattr(transformers, config_class)(**{**TEXT_CONFIG, **extra})
    model = make_model(config_class.replace("Config", "ForCausalLM"), config)
    assert why_not_packed(model) is None
    rows = [torch.randint(1, 90, (length,), generator=torch.Generator().manual_seed(length)) for length in (14, 9, 5)]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
        packed = packed_logits_of(model, rows)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_flash_attention_is_given_the_borders_and_no_mask(window: int | None, monkeypatch) -> None:
    """A stand-in for its kernel, which needs a GPU: by its arguments as `flash_attn` names them, computed here."""

    def varlen(query, key, value, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, **options):
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert (cu_seqlens_q.tolist(), max_seqlen_q, max_seqlen_k, causal) == ([0, 14, 23, 28], 14, 14, True)
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        left = options.get("window_size", (28, 28))[0]
        place, sample = torch.arange(28), torch.searchsorted(cu_seqlens_q, torch.arange(28), right=True)
        behind = place[:, None] - place  # (28, 28)
        mask = (behind >= 0) & (behind <= left) & (sample[:, None] == sample)
        heads = (tensor.transpose(0, 1) for tensor in (query, key, value))
        output = nn.functional.scaled_dot_product_attention(
            *heads, mask, scale=options["softmax_scale"], enable_gqa=True
        )
        return output.transpose(0, 1)

    def kernels(implementation: str) -> tuple:
        assert implementation == "flash_attention_2"
        names = ("max_seqlen_q", "max_seqlen_k", "window_size")
        supported = defaultdict(bool, dict.fromkeys(names, True))
        return (None, varlen, None, None, None), (partial(process_keywords, supports_mapping=supported), None)

    process_keywords = modeling_flash_attention_utils._process_flash_attention_kwargs
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", kernels)
    model = make_model("MistralForCausalLM", transformers.MistralConfig(**TEXT_CONFIG, sliding_window=window))
    rows = [torch.randint(1, 90, (length,), generator=torch.Generator().manual_seed(length)) for length in (14, 9, 5)]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
        model.config._attn_implementation_internal = "flash_attention_2"  # the setter wants the library
        packed = packed_logits_of(model, rows)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("window", [None, 4])
def test_responses_that_continue_a_prompt_are_given_its_keys(
    window: int | None, implementation: str, monkeypatch
) -> None:
    """Two prompts with two responses and one, against each row alone. FlashAttention's kernel is a stand-in, which
    lets the last query of a piece see the last of its keys."""

    def varlen(query, key, value, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, **options):
        assert causal and cu_seqlens_q.tolist() == [0, 9, 14, 17, 21, 27]
        assert cu_seqlens_k.tolist() == [0, 9, 23, 35, 39, 49] and (max_seqlen_q, max_seqlen_k) == (9, 14)
        left = options.get("window_size", (99, 99))[0]
        outputs = []
        for (first, last), (start, end) in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True):
            places = torch.arange(end - start)
            behind = places[-(last - first) :, None] - places
            heads = (tensor.transpose(0, 1) for tensor in (query[first:last], key[start:end], value[start:end]))
            mask, scale = (behind >= 0) & (behind <= left), options["softmax_scale"]
            output = nn.functional.scaled_dot_product_attention(*heads, mask, scale=scale, enable_gqa=True)
            outputs.append(output.transpose(0, 1))
        return torch.cat(outputs)

    def kernels(_: str) -> tuple:
        supported = defaultdict(bool, dict.fromkeys(("max_seqlen_q", "max_seqlen_k", "window_size"), True))
        return (None, varlen, None, None, None), (partial(process_keywords, supports_mapping=supported), None)

    process_keywords = modeling_flash_attention_utils._process_flash_attention_kwargs
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", kernels)
    model = make_model("MistralForCausalLM", transformers.MistralConfig(**TEXT_CONFIG, sliding_window=window))
    generator = torch.Generator().manual_seed(0)
    one, a, b, other, c = (torch.randint(1, 90, (length,), generator=generator) for length in (9, 5, 3, 4, 6))
    positions = [torch.arange(9), 9 + torch.arange(5), 9 + torch.arange(3), torch.arange(4), 4 + torch.arange(6)]
    samples = PackedSamples((0, 9, 14, 17, 21, 27), None, (None, 0, 0, None, 3))
    extend_attention()
    with torch.no_grad():
        rows = [torch.cat(row)[None] for row in ((one, a), (one, b), (other, c))]
        alone = [model(input_ids=row, use_cache=False).logits[0] for row in rows]
        model.config._attn_implementation_internal = implementation  # the setter wants the library
        shared = model(
            input_ids=torch.cat([one, a, b, other, c])[None],
            attention_mask=torch.empty(NOT_A_MASK),
            position_ids=torch.cat(positions)[None],
            use_cache=False,
            **{SAMPLES: samples},
        ).logits[0]
    expected = torch.cat([alone[0], alone[1][9:], alone[2]])
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=1e-5)


def test_the_backward_pass_of_a_packed_row_grows_with_its_length_and_not_with_its_square() -> None:
    class NumbersMade(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.total += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            return result

    def numbers_of(num_groups: int) -> int:
        lengths, continued = [5, 3, 3] * num_groups, [None, 0, 0]
        samples = PackedSamples(
            tuple(accumulate(lengths, initial=0)),
            None,
            tuple(None if one is None else 3 * group + one for group in range(num_groups) for one in continued),
        )
        query, key, value = (torch.randn(1, 4, sum(lengths), 8, requires_grad=True) for _ in range(3))
        output, _ = attend(layer, query, key, value, torch.empty(NOT_A_MASK), **{SAMPLES: samples})
        with NumbersMade() as made:
            output.sum().backward()
        return made.total

    extend_attention()
    layer = make_model("Qwen2ForCausalLM", transformers.Qwen2Config(**TEXT_CONFIG)).model.layers[0].self_attn
    attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
    assert numbers_of(32) < 4.5 * numbers_of(8)


def test_a_model_whose_layers_look_along_the_row_is_not_packed() -> None:
    hybrid = make_model(FAMILIES["Qwen3.5"].class_name, FAMILIES["Qwen3.5"].config())
    assert why_not_packed(hybrid) == "it has layers of convolution, linear_attention, which mix tokens along the row"
    eager = make_model("Qwen2ForCausalLM", transformers.Qwen2Config(**TEXT_CONFIG), "eager")
    assert why_not_packed(eager) == "attn_implementation=eager does not keep samples apart"


def test_attention_that_does_not_come_from_the_table_fails_on_packed_rows(monkeypatch) -> None:
    """Rather than let one sample see another."""
    model = make_model("Qwen2ForCausalLM", transformers.Qwen2Config(**TEXT_CONFIG))
    extend_attention()
    monkeypatch.delitem(vars(ALL_ATTENTION_FUNCTIONS), "get_interface")
    with pytest.raises(RuntimeError), torch.no_grad():
        model(
            input_ids=torch.arange(1, 9)[None],
            attention_mask=torch.empty(NOT_A_MASK),
            position_ids=torch.arange(8)[None] % 4,
            **{SAMPLES: PackedSamples((0, 4, 8))},
        )


def test_a_model_that_keeps_the_borders_from_its_attention_is_told_of_the_switch() -> None:
    model = make_model("NemotronForCausalLM", transformers.NemotronConfig(**TEXT_CONFIG))
    with (
        pytest.raises(RuntimeError, match="NemotronAttention does not learn .* padding_free=false"),
        torch.no_grad(),
    ):
        packed_logits_of(model, [torch.arange(1, 5), torch.arange(1, 4)])


# ---- micro-batches by tokens ----


def micro_batch_sizes(worker: ProbeWorker, batch: DataProto, size: int) -> list[int]:
    return [len(rows) for rows in worker.actor.forward.micro_batches(batch, size)[0]]


def test_micro_batches_are_filled_by_tokens_where_that_is_asked_for(
    tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    """Eight rows of at most 108 tokens: two micro-batches of four rows hold all of them, but by tokens one does."""
    by_tokens = start_alone(make_config(tiny_model_path, PACKED, "worker.actor.dynamic_batching=true"))
    by_rows = start_alone(make_config(tiny_model_path, PACKED, "worker.actor.dynamic_batching=false"))
    assert batch.batch["attention_mask"].sum() <= 4 * 108
    assert micro_batch_sizes(by_tokens, batch, 4) == [8]
    assert micro_batch_sizes(by_rows, batch, 4) == [4, 4]
    assert len(micro_batch_sizes(by_tokens, batch, 1)) < len(micro_batch_sizes(by_rows, batch, 1)) == 8
    for size in (1, 2, 4):
        for worker in (by_tokens, by_rows):
            padded = batch.batch["input_ids"].shape[1]
            pieces, places = worker.actor.forward.micro_batches(batch, size)
            assert sorted(row for rows in places for row in rows) == list(range(8))
            assert all(rows.batch["attention_mask"].sum() <= size * padded for rows in pieces)


def test_two_ranks_with_other_lengths_take_as_many_micro_batches(
    tiny_model_path: str, batch: DataProto, lone_process_group, ray_cluster
) -> None:
    """Image rows are on rank 0 and longer, so that it needs more; a rank with fewer would leave the other waiting."""
    small = ["worker.actor.micro_batch_size_per_device_for_update=1", PACKED, COLLECT]
    group = start_two(make_config(tiny_model_path, *small))
    try:
        gradients, metrics = group.gradients(batch, "token")
        streams = dict(group.compute_log_probs(batch).batch.items())
    finally:
        group.release()
    alone = start_alone(make_config(tiny_model_path, PADDED, COLLECT))
    expected, expected_metrics = alone.gradients(batch, "token")
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, atol=1e-5 * value.abs().max().item() + 1e-9, rtol=0)
    for name, value in alone.compute_log_probs(batch).batch.items():
        torch.testing.assert_close(streams[name], value, atol=1e-5, rtol=0)
