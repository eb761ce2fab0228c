# SPDX-License-Identifier: Apache-2.0
"""One seeded round of all faults, and how many of each there were."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_polyspec.errors import FolderInUseError
from hf_polyspec.storage import atomic, lines, locks, reading

from . import children, interrupts, torn, workloads

ROOM = interrupts.in_room("storage")
LEAST = 5
"""What every rival does at least."""


def interrupted(place: Path, chance: random.Random, every: int) -> int:
    """Interrupt every workload at every n-th line of the storage room, from a line drawn by chance."""
    count = 0
    for work in workloads.workloads(place).values():
        first = chance.randrange(every)
        count += interrupts.interrupt_each(work.call, work.check, every, prepare=work.prepare, where=ROOM, first=first)
    return count


def answers_interrupted(chance: random.Random, lines: int, opcodes: int) -> int:
    """Interrupt generate() with a caller's cache at every n-th line, and the writing of the cache at n-th opcodes."""
    from .answers import interrupted

    return interrupted(chance.randrange(lines), lines) + interrupted(chance.randrange(opcodes), opcodes, opcodes=True)


def killed(place: Path, chance: random.Random, every: int) -> int:
    """Kill a process at every n-th line of the storage room."""
    count = 0
    for work in workloads.workloads(place).values():
        count += children.kill_each(
            work.call, work.check, every, prepare=work.prepare, where=ROOM, first=chance.randrange(every)
        )
    return count


def full(place: Path, chance: random.Random, sizes: int) -> int:
    """Let every workload meet a full disk, at sizes drawn by chance: an OSError, and all as it was."""
    count = 0
    for name, work in workloads.workloads(place).items():
        for _ in range(sizes):
            work.prepare()
            code, told = children.on_a_full_disk(work.call, chance.randrange(1, 3000))
            assert code in (0, children.FAILED), f"{name}: ended by {code}"
            assert code == 0 or "OSError" in told.split(" ", 1)[0], f"{name}: {told}"
            assert code == 0 or " 27 " in told, f"{name}: {told}"  # EFBIG
            assert work.check() == (code == 0) or code != 0, name
            count += code != 0
    return count


def mounted(place: Path, chance: random.Random) -> int:
    """The same on a file system that is really full, where one may be mounted."""
    count = 0
    place.mkdir(exist_ok=True)
    with children.small_disk(place, 256 << 10) as made:
        if not made:
            return 0
        for name, work in workloads.workloads(place).items():
            work.prepare()
            filler = place / "filler"
            atomic.allocate(filler, 1 << 12)
            free = _fill(filler, chance.randrange(0, 3) * 4096)
            code, told = children.in_child(work.call)
            assert code in (0, children.FAILED), f"{name}: ended by {code} with {free} bytes free"
            assert code == 0 or ("OSError" in told.split(" ", 1)[0] and " 28 " in told), f"{name}: {told}"  # ENOSPC
            filler.unlink()
            work.check()
            count += code != 0
    return count


def _fill(filler: Path, left: int) -> int:
    """Grow a file until about `left` bytes of its file system are free."""
    import os

    with open(filler, "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            os.ftruncate(file.fileno(), max(0, file.tell() - left))
    return left


def torn_files(place: Path, chance: random.Random, some: int) -> int:
    """Damage every kind of file that is read back."""
    workloads.fresh(place)
    count = workloads.journal_prefix(place / "journal.jsonl", chance, some)
    for name, (make, read, zeros) in workloads.READERS.items():
        folder = place / name
        workloads.fresh(folder)
        file = make(folder)
        right = read(file)
        count += torn.tear_each(
            file, lambda read=read, file=file: read(file), chance, whole=lambda found, right=right: found == right,
            some=some, zeros=zeros,
        )  # fmt: skip
    return count


def rivals(place: Path, seconds: float) -> int:
    """Threads and processes that write the same files at once: readers never see half of one."""
    workloads.fresh(place)
    stop = threading.Event()
    failures: list[BaseException] = []
    done: list[int] = []

    def repeat(act: Callable[[int], Any]) -> threading.Thread:
        mine = len(done)
        done.append(0)

        def run() -> None:
            try:
                while not stop.is_set():
                    act(done[mine])
                    done[mine] += 1
            except BaseException as error:
                failures.append(error)

        return threading.Thread(target=run)

    file = place / "shared.json"
    atomic.write_json(file, {"writer": -1, "text": ""})

    def write(writer: int) -> Callable[[int], Any]:
        return lambda number: atomic.write_json(file, {"writer": writer, "text": "x" * (number % 50 * 400)})

    def read(_number: int) -> None:
        assert set(reading.read_json(file)) == {"writer", "text"}

    def add(number: int) -> None:
        with contextlib.suppress(FolderInUseError), locks.one_writer(place / "run"):
            lines.append_lines(place / "run" / "lines.jsonl", [json.dumps({"number": number})] * 3)

    threads = [repeat(write(i)) for i in range(3)] + [repeat(read) for _ in range(2)] + [repeat(add) for _ in range(3)]
    process = multiprocessing.get_context("fork").Process(target=_rival, args=(place, seconds))
    process.start()
    for thread in threads:
        thread.start()
    stop.wait(seconds)
    while min(done) < LEAST and not failures:  # on a machine that does other things as well
        stop.wait(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    process.join()
    assert not failures, failures[0]
    assert process.exitcode == 0
    found = [line["number"] for line in lines.read_lines(place / "run" / "lines.jsonl")]
    assert all(found[i] == found[i + 1] == found[i + 2] for i in range(0, len(found), 3))
    return sum(done)


def _rival(place: Path, seconds: float) -> None:
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        atomic.write_json(place / "shared.json", {"writer": 9, "text": "y" * 5000})
        try:
            with locks.one_writer(place / "run"):
                lines.append_lines(place / "run" / "lines.jsonl", [json.dumps({"number": -1})] * 3)
        except FolderInUseError:
            pass


def fenced(seed: int, rounds: int) -> int:
    """Compiled functions between forbidden pages, in a process that a SIGSEGV may end."""
    command = [sys.executable, "-m", "tests.faults.passes", str(seed), str(rounds)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:] or ["nothing"]
    assert done.returncode == 0, f"exit {done.returncode} in {last[0]}: {done.stderr[-2000:]}"
    return int(last[0])


def round_of(seed: int, place: Path) -> Counter[str]:
    """Everything once, thoroughly: every line, many sizes.

    Args:
        seed: of all that is drawn; place: an empty folder.

    Returns:
        How many faults of each kind there were; each was survived as promised, or this raises.
    """
    chance = random.Random(seed)
    return Counter(
        {
            "interrupts": interrupted(place / "interrupts", chance, 1),
            "interrupted answers": answers_interrupted(chance, 31, 7),
            "kills": killed(place / "kills", chance, 1),
            "full disks": full(place / "full", chance, 12) + mounted(place / "mounted", chance),
            "torn files": torn_files(place / "torn", chance, 40),
            "rival writes": rivals(place / "rivals", 3.0),
            "fenced passes": fenced(seed, 30),
        }
    )
