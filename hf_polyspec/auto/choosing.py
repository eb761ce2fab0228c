# SPDX-License-Identifier: Apache-2.0
"""What "auto" makes of a call: the target to run, the levels below it, their sizes, and a line on why."""

from __future__ import annotations

import datetime
import threading
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from ..control.costs import Costs
from ..cpu.packing import pack, packed_assistants, unpack
from ..host.compatibility import check_model
from ..host.encoded import Encoded
from ..host.manners import Manner, manner_of
from ..host.ranks import Ranks, ranks_of
from ..host.release import input_device
from ..host.walking import also_once
from ..levels.names import name_of
from ..levels.suffix import SuffixDrafter
from ..models.assistants import AUTO, end_ids, quantized_copy
from ..models.changes import Stamp
from ..quantization.modules import sharing_copy
from . import profile as profiles
from .copying import copy_hindrance
from .drafters import MTP, Tried, Tries, joint, load_drafter, try_drafters
from .measuring import FEW, SIZES, Alike, Progress, agreement, generators_kept, own_text, time_passes
from .profile import Key, Profile
from .source import MAY, identity_of, layout_of
from .worth import ASSUMED, PACKED_GAIN, milliseconds, sizes_of, why_nobody, worth

SUFFIX = "suffix"
_BITS = {"int8": 8, "int4": 4}


def is_auto(assistants: Any) -> bool:
    """Whether `assistant_models` leaves the choice to this room: "auto", alone or alone in a list."""
    return assistants == AUTO or (isinstance(assistants, (list, tuple)) and list(assistants) == [AUTO])


@dataclass(frozen=True)
class Ready:
    """A chain, ready to run.

    Attributes:
        target: the model, or its packed copy; assistants: the levels below.
        options: sizes, as `generate()` takes them; costs: what is known of passes.
        line: what was chosen and why.
    """

    target: Any
    assistants: list[Any]
    options: dict[str, int]
    costs: Costs
    line: str


@dataclass
class _Side:
    """What stands beside one model, and goes when it goes."""

    lock: Any = field(default_factory=threading.RLock)
    mark: Stamp | None = None
    twin: Any = None
    copies: dict[str, Any] = field(default_factory=dict)
    packed: WeakSet[Any] = field(default_factory=WeakSet)
    profiles: dict[Key, Profile] = field(default_factory=dict)
    costs: dict[Hashable, Costs] = field(default_factory=dict)
    looks: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)

    def follow(self, model: Any, ranks: Ranks) -> bool:
        """Drop what was made of weights that have changed since; whether they had, as the first process sees it."""
        holds = self.mark is not None and self.mark.holds(model)
        changed: bool = ranks.told(self.mark is not None and not holds)
        if changed:
            self.twin = None
            self.copies.clear()
            self.looks.clear()
        if ranks.leads and not holds:
            self.mark = Stamp(model)
        return changed

    def look_once(self, name: str, copy: Any) -> None:
        """What is found out about the modules of a copy lasts as long as it: nobody else has it."""
        if name not in self.looks or self.looks[name][0] is not copy:
            self.looks[name] = copy, {}
        also_once(*self.looks[name])


_sides: WeakKeyDictionary[Any, _Side] = WeakKeyDictionary()
_making = threading.Lock()


