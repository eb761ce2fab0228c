# SPDX-License-Identifier: Apache-2.0
"""Laws of rows that were each asked for with settings of their own: greedy beside sampled, each with its processors.

Every row keeps the law maker that it would have alone, for a batch of one, and is judged by it alone. So what its
processors are shown, in which order, and which noise it is drawn with is as if nobody ran beside it (law 7). Rows whose
settings come to the same may share a law maker, and are then judged at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TypeVar, overload

import torch

from .callers_generator import lent_state
from .context import Context
from .distributions import LawMaker
from .noise import Noise, SharedNoise
from .row_tensors import RowTensors

Found = TypeVar("Found")

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
"""What no row is to blame for."""


class RowNoise(Noise):
    """The noise of rows that come and go, each with a stream of its own.

    Args:
        device: of the laws.

    Attributes:
        rows: by the name of a row (`Context.places`), its noise, which is of a batch of one; none of greedy rows.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rows: dict[int, SharedNoise] = {}

    def at(self, rows: Sequence[int], steps: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        return [self.rows[row].at([0], [wanted])[0] for row, wanted in zip(rows, steps, strict=True)]

    def lent(self, row: int, step: int) -> AbstractContextManager[None]:
        if row in self.rows:
            return self.rows[row].lent(0, step)
        # Nothing is drawn for a greedy row, and what a drafter draws all the same is not to move the caller's numbers.
        return lent_state(self.device, torch.Generator(self.device).get_state())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Of all rows."""
        with ExitStack() as stack:
            for noise in self.rows.values():
                stack.enter_context(noise.watched())
            yield


class OneRow(Noise):
    """The noise of one row for a law maker of its own, whatever the row is called.

    Args:
        noise: of a batch of one.
    """

    def __init__(self, noise: SharedNoise) -> None:
        self.noise = noise
        self.dtype = noise.dtype

    def at(self, rows: Sequence[int], steps: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        return self.noise.at([0], steps)

    def lent(self, row: int, step: int) -> AbstractContextManager[None]:
        return self.noise.lent(0, step)

    def watched(self) -> AbstractContextManager[None]:
        return self.noise.watched()


class RowLaws(LawMaker):
    """A law maker for a batch whose rows have their own.

    Args:
        laws: of each row; an object that stands here twice serves several rows at once.
        places: what each row is called, see `Context.places`.
        device: where laws live.
        noise: of all rows, None where levels draw by themselves.
        keeps_scores: whether somebody wants the scores of what is emitted.
        failures: see below; those that there are already.

    Attributes:
        failures: by name of a row, what its processors raised: nothing more is to be emitted for it.
        going: by name of a row, what a verifier is to ask after each token (see `judgement.judge`).
    """

    def __init__(
        self,
        laws: Sequence[LawMaker],
        places: Sequence[int],
        device: torch.device,
        noise: Noise | None = None,
        *,
        keeps_scores: bool = False,
        failures: dict[int, Exception] | None = None,
    ) -> None:
        super().__init__([], any(law.do_sample for law in laws), device, None, noise)
        self.laws = list(laws)
        self.places = list(places)
        self.keeps_scores = keeps_scores
        self.failures: dict[int, Exception] = {} if failures is None else failures
        self.going: dict[int, Callable[[list[int], torch.Tensor], list[bool]]] = {}
        rows_of: dict[int, list[int]] = {}
        for row, law in enumerate(self.laws):
            rows_of.setdefault(id(law), []).append(row)
        self.groups = [(self.laws[rows[0]], rows) for rows in rows_of.values()]

    @property
    def draws(self) -> bool:
        return any(law.draws for law in self.laws)

    def samples(self, batch: int) -> list[bool]:
        return [law.do_sample for law in self.laws]

    @property
    def picks_likeliest(self) -> bool:
        return all(law.picks_likeliest for law in self.laws)

    @property
    def asks_nobody(self) -> bool:
        return all(law.asks_nobody for law, _ in self.groups)

    @property
    def takes_trees(self) -> bool:
        return not self.draws and all(law.takes_trees for law in self.laws)

    def parts(
        self, of: Callable[[LawMaker, list[int]], Found], active: Sequence[bool] | None = None
    ) -> Iterator[tuple[list[int], Found]]:
        """What each law maker makes of its rows that are active, as rows and what was made of them; of a row whose
        processors raise, nothing."""
        for law, every in self.groups:
            rows = every if active is None else [b for b in every if active[b]]
            yield from self._guarded(rows, partial(of, law))

    def _guarded(self, rows: list[int], run: Callable[[list[int]], Found]) -> list[tuple[list[int], Found]]:
        """What `run` makes of some rows that share a law maker; of a row whose processors raise, nothing.

        Returns:
            Rows and what was made of them; one entry, unless a row failed among others.
        """
        rows = [row for row in rows if self.places[row] not in self.failures]
        if not rows:
            return []
        try:
            return [(rows, run(rows))]
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            if len(rows) == 1:
                self.failures[self.places[rows[0]]] = error
                return []
        return [found for row in rows for found in self._guarded([row], run)]

    def scores(self, context: Context, drafts: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
        return self._each(
            logits,
            lambda law, rows: law.scores(context.select(rows), [drafts[b] for b in rows], picked(logits, rows)),
        )

    def next_scores(self, context: Context, logits: torch.Tensor, active: Sequence[bool] | None = None) -> torch.Tensor:
        return self._each(logits, lambda law, rows: law.next_scores(context.select(rows), picked(logits, rows)), active)

    def proposal_scores(self, scores: torch.Tensor) -> torch.Tensor:
        return self._each(scores, lambda law, rows: law.proposal_scores(picked(scores, rows)))

    def tempered(self, scores: torch.Tensor, temperature: float) -> torch.Tensor:
        return self._each(scores, lambda law, rows: law.tempered(picked(scores, rows), temperature))

    def choose(
        self,
        scores: torch.Tensor,
        context: Context,
        ahead: Sequence[Sequence[int]],
        active: Sequence[bool] | None = None,
    ) -> torch.Tensor:
        def of(law: LawMaker, rows: list[int]) -> torch.Tensor:
            return law.choose(picked(scores, rows), context.select(rows), [ahead[b] for b in rows])

        nothing = torch.full(scores.shape[:2], -1, dtype=torch.long, device=scores.device)
        return self._each(nothing, of, active)

    def race(
        self,
        weights: torch.Tensor,
        context: Context,
        ahead: Sequence[Sequence[int]],
        active: Sequence[bool] | None = None,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        def of(law: LawMaker, rows: list[int]) -> torch.Tensor:
            own = picked(weights, rows)
            return law.race(own, context.select(rows), [ahead[b] for b in rows], None, ids) if law.noise else own

        return self._each(weights, of, active)

    def draw(self, weights: torch.Tensor, active: Sequence[bool] | None = None) -> torch.Tensor:
        def of(law: LawMaker, rows: list[int]) -> torch.Tensor:
            own = picked(weights, rows)
            return law.draw(own) if law.do_sample else own.argmax(-1)

        return self._each(weights.new_zeros(len(weights), dtype=torch.long), of, active)

    def fork(self, batch: int) -> LawMaker:
        # What fails in a draft is no failure of the text: the row drafts without it, or no more, and is judged as ever.
        forks = [law.fork(1) for law in self.laws]
        return RowLaws(forks, self.places, self.device, self.noise, failures=dict(self.failures))

    def settle(self) -> None:
        for law in self.laws:
            law.settle()

    def _each(
        self,
        rest: torch.Tensor,
        of: Callable[[LawMaker, list[int]], torch.Tensor],
        active: Sequence[bool] | None = None,
    ) -> torch.Tensor:
        """What each law maker makes of its rows, put together; `rest` for rows that are not active or have failed."""
        found: torch.Tensor | None = None
        for rows, values in self.parts(of, active):
            if len(rows) == len(self.laws):
                return values
            found = rest.clone() if found is None else found
            found[rows] = values.to(found.dtype)
        return rest if found is None else found


@overload
def picked(values: torch.Tensor, rows: list[int]) -> torch.Tensor: ...


@overload
def picked(values: torch.Tensor | RowTensors, rows: list[int]) -> torch.Tensor | RowTensors: ...


def picked(values: torch.Tensor | RowTensors, rows: list[int]) -> torch.Tensor | RowTensors:
    """Some rows of a tensor, without copying where all or one of them are asked for."""
    if len(rows) == len(values):
        return values
    if isinstance(values, RowTensors):
        return values.select(rows)
    return values[rows[0] : rows[0] + 1] if len(rows) == 1 else values[rows]
