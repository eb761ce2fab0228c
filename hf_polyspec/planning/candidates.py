# SPDX-License-Identifier: Apache-2.0
"""Which chains there are to choose from: every subset of the assistants in order, with every size worth trying."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from torch import nn

from ..eagle.modeling import EagleHead
from ..host.release import input_device
from ..levels.base import Drafter
from ..levels.shown import ShownDrafter
from ..models.companions import is_companion
from .agreement import TREES
from .replay import Chain

Kind = Literal["model", "head", "drafter"]

BLOCKS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
MODEL_DRAFTS = (1, 2, 3, 4, 5, 6, 8, 10, 12)
HEAD_DRAFTS = (1, 2, 3, 4, 5, 6, 8)
FREE_DRAFTS = (4, 8, 12, 24)
DIRECT = (0, 2, 4)
MOST_LEVELS = 4


@dataclass(frozen=True)
class Level:
    """A member of the chain as it was given.

    Attributes:
        name: shown in tables; place: 0 for the target.
        member: the object; kind: "model" checks and drafts, "head" drafts and reads the level above, "drafter" drafts.
    """

    name: str
    place: int
    member: Any
    kind: Kind

    @property
    def longest(self) -> int:
        """Most tokens of its drafts that are tried."""
        return max({"model": MODEL_DRAFTS, "head": HEAD_DRAFTS, "drafter": FREE_DRAFTS}[self.kind])


def kind_of(member: Any) -> Kind:
    """What an assistant can do in a chain."""
    if isinstance(member, (EagleHead, ShownDrafter)) or is_companion(member):
        return "head"
    return "model" if isinstance(member, nn.Module) and hasattr(member, "config") else "drafter"


def subsets(levels: Sequence[Level]) -> Iterator[tuple[int, ...]]:
    """Places of every chain that can stand, plain decoding first.

    Args:
        levels: the target first.
    """
    yield (0,)
    for count in range(1, min(len(levels), MOST_LEVELS)):
        for below in combinations(levels[1:], count):
            if all(level.kind == "model" for level in below[:-1]):
                yield (0, *(level.place for level in below))


def sized(levels: Sequence[Level], places: tuple[int, ...], trees: bool) -> Iterator[Chain]:
    """A subset at every size.

    Args:
        levels: the target first; places: one of `subsets`.
        trees: whether the drafter's trees were measured under the level above it.
    """
    if len(places) == 1:
        yield Chain(places)
        return
    kind, member = levels[places[-1]].kind, levels[places[-1]].member
    drafts = {"model": MODEL_DRAFTS, "head": HEAD_DRAFTS, "drafter": FREE_DRAFTS}[kind]
    sure = isinstance(member, Drafter) and member.long_is_sure(input_device(levels[0].member))
    for block in BLOCKS if len(places) > 2 else (0,):
        for draft in drafts:
            for direct in DIRECT if block and sure else (0,):
                yield Chain(places, block, draft, direct=direct)
        for tree in TREES if trees else ():
            yield Chain(places, block, 0, tree)


def options_of(chain: Chain) -> dict[str, int]:
    """The options that give a chain its sizes in `generate()`."""
    options: dict[str, int] = {}
    if chain.block:
        options["polyspec_block_size"] = chain.block
        options["polyspec_direct_tokens"] = chain.direct
    if chain.tree is not None:
        options["polyspec_tree_tokens"] = chain.tree.tokens
        options["polyspec_tree_depth"] = chain.tree.depth
        options["polyspec_tree_top_k"] = chain.tree.top_k
    elif chain.draft:
        options["num_assistant_tokens"] = chain.draft
        options["polyspec_tree_tokens"] = 0
    return options


def describe_chain(chain: Chain, names: Sequence[str]) -> str:
    """The levels below the target, as a table shows them."""
    return "plain generate()" if chain.plain else " + ".join(names[place] for place in chain.levels[1:])


def describe_sizes(chain: Chain) -> str:
    """The sizes of a chain, as a table shows them."""
    parts = [f"block {chain.block}"] if chain.block else []
    if chain.tree is not None:
        parts.append(f"tree {chain.tree.tokens}, depth {chain.tree.depth}, top {chain.tree.top_k}")
    elif chain.draft:
        parts.append(f"draft {chain.draft}")
    if chain.direct:
        parts.append(f"direct {chain.direct}")
    return ", ".join(parts) or "-"
