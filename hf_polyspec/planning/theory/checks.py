# SPDX-License-Identifier: Apache-2.0
"""Refusals the theory files share: each names the number and the range it must lie in."""

from __future__ import annotations

import math
from collections.abc import Sequence


def check_probability(name: str, value: float) -> None:
    """Refuse anything outside [0, 1].

    Args:
        name: what the caller calls the number.
        value: the number.

    Raises:
        ValueError: if it lies outside [0, 1] or is not a number.
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is a probability and must lie in [0, 1], got {value}.")


def check_at_least(name: str, value: float, lowest: float) -> None:
    """Refuse a number below a bound.

    Args:
        name: what the caller calls the number.
        value: the number.
        lowest: the smallest value allowed.

    Raises:
        ValueError: if it is smaller, infinite or not a number.
    """
    if not (lowest <= value < math.inf):
        raise ValueError(f"{name} must be at least {lowest:g} and finite, got {value}.")


def check_positive(name: str, value: float) -> None:
    """Refuse zero and below.

    Args:
        name: what the caller calls the number.
        value: the number.

    Raises:
        ValueError: if it is not greater than zero and finite.
    """
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be greater than 0 and finite, got {value}.")


def check_count(name: str, values: Sequence[object], wanted: int, because: str) -> None:
    """Refuse a sequence of the wrong length.

    Args:
        name: what the caller calls the sequence.
        values: the sequence.
        wanted: how many entries it needs.
        because: what there is one of per entry, for the message.

    Raises:
        ValueError: if the length differs.
    """
    if len(values) != wanted:
        raise ValueError(f"{name} needs {wanted} entries, one for each {because}, got {len(values)}.")


def check_times(name: str, values: Sequence[float]) -> None:
    """Refuse a negative number among those given for each level.

    Args:
        name: what one of the numbers is.
        values: one number for each level, target first.

    Raises:
        ValueError: if one is negative, infinite or not a number.
    """
    for level, value in enumerate(values):
        check_at_least(f"{name} of level {level}", value, 0)
