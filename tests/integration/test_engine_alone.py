# SPDX-License-Identifier: Apache-2.0
"""A request that is alone in an engine is run as a call of generate() would run it: as many passes, as much drafted;
and whoever listens is told once a round."""

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


class Heard:
    """Listens to a request."""

    def __init__(self, fails_at: int = 1000) -> None:
        self.begun, self.rounds = 0, list[list[int]]()
        self.fails_at = fails_at

    def began(self) -> None:
        self.begun += 1

    def came(self, tokens: list[int]) -> None:
        if len(self.rounds) == self.fails_at:
            raise RuntimeError("nobody there")
        self.rounds.append(tokens)


def test_a_listener_is_told_once_a_round(target: Any, chains: dict[str, list[Any]]) -> None:
    whole, cut = Heard(), Heard(fails_at=2)
    with Engine(target, chains["a middle and a model"], slots=2) as engine:
        handles = [engine.submit(PROMPT, max_new_tokens=24, listener=one) for one in (whole, cut)]
        written = handles[0].result(120)[0, PROMPT.shape[1] :].tolist()
        with pytest.raises(RuntimeError, match="nobody there"):
            handles[1].result(120)
    assert whole.begun == cut.begun == 1
    assert [token for tokens in whole.rounds for token in tokens] == written
    assert handles[0].polyspec is not None
    assert len(whole.rounds) == handles[0].polyspec.levels[0].forward_passes < len(written)
    assert len(cut.rounds) == 2
