# SPDX-License-Identifier: Apache-2.0
"""What a server's door costs: `polyspec measure server`.

One chain writes greedy texts one after the other: by `generate()`, and through the server of `polyspec serve`, which
OpenAI's client asks with and without a stream. They take turns; who has none only waits. Models and server are in this
process, for the same weights are read up to a tenth quicker or slower where another process has them; the client is in
another, as it would be.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from rich.console import Console

from ...generation.doors import generate
from ...models.assistants import by_name
from ...models.conversation import encode_prompt
from ...planning.texts import PROMPTS
from . import arguments
from .asking import Client
from .same_seed import MORE_PROMPTS
from .ways import finish, in_turns, parser_of, quotient, table_of, targets_of

IN_PROCESS = "generate()"
WHOLE = "the server"
STREAMED = "the server, streamed"
CHAINS = ("int8,suffix",)
_NAME = "measured"

Made = TypeVar("Made")


@dataclass(frozen=True)
class Rate:
    """One way of asking one chain.

    Attributes:
        chain: the levels' names; way: how it was asked.
        form: of the target; tokens: of all texts; seconds: for them, the median; per_second: tokens a second.
        ratio: to `IN_PROCESS`, the median of what the turns say; ratios: of each turn.
        first: seconds until the first text of a stream, the median; None where there is none.
        alike: texts that are those of `IN_PROCESS`; texts: how many there are.
    """

    form: str
    chain: str
    way: str
    tokens: int
    seconds: float
    per_second: float
    ratio: float
    ratios: list[float]
    first: float | None
    alike: int
    texts: int


def in_a_thread(make: Callable[[], Made]) -> Made:
    """What a call returns that computes in a thread which ends with it.

    OpenMP keeps the helpers of each thread that has computed until it ends, and where there are more of them than cores
    it has all of them sleep between two products: whoever is timed is to be the only one.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def measure(
    target: Any,
    tokenizer: Any,
    chain: str,
    prompts: Sequence[str],
    *,
    form: str = "",
    new_tokens: int,
    rounds: int,
    slots: int = 8,
) -> list[Rate]:
    """Time one chain in process and through a server, in turns.

    Args:
        target: as it is to run; tokenizer: of it, with a chat template; chain: names with commas between.
        prompts: what users ask; form: what to call the target's.
        new_tokens: at most; rounds: of which the median counts; slots: requests that the server runs at a time.
    """
    from ...integrations.server import ChainServer

    assistants = in_a_thread(lambda: by_name(target, chain.split(",")))
    encoded = [encode_prompt(tokenizer, text, target.device) for text in prompts]
    texts: dict[str, list[str]] = {}
    counts: list[int] = []
    first: dict[str, list[float]] = {}

    def here() -> float:
        began = time.perf_counter()
        rows = [
            generate(target, **ids, assistant_models=assistants, max_new_tokens=new_tokens, do_sample=False)
            for ids in encoded
        ]
        new = [row[0, ids["input_ids"].shape[1] :] for row, ids in zip(rows, encoded, strict=True)]
        texts[IN_PROCESS] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
        seconds = time.perf_counter() - began
        counts[:] = map(len, new)
        return seconds

    def timed(way: str, turn: int) -> float:
        if way == IN_PROCESS:
            return in_a_thread(here)
        server = in_a_thread(lambda: ChainServer(target, tokenizer, assistants, name=_NAME, port=0, slots=slots))
        with server:
            url = f"http://127.0.0.1:{server.port}/v1"
            found = client.ask(url, _NAME, prompts, new_tokens, way == STREAMED)
        texts[way] = found["texts"]
        first.setdefault(way, []).extend(found["first"] if turn >= 0 else [])
        return float(found["seconds"])

    with Client() as client:
        found = in_turns(timed, (IN_PROCESS, WHOLE, STREAMED), rounds)
    tokens, rates = sum(counts), []
    for way, each in found.items():
        seconds = statistics.median(each)
        alike = sum(one == other for one, other in zip(texts[way], texts[IN_PROCESS], strict=True))
        ratios = [theirs / own for theirs, own in zip(found[IN_PROCESS], each, strict=True)]
        started = statistics.median(first[way]) if first.get(way) else None
        ratio, per_second = quotient(found, way, IN_PROCESS), tokens / seconds
        rates.append(
            Rate(form, chain, way, tokens, seconds, per_second, ratio, ratios, started, alike, len(prompts))
        )  # fmt: skip
    return rates


def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = parser_of("server", __doc__, CHAINS)
    parser.add_argument("--prompts", type=arguments.count, default=4)
    parser.add_argument("--slots", type=arguments.count, default=8, help="requests that the server runs at a time")
    given = parser.parse_args(words)
    if find_spec("openai") is None:
        raise ImportError('polyspec measure server asks with OpenAI\'s client: pip install "hf_polyspec[serve]".')
    for _, change in given.form:
        if change not in ("", "pack"):
            parser.error(f"--form: a server's model is as it is or packed, not {change}.")
    prompts = (*PROMPTS, *MORE_PROMPTS)[: given.prompts]
    found: list[Rate] = []
    forms = targets_of(given)
    while (one := in_a_thread(lambda: next(forms, None))) is not None:
        form, target, tokenizer = one
        for chain in given.chain:
            found += measure(
                target, tokenizer, chain, prompts,
                form=form, new_tokens=given.new_tokens, rounds=given.rounds, slots=given.slots,
            )  # fmt: skip
    table = table_of(f"{len(prompts)} texts", ("chain", "asked", "tokens", "seconds", "tokens/s", "ratio", "alike"))
    for rate in found:
        table.add_row(
            rate.form, rate.chain, rate.way, str(rate.tokens), f"{rate.seconds:.2f}", f"{rate.per_second:.1f}",
            f"{rate.ratio:.3f}", f"{rate.alike} of {rate.texts}",
        )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    for rate in found:
        spread = f"{rate.way}, {rate.form}: ratios of the turns {min(rate.ratios):.3f} to {max(rate.ratios):.3f}"
        first = "" if rate.first is None else f", the first text after {1000 * rate.first:.0f} ms"
        console.print(spread + first, highlight=False)
    finish(console, given, rates=found)
