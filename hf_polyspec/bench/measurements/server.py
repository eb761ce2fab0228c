# SPDX-License-Identifier: Apache-2.0
"""What a server's door costs: `polyspec measure server`.

One chain writes greedy texts one after the other: by `generate()` in this process, and by `polyspec serve` in another,
which OpenAI's client in this one asks with and without a stream. They take turns; who has none only waits.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from rich.console import Console

from ...generation.doors import generate
from ...models.assistants import by_name
from ...models.conversation import encode_prompt
from ...planning.texts import PROMPTS
from . import arguments
from .forms import parse_form
from .same_seed import MORE_PROMPTS
from .ways import finish, in_turns, parser_of, quotient, table_of, targets_of

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
        form: of the target; tokens: of all texts; seconds: for them, the median; per_second: tokens a second.
        ratio: to `IN_PROCESS`, the median of what the turns say.
        alike: texts that are those of `IN_PROCESS`; texts: how many there are.
    """

    form: str
    chain: str
    way: str
    tokens: int
    seconds: float
    per_second: float
    ratio: float
    alike: int
    texts: int


class Served:
    """`polyspec serve` in a process of its own, until the end of a with.

    Args:
        words: behind the name of the command.

    Attributes:
        url: under which it answers.

    Raises:
        RuntimeError: it ended before it listened; the sentence is its own.
    """

    def __init__(self, words: Sequence[str]) -> None:
        command = [sys.executable, "-m", "hf_polyspec", "serve", *words, "--name", _NAME, "--port", "0"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said: list[str] = []
        for line in self._process.stderr or ():
            said.append(line.strip())
            if found := re.search(r"http://\S+/v1", line):
                self.url = found[0]
                break
        else:
            raise RuntimeError(f"the server ended with {self._process.wait()}: {' '.join(said[-3:])}")
        # What it says of every request goes nowhere, but has to go.
        self._reader = threading.Thread(target=deque, args=(self._process.stderr, 0), daemon=True)
        self._reader.start()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._reader.join()


def measure(
    target: Any,
    tokenizer: Any,
    chain: str,
    prompts: Sequence[str],
    url: str,
    *,
    form: str = "",
    new_tokens: int,
    rounds: int,
) -> list[Rate]:
    """Time one chain in process and through a server, in turns.

    Args:
        target: as it is to run; tokenizer: of it, with a chat template; chain: names with commas between.
        prompts: what users ask; url: of a server of the same chain; form: what to call the target's.
        new_tokens: at most; rounds: of which the median counts.
    """
    import openai

    assistants = by_name(target, chain.split(","))
    encoded = [encode_prompt(tokenizer, text, target.device) for text in prompts]
    texts: dict[str, list[str]] = {}
    counts: list[int] = []

    def here() -> None:
        rows = [
            generate(target, **ids, assistant_models=assistants, max_new_tokens=new_tokens, do_sample=False)
            for ids in encoded
        ]
        new = [row[0, ids["input_ids"].shape[1] :] for row, ids in zip(rows, encoded, strict=True)]
        counts[:] = map(len, new)
        texts[IN_PROCESS] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in new]

    def timed(way: str, _: int) -> float:
        began = time.perf_counter()
        if way == IN_PROCESS:
            here()
        else:
            texts[way] = [_asked(client, text, new_tokens, way == STREAMED) for text in prompts]
        return time.perf_counter() - began

    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        found = in_turns(timed, (IN_PROCESS, WHOLE, STREAMED), rounds)
    tokens, rates = sum(counts), []
    for way, each in found.items():
        seconds = statistics.median(each)
        alike = sum(one == other for one, other in zip(texts[way], texts[IN_PROCESS], strict=True))
        ratio = quotient(found, way, IN_PROCESS)
        rates.append(Rate(form, chain, way, tokens, seconds, tokens / seconds, ratio, alike, len(prompts)))
    return rates


def _asked(client: Any, text: str, new_tokens: int, stream: bool) -> str:
    """A server's answer to a user's words."""
    asked = {"model": _NAME, "messages": [{"role": "user", "content": text}], "temperature": 0}
    answer = client.chat.completions.create(**asked, max_tokens=new_tokens, stream=stream)
    if stream:
        return "".join(part.choices[0].delta.content or "" for part in answer)
    return answer.choices[0].message.content or ""


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
    for form, target, tokenizer in targets_of(given):
        for chain in given.chain:
            with Served(_words(given, form, chain)) as served:
                found += measure(
                    target, tokenizer, chain, prompts, served.url,
                    form=form, new_tokens=given.new_tokens, rounds=given.rounds,
                )  # fmt: skip
    table = table_of(f"{len(prompts)} texts", ("chain", "asked", "tokens", "seconds", "tokens/s", "ratio", "alike"))
    for rate in found:
        table.add_row(
            rate.form, rate.chain, rate.way, str(rate.tokens), f"{rate.seconds:.2f}", f"{rate.per_second:.1f}",
            f"{rate.ratio:.3f}", f"{rate.alike} of {rate.texts}",
        )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    finish(console, given, rates=found)


def _words(given: argparse.Namespace, form: str, chain: str) -> list[str]:
    """What `polyspec serve` is called with."""
    dtype, change = parse_form(form)
    words = [given.model, "--dtype", dtype, "--slots", str(given.slots)]
    words += ["--pack"] if change else []
    return words + [word for name in chain.split(",") for word in ("--assistant", name)]
