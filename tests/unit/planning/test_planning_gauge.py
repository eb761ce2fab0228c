# SPDX-License-Identifier: Apache-2.0
"""Predictions from times taken between the runs, on a machine whose clock belongs to the test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import noisy, prompts, tiny
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.cpu import packing
from hf_polyspec.host.configs import generation_config
from hf_polyspec.levels.suffix import SuffixDrafter
from hf_polyspec.planning import Planned, Wish, make_plan
from hf_polyspec.planning.gauge import TakenAgain
from hf_polyspec.planning.overheads import measure_overheads
from hf_polyspec.planning.readings import read_model
from hf_polyspec.planning.replay import Measurements
from hf_polyspec.planning.search import Candidate, spread
from hf_polyspec.planning.texts import law_of, write_texts
from hf_polyspec.planning.turns import over_turns, settled
from hf_polyspec.planning.verify import verify
from hf_polyspec.quantization import quantize_model
from hf_polyspec.telemetry.counters import LevelStats

PACKING = 0.05
"""Seconds of packing a middle, in every call."""


@dataclass
class Machine:
    """Passes take time by their width and by the speed of the day; nothing else takes any.

    Attributes:
        now: the time; slower: how much longer a pass of so many columns takes than at first.
        cold: seconds more for a pass that follows one of another model, `last`.
    """

    now: float = 0.0
    slower: Callable[[int], float] = field(default=lambda columns: 1.0)
    cold: float = 0.0
    last: Any = None

    def __call__(self) -> float:
        return self.now

    def runs(self, model: PreTrainedModel, seconds: float) -> PreTrainedModel:
        """A model whose pass over one token takes this long, and over eleven twice as long."""

        def passes(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            columns = kwargs["input_ids"].numel()
            self.now += seconds * (0.9 + 0.1 * columns) * self.slower(columns) + self.cold * (module is not self.last)
            self.last = module

        model.register_forward_pre_hook(passes, with_kwargs=True)
        return model


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, day: Machine) -> Machine:
    """Its clock stands wherever the planner looks at one; every test begins at the speed of the plan."""
    day.slower, day.cold = steady, 0.0
    stands(day, monkeypatch)
    return day


def steady(columns: int) -> float:
    """No pass takes longer than at first."""
    return 1.0


def stands(clock: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the clock where the planner and the levels look for one."""
    monkeypatch.setattr(time, "perf_counter", clock)
    begin = LevelStats.__init__

    def on_this_clock(stats: LevelStats, *args: Any, **kwargs: Any) -> None:
        begin(stats, *args, **kwargs)
        stats.clock = clock

    monkeypatch.setattr(LevelStats, "__init__", on_this_clock)
    pack = packing.packed_assistants

    @contextmanager
    def takes_time(assistants: Any, target: Any = None) -> Iterator[None]:
        clock.now += PACKING * sum(isinstance(one, PreTrainedModel) for one in assistants)
        with pack(assistants, target):
            yield

    # What generate() packs with; the planner's own packing is outside all that is timed.
    monkeypatch.setattr(packing, "packed_assistants", takes_time)


@pytest.fixture(scope="module")
def day() -> Machine:
    return Machine()


@pytest.fixture(scope="module")
def planned(day: Machine) -> Planned:
    """One plan for all tests, none of which changes it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        stands(day, monkeypatch)
        target = tiny("llama")
        middle = day.runs(noisy(target, 0.01, 1), 0.012)
        day.runs(target, 0.05)
        ids = [prompts(1, seed=seed)["input_ids"][0].tolist() for seed in range(2)]
        wish = Wish(new_tokens=24, repeats=1, draft_seconds=1e6, batches=False)
        return make_plan(target, [middle, SuffixDrafter()], ids, wish, names=["target", "middle", "suffix"])


def gauge_of(planned: Planned, chosen: list[Candidate]) -> TakenAgain:
    law = law_of(planned.levels[0].member, planned.measured.texts[0].prompt, planned.config)
    chains = [candidate.chain for candidate in chosen]
    return TakenAgain(planned.levels, chains, planned.measured, law, planned.wish.temperature)


def run(planned: Planned, count: int = 4) -> list[Candidate]:
    chosen = spread(planned.candidates, count)
    gauge = gauge_of(planned, chosen)
    return verify(planned.levels, chosen, planned.measured, planned.config, repeats=2, gauge=gauge)


def errors(found: list[Candidate]) -> tuple[list[float], list[float]]:
    """As planned, and anew."""
    return [abs(c.planned_error or 0.0) for c in found], [abs(c.error or 0.0) for c in found]


def test_on_a_steady_machine_both_predictions_hold(machine: Machine, planned: Planned) -> None:
    found = run(planned)
    assert {c.chain.levels for c in found} == {(0,), (0, 1), (0, 2), (0, 1, 2)}
    as_planned, anew = errors(found)
    assert max(as_planned) < 0.04
    assert anew == pytest.approx(as_planned, abs=0.02)


def test_a_machine_that_became_slower_is_followed(machine: Machine, planned: Planned) -> None:
    """Wide passes suffer more, so no one factor would do."""
    machine.slower = lambda columns: 1.5 if columns <= 4 else 2.2
    as_planned, anew = errors(run(planned))
    assert min(as_planned) > 0.4
    assert max(anew) < 0.07


@pytest.mark.parametrize("known", [True, False])
def test_caches_that_hold_the_other_model_are_counted(
    machine: Machine, planned: Planned, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass takes longer right after another model's; the wrong variant takes all passes to be alike."""
    machine.cold = 0.01
    if not known:
        monkeypatch.setattr(Measurements, "switch", lambda measured, place: 0.0)
    found = run(planned)
    _, anew = errors(found)
    both = [error for candidate, error in zip(found, anew, strict=True) if 1 in candidate.chain.levels]
    assert len(both) == 2
    assert max(anew) < 0.05 if known else min(both) > 0.06


