# SPDX-License-Identifier: Apache-2.0
"""Where the chances of one call come from: the caller's generator, or seeds of the call's own."""

from __future__ import annotations

import torch

from ..exactness.callers_generator import CallersGenerator
from ..exactness.noise import SharedNoise, is_race
from ..exactness.randomness import Randomness, TorchRandomness
from .options import PolySpecOptions

DISTURBED = (
    "something that this call ran drew from torch's default generator (a processor, dropout): the text follows the "
    "target's law, and is not the one that plain generate() writes under polyspec_seed"
)
NO_RACE = (
    "torch.multinomial on {device} is not the exponential race that it is elsewhere: the text follows the target's "
    "law, and is not the one that plain generate() writes under this seed"
)


class Chances:
    """What a sampled call draws with; `finish` must be called.

    Args:
        options: the caller's; device: of the laws.
        rows: B; width: V, columns of the target's scores.

    Attributes:
        noise: for `LawMaker`, None where levels draw by themselves.
        randomness: for `LawMaker`.
        lost: why the text is not plain generate()'s own under the seed, in a sentence; None while it is, and where
            nobody promised it.
        holds: whether it is; None where nobody promised it.
    """

    def __init__(self, options: PolySpecOptions, device: torch.device, rows: int, width: int) -> None:
        self.noise: SharedNoise | None = None
        self._callers: CallersGenerator | None = None
        self._values = rows * width
        seed = options.polyspec_seed
        if not options.couples:
            own = None if seed is None else torch.Generator(device).manual_seed(seed)  # type: ignore[arg-type]
            self.randomness: Randomness = TorchRandomness(own)
            return
        if seed is None:
            self._callers = CallersGenerator(device)
            generators = [self._callers.private]
        else:
            seeds = [seed] if isinstance(seed, int) else seed
            generators = [torch.Generator(device).manual_seed(one) for one in seeds]
        self.noise = SharedNoise(generators, rows, width, self._callers)
        self.randomness = TorchRandomness(self.noise.loose)

    @property
    def lost(self) -> str | None:
        if self.noise is None:
            return None
        device = self.noise.loose.device
        if not is_race(device):
            return NO_RACE.format(device=device)
        if self._callers is not None:
            return self._callers.lost
        return DISTURBED if self.noise.disturbed else None

    @property
    def holds(self) -> bool | None:
        return None if self.noise is None else self.lost is None

    def finish(self) -> None:
        """The call is over, or has failed: the default generator goes where plain generate() would have left it."""
        if self.noise is not None and self._callers is not None:
            state = self.noise.streams[0].state_before(self.noise.step)
            self._callers.finish(state, self.noise.step * self._values)


def check_seeds(options: PolySpecOptions, rows: int) -> None:
    """Refuse a list of seeds that is not one for each row.

    Raises:
        ValueError: in one sentence.
    """
    seed = options.polyspec_seed
    if isinstance(seed, (list, tuple)) and len(seed) != rows:
        raise ValueError(f"polyspec_seed has {len(seed)} seeds, and this batch has {rows} row(s); give one for each.")
