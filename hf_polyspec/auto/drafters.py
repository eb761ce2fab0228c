# SPDX-License-Identifier: Apache-2.0
"""Drafters that lie here for a model and have to be tried: EAGLE heads, and layers of the model's own checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..control.costs import STEPS, Costs, Head, Trial
from ..cpu.packing import packed_assistants
from ..eagle.configuration import EagleHeadConfig
from ..eagle.features import check_fit, lend_parts, target_parts
from ..host.hub_cache import cached_folders
from ..host.mtp_tensors import whole_checkpoint
from ..host.ranks import ALONE, Ranks
from ..host.release import inner_model, input_device
from ..levels.elsewhere import Elsewhere
from ..models.assistants import is_eagle_head, load_assistant
from ..models.packaged import HEAD, head_folder
from ..planning.theory.cost_model import SecondsTable
from .worth import ALONE_GAIN, DRAFTER_GAIN, JOINT_GAIN, Points, milliseconds, speed_over

MTP = "mtp"
_MOST = 3
"""Heads that are tried, the one that ships with this package among them."""

Tries = Callable[[Any, Any, Sequence[int]], Trial]
"""Told the target, a drafter, and ids of a prompt, it runs a few rounds."""


@dataclass(frozen=True)
class Tried:
    """What a drafter promises.

    Attributes:
        name: as `assistant_models` takes it; member: the drafter itself.
        gain: times the speed of the model alone; head: what is known of it.
        about: in words.
    """

    name: str
    member: Any
    gain: float
    head: Head
    about: str


def load_drafter(name: str, target: Any, ranks: Ranks = ALONE) -> Any:
    """A drafter by its name, from this disk; of processes that share the target, the first loads it.

    Raises:
        ValueError, OSError: it is not there, or cannot be loaded.
    """

    def load() -> Any:
        return load_assistant(name, target, target.dtype, input_device(target), remote_code=False)

    return ranks.attempted(load, Elsewhere(name, reads_states=True))


def drafters_here(model: Any) -> Iterator[str]:
    """Names of drafters that lie on this disk and fit a model, as far as their configuration tells."""
    found = 0
    for name in (HEAD, *cached_folders()):
        folder = str(head_folder()) if name == HEAD else name
        if found < _MOST and (name == HEAD or is_eagle_head(folder)) and _fits(folder, model):
            found += 1
            yield name
    if whole_checkpoint(inner_model(model).config) is not None:  # else trying them might fetch it
        yield MTP


def _fits(folder: str, model: Any) -> bool:
    try:
        check_fit(EagleHeadConfig.from_pretrained(folder), target_parts(inner_model(model)), "the model")
    except (ValueError, TypeError, OSError):
        return False
    return True


def try_drafters(
    model: Any,
    target: Any,
    prompt: Sequence[int],
    passes: Points,
    tries: Tries,
    progress: Callable[[str], None],
    ranks: Ranks = ALONE,
    packs: bool = True,
) -> tuple[Tried | None, list[str]]:
    """The drafter that promises most, and sentences on those that promise too little.

    Args:
        model: the caller's; target: as it runs.
        prompt: ids to go on from; passes: of the target.
        tries: runs one; progress: told of what is tried.
        ranks: the processes that take part in passes of the target; what is read beside it on its own is left out.
        packs: whether a drafter is packed where it runs, as it then is here.
    """
    best: Tried | None = None
    left: list[str] = []
    table = SecondsTable(tuple((int(columns), float(seconds)) for columns, seconds in passes))
    if ranks.in_step:
        lend_parts(inner_model(model), keeps=ranks.leads)
    here = list(drafters_here(model)) if ranks.leads else []
    for name in ranks.told([name for name in here if name != MTP or not ranks.in_step]):
        progress(f"trying {name}")
        try:
            member = load_drafter(name, target, ranks)
            with packed_assistants([member] if packs else [], target):
                head = tries(target, member, prompt).head(table)
        except (ValueError, OSError) as error:
            if name != MTP:  # most models have none
                left.append(f"{name}: {' '.join(str(error).split()).rstrip('.')}")
            continue
        about = f"{name} (its step takes {milliseconds(head.step)}, {head.share:.0%} of its tokens should be right)"
        gain = promise(passes, head)
        found = Tried(name, member, gain, head, about)
        if gain < DRAFTER_GAIN:
            left.append(f"{about}, which would not pay")
        elif best is None or gain > best.gain:
            best = found
    return best, left


def promise(passes: Points, head: Head) -> float:
    """The most times the speed of the model alone that a head's drafts bring.

    Args:
        passes: of the model, [columns, seconds]; head: what is known of it.
    """
    costs = Costs([passes], 0.0, head)
    return max(costs.speed_of_steps(size, 0) for size in STEPS)


def joint(
    target: Points, bits: str | None, copy: Points | None, agreed: Mapping[str, float], drafter: Tried | None
) -> tuple[bool, bool, list[str]]:
    """Whether to keep a copy, whether to keep a drafter, and sentences on why not.

    A drafter below a copy drafts for passes that are cheaper than the model's own, and while it is wrong the copy is
    still there; so both are kept where both pay, unless the drafter alone promises clearly more.

    Args:
        target: passes of the model; bits, copy: a quantised copy that pays and its passes, None for none.
        agreed: shares by member; drafter: one that pays alone, None for none.
    """
    if bits is None or copy is None or drafter is None:
        return bits is not None, drafter is not None, []
    share = agreed.get(bits)
    alone = speed_over(target, copy, share)
    both = 0.0 if drafter.name == MTP else speed_over(target, copy, share, drafter.head)
    if drafter.gain > ALONE_GAIN * max(alone, both):
        return False, True, []
    if both < JOINT_GAIN * alone:
        return True, False, [f"{drafter.about}; {bits} promises as much without it"]
    return True, True, []
