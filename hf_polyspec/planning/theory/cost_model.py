# SPDX-License-Identifier: Apache-2.0
"""What a round of a chain costs and emits: one model for the planner before a generation and the control during it.

A chain is described by its members, the target first. Each has a table of seconds by tokens, and says how many of its
tokens the level above accepts. Rounds are put together from the drafter up by the renewal argument of
`theory.rounds`; acceptance may fall with the position, pass times may have steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .checks import check_at_least, check_probability
from .rounds import block_law


@dataclass(frozen=True)
class SecondsTable:
    """Seconds by number of tokens, linear between the points measured and beyond the last.

    Attributes:
        points: (tokens, seconds), tokens rising, at least one. Before the first point its seconds hold.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("A table of seconds needs at least one point.")
        tokens = [point[0] for point in self.points]
        if tokens != sorted(set(tokens)):
            raise ValueError(f"The tokens of a table of seconds must rise, got {tokens}.")
        for count, seconds in self.points:
            check_at_least("tokens", count, 0)
            check_at_least("seconds", seconds, 0)

    @classmethod
    def constant(cls, seconds: float) -> SecondsTable:
        """The same seconds at every size."""
        return cls(((1, seconds),))

    @classmethod
    def per_token(cls, seconds: float) -> SecondsTable:
        """Seconds proportional to the tokens: a drafter that runs one pass a token."""
        return cls(((0, 0.0), (1, seconds)))

    def seconds(self, tokens: float) -> float:
        """Seconds at a number of tokens.

        Args:
            tokens: 0 or more; means of several passes are welcome.
        """
        places = self._places
        if len(places) == 1 or tokens <= places[0]:
            return self.points[0][1]
        right = min(bisect_right(places, tokens), len(places) - 1)
        (left_tokens, left), (right_tokens, right_seconds) = self.points[right - 1], self.points[right]
        slope = (right_seconds - left) / (right_tokens - left_tokens)
        if tokens > right_tokens:
            # Noise can make the last step fall; more tokens never take less time than the last point.
            return right_seconds + max(0.0, slope) * (tokens - right_tokens)
        return left + slope * (tokens - left_tokens)

    def scaled(self, factor: float) -> SecondsTable:
        """The same shape, every time multiplied: what a machine that has become slower looks like."""
        check_at_least("factor", factor, 0)
        return SecondsTable(tuple((tokens, factor * seconds) for tokens, seconds in self.points))

    @cached_property
    def _places(self) -> list[int]:
        return [point[0] for point in self.points]


@dataclass(frozen=True)
class Acceptance:
    """How many tokens of a proposal are accepted, by position.

    Attributes:
        survival: entry i is the probability that at least i + 1 tokens are accepted, if that many are proposed; never
            rising. Beyond the last entry the last conditional rate goes on.
    """

    survival: tuple[float, ...]

    def __post_init__(self) -> None:
        before = 1.0
        for i, value in enumerate(self.survival):
            check_probability(f"survival[{i}]", value)
            if value > before + 1e-9:
                raise ValueError(f"survival must not rise, but entry {i} is {value} after {before}.")
            before = value

    @classmethod
    def constant(cls, agreement: float) -> Acceptance:
        """Every token accepted with the same probability."""
        check_probability("agreement", agreement)
        return cls((agreement, agreement * agreement))

    @classmethod
    def from_counts(cls, drafted_at: Sequence[float], accepted_at: Sequence[float]) -> Acceptance:
        """From the counters of `LevelStats`: how often position i was proposed, and accepted.

        Position i is judged only where the positions before it were accepted, so its conditional rate is accepted
        there over accepted one before (among proposals long enough, on the assumption that those are like the others).

        Args:
            drafted_at, accepted_at: counters by position.
        """
        survival: list[float] = []
        reached = 1.0
        for drafted, accepted in zip(drafted_at, accepted_at, strict=True):
            if drafted <= 0:
                break
            # Of the proposals that have position i, at most as many can keep it as of all the shorter ones.
            reached = min(reached, accepted / drafted)
            survival.append(reached)
        return cls(tuple(survival))

    def at_least(self, tokens: int) -> float:
        """Probability that this many are accepted, if they are proposed."""
        if tokens <= 0:
            return 1.0
        if tokens <= len(self.survival):
            return self.survival[tokens - 1]
        if not self.survival:
            return 0.0
        last = self.survival[-1]
        before = self.survival[-2] if len(self.survival) > 1 else 1.0
        rate = last / before if before > 0 else 0.0
        return last * float(rate ** (tokens - len(self.survival)))

    def law(self, proposed: int) -> tuple[float, ...]:
        """Law of the tokens a verifier emits: entry k - 1 is the probability of k, its own token included.

        Args:
            proposed: tokens it is offered, 0 or more.
        """
        reached = [self.at_least(i) for i in range(proposed + 1)]
        return tuple(a - b for a, b in zip(reached, [*reached[1:], 0.0], strict=True))

    def mean_length(self, proposed: int) -> float:
        """Mean tokens a verifier emits when offered this many, its own token included."""
        return math.fsum(self.at_least(i) for i in range(proposed + 1))


