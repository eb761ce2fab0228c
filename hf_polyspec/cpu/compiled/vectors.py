# SPDX-License-Identifier: Apache-2.0
"""Vector registers in the language of the compiler below numba, for loops that it would not put into them itself."""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
"""float32 numbers in a register."""

FLOATS = ir.VectorType(ir.FloatType(), LANES)
WORDS = ir.VectorType(ir.IntType(32), LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)


def words(value: int) -> Any:
    """A register full of one whole number."""
    return ir.Constant(WORDS, [value] * LANES)


def spread(builder: Any, number: Any, kind: Any) -> Any:
    """A register full of one number; `kind` is FLOATS or WORDS."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), words(0))


def place(builder: Any, address: Any, kind: Any) -> Any:
    """A pointer to a register's numbers in memory."""
    return builder.inttoptr(address, kind.as_pointer())


def prefetch(builder: Any, address: Any, nearness: int = 3) -> None:
    """Ask for a line of memory, into the nearest cache (3) or the second (2); what does not exist does no harm."""
    line, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [line, word, word, word])
    ask = builder.module.declare_intrinsic("llvm.prefetch", (line,), kind)
    read, keep, data = ir.Constant(word, 0), ir.Constant(word, nearness), ir.Constant(word, 1)
    builder.call(ask, [builder.inttoptr(address, line), read, keep, data])


def load(builder: Any, stored: Any, address: Any) -> Any:
    """`LANES` numbers of memory as float32."""
    item = {types.float32: ir.FloatType(), types.int8: ir.IntType(8)}.get(stored, ir.IntType(16))
    numbers = builder.load(place(builder, address, ir.VectorType(item, LANES)), align=stored.bitwidth // 8)
    if stored == types.float32:
        return numbers
    if stored == types.int8:
        return builder.sitofp(builder.sext(numbers, WORDS), FLOATS)
    if stored == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(numbers, WORDS), words(16)), FLOATS)
    return builder.fpext(builder.bitcast(numbers, ir.VectorType(ir.HalfType(), LANES)), FLOATS)


def narrowed(builder: Any, numbers: Any, stored: Any) -> Any:
    """float32 numbers rounded to the nearest of a kind, of two the even one."""
    if stored == types.float32:
        return numbers
    if stored == types.int16:
        return builder.bitcast(builder.fptrunc(numbers, ir.VectorType(ir.HalfType(), LANES)), _HALVES)
    bits = builder.bitcast(numbers, WORDS)
    odd = builder.and_(builder.lshr(bits, words(16)), words(1))
    rounded = builder.lshr(builder.add(builder.add(bits, words(0x7FFF)), odd), words(16))
    number = builder.fcmp_ordered("ord", numbers, numbers)  # what is none could be rounded to infinity
    return builder.trunc(builder.select(number, rounded, words(0x7FC0)), _HALVES)


# e to the power of r as a series, the highest power first.
_SERIES = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)


def power(builder: Any, x: Any) -> Any:
    """e to the power of a float32 or of a register of them, from -87 to 88, within two units of the last place.

    `x = n ln 2 + r`; the power of r is a series, 2 to the power of n is written into the exponent.
    """
    kind, whole = (FLOATS, WORDS) if x.type == FLOATS else (ir.FloatType(), ir.IntType(32))
    suffix, flags = (f"v{LANES}f32" if kind == FLOATS else "f32"), ("contract",)

    def constant(of: Any, value: float) -> Any:
        return ir.Constant(of, value if of in (ir.FloatType(), ir.IntType(32)) else [value] * LANES)

    rint = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), f"llvm.rint.{suffix}")
    n = builder.call(rint, [builder.fmul(x, constant(kind, 1.4426950408889634))])
    r = builder.fsub(x, builder.fmul(n, constant(kind, 0.693359375), flags=flags), flags=flags)
    r = builder.fadd(r, builder.fmul(n, constant(kind, 2.12194440e-4), flags=flags), flags=flags)
    series = constant(kind, _SERIES[0])
    for factor in _SERIES[1:]:
        series = builder.fadd(builder.fmul(series, r, flags=flags), constant(kind, factor), flags=flags)
    exponent = builder.shl(builder.add(builder.fptosi(n, whole), constant(whole, 127)), constant(whole, 23))
    return builder.fmul(series, builder.bitcast(exponent, kind))


@intrinsic
def round_into(_typing: Any, sums: Any, numbers: Any, count: Any, like: Any) -> Any:
    """Write float32 numbers at one address rounded to another; so many, a multiple of `LANES`."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        sums, numbers, count, _ = arguments

        def number(value: int) -> Any:
            return context.get_constant(types.int64, value)

        with cgutils.for_range_slice(builder, number(0), count, number(LANES), intp=ir.IntType(64)) as (index, _):
            found = load(builder, types.float32, builder.add(sums, builder.mul(index, number(4))))
            out = narrowed(builder, found, like)
            address = builder.add(numbers, builder.mul(index, number(like.bitwidth // 8)))
            builder.store(out, place(builder, address, out.type), align=like.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, like), generate


def _folded(builder: Any, one: Any, other: Any, groups: int) -> Any:
    """Two registers of so many sums in parts as one register of twice as many, in half as many parts."""
    each = LANES // groups
    starts = [register * LANES + group * each for register in range(2) for group in range(groups)]
    halves = []
    for begin in (0, each // 2):
        order = [start + begin + lane for start in starts for lane in range(each // 2)]
        halves.append(builder.shuffle_vector(one, other, ir.Constant(WORDS, order)))
    return builder.fadd(*halves)


def totals(builder: Any, registers: list[Any]) -> tuple[Any, int]:
    """The sum over each of a power of two of registers, in one register; how many lanes apart.

    By halves, two registers at a time, which takes a third of the instructions of one register at a time.
    """
    groups = 1
    while len(registers) > 1:
        registers = [_folded(builder, registers[at], registers[at + 1], groups) for at in range(0, len(registers), 2)]
        groups *= 2
    (numbers,), each = registers, LANES // groups
    part = each
    while part > 1:
        part //= 2
        order = ir.Constant(WORDS, [lane // each * each + (lane + part) % each for lane in range(LANES)])
        numbers = builder.fadd(numbers, builder.shuffle_vector(numbers, ir.Constant(FLOATS, ir.Undefined), order))
    return numbers, each


def store_some(builder: Any, numbers: Any, lanes: list[int], address: Any) -> None:
    """Some lanes of a register side by side."""
    order = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    chosen = builder.shuffle_vector(numbers, ir.Constant(FLOATS, ir.Undefined), order)
    builder.store(chosen, place(builder, address, chosen.type), align=4)
