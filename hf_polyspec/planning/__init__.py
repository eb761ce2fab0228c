# SPDX-License-Identifier: Apache-2.0
"""Which chain is fastest here, and why: formulas, measurements, and the choice between chains.

Names are imported when they are first used, so that a caller who only wants the formulas pays for nothing else; those
are in :mod:`hf_polyspec.planning.theory`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..generation.plan import Plan
    from .planner import Planned, Wish, make_plan
    from .plot import draw_plan
    from .theory.cost_model import Acceptance, Member, Prediction, SecondsTable, predict

_HOMES = {
    "Acceptance": "theory.cost_model",
    "Member": "theory.cost_model",
    "Plan": ".generation.plan",
    "Planned": "planner",
    "Prediction": "theory.cost_model",
    "SecondsTable": "theory.cost_model",
    "Wish": "planner",
    "make_plan": "planner",
    "draw_plan": "plot",
    "predict": "theory.cost_model",
}

__all__ = [
    "Acceptance",
    "Member",
    "Plan",
    "Planned",
    "Prediction",
    "SecondsTable",
    "Wish",
    "draw_plan",
    "make_plan",
    "predict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
