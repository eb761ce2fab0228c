# SPDX-License-Identifier: Apache-2.0
"""Does another model in the chain pay? Theorem 3.2 of the paper as printed, and the exact test.

M_new is put between M_i and M_(i+1). Theorem 3.2 says that time falls "if and only if" C1 or C2 holds. What
is true when M_(i+1) is the drafter: C1 is sufficient if L_new >= L_i, C2 if L_(i-new) >= L_i, without that
neither is, and time can fall though both fail. When M_(i+1) is a verifier, C1 is exactly right. All of that
inside Lemma 3.1, which forgets the tokens that upper models throw away; :func:`exact_change` does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from .checks import check_at_least, check_positive
from .costs import exact_time_per_token


@dataclass(frozen=True)
class Insertion:
    """The numbers Theorem 3.2 is about.

    Attributes:
        time_above: T_i, one pass of the model above the gap.
        time_new: T_new, one pass of the new model, at the shape it will run.
        time_below: T_(i+1), one pass of the model below the gap.
        length_before: L_i, accepted length of M_i over M_(i+1), without the new model.
        length_above: L_(i-new), accepted length of M_i over the new model's stream.
        length_new: L_new, accepted length of the new model over M_(i+1). (The sentence of the theorem has the
            last two the other way round; its proof and Table 1 settle it.)
    """

    time_above: float
    time_new: float
    time_below: float
    length_before: float
    length_above: float
    length_new: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_positive(name, value)


class Inequality(NamedTuple):
    """A condition of the form left < right, kept with its numbers so that a refusal can show them.

    Attributes:
        left: the side that must be smaller.
        right: the side that must be larger.
    """

    left: float
    right: float

    @property
    def holds(self) -> bool:
        """Whether left < right."""
        return self.left < self.right


def condition_c1(insertion: Insertion) -> Inequality:
    """Condition C1 of Theorem 3.2 as printed: T_new / T_i < L_new (1 / L_i - 1 / L_(i-new)).

    Args:
        insertion: the numbers.

    Returns:
        Both sides.
    """
    gain = 1.0 / insertion.length_before - 1.0 / insertion.length_above
    return Inequality(insertion.time_new / insertion.time_above, insertion.length_new * gain)


def condition_c2(insertion: Insertion, beta: float) -> Inequality:
    """Condition C2 of Theorem 3.2 as printed: T_new / T_(i+1) < beta (L_new / L_i - 1).

    Args:
        insertion: the numbers.
        beta: passes of the last drafter per pass of the model above it.

    Returns:
        Both sides.

    Raises:
        ValueError: if beta is negative.
    """
    check_at_least("beta", beta, 0)
    right = beta * (insertion.length_new / insertion.length_before - 1.0)
    return Inequality(insertion.time_new / insertion.time_below, right)


def smallest_beta_for_c2(insertion: Insertion) -> float:
    """The beta above which C2 holds.

    Args:
        insertion: the numbers.

    Returns:
        (T_new / T_(i+1)) / (L_new / L_i - 1), or infinity if L_new <= L_i, where no beta is enough.
    """
    growth = insertion.length_new / insertion.length_before - 1.0
    return insertion.time_new / insertion.time_below / growth if growth > 0 else math.inf


def critical_length_before(insertion: Insertion) -> float:
    """The L_i at which C1 turns from true to false, for telling how far a measurement is from the edge.

    1 / L_i = (T_new / T_i) / L_new + 1 / L_(i-new). In the paper's own example it lies 1.1 % above the
    measured L_i.

    Args:
        insertion: the numbers; its own ``length_before`` is not used.

    Returns:
        C1 holds exactly for every L_i below this one.
    """
    cost = insertion.time_new / insertion.time_above / insertion.length_new
    return 1.0 / (cost + 1.0 / insertion.length_above)


def lemma_change_inside(insertion: Insertion) -> float:
    """Change of time per token by Lemma 3.1 when M_(i+1) is itself a verifier (i + 1 < n).

    dT / N = T_new / L_new + T_i (1 / L_(i-new) - 1 / L_i): below zero exactly when C1 holds.

    Args:
        insertion: the numbers.

    Returns:
        Time per token after minus before; negative if the insertion pays.
    """
    change_above = 1.0 / insertion.length_above - 1.0 / insertion.length_before
    return insertion.time_new / insertion.length_new + insertion.time_above * change_above


def lemma_change_above_drafter(insertion: Insertion, beta: float) -> float:
    """Change of time per token by Lemma 3.1 when M_(i+1) is the last drafter (i + 1 = n).

    dT / N = T_new / L_new + T_i (1 / L_(i-new) - 1 / L_i) + beta T_n (1 / L_new - 1 / L_i): what C1 and C2
    each take two terms of.

    Args:
        insertion: the numbers.
        beta: drafter passes per pass of the model above it, taken as the same before and after.

    Returns:
        Time per token after minus before; negative if the insertion pays.

    Raises:
        ValueError: if beta is negative.
    """
    check_at_least("beta", beta, 0)
    change_below = 1.0 / insertion.length_new - 1.0 / insertion.length_before
    return lemma_change_inside(insertion) + beta * insertion.time_below * change_below


def exact_change(insertion: Insertion, handed: float, beta_before: float, beta_after: float) -> float:
    """Change of time per token when a model is put between a target and its drafter, waste accounted for.

    After minus before of the exact form of Lemma 3.1:
    T_1 / L_1' + E[B] / (L_1' l_2) (T_2' + beta' T_3) - (T_1 + beta T_3) / L_1. Lengths count a verifier's own
    token; ``length_new`` is l_2, what the new model *emits* per pass, not what survives above. This is the
    insertion test to use.

    Args:
        insertion: the numbers.
        handed: E[B], mean tokens handed to the target per pass after the insertion.
        beta_before: drafter passes per target pass without the new model.
        beta_after: drafter passes per pass of the new model.

    Returns:
        Time per token after minus before; negative if the insertion pays.

    Raises:
        ValueError: if a number is out of range, or the target would emit more than it was handed and one.
    """
    before = exact_time_per_token(
        (insertion.time_above, insertion.time_below), (insertion.length_before,), (), beta_before
    )
    after = exact_time_per_token(
        (insertion.time_above, insertion.time_new, insertion.time_below),
        (insertion.length_above, insertion.length_new),
        (handed,),
        beta_after,
    )
    return after - before
