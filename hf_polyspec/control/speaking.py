# SPDX-License-Identifier: Apache-2.0
"""Who drafts where a level is two drafters, of which the dear one may rest while the other is asked alone."""

from __future__ import annotations

from collections.abc import Sequence

from ..levels.base import Drafter
from ..levels.joined import JoinedDrafter
from ..levels.verifier import Verifier

FARTHEST = 256
"""Rounds ahead that anything is reckoned for: texts end by themselves."""


def speaker(source: Drafter) -> Drafter:
    """Who drafts when a level is asked as it stands."""
    return source.branch if isinstance(source, JoinedDrafter) and source.rests else source


def may_rest(source: Drafter) -> bool:
    """Whether a level has a part that may rest while one that tells its chances drafts alone."""
    return (
        isinstance(source, JoinedDrafter)
        and not source.rests
        and not source.grows_trees
        and source.branch.tells_chances
    )


def shortcut_of(source: Drafter, passes_by: bool) -> Drafter | None:
    """The drafter below a verifier, where its drafts may go up unchecked by that: nobody draws them; or a level itself,
    of which a part may rest.

    Args:
        source: the level below; passes_by: whether a verifier may be passed by.
    """
    if may_rest(source):
        return source
    if not passes_by or not isinstance(source, Verifier):
        return None
    found: Drafter = source
    while isinstance(found, Verifier):
        found = found.below
    return found if found.tells_chances and not found.grows_trees else None


def branch_of(source: Drafter) -> Drafter:
    """The part that drafts alone then."""
    assert isinstance(source, JoinedDrafter)
    return source.branch


def rest(source: Drafter, rests: bool) -> None:
    """Have that part rest, or be asked again."""
    assert isinstance(source, JoinedDrafter)
    source.rests = rests


def rounds_ahead(rooms: Sequence[int]) -> float:
    """Rounds in which what a drafter reads of a text now may pay: about half of what rows may emit yet."""
    going = [room for room in rooms if room]
    return min(FARTHEST, sum(going) / len(going) / 2) if going else 0.0
