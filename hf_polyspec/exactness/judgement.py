# SPDX-License-Identifier: Apache-2.0
"""From one forward pass to what a verifier emits: three ways of asking the same question.

Where levels share plain generation's noise, and in the greedy limit, which is the same without noise, a verifier's own
choices are compared with what was proposed, on the host. Where they draw by themselves, all positions are judged at
once on the device. Processors that keep state are judged position by position. Each makes one host synchronisation (the
last: one a position, it cannot know less).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from ..telemetry.counters import Counted, LevelStats
from .context import Context
from .distributions import LawMaker
from .passes import Picks
from .proposal import Proposal
from .row_laws import RowLaws, picked
from .row_tensors import RowTensors
from .verification import Verdict, overlap, verify_block, verify_tokens

Going = Callable[[list[int], torch.Tensor], list[bool]]
"""Told the next token of every row and the scores `[B, V]` it was picked by: which rows go on behind it."""


@dataclass(frozen=True)
class Judgement:
    """What a verifier makes of a proposal.

    Attributes:
        accepted: per row, leading proposal tokens kept.
        tokens: per row, the accepted tokens and the one drawn after them.
        scores: `[B, E, V]` processed scores of the emitted positions, as `RowTensors` where rows differ in length.
        p: `[B, E, V]` the law each emitted token follows, where the level above is to test against it; else None.
        bias: per row, the total variation introduced by a bias budget, summed over the positions judged; empty without.
        leads: per row, how far each token was ahead of the second (`LawMaker.choose_with_lead`), where somebody asked
            and choices are compared; else empty.
    """

    accepted: list[int]
    tokens: list[list[int]]
    scores: torch.Tensor | RowTensors
    p: torch.Tensor | None
    bias: list[float] = field(default_factory=list)
    leads: list[list[float]] = field(default_factory=list)


def judge(
    law: LawMaker,
    context: Context,
    proposal: Proposal,
    logits: torch.Tensor | RowTensors,
    active: list[bool],
    rule: str,
    pad: int,
    bias_budget: float = 0.0,
    going: Going | None = None,
    *,
    leads: bool = False,
) -> Judgement:
    """Decide what to keep of a proposal and draw the token after it.

    Args:
        law: the verifier's law maker; context: the rows; proposal: tokens and the law they were drawn from.
        logits: `[B, K + 1, V]` of the verifier.
        active: rows that emit; the others emit nothing.
        rule: "token" or "block" where levels draw by themselves, or "auto": block verification where it can help.
        pad: the id that rows which no longer emit are continued with, where all rows must keep one length.
        bias_budget: 0 to 1, see `verification.verify_tokens`; above 0 rules out block verification.
        going: where processors keep state, asked after each position which rows go on; None: those without one of the
            law's `ends`.
        leads: whether to look how far each choice was ahead, where it can be told.
    """
    if isinstance(law, RowLaws):
        return _apart(law, context, proposal, logits, active, rule, pad, bias_budget, leads)
    if isinstance(logits, RowTensors):
        if not (law.in_order or law.draws or law.bound_to_rows) and len(set(logits.sizes)) > 1:
            return _by_column(law, context, proposal, logits, active)
        logits = logits.rectangle()
    if law.in_order:
        return _in_order(law, context, proposal, logits, active, pad, bias_budget, going)
    scores = law.scores(context, proposal.tokens, logits)
    if law.draws:
        return _sampled(law, proposal, scores, active, rule, bias_budget)
    return _compared(law, context, proposal, scores, active, leads)


def _apart(
    law: RowLaws,
    context: Context,
    proposal: Proposal,
    logits: torch.Tensor | RowTensors,
    active: list[bool],
    rule: str,
    pad: int,
    bias_budget: float,
    leads: bool,
) -> Judgement:
    """Each row by its own law maker; rows that failed emit nothing."""

    def of(own: LawMaker, rows: list[int]) -> Judgement:
        offered = proposal.select(rows)
        of_rows = picked(logits, rows)
        of_rows = of_rows if isinstance(of_rows, RowTensors) else of_rows[:, : offered.width + 1]
        going = law.going.get(law.places[rows[0]])
        alive = [True] * len(rows)
        return judge(own, context.select(rows), offered, of_rows, alive, rule, pad, bias_budget, going, leads=leads)

    found = list(law.parts(of, active))
    if len(found) == 1 and len(found[0][0]) == context.batch:
        return found[0][1]
    accepted, bias = [0] * context.batch, [0.0] * context.batch
    tokens: list[list[int]] = [[] for _ in active]
    for rows, part in found:
        for place, b in enumerate(rows):
            accepted[b], tokens[b] = part.accepted[place], part.tokens[place]
            bias[b] = part.bias[place] if part.bias else 0.0
    scores = _scores_of(context.batch, found) if law.keeps_scores else torch.empty(context.batch, 0, 0)
    laws = [(rows, part.p) for rows, part in found if part.p is not None]
    p = spread(logits, laws) if laws else None
    return Judgement(accepted, tokens, scores, p, bias if any(part.bias for _, part in found) else [])


def _scores_of(batch: int, found: Sequence[tuple[list[int], Judgement]]) -> RowTensors:
    """The scores of parts, row by row."""
    rows = [torch.empty(0, 0)] * batch
    for places, part in found:
        of_rows = part.scores.rows if isinstance(part.scores, RowTensors) else part.scores
        for b, scores in zip(places, of_rows, strict=True):
            rows[b] = scores
    return RowTensors(rows, next((row.device for row in rows if row.numel()), torch.device("cpu")))


def spread(like: torch.Tensor | RowTensors, parts: Sequence[tuple[list[int], torch.Tensor]]) -> torch.Tensor:
    """`[B, E, V]` of parts `[R, E', V]` that belong to some of the B rows of `like` each; zeros elsewhere, E is 0
    without parts."""
    if not parts:
        return torch.zeros(len(like), 0, 0)
    width = max(values.shape[1] for _, values in parts)
    whole = parts[0][1].new_zeros(len(like), width, parts[0][1].shape[2])
    for rows, values in parts:
        whole[rows, : values.shape[1]] = values.to(whole.dtype)
    return whole


def _by_column(
    law: LawMaker, context: Context, proposal: Proposal, logits: RowTensors, active: list[bool]
) -> Judgement:
    """As `_compared`; every position is a row of its own, so that none is looked at which no row has."""
    sizes = [size if alive else 0 for size, alive in zip(logits.sizes, active, strict=True)]
    # Of rows that have ended nothing is asked, their noise least of all.
    alive = [b for b, size in enumerate(sizes) if size]
    alone = context.select([b for b in alive for _ in range(sizes[b])])
    ahead = [[place] for b in alive for place in range(sizes[b])]
    scores = law.scores(alone, [[] for _ in ahead], logits.columns(alive)[:, None])  # [M, 1, V]
    choices = law.choose(scores, alone, ahead)[:, 0].tolist()
    places = list(zip(accumulate(sizes, initial=0), sizes, strict=False))
    kept = RowTensors.of(scores[:, 0], places, logits.device)
    return _alike(law, proposal, [choices[first : first + size] for first, size in places], kept, active)


def _compared(
    law: LawMaker,
    context: Context,
    proposal: Proposal,
    scores: torch.Tensor,
    active: list[bool],
    leads: bool = False,
) -> Judgement:
    """Keeps what equals the verifier's own choices."""
    width = scores.shape[1]
    ahead = [[min(i, len(row)) for i in range(width)] for row in proposal.tokens]
    chosen, lead = law.choose_with_lead(scores, context, ahead, active, leads=leads)
    if lead is None:
        return _alike(law, proposal, chosen.tolist(), scores, active)
    both = torch.stack([chosen.double(), lead.double()]).tolist()  # one synchronisation; ids are exact below 2**53
    found = _alike(law, proposal, [list(map(int, row)) for row in both[0]], scores, active)
    return replace(found, leads=[row[: len(own)] for row, own in zip(both[1], found.tokens, strict=True)])


