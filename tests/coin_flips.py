# SPDX-License-Identifier: Apache-2.0
"""A control that steers by a coin, for what must not depend on how a chain is steered."""

from __future__ import annotations

import random
from typing import Any

from hf_polyspec.control import OnlineControl
from hf_polyspec.control.setups import Setup
from hf_polyspec.exactness.context import Context


class CoinFlips(OnlineControl):
    """Runs every round in a way that a seeded coin chooses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.coin = random.Random(4)

    def before(self, context: Context, limits: list[int]) -> None:
        levels = self.coin.choice(self._subsets if self.decisions else [(0,)])
        tree = self.coin.choice([1, 3, 6]) if self.chain.trees and levels[-1] == self.chain.last else 0
        sizes = tuple(self.coin.randint(1, 5) for _ in levels[1:])
        if tree:
            sizes = (*sizes[:-1], self.chain.depth)
        self._run(Setup(levels, sizes, tree), "a coin", None)
        self._began = self.clock()
