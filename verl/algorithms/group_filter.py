# SPDX-License-Identifier: Apache-2.0
"""Dynamic sampling: which groups of responses carry signal.

N sequences; a group is all responses to one prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def informative_rows(
    values_by_key: Mapping[str, Sequence[float]],
    uid: np.ndarray,
    filter_key: str,
    filter_low: float,
    filter_high: float,
) -> np.ndarray:
    """The rows of groups whose responses are neither all right nor all wrong: filter_low < group mean < filter_high.

    Responses that are equally good have advantages of zero, and only thin out the update. DAPO (arXiv 2503.14476, "The
    More the Merrier: Dynamic Sampling") keeps groups with 0 < right responses < n. Our deltas, as in EasyR1:

    1. Any number that the reward function returns can decide, by its group mean; with 0 for wrong, 1 for right and the
       bounds 0 and 1 it is the paper's rule.
    2. The default bounds, 0.01 and 0.99, also drop a group with a single right or wrong response in 100 or more.

    Args:
        values_by_key: what the reward function returned, N numbers a key.
        uid: N objects, equal for responses to the same prompt. Rows may stand in any order.
        filter_key: the key that decides.
        filter_low, filter_high: bounds of the mean, neither of which is kept.

    Returns:
        (N,) bool, the same for all rows of a group.

    Raises:
        ValueError: the reward function did not return `filter_key`, or not for every sample.
    """
    if filter_key not in values_by_key:
        raise ValueError(
            f"algorithm.filter_key={filter_key} is not returned by the reward function; use one of "
            f"{', '.join(sorted(values_by_key))}"
        )
    values = np.asarray(values_by_key[filter_key], dtype=np.float64)  # (N,)
    if len(values) != len(uid):
        raise ValueError(
            f"algorithm.filter_key={filter_key} was returned for {len(values)} of {len(uid)} samples; to decide about "
            "their groups, the reward function must return it for every one"
        )
    _, group_of_row = np.unique(uid.astype(str), return_inverse=True)  # (N,)
    means = np.bincount(group_of_row, weights=values) / np.bincount(group_of_row)  # (groups,)
    return ((filter_low < means) & (means < filter_high))[group_of_row]
