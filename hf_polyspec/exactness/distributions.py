# SPDX-License-Identifier: Apache-2.0
"""From a model's logits to the law it is asked to follow: logits processors, in order, then softmax.

transformers runs its processors once a token on `[B, V]`. A verifier has K + 1 positions of a batch at once, in rows
that may have different lengths. Three kinds of processors are told apart, by exact type:

* pointwise ones look at the scores alone (temperature, top-k, top-p ...): run on all positions in one call;
* prefix ones look at the ids before the position too, but keep no state (repetition penalty, minimum length ...): run
  once per distinct prefix length, always with all rows in their places, because some of them are tied to rows;
* all others, a caller's own among them, may keep state (grammars): position i is run only after the token at i - 1 is
  final, with exactly the calls plain generation would make (law 3).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext

import torch
from transformers import LogitsProcessor

from .context import Context
from .forks import AllowedTokens, Lent, duplicate
from .id_rows import IdRows
from .kinds import FUNCTIONS, POINTWISE, PREFIX, SCORES_ALONE, STATELESS
from .largest import largest
from .noise import Noise
from .randomness import Deciding, Randomness, TorchRandomness, decided_here


class LawMaker:
    """Turns raw logits into the distribution a level draws from, and draws from it.

    Args:
        processors: in the order plain generation runs them.
        do_sample: False means the zero-temperature limit, the argmax of the processed scores.
        device: where the laws of this chain live.
        randomness: source of all draws; torch's global generator by default.
        noise: what plain generation draws with, step by step. With it every level picks what wins the race under its
            own law, and nothing that is proposed has to carry a law. None for draws of each level's own.
        ends: ids that end a text: nothing is asked about what stands behind one that was proposed.
        decided: who takes the decisions that levels draw for; this process, unless several run these rows in step.

    Attributes:
        left_out: names of processors that levels below go without, and why; shared with all of them.
    """

    def __init__(
        self,
        processors: Sequence[LogitsProcessor],
        do_sample: bool,
        device: torch.device,
        randomness: Randomness | None = None,
        noise: Noise | None = None,
        ends: Collection[int] = (),
        decided: Deciding = decided_here,
    ) -> None:
        self.processors = list(processors)
        self.do_sample = do_sample
        self.device = device
        self.noise = noise if do_sample else None
        self.randomness = randomness or TorchRandomness()
        self.ends = ends
        self.decided = decided
        self.left_out: dict[str, str] = {}
        self._parent: LawMaker | None = None
        self._lent: list[Lent] = []
        self._texts = IdRows()
        self.in_order = any(type(p) not in STATELESS for p in self.processors)
        first_pointwise = len(self.processors)
        while first_pointwise and type(self.processors[first_pointwise - 1]) in POINTWISE:
            first_pointwise -= 1
        self._prefix = self.processors[:first_pointwise]
        self._pointwise = self.processors[first_pointwise:]

    @property
    def draws(self) -> bool:
        """Whether levels draw by themselves, and hand up what they drew from (law 1)."""
        return self.do_sample and self.noise is None

    def samples(self, batch: int) -> list[bool]:
        """Per row, whether its text is drawn."""
        return [self.do_sample] * batch

    @property
    def picks_likeliest(self) -> bool:
        """Whether every row's text is what raw logits hold likeliest."""
        return not (self.do_sample or self.processors)

    @property
    def asks_nobody(self) -> bool:
        """Whether no code of the caller's runs where a text is judged: all processors are transformers' own."""
        return all(type(p) in POINTWISE | PREFIX for p in self.processors)

    @property
    def takes_trees(self) -> bool:
        """Whether several continuations can be judged at once: not where processors keep state."""
        return not self.in_order

    @property
    def bound_to_rows(self) -> bool:
        """True when a processor may be tied to a row's place in the batch, so that rows must not be dropped."""
        return bool(self._prefix)

    def scores(self, context: Context, drafts: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        """Processed scores of every position, for processors without state.

        Args:
            context: the rows; drafts: proposed tokens per row; logits: `[B, K + 1, V]`, row i after i draft tokens.

        Returns:
            `[B, K + 1, V]`, a new tensor unless there is nothing to process.
        """
        if self._prefix:
            logits = self._run_prefix(context, drafts, logits.clone())
        if self._pointwise:
            batch, width, vocabulary = logits.shape
            flat = logits.reshape(batch * width, vocabulary)
            empty = torch.empty(batch * width, 0, dtype=torch.long, device=logits.device)
            for processor in self._pointwise:
                flat = processor(empty, flat)
            logits = flat.reshape(batch, width, vocabulary)
        return logits

    def scores_at(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Processed scores of one position of all rows, as plain generation computes them.

        Args:
            ids: `[B, L]`, everything before the position; logits: `[B, V]`.
        """
        self.settle()
        if self._parent is not None:
            self._take_over()
        scores = logits.clone()
        with nullcontext() if self.noise is None else self.noise.watched():
            for processor in self.processors:
                scores = processor(ids, scores)
        return scores

    def next_scores(self, context: Context, logits: torch.Tensor, active: Sequence[bool] | None = None) -> torch.Tensor:
        """Processed scores of the next position of all rows, `[B, V]`, whatever the processors keep.

        Args:
            context: the rows; logits: `[B, V]`; active: rows that matter, None for all.
        """
        if self.in_order:
            ids = torch.tensor([context.visible(b) for b in range(context.batch)], device=logits.device)
            return self.scores_at(ids, logits)
        nothing: list[list[int]] = [[] for _ in range(context.batch)]
        return self.scores(context, nothing, logits[:, None])[:, 0]

    def proposal_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores of some ids after the processors that look at scores alone, for what is only proposed.

        A proposal may follow any law; one that leaves out processors that look at ids is accepted less often.

        Args:
            scores: `[B, n, N]`.
        """
        flat = scores.flatten(0, 1)
        empty = torch.empty(len(flat), 0, dtype=torch.long, device=flat.device)
        for processor in self.processors:
            if type(processor) in SCORES_ALONE:
                flat = processor(empty, flat)
        return flat.view_as(scores)

    def tempered(self, scores: torch.Tensor, temperature: float) -> torch.Tensor:
        """Scores `[B, ..., V]` of a drafter with a temperature of its own, which is for rows whose text is drawn."""
        return scores / temperature if self.do_sample else scores

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """The law itself: softmax over the last dimension."""
        return scores.softmax(dim=-1)

    def choose(
        self,
        scores: torch.Tensor,
        context: Context,
        ahead: Sequence[Sequence[int]],
        active: Sequence[bool] | None = None,
    ) -> torch.Tensor:
        """What a level says at some positions, where it does not draw by itself: the likeliest id, which is the
        zero-temperature limit, or the one that wins plain generation's race at that step.

        Args:
            scores: `[B, N, V]`, processed.
            context: the rows; ahead: per row, how many tokens beyond it each of its N positions lies.
            active: rows that matter; None for all.

        Returns:
            `[B, N]`; -1 for a law that cannot be drawn from.
        """
        return self.choose_with_lead(scores, context, ahead, active, leads=False)[0]

    def choose_with_lead(
        self,
        scores: torch.Tensor,
        context: Context,
        ahead: Sequence[Sequence[int]],
        active: Sequence[bool] | None = None,
        *,
        leads: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`choose`, and how far each choice is ahead of what comes second: a model that says nearly the same of every
        id, as a copy in fewer bits does, is likely to choose alike where that is much.

        Args:
            scores, context, ahead, active: as for `choose`; leads: whether to look.

        Returns:
            The choices `[B, N]`, and their leads `[B, N]` in logits: differences of scores, to which a race adds noise
            (the logarithm of exponential noise is Gumbel's); None if nobody asked.
        """
        if self.noise is None:
            return largest(scores), _lead(scores) if leads else None
        race = self.race(self.probabilities(scores.to(self.noise.dtype)), context, ahead, active)
        best = race.max(-1)
        return torch.where(best.values.isnan(), -1, best.indices), _lead(race, logs=False) if leads else None

    def refuse(self, scores: torch.Tensor) -> None:
        """Raise what plain generation raises where it is to draw from such scores.

        Args:
            scores: `[V]`, for which `choose` said -1.

        Raises:
            RuntimeError: torch's own.
        """
        torch.multinomial(self.probabilities(scores), 1, generator=torch.Generator(scores.device))
        raise RuntimeError("the target's law at a position is no distribution.")

    def race(
        self,
        weights: torch.Tensor,
        context: Context,
        ahead: Sequence[Sequence[int]],
        active: Sequence[bool] | None = None,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """How early each id arrives in plain generation's race, the largest first: weight by noise, `[B, N, V]`.

        Args:
            weights: `[B, N, V]`, in the noise's type; they are overwritten, being large.
            context, active: as for `choose`.
            ahead: as for `choose`, or one number a row for all of its positions.
            ids: `[V]`, what the columns stand for, where they are not all ids.
        """
        assert self.noise is not None, "there is no race where levels draw by themselves"
        starts = context.steps()
        alive = [True] * len(starts) if active is None else active
        # what rows that do not matter are given must not be past, and not be drawn ahead of time
        nothing = [min((start for start, one in zip(starts, alive, strict=True) if one), default=max(starts))]
        steps = [
            [start + further for further in more] if one else nothing * len(more)
            for start, more, one in zip(starts, ahead, alive, strict=True)
        ]
        for row, noise in zip(weights, self.noise.at(context.places, steps), strict=True):
            for place, values in enumerate(noise):
                of_place = row if len(noise) == 1 else row[place]
                of_place.div_(values[: weights.shape[-1]] if ids is None else values[ids])
        return weights

    def draw(self, weights: torch.Tensor, active: Sequence[bool] | None = None) -> torch.Tensor:
        """One token a row from `[B, V]` weights, with chances of this level's own; only some rows may matter."""
        return self.decided(lambda: self.randomness.categorical(weights), (len(weights),)).to(weights.device)

    def draw_distinct(
        self, weights: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, nodes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Different ids for each row, one after another, each from what those before it leave.

        Args:
            weights: `[R, N]` over the ids `[N]`; a row leaves some weight to each of its draws.
            counts: `[R]`, draws of each row; nodes: `[R]`, whose children they are, for makers that follow a path.

        Returns:
            Ids `[R, K]` and the laws `[R, K, N]` they were drawn from, with K the largest count, at least 1; entries
            at or beyond a row's count mean nothing.
        """
        certain = torch.zeros_like(weights)
        certain[:, 0] = 1  # where nothing is drawn: a law that costs no chance
        tokens, laws = [], []
        for place in range(max(1, int(counts.max()))):
            weights = torch.where((counts > place)[:, None], weights / weights.sum(-1, keepdim=True), certain)
            column = self.draw(weights)
            tokens.append(ids[column])
            laws.append(weights)
            weights = weights.scatter(-1, column[:, None], 0.0)
        return torch.stack(tokens, dim=1), torch.stack(laws, dim=1)

    def fork(self, batch: int) -> LawMaker:
        """The law maker of the level below: independent of this one from here on.

        Stateless processors are shared. Those with state are got for it as they stand, in the cheapest way that each
        allows (`forks`), and not before they are asked: most drafters ask none. Where that cannot be done - a batch,
        whose rows run apart below the target, or a processor that runs a model of its own - the level below goes
        without them: its proposals are then accepted less often (`left_out` says so), and remain exact.
        """
        if not self.in_order:
            return self
        if batch == 1:
            found = self._with(self.processors)
            found._parent = self
        else:
            kept = [AllowedTokens(p) if type(p) in FUNCTIONS else p for p in self.processors]
            for processor in kept:
                if type(processor) not in STATELESS:
                    self.left_out[_name(processor)] = "rows of a batch run apart"
            kept = [p for p in kept if type(p) in STATELESS]
            found = self._with(kept)
        found.left_out = self.left_out
        return found

    def _with(self, processors: Sequence[LogitsProcessor]) -> LawMaker:
        """One with other processors."""
        chances = self.randomness, self.noise
        return LawMaker(processors, self.do_sample, self.device, *chances, self.ends, self.decided)

    def tell_left_out(self) -> list[str]:
        """Which processors levels below went without, in a sentence each."""
        return [
            f"levels below draft without {name}, so that less of it is accepted: {reason} "
            "(docs/troubleshooting.md, Structured output)"
            for name, reason in self.left_out.items()
        ]

    def _take_over(self) -> None:
        """Get processors of one's own from the law maker above, which has not asked its own since the fork."""
        above, place = [], self._parent
        while place is not None:  # one that has none of its own yet stands for those above it
            above.append(place)
            place = place._parent
        self._parent = None
        kept: list[LogitsProcessor] = []
        for processor in self.processors:
            name = _name(processor)
            if type(processor) in STATELESS or type(processor) in FUNCTIONS:
                kept.append(processor)
            elif name not in self.left_out:
                own, lent, reason = duplicate(processor)
                if own is None:
                    self.left_out[name] = reason
                else:
                    kept.append(own)
                for one in above:
                    one._lent += lent
        self.processors = kept

    def settle(self) -> None:
        """The level below is done: matchers that were lent to it stand again where they stood."""
        for lent in self._lent:
            lent.give_back()
        self._lent.clear()

    def _run_prefix(self, context: Context, drafts: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        rows = [context.visible(b) + drafts[b] for b in range(context.batch)]
        lengths = [len(context.visible(b)) for b in range(context.batch)]
        # length of the prefix -> the (row, position) pairs that have it; a row appears at most once per length
        groups: dict[int, list[tuple[int, int]]] = {}
        for b, start in enumerate(lengths):
            for i in range(len(drafts[b]) + 1):
                groups.setdefault(start + i, []).append((b, i))
        whole = self._texts.of(rows, logits.device)
        for length, members in sorted(groups.items()):  # a function may know a text only from its beginning
            # Its own, since a function may keep what it is given; what is behind the end of a row nobody looks at.
            ids = whole[:, :length].clone()
            scores = torch.zeros(len(rows), logits.shape[2], dtype=logits.dtype, device=logits.device)
            for b, i in members:
                scores[b] = logits[b, i]
            asked = [b for b, i in members if i == 0 or drafts[b][i - 1] not in self.ends]
            for processor in self._prefix:
                if isinstance(processor, AllowedTokens):
                    scores = processor.of_rows(ids, scores, asked)
                else:
                    scores = processor(ids, scores)
            for b, i in members:
                logits[b, i] = scores[b]
        return logits


def _lead(values: torch.Tensor, *, logs: bool = True) -> torch.Tensor:
    """By how much the largest of `[..., V]` is ahead of the second, `[...]`; of weights, by their logarithms."""
    first, second = values.topk(min(2, values.shape[-1]), -1).values.float()[..., [0, -1]].unbind(-1)
    return (first - second if logs else first.log() - second.log()).nan_to_num(0.0)


def _name(processor: LogitsProcessor) -> str:
    return f"{type(processor).__module__}.{type(processor).__qualname__}"
