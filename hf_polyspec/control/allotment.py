# SPDX-License-Identifier: Apache-2.0
"""Which rows of a batch are worth how many drafted columns: by expected gain over the seconds of a pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

LEAST = 0.02
"""Chances below this are no columns that anybody would pay for."""
_SAME = 1 + 1e-9
REACH = 0.125
"""Of the tokens that the longest row may emit yet: rows as far ahead of it as that will hardly end last."""
SOME = 0.005
"""They may all the same, beside one with a chance of 1: what costs next to nothing is drafted for them."""
SPREAD = 0.4
"""How far behind the others the last of two rows stays, in roots of the tokens that each is to win. By chance alone it
would be 0.56; but columns go to the rows that are behind."""


def allotted(
    chances: Sequence[Sequence[float]],
    seconds: Callable[[float], float],
    rows: int,
    *,
    depth_seconds: float = 0.0,
    rectangular: bool = False,
    worth: Sequence[float] | None = None,
) -> list[int]:
    """How many tokens each row is to draft, so that a pass emits the most tokens a second.

    A row emits one token and those of its draft that are accepted, so `n` columns beyond one a row emit `rows` tokens
    and the sum of their chances, in `seconds(rows + n)`. Of all columns the likeliest are taken, as many as maximise
    that quotient; where none raises it, none is.

    Args:
        chances: per row, the chance that its draft's tokens are accepted up to each; what rises is cut to what is
            before it.
        seconds: of a pass over so many columns, all rows together.
        rows: that the pass reads in any case, those without chances included, 1 or more.
        depth_seconds: for every token of the longest draft, where a drafter draws one after another.
        rectangular: whether all rows are computed as wide as the widest.
        worth: of a token of each row, see `worths`; None where every row's is 1.

    Returns:
        Tokens for every row, 0 or more and at most as many as it has chances.
    """
    falling = [_falling(row) for row in chances]
    if worth is not None:
        falling = [[chance * value for chance in row] for row, value in zip(falling, worth, strict=True)]
    deepest = max(map(len, falling), default=0)
    best, found = rows / seconds(rows), [0] * len(falling)
    if rectangular:
        gain = 0.0
        for depth in range(1, deepest + 1):
            gain += sum(row[depth - 1] for row in falling if len(row) >= depth)
            rate = (rows + gain) / (seconds(rows * (1 + depth)) + depth * depth_seconds)
            if rate > best * _SAME:
                best, found = rate, [min(depth, len(row)) for row in falling]
        return found
    columns = sorted(
        ((-chance, depth, row) for row, own in enumerate(falling) for depth, chance in enumerate(own, 1)),
    )
    times = [seconds(rows + count) for count in range(1, len(columns) + 1)]
    # Where depth costs nothing by itself, the likeliest columns are the best of any number.
    for most in range(1, deepest + 1) if depth_seconds else [deepest]:
        rate, number = _best_number([column for column in columns if column[1] <= most], times, rows, depth_seconds)
        if rate > best * _SAME:
            best, found = rate, [0] * len(falling)
            for _, depth, row in [column for column in columns if column[1] <= most][:number]:
                found[row] = depth
    return found


def worths(left: Sequence[int], seconds: Callable[[float], float], coming: float = math.inf) -> list[float]:
    """What a token of each row is worth where no row takes the place of one that ends, in those of a plain pass.

    A pass takes a part of its seconds whatever it reads, and the rest for its columns. A token saves a later pass its
    row's column in any case, and the former only if its row ends last. Which row will is told by how much each may
    still emit, the less surely the more that is, since texts end by themselves.

    Where several may, a pass is saved only when all of them have won a token: the one that wins fewest says how many
    are. Of few tokens that come by chance it wins none.

    Args:
        left: tokens that each row may emit yet, 0 for rows that have ended; seconds: see `allotted`.
        coming: tokens that drafts are expected to win in each row yet.

    Returns:
        For every row, 0 or more; 1 on average where every row wins what it is expected to.
    """
    rows, longest = sum(count > 0 for count in left), max(left, default=0)
    if rows < 2:
        return [1.0] * len(left)
    last = [max(SOME, 1 - (longest - count) / (REACH * longest)) if count else 0.0 for count in left]
    total, whole = sum(last), seconds(rows)
    fixed = min(1.0, seconds(1) / whole) if whole > 0 else 1.0
    rivals = total**2 / sum(value * value for value in last)
    saved = rows * fixed * _won_by_all(coming, rivals) / total
    return [1 - fixed + saved * value for value in last]


def _won_by_all(coming: float, rows: float) -> float:
    """Of the tokens that each of so many rows is expected to win, the share that the row wins which wins fewest."""
    if rows <= 1 or coming == math.inf:
        return 1.0
    # The least of n is about so many deviations below the mean: 0.56 of 2, 1.03 of 4, 1.42 of 8, 1.77 of 16.
    return max(0.0, 1 - SPREAD * math.log2(rows) ** 0.83 / math.sqrt(coming)) if coming > 0 else 0.0


def _best_number(
    columns: Sequence[tuple[float, int, int]], times: Sequence[float], rows: int, depth_seconds: float
) -> tuple[float, int]:
    """The highest rate of tokens that the first so many columns bring, and how many they are."""
    best, number, gain, deepest = 0.0, 0, 0.0, 0
    for count, ((chance, depth, _), time) in enumerate(zip(columns, times, strict=False), 1):
        gain -= chance
        deepest = max(deepest, depth)
        rate = (rows + gain) / (time + deepest * depth_seconds)
        if rate > best * _SAME:
            best, number = rate, count
    return best, number


def _falling(chances: Sequence[float]) -> list[float]:
    found: list[float] = []
    for chance in chances:
        chance = min(chance, found[-1]) if found else min(1.0, chance)
        if chance < LEAST:
            break
        found.append(chance)
    return found
