# SPDX-License-Identifier: Apache-2.0
"""Why an assistant is left out: the condition that fails, with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .candidates import Level
from .readings import agreement_rate
from .replay import Measurements, Replayed
from .search import Candidate
from .theory import Inequality, Insertion, condition_c1, condition_c2, exact_time_per_token

_TINY = 1e-12


@dataclass(frozen=True)
class Dropped:
    """An assistant that the best chain does without.

    Attributes:
        name: of the assistant.
        condition: which test it fails.
        left, right: its sides; left < right would have kept it.
        sentence: all of it in words.
    """

    name: str
    condition: str
    left: float
    right: float
    sentence: str


def reasons(levels: Sequence[Level], candidates: Sequence[Candidate], measured: Measurements) -> list[Dropped]:
    """One entry for every assistant that is not in the best chain.

    Args:
        levels: the target first; candidates: the quickest first; measured: the records.
    """
    best = candidates[0]
    found = []
    for level in levels[1:]:
        if level.place in best.chain.levels:
            continue
        # What can stand in the middle is judged there: as the lowest level it would be one more drafter.
        using = next((c for c in candidates if level.place in c.chain.levels[1:-1]), None)
        using = using or next((c for c in candidates if level.place in c.chain.levels), None)
        if using is None:
            why = "; ".join(text for (_, place), text in measured.bound.items() if place == level.place)
            found.append(Dropped(level.name, "it fits nowhere", 1.0, 0.0, f"{level.name} is left out: {why}"))
            continue
        places = tuple(place for place in using.chain.levels if place != level.place)
        without = next((c for c in candidates if c.chain.levels == places), best)
        if using.predicted.seconds < without.predicted.seconds:
            # It helps its neighbours, but their chain is not the best one.
            without = best
        if level.kind == "model" and using.chain.levels[-1] != level.place:
            found.append(_middle(level, using, without, measured))
        else:
            found.append(_drafter(level, using, without, measured))
    return found


def exact_seconds(predicted: Replayed) -> float:
    """Time per token of the rounds of a chain, by the exact form of Lemma 3.1 with the lengths of the replay.

    Args:
        predicted: of a chain or of plain decoding.
    """
    times = [max(_TINY, seconds) for seconds in predicted.tables]
    if len(times) == 1:
        return times[0]
    emitted, handed = [predicted.length], []
    for i in range(1, len(times) - 1):
        handed.append(predicted.offered[i - 1])
        emitted.append(max(_TINY, predicted.offered[i - 1] * predicted.rounds[i - 1] / predicted.rounds[i]))
    beta = predicted.rounds[-1] / predicted.rounds[-2]
    return exact_time_per_token(times, emitted, handed, beta)


def _middle(level: Level, using: Candidate, without: Candidate, measured: Measurements) -> Dropped:
    with_it, without_it = using.predicted, without.predicted
    exact = Inequality(exact_seconds(with_it), exact_seconds(without_it))
    place = using.chain.levels.index(level.place)
    above = using.chain.levels[place - 1]
    rate = agreement_rate(measured.edges[above, level.place])
    own, target = (measured.costs[p].shapes[0][1] for p in (level.place, 0))
    sentence = (
        f"{level.name} is left out: the exact insertion test asks for less time per token with it than without, and "
        f"{1e3 * exact.left:.2f} ms < {1e3 * exact.right:.2f} ms {_verdict(exact)}"
    )
    sentence += f"; {measured.names[above]} accepts {100 * rate:.0f} % of its tokens"
    sentence += f", and its pass over one token takes {1e3 * own:.2f} ms where the target's takes {1e3 * target:.2f} ms"
    printed = _printed(using, without, place)
    if exact.holds:
        whole = Inequality(with_it.seconds / with_it.tokens, without_it.seconds / without_it.tokens)
        sentence += (
            f"; but with what one model more costs besides its rounds (prompts to be read, bookkeeping) a token of the "
            f"whole call takes {1e3 * whole.left:.2f} ms instead of {1e3 * whole.right:.2f} ms"
        )
        return Dropped(level.name, "time per token of whole calls", whole.left, whole.right, f"{sentence}{printed}.")
    if own >= target:
        return Dropped(level.name, "slower than the target", own, target, f"{sentence}{printed}.")
    return Dropped(level.name, "exact insertion test", exact.left, exact.right, f"{sentence}{printed}.")


def _printed(using: Candidate, without: Candidate, place: int) -> str:
    """The conditions of Theorem 3.2 as the paper prints them, where they can be asked."""
    with_it, without_it = using.predicted, without.predicted
    if without.chain.plain or place != 1 or len(using.chain.levels) != 3:
        return ""
    emitted = with_it.offered[0] * with_it.rounds[0] / max(_TINY, with_it.rounds[1])
    insertion = Insertion(
        time_above=max(_TINY, without_it.tables[0]),
        time_new=max(_TINY, with_it.tables[1]),
        time_below=max(_TINY, without_it.tables[-1]),
        length_before=without_it.length,
        length_above=with_it.length,
        length_new=max(_TINY, emitted),
    )
    c1, c2 = condition_c1(insertion), condition_c2(insertion, without_it.rounds[-1] / without_it.rounds[0])
    return (
        f"; Theorem 3.2 as printed: C1 {c1.left:.3f} < {c1.right:.3f} {_verdict(c1)}, "
        f"C2 {c2.left:.3g} < {c2.right:.3g} {_verdict(c2)}"
    )


def _drafter(level: Level, using: Candidate, without: Candidate, measured: Measurements) -> Dropped:
    times = Inequality(
        using.predicted.seconds / using.predicted.tokens, without.predicted.seconds / without.predicted.tokens
    )
    own = using.predicted.tables[-1] if using.chain.levels[-1] == level.place else 0.0
    sentence = (
        f"{level.name} is left out: a token takes {1e3 * times.left:.2f} ms in its best chain and "
        f"{1e3 * times.right:.2f} ms without it; the level above emits "
        f"{_emitted_above(using, level.place):.2f} tokens a round, and a draft takes {1e3 * own:.2f} ms."
    )
    return Dropped(level.name, "time per token", times.left, times.right, sentence)


def _emitted_above(using: Candidate, place: int) -> float:
    predicted, at = using.predicted, using.chain.levels.index(place)
    if at == 1:
        return predicted.length
    return predicted.offered[at - 2] * predicted.rounds[at - 2] / max(_TINY, predicted.rounds[at - 1])


def _verdict(test: Inequality) -> str:
    return "holds" if test.holds else "fails"
