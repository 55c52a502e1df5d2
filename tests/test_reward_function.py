# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_reward_function.py

import os
import re
import shutil
from textwrap import dedent

import numpy as np
import pytest
import ray
import torch

from verl.data.vision import MediaHandle
from verl.protocol import DataProto
from verl.trainer.rewards import RewardClient
from verl.utils.tokenizer import text_decoder
from verl.workers.reward.config import RewardConfig
from verl.workers.reward.function import AutoRewardManager
from verl.workers.reward.results import values_by_key

TEXTS = ["I see 3 and 9. 3+9=12.", "What is the sum?", "The quick brown fox"]
TRUTHS = ["12", "7", "fox"]
IMAGE, VIDEO = (MediaHandle(kind, None, None, is_video=kind == "video") for kind in ("image", "video"))


def make_batch(tokenizer, texts=TEXTS, max_response_length=64):
    """Responses end in EOS and are followed by text that must not be read."""
    junk = tokenizer.encode("junk", add_special_tokens=False)[0]
    responses = torch.full((len(texts), max_response_length), junk)
    response_mask = torch.zeros_like(responses)
    for row, text in enumerate(texts):
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        responses[row, : len(ids)] = torch.tensor(ids)
        response_mask[row, : len(ids)] = 1
    return DataProto.from_dict(
        {"responses": responses, "response_mask": response_mask},
        non_tensors={
            "ground_truth": np.array(TRUTHS[: len(texts)], dtype=object),
            "uid": np.array(["a", "a", "b"][: len(texts)], dtype=object),
            "prompt_text": np.array(["p0", "p1", "p2"][: len(texts)], dtype=object),
            "multi_modal_data": [[IMAGE, VIDEO], None, []][: len(texts)],
            "extra": [{"level": 1}, {}, {"level": 3}][: len(texts)],
        },
        meta_info={"step": 5, "split": "train"},
    )


THREE_FIELDS = """
    REWARD_TYPE = "batch"

    def compute_score(reward_inputs, bonus=0.0):
        return [
            {
                "overall": bonus + float(sample["ground_truth"] in sample["response"]),
                "length": sample["response_length"],
            }
            for sample in reward_inputs
        ]
"""


def test_overall_lands_on_the_last_response_token_and_nowhere_else(make_manager, tokenizer):
    """Only the first and the last text contain their ground truth; with a bonus of 0.5: 1.5, 0.5, 1.5."""
    batch = make_batch(tokenizer)
    lengths = batch.batch["response_mask"].sum(-1)
    manager = make_manager(THREE_FIELDS, reward_function_kwargs={"bonus": 0.5})
    rewards, metrics = manager.compute_reward(batch)

    expected = torch.zeros(3, 64)
    expected[range(3), lengths - 1] = torch.tensor([1.5, 0.5, 1.5])
    assert rewards.dtype == torch.float32
    assert torch.equal(rewards, expected)
    assert metrics == {"overall": [1.5, 0.5, 1.5], "length": lengths.tolist()}


def test_a_batch_of_easyr1s_is_scored_like_one_of_the_trainers(make_manager, tokenizer):
    """It has responses, their mask and the ground truth, and nothing else."""
    whole, manager = make_batch(tokenizer), make_manager(THREE_FIELDS)
    given = DataProto.from_dict(
        {name: whole.batch[name] for name in ("responses", "response_mask")},
        non_tensors={"ground_truth": whole.non_tensor_batch["ground_truth"]},
    )
    (rewards, metrics), (expected, expected_metrics) = manager.compute_reward(given), manager.compute_reward(whole)
    assert torch.equal(rewards, expected) and metrics == expected_metrics
    assert set(given.non_tensor_batch) == {"ground_truth"} and given.meta_info == {}
    expects = """
        REWARD_TYPE = "sequential"

        def compute_score(sample):
            absent = {"prompt": "", "images": [], "videos": [], "extra": {}, "step": 0, "split": "train"}
            assert {name: sample[name] for name in absent} == absent, sample
            return {"overall": float(sample["uid"])}
    """
    _, metrics = make_manager(expects).compute_reward(given)
    assert metrics["overall"] == [0, 1, 2]


