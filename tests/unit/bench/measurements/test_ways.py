# SPDX-License-Identifier: Apache-2.0
"""Ways that take turns, in `polyspec measure batches`, `joining`, `peers` and `auto`."""

from __future__ import annotations

from hf_polyspec.bench.measurements import ways


def test_the_order_moves_on_and_the_turn_that_warms_does_not_count() -> None:
    seen: list[tuple[str, int]] = []

    def call(way: str, turn: int) -> float:
        seen.append((way, turn))
        return 10.0 * turn + len(seen)

    assert ways.in_turns(call, ["a", "b"], 2) == {"a": [3, 16], "b": [4, 15]}
    assert seen == [("b", -1), ("a", -1), ("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    seen.clear()
    assert ways.in_turns(call, ["a"], 1, warms=False) == {"a": [1]}


def test_how_much_quicker_is_said_by_pairs_of_one_turn() -> None:
    seconds = {"a": [1.0, 10.0, 2.0], "b": [2.0, 30.0, 3.0]}  # of the medians: 3 / 2
    assert ways.quotient(seconds, "a", "b") == 2
    assert ways.quotient(seconds, "b", "a") == 0.5
