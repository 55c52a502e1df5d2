# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_metrics.py

import numpy as np
import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.metrics import (
    compute_attention_metrics,
    compute_cancelled_share,
    compute_data_metrics,
    compute_length_metrics,
    compute_throughput_metrics,
    compute_timing_metrics,
    compute_token_weight_metrics,
    largest_of_workers,
    reduce_metrics,
)


def make_batch():
    """Two sequences, P = 3, R = 4: prompts of 3 and 2 tokens (left-padded), responses of 4 and 1 tokens.

    Positions beyond a response hold 9, so that a metric that reads them is wrong.
    """
    response_mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    prompt_mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    return DataProto.from_dict(
        {
            "responses": torch.zeros(2, 4, dtype=torch.int64),
            "response_mask": response_mask,
            "attention_mask": torch.cat([prompt_mask, response_mask], dim=-1),
            "token_level_scores": torch.tensor([[0.0, 0.0, 0.0, 1.0], [0.5, 0.0, 0.0, 0.0]]),
            "token_level_rewards": torch.tensor([[-0.1, -0.1, 0.0, 1.0], [0.25, 0.0, 0.0, 0.0]]),
            "advantages": torch.tensor([[1.0, 1.0, 1.0, 1.0], [-2.0, 9.0, 9.0, 9.0]]),
            "returns": torch.tensor([[2.0, 2.0, 2.0, 2.0], [-3.0, 9.0, 9.0, 9.0]]),
        }
    )


def test_data_metrics_are_sums_per_sequence_and_values_per_response_token():
    """Scores sum to 1 and 0.5, rewards to 0.8 and 0.25. The five response tokens have advantages 1, 1, 1, 1, -2, mean
    2/5, and returns 2, 2, 2, 2, -3, mean 1."""
    metrics = compute_data_metrics(make_batch(), has_critic=False)
    expected = {
        "critic/score/mean": 0.75,
        "critic/score/max": 1.0,
        "critic/score/min": 0.5,
        "critic/rewards/mean": 0.525,
        "critic/rewards/max": 0.8,
        "critic/rewards/min": 0.25,
        "critic/advantages/mean": 0.4,
        "critic/advantages/max": 1.0,
        "critic/advantages/min": -2.0,
        "critic/returns/mean": 1.0,
        "critic/returns/max": 2.0,
        "critic/returns/min": -3.0,
        "response_length/mean": 2.5,
        "response_length/max": 4.0,
        "response_length/min": 1.0,
        "response_length/clip_ratio": 0.5,
        "prompt_length/mean": 2.5,
        "prompt_length/max": 3.0,
        "prompt_length/min": 2.0,
        "prompt_length/clip_ratio": 0.5,
    }
    assert metrics == pytest.approx(expected)
    assert all(type(value) is float for value in metrics.values())


def test_values_are_told_of_response_tokens_with_the_share_of_the_returns_that_they_explain():
    """Values 2, 2, 0, 2 and -2: mean 4/5. Returns 2, 2, 2, 2, -3 have variance 20/4; what is left, 0, 0, 2, 0, -1, has
    mean 1/5 and variance (3 * 1/25 + 81/25 + 36/25) / 4 = 4.8/4."""
    batch = make_batch()
    batch.batch["values"] = torch.tensor([[2.0, 2.0, 0.0, 2.0], [-2.0, 9.0, 9.0, 9.0]])
    metrics = compute_data_metrics(batch, has_critic=True)
    expected = {"mean": 0.8, "max": 2.0, "min": -2.0}
    assert {name: metrics[f"critic/values/{name}"] for name in expected} == pytest.approx(expected)
    assert metrics["critic/vf_explained_var"] == pytest.approx(1 - 4.8 / 20)
    batch.batch["returns"][:] = 0.1
    assert "critic/vf_explained_var" not in compute_data_metrics(batch, has_critic=True)


def test_of_the_workers_the_largest_value_counts():
    assert largest_of_workers([{"a": 1.0, "b": 4.0}, {"a": 3.0, "b": 2.0}]) == {"a": 3.0, "b": 4.0}


def test_validation_lengths_carry_their_prefix():
    metrics = compute_length_metrics(make_batch(), prefix="val_")
    plain = compute_length_metrics(make_batch())
    assert metrics == {f"val_{name}": value for name, value in plain.items()}
    assert "val_response_length/clip_ratio" in metrics


def test_time_per_token_counts_response_tokens_for_generation_and_all_tokens_for_passes():
    """5 response tokens and 10 tokens in all: 1 s of generation is 200 ms a token, 1 s of update 100 ms."""
    timings = {"gen": 1.0, "reward": 0.5, "old": 2.0, "update_actor": 1.0, "validation": 7.0, "step": 11.5}
    assert compute_timing_metrics(make_batch(), timings) == {
        "timing_per_token_ms/gen": 200.0,
        "timing_per_token_ms/reward": 100.0,
        "timing_per_token_ms/old": 200.0,
        "timing_per_token_ms/update_actor": 100.0,
    }


def test_throughput_is_per_device():
    """10 tokens in 2 s on 5 devices."""
    assert compute_throughput_metrics(make_batch(), {"step": 2.0}, num_devices=5) == {
        "perf/total_num_tokens": 10,
        "perf/time_per_step": 2.0,
        "perf/throughput": 1.0,
    }