def prepare(
    model: Any,
    prompt: Sequence[int],
    *,
    packs: bool = True,
    mode: Hashable = None,
    encoded: Encoded | None = None,
    tries: Tries | None = None,
    ranks: Ranks | None = None,
) -> Ready:
    """The chain of "auto" for a model: measured in the first call, afterwards remembered.

    The model is left as it is: what is packed is a copy of its modules over the same weights, and quantised copies are
    models of their own. Both are dropped before the next call when the model has changed, and made anew: the packed
    one at once, quantised ones as soon as two calls find the same weights.

    Processes that share the model's passes measure them together; the first, whose levels run below them, measures the
    rest, decides, and keeps the profile.

    Args:
        model: the target; prompt: ids of a row, on which copies are compared with it.
        packs: whether the target may be run packed.
        mode: what acceptance depends on besides the models, such as the temperature.
        encoded: what the model's decoder attends to, where it has an encoder; passes are timed on its first row.
        tries: runs a drafter that lies here; None, as for models with an encoder, for none of those.
        ranks: of the model, where somebody has asked for them already.

    Raises:
        ValueError: the model cannot be the target of a chain.
    """
    check_model(model, "the target", encodes=encoded is not None)
    with _making:
        side = _sides.setdefault(model, _Side())
    ranks = ranks_of(model) if ranks is None else ranks
    with side.lock:
        key = ranks.told(_key(model, packs))
        found = ranks.told(side.profiles.get(key) or profiles.load(key))
        # Looking all weights over takes as long as half a token of a small model, and is for what is made of them.
        changed = side.follow(model, ranks) if found is None or _makes(found) else False
        if found is None:
            row = None if encoded is None else encoded.select([0])
            with generators_kept():
                found = _measured(model, key, prompt, side, row, tries if encoded is None else None, ranks)
            if ranks.leads:
                _keep(found)
        side.profiles[key] = found
        return _made(model, found, side, changed, mode, ranks)


def _makes(found: Profile) -> bool:
    """Whether a chain has what depends on the model's weights, and stays from call to call."""
    return found.packed or not {SUFFIX, MTP}.issuperset(found.members)


def known(model: Any, *, packs: bool = True) -> Profile | None:
    """The profile of a model on this machine, if there is one: of this process or from the cache folder."""
    return profiles.load(_key(model, packs))


def assume(
    model: Any, levels: Mapping[str, Any], passes: dict[str, Any], agreed: dict[str, float], scales: dict[str, float]
) -> None:
    """Let "auto" run a model as it is over these levels, in this process, and know no more of them than this.

    Its control can thus be tried on levels that no measurement would choose.

    Args:
        model: the target; levels: by name, the slowest first, None for a suffix drafter of each call's own.
        passes, agreed, scales: see `Profile`; a drafter that agrees in nothing that is known costs nothing to ask.
    """
    key, words = _key(model, True), [f"{name} (assumed)" for name in levels if name != SUFFIX]
    found = _profile(model, key, False, list(levels), passes, (agreed, scales), words, [], Progress(""))
    with _making:
        side = _sides.setdefault(model, _Side())
    with side.lock:
        side.copies = {name: level for name, level in levels.items() if level is not None}
        side.profiles[key], side.costs = found, {}


def _key(model: Any, packs: bool) -> Key:
    return Key.here(identity_of(model), model.dtype, input_device(model), packs, layout_of(model))


def _keep(found: Profile) -> None:
    try:
        profiles.save(found)
    except OSError as error:
        warnings.warn(
            f'The profile of assistant_models="auto" could not be kept in {profiles.folder()} ({error}): another '
            "process will measure again.",
            stacklevel=2,
        )


def _made(model: Any, found: Profile, side: _Side, changed: bool, mode: Hashable, ranks: Ranks) -> Ready:
    """The members of a profile, made where they are not there."""
    target = model
    if found.packed and found.key.layout == MAY:
        if side.twin is None:
            with generators_kept():
                side.twin = _twin(model)
        target = side.twin
        side.look_once("target", target)
    line, members = found.line, [name for name in found.members if name not in _BITS or not changed]
    if len(members) < len(found.members):
        left = ", ".join(name for name in found.members if name not in members)
        line += f"; this call goes without {left}, since the weights have just changed"
    assistants = []
    for name in list(members):
        try:
            assistants.append(_member(model, target, name, side, found.key.pack, ranks))
        except (ValueError, OSError) as error:
            if name in _BITS:
                raise
            members.remove(name)
            line += f"; this call goes without {name}: {' '.join(str(error).split()).rstrip('.')}"
    middle = next((name for name in members if name in _BITS), None)
    place = (found.key, tuple(members), mode)
    if place not in side.costs:
        tables = [found.passes["target"], *(found.passes[name] for name in members if name in _BITS)]
        head = next((found.head_of(name) for name in members if name in found.agreement and name not in _BITS), None)
        agreed, scale = found.agreement.get(middle or "", ASSUMED), found.scales.get(middle or "")
        side.costs[place] = Costs(tables, agreed, head, scale)
    return Ready(target, assistants, dict(found.options), side.costs[place], line)


