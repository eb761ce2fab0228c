# SPDX-License-Identifier: Apache-2.0
"""The texts a plan is measured on: written by the target, by plain `generate()`, at the temperature asked for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from ..exactness.context import Context, Prompt
from ..exactness.distributions import LawMaker
from ..exactness.noise import Noise
from ..exactness.randomness import Randomness
from ..host.configs import generation_config
from ..host.generation import BaseStreamer

PROMPTS = (
    "Why is the sky blue? Explain it in a few sentences.",
    "Write a Python function that returns the three largest numbers of a list, and a test for it.",
    "Correct the spelling and give me the whole text: The fishermen carry there nets to the boats befor the sun rises, "
    "and the gulls folow them until the harbour is out of sihgt.",
    "A shop sells pens at 3 coins and books at 12 coins. Anna buys 5 pens and 2 books. How much does she pay?",
    "Summarise in two sentences: Honey bees tell each other where flowers are. A bee that has found food runs a figure "
    "of eight on the comb; its direction gives the angle to the sun, and its length the distance to the flowers.",
    "Name five things to see in an old town by the sea, each with one line about it.",
)
SHORTEST = 4


@dataclass(frozen=True)
class Text:
    """One prompt and what the target made of it.

    Attributes:
        prompt: its ids; new: the ids the target wrote.
        first_seconds: until the first new token, the reading of the prompt included.
        step_seconds: median time of a further token.
        seconds: of the whole call.
    """

    prompt: list[int]
    new: list[int]
    first_seconds: float
    step_seconds: float
    seconds: float

    def context(self, written: int) -> Context:
        """The text after this many of the new ids."""
        return context_of([self.prompt + self.new[:written]], len(self.prompt))


@dataclass(frozen=True)
class Law:
    """What turns the logits of every level into the law it is asked to follow.

    Attributes:
        processors: as generate() prepared them.
        do_sample: whether tokens are drawn.
        device: where the laws of the chain live.
    """

    processors: tuple[Any, ...]
    do_sample: bool
    device: torch.device

    def maker(self, randomness: Randomness | None = None, noise: Noise | None = None) -> LawMaker:
        """A law maker of the engine; without noise, one whose levels draw by themselves."""
        return LawMaker(list(self.processors), self.do_sample, self.device, randomness, noise)


class Resting(Noise):
    """The same noise at every step, for rounds that are timed: nothing has to be drawn for them.

    Args:
        width: V; device: of the laws.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._values = torch.ones(width, device=device)

    def at(self, rows: Sequence[int], steps: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        return [[self._values] * len(wanted) for wanted in steps]


def context_of(rows: list[list[int]], prompt: int) -> Context:
    """Rows of one length as a context without padding, whose first `prompt` columns are the prompt."""
    positions = torch.arange(prompt)[None].expand(len(rows), -1)
    return Context(rows, Prompt(prompt, None, positions))


def law_of(target: Any, prompt: list[int], config: GenerationConfig) -> Law:
    """The processors that generate() makes of a configuration, caught at the door a chain would come in by.

    Raises:
        ValueError: one of them keeps a state, so that text written before cannot be replayed through it.
    """
    caught: list[Any] = []

    def catch(model: Any, input_ids: torch.Tensor, **prepared: Any) -> torch.Tensor:
        caught.extend(prepared["logits_processor"])
        return input_ids

    ids = torch.tensor([prompt], device=target.device)
    target.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, custom_generate=catch)
    law = Law(tuple(caught), bool(config.do_sample), target.device)
    if law.maker().in_order:
        raise ValueError("a plan cannot be made with logits processors that keep a state.")
    return law


def write_texts(
    target: Any, prompts: Sequence[list[int]], config: GenerationConfig, advance: Callable[[], None]
) -> list[Text]:
    """Have the target continue the prompts.

    Args:
        target: the model.
        prompts: ids of each.
        config: from `host.configs.generation_config`.
        advance: called after each.

    Returns:
        The texts that have at least four new ids.

    Raises:
        ValueError: none has.
    """
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=target.device)
        clock = _Clock()
        started = time.perf_counter()
        output = target.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock)
        seconds = time.perf_counter() - started
        new = output.sequences[0, len(prompt) :].tolist()
        if len(new) >= SHORTEST:
            steps = [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
            texts.append(Text(prompt, new, clock.times[1] - started, statistics.median(steps), seconds))
        advance()
    if not texts:
        raise ValueError(f"the target ends every text before its {SHORTEST}th token, too early to measure anything.")
    return texts


def time_plain(target: Any, text: Text, temperature: float, tokens: int = 8) -> tuple[float, float | None]:
    """What plain generate() takes on a text: a call for one token, and a step in the middle of the text.

    Args:
        target: the model; text: its own; temperature: of the plan.
        tokens: of which the mean counts.

    Returns:
        Seconds of the call and of a step; None where the text ended before there was a step.
    """
    clocks = []
    halves = ((text.prompt, 1), (text.prompt + text.new[: len(text.new) // 2], tokens))
    for ids, count in halves:
        given = torch.tensor([ids], device=target.device)
        clocks.append(_Clock())
        clocks[-1].put(given)  # when the call began
        config = generation_config(target, count, temperature)
        target.generate(given, attention_mask=torch.ones_like(given), generation_config=config, streamer=clocks[-1])
        clocks[-1].put(given)
    first, steps = clocks[0].times[-1] - clocks[0].times[0], clocks[1].times[2:-1]
    return first, (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else None


class _Clock(BaseStreamer):
    """Notes when each token arrives; the first call brings the prompt."""

    asks_nobody = True

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to release."""