def test_metrics_do_not_depend_on_the_order_of_rows_or_on_padding():
    batch = make_batch()
    expected = compute_data_metrics(batch, has_critic=False)
    batch.reorder(torch.tensor([1, 0]))
    for name in ("token_level_scores", "token_level_rewards", "advantages", "returns"):
        batch.batch[name] = batch.batch[name] * batch.batch["response_mask"]
    assert compute_data_metrics(batch, has_critic=False) == pytest.approx(expected)


def test_lists_are_averaged_and_an_empty_one_is_an_error_that_names_it():
    assert reduce_metrics({"overall": [0.0, 1.0, 0.5], "actor/lr": np.array([2.0])}) == {
        "overall": 0.5,
        "actor/lr": 2.0,
    }
    with pytest.raises(ValueError, match="accuracy"):
        reduce_metrics({"overall": [1.0], "accuracy": []})


def with_attention(batch):
    """Adds attention: 10 text keys and 40 image keys in the first sample, no image in the second.

    VGR of the first, (text / 10) / (image / 40): 2, 1, 4, 0.5.
    """
    mass = torch.full((2, 4, 2), 9.0)
    mass[0] = torch.tensor([[0.2, 0.4], [0.1, 0.4], [0.4, 0.4], [0.1, 0.8]])
    mass[1, 0] = torch.tensor([0.7, 0.0])
    batch.batch["attention_mass"] = mass
    batch.batch["attention_keys"] = torch.tensor([[10, 40], [10, 0]])
    return batch


def test_attention_metrics_are_those_of_the_samples_that_have_both_modalities():
    """VGR 0.5, 1, 2, 4: mean 1.875, median 1.5, and quantiles at 0.3 and 2.7 of the three gaps. Mean masses: text
    0.8/4 = 0.2, image 2.0/4 = 0.5. Attention shares of the tokens: text 1/3, 1/5, 1/2, 1/9, mean 0.286111; of the
    keys 10/50 are text, so AEI of text is 0.286111/0.2 and of images 0.713889/0.8."""
    metrics = compute_attention_metrics(with_attention(make_batch()))
    expected = {
        "vgr/mean": 1.875,
        "vgr/median": 1.5,
        "vgr/p10": 0.65,
        "vgr/p90": 3.4,
        "attention/text_mass": 0.2,
        "attention/vision_mass": 0.5,
        "attention/aei_text": 1.4305556,
        "attention/aei_vision": 0.8923611,
    }
    assert metrics == pytest.approx(expected, rel=1e-4)


def test_attention_metrics_are_left_out_where_there_is_nothing_to_tell():
    batch = with_attention(make_batch())
    batch.batch["attention_keys"] = torch.tensor([[10, 0], [10, 0]])
    assert compute_attention_metrics(batch) == {}


def test_token_weight_metrics_show_what_the_weights_do():
    """Weights 0.2, 1, 1.8, 3 and, in the second sample, 1: mean 1.4, mean square 2.856 + 0, so the standard
    deviation is sqrt(2.856 - 1.96) and the effective sample size 1.96 / 2.856. One in five is at each bound."""
    batch = make_batch()
    batch.batch["token_weights"] = torch.tensor([[0.2, 1.0, 1.8, 3.0], [1.0, 9.0, 9.0, 9.0]])
    assert compute_token_weight_metrics(batch, (0.2, 3.0)) == pytest.approx(
        {
            "token_weights/mean": 1.4,
            "token_weights/std": 0.9465728,
            "token_weights/min": 0.2,
            "token_weights/max": 3.0,
            "token_weights/clipped_low": 0.2,
            "token_weights/clipped_high": 0.2,
            "token_weights/ess": 0.6862745,
            "token_weights/weighted_rows": 0.5,
            "token_weights/top10_share": 3 / 7,
        }
    )


def test_the_cancelled_share_by_hand():
    """Group a: 5 6 and 5 7 with weighted advantages 1, 1 and -1, -1: the shared 5 cancels, 2 of 4. Alike in both, 5
    and 8 of group b have 3, 1 and -1, -1: of 3 - 1 and 1 - 1, 2 is left, 4 of 6 cancel. The padding counts nowhere.
    Together 6 of 10. The 5 of another group is another token."""
    batch = DataProto.from_dict(
        {
            "responses": torch.tensor([[5, 6, 0], [5, 8, 0], [5, 7, 0], [5, 8, 0]]),
            "response_mask": torch.tensor([[1, 1, 0]] * 4),
            "token_weights": torch.tensor([[1.0, 1.0, 9.0], [3.0, 1.0, 9.0], [1.0, 1.0, 9.0], [1.0, 1.0, 9.0]]),
            "advantages": torch.tensor([[1.0] * 3, [1.0] * 3, [-1.0] * 3, [-1.0] * 3]),
        },
        {"uid": np.array(["a", "b", "a", "b"], dtype=object)},
    )
    assert compute_cancelled_share(batch) == pytest.approx(0.6)
    batch.batch["responses"][:, 0] = torch.tensor([1, 2, 3, 4])
    assert compute_cancelled_share(batch) == 0


def test_weights_that_do_nothing_show_as_such():
    batch = make_batch()
    batch.batch["token_weights"] = torch.ones(2, 4)
    metrics = compute_token_weight_metrics(batch, (0.2, 3.0))
    assert (metrics["token_weights/ess"], metrics["token_weights/std"]) == (1.0, 0.0)
    assert metrics["token_weights/weighted_rows"] == 0.0
