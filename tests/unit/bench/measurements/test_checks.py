# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure checks`: whole drafts are kept, and three times come out of it."""

from __future__ import annotations

import pytest

from hf_polyspec.bench.measurements import checks


def test_three_times_of_drafts_that_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    found = checks.check_times(3, 50, 2)
    assert set(found) == {"greedy", "sampled", "draw"}
    assert all(value > 0 for value in found.values())
    checks.main(["--vocabulary", "40", "--widths", "1", "2", "--repeats", "2"])
    assert "2 tokens: greedy" in capsys.readouterr().out
