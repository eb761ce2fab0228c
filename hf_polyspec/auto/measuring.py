# SPDX-License-Identifier: Apache-2.0
"""Passes that are timed before the first answer of "auto": seconds, not minutes, and no generator is touched."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..control.leads import scale_of
from ..exactness.context import EMBEDDED, Context, Prompt
from ..host.encoded import Encoded
from ..host.manners import runner_for
from ..host.moments import one_moment
from ..host.picking import picks
from ..host.positions import positions_told
from ..host.ranks import ALONE, Ranks
from ..host.release import input_device
from ..models.assistants import first_id
from ..telemetry.counters import LevelStats

SIZES = (1, 2, 4, 8, 16, 32)
FEW = (1, 8)
BUDGET = 4.0
"""Seconds for which passes of one model are repeated; each is run once in any case."""
_REPEATS, _MOST_REPEATS = 3, 24
_SAME = 1.06
"""A pass was timed as quick as it can be once its three quickest times are this near: else the machine was busy."""
_CONTEXT = 48
_PATIENCE = 2.0
LEAST, ENOUGH = 8, 48
"""Tokens of a text that tell anything of a copy, and that tell enough."""
_READ = 128
"""Most tokens of the prompt over which a copy is compared with the model."""


class Progress:
    """Says on stderr what is going on, once it has taken longer than two seconds.

    Args:
        subject: what is being measured; told: whether it has been said, or another process says it.
    """

    def __init__(self, subject: str, told: bool = False) -> None:
        self.subject = subject
        self.started = time.perf_counter()
        self.told = told

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.started

    def __call__(self, what: str) -> None:
        if self.told or self.seconds < _PATIENCE:
            return
        self.told = True
        print(
            f"hf_polyspec: measuring what pays for {self.subject} on this machine, once; now {what}.",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def generators_kept() -> Iterator[None]:
    """torch's default generators stand afterwards where they stood, whatever a library draws in between."""
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        if not torch.equal(torch.get_rng_state(), states[0]):
            torch.set_rng_state(states[0])
        if states[1]:
            torch.cuda.set_rng_state_all(states[1])


class Clock:
    """Times passes of one model after a short text, the cache rolled back before each.

    Args:
        model: the model; name: for errors.
        longest: most columns of a pass.
        encoded: what its decoder attends to, one row; None where there is no encoder.
    """

    def __init__(self, model: Any, name: str, longest: int, encoded: Encoded | None = None) -> None:
        config = model.config.get_text_config(decoder=True)
        places = positions_told(model) or (_CONTEXT + longest + 1)
        self.longest = max(1, min(longest, places - 2))
        count = max(1, min(_CONTEXT, places - self.longest - 1))
        ids = [1 + i % (min(500, int(config.vocab_size)) - 1) for i in range(count + self.longest)]
        self.draft = ids[count:]
        self.context = _context(ids[:count])
        self.runner = runner_for(model, name, input_device(model), encoded=encoded)
        self.stats = LevelStats(name, 0)
        self._known = int(config.vocab_size)

    def seconds(self, columns: int) -> float:
        """Of one pass over so many columns, run as for a text of likeliest ids; its last logits are waited for."""
        began, draft = time.perf_counter(), self.draft[: columns - 1]
        if picks(self.runner, self.context, [draft], self.stats, self._known) is None:
            passed = self.runner.run(self.context, [draft], self.stats)
            float(passed.logits[0, -1, 0])
        return time.perf_counter() - began


def _context(ids: list[int]) -> Context:
    return Context([ids], Prompt(len(ids), None, torch.arange(len(ids))[None]))


