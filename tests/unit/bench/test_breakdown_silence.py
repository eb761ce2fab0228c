# SPDX-License-Identifier: Apache-2.0
"""The profiler behind the breakdown says nothing of its own."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import os
import torch
from hf_polyspec.bench.breakdown import _silent
with _silent(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
    torch.ones(3) + 1
assert any("add" in event.name for event in found.events())
print(os.environ.get("KINETO_LOG_LEVEL"))
"""


def run(**more: str) -> tuple[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"} | more
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_the_profiler_is_silent_unless_it_is_asked() -> None:
    assert run() == ("None", "")
    assert run(KINETO_LOG_LEVEL="1")[0] == "1"  # the user's stays
