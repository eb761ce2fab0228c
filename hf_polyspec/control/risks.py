# SPDX-License-Identifier: Apache-2.0
"""What the next round of a row that is alone may lose."""

from __future__ import annotations

from ..exactness.context import Context
from ..levels.emission import Emission
from .costs import BLOCKS, DRAFTS, Costs
from .heads import Heads
from .ladder import smaller
from .readiness import missing
from .setups import Chain, Setup


class Risks:
    """Seconds that rounds of setups may lose against the target alone.

    Args:
        chain: the levels; costs: what is known of their passes; heads: the drafter's head, if it has one.
    """

    def __init__(self, chain: Chain, costs: Costs, heads: Heads) -> None:
        self.chain = chain
        self.costs = costs
        self.heads = heads

    def worst(self, setup: Setup, *, cutting: bool) -> float:
        """Seconds that a round takes longer than the target alone, where nothing of it is kept.

        Args:
            setup: with a level below the target; cutting: whether drafts are cut by their own chances.
        """
        *blocks, draft = setup.sizes
        drawn = (draft if setup.head is None else setup.head) if self.heads.known else 0
        if cutting:
            draft = min(draft, 1)  # how long one is follows from its chances, and what becomes of it moves those
        drafting, alone = drawn * self.costs.step_seconds, self.costs.seconds(0, 1)
        if not blocks:
            return self.costs.seconds(0, 1 + draft) + drafting - alone
        passed_by = draft if self.chain.verifiers[-1].direct_tokens else 0
        middle = blocks[0] * (self.costs.seconds(1, 1 + drawn) + drafting)
        return middle + self.costs.seconds(0, 1 + blocks[0] + passed_by) - alone

    def behind(self, emission: Emission) -> float:
        """Seconds won, 0 or less, by the columns of a draft in a pass that has read a prompt besides."""
        fed, drafted = emission.passed.fed, max(emission.drafted, default=0)
        return self.costs.seconds(0, fed - drafted) - self.costs.seconds(0, fed)

    def catching_up(self, levels: tuple[int, ...], context: Context) -> float:
        """Seconds in which a middle reads what it has missed."""
        if len(levels) < 3:
            return 0.0
        runner, behind = self.chain.verifiers[-1].runner, missing(self.chain.verifiers[-1], context)
        if behind <= 1 or (runner.lender is not None and behind >= runner.borrows_from):
            return 0.0
        return self.costs.seconds(1, behind) - self.costs.seconds(1, 1)

    def smallest(self, levels: tuple[int, ...]) -> Setup:
        """The least that these levels can be asked for."""
        return Setup(levels, (1,) * (len(levels) - 1), head=0 if self.heads.beside else None)

    def least(self, levels: tuple[int, ...], context: Context, *, cutting: bool) -> float:
        """Seconds that the smallest round of these levels may lose; 0 of the target alone."""
        if len(levels) == 1:
            return 0.0
        return self.worst(self.smallest(levels), cutting=cutting) + self.catching_up(levels, context)

    def afforded(self, setup: Setup, left: float, context: Context, *, cutting: bool) -> Setup | None:
        """A setup, or as much of it as loses no more than is left; None where its smallest round might."""
        left -= self.catching_up(setup.levels, context)
        # A draft that is cut by its own chances may be longer than what stands above it, and all lengths risk as much.
        drafts = DRAFTS[:1] if cutting and not self.heads.known else DRAFTS
        sizes = smaller(setup, BLOCKS, drafts, leaf=not cutting)
        return next((one for one in sizes if self.worst(one, cutting=cutting) <= left), None)
