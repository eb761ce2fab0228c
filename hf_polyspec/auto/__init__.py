# SPDX-License-Identifier: Apache-2.0
"""`assistant_models="auto"`: levels found, measured once and kept as a profile; packing and copies on the side."""

from __future__ import annotations

from .choosing import Ready, is_auto, prepare

__all__ = ["Ready", "is_auto", "prepare"]