def _twin(model: Any) -> Any:
    return pack(sharing_copy(model))


def _member(model: Any, target: Any, name: str, side: _Side, packs: bool, ranks: Ranks) -> Any:
    if name == SUFFIX:  # it keeps the text of its generation
        return SuffixDrafter(eos=end_ids(model))
    bits = _BITS.get(name)
    if name == MTP:  # so does this
        with generators_kept():
            return load_drafter(name, model)
    if name not in side.copies:
        with generators_kept():
            side.copies[name] = load_drafter(name, target, ranks) if bits is None else quantized_copy(model, bits)
    member = side.copies[name]
    if bits is not None and isinstance(member, nn.Module):
        if packs is not (member in side.packed):
            # Nobody else has it: it need not be packed anew for every call.
            with generators_kept():
                (pack if packs else unpack)(member)
            (side.packed.add if packs else side.packed.discard)(member)
        side.look_once(name, member)
    return member


def _measured(
    model: Any,
    key: Key,
    prompt: Sequence[int],
    side: _Side,
    encoded: Encoded | None,
    tries: Tries | None,
    ranks: Ranks,
) -> Profile:
    """A profile of what there is for this model."""
    place = f"{key.device} in {ranks.size} processes" if ranks.in_step else key.device
    progress = Progress(f"{name_of(model) or type(model).__name__} in {key.dtype} on {place}", told=not ranks.leads)
    if manner_of(model) in (Manner.STEPS, Manner.NONE):
        passes = time_passes({"target": model}, {"target": FEW}, progress, encoded, ranks=ranks)
        line = "the model alone: it goes on exactly only one token a pass"
        return _profile(model, key, False, [], passes, ({}, {}), [line], [], progress)
    packed, passes, words, left = _target(model, key, side, progress, encoded, ranks)
    target = side.twin if packed else model
    prompt = own_text(target, prompt, ranks) if encoded is None else prompt
    bits, alike, about = _copy(model, target, prompt, passes, side, progress, encoded, ranks)
    agreed = {} if bits is None or alike is None else {bits: alike.share}
    scales = {} if bits is None or alike is None or alike.scale is None else {bits: alike.scale}
    (words if bits else left).append(about)
    drafter: Tried | None = None
    if tries is not None:
        drafter, why = try_drafters(model, target, prompt, passes["target"], tries, progress, ranks, key.pack)
        left += why
    keeps_copy, keeps_drafter, why = joint(passes["target"], bits, passes.get(bits or ""), agreed, drafter)
    left += why
    if bits and not keeps_copy:
        words.remove(about)
        left.append(f"{about}, which promises less")
        side.copies.clear()
        scales.clear()
        passes.pop(bits)
    members = [bits] if bits and keeps_copy else []
    if drafter is not None and keeps_drafter:
        if drafter.name != MTP:
            side.copies[drafter.name] = drafter.member
        words.append(drafter.about)
        agreed[drafter.name], passes[drafter.name] = drafter.head.share, profiles.drafts_of(drafter.head)
        members.append(drafter.name)
    if MTP not in members:
        members.append(SUFFIX)
    return _profile(model, key, packed, members, passes, (agreed, scales), words, left, progress)


