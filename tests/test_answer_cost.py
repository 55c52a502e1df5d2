# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_answer_cost.py
"""Answers that sympy could not evaluate in seconds are told from those it can, and graded by their text alone."""

import time

import pytest

from verl.workers.reward.answer_cost import is_costly
from verl.workers.reward.answers import find_box, is_right

TRUTH = r"\frac{3}{4}"
"""No integer: mathruler evaluates answers only for such truths."""

COSTLY = [
    "9999999999999999999999!",
    "5000000!",
    "5000000 !",
    "5,000,000!",
    "5_000_000!",
    "0xfffff!",
    r"5{0}00000!",
    r"\text{5000000!}",
    r"(5\text{ million})!",
    r"\frac{5000000!}{4999999!}",
    "((5!)!)!",
    "(999*999)!",
    "(9^9)!",
    "2^9!^9!",
    "2^-999999999",
    "9**9**9",
    "2**(9**9)",
    "3^sqrt(9^9*9^9)",
    "9^-9^9",
    "((((((((9^9)^9)^9)^9)^9)^9)^9)^9)^9",
    "1e999999",
    "9e999*" * 300 + "1",
    "2^.5e99999",
    "(1+x)^-99",
    "(((x+y)^9)^9)^9",
    "sqrt((x+y)^9)^9",
    "ff(99999999,9999999)",
    "1<<99999999999",
    "(" * 5000 + "1.5" + ")" * 5000,
    r"\frac{1}{2}+" * 4000,
]


@pytest.mark.parametrize("answer", COSTLY, ids=lambda answer: answer[:30])
def test_a_costly_answer_is_wrong_in_less_than_a_second_and_right_where_the_truth_reads_the_same(answer: str) -> None:
    begun = time.monotonic()
    assert not is_right(answer, TRUTH)
    assert time.monotonic() - begun < 1
    assert is_right(answer, answer)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("4!*0.03125", TRUTH),
        (r"\frac{2024!*5}{2025!}", r"\frac{1}{405}"),
        ("(3+1)!*0.03125", TRUTH),
        ("n*(n-1)*(n-2)", "n!/(n-3)!"),
        ("2^{-10}", r"\frac{1}{1024}"),
        ("3*2**(-2)", TRUTH),
        ("(1.05)^-20", "1/(1.05)^9/(1.05)^9/(1.05)^2"),
        ("7.5e-1", TRUTH),
        ("(x+1)^5*(x-1)^5*6", "6(x-1)^5(x+1)^5"),
        (r"\frac{1}{(x+1)^2}", "(1+x)^-2"),
        ("e^{x^2}*2x", "2x*e^{x^2}"),
        (r"\sqrt{2}/2", r"\frac{1}{\sqrt{2}}"),
        ("(1,0.5)", r"(1,\frac{2}{4})"),
    ],
)
def test_ordinary_powers_and_factorials_are_still_evaluated(answer: str, truth: str) -> None:
    assert is_right(answer, truth)


@pytest.mark.parametrize(
    "expression", ["", "!", "^", "2^", "2^-", "**!", ")", "))((", "[", "x!", "2^x!", "<", "√", "三"]
)
def test_fragments_cost_nothing(expression: str) -> None:
    assert not is_costly(expression)


def test_a_box_is_the_last_that_opens_with_everything_up_to_its_own_brace() -> None:
    text = r"\boxed{1} and {\boxed{ \frac{2}{3} }} }"
    box = find_box(text)
    assert box.content == r"\frac{2}{3}"
    assert text[box.start : box.end] == r"\boxed{ \frac{2}{3} }"
    assert find_box(text, before=box.start).content == "1"
    assert find_box(r"\boxed{1} \boxed{2") is None
    assert find_box("1") is None
