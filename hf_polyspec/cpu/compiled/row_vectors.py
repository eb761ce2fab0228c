# SPDX-License-Identifier: Apache-2.0
"""The softmax of a row of scores in vector registers.

A compiler does not vectorise a maximum that must notice what is no number, nor a sum whose order it may not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vectors import FLOATS, LANES, WORDS, load, place, power, spread, totals

_LOWEST = -87.0
"""Below this e to a power is no normal number; it counts as nothing."""


def _floats(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)


@contextmanager
def _each(context: Any, builder: Any, address: Any, count: Any) -> Iterator[Any]:
    """A loop over registers of `count` numbers at an address; gives the place of each."""
    zero, step, four = (context.get_constant(types.int64, number) for number in (0, LANES, 4))
    with cgutils.for_range_slice(builder, zero, count, step, intp=ir.IntType(64)) as (index, _):
        yield place(builder, builder.add(address, builder.mul(index, four)), FLOATS)


@intrinsic
def largest(_typing: Any, address: Any, count: Any, like: Any) -> Any:
    """The largest of numbers at an address, so many, a multiple of `LANES`; infinite if one is no number.

    A number like them comes last.
    """

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, count, _ = arguments
        top = cgutils.alloca_once_value(builder, _floats(float("-inf")))
        zero, step, size = (context.get_constant(types.int64, number) for number in (0, LANES, like.bitwidth // 8))
        with cgutils.for_range_slice(builder, zero, count, step, intp=ir.IntType(64)) as (index, _):
            found = load(builder, like, builder.add(address, builder.mul(index, size)))
            found = builder.select(builder.fcmp_ordered("ord", found, found), found, _floats(float("inf")))
            best = builder.load(top)
            builder.store(builder.select(builder.fcmp_ordered(">", found, best), found, best), top)
        best, part = builder.load(top), LANES
        while part > 1:
            part //= 2
            order = ir.Constant(WORDS, [(lane + part) % LANES for lane in range(LANES)])
            other = builder.shuffle_vector(best, ir.Constant(FLOATS, ir.Undefined), order)
            best = builder.select(builder.fcmp_ordered(">", other, best), other, best)
        return builder.extract_element(best, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.int64, types.int64, like), generate


@intrinsic
def powers(_typing: Any, address: Any, count: Any, top: Any) -> Any:
    """Write e to the power of `score - top` over each of so many scores, a multiple of `LANES`; the sum of them.

    The sum runs lane by lane, so scores of minus infinity behind the others change nothing.
    """

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address, count, top = arguments
        tops, total = spread(builder, top, FLOATS), cgutils.alloca_once_value(builder, _floats(0.0))
        with _each(context, builder, address, count) as at:
            below = builder.fsub(builder.load(at, align=4), tops)
            counts = builder.fcmp_ordered(">", below, _floats(_LOWEST))
            found = power(builder, builder.select(counts, below, _floats(0.0)))
            found = builder.select(counts, found, _floats(0.0))
            builder.store(found, at, align=4)
            builder.store(builder.fadd(builder.load(total), found), total)
        numbers, _ = totals(builder, [builder.load(total)])
        return builder.extract_element(numbers, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.int64, types.int64, types.float32), generate
