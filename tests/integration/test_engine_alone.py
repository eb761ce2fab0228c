# SPDX-License-Identifier: Apache-2.0
"""A request that is alone in an engine is run as a call of generate() would run it: as many passes, as much drafted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import head_for, noisy, tiny

from hf_polyspec import Engine, SuffixDrafter
from hf_polyspec.generation.doors import generate
from hf_polyspec.telemetry.stats import PolySpecStats

PROMPT = torch.tensor([[5, 6, 7, 8] * 5])


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def chains(target: Any) -> dict[str, list[Any]]:
    middle, small = noisy(target), noisy(target, 0.2, seed=2)
    return {
        "a model": [small],
        "suffixes": [SuffixDrafter()],
        "a middle and a model": [middle, small],
        "a middle and suffixes": [middle, SuffixDrafter()],
        "a middle and a head": [middle, head_for(target)],
    }


def done(stats: PolySpecStats) -> list[Any]:
    """Passes of the target, and what every level was offered and kept."""
    checked = [(level.drafted_at, level.accepted_at) for level in stats.levels[:-1]]
    return [stats.levels[0].forward_passes, *checked, stats.levels[-1].accepted]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a model", {}),
        ("suffixes", {}),
        ("a middle and a model", {}),
        ("a middle and suffixes", {}),
        ("a middle and a head", {}),
        ("a middle and a head", {"polyspec_tree_tokens": 6}),
    ],
)
def test_a_lone_request_takes_the_passes_of_a_call(
    target: Any, chains: dict[str, list[Any]], name: str, options: dict[str, Any], sampled: bool
) -> None:
    """Twice, since what an engine has seen of one request may change nothing for the next."""
    call = {"max_new_tokens": 24, "do_sample": sampled}
    by_call = generate(
        target, PROMPT, assistant_models=chains[name], return_dict_in_generate=True, polyspec_seed=3, **call, **options
    )
    with Engine(target, chains[name], **options) as engine:
        for _ in range(2):
            handle = engine.submit(PROMPT, seed=3, **call)
            assert torch.equal(handle.result(120), by_call.sequences)
            assert handle.polyspec is not None
            assert done(handle.polyspec) == done(by_call.polyspec)
