# SPDX-License-Identifier: Apache-2.0
"""Arrangements that were measured on this machine, a JSON file each in the cache folder: later processes go by them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from ..errors import DamagedFileError
from ..host.release import input_device
from ..models.packaged import cache_root
from ..storage.atomic import write_json
from ..storage.reading import read_json
from .placements import Arrangement, Placed

REMEDY = "delete it; the next call measures anew"
_LOG = logging.getLogger(__name__)
_forgetful = False


def measure_anew() -> None:
    """From now on this process goes by nothing that an earlier one has measured: for measurements."""
    global _forgetful
    _forgetful = True


def path_of(model: Any, key: Hashable) -> Path:
    """The file for a chain under a model on this machine, with the versions that compute here.

    Args:
        model: the target; key: what else a measurement depends on, of values whose `repr` says all of them.
    """
    from ..auto.profile import Key  # quantisation, which most calls never need
    from ..auto.source import identity_of, layout_of

    here = Key.here(identity_of(model), model.dtype, input_device(model), True, layout_of(model))
    digest = hashlib.sha256(f"{here.name} {key!r}".encode()).hexdigest()[:16]
    return cache_root() / "placements" / f"{digest}.json"


def load(path: Path, possible: Sequence[Arrangement]) -> Placed | None:
    """What was kept; None where there is nothing, or nothing of what is possible."""
    if _forgetful:
        return None
    try:
        said = read_json(path, remedy=REMEDY)
        seconds = {tuple(places.split(", ")): float(took) for places, took in said["seconds"].items()}
        found = Placed(tuple(said["places"]), seconds)
    except (OSError, DamagedFileError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None
    return found if found.places in possible else None


def save(path: Path, placed: Placed) -> None:
    """Keep what was measured; that it cannot be kept is no reason to fail."""
    seconds = {", ".join(places): took for places, took in placed.seconds.items()}
    try:
        write_json(path, {"places": list(placed.places), "seconds": seconds})
    except OSError as error:
        _LOG.warning("the placement of assistant_models could not be kept in %s: %s", path, error)
