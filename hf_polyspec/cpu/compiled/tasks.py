# SPDX-License-Identifier: Apache-2.0
"""A compiled function on all of torch's threads.

numba's own threads would be a second pool beside torch's, and idle threads of either pool spin for a while on the
cores that the other wants. So a task goes to the OpenMP that torch has loaded, through the door that GCC's compiled
code uses (`GOMP_parallel`, which Intel's library has as well).

A task is a row of 64-bit integers in memory: the first counts the parts that threads have taken, the others are sizes
and addresses. Every thread runs the same function on the same task and takes part after part until none is left, so a
slow core does less.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target
from numba.core.serialize import dumps
from numba.extending import intrinsic
from torch.profiler import record_function

from .support import threads_library

PARTS_A_THREAD = 4


@intrinsic
def pointer(_typing: Any, address: Any, like: Any) -> Any:
    """A pointer to numbers like `like`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), generate


@intrinsic
def count(_typing: Any, address: Any) -> Any:
    """Count one more at an address; how many there were before."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        counter = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), 1), "acq_rel")

    return types.int64(types.int64), generate


@njit
def take(task: Any) -> Any:
    """The number of the next part, which nobody else gets."""
    return count(task)


FAILED = 1 << 40
"""A task's counter stands here or beyond when a thread got no memory: more than there are parts of any task."""


@intrinsic
def _give_up(_typing: Any, address: Any) -> Any:
    """Count all parts of a task as taken."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        counter = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.atomic_rmw("add", counter, ir.Constant(ir.IntType(64), FAILED), "acq_rel")
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _allocate(_typing: Any, size: Any) -> Any:
    """The address of so many bytes, a multiple of 64; 0 if there are not as many."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, [word, word]), "aligned_alloc")
        return builder.call(function, [ir.Constant(word, 64), arguments[0]])

    return types.int64(types.int64), generate


@intrinsic
def release(_typing: Any, address: Any) -> Any:
    """Give back what `borrow` gave."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "free"), [arguments[0]])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit
def whole_lines(size: Any) -> Any:
    """Bytes rounded up to whole lines of memory."""
    return (size + 63) // 64 * 64


@njit
def behind(numbers: Any) -> Any:
    """The address of the first line of memory after an array."""
    return numbers.ctypes.data + whole_lines(numbers.size * numbers.itemsize)


@njit
def borrow(task: Any, size: Any) -> Any:
    """Memory for one thread of a task until `release`; 0 if there is none, and then the task ends without a result.

    numba's arrays would raise. What a thread raises nobody catches, and at the next gate the others would wait for it.

    Args:
        task: Its address.
        size: Bytes, of `whole_lines`.
    """
    memory = _allocate(size)
    if memory == 0:
        _give_up(task)
    return memory


@intrinsic
def _is_open(_typing: Any, address: Any) -> Any:
    """What stands at an address by now, with everything written before it."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        flag = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(flag, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _open(_typing: Any, address: Any) -> Any:
    """Write 1, after everything written before."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        flag = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store_atomic(ir.Constant(ir.IntType(64), 1), flag, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _call_by_address(_typing: Any, address: Any) -> Any:
    """Call a C function `int f(void)`."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])

    return types.int32(types.int64), generate