@torch.no_grad()
def time_passes(
    models: dict[str, Any],
    sizes: dict[str, Sequence[int]],
    progress: Progress,
    encoded: Encoded | None = None,
    budget: float = BUDGET,
    ranks: Ranks = ALONE,
) -> dict[str, list[list[float]]]:
    """Passes of models by name, in turns, so that a slow moment of the machine falls on all of them.

    Args:
        models: by name; sizes: columns of the passes of each, rising.
        progress: told of what is timed; encoded: see `Clock`.
        budget: seconds for each model, see `BUDGET`.
        ranks: the processes that take part in the passes; it is the first's clock that counts.

    Returns:
        By name, [columns, seconds], the quickest of three passes each or, where those differ as they do beside other
        work, of as many as the budget allows until the three quickest agree. Fewer columns never take longer.
    """
    clocks = {name: Clock(model, name, max(sizes[name]), encoded) for name, model in models.items()}
    for name, clock in clocks.items():  # what is set up once is no part of a pass
        for columns in _within(sizes[name], clock):
            progress(f"running {name} for the first time")
            began = time.perf_counter()
            clock.seconds(columns)
            if ranks.first([time.perf_counter() - began > budget / 2])[0]:
                break
    found: dict[str, dict[int, list[float]]] = {
        name: {columns: [] for columns in _within(sizes[name], clock)} for name, clock in clocks.items()
    }
    spent = dict.fromkeys(models, 0.0)
    with one_moment():  # as in a generation that calls nobody else's code
        for repeat in range(_MOST_REPEATS):
            for name, clock in clocks.items():
                for columns, times in found[name].items():
                    done = spent[name] > budget or (repeat >= _REPEATS and _settled(times))
                    if repeat and ranks.first([done])[0]:
                        continue
                    progress(f"timing {name}")
                    times.append(clock.seconds(columns))
                    spent[name] += times[-1]
    return ranks.told({name: _rising(of) for name, of in found.items()})  # type: ignore[no-any-return]


def _settled(times: Sequence[float]) -> bool:
    quickest, _, third, *_ = sorted(times)
    return third <= _SAME * quickest


def _rising(found: dict[int, list[float]]) -> list[list[float]]:
    """A pass over fewer columns could be filled up to one over more."""
    points, least = [], float("inf")
    for columns, times in sorted(found.items(), reverse=True):
        least = min(least, *times)
        points.append([columns, least])
    return points[::-1]


def _within(sizes: Sequence[int], clock: Clock) -> list[int]:
    return [columns for columns in sizes if columns <= clock.longest] or [1]


@torch.no_grad()
def own_text(model: Any, ids: Sequence[int], ranks: Ranks = ALONE) -> list[int]:
    """A text on which copies and drafters are tried: a prompt, and what the model itself goes on with where that is
    short. What a copy makes of five words says nothing of texts.

    Args:
        model: the target; ids: of a prompt, or none; ranks: the processes that take part in passes of the target.

    Returns:
        At least `ENOUGH` ids, fewer where two seconds are too short for as many or the model's places are used up.
    """
    own = [token for token in ids if token != EMBEDDED]
    text = own or [first_id(model)]
    most = min(ENOUGH, positions_told(model) or ENOUGH)
    runner, stats = runner_for(model, "the target", input_device(model)), LevelStats("writing", 0)
    dice, began = torch.Generator().manual_seed(len(text)), time.perf_counter()
    while len(text) < most:
        logits = runner.run(_context(text), [[]], stats).logits[0, -1].float().cpu()
        # Drawn, by a generator of its own: likeliest tokens soon repeat themselves.
        drawn = int(torch.multinomial(logits.softmax(-1), 1, generator=dice))
        token, ends = ranks.told((drawn, len(text) >= LEAST and time.perf_counter() - began > BUDGET / 2))
        text = [*text, token]
        if ends:
            break
    return text


@dataclass(frozen=True)
class Alike:
    """How a copy of a model compares with it.

    Attributes:
        share: of a prompt's places at which its likeliest token is the model's, 0 to 1.
        scale: of its errors, in logits (`control.leads`).
    """

    share: float
    scale: float | None = None


@torch.no_grad()
def agreement(
    model: Any, target: Any, ids: Sequence[int], encoded: Encoded | None = None, ranks: Ranks = ALONE
) -> Alike | None:
    """How alike a copy and the target are at the places of a prompt.

    Args:
        model: the copy; target: the model; ids: of a prompt; encoded: see `Clock`.
        ranks: the processes that take part in passes of the target; the copy is in the first of them.

    Returns:
        None where there is too little of a prompt to tell.
    """
    some = [token for token in ids if token != EMBEDDED][-_READ:]
    if len(some) < LEAST:
        return None

    def said(one: Any) -> torch.Tensor:
        runner = runner_for(one, "a copy", input_device(one), encoded=encoded)
        return runner.run(_context(some[:1]), [some[1:]], LevelStats("reading", 0)).logits[0]

    by_target = said(target).argmax(-1)

    def compared() -> Alike:
        logits = said(model)
        right = (by_target == logits.argmax(-1)).tolist()
        first, second = logits.float().topk(min(2, logits.shape[-1]), -1).values[:, [0, -1]].unbind(-1)
        return Alike(sum(right) / len(right), scale_of((first - second).tolist(), right))

    return ranks.told(ranks.attempted(compared, Alike(0.0)))  # type: ignore[no-any-return]
