# SPDX-License-Identifier: Apache-2.0
"""What every process of `test_placements.py` does; run as a script."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from ranks import Notes, run_task
from split_target import PLAIN, PROMPTS, SAMPLED, SEED, Failing, split, whole
from tiny_models import head_for

import hf_polyspec
from hf_polyspec import SuffixDrafter
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.generation import placements, settling
from hf_polyspec.host.ranks import Team
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.elsewhere import DIFFERED

FEW = {name: rows[:3] for name, rows in PROMPTS.items()}
TREES: dict[str, Any] = {"polyspec_tree_tokens": 6}
REPLICATED: dict[str, Any] = {"polyspec_placement": "replicated"}
SPLIT_PLACES = (("sharded", "one"), ("sharded", "replicated"))


def chains(folder: str) -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """Levels below a split target, and sizes."""
    small, alike = whole(folder, "small"), whole(folder, "alike")
    head = head_for(whole(folder, "target"))
    return {
        "suffix": ([SuffixDrafter()], {}),
        "int8, suffix": (["int8", SuffixDrafter()], {}),
        "head in trees": ([head], TREES),
        "head, suffix": ([head, SuffixDrafter()], TREES),
        "middle, small": ([alike, small], {}),
        "middle, head": ([alike, head], {}),
    }


class Texts:
    """Calls of one target."""

    def __init__(self, target: Any, rank: int) -> None:
        self.target, self.rank = target, rank

    def __call__(self, *levels: Any, **options: Any) -> Any:
        return hf_polyspec.generate(self.target, **FEW, **{**PLAIN, **options}, assistant_models=list(levels))

    def told(self, *levels: Any, **options: Any) -> list[Any]:
        """The text, and where levels ran."""
        torch.manual_seed(SEED + self.rank)
        found = self(*levels, return_dict_in_generate=True, **options)
        return [found.sequences.tolist(), found.polyspec.placement.to_dict()]


class Clock:
    """Stands still but for what drafters and messages say that they take."""

    now, a_message = 0.0, 0.0

    def __call__(self) -> float:
        return self.now


class Timed(Drafter):
    """Drafts two tokens, and takes so many seconds of a clock."""

    shares_noise = True

    def __init__(self, name: str, clock: Clock, seconds: float) -> None:
        self.name, self.clock, self.seconds, self.asked = name, clock, seconds, 0
        super().__init__()

    def propose(self, context: Any, limits: list[int], law: Any) -> Proposal:
        self.clock.now += self.seconds
        self.asked += 1
        tokens = [[5, 6][:limit] for limit in limits]
        return Proposal(tokens, None, [[self.index] * len(row) for row in tokens])


class Ending(Timed):
    """Ends its process the third time that it is asked, or fails."""

    def __init__(self, kills: bool) -> None:
        super().__init__("ending", Clock(), 0.0)
        self.kills = kills

    def propose(self, context: Any, limits: list[int], law: Any) -> Proposal:
        if self.asked > 2 and self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.asked > 2:
            raise RuntimeError("out of luck")
        return super().propose(context, limits, law)


def texts(folder: str, notes: Notes, rank: int) -> None:
    """Every kind of chain, in every place."""
    target = split(folder)
    text = Texts(target, rank)
    for name, (levels, sizes) in chains(folder).items():
        for place in ("one", "replicated"):
            how = {**sizes, "polyspec_placement": place}
            notes.put(f"{name}, {place}", lambda levels=levels, how=how: text.told(*levels, **how))
            notes.put(f"{name}, {place}, sampled", lambda levels=levels, how=how: text.told(*levels, **SAMPLED, **how))
    for places in SPLIT_PLACES:
        how = {"polyspec_placement": places}
        name, levels = f"int8, suffix, {', '.join(places)}", ["int8", SuffixDrafter()]
        notes.put(name, lambda how=how, levels=levels: text.told(*levels, **how))
        notes.put(f"{name}, sampled", lambda how=how, levels=levels: text.told(*levels, **SAMPLED, **how))
    notes.put("suffix, auto", lambda: text.told(SuffixDrafter()))
    notes.put("int8, suffix, auto", lambda: text.told("int8", SuffixDrafter()))
    head = head_for(whole(folder, "target"))
    for place in ("one", "replicated"):
        how = {"polyspec_placement": ["sharded", place]}
        notes.put(f"split int8, head, {place}", lambda how=how: text.told("int8", head, **how))
    notes.put("split int4, suffix", lambda: text.told("int4", SuffixDrafter(), polyspec_placement=["sharded", "one"]))
    notes.put("int8, early exit", lambda: text.told("int8", "early-exit:1", polyspec_placement=["auto", "sharded"]))
    notes.put("int8, suffix, online", lambda: text.told("int8", SuffixDrafter(), polyspec_control="online"))
    other = whole(folder, "small")
    with torch.no_grad():
        other.lm_head.weight.add_(rank * torch.linspace(-2, 2, other.config.vocab_size)[:, None])

    def differing() -> list[Any]:
        found = text(other, return_dict_in_generate=True, polyspec_placement="replicated")
        return [found.sequences.tolist(), DIFFERED in found.polyspec.levels[0].notes]

    notes.put("a drafter that differs", differing)


def choices(folder: str, notes: Notes, rank: int) -> None:
    """What is chosen, by a clock of the test's own."""
    text, clock = Texts(split(folder), rank), Clock()
    settling.clock = clock
    exchange = Team.exchange

    def exchanged(self: Any, state: int, message: Any = ()) -> list[int]:
        clock.now += clock.a_message * bool(message)
        return exchange(self, state, message)

    Team.exchange = exchanged  # type: ignore[method-assign]

    def chosen(name: str, seconds: float, a_message: float, **options: Any) -> list[Any]:
        clock.a_message, drafter = a_message, Timed(name, clock, seconds)
        first = text.told(drafter, **options)
        clock.a_message, again = 1e6, Timed(name, clock, 1e6)
        placements.forget()  # as another run of the script would
        return [*first, text.told(again, **options)[1], drafter.asked > 0]

    notes.put("nothing takes time", lambda: chosen("none", 0.0, 0.0))
    notes.put("the other process drafts slowly", lambda: chosen("slow", 2.0 * rank, 1.0))
    notes.put("messages take time", lambda: chosen("told", 0.0, 1.0))
    notes.put("a little", lambda: chosen("little", 1.0, 0.01))
    notes.put("clocks disagree", lambda: chosen("apart", 2.0 * rank, 5.0))
    hopeless = Timed("hopeless", clock, 30.0 * rank)
    clock.a_message = 1.0
    notes.put("hopeless", lambda: [*text.told(hopeless), hopeless.asked])
    clock.a_message = 0.0
    for name, levels, options in refused(folder, clock):
        notes.put(name, lambda levels=levels, options=options: text(*levels, **options))
    notes.put("fails in one", lambda: text(*[Ending(False) if rank else Timed("ending", clock, 0.0)], **REPLICATED))
    notes.put("all is well", lambda: text(Timed("well", clock, 0.0), **REPLICATED))
    notes.put("killed", lambda: text(*[Ending(True) if rank else Timed("ending", clock, 0.0)], **REPLICATED))


def refused(folder: str, clock: Clock) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """What cannot be placed."""
    small, suffix = whole(folder, "small"), SuffixDrafter()
    drawn = {**SAMPLED, "polyspec_verification": "token"}
    return [
        ("split what is whole", [small, suffix], {"polyspec_placement": ["sharded", "one"]}),
        ("one above another", [small, suffix], {"polyspec_placement": ["one", "replicated"]}),
        ("split in one", ["early-exit:1"], {"polyspec_placement": "one"}),
        ("nobody knows", [Failing()], REPLICATED),
        ("with draws", [small], {**REPLICATED, **drawn}),
        ("under a control", [small], {**REPLICATED, "polyspec_control": "online"}),
        ("too few", [small, suffix], {"polyspec_placement": ["one"]}),
        ("no such place", [small], {"polyspec_placement": "somewhere"}),
    ]


def everything(folder: str, notes: Notes, rank: int) -> None:
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache-{rank}"
    texts(folder, notes, rank)
    choices(folder, notes, rank)


if __name__ == "__main__":
    run_task(globals())