NOTHING = torch.empty(1, 0, 0)
"""Scores of a row where nobody asks for them."""


def compare(law: LawMaker, proposal: Proposal, picks: Picks, active: list[bool]) -> Judgement:
    """As `judge` for rows whose text is what is likeliest, from a pass that said no more."""
    found = _alike(law, proposal, picks.tokens, NOTHING, active)
    return replace(found, leads=[row[: len(own)] for row, own in zip(picks.leads, found.tokens, strict=True)])


def _alike(
    law: LawMaker,
    proposal: Proposal,
    choices: Sequence[list[int]],
    scores: torch.Tensor | RowTensors,
    active: list[bool],
) -> Judgement:
    """What was proposed as far as it is what a verifier says at each position of each row, and its next word."""
    accepted, tokens = [], []
    for b, (drafted, chosen, alive) in enumerate(zip(proposal.tokens, choices, active, strict=True)):
        kept = 0
        while alive and kept < len(drafted) and drafted[kept] == chosen[kept]:
            kept += 1
        if alive and chosen[kept] < 0:
            law.refuse(scores[b, kept])
        accepted.append(kept if alive else 0)
        tokens.append(chosen[: kept + 1] if alive else [])
    return Judgement(accepted, tokens, scores, None)


def _sampled(
    law: LawMaker, proposal: Proposal, scores: torch.Tensor, active: list[bool], rule: str, bias_budget: float
) -> Judgement:
    p = law.probabilities(scores)  # [B, K + 1, V]
    decided = _decided(law, proposal, p, rule, bias_budget)
    accepted, tokens = [], []
    for drafted, (kept, token), alive in zip(proposal.tokens, decided, active, strict=True):
        accepted.append(kept if alive else 0)
        tokens.append([*drafted[:kept], token] if alive else [])
    reached = [min(len(emitted), len(drafted)) for emitted, drafted in zip(tokens, proposal.tokens, strict=True)]
    return Judgement(accepted, tokens, scores, p, _introduced(proposal, p, reached, bias_budget))


