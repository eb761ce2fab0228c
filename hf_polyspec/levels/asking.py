# SPDX-License-Identifier: Apache-2.0
"""How a verifier asks the level below: it gets a proposal for its rows, or an error that names the level."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from ..errors import LevelError, RollbackError, level_failures
from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.proposal import Proposal, TreeProposal, proposal_fault, tree_fault
from .base import Drafter


def ask(
    source: Drafter, context: Context, rooms: list[int], law: LawMaker, vocabulary: int, eos: Collection[int]
) -> Proposal:
    """What a level proposes, no row longer than its end of text: nothing behind that can be part of the text.

    Args:
        source: the level; context: the rows; rooms: most tokens of each row.
        law: of the level that asks; vocabulary: ids there are; eos: ids that end a text.

    Raises:
        LevelError: it failed, or handed up something that is no proposal for these rows.
        ValueError: it refused.
    """
    try:
        with _blamed(source), _generator_lent(source, context, rooms, law):
            proposal = source.propose(context, rooms, law.fork(context.batch))
    finally:
        law.settle()
    fault = proposal_fault(proposal, rooms, vocabulary)
    if fault is not None:
        raise LevelError(f"{source.role} {fault}.")
    ends = [_end(row, eos) for row in proposal.tokens]
    if ends == [len(row) for row in proposal.tokens]:
        return proposal
    return proposal.cut(ends)


def ask_for_tree(
    source: Drafter, context: Context, rooms: list[int], law: LawMaker, vocabulary: int
) -> TreeProposal | None:
    """The same for a tree; None where there is none to offer."""
    with _blamed(source), _generator_lent(source, context, rooms, law):
        tree = source.propose_tree(context, rooms, law)
    fault = None if tree is None else tree_fault(tree, context.batch, vocabulary)
    if fault is not None:
        raise LevelError(f"{source.role} {fault}.")
    return tree


def _end(tokens: list[int], eos: Collection[int]) -> int:
    """How many tokens there are up to the first that ends the text, with it."""
    return next((i + 1 for i, token in enumerate(tokens) if token in eos), len(tokens))


def _generator_lent(source: Drafter, context: Context, rooms: list[int], law: LawMaker) -> AbstractContextManager[None]:
    """Torch's default generator for a level that draws from it, as plain generation would now."""
    if law.noise is None or source.shares_noise or not any(rooms):
        return nullcontext()
    row = next(b for b, room in enumerate(rooms) if room)
    return law.noise.lent(context.places[row], context.steps()[row])


@contextmanager
def _blamed(source: Drafter) -> Iterator[None]:
    """Errors carry the level's name; a refusal stays a ValueError, lack of memory what it is."""
    what = f"{source.role} failed to propose"
    try:
        yield
    except (LevelError, RollbackError):
        raise
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    except Exception as error:
        if getattr(error, "__notes__", None):  # memory that ran out in a pass, whose level is noted already
            raise
        with level_failures(what):
            raise
