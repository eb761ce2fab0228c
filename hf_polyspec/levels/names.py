# SPDX-License-Identifier: Apache-2.0
"""How a member of a chain is called in tables, notes and errors."""

from __future__ import annotations

from typing import Any

from ..host.release import inner_model


def short_name(name: str) -> str:
    """The last part of a hub id or folder."""
    return name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]


def name_of(member: Any) -> str:
    """The last part of the hub id or folder a model came from, or a drafter's own name; empty where there is none.

    Args:
        member: a model, one inside an adapter's wrapper, or a drafter.
    """
    return short_name(str(getattr(inner_model(member), "name_or_path", "") or getattr(member, "name", "") or ""))
