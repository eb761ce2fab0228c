# SPDX-License-Identifier: Apache-2.0
"""Which candidate a plan chooses: the one predicted to be the quickest, or the quickest of those that were run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from hf_polyspec.planning.planner import Planned
from hf_polyspec.planning.replay import Chain, Replayed
from hf_polyspec.planning.report import sentences
from hf_polyspec.planning.search import Candidate

PLAIN, HEAD, MIDDLE = Chain((0,)), Chain((0, 1), 0, 4), Chain((0, 2), 0, 8)


def planned() -> Planned:
    speeds = {HEAD: 30.0, MIDDLE: 28.0, PLAIN: 20.0}
    candidates = [
        Candidate(chain, cast(Replayed, SimpleNamespace(tokens_per_second=speed))) for chain, speed in speeds.items()
    ]
    names: Any = SimpleNamespace(names=["target", "head", "middle"])
    return Planned([], cast(Any, None), cast(Any, None), names, candidates, [])


def run(found: Planned, **speeds: float) -> Planned:
    chains = {"head": HEAD, "middle": MIDDLE, "plain": PLAIN}
    known = {chains[name]: speed for name, speed in speeds.items()}
    return found.with_measured([replace(c, measured=known[c.chain]) for c in found.candidates if c.chain in known])


def test_what_is_predicted_counts_until_something_is_run() -> None:
    assert planned().best.chain == planned().expected.chain == HEAD


def test_what_is_measured_counts_more_than_what_was_predicted() -> None:
    found = run(planned(), head=21.0, middle=28.0, plain=20.0)
    assert (found.best.chain, found.expected.chain) == (MIDDLE, HEAD)
    assert "head (draft 4) was expected to be, and was 25.0 % slower" in " ".join(sentences(found))
    assert run(planned(), head=9.0, middle=8.0, plain=20.0).best.chain == PLAIN


def test_a_choice_that_was_right_says_so() -> None:
    found = run(planned(), head=31.0, middle=28.0, plain=20.0)
    assert found.best.chain == HEAD
    assert "the quickest of those that were run, as predicted" in " ".join(sentences(found))
    # of some only the others were run
    assert "head (draft 4) was expected to be." in " ".join(sentences(run(planned(), middle=28.0, plain=20.0)))
