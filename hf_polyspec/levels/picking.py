# SPDX-License-Identifier: Apache-2.0
"""A verifier's check of one row, where nothing but likeliest ids is asked of its pass."""

from __future__ import annotations

from typing import Protocol

from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.judgement import NOTHING, compare, record
from ..exactness.passes import Pass
from ..exactness.proposal import Proposal
from ..host.picking import picks
from ..host.runner import ModelRunner
from ..telemetry.counters import LevelStats
from .base import Drafter
from .emission import Emission, origins_of


class Checker(Protocol):
    """What is read of a verifier, see there."""

    index: int
    runner: ModelRunner
    stats: LevelStats
    below: Drafter
    watchers: list[Drafter]
    vocabulary: int
    eos: frozenset[int]
    scored: bool


def picked(level: Checker, context: Context, proposal: Proposal, active: list[bool], law: LawMaker) -> Emission | None:
    """What a verifier emits, for a row that is alone; None, and nothing has changed, where more is asked of the pass
    (laws, scores, states for a level below), or the model cannot say so little."""
    if level.scored or active != [True] or type(law) is not LawMaker or not law.picks_likeliest:
        return None
    if any(below.watches for below in (level.below, *level.watchers)):
        return None
    drafted = proposal.tokens[0]
    # What a middle says is checked by the level above.
    found = picks(level.runner, context, drafted, level.stats, level.vocabulary, exact=level.index == 0)
    if found is None:
        return None
    judgement = compare(law, proposal, found)
    counted = record(level.stats, proposal, judgement, active, level.eos)
    passed = Pass(NOTHING, None, found.fed, [found.read])
    return Emission(
        judgement.tokens,
        None,
        origins_of(level.index, proposal, judgement),
        [len(drafted)],
        judgement.accepted,
        NOTHING,
        NOTHING,
        passed,
        counted=counted,
        leads=judgement.leads,
    )
