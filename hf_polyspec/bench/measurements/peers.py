# SPDX-License-Identifier: Apache-2.0
"""Another engine's speed beside this package's, on the same batches: `polyspec measure peers --peer vllm`.

The peer runs in a process and an environment of its own (`--python` names its interpreter), is loaded once, and takes
turns with the ways of `polyspec measure batches` in this one: prompts of unequal length, greedy texts, the reading of
the prompts included. Its cache of prompts is off, since the same ones come again.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ...host.waiting import wait_for
from ...models.by_name import resolve
from . import arguments, joining
from .batch_jobs import Job, jobs, on_device
from .batches import ALONE, answers_of, generated
from .ways import finish, in_turns, parser_of, quotient, table_of, targets_of

PEERS = {"vllm": Path(__file__).with_name("peer_vllm.py")}
"""By name, the program that runs it."""
CHAINS = ("suffix", "auto")


@dataclass(frozen=True)
class Rate:
    """One way of generating one batch.

    Attributes:
        form: of the target here; way: the peer with its version, `ALONE` or the levels' names; batch: rows.
        tokens: emitted; seconds: median; per_second: tokens a second; ratio: of these to the peer's.
        alike: rows whose text is the peer's.
    """

    form: str
    way: str
    batch: int
    tokens: int
    seconds: float
    per_second: float
    ratio: float
    alike: int


class Peer:
    """A running peer.

    Args:
        name: one of `PEERS`; process: that was asked for its engine; errors: the file for what else it says.

    Attributes:
        name: with its version.

    Raises:
        RuntimeError: it did not come up; the last that it said is in the sentence.
    """

    def __init__(self, name: str, process: subprocess.Popen[str], errors: Path) -> None:
        self._process, self._errors, self.name = process, errors, name
        self.name = f"{name} {self._answer()['version']}"

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds and new ids of greedy texts."""
        _send(self._process, {"prompts": list(prompts), "new_tokens": new_tokens})
        answer = self._answer()
        return answer["seconds"], answer["texts"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._errors.read_text(encoding="utf-8", errors="replace").strip()
            raise RuntimeError(f"{self.name} ended without an answer: {said[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def running(name: str, python: str, engine: dict[str, Any]) -> Iterator[Peer]:
    """A peer, for as long as the block lasts.

    Args:
        name: one of `PEERS`; python: the interpreter of its environment; engine: what its engine is made with.
    """
    with tempfile.TemporaryDirectory() as scratch:
        errors = Path(scratch) / "said"
        with (
            errors.open("w") as said,
            subprocess.Popen(
                [python, str(PEERS[name])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
            ) as process,
        ):
            try:
                _send(process, engine)
                yield Peer(name, process, errors)
            finally:
                process.kill()


def _send(process: subprocess.Popen[str], request: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()


def measure(
    peer: Peer, target: Any, job: Job, chains: Sequence[str], *, form: str, new_tokens: int, rounds: int
) -> list[Rate]:
    """Time the peer and ways of this package on one batch, in turns.

    Args:
        peer: running, with the same weights; target: as it is to run here; job: the batch; form: the target's.
        chains: levels, their names with commas between; new_tokens: at most; rounds: of which the median counts.
    """
    job = on_device(job, target.device)
    levels: dict[str, list[str]] = {ALONE: [], **{chain: chain.split(",") for chain in chains}}
    rows = joining.rows_of(job.inputs)
    texts: dict[str, list[list[int]]] = {}

    def timed(way: str, turn: int) -> float:
        if way == peer.name:
            seconds, texts[way] = peer.generate(rows, new_tokens)
            return seconds
        began = time.perf_counter()
        found = generated(target, job.inputs, levels[way], new_tokens, **job.options)
        wait_for(target.device)
        seconds = time.perf_counter() - began
        texts[way] = answers_of(target, job, found)
        return seconds

    whole = in_turns(timed, [peer.name, *levels], rounds)
    found = []
    for way, seconds in whole.items():
        tokens, median = sum(map(len, texts[way])), statistics.median(seconds)
        alike = sum(one == other for one, other in zip(texts[way], texts[peer.name], strict=True))
        theirs = sum(map(len, texts[peer.name]))
        ratio = quotient(whole, way, peer.name) * tokens / theirs
        found.append(Rate(form, way, job.rows, tokens, median, tokens / median, ratio, alike))
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("peers", __doc__, CHAINS)
    parser.add_argument("--peer", choices=PEERS, default="vllm")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the peer's environment")
    parser.add_argument("--batch", nargs="+", type=arguments.count, default=[1, 8])
    parser.add_argument("--memory", type=float, default=0.4, help="share of the memory that the peer may take")
    parser.add_argument("--eager", action="store_true", help="the peer does not compile its model")
    given = parser.parse_args(words)
    console = Console(width=110)
    found: list[Rate] = []
    for form, target, tokenizer in targets_of(given):
        batches = jobs(tokenizer, "unequal", given.batch)
        longest = max(job.inputs["input_ids"].shape[1] for job in batches) + given.new_tokens + 16
        engine = {
            "model": resolve(given.model)[0], "dtype": form.partition("+")[0], "max_model_len": longest,
            "max_num_seqs": max(given.batch), "enforce_eager": given.eager, "enable_prefix_caching": False,
            "gpu_memory_utilization": given.memory,
        }  # fmt: skip
        with running(given.peer, given.python, engine) as peer:
            for job in batches:
                rates = measure(
                    peer, target, job, given.chain, form=form, new_tokens=given.new_tokens, rounds=given.rounds
                )
                table = table_of(f"{form}, {job.title}", ("tokens", "seconds", "tokens/s", "to the peer", "its text"))
                for rate in rates:
                    table.add_row(
                        rate.way, str(rate.tokens), f"{rate.seconds:.2f}", f"{rate.per_second:.0f}",
                        f"{rate.ratio:.2f}", f"{rate.alike} of {rate.batch}",
                    )  # fmt: skip
                console.print(table)
                found += rates
    finish(console, given, rates=found)
