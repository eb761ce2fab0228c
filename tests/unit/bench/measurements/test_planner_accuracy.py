# SPDX-License-Identifier: Apache-2.0
"""What is said about a plan's predictions once its candidates were run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hf_polyspec.bench.measurements.planner_accuracy import accuracy, told
from hf_polyspec.planning.planner import Planned
from hf_polyspec.planning.replay import Chain, Replayed
from hf_polyspec.planning.search import Candidate


def planned(speeds: dict[Chain, tuple[float, float | None]]) -> Planned:
    """A search with predicted and measured tokens a second, the quickest first."""
    candidates = [
        Candidate(chain, cast(Replayed, SimpleNamespace(tokens_per_second=predicted)), measured)
        for chain, (predicted, measured) in speeds.items()
    ]
    nothing = cast(Any, None)
    return Planned([], nothing, nothing, nothing, candidates, [])


PLAIN, SHORT, LONG, OTHER = Chain((0,)), Chain((0, 1), 0, 4), Chain((0, 1), 0, 8), Chain((0, 2), 0, 4)


def test_a_machine_that_became_slower_is_told_from_a_wrong_prediction() -> None:
    slower = 1.3
    found = accuracy(
        planned(
            {
                LONG: (30.0, 30.0 / slower / 1.2),
                SHORT: (28.0, 28.0 / slower / 1.05),
                PLAIN: (20.0, 20.0 / slower),
                OTHER: (15.0, None),
            }
        )
    )
    assert (found["candidates"], found["within_10_percent"]) == (3, 0)
    assert found["largest_error"] == pytest.approx(0.56)
    assert (found["chains"], found["speedups_within_10_percent"]) == (2, 1)
    assert found["largest_speedup_error"] == pytest.approx(0.2)
    assert found["choice_behind_best"] == pytest.approx(1 - (30 / 1.2) / (28 / 1.05))


def test_without_plain_nothing_is_said_of_speedups() -> None:
    speeds: dict[Chain, tuple[float, float | None]] = {LONG: (30.0, 28.0), PLAIN: (20.0, None)}
    found = accuracy(planned(speeds))
    assert found["within_10_percent"] == 1
    assert "chains" not in found


def test_both_predictions_are_counted_and_told_apart() -> None:
    found = planned({LONG: (30.0, 20.0), SHORT: (24.0, 19.0), PLAIN: (20.0, 14.0)})
    found.candidates = [
        replace(candidate, anew=cast(Replayed, SimpleNamespace(tokens_per_second=speed)))
        for candidate, speed in zip(found.candidates, (21.0, 15.0, 14.5), strict=True)
    ]
    counts = accuracy(found)
    assert (counts["within_10_percent"], counts["as_planned"]["within_10_percent"]) == (2, 0)
    assert counts["largest_error"] == pytest.approx(1 - 15 / 19)
    assert counts["as_planned"]["largest_error"] == pytest.approx(0.5)
    assert counts["as_planned"]["speedups_within_10_percent"] == 1
    before, anew, choice = told(counts)
    assert before.startswith("As planned, before the runs: 0 of 3")
    assert anew.startswith("From times taken between the runs: 2 of 3")
    assert "0.0 % behind" in choice
    assert len(told(accuracy(planned({LONG: (30.0, 20.0)} | {PLAIN: (20.0, 14.0)})))) == 2