def test_sequential_and_batch_functions_give_the_same(make_manager, tokenizer):
    body = '{"overall": float(sample["ground_truth"] in sample["response"]), "n": sample["response_length"]}'
    batch = make_batch(tokenizer)
    rewards, metrics = make_manager(
        f"def compute_score(samples): return [{body} for sample in samples]"
    ).compute_reward(batch)
    rewards_sequential, metrics_sequential = make_manager(
        f"REWARD_TYPE = 'sequential'\ndef compute_score(sample): return {body}"
    ).compute_reward(batch)
    assert torch.equal(rewards, rewards_sequential)
    assert metrics == metrics_sequential
    assert rewards.sum() == 2


def test_the_function_sees_the_whole_sample(make_manager, tokenizer):
    """The row's other columns, its images and its place in the run, beside the three fields it always had."""
    manager = make_manager(
        """
        seen = []
        def compute_score(samples):
            seen.extend(samples)
            return [{"overall": 0.0} for _ in samples]
        """
    )
    batch = make_batch(tokenizer)
    manager.compute_reward(batch)
    seen = manager.function._function.__globals__["seen"]
    tokens = seen[0].pop("response_tokens")
    assert len(tokens) == seen[0]["response_length"]
    assert "".join(tokens) == TEXTS[0] + "<|im_end|>"
    assert seen[0] == {
        "response": TEXTS[0],
        "prefix": "",
        "response_length": batch.batch["response_mask"][0].sum().item(),
        "ground_truth": "12",
        "prompt": "p0",
        "uid": "a",
        "images": [IMAGE],
        "videos": [VIDEO],
        "extra": {"level": 1},
        "step": 5,
        "split": "train",
    }
    assert [sample["response"] for sample in seen] == TEXTS
    assert [sample["images"] for sample in seen] == [[IMAGE], [], []]
    assert [sample["videos"] for sample in seen] == [[VIDEO], [], []]


@pytest.mark.parametrize("reward_type", ["batch", "sequential"])
def test_token_weights_come_as_they_were_returned_and_are_no_metric(make_manager, tokenizer, reward_type):
    """The first sample has weights, the second says None, the third nothing at all."""
    body = """
        def one(sample):
            extra = {"12": {"token_weights": [0.5] * sample["response_length"]}, "7": {"token_weights": None}}
            return {"overall": 1.0, **extra.get(sample["ground_truth"], {})}

        def compute_score(given):
            return one(given) if REWARD_TYPE == "sequential" else [one(sample) for sample in given]
    """
    batch = make_batch(tokenizer)
    length = batch.batch["response_mask"][0].sum().item()
    _, values = make_manager(f"REWARD_TYPE = '{reward_type}'\n" + dedent(body)).compute_reward(batch)
    assert values == {"overall": [1.0, 1.0, 1.0], "token_weights": [[0.5] * length, None, None]}


def test_every_sample_keeps_what_it_got_beside_its_score(make_manager, tokenizer):
    """So that samples can be filtered, joined and reordered with all of it; the second has no `n`."""
    manager = make_manager(
        """
        def compute_score(samples):
            return [
                {"overall": 1, "token_weights": [2]},
                {"overall": 0},
                {"overall": 1, "n": 3},
            ]
        """
    )
    scored = manager.score(make_batch(tokenizer))
    assert scored.batch["token_level_scores"].sum(-1).tolist() == [1, 0, 1]
    results = scored.non_tensor_batch["reward_results"]
    assert results.tolist() == [{"overall": 1.0, "token_weights": [2]}, {"overall": 0.0}, {"overall": 1.0, "n": 3.0}]
    assert values_by_key(results[[2, 0]]) == {"overall": [1.0, 1.0], "n": [3.0], "token_weights": [None, [2]]}
    assert values_by_key(results[[1]]) == {"overall": [0.0]}


def test_a_function_without_token_weights_leaves_no_trace_of_them(make_manager, tokenizer):
    assert "token_weights" not in make_manager(THREE_FIELDS).compute_reward(make_batch(tokenizer))[1]


