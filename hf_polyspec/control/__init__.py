# SPDX-License-Identifier: Apache-2.0
"""Steering a chain while it generates: sizes that follow what is measured, levels that are off while they do not pay.

Every decision is made between two rounds of the target, from times and acceptance of rounds that are over. What a
round emits follows the target's law whatever was decided before it, so the law of the text does not change (law 2).
"""

from __future__ import annotations

from .costs import Costs
from .led import LedControl, online_control
from .memory import forget
from .online import OnlineControl
from .pass_seconds import PassSeconds
from .setups import Setup
from .shares import Shares, shares_of
from .steady import SteadyControl

__all__ = [
    "Costs",
    "LedControl",
    "OnlineControl",
    "PassSeconds",
    "Setup",
    "Shares",
    "SteadyControl",
    "forget",
    "online_control",
    "shares_of",
]
