# SPDX-License-Identifier: Apache-2.0
"""Products of whole tiles (AMX): up to sixteen rows times sixteen outputs over sixteen words of inputs at once.

A tile's register holds 16 lines of 64 bytes. Panels and blocks of weights, 32 outputs side by side a word of inputs
each, are two such tiles every 16 words as they lie; activations are tiles as rows of words. Where an instruction for
registers multiplies one row by sixteen outputs over one word, one for tiles does 256 of that in sixteen times its time,
so a pass over thirty-two columns takes as long as the memory needs for the weights.

Tiles are a state of a thread that the system saves when it changes threads: whoever has shaped them frees them.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .tasks import release
from .vectors import LANES, place, prefetch

LINES = 16
"""Lines of a tile: rows of activations, or words of inputs of weights."""
DEPTH = 64
"""Bytes of a line: what a step takes of a row of activations."""
STEP = LINES * 2 * DEPTH
"""Bytes of a panel or block that a step takes."""
ROWS = 2 * LINES
"""Rows that are multiplied at once: two tiles of them by two of weights, whose sums are four of the eight there are."""
_LINE = 64

_BYTE, _NUMBER = ir.IntType(8), ir.IntType(64)


@cache
def has_tiles() -> bool:
    """Whether this CPU multiplies tiles of bytes and of bfloat16, and the system lets this process do it.

    `ONEDNN_MAX_CPU_ISA`, with which torch's own products are kept from it, or its older name, keeps these, too.
    """
    told = (os.environ.get(f"{prefix}_MAX_CPU_ISA") for prefix in ("ONEDNN", "DNNL"))
    most = next(filter(None, told), "ALL").upper()
    allowed = "AMX" in most or most in ("ALL", "DEFAULT")
    features = binding.get_host_cpu_features()
    known = all(features.get(name, False) for name in ("amx-tile", "amx-int8", "amx-bf16"))
    if not (allowed and known and LANES == 16 and torch.cpu._is_amx_tile_supported()):
        return False
    return bool(torch.cpu._init_amx())


TILES = has_tiles()
"""What compiled functions are made for."""


def _constant(value: int, kind: Any = _NUMBER) -> Any:
    return ir.Constant(kind, value)


def _call(builder: Any, name: str, *arguments: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), arguments)


def _tile(index: int) -> Any:
    return _constant(index, _BYTE)


@intrinsic
def shape_tiles(_typing: Any, rows: Any) -> Any:
    """Shape this thread's tiles for so many rows, at most `LINES`: sums and activations have as many lines."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        shapes = cgutils.alloca_once(builder, ir.ArrayType(_BYTE, 64))
        begin = builder.ptrtoint(shapes, _NUMBER)
        builder.store(ir.Constant(ir.ArrayType(_BYTE, 64), None), shapes)
        builder.store(_constant(1, _BYTE), place(builder, begin, _BYTE))
        lines = builder.trunc(arguments[0], _BYTE)
        for tile in range(8):
            width = builder.add(begin, _constant(16 + 2 * tile))
            builder.store(_constant(DEPTH, ir.IntType(16)), place(builder, width, ir.IntType(16)), align=2)
            count = lines if tile < 6 else _constant(LINES, _BYTE)
            builder.store(count, place(builder, builder.add(begin, _constant(48 + tile)), _BYTE))
        _call(builder, "ldtilecfg", place(builder, begin, _BYTE))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def free_tiles(_typing: Any) -> Any:
    """Let go of what `shape_tiles` shaped."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        _call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@njit
def lines_of(rows: Any) -> Any:
    """Rows of a tile where so many are multiplied: as few as will do, all tiles alike."""
    groups = (rows + LINES - 1) // LINES
    return (rows + groups - 1) // groups


@njit
def reshaped(lines: Any, before: Any) -> Any:
    """Tiles of so many lines in the place of those of `before` lines; 0 for none. `lines` again."""
    if lines and lines != before:
        shape_tiles(lines)
    elif before and not lines:
        free_tiles()
    return lines


@njit
def done(memory: Any, lines: Any) -> None:
    """Give back what a thread has borrowed, and its tiles of so many lines, if any."""
    if lines:
        free_tiles()
    release(memory)


def _multiplier(groups: int, name: str) -> Any:
    @intrinsic
    def multiply(
        _typing: Any, weights: Any, x: Any, sums: Any, rows: Any, pitch: Any, steps: Any, ahead: Any, pace: Any
    ) -> Any:
        """Sums of so many groups of rows by one panel or block, 32-bit numbers `[groups * rows, 2 * LINES]`.

        Addresses of the weights, of the first row and of the first sum; rows of a group, as tiles are shaped; bytes
        from one row of x to the next; steps of `DEPTH` bytes; where lies what the memory may bring meanwhile, and how
        many bytes of it at each step.
        """

        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            weights, x, sums, rows, pitch, steps, ahead, pace = arguments
            line = _constant(2 * DEPTH)

            def at(base: Any, *offsets: Any) -> Any:
                for offset in offsets:
                    base = builder.add(base, offset)
                return place(builder, base, _BYTE)

            for tile in range(2 * groups):
                _call(builder, "tilezero", _tile(tile))
            apart = builder.mul(rows, pitch)
            with cgutils.for_range_slice(builder, _constant(0), steps, _constant(1), intp=_NUMBER) as (step, _):
                begin = builder.add(weights, builder.mul(step, _constant(STEP)))
                for half in range(2):
                    _call(builder, "tileloadd64", _tile(6 + half), at(begin, _constant(half * DEPTH)), line)
                wanted = builder.add(ahead, builder.mul(step, pace))
                own = builder.mul(step, _constant(DEPTH))
                with cgutils.for_range_slice(builder, _constant(0), pace, _constant(_LINE), intp=_NUMBER) as (more, _):
                    prefetch(builder, builder.add(wanted, more), 2)
                for group in range(groups):
                    first = at(x, own, apart) if group else at(x, own)
                    _call(builder, "tileloadd64", _tile(4 + group), first, pitch)
                    for half in range(2):
                        _call(builder, name, _tile(2 * group + half), _tile(4 + group), _tile(6 + half))
            below = builder.mul(rows, line)
            for group in range(groups):
                for half in range(2):
                    offset = _constant(half * DEPTH)
                    found = at(sums, offset, below) if group else at(sums, offset)
                    _call(builder, "tilestored64", _tile(2 * group + half), found, line)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 8), generate

    return multiply


one_of_pairs, two_of_pairs = _multiplier(1, "tdpbf16ps"), _multiplier(2, "tdpbf16ps")
one_of_bytes, two_of_bytes = _multiplier(1, "tdpbsud"), _multiplier(2, "tdpbsud")
