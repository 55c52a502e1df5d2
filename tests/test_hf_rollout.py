# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_hf_rollout.py
"""The Hugging Face rollout against plain `generate` on each prompt alone, and the contract of every engine."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.batches import PROMPT_LENGTH, make_prompts
from verl.protocol import DataProto
from verl.single_controller.worker_group import WorkerGroup
from verl.utils.tokenizer import get_processor, get_tokenizer
from verl.workers.rollout.base import Sampling
from verl.workers.rollout.config import RolloutConfig
from verl.workers.rollout.hf_rollout import HFRollout

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
        get_processor(model_path),
        RolloutConfig(name="hf", disable_tqdm=True, **config),
        RESPONSE_LENGTH,
        torch.device("cpu"),
    )


def test_greedy_responses_are_those_of_plain_generate_on_each_prompt_alone(
    tiny_model_path: str, prompts: DataProto
) -> None:
    """The batch mixes two image sizes, two images in one prompt, and text: each row must not notice the others."""
    batch = build(tiny_model_path).generate(prompts, GREEDY, seed=0)
    model, processor = load(tiny_model_path).eval(), AutoProcessor.from_pretrained(tiny_model_path)
    for index in range(len(prompts)):
        row = prompts[index]
        ids = row.batch["input_ids"][row.batch["attention_mask"].bool()][None]
        images = [handle.load() for handle in row.non_tensor_batch["multi_modal_data"] or []]
        media = processor.image_processor(images, return_tensors="pt") if images else {}
        expected = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).long(),
            do_sample=False,
            max_new_tokens=RESPONSE_LENGTH,
            suppress_tokens=[model.config.image_token_id, model.config.video_token_id],
            **media,
        )[0, ids.shape[1] :]
        assert batch.batch["responses"][index, : len(expected)].tolist() == expected.tolist()


def test_the_batch_keeps_the_contract_of_every_engine(tiny_model_path: str, prompts: DataProto) -> None:
    batch = build(tiny_model_path).generate(prompts, RANDOM, seed=0)
    tensors, num_rows = batch.batch, len(prompts) * RANDOM.n
    assert len(batch) == num_rows
    assert torch.equal(tensors["prompts"], prompts.batch["input_ids"].repeat_interleave(RANDOM.n, dim=0))
    assert torch.equal(tensors["input_ids"], torch.cat([tensors["prompts"], tensors["responses"]], dim=1))
    assert torch.equal(tensors["attention_mask"][:, PROMPT_LENGTH:], tensors["response_mask"])
    assert tensors["position_ids"].shape == (num_rows, 4, PROMPT_LENGTH + RESPONSE_LENGTH)
    steps = tensors["position_ids"].diff(dim=-1)[..., PROMPT_LENGTH - 1 :]
    assert (steps == 1).all()


def test_the_mask_ends_with_the_first_end_of_sequence_token(tiny_model_path: str, prompts: DataProto) -> None:
    rollout = build(tiny_model_path)
    batch = rollout.generate(prompts, replace(RANDOM, n=32), seed=0).batch
    ended = 0
    for response, mask in zip(batch["responses"].tolist(), batch["response_mask"].tolist(), strict=True):
        ends = [place for place, token in enumerate(response) if token in rollout.eos_token_ids]
        length = ends[0] + 1 if ends else RESPONSE_LENGTH
        assert mask == [1] * length + [0] * (RESPONSE_LENGTH - length)
        assert all(token == rollout.pad_token_id for token in response[length:])
        ended += bool(ends)
    assert 0 < ended < len(batch)


def test_ignoring_end_of_sequence_fills_every_response(tiny_model_path: str, prompts: DataProto) -> None:
    rollout = build(tiny_model_path)
    batch = rollout.generate(prompts, replace(RANDOM, n=32, ignore_eos=True), seed=0).batch
    assert (batch["response_mask"] == 1).all()
    tails = [
        response[response.index(rollout.eos_token_ids[0]) + 1 :]
        for response in batch["responses"].tolist()
        if rollout.eos_token_ids[0] in response[:-2]
    ]
    assert tails and all(set(tail) != {rollout.pad_token_id} for tail in tails)


def test_settings_that_the_checkpoint_ships_do_not_bend_the_samples(tiny_model_path: str, prompts: DataProto) -> None:
    """Instruct models ship a repetition penalty and a top_k in their generation config."""
    shipped = AutoModelForImageTextToText.from_pretrained(tiny_model_path, dtype=torch.float32)
    shipped.generation_config.update(repetition_penalty=1.5, top_k=3, min_p=0.2, temperature=0.1)
    rollout = HFRollout(
        shipped,
        get_tokenizer(tiny_model_path),
        get_processor(tiny_model_path),
        RolloutConfig(name="hf", disable_tqdm=True),
        RESPONSE_LENGTH,
        torch.device("cpu"),
    )
    for sampling in (GREEDY, RANDOM):
        responses = rollout.generate(prompts, sampling, seed=0).batch["responses"]
        assert torch.equal(responses, build(tiny_model_path).generate(prompts, sampling, seed=0).batch["responses"])


def test_a_seed_repeats_and_another_seed_does_not_and_no_two_samples_share_their_draws(
    tiny_model_path: str, prompts: DataProto
) -> None:
    rollout = build(tiny_model_path)
    first, again, other = (rollout.generate(prompts, RANDOM, seed).batch["responses"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == len(first)


def test_generating_leaves_the_global_random_state_alone(tiny_model_path: str, prompts: DataProto) -> None:
    state = torch.get_rng_state()
    build(tiny_model_path).generate(prompts, RANDOM, seed=0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_sampling_narrowed_to_one_token_is_greedy(narrow: dict, tiny_model_path: str, prompts: DataProto) -> None:
    rollout = build(tiny_model_path)
    greedy = rollout.generate(prompts, GREEDY, seed=0).batch["responses"]
    narrowed = rollout.generate(prompts, replace(RANDOM, n=1, **narrow), seed=5).batch["responses"]
    assert torch.equal(greedy, narrowed)


def test_all_tokens_can_be_sampled_when_nothing_limits_them(tiny_model_path: str, prompts: DataProto) -> None:
    """A random model is close to uniform over its vocabulary: 50 candidates, transformers' default, would show."""
    batch = build(tiny_model_path).generate(prompts[[2]], replace(RANDOM, n=256), seed=0)
    assert len(set(batch.batch["responses"][:, 0].tolist())) > 100