def _target(
    model: Any, key: Key, side: _Side, progress: Progress, encoded: Encoded | None, ranks: Ranks
) -> tuple[bool, dict[str, list[list[float]]], list[str], list[str]]:
    """Whether to run the target packed, its passes, and why."""
    if not key.pack or key.layout != MAY:
        reason = "packing is for models on a CPU that are not trained, hooked, compiled, shared or packed already"
        reason = reason if key.pack else "polyspec_pack=False"
        passes = time_passes({"target": model}, {"target": SIZES}, progress, encoded, ranks=ranks)
        return False, passes, [], [f"packing: {reason}"]
    side.twin = _twin(model)
    both = {"target": side.twin, "unpacked": model}
    found = time_passes(both, {"target": SIZES, "unpacked": FEW}, progress, encoded)
    one, other = ({int(columns): seconds for columns, seconds in found[name]} for name in ("target", "unpacked"))
    last = max(set(one) & set(other))
    told = f"{milliseconds(one[1])} packed and {milliseconds(other[1])} as it is"
    if one[1] <= PACKED_GAIN * other[1] or (one[1] <= other[1] and one[last] <= PACKED_GAIN * other[last]):
        return True, found, [f"packed (a pass over one token takes {told})"], []
    side.twin = None
    passes = time_passes({"target": model}, {"target": SIZES}, progress, encoded)
    return False, passes, [], [f"packing: a pass over one token takes {told}"]


def _copy(
    model: Any,
    target: nn.Module,
    prompt: Sequence[int],
    passes: dict[str, list[list[float]]],
    side: _Side,
    progress: Progress,
    encoded: Encoded | None,
    ranks: Ranks,
) -> tuple[str | None, Alike | None, str]:
    """The quantised copy that pays, if one does, and how alike it is; its passes are added to those of the target."""
    reason = "int8: it does not pay"
    for name, bits in _BITS.items():
        hindrance = ranks.told(copy_hindrance(model, bits) if ranks.leads else None)
        if hindrance is not None:
            reason = f"{name}: {hindrance}"
            continue
        progress(f"making the {name} copy")
        copy, failure = None, None
        try:
            copy = quantized_copy(model, bits)
        except ValueError as error:
            failure = " ".join(str(error).split()).rstrip(".")
        failure = ranks.told(failure)
        if failure is not None:
            return None, None, f"{name}: {failure}"
        with packed_assistants([copy], target):  # as it runs in a chain
            found = _times_of(name, copy, progress, encoded, ranks)
            alike = agreement(copy, target, prompt, encoded, ranks)
        gain = worth(passes["target"], found[name], None if alike is None else alike.share)
        told = f"its pass takes {milliseconds(found[name][0][1])}"
        told += "" if alike is None else f", it agrees in {alike.share:.0%}"
        if gain > 1:
            side.copies[name] = copy
            passes |= found
            return name, alike, f"{name} ({told})"
        return None, None, f"{name}: {told}, which would not pay"
    return None, None, reason


def _times_of(
    name: str, copy: Any, progress: Progress, encoded: Encoded | None, ranks: Ranks
) -> dict[str, list[list[float]]]:
    """Of a copy's passes, which the first process makes alone."""

    def timed() -> dict[str, list[list[float]]]:
        return time_passes({name: copy}, {name: SIZES[:4]}, progress, encoded)

    nothing: dict[str, list[list[float]]] = {}
    return ranks.told(ranks.attempted(timed, nothing))  # type: ignore[no-any-return]


def _profile(
    model: Any,
    key: Key,
    packed: bool,
    members: list[str],
    passes: dict[str, list[list[float]]],
    alike: tuple[dict[str, float], dict[str, float]],
    words: list[str],
    left: list[str],
    progress: Progress,
) -> Profile:
    agreed, scales = alike
    chain = [*words, *([SUFFIX] if SUFFIX in members else [])]
    middle = next((name for name in members if name in _BITS), None)
    drafter = next((name for name in members if name in agreed and name not in _BITS), None)
    head = None if drafter is None else profiles.head_of(agreed[drafter], passes[drafter])
    return Profile(
        key,
        name_of(model) or type(model).__name__,
        datetime.date.today().isoformat(),
        packed,
        tuple(members),
        sizes_of(passes["target"], passes.get(middle or ""), agreed.get(middle or ""), head),
        passes,
        agreed,
        scales,
        " + ".join(chain) + ("" if set(members) - {SUFFIX} else why_nobody((*_BITS, "packing"), left)),
        tuple(left),
        round(progress.seconds, 3),
    )
