# SPDX-License-Identifier: Apache-2.0
"""Drafters that lie here for a model and have to be tried: EAGLE heads, and layers of the model's own checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..control.costs import DRAFTS
from ..eagle.configuration import EagleHeadConfig
from ..eagle.features import check_fit, target_parts
from ..host.hub_cache import cached_folders
from ..host.release import inner_model, input_device
from ..models.assistants import is_eagle_head, load_assistant
from ..models.packaged import HEAD, head_folder
from ..planning.theory.cost_model import SecondsTable
from .worth import DRAFTER_GAIN, Points, milliseconds

MTP = "mtp"
LONGEST = 6
"""Tokens of a head's draft at most."""
_MOST = 3
"""Heads that are tried, the one that ships with this package among them."""

Tries = Callable[[Any, Any, Sequence[int]], "tuple[float, float]"]
"""Told the target, a drafter, and ids of a prompt: the share of drafted tokens that were right, and seconds of one."""


@dataclass(frozen=True)
class Tried:
    """What a drafter promises.

    Attributes:
        name: as `assistant_models` takes it; member: the drafter itself.
        gain: times the speed of the model alone; tokens: of its best draft; share: of its tokens that are right.
        about: in words.
    """

    name: str
    member: Any
    gain: float
    tokens: int
    share: float
    about: str


def load_drafter(name: str, target: Any) -> Any:
    """A drafter by its name, from this disk.

    Raises:
        ValueError, OSError: it is not there, or cannot be loaded.
    """
    return load_assistant(name, target, target.dtype, input_device(target), remote_code=False)


def drafters_here(model: Any) -> Iterator[str]:
    """Names of drafters that lie on this disk and fit a model, as far as their configuration tells."""
    found = 0
    for name in (HEAD, *cached_folders()):
        folder = str(head_folder()) if name == HEAD else name
        if found < _MOST and (name == HEAD or is_eagle_head(folder)) and _fits(folder, model):
            found += 1
            yield name
    # A checkpoint on a hub might be fetched in part.
    if Path(str(getattr(inner_model(model).config, "name_or_path", "") or "nowhere")).is_dir():
        yield MTP


def _fits(folder: str, model: Any) -> bool:
    try:
        check_fit(EagleHeadConfig.from_pretrained(folder), target_parts(inner_model(model)), "the model")
    except (ValueError, TypeError, OSError):
        return False
    return True


def try_drafters(
    model: Any, target: Any, prompt: Sequence[int], passes: Points, tries: Tries, progress: Callable[[str], None]
) -> tuple[Tried | None, list[str]]:
    """The drafter that promises most, and sentences on those that promise too little.

    Args:
        model: the caller's; target: as it runs.
        prompt: ids to go on from; passes: of the target.
        tries: runs one; progress: told of what is tried.
    """
    best: Tried | None = None
    left: list[str] = []
    for name in drafters_here(model):
        progress(f"trying {name}")
        try:
            member = load_drafter(name, target)
            share, seconds = tries(target, member, prompt)
        except (ValueError, OSError) as error:
            if name != MTP:  # most models have none
                left.append(f"{name}: {' '.join(str(error).split()).rstrip('.')}")
            continue
        gain, tokens = promise(passes, share, seconds)
        about = f"{name} (its step takes {milliseconds(seconds)}, {share:.0%} of its tokens are right)"
        found = Tried(name, member, gain, tokens, share, about)
        if gain < DRAFTER_GAIN:
            left.append(f"{about}, which would not pay")
        elif best is None or gain > best.gain:
            best = found
    return best, left


def promise(passes: Points, share: float, seconds: float) -> tuple[float, int]:
    """The most times the speed of the model alone that drafts bring, and of how many tokens.

    Args:
        passes: of the model, [columns, seconds]; share: of drafted tokens that are right; seconds: of drafting one.
    """
    table = SecondsTable(tuple((int(columns), float(time)) for columns, time in passes))

    def speed(size: int) -> float:
        emitted = sum(share**i for i in range(size + 1))
        return emitted * table.seconds(1) / (table.seconds(size + 1) + size * seconds)

    best = max((size for size in DRAFTS if size <= LONGEST), key=speed)
    return speed(best), best
