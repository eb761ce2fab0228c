# SPDX-License-Identifier: Apache-2.0
"""The `polyspec` command."""

from .main import app

__all__ = ["app"]
