# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_step_record.py

import time

import numpy as np
import pytest

from verl.utils.step_record import StepRecord


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
