# SPDX-License-Identifier: Apache-2.0
"""Everything the folder of a run holds, read for reports."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.reading import read_json
from .journal import Line, read_lines, read_settings
from .runner import FLOAT32, RECORDS, TIES, UNAVAILABLE

if TYPE_CHECKING:
    from .statistics import Table

BREAKDOWN = "breakdown.json"
_REMEDY = "delete it and run the same polyspec bench again, which writes it anew"


@dataclass(frozen=True)
class RunData:
    """A run.

    Attributes:
        folder: where it lies.
        settings: what it was made with, by option.
        facts: model, dtype, device, order of methods, bytes of weights.
        starts: when, where and how it was started or gone on with.
        records: answers; float32_records: the same questions in float32, empty where the run itself is in float32.
        ties: greedy answers that differ from plain's, of both.
        unavailable: methods that could not be run, and why.
        breakdown: shares of time by chain, level and kind of work; empty where they were not measured.
    """

    folder: Path
    settings: dict[str, Any]
    facts: dict[str, Any]
    starts: list[Line]
    records: list[Line]
    float32_records: list[Line]
    ties: list[dict[str, Any]]
    unavailable: dict[str, str]
    breakdown: dict[str, dict[str, dict[str, float]]]

    @cached_property
    def table(self) -> Table:
        """All figures."""
        from .statistics import tabulate

        return tabulate(self.records, self.facts["order"])

    @cached_property
    def float32_rates(self) -> dict[str, tuple[int, int]]:
        """Greedy answers equal to plain's in float32, and all that were compared, by decoder."""
        from .statistics import identity_rates

        in_float32 = self.facts["dtype"] == "float32"
        return identity_rates(self.records if in_float32 else self.float32_records)

    @cached_property
    def packed_rates(self) -> dict[str, tuple[int, int]]:
        """Greedy answers equal to those of plain generation on a packed target, and all compared, by decoder."""
        from .methods import PACKED
        from .statistics import identity_rates

        return identity_rates(self.records, PACKED)

    @property
    def title(self) -> str:
        """The target's short name."""
        name = str(self.facts["model"]).rstrip("/").rsplit("/", 1)[-1]
        return f"{name}, {self.facts['dtype']} on {self.facts['device']}"


def read_run(folder: Path) -> RunData:
    """Read the folder of a run, finished or not.

    Raises:
        ValueError: it holds no run, or no answers yet.
    """
    settings = read_settings(folder)
    records = read_lines(folder, RECORDS)
    facts = folder / "methods.json"
    if not records or not facts.is_file():
        raise ValueError(f"The run in {folder} has no answers yet.")
    ties = [tie for stem in (TIES, FLOAT32 + TIES) for line in read_lines(folder, stem) for tie in line["differences"]]
    split = folder / BREAKDOWN
    return RunData(
        folder,
        settings,
        read_json(facts, remedy=_REMEDY),
        read_lines(folder, "starts"),
        records,
        read_lines(folder, FLOAT32 + RECORDS),
        ties,
        {line["method"]: line["reason"] for line in read_lines(folder, UNAVAILABLE)},
        read_json(split, remedy=_REMEDY) if split.is_file() else {},
    )
