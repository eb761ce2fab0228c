# SPDX-License-Identifier: Apache-2.0
"""A KeyboardInterrupt at every place of a call in turn.

Python delivers Ctrl-C between two instructions of the main thread, wherever it happens to be. `interrupt_each` runs a
call again and again and raises at its first line, its second, and so on, so that no place is left to luck.
"""

from __future__ import annotations

import gc
import linecache
import os
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

Where = Callable[[CodeType], bool]
PACKAGE = f"{os.sep}hf_polyspec{os.sep}"


class Swallowed(AssertionError):
    """The call went on after an interrupt as if nothing had happened."""


def in_package(code: CodeType) -> bool:
    """Whether code belongs to hf_polyspec."""
    return PACKAGE in code.co_filename and f"{os.sep}tests{os.sep}" not in code.co_filename


def in_room(name: str) -> Where:
    """Whether code belongs to one room of hf_polyspec, such as `storage`."""
    return lambda code: f"{PACKAGE}{name}{os.sep}" in code.co_filename


def interrupt_each(
    call: Callable[[], Any],
    check: Callable[[], Any],
    every: int = 1,
    *,
    prepare: Callable[[], Any] = lambda: None,
    where: Where = in_package,
    opcodes: bool = False,
    first: int = 0,
    error: Callable[[], BaseException] = KeyboardInterrupt,
) -> int:
    """Interrupt a call at its every n-th place, and check what it left each time.

    Args:
        call: what is interrupted; it is run once for every place and once to its end.
        check: raises where something is wrong; called after every run, also the last, which was not interrupted.
        every: places from one interrupt to the next; 1 for all.
        prepare: called before every run, such as to make the state that the call changes anew.
        where: whose places count; code for which it is False runs undisturbed, and so does what it calls unless that
            counts itself.
        opcodes: whether places are bytecodes instead of lines, many times as many.
        first: the first place, such as a random one below `every`.
        error: makes what is raised.

    Returns:
        How many interrupts there were.

    Raises:
        Swallowed: an interrupt did not come out of the call.
    """
    count, place = 0, first
    while True:
        prepare()
        raised = error()
        reached = True
        try:
            reached = at_place(call, place, _raising([raised]), where, opcodes)
        except BaseException as found:
            if raised not in (found, *_causes(found)):
                raise
        else:
            if reached:
                raise Swallowed(f"The interrupt at place {place} was swallowed.")
        del raised  # nobody has it in hand any more, nor the frames of the call and what they hold
        check()
        if not reached:
            return count
        count += 1
        place += every


def at_place(call: Callable[[], Any], place: int, act: Callable[[], Any], where: Where, opcodes: bool = False) -> bool:
    """Run a call, and do something when it comes to its `place`-th place.

    Args:
        call: what is run; place: counted from 0; where, opcodes: as for `interrupt_each`.
        act: what is done there; what it raises comes out of the call at that place.

    Returns:
        Whether it came there.
    """
    counted = [0]

    def local(frame: FrameType, event: str, _argument: Any) -> Any:
        if event == ("opcode" if opcodes else "line") and (opcodes or not _holds_on(frame)):
            counted[0] += 1
            if counted[0] == place + 1:
                act()
        return local

    def entered(frame: FrameType, _event: str, _argument: Any) -> Any:
        if not where(frame.f_code):
            return None
        if opcodes:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return local

    before, collects = sys.gettrace(), gc.isenabled()
    gc.disable()  # what other calls have left is not to end in the middle of this one
    sys.settrace(entered)
    try:
        call()
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
    return counted[0] > place


def _holds_on(frame: FrameType) -> bool:
    """Whether a line is that of a `with`, which is come to a second time before what it holds is let go.

    A trace function is asked there, and what it raised would leave a lock held for ever; Ctrl-C is not delivered
    between the last instruction within a `with` and the call that lets go.
    """
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith(("with ", "async with "))


def _raising(errors: list[BaseException]) -> Callable[[], Any]:
    """Raises the error, and keeps no hold of it: its traceback would lead back to it and keep all frames alive."""

    def act() -> None:
        raise errors.pop()

    return act


def _causes(error: BaseException) -> list[BaseException]:
    """What an exception was raised from or while handling."""
    found: list[BaseException] = []
    while (error := error.__cause__ or error.__context__) is not None and error not in found:  # type: ignore[assignment]
        found.append(error)
    return found
