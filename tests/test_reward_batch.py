# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_reward_batch.py
"""Functions of the whole batch, results in columns, and what is refused of either."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pool import run_shared
from tests.test_reward_function import TEXTS, TRUTHS, make_batch
from tests.test_training_run import arguments, lines_of, weights_at
from verl.protocol import DataProto
from verl.trainer.config import load_config
from verl.trainer.main import prepare
from verl.workers.reward.config import RewardConfig

TESTS = Path(__file__).parent
R = 64


def whole_batch(tokenizer) -> DataProto:
    """`make_batch` with what else a batch of training has."""
    batch = make_batch(tokenizer)
    prompts = torch.zeros(len(batch), 5, dtype=torch.long)
    ids = torch.cat([prompts, batch.batch["responses"]], dim=1)
    batch.batch["prompts"], batch.batch["input_ids"] = prompts, ids
    batch.batch["attention_mask"], batch.batch["position_ids"] = torch.ones_like(ids), torch.zeros_like(ids)
    grids = np.empty(len(batch), dtype=object)
    grids[0] = np.array([[1, 4, 6]])
    batch.non_tensor_batch["image_grid_thw"] = grids
    return batch


def proto(body: str) -> str:
    """The source of a function of the batch, whose response lengths are `lengths`."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return (
        "import torch\nimport numpy as np\nREWARD_TYPE = 'proto'\nseen = []\n"
        f"def compute_reward(batch):\n    lengths = batch.batch['response_mask'].sum(-1)\n{lines}\n"
    )


@pytest.fixture
def score(make_manager, tokenizer):
    def score(body: str, batch: DataProto | None = None):
        manager = make_manager(proto(body), name="compute_reward")
        return manager.compute_reward(whole_batch(tokenizer) if batch is None else batch)

    return score


def test_a_function_of_the_batch_sees_all_of_it(make_manager, tokenizer):
    manager = make_manager(proto("seen.append(batch)\nreturn {'overall': lengths}"), name="compute_reward")
    batch = whole_batch(tokenizer)
    manager.compute_reward(batch)
    (seen,) = manager.function._function.__globals__["seen"]
    for name in ("input_ids", "prompts", "responses", "response_mask", "attention_mask", "position_ids"):
        assert torch.equal(seen.batch[name], batch.batch[name])
    columns = seen.non_tensor_batch
    assert columns["response"].tolist() == TEXTS and columns["ground_truth"].tolist() == TRUTHS
    assert columns["image_grid_thw"][0].tolist() == [[1, 4, 6]] and columns["image_grid_thw"][1] is None
    assert columns["multi_modal_data"][0][0].is_video is False
    assert "".join(columns["response_tokens"][0]) == TEXTS[0] + "<|im_end|>"
    assert seen.meta_info == {"step": 5, "split": "train"}


