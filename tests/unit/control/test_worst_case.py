# SPDX-License-Identifier: Apache-2.0
"""The worst-case benchmark: its chains are useless, its interval is one of the median."""

from __future__ import annotations

import pytest
from tiny_models import VOCABULARY, prompts, tiny

import hf_polyspec
from hf_polyspec.bench.measurements.worst_case import KINDS, bootstrap_median, compare, useless


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


def test_a_comparison() -> None:
    result = compare(tiny(), "drafter", new_tokens=8, prompt_tokens=8, pairs=3)
    assert result.low <= result.ratio <= result.high
    assert result.pairs == 3
    with pytest.raises(ValueError, match="at least 3 pairs"):
        compare(tiny(), "drafter", new_tokens=8, pairs=2)


def test_the_interval_covers_the_median() -> None:
    low, high = bootstrap_median([float(i) for i in range(21)])
    assert low < 10 < high
    assert low >= 4
    assert high <= 16
