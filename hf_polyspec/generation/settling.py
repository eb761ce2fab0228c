# SPDX-License-Identifier: Apache-2.0
"""Which levels a call runs with, and where: what it leaves to a measurement is measured before its first token.

Of a target that several processes share, each arrangement of the levels below it (see `placements`) drafts for a few
rounds of a greedy text that goes on from the call's prompts. What counts is how long the target waits for a draft, with
everything that it costs there: passes, messages, and what processes of one machine take from each other; in the process
where it takes longest. Process 0 chooses, and all remember.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from ..cpu.memory import memory
from ..defaults import ONE, REPLICATED, SHARDED
from ..exactness.context import EMBEDDED, Context, Prompt
from ..exactness.distributions import LawMaker
from ..host.manners import runner_for
from ..host.positions import positions_told
from ..host.ranks import Ranks, is_split
from ..host.release import input_device
from ..models.assistants import forget_copies, is_copy_name
from ..telemetry.counters import Check
from ..telemetry.stats import Placement
from . import automatic
from . import kept_placements as kept
from .chain import build_chain
from .checked import Checked, located
from .kernels import packed
from .meeting import Meeting, facts_of, share
from .members import lent, members
from .placements import Arrangement, Placed
from .setting import Setting

ROUNDS, WARM = 4, 1
"""Rounds of a text that are timed, after some that pay for what is set up once."""
GAIN = 0.95
"""An arrangement that is not the first takes at most this share of the first one's time."""
HOPELESS = 3.0
"""One whose draft takes more than so many times the quickest one's is left after its first that is timed."""
UNLIMITED = 1 << 62
"""Positions of a model that names no end."""
_READ = 64
"""Most tokens of each prompt."""
_TOKENS = 32
"""Tokens that a row may have in a round: more than levels hand up."""
_TIMES = 1.5
"""Times the memory of its model that making a whole copy takes in a process, of which all may be on one machine."""
_LOG = logging.getLogger(__name__)
clock: Callable[[], float] = time.perf_counter


class Job(automatic.Job, Protocol):
    """A call as far as its levels are settled.

    Attributes:
        device: where laws are compared; extras: what the target is given besides a prompt.
        placed: where levels run.
    """

    device: torch.device
    extras: Any
    placed: Placed
    vocabularies: Sequence[Any]


def settled(job: Job, found: Checked, meeting: Meeting, tokenizers: tuple[Any, Any]) -> list[Any]:
    """The members that run in this process; the job runs with them where `job.placed` says, from now on.

    Args:
        job: the call, checked; found: what was read of it; meeting: of the processes; tokenizers: see `decode`.

    Raises:
        ValueError: what is chosen cannot be served, or processes were called with different things.
    """
    job.vocabularies, placing, ranks = found.vocabularies, found.placing, meeting.ranks
    prompt = job.context.prompt

    def facts(what: str) -> dict[str, Any]:
        ids = torch.tensor([job.context.visible(b) for b in range(job.context.batch)])
        return {**facts_of(ids, prompt.mask, job.config, job.options, ()), "assistant_models": what}

    if found.chosen_here:
        meeting.agree(lambda: facts("auto"))
        chosen = automatic.choose(job, found.named, ranks)
        if ranks.in_step:
            job.placed = Placed(
                tuple(SHARDED if isinstance(one, torch.nn.Module) and is_split(one) else ONE for one in chosen)
            )
        return chosen
    job.placed = placing.placed
    if not placing.open or job.encoded is not None or job.extras.any or prompt.embeds is not None:
        return found.assistants
    meeting.agree(lambda: facts("to be placed"))
    placing.keep(_known_here(job, found, ranks) or _measured(job, found, ranks, tokenizers))
    job.placed = placing.placed
    for name in filter(is_copy_name, placing.told):
        forget_copies(job.model, name, job.placed.places[placing.told.index(name)])
    return _members(job, found, job.placed, ranks, tokenizers)


def _members(job: Job, found: Checked, placed: Placed, ranks: Ranks, tokenizers: tuple[Any, Any]) -> list[Any]:
    """The members of an arrangement that run in this process; copies are made where they are not there."""
    made = members(job.model, found.placing.told, placed.places)
    own, job.vocabularies = located(job.model, made, tokenizers, ranks, placed)
    return own


def _known_here(job: Job, found: Checked, ranks: Ranks) -> Placed | None:
    """What an earlier process has measured, as the first one finds it."""
    placing = found.placing
    said = kept.load(kept.path_of(job.model, placing.key), placing.possible) if ranks.leads else None
    known: Placed | None = ranks.told(said)
    return known


