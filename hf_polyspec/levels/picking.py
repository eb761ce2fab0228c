# SPDX-License-Identifier: Apache-2.0
"""A verifier's check where nothing but likeliest ids is asked of its pass."""

from __future__ import annotations

from typing import Protocol

from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.judgement import NOTHING, compare, record
from ..exactness.passes import Pass
from ..exactness.proposal import Proposal
from ..exactness.row_laws import RowLaws
from ..exactness.row_tensors import RowTensors
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


def says_likeliest(law: LawMaker) -> bool:
    """Whether the text of all rows is what raw logits hold likeliest, and nothing that a pass says could fail a row."""
    if type(law) is RowLaws:
        return not law.failures and all(map(says_likeliest, law.laws))
    return type(law) is LawMaker and law.picks_likeliest


def picked(level: Checker, context: Context, proposal: Proposal, active: list[bool], law: LawMaker) -> Emission | None:
    """What a verifier emits; None, and nothing has changed, where more is asked of the pass (laws, scores, states for
    a level below), or the model cannot say so little."""
    if level.scored or not any(active) or not says_likeliest(law):
        return None
    if any(below.watches for below in (level.below, *level.watchers)):
        return None
    # What a middle says is checked by the level above.
    exact = level.index == 0
    found = picks(level.runner, context, proposal.tokens, level.stats, level.vocabulary, active, exact=exact)
    if found is None:
        return None
    judgement = compare(law, proposal, found, active)
    counted = record(level.stats, proposal, judgement, active, level.eos)
    alone = context.batch == 1
    nothing = NOTHING if alone else RowTensors([NOTHING[0]] * context.batch, NOTHING.device)
    passed = Pass(nothing, None, found.fed, found.read, counts=found.counts)
    return Emission(
        judgement.tokens,
        None,
        origins_of(level.index, proposal, judgement),
        [len(row) for row in proposal.tokens],
        judgement.accepted,
        nothing,
        nothing,
        passed,
        counted=counted,
        leads=judgement.leads if alone else [],
    )
