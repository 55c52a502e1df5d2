# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_hf_rollout.py
"""What is the Hugging Face rollout's own: portions, its copy of the weights, ranks that share a sharded policy.

What it promises as every engine does is in tests/test_rollout.py.
"""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

from tests.batches import PROMPT_LENGTH, make_prompts
from verl.data.features import Featurizer
from verl.models.registry import media_token_ids, media_token_types
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.utils.tokenizer import get_processor, get_tokenizer
from verl.workers.rollout.base import Sampling, draw_seed
from verl.workers.rollout.config import RolloutConfig
from verl.workers.rollout.hf_rollout import HFRollout, _LogProbsOfDraws

RESPONSE_LENGTH = 20
GREEDY = Sampling(n=1, temperature=0.0, top_p=1.0, top_k=-1, ignore_eos=False)
RANDOM = Sampling(n=4, temperature=1.0, top_p=1.0, top_k=-1, ignore_eos=False)


@pytest.fixture(scope="module")
def prompts(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    return make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))


def load(model_path: str) -> AutoModelForImageTextToText:
    return AutoModelForImageTextToText.from_pretrained(model_path, dtype=torch.float32)


def build(model_path: str, **config) -> HFRollout:
    return HFRollout(
        load(model_path),
        get_tokenizer(model_path),
        Featurizer(get_processor(model_path)),
        RolloutConfig(name="hf", disable_tqdm=True, **config),
        RESPONSE_LENGTH,
        torch.device("cpu"),
    )


def test_generating_in_small_portions_changes_nothing(tiny_model_path: str, prompts: DataProto) -> None:
    whole = build(tiny_model_path).generate(prompts, GREEDY, seed=0)
    portions = build(tiny_model_path, max_num_batched_tokens=PROMPT_LENGTH + RESPONSE_LENGTH)
    assert torch.equal(whole.batch["responses"], portions.generate(prompts, GREEDY, seed=0).batch["responses"])


