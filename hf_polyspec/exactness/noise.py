# SPDX-License-Identifier: Apache-2.0
"""The noise that plain generate() samples with, step by step, for all levels of a chain.

`torch.multinomial(p, 1)` is an exponential race: it draws e = empty_like(p).exponential_(1) and returns argmax(p / e).
So the text that plain generate() writes under a seed is a function of e_0, e_1, ..., one `[B, V]` tensor a step, and of
the target's laws. Every level of a chain that picks argmax(its own law / e_t) at step t proposes what the target will
pick as often as laws are alike, and what the target picks is plain generate()'s own text (law 6).

Coupling by shared noise: Daliri, Musco and Suresh 2024 (arXiv 2408.07978); by exponential races: Kobus and Gündüz 2025
(arXiv 2504.15475).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch

from .callers_generator import CallersGenerator, lent_state, read_state

MOST_BYTES = 256 << 20
"""Of the noise of one stream that is kept because some row has yet to come to it; what is beyond is drawn again."""


class Noise(ABC):
    """What a `LawMaker` asks for noise.

    Attributes:
        dtype: laws are compared with noise in this type.
    """

    dtype: torch.dtype = torch.float32

    @abstractmethod
    def at(self, rows: Sequence[int], steps: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        """The noise of some steps of some rows, `[V]` each, not to be written to: what lies there is not copied.

        Args:
            rows: places in the batch as the call began; steps: per row, numbers, 0 for the first new token.
        """

    def lent(self, row: int, step: int) -> AbstractContextManager[None]:
        """While this runs, levels that draw by other means than this noise may draw; see `SharedNoise`."""
        return nullcontext()

    def watched(self) -> AbstractContextManager[None]:
        """While this runs, whatever draws from torch's default generator is noticed; see `SharedNoise`."""
        return nullcontext()


