# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_measure.py
"""One forward gives any choice of streams, each as if it had been asked for alone."""

import sys
from itertools import combinations, groupby
from pathlib import Path

import pytest
import torch

import verl
from tests.batches import answer_at_random, make_prompts
from tests.probe import RESPONSE_LENGTH, RESPONSES_PER_PROMPT, ProbeWorker, make_config, start_alone, start_two
from verl.protocol import DataProto
from verl.utils import logprobs
from verl.workers.fsdp2 import full_tensor

ALL = ["log_probs", "entropy", "kl", "image_kl", "attention_mass", "attention_keys", "hidden_cosine"]
LOGGED = "algorithm.token_signals_to_log=[image_kl,hidden_cosine]"
SHARED = ("worker.actor.ulysses_size=2", "worker.actor.micro_batch_size_per_device_for_update=2")
MEASURED = ("worker.rollout.collect_attentions=true", "algorithm.kl_penalty=full", LOGGED)


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight rows: the first four with images, the last four text only."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    return answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH)


@pytest.fixture(params=["true", "false"], ids=["packed", "padded"])
def worker(request: pytest.FixtureRequest, tiny_model_path: str, lone_process_group) -> ProbeWorker:
    """A policy that has left its reference."""
    alone = start_alone(make_config(tiny_model_path, *MEASURED, f"worker.actor.padding_free={request.param}"))
    alone.scale_weights(1.1)
    return alone


def test_streams_together_equal_each_alone_bit_for_bit(worker: ProbeWorker, batch: DataProto) -> None:
    together = worker.measured(batch, ALL).batch
    assert set(together.keys()) == set(ALL)
    assert all(together[name].any() for name in ALL)
    for wanted in (*([name] for name in ALL), ["log_probs", "attention_keys"], ["kl", "image_kl"]):
        some = worker.measured(batch, wanted).batch
        assert set(some.keys()) == set(wanted)
        assert all(torch.equal(some[name].nan_to_num(9), together[name].nan_to_num(9)) for name in wanted)


def test_with_gradient_the_values_are_those_without_and_each_pair_has_both_gradients(
    worker: ProbeWorker, batch: DataProto
) -> None:
    forward, rows = worker.actor.forward, batch[:4]
    without = worker.measured(rows, ALL).batch
    is_response = rows.batch["response_mask"].bool()

    def gradient(wanted: list[str], summed: list[str]) -> torch.Tensor:
        streams = forward.measure(rows, wanted)
        assert {name for name in wanted if streams[name].requires_grad} == {"log_probs", "kl"} & set(wanted)
        assert all(torch.equal(streams[name].detach(), without[name]) for name in wanted)
        sum(streams[name][is_response].sum() for name in summed).backward()
        weight = worker.actor.model.model.language_model.layers[0].mlp.up_proj.weight
        result = full_tensor(weight.grad).clone()
        worker.actor.optimizer.zero_grad()
        return result

    of_one = {name: gradient([name], [name]) for name in ("log_probs", "kl")}
    assert all(one.any() for one in of_one.values())
    for wanted in combinations(ALL[:3], 2):
        summed = [name for name in wanted if name != "entropy"]
        expected = sum(of_one[name] for name in summed)
        torch.testing.assert_close(gradient(list(wanted), summed), expected, atol=1e-4, rtol=1e-4)


def test_ranks_that_share_rows_measure_what_one_measures(
    tiny_model_path: str, batch: DataProto, lone_process_group, ray_cluster
) -> None:
    alone = start_alone(make_config(tiny_model_path, *MEASURED))
    pair = start_two(make_config(tiny_model_path, *MEASURED, *SHARED))
    try:
        for worker in (alone, pair):
            worker.scale_weights(1.1)
        expected, shared = (worker.measured(batch, ALL).batch for worker in (alone, pair))
    finally:
        pair.release()
    for name in ALL:
        torch.testing.assert_close(shared[name], expected[name], atol=1e-5, rtol=1e-4, equal_nan=True, msg=name)


def test_a_stream_that_a_model_does_not_have_is_a_mistake(worker: ProbeWorker, batch: DataProto) -> None:
    with pytest.raises(AssertionError, match="PolicyForward has no .*values"):
        worker.measured(batch, ["log_probs", "values"])
    worker.actor.forward.reference = worker.actor.forward.signals = None
    with pytest.raises(AssertionError, match="no reference"):
        worker.measured(batch, ["kl"])
    with pytest.raises(AssertionError, match="need SignalSettings"):
        worker.measured(batch, ["attention_keys"])


def test_from_the_remote_call_to_a_log_prob_a_reader_opens_few_files(
    worker: ProbeWorker, batch: DataProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call stack of the line that takes the log-softmax enters each file once, and no function on it is defined
    inside an inner one."""
    stacks = []
    pieces = logprobs._pieces

    def pieces_with_a_look(labels):
        frame, stack = sys._getframe(1), []
        while frame is not None:
            stack.append(frame.f_code)
            frame = frame.f_back
        stacks.append(stack)
        return pieces(labels)

    monkeypatch.setattr(logprobs, "_pieces", pieces_with_a_look)
    worker.compute_log_probs(batch)
    package = str(Path(verl.__file__).parent)
    ours = [code for code in stacks[0] if code.co_filename.startswith(package)]
    entered = [Path(name).relative_to(package).as_posix() for name, _ in groupby(code.co_filename for code in ours)]
    assert len(entered) == len(set(entered)) <= 8, entered
    assert max(code.co_qualname.count("<locals>") for code in ours) <= 1