def _decided(law: LawMaker, proposal: Proposal, p: torch.Tensor, rule: str, bias_budget: float) -> list[list[int]]:
    """Per row, how many proposed tokens are kept and the one drawn after them."""

    def made() -> torch.Tensor:
        verdict = _verdict(law, proposal, p, rule, bias_budget)
        return torch.stack([verdict.accepted, law.draw(verdict.following)], dim=1)

    found: list[list[int]] = law.decided(made, (len(p), 2)).tolist()
    return found


def _introduced(proposal: Proposal, p: torch.Tensor, reached: list[int], bias_budget: float) -> list[float]:
    """Per row, the sum of lambda TV(p, q) over its first `reached` positions: the law that a judged token really
    follows is that far from p (Yin et al. 2024, arXiv 2411.00841, theorem 5)."""
    if not bias_budget:
        return []
    width = max(reached)
    if not width:
        return [0.0] * len(reached)
    tokens, _ = as_tensors(proposal, p.device)
    q = None if proposal.q is None else proposal.q[:, :width].to(p)
    distance = 1 - overlap(p[:, :width], q, tokens[:, :width])  # [B, K']
    inside = torch.arange(width, device=p.device) < torch.tensor(reached, device=p.device)[:, None]
    return [float(total) for total in (bias_budget * (distance * inside).clamp(min=0).sum(1)).tolist()]


def _verdict(law: LawMaker, proposal: Proposal, p: torch.Tensor, rule: str, bias_budget: float = 0.0) -> Verdict:
    tokens, lengths = as_tensors(proposal, p.device)
    if proposal.width == 0:
        return Verdict(lengths, p[:, 0])
    q = None if proposal.q is None else proposal.q.to(device=p.device, dtype=p.dtype)
    # With a one-hot q, or one token, block verification is token verification (Sun et al. 2024).
    if q is not None and not bias_budget and rule != "token" and (proposal.width > 1 or rule == "block"):
        return verify_block(tokens, lengths, p, q, law.randomness)
    return verify_tokens(tokens, lengths, p, q, law.randomness, bias_budget)


def _in_order(
    law: LawMaker,
    context: Context,
    proposal: Proposal,
    logits: torch.Tensor,
    active: list[bool],
    pad: int,
    bias_budget: float,
    going: Going | None,
) -> Judgement:
    """Position i is processed after i - 1 is final, all rows in step, stopping at the first position that any row
    does not take from its proposal, and where all have ended. The processors see exactly the calls of plain
    generation: none behind the end of a text, and what rows that have ended are continued with beside others."""
    views = [context.visible(b) for b in range(context.batch)]
    emitted: list[list[int]] = [[] for _ in views]
    lengths, alive = [0] * len(views), list(active)  # of what counts of each row; whether it goes on
    accepted = [0] * len(views)
    all_scores, laws = [], []
    bias = [0.0] * len(views)
    for i in range(proposal.width + 1):
        ids = torch.tensor([v + e for v, e in zip(views, emitted, strict=True)], dtype=torch.long)
        scores = law.scores_at(ids.to(logits.device).reshape(len(views), -1), logits[:, i])
        column = _column(proposal, i)
        kept, chosen, p = _judge_column(law, context, i, column, scores, alive, bias_budget)
        all_scores.append(scores)
        laws.append(p)
        if p is not None and bias_budget:
            judged = [int(bool(token) and on) for token, on in zip(column.tokens, alive, strict=True)]
            bias = [a + b for a, b in zip(bias, _introduced(column, p[:, None], judged, bias_budget), strict=True)]
        step = [token if on else pad for token, on in zip(chosen, alive, strict=True)]
        taken = [k for k, on in zip(kept, alive, strict=True) if on]
        for b, on in enumerate(alive):
            emitted[b].append(step[b])
            lengths[b] += on
            accepted[b] += kept[b] if on else 0
        more = [token not in law.ends for token in step] if going is None else going(step, scores)
        alive = [on and goes for on, goes in zip(alive, more, strict=True)]
        if not all(taken) or not any(alive):
            break
    tokens = [row[:length] for row, length in zip(emitted, lengths, strict=True)]
    stacked = torch.stack([p for p in laws if p is not None], dim=1) if law.draws else None
    return Judgement(accepted, tokens, torch.stack(all_scores, dim=1), stacked, bias if bias_budget else [])


