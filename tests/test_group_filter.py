# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_group_filter.py
"""Which groups carry signal: derived by hand, whatever the order of rows, and the keys that cannot decide."""

import numpy as np
import pytest

from verl.algorithms.group_filter import informative_rows

UID = np.array(["a", "a", "b", "b", "c", "c"], dtype=object)


def test_a_group_is_kept_if_its_responses_are_neither_all_right_nor_all_wrong():
    """Means: a (0 + 1) / 2 = 0.5, b 0, c 1. Only 0 < 0.5 < 1 holds."""
    kept = informative_rows({"accuracy": [0, 1, 0, 0, 1, 1]}, UID, "accuracy", 0.0, 1.0)
    assert kept.dtype == bool
    assert kept.tolist() == [True, True, False, False, False, False]


def test_a_mean_that_meets_a_bound_is_not_kept():
    """Means: a 0.25, b 0.5, c 0.75."""
    values = {"overall": [0.0, 0.5, 0.25, 0.75, 0.5, 1.0]}
    assert informative_rows(values, UID, "overall", 0.25, 0.75).tolist() == [False, False, True, True, False, False]
    assert informative_rows(values, UID, "overall", 0.2, 0.75).tolist() == [True, True, True, True, False, False]
    assert informative_rows(values, UID, "overall", 0.25, 0.8).tolist() == [False, False, True, True, True, True]


def test_the_default_bounds_drop_one_right_response_in_a_hundred_and_the_papers_keep_it():
    """Means: 1/100 = 0.01, which is not above 0.01, and 1/99 > 0.01."""
    for n, kept_by_default in ((100, False), (99, True)):
        values, uid = {"overall": [1.0] + [0.0] * (n - 1)}, np.array(["a"] * n, dtype=object)
        assert informative_rows(values, uid, "overall", 0.01, 0.99).all() == kept_by_default
        assert informative_rows(values, uid, "overall", 0.0, 1.0).all()


def test_groups_are_found_by_uid_wherever_their_rows_stand():
    rng = np.random.default_rng(0)
    values, uid = rng.random(60), np.repeat([f"prompt {index}" for index in range(12)], 5).astype(object)
    kept = informative_rows({"overall": values}, uid, "overall", 0.4, 0.6)
    assert 0 < kept.sum() < 60
    order = rng.permutation(60)
    shuffled = informative_rows({"overall": values[order]}, uid[order], "overall", 0.4, 0.6)
    assert (shuffled == kept[order]).all()


def test_a_key_that_the_reward_function_does_not_return_is_refused_with_those_it_does():
    message = "algorithm.filter_key=accurracy is not returned by the reward function; use one of accuracy, overall"
    with pytest.raises(ValueError, match=message):
        informative_rows({"overall": [1.0] * 6, "accuracy": [1.0] * 6}, UID, "accurracy", 0.01, 0.99)


def test_a_key_that_some_samples_lack_is_refused_with_their_number():
    with pytest.raises(ValueError, match="filter_key=accuracy was returned for 5 of 6 samples"):
        informative_rows({"overall": [1.0] * 6, "accuracy": [1.0] * 5}, UID, "accuracy", 0.01, 0.99)
