# SPDX-License-Identifier: Apache-2.0
"""Replay and search on made-up costs and agreement, where the best chain is known by other means."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hf_polyspec.planning import replay as replay_module
from hf_polyspec.planning.agreement import Draft, DraftRecord
from hf_polyspec.planning.candidates import BLOCKS, MODEL_DRAFTS, Level, options_of, subsets
from hf_polyspec.planning.costs import ModelCosts, Shape
from hf_polyspec.planning.overheads import Overheads
from hf_polyspec.planning.readings import NEVER, survival, windows
from hf_polyspec.planning.reasons import exact_seconds, reasons
from hf_polyspec.planning.replay import Chain, Measurements, replay
from hf_polyspec.planning.search import Candidate, search, spread
from hf_polyspec.planning.texts import Text
from hf_polyspec.planning.theory import chain_rounds
from hf_polyspec.planning.theory.cost_model import SecondsTable
from hf_polyspec.planning.verify import calls, verify

TOKENS = 300


def world(times: list[float], rates: dict[tuple[int, int], float], tokens: int = TOKENS) -> Measurements:
    """Causal LMs only, with passes of any size equally long, and the same rate everywhere."""
    costs = {}
    for i, t in enumerate(times):
        each = SecondsTable.per_token(t)
        costs[i] = ModelCosts(((Shape(1, 1, 10), t), (Shape(64, 1, 10), t)), each, each if i else None)
    edges = {pair: [np.full(tokens, np.log(rate) if rate else NEVER)] for pair, rate in rates.items()}
    text = Text([1], [0] * tokens, times[0], times[0], 1.0)
    names = ["target", "middle", "small", "smaller"][: len(times)]
    return Measurements(names, [text], costs, edges, {}, Overheads())


def levels(count: int) -> list[Level]:
    kinds: list[Any] = ["model"] * count
    return [Level(name, i, SimpleNamespace(), kind) for i, (name, kind) in enumerate(zip("tmsd", kinds, strict=False))]


@pytest.mark.parametrize(("block", "draft"), [(4, 2), (10, 5), (16, 8)])
def test_a_replay_is_the_theory_where_tokens_are_independent(block: int, draft: int) -> None:
    measured = world([0.022, 0.007, 0.001], {(0, 1): 0.9, (1, 2): 0.75, (0, 2): 0.7}, tokens=3000)
    three = chain_rounds((0.022, 0.007, 0.001), (0.9, 0.75), (block, draft))[-1]
    found = replay(Chain((0, 1, 2), block, draft), measured)
    assert found.seconds / found.tokens == pytest.approx(three.time_per_token, rel=0.01)
    assert found.length == pytest.approx(three.length, rel=0.01)
    assert exact_seconds(found) == pytest.approx(three.time_per_token, rel=0.01)
    two = chain_rounds((0.022, 0.001), (0.7,), (draft,))[-1]
    assert 1 / replay(Chain((0, 2), 0, draft), measured).tokens_per_second == pytest.approx(
        two.time_per_token, rel=0.01
    )


@pytest.mark.parametrize(("prompt", "read"), [(10, 3), (100, 2)])
def test_a_copy_reads_no_long_prompt(prompt: int, read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading takes a second an id here; the target's pass over a long prompt gives the first token."""
    measured = world([1.0, 1.0, 1.0], {(0, 1): 0.9, (1, 2): 0.75, (0, 2): 0.7})
    measured = replace(measured, texts=[replace(measured.texts[0], prompt=[1] * prompt)], copies=frozenset({1}))
    chain = Chain((0, 1, 2), 8, 4)
    without = replace(measured, texts=[replace(measured.texts[0], prompt=[1])])
    found = replay(chain, measured)
    visits = replay_module._visits
    monkeypatch.setattr(replay_module, "_visits", lambda law, first=0: visits(law, int(read == 2)))
    later = replay(chain, without)
    assert found.seconds - later.seconds == pytest.approx(read * prompt - (3 if read == 3 else 1))
    assert found.rounds[0] - later.rounds[0] == pytest.approx(int(read == 2))


def test_the_search_finds_the_chain_that_the_theory_finds() -> None:
    times, rates = (0.05, 0.012, 0.002), {(0, 1): 0.95, (1, 2): 0.8, (0, 2): 0.78}
    best = search(levels(3), world(list(times), rates))[0].chain
    every = {
        (block, draft): chain_rounds(times, (0.95, 0.8), (block, draft))[-1].time_per_token
        for block, draft in product(BLOCKS, MODEL_DRAFTS)
    }
    assert best.levels == (0, 1, 2)
    assert every[best.block, best.draft] <= 1.002 * min(every.values())
    two = min(chain_rounds((0.05, 0.002), (0.78,), (draft,))[-1].time_per_token for draft in MODEL_DRAFTS)
    assert min(every.values()) < two


