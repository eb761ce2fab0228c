# SPDX-License-Identifier: Apache-2.0
"""Numbers that numba does not know, as the integers with their bits: uint16 for bfloat16, int16 for float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from .amx import TILES
from .vectors import LANES, power

# numba keeps what it compiled by the file, the instructions and the enclosed variables of the outermost function
# alone. Every task encloses this number, which changes with every file of the room, with the width of registers and
# with whether there are tiles: another process on this CPU may not be allowed any.
VERSION = crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))), LANES + TILES)

# Sums may be reordered, which vector registers need; infinities and what is not a number keep their meaning.
REORDERED = {"contract", "reassoc"}


@intrinsic
def _from_bfloat16(_typing: Any, bits: Any) -> Any:
    """float32 from the bits of a bfloat16: its upper half."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        high = builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16))
        return builder.bitcast(high, ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _from_float16(_typing: Any, bits: Any) -> Any:
    """float32 from the bits of a float16."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@intrinsic
def _to_float16(_typing: Any, value: Any) -> Any:
    """The bits of the nearest float16."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), generate


@intrinsic
def bits(_typing: Any, value: Any) -> Any:
    """The bits of a float32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@njit
def _to_bfloat16(value: Any) -> Any:
    """The bits of the nearest bfloat16, of the even one of two."""
    word = bits(value)
    if (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):  # not a number: rounding could make it infinite
        return np.uint16(0x7FC0)
    return np.uint16((word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def widen(value: Any) -> Any:
    """A weight or an activation as float32."""
    raise NotImplementedError


@overload(widen, strict=False)
def _widen(value: Any) -> Any:
    if value == types.uint16:
        return lambda value: _from_bfloat16(value)
    if value == types.int16:
        return lambda value: _from_float16(value)
    return lambda value: np.float32(value)


def narrow(value: Any, like: Any) -> Any:
    """A float32 rounded to the kind of number that `like` is."""
    raise NotImplementedError


@overload(narrow, strict=False)
def _narrow(value: Any, like: Any) -> Any:
    if like == types.uint16:
        return lambda value, like: _to_bfloat16(value)
    if like == types.int16:
        return lambda value, like: _to_float16(value)
    return lambda value, like: value


@intrinsic
def from_bits(_typing: Any, bits: Any) -> Any:
    """The float32 with these bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _power(_typing: Any, x: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return power(builder, arguments[0])

    return types.float32(types.float32), generate


@njit(fastmath=REORDERED)
def exponential(x: Any) -> Any:
    """e to the power of `x`, see `vectors.power`, in steps that vector registers can take.

    Below -87 the result is the smallest normal number rather than less, above 88 it grows no more.
    """
    found = _power(min(max(x, np.float32(-87.0)), np.float32(88.0)))
    return found if x == x else x


LIKE: dict[torch.dtype, Any] = {
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.float32: np.float32(0),
    torch.int8: np.int8(0),
    torch.uint8: np.uint8(0),
}
"""One number of each kind that memory holds, by whose type functions are compiled."""
