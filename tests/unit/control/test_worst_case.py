# SPDX-License-Identifier: Apache-2.0
"""The worst-case benchmark: its chains are useless, its controls the ones they are said to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, prompts, tiny

import hf_polyspec
from hf_polyspec.bench.measurements import useless as cases
from hf_polyspec.bench.measurements.useless import ALONE, CONTROLLED, KINDS, PLAIN, Case, case_of, useless
from hf_polyspec.bench.measurements.worst_case import Ratio, bootstrap_median, compare, request
from hf_polyspec.control import SteadyControl
from hf_polyspec.cpu.packing import is_packed
from hf_polyspec.generation import decoding


@pytest.mark.parametrize("kind", KINDS)
def test_its_chains_bring_nothing(kind: str) -> None:
    target = tiny()
    output = hf_polyspec.generate(
        target,
        **prompts(1),
        assistant_models=useless(target, kind),
        max_new_tokens=30,
        do_sample=False,
        return_dict_in_generate=True,
    )
    level = output.polyspec.levels[0]
    assert level.drafted > 0
    assert level.acceptance_rate < 5 / VOCABULARY


@pytest.fixture
def promising(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of timing, passes of a machine on which an int8 copy pays, and columns cost little."""
    seconds = {"target": 2e-3, "int8": 2e-4}

    def told(models: dict[str, Any], sizes: dict[str, Any], *_: Any) -> dict[str, list[list[float]]]:
        return {name: [[k, seconds[name] * (1 + k / 500)] for k in sizes[name]] for name in models}

    monkeypatch.setattr(cases, "time_passes", told)


@pytest.fixture
def controls(monkeypatch: pytest.MonkeyPatch) -> list[SteadyControl]:
    """Those of `SteadyControl` that have steered a generation."""
    made: list[SteadyControl] = []

    def kept(*arguments: Any, **more: Any) -> SteadyControl:
        made.append(SteadyControl(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(decoding, "SteadyControl", kept)
    return made


@pytest.mark.parametrize("kind", KINDS[:3])
def test_the_control_of_auto_on_a_packed_target(kind: str, promising: None, controls: list[SteadyControl]) -> None:
    target = tiny()
    case = case_of(target, kind, "auto")
    assert is_packed(case.target)
    assert not is_packed(target)
    told = {"max_new_tokens": 60, "do_sample": False, "return_dict_in_generate": True}
    plain, alone, steered = (
        hf_polyspec.generate(case.target, **prompts(1), **told, **case.ways[way]) for way in (PLAIN, ALONE, CONTROLLED)
    )
    assert torch.equal(steered.sequences, plain.sequences)
    assert torch.equal(alone.sequences, plain.sequences)
    (control,) = controls
    assert len(control.chain.levels) == len(steered.polyspec.levels) == (2 if kind == "drafter" else 3)
    assert any(len(one.levels) > 1 for one in control.decisions), "nothing was tried"
    assert control.costs.tables[0].seconds(1) == pytest.approx(2e-3, rel=0.01), "the target's measured passes"
    level = steered.polyspec.levels[0]
    assert level.drafted > 0
    assert level.acceptance_rate < 0.5


def test_what_auto_learnt_is_kept_until_it_is_to_forget(promising: None, controls: list[SteadyControl]) -> None:
    case = case_of(tiny(), "both", "auto")

    def run() -> SteadyControl:
        ids = torch.ones(1, 4, dtype=torch.long)
        hf_polyspec.generate(case.target, **request(ids, 16, 1.5), **case.ways[CONTROLLED])
        return controls[-1]

    assert run().standing.tokens == 16
    assert run().standing.tokens == 32
    case.forget()
    assert run().standing.tokens == 16


def test_auto_takes_no_whole_model_as_its_drafter() -> None:
    with pytest.raises(ValueError, match="drafter, middle, both"):
        case_of(tiny(), "model", "auto")


@pytest.mark.parametrize(("control", "against"), [("online", [PLAIN]), ("auto", [PLAIN, ALONE])])
def test_a_comparison(control: str, against: list[str], promising: None) -> None:
    case = case_of(tiny(), "drafter", control)
    found = compare(case, new_tokens=8, prompt_tokens=8, pairs=3)
    assert [one.against for one in found] == against
    for one in found:
        assert one.low <= one.ratio <= one.high
        assert (one.pairs, one.control) == (3, control)
    with pytest.raises(ValueError, match="at least 3 pairs"):
        compare(case, new_tokens=8, pairs=2)


def test_prompts_and_seeds_are_the_same_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_polyspec.bench.measurements import worst_case

    seen: list[tuple[list[int], int]] = []

    def generated(target: Any, **arguments: Any) -> None:
        seen.append((arguments["input_ids"][0].tolist(), torch.initial_seed()))

    monkeypatch.setattr(worst_case, "generate", generated)
    forgotten: list[int] = []
    case = Case(tiny(), "both", "auto", {PLAIN: {}, CONTROLLED: {}}, lambda: forgotten.append(1))
    compare(case, new_tokens=8, pairs=3, cold=False)
    assert len(forgotten) == 1
    assert all(seen[place] == seen[place + 1] for place in range(0, 8, 2))
    assert len({seed for _, seed in seen}) == 4
    compare(case, new_tokens=8, pairs=3)
    assert len(forgotten) == 2 + 8


def test_whether_a_bound_holds() -> None:
    one = Ratio("both", "auto", PLAIN, 64, True, 1.0, 1.02, 1.02, 1.0, 1.03, 5)
    assert one.verdict == "at most 1.03 of plain generate(), useless both, 64 tokens: holds"
    assert replace(one, low=1.04, ratio=1.05, high=1.06).verdict.endswith("does not hold")
    assert replace(one, high=1.06).verdict.endswith("is inside the interval, the median below")
    assert replace(one, low=1.04, ratio=1.045, high=1.05, new_tokens=16).verdict.endswith("holds")
    assert replace(one, new_tokens=15).verdict is None


def test_the_interval_covers_the_median() -> None:
    low, high = bootstrap_median([float(i) for i in range(21)])
    assert low < 10 < high
    assert low >= 4
    assert high <= 16