@torch.no_grad()
def _measured(job: Job, found: Checked, ranks: Ranks, tokenizers: tuple[Any, Any]) -> Placed:
    """Every possible arrangement twice, in turns, and the one that process 0 chooses of them and keeps."""
    from ..auto.measuring import generators_kept  # quantisation, which most calls never need

    with generators_kept():
        seconds, possible = _seconds_of_all(job, found, ranks, tokenizers)
    first, best = possible[0], min(seconds, key=seconds.__getitem__)
    chosen: Placed = ranks.told(Placed(best if seconds[best] <= GAIN * seconds[first] else first, seconds))
    if ranks.leads:
        told = "; ".join(f"{', '.join(way)}: {1e3 * took:.3f} ms" for way, took in chosen.seconds.items())
        _LOG.info("assistant_models run %s; a draft takes %s", ", ".join(chosen.places), told)
        kept.save(kept.path_of(job.model, found.placing.key), chosen)
    return chosen


def _seconds_of_all(
    job: Job, found: Checked, ranks: Ranks, tokenizers: tuple[Any, Any]
) -> tuple[dict[Arrangement, float], list[Arrangement]]:
    """By arrangement, the seconds of a draft in the process where it took longest; and the arrangements in order."""
    possible = _fitting(job.model, found, ranks)
    seconds: dict[Arrangement, float] = {}
    for places in (*possible, *reversed(possible)):
        placed, best = Placed(places), min(seconds.values(), default=math.inf)
        if seconds.get(places, 0.0) > HOPELESS * best:
            continue
        try:
            own = _members(job, found, placed, ranks, tokenizers)
        except ValueError as error:  # as the copy says that cannot be made there, in all processes alike
            if places == possible[0]:
                raise
            _LOG.info("assistant_models cannot run %s: %s", ", ".join(places), error)
            continue
        took = max(ranks.gathered(_seconds_of_drafts(job, own, placed, ranks, best)))
        seconds[places] = min(seconds.get(places, took), took)
    return seconds, possible


def _fitting(model: Any, found: Checked, ranks: Ranks) -> list[Arrangement]:
    """The arrangements that there is memory for; the first needs least in all processes but one."""
    placing = found.placing
    copies = [i for i, one in enumerate(placing.told) if is_copy_name(one)]
    roomy = all(ranks.gathered(_has_room(model, ranks.size))) if copies else True
    return [
        places
        for place, places in enumerate(placing.possible)
        if roomy or not place or not any(places[i] == REPLICATED for i in copies)
    ]


def _has_room(model: Any, processes: int) -> bool:
    """Whether this process can make a whole copy while all do: it is put together on the CPU."""
    whole = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    device = input_device(model)
    on_device = device.type != "cuda" or torch.cuda.mem_get_info(device)[0] > whole
    return bool(on_device and memory().available > processes * _TIMES * whole)


def _seconds_of_drafts(job: Job, own: list[Any], placed: Placed, ranks: Ranks, best: float) -> float:
    """What the target waits for a draft in this process, in the middle of a few rounds, or in one where it is hopeless
    beside the best so far; collective."""
    device = job.device
    # What a schedule learns here is not carried into the call.
    options = replace(job.options, num_assistant_tokens_schedule="constant", polyspec_bias_budget=0.0)
    beginning = context = _beginning(job)
    places = positions_told(job.model) or UNLIMITED
    room = max(1, min(_TOKENS, places // 4))
    setting = Setting(options, device, frozenset(), 0, context.batch, vocabularies=job.vocabularies)
    waited: list[float] = []

    def told(check: Check) -> None:
        waited.append(check.draft_seconds)

    with lent(own) as levels, packed(levels if options.polyspec_pack else [], job.model):
        chain = build_chain(job.model, levels, setting, runner_for(job.model, "the target", device, kept=1))
        share(chain, levels, ranks, placed.everywhere)
        chain.stats.clock = lambda: clock()
        chain.observer = told
        law = LawMaker([], False, device)
        try:
            for done in range(WARM + ROUNDS):
                if done > WARM and max(ranks.gathered(statistics.median(waited[WARM:]))) > HOPELESS * best:
                    break
                if max(map(len, context.ids)) + room >= places:
                    context = beginning
                context = context.extended(chain.round(context, [room] * context.batch, law).tokens)
        finally:
            chain.end()
    return statistics.median(waited[WARM:] or [0.0])


def _beginning(job: Job) -> Context:
    """The ends of the call's prompts without padding, as long as the shortest."""
    mask = job.context.prompt.mask
    rows = []
    for b in range(job.context.batch):
        ids = job.context.visible(b)
        kept = [True] * len(ids) if mask is None else mask[b, -len(ids) :].bool().tolist()
        rows.append([token for token, keep in zip(ids, kept, strict=True) if keep and token != EMBEDDED] or ids[-1:])
    width = min(_READ, (positions_told(job.model) or UNLIMITED) // 2, *(len(row) for row in rows))
    return Context([row[-width:] for row in rows], Prompt(width, None, torch.arange(width).expand(len(rows), -1)))


def placement(placed: Placed) -> Placement | None:
    """What the statistics say of it."""
    if not placed.places:
        return None
    return Placement(placed.places, {", ".join(places): took for places, took in placed.seconds.items()})