@pytest.mark.parametrize(
    ("times", "agreement", "condition"),
    [
        ([0.02, 0.005, 0.001], 0.01, "exact insertion test"),  # a random one
        ([0.02, 0.025, 0.001], 0.99, "slower than the target"),
    ],
)
def test_a_bad_middle_is_dropped_and_the_condition_named(times: list[float], agreement: float, condition: str) -> None:
    measured = world(times, {(0, 1): agreement, (1, 2): agreement * 0.8, (0, 2): 0.8})
    candidates = search(levels(3), measured)
    assert candidates[0].chain.levels == (0, 2)
    (dropped,) = reasons(levels(3), candidates, measured)
    assert (dropped.name, dropped.condition) == ("m", condition)
    assert dropped.left > dropped.right
    assert "C1 " in dropped.sentence
    assert " fails" in dropped.sentence
    assert f"{1e3 * times[1]:.2f} ms" in dropped.sentence
    good = world([0.02, 0.005, 0.001], {(0, 1): 0.97, (1, 2): 0.8, (0, 2): 0.8})
    assert reasons(levels(3), search(levels(3), good), good) == []


def test_plain_decoding_wins_where_nothing_is_accepted() -> None:
    measured = world([0.02, 0.01], {(0, 1): 0.0})
    candidates = search(levels(2), measured)
    assert candidates[0].chain.plain
    assert reasons(levels(2), candidates, measured)[0].left > 0.02


def test_a_record_by_start_is_not_averaged_away() -> None:
    """A drafter right about every other half of a text: one rate for all of it would predict too few tokens."""
    count = 400
    right = (np.arange(count) // 50) % 2 == 0
    ratios = np.where(right[:, None], windows(np.zeros(count), 8), NEVER)
    record = DraftRecord([Draft(ratios, np.full(count, 8.0), np.ones(count, bool))], SecondsTable.constant(0.0))
    measured = world([0.02], {})
    measured.texts[0] = Text([1], [0] * count, 0.02, 0.02, 1.0)
    measured.drafts = {(0, 1, None): record}
    measured.names.append("d")
    found = replay(Chain((0, 1), 0, 8), measured)
    place = rounds = 0
    while place < count:
        place, rounds = place + (9 if right[place] else 1), rounds + 1
    assert found.rounds[0] == pytest.approx(rounds)
    # What one acceptance rate for the whole text would say.
    assert rounds > 1.5 * count / (1 + 8 / 2)


def test_survival_is_the_product_of_chances() -> None:
    logs = np.log(np.array([[1.0, 0.5, 0.5, 1.0]]))
    assert survival(logs)[0] == pytest.approx([1, 0.5, 0.25, 0.25])


def test_subsets_keep_the_order_and_only_models_check() -> None:
    given = [*levels(3), Level("suffix", 3, None, "drafter")]
    found = list(subsets(given))
    assert found[0] == (0,)
    assert (0, 1, 2, 3) in found
    assert (0, 3, 1) not in found
    assert len(found) == 8
    assert all(3 not in places[1:-1] for places in found)


def test_what_is_run_has_every_subset_and_then_other_sizes() -> None:
    measured = world([0.05, 0.012, 0.002], {(0, 1): 0.95, (1, 2): 0.8, (0, 2): 0.78})
    candidates = search(levels(3), measured)
    run = spread(candidates, 10)
    assert len(run) == 10
    assert {c.chain.levels for c in run} == {(0,), (0, 1), (0, 2), (0, 1, 2)}
    assert len({c.chain for c in run}) == 10


def test_verification_takes_turns_and_medians() -> None:
    measured = world([0.05, 0.012], {(0, 1): 0.9})
    measured.texts.append(measured.texts[0])
    measured.edges[0, 1].append(measured.edges[0, 1][0])  # type: ignore[index]
    run = spread(search(levels(2), measured), 3)
    asked: list[tuple[int, int]] = []

    def call(candidate: Candidate, place: int) -> tuple[float, int]:
        number = run.index(candidate)
        asked.append((place, number))
        slow = len(asked) == 5  # one call that something else disturbed
        return (1.0 + number) * (50 if slow else 1), 10

    done = []
    found = verify(levels(2), run, measured, None, repeats=3, advance=lambda: done.append(1), run=call)  # type: ignore[arg-type]
    assert [c.measured for c in found] == pytest.approx([10.0, 5.0, 10 / 3])
    assert len(done) == calls(3, 2, 3) == len(asked)
    # After the short first call of each, every prompt is answered by all before the next.
    assert [place for place, _ in asked[3:]] == [0, 0, 0, 1, 1, 1] * 3
    assert found[0].error == pytest.approx(found[0].predicted.tokens_per_second / 10 - 1)


def test_options_of_a_chain() -> None:
    assert options_of(Chain((0,))) == {}
    assert options_of(Chain((0, 1, 2), 6, 3)) == {
        "polyspec_block_size": 6,
        "polyspec_direct_tokens": 0,
        "num_assistant_tokens": 3,
        "polyspec_tree_tokens": 0,
    }
    assert options_of(Chain((0, 1, 2), 6, 3, direct=2))["polyspec_direct_tokens"] == 2
