# SPDX-License-Identifier: Apache-2.0
"""A drafter that grows trees and one that only continues: the continuation joins the tree as one more branch."""

from __future__ import annotations

import torch

from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.passes import Pass
from ..exactness.proposal import Proposal, TreeProposal
from ..exactness.tree_geometry import graft
from .base import Drafter
from .sequential import SequentialDrafter

SURE = 2


class JoinedDrafter(Drafter):
    """Two drafters as one level: `assistant_models=[..., head, SuffixDrafter()]`.

    In a tree, the branch starts after the context and shares the nodes that are already there, so that no node is
    doubled. Nodes are checked by the one-hot rule, which is exact however a tree came about, so the branch may also
    come from a drafter that draws. It counts on top of the tree's size.

    Where no tree can be checked, a row's chain comes from one of the two: from the branch where it is at least as long
    as the head's drafts, or two tokens of a suffix drafter, which are cheaper and as good; else from the head.

    Args:
        head: grows trees, and reads what the level above computes.
        branch: continues a text; runs whenever the head does.
        eos: ids that end a text: nothing of the branch is taken after one.
        branch_limit: most tokens of a branch, None for as many as the drafter gives.
        chain_tokens: length of a branch from which on it replaces the head's chain; `SURE` at most where a long
            branch is a sure one.
        direct_tokens: see `passes_by`. What a head drafts is checked by the level whose states it reads.

    Attributes:
        rests: whether the head is not asked; it reads what it has missed when it is asked again.
    """

    def __init__(
        self,
        head: Drafter,
        branch: Drafter,
        *,
        eos: frozenset[int] = frozenset(),
        branch_limit: int | None = None,
        chain_tokens: int = 1,
        direct_tokens: int = 0,
    ) -> None:
        self.name = f"{head.name} + {branch.name}"
        super().__init__()
        self.head = head
        self.branch = branch
        self.eos = eos
        self.branch_limit = branch_limit
        self.chain_tokens = chain_tokens
        self.direct_tokens = direct_tokens
        self.reads_layers = head.reads_layers
        self.grows_trees = head.grows_trees
        self.shares_noise = head.shares_noise and branch.shares_noise
        limits = [part.max_batch for part in (head, branch) if part.max_batch is not None]
        self.max_batch = min(limits, default=None)
        self.rests = False
        self._grown: TreeProposal | None = None
        self._branches: list[list[int]] = []
        self._from_branch: list[bool] = []

    @property
    def parts(self) -> list[Drafter]:
        """The two drafters, which keep their own counters."""
        return [self.head, self.branch]

    @property
    def tree_nodes(self) -> int:
        return self.head.tree_nodes

    def share_out(self, head: int, branch: int) -> None:
        """From now on the head's chains have so many tokens, 0 for none, and a branch as many at most.

        Raises:
            TypeError: the head does not draft in chains.
        """
        if not isinstance(self.head, SequentialDrafter):
            raise TypeError(f"{self.head.name} drafts no chain of a given length.")
        self.rests, self.branch_limit = head == 0, branch
        self.head.draft_tokens = head or self.head.draft_tokens

    def passes_by(self, device: torch.device) -> int:
        """From how many tokens on a branch may pass the middle above by, where that pays; 0 for never.

        Args:
            device: where the laws of the chain are.
        """
        return self.direct_tokens if not self.grows_trees and self.branch.long_is_sure(device) else 0

    def is_sure(self, row: int) -> bool:
        return self._from_branch[row]

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self._from_branch, self.rests = [False] * batch, False
        self.head.begin(index, batch, vocabulary)
        self.branch.begin(index + 1, batch, vocabulary)

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        tree = self.head.propose_tree(context, limits, law)
        if tree is None:
            return None
        offered = self.branch.propose(context, self._limits(limits), law.fork(context.batch))
        self._grown = tree
        self._branches = [self._until_end(row) for row in offered.tokens]
        joined = TreeProposal([], [], [], tree.drawn, tree.q)
        rows = zip(tree.tokens, tree.parents, tree.origins, self._branches, offered.origins, strict=True)
        for b, (tokens, parents, origins, branch, branch_origins) in enumerate(rows):
            # Whether the branch is there must not depend on what was drawn: it shares chosen nodes only.
            more_tokens, more_parents = graft(tokens, parents, branch, set(tree.drawn[b]) if tree.drawn else ())
            joined.tokens.append([*tokens, *more_tokens])
            joined.parents.append([*parents, *more_parents])
            joined.origins.append([*origins, *branch_origins[len(branch) - len(more_tokens) : len(branch)]])
        return joined

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        offered = self.branch.propose(context, self._limits(limits), law.fork(context.batch))
        enough = min(self.chain_tokens, SURE) if self.branch.long_is_sure(law.device) else self.chain_tokens
        if offered.q is not None and law.draws:
            # A length may follow from the values drawn, so what was drawn is always used once there is any (law 2).
            enough = 1
        rows = zip(offered.tokens, limits, self._from_branch, strict=True)
        # Of a row that is not asked, what was offered last may not have been judged yet.
        self._from_branch = [self.rests or len(row) >= enough if limit else was for row, limit, was in rows]
        rest = [0 if taken else limit for taken, limit in zip(self._from_branch, limits, strict=True)]
        nothing: list[list[int]] = [[] for _ in limits]
        drafted = Proposal(nothing, None, nothing) if self.rests else self.head.propose(context, rest, law)
        self._grown = None

        def pick(first: list[list[int]], second: list[list[int]]) -> list[list[int]]:
            return [a if taken else b for taken, a, b in zip(self._from_branch, first, second, strict=True)]

        tokens = pick(offered.tokens, drafted.tokens)
        q = self._laws(offered, drafted, tokens) if law.draws else None
        told, taken = offered.chances, list(self._from_branch)

        def chances() -> list[list[float]]:
            """Of a branch; nothing is said of what the head has guessed."""
            of_rows = [] if told is None else told()
            return [row if mine else [] for row, mine in zip(of_rows, taken, strict=True)]

        return Proposal(tokens, q, pick(offered.origins, drafted.origins), None if told is None else chances)

    def observe(self, drafted: list[int], accepted: list[int]) -> None:
        for part, mine in ((self.branch, True), (self.head, False)):
            chosen = [taken is mine for taken in self._from_branch]
            if not any(chosen) and self.rests:
                continue  # it would look at every pass for what is to be learnt from it
            part.observe(
                [count if own else 0 for count, own in zip(drafted, chosen, strict=True)],
                [count if own else 0 for count, own in zip(accepted, chosen, strict=True)],
            )

    def observe_tree(self, tree: TreeProposal, paths: list[list[int]]) -> None:
        assert self._grown is not None
        # The head's nodes come first and are closed under ancestors: its share of a path is the path's beginning.
        own = [[n for n in path if n < len(nodes)] for path, nodes in zip(paths, self._grown.tokens, strict=True)]
        self.head.observe_tree(self._grown, own)
        followed = []
        for branch, nodes, path in zip(self._branches, tree.tokens, paths, strict=True):
            shared = 0
            while shared < min(len(branch), len(path)) and branch[shared] == nodes[path[shared]]:
                shared += 1
            followed.append(shared)
        self.branch.observe([len(branch) for branch in self._branches], followed)

    @property
    def watches(self) -> bool:
        return self.head.watches or self.branch.watches

    def watch(self, passed: Pass) -> None:
        self.head.watch(passed)
        self.branch.watch(passed)

    def prefill(self, context: Context, chunk: int) -> None:
        self.head.prefill(context, chunk)
        self.branch.prefill(context, chunk)

    def keep_rows(self, rows: list[int]) -> None:
        self._from_branch = [self._from_branch[row] for row in rows]
        self.head.keep_rows(rows)
        self.branch.keep_rows(rows)

    def add_rows(self, count: int) -> None:
        self._from_branch += [False] * count
        self.head.add_rows(count)
        self.branch.add_rows(count)

    @property
    def takes_rows(self) -> bool:
        return self.head.takes_rows and self.branch.takes_rows

    def end(self) -> None:
        self.head.end()
        self.branch.end()

    def _limits(self, limits: list[int]) -> list[int]:
        return limits if self.branch_limit is None else [min(limit, self.branch_limit) for limit in limits]

    def _until_end(self, tokens: list[int]) -> list[int]:
        """Up to and including the first id that ends the text."""
        ending = next((i for i, token in enumerate(tokens) if token in self.eos), len(tokens))
        return tokens[: ending + 1]

    def _laws(self, offered: Proposal, drafted: Proposal, tokens: list[list[int]]) -> torch.Tensor | None:
        """`[B, K, V]`, the law that each token was drawn from; one-hot where none was drawn."""
        given = [proposal.q for proposal in (offered, drafted) if proposal.q is not None]
        if not given:
            return None
        width = max(len(row) for row in tokens)
        like = given[-1]
        laws = like.new_zeros(len(tokens), width, like.shape[2])
        for b, (row, taken) in enumerate(zip(tokens, self._from_branch, strict=True)):
            q = (offered if taken else drafted).q
            if q is not None:
                laws[b, : len(row)] = q[b, : len(row)]
            elif row:
                laws[b, torch.arange(len(row)), torch.tensor(row)] = 1
        return laws