@pytest.mark.parametrize("ends_early", [False, True])
@pytest.mark.parametrize(
    "sampling",
    [replace(GREEDY, n=3), RANDOM, replace(RANDOM, top_p=0.8), replace(RANDOM, top_k=20, ignore_eos=True)],
    ids=["greedy", "sampled", "top_p", "top_k"],
)
def test_one_prefill_a_prompt_gives_what_one_a_response_gives(
    sampling: Sampling, ends_early: bool, tiny_model_path: str, prompts: DataProto
) -> None:
    """For the same seed, also where responses end at all lengths, the first of them with its first token."""
    rollout = build(tiny_model_path)
    if ends_early:
        first_token = int(rollout.generate(prompts, sampling, seed=3).batch["responses"][0, 0])
        rollout.eos_token_ids = [first_token, *range(0, len(get_tokenizer(tiny_model_path)), 7)]
    prefilled = []
    count = rollout.model.register_forward_pre_hook(
        lambda _, args, inputs: prefilled.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    batch = rollout.generate(prompts, sampling, seed=3).batch
    count.remove()
    assert [shape for shape in prefilled if shape[1] > 1] == [(len(prompts), prefilled[0][1])]

    torch.manual_seed(draw_seed(3, 0))
    slow = one_prefill_a_response(rollout, prompts, sampling)  # (N, up to R)
    mask = batch["response_mask"].bool()
    assert torch.equal(batch["responses"][:, : slow.shape[1]], slow)
    assert (batch["responses"][~mask] == rollout.pad_token_id).all()
    lengths = mask.sum(dim=1)
    assert (lengths[0] == 1) == (ends_early and not sampling.ignore_eos)
    assert lengths.max() > 1


@torch.no_grad()
def one_prefill_a_response(rollout: HFRollout, prompts: DataProto, sampling: Sampling) -> torch.Tensor:
    """Responses (N, up to R) of transformers' `generate` alone, given every prompt `sampling.n` times."""
    rows = prompts[torch.arange(len(prompts)).repeat_interleave(sampling.n)]
    input_ids = rows.batch["input_ids"]
    sequences = rollout.model.generate(
        input_ids=input_ids,
        attention_mask=rows.batch["attention_mask"],
        **rollout.featurizer.featurize(rows.non_tensor_batch["multi_modal_data"]),
        **media_token_types(rollout.model.config, input_ids),
        generation_config=GenerationConfig(
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None,
            top_p=sampling.top_p,
            top_k=max(sampling.top_k, 0),
            max_new_tokens=RESPONSE_LENGTH,
            eos_token_id=None if sampling.ignore_eos else rollout.eos_token_ids,
            pad_token_id=rollout.pad_token_id,
            suppress_tokens=media_token_ids(rollout.model.config),
        ),
    )
    return sequences[:, input_ids.shape[1] :]


def test_generation_stops_when_every_response_has_ended_with_its_first_token(
    tiny_model_path: str, prompts: DataProto
) -> None:
    rollout = build(tiny_model_path)
    rollout.eos_token_ids = rollout.generate(prompts, RANDOM, seed=0).batch["responses"][:, 0].tolist()
    forwards = []
    rollout.model.register_forward_hook(lambda *_: forwards.append(1))
    assert (rollout.generate(prompts, RANDOM, seed=0).batch["response_mask"].sum(dim=1) == 1).all()
    assert len(forwards) <= 2


def test_a_response_of_one_token_needs_no_further_forward(tiny_model_path: str, prompts: DataProto) -> None:
    whole, first = build(tiny_model_path), build(tiny_model_path)
    first.response_length = 1
    expected = whole.generate(prompts, RANDOM, seed=1).batch
    batch = first.generate(prompts, RANDOM, seed=1).batch
    assert torch.equal(batch["responses"], expected["responses"][:, :1])
    assert torch.equal(batch["rollout_log_probs"], expected["rollout_log_probs"][:, :1])


def test_new_weights_are_used_and_an_incomplete_stream_is_refused(
    tiny_model_path: str, prompts: DataProto, tmp_path
) -> None:
    from tests.tiny import make_tiny_model

    other_path = make_tiny_model(tmp_path, seed=1)
    rollout, other = build(tiny_model_path), build(other_path)
    before = rollout.generate(prompts, GREEDY, seed=0).batch["responses"]
    rollout.update_weights(other.model.state_dict().items())
    after = rollout.generate(prompts, GREEDY, seed=0).batch["responses"]
    assert not torch.equal(before, after)
    assert torch.equal(after, other.generate(prompts, GREEDY, seed=0).batch["responses"])
    with pytest.raises(AssertionError, match="lacks"):
        rollout.update_weights(list(other.model.state_dict().items())[1:])


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "sampled"])
def test_weights_that_are_not_numbers_are_told_alike_however_tokens_are_drawn(
    sampling: Sampling, tiny_model_path: str, prompts: DataProto
) -> None:
    rollout = build(tiny_model_path)
    with torch.no_grad():
        rollout.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="drew token 0 of response 0 .*weights.* are not finite"):
        rollout.generate(prompts, sampling, seed=0)


def test_a_row_that_cannot_be_drawn_is_named_by_its_number_in_the_whole_batch() -> None:
    """The second chunk begins with row 4, and its third row is not finite."""
    scores = torch.zeros(3, 5)
    scores[2] = torch.nan
    with pytest.raises(RuntimeError, match="drew token 0 of response 6 "):
        _LogProbsOfDraws(4)(torch.zeros(3, 1, dtype=torch.int64), scores)


def test_a_model_sharded_over_two_ranks_generates_as_the_whole_one_does(
    tiny_model_path: str, prompts: DataProto, two_ranks: WorkerGroup
) -> None:
    """Rank 0 gets the prompts with images, rank 1 those without; both hold the whole policy."""
    request = DataProto(prompts.batch, prompts.non_tensor_batch, {"sampling": GREEDY, "seed_parts": (0,)})
    two_ranks.prepare_rollout_engine()
    shared = two_ranks.generate_sequences(request).batch["responses"]
    two_ranks.release_rollout_engine()
    stream = two_ranks.weights()[0]
    for held in two_ranks.rollout_weights():
        assert all(torch.equal(value, held[name]) for name, value in stream.items())
    alone = build(tiny_model_path).generate(prompts, GREEDY, seed=0).batch["responses"]
    length = shared.shape[1]
    assert torch.equal(shared, alone[:, :length])


def test_two_ranks_draw_different_samples_for_the_same_prompt(prompts: DataProto, two_ranks: WorkerGroup) -> None:
    rows = prompts[[2, 2]]
    rows.meta_info = {"sampling": RANDOM, "seed_parts": (0,)}
    two_ranks.prepare_rollout_engine()
    responses = two_ranks.generate_sequences(rows).batch["responses"].tolist()
    two_ranks.release_rollout_engine()
    assert len({tuple(response) for response in responses}) == 2 * RANDOM.n