def test_special_tokens_are_kept_on_request(make_manager, tokenizer):
    manager = make_manager(
        """
        def compute_score(samples):
            return [{"overall": float(sample["response"].endswith("<|im_end|>"))} for sample in samples]
        """,
        skip_special_tokens=False,
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert manager.compute_reward(make_batch(tokenizer))[1] == {"overall": [1.0, 1.0, 1.0]}


def test_numpy_booleans_and_tensors_count_as_numbers(make_manager, tokenizer):
    manager = make_manager(
        """
        import numpy, torch
        def compute_score(samples):
            return [{"overall": numpy.float32(0.5), "a": True, "b": numpy.bool_(True), "c": torch.tensor(2)}
                    for _ in samples]
        """
    )
    metrics = manager.compute_reward(make_batch(tokenizer))[1]
    assert metrics == {"overall": [0.5] * 3, "a": [1.0] * 3, "b": [1.0] * 3, "c": [2.0] * 3}
    assert all(type(value) is float for values in metrics.values() for value in values)


def test_a_function_may_change_what_it_is_given(make_manager, tokenizer):
    """Errors still show the sample as it was."""
    source = "def compute_score(samples): return [{'overall': s.clear() or float(VALUE)} for s in samples]\nVALUE = "
    rewards, _ = make_manager(source + "1.0").compute_reward(make_batch(tokenizer))
    assert rewards.sum() == 3
    with pytest.raises(ValueError, match="sample 0 .uid a, ground_truth '12'"):
        make_manager(source + "'nan'").compute_reward(make_batch(tokenizer))


def test_a_dataclass_in_the_reward_file_loads(make_manager, tokenizer):
    """Dataclasses look up their own module by name, which needs the module registered."""
    manager = make_manager(
        """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass
        class Grade:
            value: float
        def compute_score(samples):
            return [{"overall": Grade(1.0).value} for _ in samples]
        """
    )
    assert manager.compute_reward(make_batch(tokenizer))[0].sum() == 3


def result_for_the_second(value):
    """A function that returns {"overall": 1.0} for all samples but the second, and `value` for that."""
    return f"""
        nan, inf = float("nan"), float("inf")
        def compute_score(samples):
            return [{value} if sample["ground_truth"] == "7" else {{"overall": 1.0}} for sample in samples]
    """


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"overall": nan}', "'overall': nan"),
        ('{"overall": -inf}', "'overall': -inf"),
        ('{"overall": "1.0"}', "'overall': '1.0'"),
        ('{"overall": 1e40}', "'overall': 1e.40.*between -1e15 and 1e15"),
        ('{"overall": 1e25}', "'overall': 1e.25.*between -1e15 and 1e15"),
        ('{"overall": 10**400}', "'overall': 1000.*between -1e15 and 1e15"),
        ('{"overall": 1.0, "accuracy": -2e15}', "'accuracy': -2000.*between -1e15 and 1e15"),
        ('{"overall": None}', "'overall': None"),
        ('{"overall": [1.0, 2.0]}', r"'overall': \[1.0, 2.0\]"),
        ('{"overall": 1.0, "accuracy": nan}', "'accuracy': nan"),
        ('{"accuracy": 1.0}', r"returned {'accuracy': 1.0}.*must return a dict.*'overall'"),
        ("0.5", "returned 0.5.*must return a dict.*'overall'"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_bad_result_names_the_function_and_the_sample(make_manager, tokenizer, value, message):
    with pytest.raises((ValueError, RuntimeError), match=message) as failure:
        make_manager(result_for_the_second(value)).compute_reward(make_batch(tokenizer))
    assert "my_reward.py:compute_score" in str(failure.value)
    assert "sample 1 (uid a, ground_truth '7', response 'What is the sum?')" in str(failure.value)


def test_an_exception_of_a_sequential_function_names_the_sample_and_keeps_its_cause(make_manager, tokenizer):
    manager = make_manager(
        """
        REWARD_TYPE = "sequential"
        def compute_score(sample):
            return {"overall": {"12": 1.0, "7": 0.0}[sample["ground_truth"]]}
        """
    )
    with pytest.raises(RuntimeError, match="raised KeyError: 'fox' for sample 2 .uid b") as failure:
        manager.compute_reward(make_batch(tokenizer))
    assert isinstance(failure.value.__cause__, KeyError)


def test_an_exception_that_no_sample_raises_alone_says_so(make_manager, tokenizer):
    manager = make_manager(
        """
        def compute_score(samples):
            assert len(samples) == 1, "one at a time, please"
            return [{"overall": 1.0}]
        """
    )
    with pytest.raises(RuntimeError, match="one at a time.*samples 1 to 2 together, though for neither half alone"):
        manager.compute_reward(make_batch(tokenizer))


@pytest.mark.parametrize("guilty", [0, 5, 63])
def test_the_guilty_sample_is_found_in_few_calls(make_manager, guilty):
    """A second call, and to halve 64 samples six rounds of at most two calls."""
    manager = make_manager(
        f"""
        calls = 0
        def compute_score(samples):
            global calls
            calls += 1
            return [{{"overall": 1 / (sample["uid"] - {guilty})}} for sample in samples]
        """
    )
    samples = [{"uid": uid, "ground_truth": "", "response": ""} for uid in range(64)]
    with pytest.raises(RuntimeError, match=f"ZeroDivisionError.* for sample {guilty} .uid {guilty},"):
        manager.function._all(samples)
    assert manager.function._function.__globals__["calls"] <= 2 + 2 * 6


def test_a_function_of_one_sample_without_reward_type_is_told_of_it(make_manager, tokenizer):
    manager = make_manager("def compute_score(sample): return {'overall': float(sample['response'] == '')}")
    with pytest.raises(RuntimeError, match='list indices.*put REWARD_TYPE = "sequential" in its file'):
        manager.compute_reward(make_batch(tokenizer))


@pytest.mark.parametrize("form", ["tuple", "iter", "lambda results: (result for result in results)"])
def test_results_may_come_in_any_iterable(make_manager, tokenizer, form):
    source = f"def compute_score(samples): return ({form})([{{'overall': 0.5}} for _ in samples])"
    assert make_manager(source).compute_reward(make_batch(tokenizer))[1] == {"overall": [0.5] * 3}


def test_an_exception_of_a_generator_names_its_sample(make_manager, tokenizer):
    source = "def compute_score(samples):\n    for s in samples: yield {'overall': {'12': 1}[s['ground_truth']]}"
    with pytest.raises(RuntimeError, match="raised KeyError: '7' for sample 1 .uid a"):
        make_manager(source).compute_reward(make_batch(tokenizer))


def test_a_key_that_only_some_samples_return_has_their_values_alone(make_manager, tokenizer):
    manager = make_manager(result_for_the_second('{"overall": 0.5, "accuracy": 0.25}'))
    rewards, metrics = manager.compute_reward(make_batch(tokenizer))
    assert metrics == {"overall": [1.0, 0.5, 1.0], "accuracy": [0.25]}
    assert rewards.sum() == 2.5


def test_a_response_without_tokens_is_our_own_mistake(make_manager, tokenizer):
    batch = make_batch(tokenizer)
    batch.batch["response_mask"][1] = 0
    with pytest.raises(AssertionError, match=r"responses \[1\] have no tokens"):
        make_manager(THREE_FIELDS).compute_reward(batch)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("[{'overall': 1.0}] * 2", "2 results for 3 samples; the last with a result is sample 1"),
        ("[{'overall': 1.0}] * 4", "4 results for 3 samples; the last with a result is sample 2"),
        ("[]", "0 results for 3 samples; none has a result"),
        ("1.0", "returned float for a list of 3 samples.*must return a list"),
        ("{'overall': 1.0}", "returned dict for a list of 3 samples.*REWARD_TYPE = .sequential"),
        ("[{'accuracy': 1.0}] * 3", "returned {'accuracy': 1.0} for sample 0.*'overall', the reward"),
    ],
)
def test_a_wrong_number_of_rows_or_no_overall_is_an_error(make_manager, tokenizer, body, message):
    with pytest.raises(ValueError, match=message):
        make_manager(f"def compute_score(samples): return {body}").compute_reward(make_batch(tokenizer))


