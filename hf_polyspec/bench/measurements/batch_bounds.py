# SPDX-License-Identifier: Apache-2.0
"""What batches have to bring: the bounds that `polyspec measure batches` looks at."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

NEVER_SLOWER = 0.97
AT_ONE = 2.0
DECODING_AT_FOUR = 1.2
UNPADDED = 3.2
PLAIN = "the target alone"
"""How the ways without drafts begin."""
JOINING = {8: 1.05, 16: 0.97}
"""By slots, what the best chain's decoding has to be of plain decoding's."""


class BatchRate(Protocol):
    """As `batches.Rate`."""

    @property
    def form(self) -> str: ...
    @property
    def prompts(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def batch(self) -> int: ...
    @property
    def way(self) -> str: ...
    @property
    def ratio(self) -> float: ...
    @property
    def to_alone(self) -> float: ...
    @property
    def decoding(self) -> float: ...


class JoiningRate(Protocol):
    """As `joining.Rate`."""

    @property
    def form(self) -> str: ...
    @property
    def way(self) -> str: ...
    @property
    def slots(self) -> int: ...
    @property
    def ratio(self) -> float: ...


@dataclass(frozen=True)
class Bound:
    """One bound and what was found.

    Attributes:
        what: in words; least: the bound; found: None where it was not measured; where: what was found is of.
    """

    what: str
    least: float
    found: float | None = None
    where: str = ""

    @property
    def told(self) -> str:
        """What was found."""
        return "" if self.found is None else f"{self.found:.2f}{self.where}"

    @property
    def verdict(self) -> str:
        """Whether it holds."""
        if self.found is None:
            return "not measured"
        return "holds" if self.found >= self.least else "MISSED"


def bounds(rates: Sequence[BatchRate], joined: Sequence[JoiningRate]) -> list[Bound]:
    """Every bound, by form of the target.

    Args:
        rates: of batches, of several pieces of a run perhaps; joined: of engines.
    """
    forms = dict.fromkeys([*(rate.form for rate in rates), *(rate.form for rate in joined)])
    return [bound for form in forms for bound in _of_form(form, rates, joined)]


def _of_form(form: str, rates: Sequence[BatchRate], joined: Sequence[JoiningRate]) -> list[Bound]:
    own = [rate for rate in rates if rate.form == form]
    auto = [rate for rate in own if rate.way == "auto"]
    tasks = [rate for rate in auto if rate.prompts == "tasks"]
    four = [rate for rate in auto if rate.prompts == "unequal" and rate.batch == 4]
    # Of plain decoding there are two ways, and it is to be slower than neither.
    slowest = [(min(rate.ratio, rate.to_alone), f" (batch {rate.batch}, {rate.name})") for rate in auto]
    eight = [rate for rate in own if rate.prompts == "unequal" and rate.batch == 8 and rate.way.startswith(PLAIN)]
    found = [
        Bound(f"{form}: auto, slowest batch beside plain", NEVER_SLOWER, *min(slowest, default=())),
        Bound(f"{form}: auto, batch 1, mean of tasks", AT_ONE, _mean(rate.ratio for rate in tasks)),
    ]
    if form.startswith("bfloat16") and not form.endswith(("int8", "int8a8", "int4")):
        total = f" (with the prompts {four[0].to_alone:.2f})" if four else ""
        found.append(
            Bound(f"{form}: auto, batch 4, decoding", DECODING_AT_FOUR, _mean(rate.decoding for rate in four), total)
        )
    found.append(Bound(f"{form}: rows of their own by padded, batch 8", UNPADDED, _mean(rate.ratio for rate in eight)))
    for slots, least in JOINING.items():
        chains = [
            (rate.ratio, f" ({rate.way})")
            for rate in joined
            if rate.form == form and rate.slots == slots and not rate.way.startswith(PLAIN)
        ]
        found.append(Bound(f"{form}: best chain joining, {slots} slots", least, *max(chains, default=())))
    return found


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None
