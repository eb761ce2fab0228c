# SPDX-License-Identifier: Apache-2.0
"""Models whose state is in their own modules, which some releases of transformers lay no caches out for."""

from __future__ import annotations

from typing import Any

import pytest

from hf_polyspec.host.compatibility import check_model
from hf_polyspec.host.manners import Manner, manner_of


def refused(model: Any) -> bool:
    """Whether this release's model is one that chains refuse for it; then they do, in a sentence."""
    if manner_of(model) is not Manner.ATTENTION:
        return False
    with pytest.raises(ValueError, match="keeps a recurrent state outside of transformers' cache layers"):
        check_model(model, "the target")
    return True
