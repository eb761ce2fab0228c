# SPDX-License-Identifier: Apache-2.0
"""From one forward pass over a tree to what a verifier emits.

Children that were chosen, not drawn, are judged by the one-hot rule: draw y from p at a node; if y is a child, go
there, else y is the token after the path. However they were chosen, every emitted token is a draw from p.

So it is where levels share plain generation's noise, and y is what wins the race at the node's step.

Where children were drawn, a y that is no chosen child is replaced. The first drawn child, from a law r, is judged by
speculative sampling against p', which is p without the chosen children; a rejection continues with the next one against
max(p' - r, 0), and so on, and a draw from what is left replaces y where none is accepted. Given that y is no chosen
child it follows p', and so does what replaces it (recursive rejection sampling).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch.nn import functional

from ..telemetry.counters import Counted, LevelStats
from .context import Context
from .distributions import LawMaker
from .judgement import spread
from .proposal import TreeProposal
from .row_laws import RowLaws, picked
from .tree_geometry import ROOT, depths, path_to
from .verification import verify_tokens


@dataclass(frozen=True)
class TreeJudgement:
    """What a verifier makes of a tree.

    Attributes:
        paths: per row, the nodes kept, from the context on.
        tokens: per row, their tokens and the one drawn after them; empty for rows that were not asked.
        logits, scores: `[B, E, V]` raw and processed, of the emitted positions.
        p: `[B, E, V]` the law each emitted token follows, where the level above is to test against it; else None.
        chances: per row, by node reached, how likely it was that one of its drawn children is kept.
    """

    paths: list[list[int]]
    tokens: list[list[int]]
    logits: torch.Tensor
    scores: torch.Tensor
    p: torch.Tensor | None
    chances: list[dict[int, float]]


@dataclass(frozen=True)
class Trial:
    """What became of the drawn children of a node, should no chosen one be followed.

    Attributes:
        kept: the child that is followed, None for none.
        instead: the token that follows the node if none is.
        chance: how likely it was, before each was drawn, that one is reached and kept.
    """

    kept: int | None
    instead: int
    chance: float


@dataclass(frozen=True)
class _Children:
    """The children of each node of one row.

    Attributes:
        chosen: by parent, then by token.
        drawn: by parent, in the order they were drawn in: place among the row's drawn nodes, and node.
    """

    chosen: dict[int, dict[int, int]]
    drawn: dict[int, list[tuple[int, int]]]

    @classmethod
    def of(cls, tokens: list[int], parents: list[int], drawn: list[int]) -> _Children:
        """Sorted by parent."""
        found, tried = cls({}, {}), set(drawn)
        for place, node in enumerate(drawn):
            found.drawn.setdefault(parents[node], []).append((place, node))
        for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            if node not in tried:
                found.chosen.setdefault(parent, {})[token] = node
        return found


def judge_tree(
    law: LawMaker, context: Context, tree: TreeProposal, logits: torch.Tensor, active: list[bool]
) -> TreeJudgement:
    """Walk each row's tree.

    Args:
        law: the verifier's law maker; its processors keep no state.
        context: the rows; tree: what was proposed.
        logits: `[B, T + 1, V]`, column 0 after the context, column j + 1 after node j.
        active: rows that emit.
    """
    if isinstance(law, RowLaws):
        return _apart(law, context, tree, logits, active)
    scores = tree_scores(law, context, tree, logits)
    p = law.probabilities(scores) if law.draws else None
    if p is None:
        chosen = law.choose(scores, context, _depths_of_columns(tree, scores.shape[1]), active)
        paths, lasts, chances = _walk(law, tree, p, chosen.tolist(), active)
    else:
        paths, lasts, chances = _drawn_walk(law, tree, p, active)
    tokens = [
        [*(of_row[node] for node in path), last] if alive else []
        for of_row, path, last, alive in zip(tree.tokens, paths, lasts, active, strict=True)
    ]
    for b, (path, row) in enumerate(zip(paths, tokens, strict=True)):
        if row and row[-1] < 0:
            law.refuse(scores[b, path[-1] + 1 if path else 0])
    places = _emitted_columns(paths).to(logits.device)

    rows = torch.arange(len(places), device=places.device)[:, None]

    def pick(values: torch.Tensor) -> torch.Tensor:
        return values[rows, places]  # `gather` would be told the same place for each of V numbers

    said = pick(logits)
    processed = said if scores is logits else pick(scores)
    return TreeJudgement(paths, tokens, said, processed, None if p is None else pick(p), chances)


def _drawn_walk(
    law: LawMaker, tree: TreeProposal, p: torch.Tensor, active: list[bool]
) -> tuple[list[list[int]], list[int], list[dict[int, float]]]:
    """`_walk` with draws, by whoever decides; who is only told has no chances to tell of."""
    chances: list[dict[int, float]] = [{} for _ in active]
    longest = p.shape[1] - 1

    def made() -> torch.Tensor:
        first = law.draw(p.flatten(0, 1)).reshape(p.shape[:2])
        paths, lasts, chances[:] = _walk(law, tree, p, first.tolist(), active)
        rows = zip(paths, lasts, strict=True)
        return torch.tensor([[last, len(path), *path, *[0] * (longest - len(path))] for path, last in rows])

    rows = law.decided(made, (len(active), 2 + longest)).tolist()
    return [row[2 : 2 + row[1]] for row in rows], [row[0] for row in rows], chances


def _walk(
    law: LawMaker, tree: TreeProposal, p: torch.Tensor | None, first: list[list[int]], active: list[bool]
) -> tuple[list[list[int]], list[int], list[dict[int, float]]]:
    """Goes down every row's tree, a node of each at a time: paths, the tokens after them, and `chances`.

    Args:
        law: the verifier's law maker; p: `[B, T + 1, V]`, its laws, None where it chose without drawing.
        tree: what was proposed; active: rows that emit.
        first: per row, the draw after the context, then after each node.
    """
    batch = len(tree.tokens)
    drawn = tree.drawn if p is not None and tree.drawn else [[]] * batch
    children = [_Children.of(*row) for row in zip(tree.tokens, tree.parents, drawn, strict=True)]
    paths: list[list[int]] = [[] for _ in range(batch)]
    lasts, chances = [0] * batch, [dict[int, float]() for _ in range(batch)]
    going = {b: ROOT for b in range(batch) if active[b]}
    while going:
        trials = {}
        if p is not None and any(node in children[b].drawn for b, node in going.items()):
            trials = _try_drawn(law, tree, p, children, {b: n for b, n in going.items() if n in children[b].drawn})
        for b, node in list(going.items()):
            token, trial = first[b][node + 1], trials.get(b)
            following = children[b].chosen.get(node, {}).get(token)
            if trial is not None:
                chances[b][node] = trial.chance
                if following is None:
                    following, token = trial.kept, trial.instead
            if following is None:
                lasts[b] = token
                del going[b]
            else:
                going[b] = following
                paths[b].append(following)
    return paths, lasts, chances


def _try_drawn(
    law: LawMaker, tree: TreeProposal, p: torch.Tensor, children: list[_Children], at: dict[int, int]
) -> dict[int, Trial]:
    """Judges the drawn children of some rows' nodes, as if no chosen one were followed.

    Args:
        law: the verifier's law maker; tree: with drawn nodes; p: `[B, T + 1, V]`, its laws.
        children: per row; at: node of each of R rows, which has drawn children.

    Returns:
        By row.
    """
    assert tree.q is not None, "drawn nodes come with what they were drawn from"
    rows, nodes = list(at), list(at.values())
    rest = p[rows, [node + 1 for node in nodes]]  # [R, V]
    chosen = [(r, token) for r, (b, node) in enumerate(at.items()) for token in children[b].chosen.get(node, {})]
    rest[[r for r, _ in chosen], [token for _, token in chosen]] = 0
    left = rest.sum(-1)
    # Where chosen children have all the weight the trial is never asked for; any law will do.
    rest = torch.where(left[:, None] > 0, rest / left[:, None], 1 / rest.shape[1])
    drawn = [children[b].drawn[node] for b, node in at.items()]
    kept = torch.full((len(rows),), -1, device=p.device)
    chance = torch.zeros_like(left)
    for turn in range(max(map(len, drawn))):
        places = [row[turn][0] if turn < len(row) else 0 for row in drawn]
        tokens = torch.tensor(
            [tree.tokens[b][row[turn][1]] if turn < len(row) else 0 for b, row in zip(rows, drawn, strict=True)]
        ).to(p.device)
        trying = torch.tensor([turn < len(row) for row in drawn]).to(p.device) & (kept < 0)
        q = tree.q[rows, places].to(device=p.device, dtype=p.dtype)  # [R, V]
        chance += torch.where(trying, left * torch.minimum(rest, q).sum(-1), 0.0)
        # The law after an accepted token is never asked for here, so the second place may repeat the first.
        verdict = verify_tokens(
            tokens[:, None], trying.long(), rest[:, None].expand(-1, 2, -1), q[:, None], law.randomness
        )
        kept = torch.where(trying & (verdict.accepted > 0), turn, kept)
        residual = verdict.following / verdict.following.sum(-1, keepdim=True)
        rest = torch.where((trying & (kept < 0))[:, None], residual, rest)
    instead = law.draw(torch.where((kept < 0)[:, None], rest, functional.one_hot(tokens, rest.shape[1]).to(rest.dtype)))
    found = torch.stack([kept.to(p.dtype), instead.to(p.dtype), chance], dim=1).tolist()
    return {
        b: Trial(row[int(turn)][1] if turn >= 0 else None, int(other), probability)
        for b, row, (turn, other, probability) in zip(rows, drawn, found, strict=True)
    }


def _apart(
    law: RowLaws, context: Context, tree: TreeProposal, logits: torch.Tensor, active: list[bool]
) -> TreeJudgement:
    """Each row by its own law maker; rows that failed emit nothing."""

    def of(own: LawMaker, rows: list[int]) -> TreeJudgement:
        offered = tree.select(rows)
        of_rows = picked(logits, rows)[:, : 1 + max(map(len, offered.tokens))]
        return judge_tree(own, context.select(rows), offered, of_rows, [True] * len(rows))

    found = list(law.parts(of, active))
    if len(found) == 1 and len(found[0][0]) == context.batch:
        return found[0][1]
    paths: list[list[int]] = [[] for _ in active]
    tokens: list[list[int]] = [[] for _ in active]
    chances: list[dict[int, float]] = [{} for _ in active]
    for rows, part in found:
        for place, b in enumerate(rows):
            paths[b], tokens[b], chances[b] = part.paths[place], part.tokens[place], part.chances[place]
    kept = found if law.keeps_scores else []
    raw, scores = (
        spread(logits, [(rows, getattr(part, name)) for rows, part in kept]) for name in ("logits", "scores")
    )
    return TreeJudgement(paths, tokens, raw, scores, None, chances)


def record_tree(
    stats: LevelStats, tree: TreeProposal, judgement: TreeJudgement, active: list[bool], eos: Collection[int] = ()
) -> list[Counted]:
    """Count one check of a batch of trees; a tree's depth counts as the number of tokens drafted.

    The acceptance rate that the laws imply at a node reached is the chance that the tree goes on: the law's weight
    on the chosen children, and the chance that one of the drawn is kept. Nodes without children are not judged.

    Returns:
        Per row, what was counted: nothing behind one of the ids `eos`, which end a text.
    """
    levels = [max(depths(parents), default=0) for parents in tree.parents]
    rows = zip(levels, judgement.paths, judgement.tokens, strict=True)
    counted = [Counted.of(deep, len(path), emitted, eos) for deep, path, emitted in rows]
    places: list[tuple[int, int, int]] = []  # row, position of the node on the path, id of a chosen child
    reached, kept, tried = 0, 0, 0.0
    for b, (tokens, parents, path, alive) in enumerate(
        zip(tree.tokens, tree.parents, judgement.paths, active, strict=True)
    ):
        if not alive:
            continue
        stats.record_round(counted[b].drafted, counted[b].accepted, counted[b].drawn)
        path = path[: counted[b].accepted]
        asked = [ROOT, *path] if counted[b].drawn else [ROOT, *path[:-1]]  # nothing was to follow the end of the text
        position_of = {node: i for i, node in enumerate(asked)}
        reached += len(position_of.keys() & set(parents))
        drawn = set(tree.drawn[b]) if judgement.p is not None and tree.drawn else set()
        for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            if parent in position_of and node not in drawn:
                places.append((b, position_of[parent], token))
        tried += sum(chance for node, chance in judgement.chances[b].items() if node in position_of)
        kept += len(path)
    if reached and judgement.p is None:
        stats.record_overlap(torch.tensor(float(kept)), reached)
    elif reached and judgement.p is not None:
        at = torch.tensor(places, dtype=torch.long, device=judgement.p.device).view(-1, 3)
        stats.record_overlap(judgement.p[at[:, 0], at[:, 1], at[:, 2]].sum() + tried, reached)
    return counted


def tree_scores(law: LawMaker, context: Context, tree: TreeProposal, logits: torch.Tensor) -> torch.Tensor:
    """Processed scores `[B, T + 1, V]`; processors that look at ids see each node's own path."""
    nothing: list[list[int]] = [[] for _ in tree.tokens]
    if not law.bound_to_rows:
        return law.scores(context, nothing, logits)
    columns = []
    for column in range(logits.shape[1]):
        paths = [
            [tokens[node] for node in path_to(column - 1, parents)] if column <= len(tokens) else []
            for tokens, parents in zip(tree.tokens, tree.parents, strict=True)
        ]
        columns.append(law.scores(context.extended(paths), nothing, logits[:, column : column + 1]))
    return torch.cat(columns, dim=1)


def _depths_of_columns(tree: TreeProposal, width: int) -> list[list[int]]:
    """Per row, how many tokens after the context each column of the laws lies; 0 for columns of no node."""
    return [[*([0, *depths(parents)]), *([0] * (width - 1 - len(parents)))] for parents in tree.parents]


def _emitted_columns(paths: list[list[int]]) -> torch.Tensor:
    """`[B, E]`: the columns of the laws that the emitted tokens follow, shorter rows filled with their last."""
    width = 1 + max(len(path) for path in paths)
    rows = [[0, *(node + 1 for node in path)] for path in paths]
    return torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows])
