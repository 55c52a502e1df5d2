# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_step_record.py

import time

import numpy as np
import pytest

from verl.trainer.step_record import StepRecord


def test_a_phase_entered_twice_counts_both_visits():
    record = StepRecord(1)
    for _ in range(2):
        with record.timed("gen"):
            time.sleep(0.02)
    assert record.metrics.keys() == {"timing_s/gen"}
    assert 0.04 <= record.metrics["timing_s/gen"] < 1.0


def test_an_outer_phase_lasts_at_least_as_long_as_the_phases_inside():
    record = StepRecord(1)
    with record.timed("step"):
        with record.timed("gen"):
            time.sleep(0.01)
        with record.timed("adv"):
            time.sleep(0.01)
    timings = record.timings
    assert timings["step"] >= timings["gen"] + timings["adv"]


def test_a_phase_is_announced_before_its_work_begins():
    events = []
    record = StepRecord(1, on_phase=events.append)
    with record.timed("old"):
        events.append("work")
    assert events == ["old", "work"]


def test_the_phase_around_another_is_announced_again_when_that_ends():
    events = []
    record = StepRecord(1, on_phase=events.append)
    with record.timed("gen"):
        with record.timed("reward"):
            events.append("work")
    assert events == ["gen", "reward", "work", "gen"]


def test_an_error_inside_a_phase_passes_through():
    with pytest.raises(ZeroDivisionError), StepRecord(1).timed("gen"):
        raise ZeroDivisionError


def test_metrics_become_plain_floats_beside_the_timings():
    record = StepRecord(7)
    record.add({"actor/lr": np.float32(0.5), "perf/total_num_tokens": 3})
    with record.timed("adv"):
        pass
    assert record.step == 7
    assert record.metrics.keys() == {"actor/lr", "perf/total_num_tokens", "timing_s/adv"}
    assert all(type(value) is float for value in record.metrics.values())


def test_a_metric_recorded_twice_is_an_error_that_names_it():
    record = StepRecord(4)
    record.add({"actor/kl_coef": 0.1})
    with pytest.raises(ValueError, match="'actor/kl_coef' of step 4 is 0.1 already.*0.2.*another name"):
        record.add({"actor/kl_coef": 0.2})


def test_numbers_of_several_calls_are_averaged_as_if_they_came_in_one():
    """(1 + 2 + 3 + 6) / 4 = 3, not the mean 4 of the means 2 and 6."""
    record = StepRecord(2)
    record.average({"reward/overall": [1.0, 2.0, 3.0], "reward/format": [1.0]})
    record.average({"reward/overall": [6.0]})
    assert record.metrics == {"reward/overall": 3.0, "reward/format": 1.0}
    with pytest.raises(ValueError, match="'reward/overall' of step 2 is 3.0 already"):
        record.add({"reward/overall": 3.0})
