# SPDX-License-Identifier: Apache-2.0
"""One bounded, seeded round of faults. `python -m tests.faults --rounds N` runs long ones."""

from __future__ import annotations

import ctypes
import faulthandler
import random
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.faults import children, guards, interrupts, rounds, torn

SEED = 20_261_129


def chance(name: str) -> random.Random:
    return random.Random(f"{SEED} {name}")


def test_interrupts_at_lines_of_the_storage_room(tmp_path: Path) -> None:
    assert rounds.interrupted(tmp_path, chance("interrupts"), 9) > 40


def test_interrupts_of_an_answer_that_extends_the_callers_cache() -> None:
    assert rounds.answers_interrupted(chance("answers"), 601, 83) > 25


def test_kills_at_lines_of_the_storage_room(tmp_path: Path) -> None:
    assert rounds.killed(tmp_path, chance("kills"), 29) > 12


def test_full_disks_are_an_oserror(tmp_path: Path) -> None:
    assert rounds.full(tmp_path, chance("full"), 3) > 5
    rounds.mounted(tmp_path / "mounted", chance("mounted"))  # nothing where no file system may be mounted


def test_torn_files_are_named_or_read_as_far_as_they_are_whole(tmp_path: Path) -> None:
    assert rounds.torn_files(tmp_path, chance("torn"), 6) > 100


def test_rival_writers(tmp_path: Path) -> None:
    assert rounds.rivals(tmp_path, 0.5) >= 8 * rounds.LEAST


@pytest.mark.skipif(sys.platform != "linux", reason="forbidden pages are asked for as Linux has them")
def test_compiled_functions_stay_inside_their_buffers() -> None:
    rounds.fenced(SEED, 3)


# What injects faults must itself be seen to do so.


def test_an_interrupt_comes_at_every_line_and_a_swallowed_one_is_found() -> None:
    steps: list[int] = []

    def call() -> None:
        steps.clear()
        steps.append(1)
        steps.append(2)

    left: list[list[int]] = []
    count = interrupts.interrupt_each(call, lambda: left.append(list(steps)), where=lambda code: code is call.__code__)
    assert count == 3
    assert left == [[], [], [1], [1, 2]]

    def deaf() -> None:
        try:
            steps.append(1)
        except KeyboardInterrupt:
            steps.clear()

    with pytest.raises(interrupts.Swallowed):
        interrupts.interrupt_each(deaf, lambda: None, where=lambda code: code is deaf.__code__, first=1)


def test_what_a_with_holds_is_let_go_whatever_the_place() -> None:
    lock, steps = threading.Lock(), []

    def call() -> None:
        with lock:
            steps.append(1)
        steps.append(2)

    def check() -> None:
        assert not lock.locked()

    assert interrupts.interrupt_each(call, check, where=lambda code: code is call.__code__) == 2
    assert steps == [1, 1, 2]


def test_opcodes_are_finer_places_than_lines() -> None:
    def call() -> int:
        return sum(i * i for i in range(3))

    counts = [
        interrupts.interrupt_each(call, lambda: None, where=lambda code: code is call.__code__, opcodes=opcodes)
        for opcodes in (False, True)
    ]
    assert counts[0] == 1
    assert counts[1] > 5


def test_a_writer_that_is_not_atomic_is_caught(tmp_path: Path) -> None:
    file = tmp_path / "file"

    def prepare() -> None:
        file.write_text("old")

    def call() -> None:
        with open(file, "w") as opened:
            opened.write("new")

    def check() -> None:
        assert file.read_text() in ("old", "new")

    for each in (interrupts.interrupt_each, children.kill_each):
        with pytest.raises(AssertionError):
            each(call, check, prepare=prepare, where=lambda code: code is call.__code__)
    code, told = children.on_a_full_disk(lambda: file.write_bytes(bytes(100)), 50)
    assert (code, told.split()[:2]) == (children.FAILED, ["OSError", "27"])


def test_a_reader_that_takes_half_a_file_for_whole_is_caught(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a long text\n" * 9)
    with pytest.raises(AssertionError, match="was read as"):
        torn.tear_each(file, file.read_text, chance("self"), whole=lambda found: found == "a long text\n" * 9)


def _touch(place: int) -> None:
    faulthandler.disable()  # pytest's, which would tell of it at length
    ctypes.string_at(place, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="forbidden pages are asked for as Linux has them")
@pytest.mark.parametrize("after", [True, False])
def test_a_touch_past_a_buffer_is_a_segmentation_fault(after: bool) -> None:
    with guards.Fence(after):
        made = [torch.empty(5, 3), torch.ones(2).new_empty(7), torch.empty_like(torch.ones(9), dtype=torch.int8)]
    for tensor in [*made, guards.moved(torch.arange(5), after=after)]:
        size = tensor.numel() * tensor.element_size()
        place = tensor.data_ptr() + size if after else tensor.data_ptr() - 1
        code, told = children.in_child(lambda place=place: _touch(place))  # type: ignore[misc]
        assert code == -11, told
        code, told = children.in_child(lambda t=tensor: ctypes.string_at(t.data_ptr(), t.nbytes))  # type: ignore[misc]
        assert code == 0, told
    guards.free()
