# SPDX-License-Identifier: Apache-2.0
"""The two products of attention, scores and means, multiplied in registers or in tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload

from .amx import TILES, lines_of, reshaped
from .attention_tiles import COLUMNS, means_in_tiles, room_in_tiles, scores_in_tiles
from .numbers import REORDERED, widen
from .pairs import paired
from .tasks import behind
from .tiles import OUTPUTS, ROWS, four_means, four_rows, one_mean
from .vectors import LANES

__all__ = ["ROWS", "mean", "room_for_tiles", "score", "take_query"]


@njit
def _tiles_of_scores(queries: Any, keys: Any, count: Any, scores: Any, first: Any, like: Any) -> None:
    """The scores of `count` columns, a multiple of `OUTPUTS`, with whole registers of numbers a head.

    Addresses are counted out here: slices take longer to make than a tile to compute.
    """
    (rows, size), pitch = queries.shape, scores.shape[1]
    of_queries, of_keys, of_scores = queries.ctypes.data, keys.ctypes.data, scores.ctypes.data + first * 4
    for s in range(0, count, OUTPUTS):
        tile = of_keys + s * size * keys.itemsize
        for f in range(0, rows, ROWS):
            four_rows(tile, of_queries + f * size * 4, of_scores + (f * pitch + s) * 4, size, size, pitch, size, like)


@njit(fastmath=REORDERED)
def _one_by_one(queries: Any, keys: Any, scores: Any) -> None:
    for s in range(keys.shape[0]):
        for f in range(queries.shape[0]):
            total = np.float32(0)
            for d in range(queries.shape[1]):
                total += queries[f, d] * widen(keys[s, d])
            scores[f, s] = total


@njit
def _scores(queries: Any, keys: Any, scores: Any, few: Any, like: Any) -> None:
    """`[F, S]`, from queries `[F', D]` with F' rounded up to whole tiles; `few` is room for `OUTPUTS` keys."""
    seen, size = keys.shape
    if size % LANES:
        _one_by_one(queries, keys, scores)
        return
    _tiles_of_scores(queries, keys, seen // OUTPUTS * OUTPUTS, scores, 0, like)
    if seen % OUTPUTS == 0:
        return
    if seen > OUTPUTS:  # the last tile overlaps the one before rather than being computed in another way
        _tiles_of_scores(queries, keys[seen - OUTPUTS :], OUTPUTS, scores, seen - OUTPUTS, like)
    else:
        few[:seen] = keys
        few[seen:] = 0
        _tiles_of_scores(queries, few, OUTPUTS, scores, 0, like)


@njit
def _means(weights: Any, values: Any, sums: Any, like: Any) -> None:
    """The sum of the values `[S, D]` under each row of weights `[F', S']`, with F' of whole tiles."""
    (seen, size), pitch = values.shape, weights.shape[1]
    wide = size // (4 * LANES) * 4 * LANES
    tiled = size // LANES * LANES
    for f in range(0, weights.shape[0], ROWS):
        row = weights[f:].ctypes.data
        for d in range(0, wide, 4 * LANES):
            four_means(values[0, d:].ctypes.data, row, sums[f, d:].ctypes.data, size, pitch, seen, like)
        for d in range(wide, tiled, LANES):
            one_mean(values[0, d:].ctypes.data, row, sums[f, d:].ctypes.data, size, pitch, seen, like)
    for f in range(weights.shape[0]):
        for d in range(tiled, size):
            total = np.float32(0)
            for s in range(seen):
                total += weights[f, s] * widen(values[s, d])
            sums[f, d] = total


@njit
def _in_registers(rows: Any, queries: Any, keys: Any, scores: Any, few: Any, like: Any) -> Any:
    _scores(queries[: (rows + ROWS - 1) // ROWS * ROWS], keys, scores, few, like)
    return 0


@njit
def _in_tiles(rows: Any, active: Any, keys: Any, scores: Any, scale: Any, shaped: Any) -> Any:
    lines = reshaped(lines_of(rows), shaped)
    scores_in_tiles(active, rows, keys, scores, scale, behind(active))
    return lines


def room_for_tiles(rows: Any, size: Any, like: Any) -> Any:
    """Bytes that at most so many rows need besides in tiles; 0 where registers multiply."""
    raise NotImplementedError


@overload(room_for_tiles, strict=False)
def _room(rows: Any, size: Any, like: Any) -> Any:
    if TILES and paired(like):
        return lambda rows, size, like: 0 if size % COLUMNS else room_in_tiles(rows, size)
    return lambda rows, size, like: 0


@njit
def take_query(query: Any, queries: Any, active: Any, row: Any, scale: Any) -> None:
    """Put down one query for `score`: as it is where there is room for that, as float32 times `scale` elsewhere."""
    if active.shape[0]:
        active[row] = query
    else:
        for d in range(query.size):
            queries[row, d] = widen(query[d]) * scale


def score(
    rows: Any, queries: Any, active: Any, keys: Any, scores: Any, few: Any, scale: Any, shaped: Any, like: Any
) -> Any:
    """Scores `[R, S]` of so many rows.

    Args:
        queries, active: from `take_query`, with room for whole tiles; keys: `[S, D]`; few: room for `OUTPUTS` keys.
        shaped: rows that tiles are shaped for, 0 for none.

    Returns:
        `shaped`, now.
    """
    raise NotImplementedError


@overload(score, strict=False)
def _score(
    rows: Any, queries: Any, active: Any, keys: Any, scores: Any, few: Any, scale: Any, shaped: Any, like: Any
) -> Any:
    def by_size(
        rows: Any, queries: Any, active: Any, keys: Any, scores: Any, few: Any, scale: Any, shaped: Any, like: Any
    ) -> Any:
        if active.shape[0]:
            return _in_tiles(rows, active, keys, scores, scale, shaped)
        return _in_registers(rows, queries, keys, scores, few, like)

    if TILES and paired(like):
        return by_size
    return lambda rows, queries, active, keys, scores, few, scale, shaped, like: _in_registers(
        rows, queries, keys, scores, few, like
    )


def mean(rows: Any, weights: Any, active: Any, values: Any, sums: Any, like: Any) -> None:
    """The means of values `[S, D]` under the weights of so many rows, multiplied as `score` did."""
    raise NotImplementedError


@overload(mean, strict=False)
def _mean(rows: Any, weights: Any, active: Any, values: Any, sums: Any, like: Any) -> Any:
    def by_size(rows: Any, weights: Any, active: Any, values: Any, sums: Any, like: Any) -> None:
        if active.shape[0]:
            means_in_tiles(weights, rows, values, sums, behind(active), like)
        else:
            _means(weights[: (rows + ROWS - 1) // ROWS * ROWS], values, sums, like)

    if TILES and paired(like):
        return by_size
    return lambda rows, weights, active, values, sums, like: _means(
        weights[: (rows + ROWS - 1) // ROWS * ROWS], values, sums, like
    )