def _judge_column(
    law: LawMaker,
    context: Context,
    i: int,
    column: Proposal,
    scores: torch.Tensor,
    active: list[bool],
    bias_budget: float,
) -> tuple[list[int], list[int], torch.Tensor | None]:
    """Judge position i of every row: (1 if its proposed token is kept, the token emitted, the law if it is needed)."""
    if not law.draws:
        chosen = law.choose(scores[:, None], context, [[i]] * len(active), active)[:, 0].tolist()
        for b, alive in enumerate(active):
            if alive and chosen[b] < 0:
                law.refuse(scores[b])
        kept = [int(bool(d) and d[0] == c) for d, c in zip(column.tokens, chosen, strict=True)]
        return kept, chosen, None
    p = law.probabilities(scores)  # [B, V]
    # The law after an accepted token is never asked for here, so the second row may repeat the first.
    decided = _decided(law, column, p[:, None].expand(-1, column.width + 1, -1), "token", bias_budget)
    kept = [k for k, _ in decided]
    chosen = [d[0] if k else t for d, (k, t) in zip(column.tokens, decided, strict=True)]
    return kept, chosen, p


def _column(proposal: Proposal, i: int) -> Proposal:
    """Position i of a proposal, as a proposal of at most one token."""
    q = None if proposal.q is None or i >= proposal.q.shape[1] else proposal.q[:, i : i + 1]
    return Proposal([row[i : i + 1] for row in proposal.tokens], q, [row[i : i + 1] for row in proposal.origins])


def as_tensors(proposal: Proposal, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Proposed ids `[B, K]`, filled up with 0, and their number per row `[B]`."""
    width = proposal.width
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in proposal.tokens], dtype=torch.long, device=device)
    lengths = torch.tensor([len(row) for row in proposal.tokens], dtype=torch.long, device=device)
    return tokens.reshape(len(proposal.tokens), width), lengths


def record(
    stats: LevelStats, proposal: Proposal, judgement: Judgement, active: list[bool], eos: Collection[int] = ()
) -> list[Counted]:
    """Count one check of a batch, and the acceptance rate the two laws imply at the positions it reached.

    Returns:
        Per row, what was counted: nothing behind one of the ids `eos`, which end a text.
    """
    rows = zip(proposal.tokens, judgement.accepted, judgement.tokens, strict=True)
    counted = [Counted.of(len(drafted), kept, emitted, eos) for drafted, kept, emitted in rows]
    for row, alive in zip(counted, active, strict=True):
        if alive:
            stats.record_round(row.drafted, row.accepted, row.drawn)
    _record_overlap(stats, proposal, judgement, [min(row.emitted, row.drafted) for row in counted])
    return counted


def _record_overlap(stats: LevelStats, proposal: Proposal, judgement: Judgement, reached: list[int]) -> None:
    """The same at the first `reached` positions of each row."""
    if not any(reached):
        return
    if judgement.p is None:
        agreed = sum(min(kept, count) for kept, count in zip(judgement.accepted, reached, strict=True))
        stats.record_overlap(torch.tensor(float(agreed)), sum(reached))
        return
    width = max(reached)
    tokens, _ = as_tensors(proposal, judgement.p.device)
    q = None if proposal.q is None else proposal.q[:, :width].to(judgement.p)
    values = overlap(judgement.p[:, :width], q, tokens[:, :width])  # [B, K']
    limit = torch.tensor(reached, device=values.device)
    inside = torch.arange(width, device=values.device) < limit[:, None]
    stats.record_overlap((values * inside).sum(), sum(reached))
