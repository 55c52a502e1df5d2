# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_naming_share.py
"""Which tokens name what is seen, and how much weight they get."""

from __future__ import annotations

from pathlib import Path

import make_digits
import naming_share
import pytest
from make_digits import long_solution, solution
from naming_share import names_of
from tiny_qwen import build_tokenizer


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["<think>I see", " ", "3", " and", " ", "9", ". ", "3", "+", "9", "=12."], ["3", "9"]),
        (["I see a", " red", " cir", "cle", ". It is", " red", "."], [" red", " cir", "cle"]),
        (["I see", " nothing", "."], []),
        (["I see a red", " circle", "."], [" circle"]),  # a token that begins before a name is more than a name
    ],
)
def test_only_the_first_sentence_names(texts: list[str], names: list[str]) -> None:
    assert [text for text, is_name in zip(texts, names_of(texts), strict=True) if is_name] == names


@pytest.mark.parametrize("text", [solution(3, 9), long_solution(1, 2, 3, 4)])
def test_every_digit_that_is_named_is_one_token(text: str) -> None:
    tokenizer = build_tokenizer([text])
    texts = [tokenizer.decode([token]) for token in tokenizer(text).input_ids]
    assert sum(names_of(texts)) == text.split(".")[0].count("and") + text.split(".")[0].count(",") + 1


def test_uniform_weights_give_names_their_share_of_the_tokens(tmp_path: Path, monkeypatch) -> None:
    """A model without a warm start names nothing; counting every second token instead gives about a half."""
    make_digits.main(tmp_path, seed=0, steps=0)
    with pytest.raises(ValueError, match="names what is seen"):
        naming_share.measure(tmp_path, num_rows=2, seed=0)
    monkeypatch.setattr(naming_share, "names_of", lambda texts: [place % 2 == 0 for place in range(len(texts))])
    measured = naming_share.measure(tmp_path, num_rows=4, seed=0)
    assert list(measured) == list(naming_share.SIGNALS)
    assert measured["uniform"][0] == pytest.approx(0.5, abs=0.02)
    assert all(0 < share < 1 and -1 <= agreement <= 1 for share, agreement in list(measured.values())[1:4])