def test_a_machine_that_wavers_is_followed(machine: Machine, planned: Planned) -> None:
    """Faster and slower by turns, several times in a call; single passes see the one or the other.

    Which half of a wave a pass falls into is chance, and there are few passes, so the mean over several waves counts.
    """
    found = []
    for wave in (0.11, 0.19, 0.23, 0.31, 0.53):
        machine.slower = lambda columns, wave=wave: 2.0 if int(machine.now / wave) % 2 else 1.2
        as_planned, anew = errors(run(planned))
        assert min(as_planned) > 0.35
        found.append(anew)
    assert np.mean(found) < 0.1


def test_the_calls_themselves_are_never_looked_at(machine: Machine, planned: Planned) -> None:
    """Whatever the calls take, the predictions are the same: they come from the times in between."""
    chosen = spread(planned.candidates, 4)
    found = [
        verify(
            planned.levels,
            chosen,
            planned.measured,
            planned.config,
            repeats=1,
            run=lambda candidate, place, seconds=seconds: (seconds, 24),  # type: ignore[misc]
            gauge=gauge_of(planned, chosen),
        )
        for seconds in (1.0, 7.0)
    ]
    speeds = [[c.anew.tokens_per_second for c in one if c.anew] for one in found]
    assert len(speeds[0]) == 4
    assert speeds[0] == pytest.approx(speeds[1])
    assert [c.measured for c in found[0]] == pytest.approx([7 * (c.measured or 0) for c in found[1]])


def test_taking_times_again_changes_nothing_else(machine: Machine, planned: Planned) -> None:
    """Acceptance, the plan's own records, models, drafters, and what is drawn next stay as they were."""
    target, middle, suffix = (level.member for level in planned.levels)

    def text() -> tuple[list[int], list[int]]:
        ids = torch.tensor([planned.measured.texts[1].prompt])
        output = hf_polyspec.generate(
            target, ids, assistant_models=[middle, suffix], max_new_tokens=16, return_dict_in_generate=True
        )
        return output.sequences[0].tolist(), [level.rounds for level in output.polyspec.levels]

    before = text()
    weights = {name: (w.data_ptr(), w.clone()) for name, w in middle.state_dict().items()}
    forwards = [sorted(module.__dict__) for module in (*target.modules(), *middle.modules())]
    costs, drawn = dict(planned.measured.costs), torch.random.get_rng_state()
    chosen = spread(planned.candidates, 5)
    gauge = gauge_of(planned, chosen)
    machine.slower = lambda columns: 1.5
    parts = gauge.turn(0, 0, 3) + gauge.turn(0, 1, 3)
    assert len(parts) == 6
    for part in parts:
        part()
    again = gauge.measurements()
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert forwards == [sorted(module.__dict__) for module in (*target.modules(), *middle.modules())]
    assert all(w.data_ptr() == weights[name][0] for name, w in middle.state_dict().items())
    assert all(torch.equal(w, weights[name][1]) for name, w in middle.state_dict().items())
    assert text() == before
    assert planned.measured.costs == costs
    assert again.edges is planned.measured.edges
    for job, record in again.drafts.items():
        assert record.drafts is planned.measured.drafts[job].drafts
    assert again.costs[0].table(20).seconds(4) == pytest.approx(1.5 * costs[0].table(20).seconds(4))
    assert [one.new for one in again.texts] == [one.new for one in planned.measured.texts]


def test_what_a_middle_costs_a_call_is_not_a_cost_of_its_rounds(machine: Machine, planned: Planned) -> None:
    target, middle, _ = (level.member for level in planned.levels)
    found = measure_overheads(target, middle, planned.measured.texts[0].prompt)
    assert found.per_model == pytest.approx(PACKING)
    assert found.call == pytest.approx(0.0)
    assert found.per_block_round == pytest.approx(0.0)


def test_passes_add_up_to_what_a_turn_of_them_takes() -> None:
    """Every tenth pass is interrupted: no median sees it, every call does."""
    times = {
        (size, kind): {(repeat, place): size + (10.0 if (size + repeat) % 10 == 0 else 0.0) for repeat in range(10)}
        for place in (0,)
        for kind in ("wide",)
        for size in range(1, 11)
    }
    times[1, "other"] = dict.fromkeys(times[1, "wide"], 2.0)
    found = settled(times, lambda key: key[1])
    assert sum(found[size, "wide"] for size in range(1, 11)) == pytest.approx(55 + 10)
    assert found[4, "wide"] == pytest.approx(2 * found[2, "wide"])
    assert found[1, "other"] == 2.0


def test_a_disturbed_repeat_does_not_count() -> None:
    assert over_turns({(0, 0): 1.0, (1, 0): 50.0, (2, 0): 1.0, (0, 1): 3.0, (1, 1): 3.0, (2, 1): 3.0}) == 2.0


def test_a_copy_is_recorded_over_the_prompt_that_it_is_lent() -> None:
    """Its laws are those it has in a chain: after the target's keys and values, not after its own."""
    target = tiny("llama")
    copy = quantize_model(target, 4, 16)
    ids = prompts(1, length=40)["input_ids"][0].tolist()
    config = generation_config(target, 8, 1.0)
    law = law_of(target, ids, config)
    (text,) = write_texts(target, [ids], config, lambda: None)
    readings = [read_model(copy, text, law, None, torch.Generator(), lender).laws for lender in (None, copy, target)]
    own, again, lent = readings
    assert (own - lent).abs().max() > 1e-4
    assert (own - again).abs().max() < 0.1 * (own - lent).abs().max()
