# SPDX-License-Identifier: Apache-2.0
"""Counters of what every level did, and how they are shown."""

from .counters import Check, Decision, LevelStats
from .stats import PolySpecStats

__all__ = ["Check", "Decision", "LevelStats", "PolySpecStats"]