FORMS = {
    "one reward a sample": "return lengths.float(), {}",
    "no extra": "return lengths.float(), None",
    "a list": "return lengths.tolist(), {'overall': lengths.tolist()}",
    "numpy": "return lengths.numpy(), {'overall': lengths.numpy()}",
    "columns alone": "return {'overall': lengths}",
    "one reward a token": (
        "rewards = torch.zeros(batch.batch['responses'].shape)\n"
        "rewards[range(len(lengths)), lengths - 1] = lengths.float()\n"
        "return rewards, {}"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_rewards_scores_alike(score, tokenizer, form):
    batch = whole_batch(tokenizer)
    lengths = batch.batch["response_mask"].sum(-1)
    expected = torch.zeros(3, R)
    expected[range(3), lengths - 1] = lengths.float()
    scores, metrics = score(FORMS[form], batch)
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)
    assert metrics == {"overall": lengths.float().tolist()}


def test_rewards_of_tokens_stay_where_they_are_and_overall_is_their_sum(score, tokenizer):
    scores, metrics = score("return 0.5 * batch.batch['response_mask'], {}")
    mask = whole_batch(tokenizer).batch["response_mask"]
    assert torch.equal(scores, 0.5 * mask)
    assert metrics["overall"] == (0.5 * mask.sum(-1)).tolist()


def test_overall_is_logged_beside_rewards_that_train(score):
    scores, metrics = score("return lengths - 1.0, {'overall': [1, 2, 3], 'format': [None, 0.5, None]}")
    assert metrics == {"overall": [1.0, 2.0, 3.0], "format": [0.5]}
    assert scores.sum(-1).tolist() != metrics["overall"]


def test_token_weights_come_as_lists_or_as_a_tensor_cut_to_each_response(score, tokenizer):
    mask = whole_batch(tokenizer).batch["response_mask"]
    expected = [list(range(length)) for length in mask.sum(-1).tolist()]
    tensor = "torch.arange(64).expand(3, 64)"
    for weights in ("[list(range(n)) for n in lengths]", tensor, f"{tensor}.numpy()"):
        assert score(f"return {{'overall': lengths, 'token_weights': {weights}}}")[1]["token_weights"] == expected
    gaps = whole_batch(tokenizer)
    gaps.batch["response_mask"][0, 1] = 0
    (first, *_) = score(f"return {{'overall': lengths, 'token_weights': {tensor}}}", gaps)[1]["token_weights"]
    assert first == [0, *range(2, len(expected[0]))]


def test_what_the_function_changes_in_its_batch_stays_there(score, tokenizer):
    batch = whole_batch(tokenizer)
    before = batch.select(deepcopy=True)
    score(
        "batch.batch['response_mask'].zero_()\nbatch.non_tensor_batch['uid'][:] = 'x'\nreturn {'overall': lengths}",
        batch,
    )
    assert torch.equal(batch.batch["response_mask"], before.batch["response_mask"])
    assert batch.non_tensor_batch["uid"].tolist() == before.non_tensor_batch["uid"].tolist()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return lengths", r"returned tensor.*must return \(rewards, columns\), or a dict of columns"),
        ("return 1.0", r"returned 1.0; it must return \(rewards, columns\)"),
        ("return [{'overall': 1.0}] * 3", r"must return \(rewards, columns\)"),
        ("return {'format': [1, 2, 3]}", "with the key 'overall'"),
        ("return {'overall': [1, 2]}", "2 values under 'overall' for 3 samples"),
        ("return {'overall': 1.0}", r"'float' object is not iterable.*must return \(rewards, columns\)"),
        ("return lengths[:2], {}", r"rewards of shape \(2,\); they must be \(3,\), one a sample, or \(3, 64\)"),
        ("return torch.ones(3, 64), {}", "reward 1.0 at position .* for sample 0 .*where its response has no token"),
        (
            "return torch.tensor([1, 2, float('nan')]), {}",
            "the reward nan for sample 2 .uid b, .*not a number between",
        ),
        ("return torch.tensor([1, 1e16, 0]), {}", "for sample 1 .uid a, .*not a number between"),
        ("return {'overall': lengths, 'token_weights': torch.ones(3, 2)}", r"shape \(3, 2\), not \(3, 64\)"),
        ("return {'overall': ['a', 1, 2]}", "'overall': 'a' for sample 0"),
        ("raise KeyError('x')", "raised KeyError: 'x' for the batch of 3 samples, starting with sample 0"),
    ],
)
def test_another_form_is_refused_with_those_that_are_right(score, body, message):
    with pytest.raises((ValueError, RuntimeError), match=message) as failure:
        score(body)
    assert len(str(failure.value)) < 700


def test_a_function_of_a_list_may_return_columns(make_manager, tokenizer):
    columns = "{'overall': [1.0, 0.5, 0.0], 'format': (1, None, 0), 'token_weights': [[2.0], None, [1.0]]}"
    scores, metrics = make_manager(f"def compute_score(samples): return {columns}").compute_reward(
        make_batch(tokenizer)
    )
    assert scores.sum(-1).tolist() == metrics["overall"] == [1.0, 0.5, 0.0]
    assert metrics["format"] == [1.0, 0.0] and metrics["token_weights"] == [[2.0], None, [1.0]]
    with pytest.raises(ValueError, match="2 values under 'format' for 3 samples"):
        make_manager("def compute_score(s): return {'overall': [1, 2, 3], 'format': [1, 2]}").compute_reward(
            make_batch(tokenizer)
        )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def compute_score(samples) -> float: ...", "annotated to return float; it must return a list of one dict"),
        ("def compute_score(samples: list) -> 'torch.Tensor': ...", "annotated to return torch.Tensor"),
        ("REWARD_TYPE = 'sequential'\ndef compute_score(s) -> float: ...", "return float; it must return a dict"),
        ("def compute_score(batch: 'DataProto'): ...", "takes a DataProto; put REWARD_TYPE = .proto. in its file"),
        (
            "kind = 'proto'\nREWARD_TYPE = kind\ndef compute_score(batch): ...",
            "assign REWARD_TYPE = .proto. at the top",
        ),
        ("REWARD_TYPE = 'all'\ndef compute_score(batch): ...", "'all'.*'batch'.*'sequential'.*'proto'"),
    ],
)
def test_what_can_be_known_before_the_run_is_refused_there(make_manager, source, message):
    with pytest.raises(ValueError, match=message):
        make_manager(source)


