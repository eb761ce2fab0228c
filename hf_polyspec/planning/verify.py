# SPDX-License-Identifier: Apache-2.0
"""Candidates run for real, in turns prompt by prompt, and set beside what was predicted of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig

from ..generation.doors import generate
from ..host.waiting import wait_for
from .candidates import Level, options_of
from .gauge import Gauge
from .replay import Measurements, replay
from .search import Candidate

Run = Callable[[Candidate, int], tuple[float, int]]
"""(candidate, which text) -> seconds and new tokens of one call"""


def verify(
    levels: Sequence[Level],
    candidates: Sequence[Candidate],
    measured: Measurements,
    config: GenerationConfig,
    *,
    repeats: int = 3,
    advance: Callable[[], None] = lambda: None,
    run: Run | None = None,
    gauge: Gauge | None = None,
) -> list[Candidate]:
    """Run candidates on the prompts of the plan.

    Every prompt is answered by all of them before the next, so that a slow minute of the machine falls on all; of each
    prompt and candidate the median counts. What the predictions are made of can be timed between the calls, a part of
    it after every call, so that prediction and measurement see the same machine.

    Args:
        levels: the target first; candidates: what to run.
        measured: holds the prompts; config: as for the recorded texts.
        repeats: calls of each candidate on each prompt, after one short one that is thrown away.
        advance: called after each call.
        run: one call, which a test replaces.
        gauge: takes the times anew, None to compare with the plan's predictions only.

    Returns:
        The candidates in the same order, with what was measured.
    """
    call = run or _runner(levels, measured, config)
    for candidate in candidates:
        call(candidate, 0)
        advance()
    times: dict[tuple[int, int], list[float]] = {}
    tokens: dict[int, int] = {}
    for repeat in range(repeats):
        for place in range(len(measured.texts)):
            parts = gauge.turn(repeat, place, len(candidates)) if gauge is not None else [_nothing] * len(candidates)
            for i, part in zip(_turned(len(candidates), repeat + place), parts, strict=True):
                seconds, new = call(candidates[i], place)
                times.setdefault((i, place), []).append(seconds)
                tokens[i] = tokens.get(i, 0) + new
                part()
                advance()
    now = gauge.measurements() if gauge is not None else None
    found = []
    for i, candidate in enumerate(candidates):
        seconds = sum(statistics.median(times[i, place]) for place in range(len(measured.texts)))
        anew = None if now is None else replay(candidate.chain, now)
        found.append(replace(candidate, measured=tokens[i] / repeats / seconds, anew=anew))
    return found


def calls(candidates: int, texts: int, repeats: int) -> int:
    """How many times `verify` calls `advance`."""
    return candidates * (1 + texts * repeats)


def _nothing() -> None:
    """No times are taken."""


def _turned(count: int, by: int) -> list[int]:
    """The order of a turn: nobody is always first."""
    return [(i + by) % count for i in range(count)]


def _runner(levels: Sequence[Level], measured: Measurements, config: GenerationConfig) -> Run:
    target: Any = levels[0].member

    def call(candidate: Candidate, place: int) -> tuple[float, int]:
        prompt = measured.texts[place].prompt
        ids = torch.tensor([prompt], device=target.device)
        members = [levels[i].member for i in candidate.chain.levels[1:]]
        arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "generation_config": config}
        if members:
            arguments |= {"assistant_models": members, **options_of(candidate.chain)}
        started = time.perf_counter()
        output = generate(target, ids, **arguments)
        wait_for(target.device)
        return time.perf_counter() - started, output.sequences.shape[1] - len(prompt)

    return call
