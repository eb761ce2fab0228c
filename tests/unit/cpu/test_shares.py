"""Which part of a product a thread does next."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_polyspec.cpu.compiled.shares import ANYBODY, COUNTERS, ROOM, Shares, next_part


def _task(room: int) -> tuple[np.ndarray, np.ndarray]:
    """A stage's task and its counters."""
    counters, task = np.zeros(room, np.int64), np.zeros(18, np.int64)
    task[ROOM], task[COUNTERS] = room, counters.ctypes.data
    return task, counters


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("parts", [1, 4, 8, 23])
def test_every_part_once_in_whatever_order_threads_come(threads: int, parts: int) -> None:
    order = random.Random(threads * 100 + parts)
    task, _ = _task(threads)
    done: list[list[int]] = [[] for _ in range(threads)]
    going = list(range(threads))
    while going:
        me = order.choice(going)
        part = int(next_part(task.ctypes.data, me, threads, parts))
        if part < parts:
            done[me].append(part)
        else:
            going.remove(me)
    assert sorted(part for own in done for part in own) == list(range(parts))
    for me, own in enumerate(done):
        share = range(me * parts // threads, (me + 1) * parts // threads)
        before = [part for part in own if part in share]
        assert own[: len(before)] == before == sorted(before)  # its own first, in the order of the memory


def test_whoever_is_alone_does_what_others_have_left() -> None:
    task, _ = _task(2)
    assert [int(next_part(task.ctypes.data, 1, 2, 6)) for _ in range(7)] == [3, 4, 5, 0, 1, 2, 6]


@pytest.mark.parametrize(("me", "room"), [(ANYBODY, 2), (0, 1)])
def test_without_shares_parts_go_to_whoever_comes_first(me: int, room: int) -> None:
    task, counters = _task(room)
    assert [int(next_part(task.ctypes.data, me, 2, 3)) for _ in range(4)] == [0, 1, 2, 3]
    assert not counters.any()


def test_counters_of_stages_lie_apart_and_begin_anew() -> None:
    shares = Shares(3)
    assert shares.room == torch.get_num_threads()
    first, second, _ = (int(address) for address in shares.addresses())
    task = np.zeros(18, np.int64)
    task[ROOM], task[COUNTERS] = shares.room, second
    assert int(next_part(task.ctypes.data, 0, 1, 4)) == 0
    assert int(next_part(task.ctypes.data, 0, 1, 4)) == 1
    assert second - first == 8 * shares.room
    shares.clear()
    assert int(next_part(task.ctypes.data, 0, 1, 4)) == 0
