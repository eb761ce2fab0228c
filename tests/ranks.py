# SPDX-License-Identifier: Apache-2.0
"""Several processes that run one script: what tests of sharded models are made with.

A test file gives a folder and the name of a function of the module that is run as a script; each process meets the
others and calls it with the folder and its rank, and writes what it saw into a file, line by line, so that what a
process saw before it was killed is known too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

HERE = Path(__file__).parent


def meet(folder: str | Path, name: str) -> None:
    """Join the processes of one name and as many as `WORLD_SIZE` says.

    They find each other by a file. A port that is free when they are started may be another process's by the time that
    they have imported what they need.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{name}", rank=rank, world_size=size)


def together(script: Path, folder: Path, task: str, ranks: int = 2, seconds: float = 900) -> list[dict[str, Any]]:
    """Run `task` of a script in several processes.

    Returns:
        What each of them noted, by name.
    """
    running: list[subprocess.Popen[bytes]] = []
    (folder / f"meeting-{task}").unlink(missing_ok=True)
    for rank in range(ranks):
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
        fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        with open(folder / f"log-{task}-{rank}", "w") as log:
            running.append(
                subprocess.Popen(
                    [sys.executable, "-X", "faulthandler", "-W", "ignore", str(script), str(folder), task, str(rank)],
                    env={**os.environ, **fixed, **{name: str(value) for name, value in where.items()}},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                )
            )
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(one.poll() is None for one in running):
        time.sleep(0.05)
    late = [rank for rank, one in enumerate(running) if one.poll() is None]
    for rank in late:
        running[rank].send_signal(signal.SIGABRT)  # its log then says where it stood
    time.sleep(1.0 if late else 0.0)
    for one in running:
        one.kill()
        one.wait()
    logs = "\n".join((folder / f"log-{task}-{rank}").read_text()[-3000:] for rank in range(ranks))
    assert not late, f"still running after {seconds} s: {late}\n{logs}"
    found = []
    for rank in range(ranks):
        path = folder / f"seen-{task}-{rank}"
        lines = path.read_text().splitlines() if path.exists() else []
        found.append(dict(json.loads(line) for line in lines))
    assert all(found), logs
    return found


class Notes:
    """What one process saw."""

    def __init__(self, folder: str, task: str, rank: int) -> None:
        self._path = Path(folder) / f"seen-{task}-{rank}"

    def put(self, name: str, call: Callable[[], Any]) -> None:
        """Under a name, what a call gives (lists and numbers), or the error it raises."""
        try:
            found = call()
            found = found.tolist() if hasattr(found, "tolist") else found
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        with self._path.open("a") as file:
            file.write(json.dumps([name, found]) + "\n")


def run_task(tasks: dict[str, Any]) -> None:
    """What a script that `together` runs does: the task of its command line, `task(folder, notes, rank)`."""
    folder, name, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
    meet(folder, name)
    tasks[name](folder, Notes(folder, name, rank), rank)