class Stream:
    """The draws of one generator: `[R, V]` exponential values a step, of which any may be asked for again.

    Args:
        generator: stands before step 0; nobody else draws from it.
        rows, width: R and V.
        most_bytes: of the values that are kept; others are drawn again from a kept state of the generator.
    """

    def __init__(self, generator: torch.Generator, rows: int, width: int, most_bytes: int = MOST_BYTES) -> None:
        self.generator = generator
        self.rows = rows
        self.width = width
        self._most = max(1, most_bytes // (4 * rows * width))
        self._states: dict[int, torch.Tensor] = {}  # before the draw of each step that is not past
        self._values: dict[int, torch.Tensor] = {}
        self._drawn = 0

    def at(self, step: int) -> torch.Tensor:
        """`[R, V]`, float32, on the generator's device; not to be written to.

        Raises:
            IndexError: the step is past.
        """
        self._draw_before(step + 1)
        if step in self._values:
            return self._values[step]
        again = torch.Generator(self.generator.device)
        again.set_state(self.state_before(step))
        return self._keep(step, self._draw(again))

    def state_before(self, step: int) -> torch.Tensor:
        """The generator's state after so many draws.

        Raises:
            IndexError: the step is past.
        """
        self._draw_before(step)
        if step == self._drawn:
            return self.generator.get_state()
        if step not in self._states:
            raise IndexError(f"step {step} of the noise is past; {self._drawn} steps were drawn.")
        return self._states[step]

    def pass_by(self, step: int) -> None:
        """Nobody asks for steps before this one any more."""
        for kept in (self._states, self._values):
            for past in [one for one in kept if one < step]:
                del kept[past]

    def start_over(self, generator: torch.Generator) -> None:
        """All steps that are not past are drawn anew, from another generator."""
        first = min(self._states, default=self._drawn)
        self.generator, self._drawn = generator, first
        self._states.clear()
        self._values.clear()

    def _draw_before(self, step: int) -> None:
        while self._drawn < step:
            self._states[self._drawn] = self.generator.get_state()
            self._keep(self._drawn, self._draw(self.generator))
            self._drawn += 1

    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        draw = by_inversion if inverts(generator.device) else by_torch
        return draw(self.rows, self.width, generator)

    def _keep(self, step: int, values: torch.Tensor) -> torch.Tensor:
        while len(self._values) >= self._most:
            del self._values[next(iter(self._values))]
        self._values[step] = values
        return values


class SharedNoise(Noise):
    """The noise of one call.

    Args:
        generators: one for the batch, which then draws as plain generate() draws for all of its rows; or one a row,
            which draws as plain generate() draws for that row alone.
        rows: B; width: V, columns of the target's scores.
        callers: the default generator, where the noise is what it would have drawn; None where it has nothing to do
            with it.

    Attributes:
        loose: a generator for what levels draw by other means than this noise; `lent` has it stand where the noise of
            a step begins.
        step: how many steps are final.
        disturbed: whether something that the call ran drew from the default generator, which is looked for while
            `watched`.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        rows: int,
        width: int,
        callers: CallersGenerator | None = None,
    ) -> None:
        if len(generators) not in (1, rows):
            raise ValueError(f"{rows} rows draw from one generator or from {rows}, got {len(generators)}.")
        one = len(generators) == 1
        most = MOST_BYTES // len(generators)
        self.streams = [Stream(generator, rows if one else 1, width, most) for generator in generators]
        self.callers = callers
        self.loose = torch.Generator(generators[0].device)
        self.loose.set_state(generators[0].get_state())
        self.step = 0
        self.disturbed = False
        self._places = [(0, row) if one else (row, 0) for row in range(rows)]
        self._lending = False

    def at(self, rows: Sequence[int], steps: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        if self.callers is not None and not self._lending and self.callers.was_disturbed():
            self._part()
        found = []
        for row, wanted in zip(rows, steps, strict=True):
            stream, place = self._places[row]
            found.append([self.streams[stream].at(step)[place] for step in wanted])
        return found

    def pass_by(self, step: int) -> None:
        """So many steps are final for all rows."""
        self.step = step
        for stream in self.streams:
            stream.pass_by(step)

    @contextmanager
    def lent(self, row: int, step: int) -> Iterator[None]:
        """While this runs, torch's default generator stands where the noise of a step begins, and so does `loose`.

        A drafter that draws by itself, one token after another with `torch.multinomial`, then draws with the noise of
        the steps it drafts for, if it is asked for one row. Other calls that sample wait for it to be done.
        """
        state = self.streams[self._places[row][0]].state_before(step)
        self.loose.set_state(state)
        with lent_state(self.loose.device, state):
            self._lending = True
            try:
                yield
            finally:
                self._lending = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Notices draws from the default generator where `at` does not: in calls that have nothing to do with it."""
        before = None if self.callers is not None or self.disturbed else read_state(self.loose.device)
        yield
        if before is not None:
            self.disturbed = not torch.equal(before, read_state(self.loose.device))

    def _part(self) -> None:
        """What others draw from the default generator would be what this noise is made of: go on from elsewhere."""
        for stream in self.streams:
            seed = torch.empty((), dtype=torch.int64, device=stream.generator.device)
            apart = torch.Generator(stream.generator.device)
            stream.start_over(apart.manual_seed(int(seed.random_(generator=stream.generator))))


def by_torch(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """`[rows, width]` exponential values, float32: what `torch.multinomial` draws for laws of that shape."""
    empty = torch.empty(rows, width, dtype=torch.float32, device=generator.device)
    return empty.exponential_(1, generator=generator)


def by_inversion(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """The same values, where `inverts` says so, in a third of the time: torch inverts the distribution function of one
    uniform value after another, and this of all at once."""
    uniform = torch.empty(rows, width, dtype=torch.float64, device=generator.device).uniform_(generator=generator)
    return uniform.neg_().log1p_().neg_().to(torch.float32)


@cache
def inverts(device: torch.device) -> bool:
    """Whether the two ways to draw give the same bits on a device and leave the generator in the same state."""
    if device.type != "cpu":
        return False  # accelerators draw all at once themselves, and some have no float64
    ways = (by_torch, by_inversion)
    for seed in range(4):
        generators = [torch.Generator(device).manual_seed(seed) for _ in ways]
        slow, fast = (way(3, 4099, each) for way, each in zip(ways, generators, strict=True))
        if not (torch.equal(slow, fast) and torch.equal(*(each.get_state() for each in generators))):
            return False
    return True


@cache
def is_race(device: torch.device) -> bool:
    """Whether `torch.multinomial` on a device is the exponential race that this noise is made for."""
    generator = torch.Generator(device)
    laws = torch.linspace(0.5, 4.0, 3 * 67, device=device).reshape(3, 67).sin().abs()
    for seed in range(8):
        drawn = torch.multinomial(laws, 1, generator=generator.manual_seed(seed)).squeeze(1)
        after = generator.get_state()
        noise = torch.empty_like(laws).exponential_(1, generator=generator.manual_seed(seed))
        if not (torch.equal(drawn, (laws / noise).argmax(-1)) and torch.equal(after, generator.get_state())):
            return False
    return True