@dataclass(frozen=True)
class Member:
    """One level of a chain, as the cost model sees it.

    Attributes:
        name: shown in tables.
        table: a verifier: seconds of one round of its own by the tokens of its pass (proposed + 1). A drafter:
            seconds of a whole draft by its tokens.
        acceptance: of what it hands up, by the level above; meaningless for the target.
    """

    name: str
    table: SecondsTable
    acceptance: Acceptance = Acceptance(())


@dataclass(frozen=True)
class Prediction:
    """One round of the target, everything below it included.

    Attributes:
        tokens: mean tokens it emits.
        seconds: mean seconds it takes.
        by_level: the seconds of each level, the target first; what is left of `seconds` is overhead.
        passes: rounds of each level per round of the target (the drafter: drafts).
    """

    tokens: float
    seconds: float
    by_level: tuple[float, ...]
    passes: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of wall time."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class _Partial:
    """A round of a level while the chain is put together: its law, and seconds and rounds of it and all below."""

    law: tuple[float, ...]
    seconds: tuple[float, ...]
    rounds: tuple[float, ...]


def predict(
    members: Sequence[Member], sizes: Sequence[int], *, overhead: float = 0.0, drafted: int | None = None
) -> Prediction:
    """Predict a round of a chain.

    Rounds are taken as independent of each other, with the acceptance by position of the tables; a block keeps what
    its last round ran over, as the engine does (`theory.rounds.block_law`).

    Args:
        members: the target first; one alone is plain decoding.
        sizes: tokens offered by each member but the target, in order: block sizes of the middles, then the draft
            length. 0 for the drafter means that it is not asked.
        overhead: seconds of a target round that no level counts (loop, stopping, streaming).
        drafted: tokens in the pass that checks the draft when it is a tree, whose paths are then `sizes[-1]` long and
            whose draft takes `table.seconds(drafted)`; None for a chain.

    Returns:
        The prediction.

    Raises:
        ValueError: a size is out of range, or there is not one for every member below the target.
    """
    if len(sizes) != len(members) - 1:
        raise ValueError(f"{len(members)} members need {len(members) - 1} sizes, got {len(sizes)}.")
    check_at_least("overhead", overhead, 0)
    for i, size in enumerate(sizes):
        check_at_least(f"sizes[{i}]", size, 0 if i == len(sizes) - 1 else 1)
    if len(members) == 1:
        partial = _Partial((1.0,), (members[0].table.seconds(1),), (1.0,))
    else:
        partial = _lowest(members[-2], members[-1], sizes[-1], sizes[-1] if drafted is None else drafted)
        for level in range(len(members) - 3, -1, -1):
            partial = _above(members[level], members[level + 1].acceptance, sizes[level], partial)
    tokens = math.fsum(k * p for k, p in enumerate(partial.law, start=1))
    return Prediction(tokens, math.fsum(partial.seconds) + overhead, partial.seconds, partial.rounds)


def _lowest(verifier: Member, drafter: Member, depth: int, drafted: int) -> _Partial:
    seconds = (verifier.table.seconds(drafted + 1), drafter.table.seconds(drafted) if drafted else 0.0)
    return _Partial(drafter.acceptance.law(depth), seconds, (1.0, 1.0 if drafted else 0.0))


def _above(member: Member, acceptance: Acceptance, threshold: int, below: _Partial) -> _Partial:
    blocks, rounds = block_law(threshold, below.law)
    law = [0.0] * (len(blocks) + 1)
    own = 0.0
    for block, weight in enumerate(blocks, start=1):
        if weight:
            own += weight * member.table.seconds(block + 1)
            for index, probability in enumerate(acceptance.law(block)):
                law[index] += weight * probability
    return _Partial(
        tuple(law),
        (own, *(rounds * seconds for seconds in below.seconds)),
        (1.0, *(rounds * passes for passes in below.rounds)),
    )