def test_a_function_of_the_batch_without_reward_type_is_told_of_it(make_manager, tokenizer):
    manager = make_manager("def compute_score(data): return data.batch['responses']")
    with pytest.raises(
        RuntimeError, match='no attribute .batch.*if it takes the whole DataProto, REWARD_TYPE = "proto"'
    ):
        manager.compute_reward(make_batch(tokenizer))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            [],
            "REWARD_STREAMS of .*reward_of_attention.py:compute_reward asks for attention_mass, attention_keys, which",
        ),
        (["worker.rollout.collect_attentions=true", "algorithm.online_filtering=true"], "scored before anything is"),
        (["worker.rollout.collect_attentions=true", "algorithm.adv_estimator=remax"], "for which nothing is measured"),
    ],
)
def test_attention_that_is_not_measured_is_refused_before_the_run(
    tiny_model_path, data_files, tmp_path, settings, message
):
    reward = f"worker.reward.reward_function={TESTS}/reward_of_attention.py:compute_reward"
    with pytest.raises(ValueError, match=message):
        prepare(load_config(arguments(tiny_model_path, data_files, tmp_path, reward, *settings)))


def test_a_baseline_is_the_sum_of_the_rewards_and_not_what_is_logged(score, tokenizer):
    """ReMax takes it off those rewards."""
    from verl.trainer.rewards import _totals
    from verl.workers.reward.results import Scored

    scored = Scored([{"overall": 0.0}] * 2, [], np.array([[1.0, 2.0], [0.5, 0.0]], dtype=np.float32))
    assert _totals(scored).tolist() == [3.0, 0.5]
    assert _totals(Scored([{"overall": 0.25}], [])).tolist() == [0.25]


@pytest.mark.parametrize("streams", ["5", "[1]", "['attention' + '_mass']", "None + 1"])
def test_streams_that_are_no_names_written_out_are_refused_with_the_configuration(streams, tmp_path):
    (tmp_path / "odd.py").write_text(f"REWARD_TYPE = 'proto'\nREWARD_STREAMS = {streams}\ndef main(batch): ...\n")
    with pytest.raises(ValueError, match="REWARD_STREAMS is not a list of names, written out at the top level"):
        RewardConfig(reward_function=f"{tmp_path}/odd.py")
    (tmp_path / "odd.py").write_text("REWARD_STREAMS = ['attention_mass']\ndef main(batch): ...\n")
    with pytest.raises(ValueError, match='which takes REWARD_TYPE = "proto"'):
        RewardConfig(reward_function=f"{tmp_path}/odd.py")


def test_unknown_streams_are_refused_with_those_there_are(tiny_model_path, data_files, tmp_path):
    (tmp_path / "odd.py").write_text("REWARD_TYPE = 'proto'\nREWARD_STREAMS = 'entropy'\ndef main(batch): ...\n")
    assert RewardConfig(reward_function=f"{tmp_path}/odd.py").streams == ("entropy",)
    reward = f"worker.reward.reward_function={tmp_path}/odd.py"
    with pytest.raises(ValueError, match="asks for entropy; it may ask for attention_mass and attention_keys"):
        prepare(load_config(arguments(tiny_model_path, data_files, tmp_path, reward)))


def test_a_function_that_weighs_by_the_attention_trains_as_the_signal_does(
    tiny_model_path, data_files, tmp_path, ray_cluster
):
    """Bit for bit: the function gets the same masses as the trainer's weights."""
    shared = ["worker.rollout.collect_attentions=true", "algorithm.enable_token_weights=true", "trainer.max_steps=2"]
    rewards = {
        "signal": f"{TESTS}/rewards.py:compute_score",
        "function": f"{TESTS}/reward_of_attention.py:compute_reward",
    }
    for name, function in rewards.items():
        reward = f"worker.reward.reward_function={function}"
        run_shared(load_config(arguments(tiny_model_path, data_files, tmp_path / name, reward, *shared)))
    by_signal, by_function = (weights_at(tmp_path / name, 2) for name in rewards)
    assert all(torch.equal(value, by_function[name]) for name, value in by_signal.items())
    log = lines_of(tmp_path / "function" / "experiment_log.jsonl")
    assert any(line["token_weights"]["std"] > 0 for line in log if "token_weights" in line)
