# SPDX-License-Identifier: Apache-2.0
"""What chains learnt in earlier generations, kept as long as their target lives.

Short generations could otherwise never find out what pays: finding out costs a few passes.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..levels.base import Drafter
from .estimates import Knowledge

_known: WeakKeyDictionary[Any, dict[Hashable, Knowledge]] = WeakKeyDictionary()
CUSTOM_RATIO = 0.02
"""Cost of a token of a drafter without weights, in target passes, until one was timed."""


def forget() -> None:
    """Drop what was learnt of all chains; the next generation of each starts as the first did."""
    _known.clear()


def recall(levels: Sequence[Drafter], mode: Hashable) -> Knowledge:
    """What is known of a chain: a copy, so that generations on several threads do not disturb each other.

    Args:
        levels: the target first; mode: whatever else changes acceptance, such as the temperature.
    """
    found = _known.get(_subject(levels[0]), {}).get(_key(levels, mode))
    if found is None:
        return Knowledge(ratios=_ratios(levels))
    found = copy.deepcopy(found)
    for counts in found.agreements.values():
        counts.discount(0.5)
    return found


def remember(levels: Sequence[Drafter], mode: Hashable, knowledge: Knowledge) -> None:
    """Keep what a generation has learnt for the next one."""
    _known.setdefault(_subject(levels[0]), {})[_key(levels, mode)] = knowledge


def weight_bytes(module: nn.Module) -> int:
    """Bytes a forward pass reads: all parameters and buffers, without an embedding that is only looked up in."""
    looked_up = _looked_up(module)
    return sum(t.numel() * t.element_size() for t in _tensors(module) if t.data_ptr() not in looked_up)


def _tensors(module: nn.Module) -> Iterable[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _looked_up(module: nn.Module) -> set[int]:
    get_input, get_output = (getattr(module, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    if get_input is None or get_output is None:
        return set()
    table = getattr(get_input(), "weight", None)
    head = getattr(get_output(), "weight", None)
    if table is None or (head is not None and head.data_ptr() == table.data_ptr()):
        return set()
    return {table.data_ptr()}


def _ratios(levels: Sequence[Drafter]) -> dict[int, float]:
    whole = _bytes(levels[0]) or 1
    return {i: (_bytes(level) / whole) or CUSTOM_RATIO for i, level in enumerate(levels) if i}


def _bytes(level: Drafter) -> int:
    subject = _subject(level)
    return weight_bytes(subject) if isinstance(subject, nn.Module) else 0


def _subject(level: Drafter) -> Any:
    """The model of a level (of one of several parts, the head's), or the level itself."""
    head = getattr(level, "head", None)
    if isinstance(head, Drafter):
        return _subject(head)
    return getattr(getattr(level, "runner", None), "model", None) or head or level


def _key(levels: Sequence[Drafter], mode: Hashable) -> Hashable:
    # A head is a fresh view of the caller's in every generation, and so may an early exit be, with the same weights;
    # drafters without any are often made anew for every call.
    parts = []
    for level in levels[1:]:
        subject = _subject(level)
        parts.append((level.name, _place(subject) if isinstance(subject, nn.Module) else type(subject).__qualname__))
    return (*parts, mode)


def _place(module: nn.Module) -> Hashable:
    """Where weights lie: quantised copies of one model share its name and embedding, and have buffers of their own."""
    found = [next(iter(tensors), None) for tensors in (module.parameters(), module.buffers())]
    if all(tensor is None for tensor in found):
        return id(module)
    return tuple(None if tensor is None else tensor.data_ptr() for tensor in found)
