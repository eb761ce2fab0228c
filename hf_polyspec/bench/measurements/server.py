# SPDX-License-Identifier: Apache-2.0
"""What a server's door costs: `polyspec measure server`.

One chain writes greedy texts one after the other, in process by `generate()` and for one client that asks the server,
with and without a stream, taking turns. The client is OpenAI's, in a process of its own as clients are; the server
runs in this one, where the chain is.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ...generation.doors import generate
from ...integrations.server import ChainServer
from ...models.assistants import by_name
from ...models.conversation import encode_prompt
from ...planning.texts import PROMPTS
from . import arguments
from .same_seed import MORE_PROMPTS
from .ways import finish, in_turns, parser_of, table_of, target_of

IN_PROCESS = "generate()"
WHOLE = "the server"
STREAMED = "the server, streamed"
CHAINS = ("int8,suffix",)
_NAME = "measured"


@dataclass(frozen=True)
class Rate:
    """One way of asking one chain.

    Attributes:
        chain: the levels' names; way: how it was asked.
        tokens: of all texts; seconds: for them, the median; per_second: tokens a second.
        ratio: to `IN_PROCESS`.
        alike: texts that are those of `IN_PROCESS`; texts: how many there are.
    """

    chain: str
    way: str
    tokens: int
    seconds: float
    per_second: float
    ratio: float
    alike: int
    texts: int


class Client:
    """OpenAI's client in a process of its own.

    Args:
        port: of the server on this machine.

    Raises:
        RuntimeError: from `ask`, where it has gone.
    """

    def __init__(self, port: int) -> None:
        words = [sys.executable, "-m", "hf_polyspec.bench.measurements.server_client", str(port), _NAME]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, prompts: Sequence[str], new_tokens: int, stream: bool) -> tuple[float, list[str]]:
        """Seconds for all of them, one after the other, and the texts."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"prompts": list(prompts), "new_tokens": new_tokens, "stream": stream}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client ended with {self._process.wait()}.")
        answer = json.loads(line)
        return float(answer["seconds"]), list(answer["texts"])

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def measure(
    target: Any, tokenizer: Any, chain: str, prompts: Sequence[str], *, new_tokens: int, rounds: int, slots: int
) -> list[Rate]:
    """Time one chain in process and through a server, in turns.

    Args:
        target: as it is to run; tokenizer: of it, with a chat template; chain: names with commas between.
        prompts: what users ask; new_tokens: at most; rounds: of which the median counts; slots: of the server.
    """
    assistants = by_name(target, chain.split(","))
    encoded = [encode_prompt(tokenizer, text, target.device) for text in prompts]
    texts: dict[str, list[str]] = {}
    counts: list[int] = []

    def here() -> float:
        began = time.perf_counter()
        rows = [
            generate(target, **ids, assistant_models=assistants, max_new_tokens=new_tokens, do_sample=False)
            for ids in encoded
        ]
        seconds = time.perf_counter() - began
        new = [row[0, ids["input_ids"].shape[1] :] for row, ids in zip(rows, encoded, strict=True)]
        counts[:] = map(len, new)
        texts[IN_PROCESS] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
        return seconds

    def timed(way: str, _: int) -> float:
        if way == IN_PROCESS:
            return here()
        seconds, texts[way] = client.ask(prompts, new_tokens, way == STREAMED)
        return seconds

    door = ChainServer(target, tokenizer, assistants, name=_NAME, port=0, slots=slots)
    with door as server, Client(server.port) as client:
        found = in_turns(timed, (IN_PROCESS, WHOLE, STREAMED), rounds)
    tokens, base = sum(counts), statistics.median(found[IN_PROCESS])
    rates = []
    for way, each in found.items():
        seconds = statistics.median(each)
        alike = sum(one == other for one, other in zip(texts[way], texts[IN_PROCESS], strict=True))
        rates.append(Rate(chain, way, tokens, seconds, tokens / seconds, base / seconds, alike, len(prompts)))
    return rates


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("server", __doc__, CHAINS)
    parser.add_argument("--prompts", type=arguments.count, default=4)
    parser.add_argument("--slots", type=arguments.count, default=8, help="requests that the server runs at a time")
    given = parser.parse_args(words)
    target, tokenizer = target_of(given)
    prompts = (*PROMPTS, *MORE_PROMPTS)[: given.prompts]
    found: list[Rate] = []
    for chain in given.chain:
        found += measure(
            target, tokenizer, chain, prompts, new_tokens=given.new_tokens, rounds=given.rounds, slots=given.slots
        )  # fmt: skip
    table = table_of(f"{len(prompts)} texts", ("asked", "tokens", "seconds", "tokens/s", "ratio", "alike"))
    for rate in found:
        table.add_row(
            rate.chain, rate.way, str(rate.tokens), f"{rate.seconds:.2f}", f"{rate.per_second:.1f}",
            f"{rate.ratio:.3f}", f"{rate.alike} of {rate.texts}",
        )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    finish(console, given, found)
