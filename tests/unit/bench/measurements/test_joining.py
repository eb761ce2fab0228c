# SPDX-License-Identifier: Apache-2.0
"""What `polyspec measure joining` says of an engine."""

from __future__ import annotations

import pytest
from tiny_models import in_circles, tiny

from hf_polyspec.bench.measurements.joining import ALONE, measure


def test_rates_are_of_the_texts_that_were_written() -> None:
    target = in_circles(tiny())
    rates = measure(target, [[3, 4, 5], [9] * 7, [6, 2]], 2, ["suffix"], new_tokens=9, rounds=1)
    assert [rate.way for rate in rates] == [ALONE, "suffix"]
    for rate in rates:
        assert (rate.slots, rate.tokens, rate.texts, rate.alike) == (2, 27, 3, 3)
        if rate.seconds > rate.reading:
            assert rate.per_second * (rate.seconds - rate.reading) == pytest.approx(24)
    assert rates[0].ratio == 1