def test_long_texts_are_cut_in_errors(make_manager, tokenizer):
    batch = make_batch(
        tokenizer, texts=["The quick brown fox jumps over the lazy dog. " * 12], max_response_length=600
    )
    with pytest.raises(ValueError, match="response 'The quick brown fox.*\\.\\.\\.") as failure:
        make_manager("def compute_score(samples): return [1]").compute_reward(batch)
    assert len(str(failure.value)) < 500


def test_a_missing_function_is_an_error_that_lists_those_there_are(make_manager):
    source = "from os.path import join\ndef grade(samples): ...\ndef _helper(): ..."
    with pytest.raises(ValueError, match=re.escape("'main'") + r".*has \['grade'\]; write .*my_reward.py:grade"):
        make_manager(source, name="main")


def test_kwargs_that_do_not_fit_are_an_error_before_the_run(make_manager):
    with pytest.raises(ValueError, match=r"\(reward_inputs, bonus=0.0\).*reward_function_kwargs=.*'bonsu'"):
        make_manager(THREE_FIELDS, reward_function_kwargs={"bonsu": 1.0})
    for parameters in ("predict_str, ground_truth", "predicts, ground_truths, format_weight=0.1"):
        problem = re.escape(f"({parameters})") + r'.*one positional argument.*read sample\["response"\] and'
        with pytest.raises(ValueError, match=problem):
            make_manager(f"def compute_score({parameters}): return 1.0")