@intrinsic
def _pause(_typing: Any) -> Any:
    """Let the core's other half go first for a moment."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), kind), [])
        return context.get_dummy_value()

    return types.void(), generate


GATES = 11
"""Gates that a task of several stages has room for."""
# Such a task begins with its counter, the addresses of three C functions, and two numbers for each gate.
_BEFORE_GATES = 4
HEADER = _BEFORE_GATES + 2 * GATES
_SPINS = 4000


@njit
def team(task: Any) -> Any:
    """How many threads run this task."""
    return np.int64(_call_by_address(carray(pointer(task, np.int64(0)), 3)[1]))


@njit
def member(task: Any) -> Any:
    """Which of the threads that run this task this one is, from 0 on."""
    return np.int64(_call_by_address(carray(pointer(task, np.int64(0)), 4)[3]))


@njit
def enter(task: Any, gate: Any, threads: Any) -> Any:
    """Wait until all threads are at a gate; True for one of them, on whose `leave` the others wait."""
    place = task + 8 * (_BEFORE_GATES + 2 * gate)
    if count(place) == threads - 1:
        return True
    spins = 0
    while _is_open(place + 8) == 0:
        _pause()
        spins += 1
        if spins % _SPINS == 0:  # more threads than cores: whoever is waited for may need this one
            _call_by_address(carray(pointer(task, np.int64(0)), 3)[2])
    return False


@njit
def leave(task: Any, gate: Any) -> None:
    """Let the others go on."""
    _open(task + 8 * (_BEFORE_GATES + 2 * gate) + 8)


def compiled(function: Callable[[Any], None]) -> int:
    """The address of a task's function, compiled now or read from the disk.

    Args:
        function: Takes the address of a task.
    """
    make = cfunc(types.void(types.intp), cache=True, error_model="numpy")
    # Whatever numba's cache raises is about what is kept and not about the function: a file that a kill or a full disk
    # has cut short is unpickled into any exception there is.
    with suppress(Exception):
        _name_apart(function)
        return int(make(function).address)
    with suppress(Exception):
        FunctionCache(function).flush()  # the index is begun anew, and what it named is written over
        return int(make(function).address)
    # Nowhere to keep it: a read-only installation without a home folder, a full disk.
    return int(cfunc(types.void(types.intp), error_model="numpy")(function).address)


def _name_apart(function: Callable[[Any], None]) -> None:
    """Give what a function encloses, on this CPU, files of its own.

    numba numbers what it keeps of one function in one index. Of two processes that keep one variant each at the same
    time, both take the next number, and the index may come to name the one's machine code for the other's.
    """
    enclosed = dumps(tuple(cell.cell_contents for cell in function.__closure__ or ()))
    machine = repr(cpu_target.target_context.codegen().magic_tuple())
    name = hashlib.sha256(enclosed + machine.encode()).hexdigest()[:16]
    if not function.__qualname__.endswith(name):
        function.__qualname__ += f".{name}"


def number_bits(value: float) -> int:
    """A float as one of a task's integers; `number` reads it."""
    return int(struct.unpack("q", struct.pack("d", value))[0])


@njit
def number(task: Any, index: Any) -> Any:
    """The float at `index` of a task."""
    return np.float32(carray(pointer(task + 8 * index, np.float64(0)), 1)[0])


class _OpenMp:
    """torch's threads; opened once."""

    def __init__(self) -> None:
        path = threads_library()
        assert path is not None
        self.parallel = ctypes.CDLL(str(path)).GOMP_parallel
        self.parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self.parallel.restype = None
        self.team_size = _address(ctypes.CDLL(str(path)).omp_get_num_threads)
        self.thread = _address(ctypes.CDLL(str(path)).omp_get_thread_num)
        self.give_way = _address(ctypes.CDLL(None).sched_yield)


def _address(function: Any) -> int:
    found = ctypes.cast(function, ctypes.c_void_p).value
    assert found is not None
    return found


_open_mp = _OpenMp()
_NOTHING = nullcontext()
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_int64)


Launch = Callable[[int], None]
"""Does the task at an address and returns when it is done."""


def alone(address: int) -> Launch:
    """A compiled function on this thread: for small tasks."""
    return _FUNCTION(address)


def together(address: int) -> Launch:
    """A compiled function on as many threads as torch uses."""

    def launch(task: int) -> None:
        _open_mp.parallel(address, task, torch.get_num_threads(), 0)

    return launch


def run(name: str, launch: Launch, *numbers: int) -> None:
    """Do a task.

    Args:
        name: What torch's profiler calls it.
        launch: From `alone` or `together`.
        numbers: The task after its counter.

    Raises:
        MemoryError: A thread got no memory to work in.
    """
    task = array("q", (0, *numbers))
    with _shown(name):
        launch(task.buffer_info()[0])
    check_counter(task[0])


def check_counter(count: int) -> None:
    """Refuse the result of a task whose counter, or whose stages' largest, stands here.

    Raises:
        MemoryError: A thread got no memory to work in.
    """
    if count >= FAILED:
        raise MemoryError("There was no memory for the numbers in between of a pass on the CPU.")


def profiling() -> bool:
    """Whether torch's profiler is watching."""
    return bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]


def _shown(name: str) -> AbstractContextManager[Any]:
    return record_function(name) if profiling() else _NOTHING


def staged(stages: Sequence[tuple[int, ...]], slot: int) -> array[int]:
    """The task of a function that waits at gates between its stages.

    Args:
        stages: The numbers of each stage after its counter.
        slot: Numbers from one stage's counter to the next one's.
    """
    task = array("q", (0, _open_mp.team_size, _open_mp.give_way, _open_mp.thread))
    task.extend((0,) * (HEADER - len(task)))
    for numbers in stages:
        task.append(0)
        task.extend(numbers)
        task.extend((0,) * (slot - 1 - len(numbers)))
    return task


def part_size(count: int, multiple: int) -> int:
    """How many of `count` things a thread takes at once, a multiple of `multiple`."""
    parts = torch.get_num_threads() * PARTS_A_THREAD
    return max(1, -(-count // (parts * multiple))) * multiple
