# SPDX-License-Identifier: Apache-2.0
"""Tells answers that would take minutes or gigabytes to evaluate, such as `5000000!`, without evaluating them.

The walk over the text bounds the digits of the numbers that sympy would write out. It errs on the high side.

The reward process runs this file, which therefore loads neither torch nor transformers.
"""

from __future__ import annotations

import re
from math import inf
from typing import NamedTuple

MOST_DIGITS = 50_000
"""Numbers up to this length take sympy well below a second; `9999!` is one."""

MOST_POWER = 30
"""Largest power of a bracket with letters in it, which sympy multiplies out."""

MOST_BRACKETS = 100
"""Python itself refuses brackets nested twice as deep."""

TOKEN = re.compile(
    r"(?P<number>0x[\da-f_]+|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:e[+-]?\d[\d_]*)?)"
    r"|(?P<name>[^\W\d]+)|(?P<power>\^|\*\*)|(?P<other>\S)"
)

THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

HUGE_OF_SMALL = re.compile(r"<<|(?<![^\W\d])(?:ff|rf|eye)\(")
"""A shift, falling and rising factorials and a matrix: what makes something huge of two short numbers."""


class Part(NamedTuple):
    """A part of an expression: a number, a letter, a bracket or a power."""

    digits: float
    """At least as many as its numbers have when they are multiplied out; letters have none."""
    value: float
    """At least what it is as an exponent; a letter, which stays a letter, is 1."""
    has_letters: bool = False
    power: float = 1.0
    """The largest power to which brackets in it are raised, through all levels."""


def is_costly(expression: str) -> bool:
    """Whether an expression, as mathruler normalizes it, could take sympy more than some seconds."""
    expression = THOUSANDS.sub("", expression.lower())
    if HUGE_OF_SMALL.search(expression):
        return True
    whole = _Walk(expression).sequence(depth=0)
    return whole.digits > MOST_DIGITS or (whole.has_letters and whole.power > MOST_POWER)


class _Walk:
    """Goes through an expression once, from left to right."""

    def __init__(self, expression: str) -> None:
        self._tokens = [(match.lastgroup, match.group()) for match in TOKEN.finditer(expression)]
        self._next = 0

    def sequence(self, depth: int) -> Part:
        """The parts up to the end of the bracket, as if they were multiplied."""
        if depth > MOST_BRACKETS:
            self._next = len(self._tokens)
            return Part(inf, inf)
        digits, has_letters, power = 0.0, False, 1.0
        while self._next < len(self._tokens):
            if self._take(")", "]"):
                if depth:
                    break
                continue
            part = self._powers(depth)
            digits += part.digits
            has_letters |= part.has_letters
            power = max(power, part.power)
        return Part(digits, _largest(digits), has_letters, power)

    def _powers(self, depth: int) -> Part:
        """An operand with its factorials and its exponent, which may have an exponent itself."""
        base, is_bracket = self._operand(depth)
        while self._take("!"):
            digits = _times(base.digits, base.value)
            base = base._replace(digits=digits, value=_largest(digits))
        if not self._take("^", "**"):
            return base
        while self._take("+", "-"):
            pass
        if self._next == len(self._tokens):
            return base
        exponent = self._powers(depth)
        digits = _times(base.digits, exponent.value) + exponent.digits
        power = _times(base.power, exponent.value) if is_bracket else base.power
        return Part(digits, _largest(digits), base.has_letters or exponent.has_letters, power)

    def _operand(self, depth: int) -> tuple[Part, bool]:
        """A number, a letter, or a bracket with the function before it; and whether it is a bracket."""
        kind, text = self._tokens[self._next]
        self._next += 1
        if kind == "number":
            return _number(text), False
        if kind == "name" and not self._take("(", "["):
            return Part(0.0, 1.0, has_letters=True), False
        if kind == "name" or text in "([":
            inside = self.sequence(depth + 1)
            is_symbol = kind == "name" and text != "sqrt"
            return inside._replace(has_letters=inside.has_letters or is_symbol), True
        return Part(0.0, 1.0), False

    def _take(self, *texts: str) -> bool:
        """Whether the next token is one of these, which is then behind us."""
        is_one = self._next < len(self._tokens) and self._tokens[self._next][1] in texts
        self._next += is_one
        return is_one


def _number(text: str) -> Part:
    if text.startswith("0x"):
        value = float(int(text.replace("_", ""), 16)) if len(text) < 99 else inf
        return Part(1.3 * len(text), value)
    mantissa, _, exponent = text.replace("_", "").partition("e")
    # Sympy writes 1e-9999 out as a fraction.
    digits = len(mantissa) + (float(exponent.lstrip("+-")) if exponent else 0.0)
    return Part(digits, float(mantissa) if not exponent else _largest(digits))


def _largest(digits: float) -> float:
    """The largest number of that many digits."""
    return 10.0**digits if digits < 300 else inf


def _times(digits: float, factor: float) -> float:
    """Not the NaN of 0 times infinity: letters alone stay short at any power."""
    return digits * factor if digits else 0.0