def test_an_unknown_reward_type_is_an_error(make_manager):
    with pytest.raises(ValueError, match="REWARD_TYPE = 'function'.*'batch'.*'sequential'"):
        make_manager("REWARD_TYPE = 'function'\ndef compute_score(samples): ...")


def test_a_file_that_does_not_load_is_an_error_with_its_cause(make_manager):
    with pytest.raises(ValueError, match="my_reward.py raised ModuleNotFoundError.*no_such_grader"):
        make_manager("import no_such_grader")


def test_a_grader_of_the_examples_that_is_missing_is_an_error_with_the_command_that_installs_it(make_manager):
    missing = """raise ModuleNotFoundError("No module named 'mathruler'", name="mathruler")"""
    with pytest.raises(ValueError, match=r"No module named 'mathruler'; `.*python.* -m pip install -e '.\[math\]'`"):
        make_manager(missing)


def test_no_reward_function_is_an_error_that_shows_one(tokenizer):
    with pytest.raises(ValueError, match="worker.reward.reward_function is not set.*:compute_score"):
        AutoRewardManager(RewardConfig(), tokenizer)


# ---- its process ----


@pytest.fixture
def client(tmp_path, monkeypatch, ray_cluster):
    """The client of a function that reads a variable and a file of the run's, in a cluster that knows neither."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scale.txt").write_text("3")
    (tmp_path / "judged.py").write_text(
        "import os\n"
        "open('ran.txt', 'a').write('.')\n"
        "def main(samples):\n"
        "    scale = float(open('scale.txt').read())\n"
        "    return [{'overall': scale * float(os.environ['JUDGE_SCALE'])} for _ in samples]\n"
    )
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setenv("JUDGE_SCALE", "2")
    with RewardClient(RewardConfig(reward_function=f"{tmp_path}/judged.py"), str(tmp_path)) as client:
        yield client


def test_the_process_has_the_runs_variables_and_folder_and_runs_the_file_once(client, tokenizer, tmp_path) -> None:
    client.load(text_decoder(tokenizer))
    scores, _ = client.validate(make_batch(tokenizer), step=1)
    assert scores == [6.0] * len(TEXTS)
    assert (tmp_path / "run" / "ran.txt").read_text() == "."


def test_a_folder_that_is_not_there_and_a_mistake_in_the_file_are_told_by_load(client, tokenizer, tmp_path) -> None:
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ValueError, match="cannot work in the run's folder .*: No such file or directory"):
        ray.get(client._process.load(None, "", {}, f"{tmp_path}/run"))
    (tmp_path / "judged.py").write_text("def other(samples):\n    return 1\n")
    os.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"names the function 'main', but .*judged.py has \['other'\]") as caught:
        client.load(text_decoder(tokenizer))
    assert "ray::" not in str(caught.value)
