# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_reference_curve.py
"""The quickstart still learns as the committed curve says, and a curve that is another is told."""

import json
from pathlib import Path

import make_digits
import pytest
import reference_curve

from tests.pool import run_shared


def test_twenty_steps_of_the_quickstart_follow_the_committed_curve(tmp_path: Path, ray_cluster) -> None:
    make_digits.main(tmp_path / "data", seed=0)
    run_shared(reference_curve.settings(tmp_path / "data", tmp_path / "run"))
    reference = json.loads(reference_curve.CURVE.read_text())
    rows = reference_curve.compare(reference_curve.curve_of(tmp_path / "data", tmp_path / "run"), reference)
    assert [row for row in rows if not row.is_near] == []


@pytest.mark.parametrize("is_same_model", [True, False])
@pytest.mark.parametrize("name", reference_curve.TOLERANCES)
def test_a_metric_beyond_its_tolerance_and_one_that_lacks_steps_are_told(name: str, is_same_model: bool) -> None:
    reference = json.loads(reference_curve.CURVE.read_text())
    tolerance = reference_curve.SAME_MODEL_TOLERANCE if is_same_model else reference_curve.TOLERANCES[name]
    for factor, is_near in ((0.9, True), (1.1, False)):
        shifted = {**reference, name: [value + factor * tolerance for value in reference[name]]}
        if not is_same_model:
            shifted[reference_curve.MODEL] = "another"
        assert [row.is_near for row in reference_curve.compare(shifted, reference) if row.name == name] == [is_near]
    with pytest.raises(ValueError, match=f"{name} has .* values"):
        reference_curve.compare({**reference, name: reference[name][1:]}, reference)