def test_placeholders_of_images_are_never_sampled(tiny_model_path: str, prompts: DataProto) -> None:
    rollout = build(tiny_model_path)
    placeholder = rollout.model.config.image_token_id
    with torch.no_grad():
        rollout.model.lm_head.weight[placeholder] = 100 * rollout.model.lm_head.weight.mean(dim=0)
        rollout.model.lm_head.weight[placeholder + 1] = 100 * rollout.model.lm_head.weight.mean(dim=0)
    batch = rollout.generate(prompts, RANDOM, seed=0)
    assert not torch.isin(batch.batch["responses"], torch.tensor(rollout.banned_token_ids)).any()


def test_generating_in_small_portions_changes_nothing(tiny_model_path: str, prompts: DataProto) -> None:
    whole = build(tiny_model_path).generate(prompts, GREEDY, seed=0)
    portions = build(tiny_model_path, max_num_batched_tokens=PROMPT_LENGTH + RESPONSE_LENGTH)
    assert torch.equal(whole.batch["responses"], portions.generate(prompts, GREEDY, seed=0).batch["responses"])


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


def test_validation_settings_override_those_of_training() -> None:
    config = RolloutConfig(name="hf", n=8, temperature=1.0, val_override_config={"temperature": 0.6, "top_p": 0.95})
    assert Sampling.for_validation(config) == Sampling(1, 0.6, 0.95, -1, False)
    assert Sampling.for_training(config).n == 8


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


def test_two_ranks_draw_different_samples_for_the_same_prompt(
    prompts: DataProto, two_ranks: WorkerGroup
) -> None:
    rows = prompts[[2, 2]]
    rows.meta_info = {"sampling": RANDOM, "seed_parts": (0,)}
    two_ranks.prepare_rollout_engine()
    responses = two_ranks.generate_sequences(rows).batch["responses"].tolist()
    two_ranks.release_rollout_engine()
    assert len({tuple(response) for response in responses}) == 2 * RANDOM.n
