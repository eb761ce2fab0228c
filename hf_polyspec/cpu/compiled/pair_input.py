# SPDX-License-Identifier: Apache-2.0
"""What a step of an EAGLE-3 head reads, as one task: embeddings and stream, each normalised, and the angles."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from .numbers import LIKE, REORDERED, VERSION, narrow, widen
from .places import address
from .tasks import Launch, alone, compiled, number, number_bits, pointer, run

Norm = tuple[Tensor, float]
"""Weights `[H]` and epsilon."""


@njit(fastmath=REORDERED)
def _normalize(x: Any, weight: Any, epsilon: Any, y: Any, like: Any) -> None:
    """As `blocks.normalize_task` does."""
    squares = np.float32(0)
    for k in range(x.size):
        squares += widen(x[k]) * widen(x[k])
    scale = np.float32(1) / np.sqrt(squares / np.float32(x.size) + epsilon)
    for k in range(x.size):
        y[k] = narrow(widen(weight[k]) * widen(narrow(widen(x[k]) * scale, like)), like)


@njit
def pair_task(task: Any, like: Any) -> None:
    """`[norm(table[id]), norm(stream)]` of each row, and the angles of its position."""
    numbers = carray(pointer(task, np.int64(0)), 18)
    rows, width, size, entries, angles = numbers[1], numbers[2], numbers[3], numbers[4], numbers[5]
    table = carray(pointer(numbers[8], like), (entries, width))
    stream, read = (
        carray(pointer(numbers[9], like), (rows, width)),
        carray(pointer(numbers[10], like), (rows, 2, width)),
    )
    first, second = carray(pointer(numbers[11], like), width), carray(pointer(numbers[12], like), width)
    ids, places = carray(pointer(numbers[13], np.int64(0)), rows), carray(pointer(numbers[14], np.int64(0)), rows)
    cos, sin = carray(pointer(numbers[15], like), (angles, size)), carray(pointer(numbers[16], like), (angles, size))
    turned = carray(pointer(numbers[17], like), (2, rows, size))
    for r in range(rows):
        _normalize(table[ids[r]], first, number(task, 6), read[r, 0], like)
        _normalize(stream[r], second, number(task, 7), read[r, 1], like)
        turned[0, r] = cos[places[r]]
        turned[1, r] = sin[places[r]]


def _task(like: Any) -> Callable[[Any], None]:
    version = VERSION

    def task(numbers: Any) -> None:
        if version >= 0:  # always, see there
            pair_task(numbers, like)

    return task


@cache
def _function(dtype: torch.dtype) -> Launch:
    return alone(compiled(_task(LIKE[dtype])))


def pair_input(
    ids: Tensor,
    table: Tensor,
    stream: Tensor,
    norms: tuple[Norm, Norm],
    places: Tensor,
    angles: tuple[Tensor, Tensor],
    read: Tensor,
    turned: Tensor,
) -> None:
    """Write what a step reads; everything is contiguous and, but for ids and places, of the stream's dtype.

    Args:
        ids: `[B, T]`, rows of `table`; table: `[V, H]`.
        stream: `[B, T, H]`; norms: of the embeddings, and of the stream.
        places: `[B, T]`, rows of `angles`; angles: cosines and sines `[P, d]`.
        read: `[B, T, 2 H]` and turned: `[2, B, T, d]`, written to.

    Raises:
        RuntimeError: Something has lost its memory.
    """
    (first, first_epsilon), (second, second_epsilon) = norms
    cos, sin = angles
    numbers = (
        ids.numel(),
        stream.shape[2],
        cos.shape[1],
        table.shape[0],
        cos.shape[0],
        number_bits(first_epsilon),
        number_bits(second_epsilon),
        address(table, "embeddings"),
        address(stream, "hidden states"),
        read.data_ptr(),
        address(first, "weights of a norm"),
        address(second, "weights of a norm"),
        ids.data_ptr(),
        places.data_ptr(),
        address(cos, "cosines"),
        address(sin, "sines"),
        turned.data_ptr(),
    )
    run("compiled::pair_input", _function(stream.dtype), *numbers)
