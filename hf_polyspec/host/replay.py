# SPDX-License-Identifier: Apache-2.0
"""The state behind the first columns of a pass, from what its scans were given: no weight and no token is read twice.

Of a draft only the first tokens stay. The state after those is what the scans of the pass make of its first columns
alone, from the state before it. Rows of a batch keep different numbers of columns: the others of a row are turned into
ones that leave a state as it is, with neither decay nor anything to write. A window of a convolution is the last of
what it moved over. Layers whose scans are alike are scanned at once, as if their heads were those of one layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .release import cache_argument, forward_arguments, inner_model, input_device
from .scans import Ears, Heard, Scan, by_row, fit
from .states import State, StateCache, state_cache, tensors_of

_READ, _MORE, _KEPT = 5, 4, 2


def behind(cache: StateCache, before: State, heard: Heard, counts: list[int]) -> State:
    """The state of a cache after the first columns of a pass, in tensors of its own.

    Args:
        cache: whose layers they are.
        before: its state before the pass.
        heard: what the pass did, of a cache whose states it `covers`.
        counts: how many columns of each row stay, at least one of some row.
    """
    of_layer = {id(layer): values for layer, values in zip(cache.stateful, before, strict=True)}
    made = {key: {name: _apart(value) for name, value in values.items()} for key, values in of_layer.items()}
    for layer, index, columns in heard.windows:
        key = id(cache.layers[layer])
        made[key]["conv_states"][index] = _window(of_layer[key]["conv_states"][index], columns, counts)
    for alike in _alike(cache, of_layer, heard.scans, counts):
        returned = alike[0].function(**_beside_each_other(alike))
        for scan, state in zip(alike, returned[alike[0].place].chunk(len(alike), dim=1), strict=True):
            states = made[id(cache.layers[scan.layer])]["recurrent_states"]
            states[scan.index] = state.to(states[scan.index].dtype, copy=True, memory_format=torch.contiguous_format)
    return [made[id(layer)] for layer in cache.stateful]


def _apart(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value


def _window(window: torch.Tensor, columns: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """A window `[B, C, W]` after it moved over the first of columns `[B, C, F]`."""
    seen = torch.cat([window, columns.to(window.dtype)], dim=-1)
    ends = torch.tensor(counts, device=window.device)[:, None] + torch.arange(window.shape[-1], device=window.device)
    return seen.gather(-1, ends[:, None].expand(-1, window.shape[1], -1))


def _alike(cache: StateCache, of_layer: dict[int, Any], scans: list[Scan], counts: list[int]) -> list[list[Scan]]:
    """The scans over columns that stay, those together that are over as many heads of the same sizes."""
    groups: list[list[Scan]] = []
    for heard in scans:
        given = _kept(heard, counts)
        given[heard.initial] = of_layer[id(cache.layers[heard.layer])]["recurrent_states"][heard.index]
        scan = Scan(heard.function, given, heard.initial, (), heard.layer, heard.index, heard.place)
        fit(scan)
        for group in groups:
            if _fit_together(group[0], scan):
                group.append(scan)
                break
        else:
            groups.append([scan])
    return groups


def _kept(scan: Scan, counts: list[int]) -> dict[str, Any]:
    """A scan's arguments for the columns that some row keeps, the others of each row made such that nothing happens."""
    wide, most = scan.columns, max(counts)
    given = {
        name: one[:, :most] if by_row(one) and one.shape[1] == wide and name != scan.initial else one
        for name, one in scan.given.items()
    }
    if min(counts) < most:
        lost = torch.arange(most)[None] >= torch.tensor(counts)[:, None]
        for name, nothing in _idle(scan.function, given).items():
            where = lost.to(given[name].device).view(*lost.shape, *(1 for _ in given[name].shape[2:]))
            given[name] = given[name].masked_fill(where, nothing)
    return given


def _fit_together(one: Scan, other: Scan) -> bool:
    if one.function is not other.function or one.place != other.place or one.given.keys() != other.given.keys():
        return False
    pairs = [(name, value, other.given[name]) for name, value in one.given.items()]
    return all(
        (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and _heads(one, name) is not None
        else a is b or (not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b)
        for name, a, b in pairs
    )


def _heads(scan: Scan, name: str) -> int | None:
    """The dimension of an argument along which heads lie: states `[B, H, ...]`, columns `[B, F, H, ...]`, `[H]`."""
    value = scan.given[name]
    if name == scan.initial:
        return 1
    return 2 if by_row(value) else 0 if isinstance(value, torch.Tensor) and value.dim() == 1 else None


def _beside_each_other(scans: list[Scan]) -> dict[str, Any]:
    """Arguments of one scan that does all of these: their heads beside each other."""
    first = scans[0]
    if len(scans) == 1:
        return first.given
    axes = {name: _heads(first, name) for name in first.given}
    return {
        name: first.given[name] if axis is None else torch.cat([scan.given[name] for scan in scans], dim=axis)
        for name, axis in axes.items()
    }


def _idle(function: Any, given: dict[str, Any]) -> dict[str, float]:
    """Which arguments of a scan to fill with what for columns at which nothing is to happen.

    Raises:
        ValueError: a scan of a kind that is not known.
    """
    named = inspect.signature(function).parameters
    if {"g", "beta"} <= named.keys():  # delta rules: no decay, which stands as its logarithm, and nothing to write
        return {"g": 0.0, "beta": 0.0}
    if "dt" in named:  # Mamba 2: no time passes; what becomes 0 by a softplus is minus infinity
        return {"dt": float("-inf") if given.get("dt_softplus") else 0.0}
    raise ValueError(f"what leaves the state of {function} as it is, is not known")


@contextmanager
def hearing(ears: Ears, cache: StateCache) -> Iterator[Heard]:
    """While this runs, it is written down what passes of this thread do to a cache's states."""
    cache.heard = heard = Heard()
    try:
        with ears.hearing(heard.open.append):
            yield heard
    finally:
        cache.heard = None
        heard.open.clear()


def can_replay(model: Any) -> bool:
    """Whether what scans make of the first columns of a pass is the state of a pass over those alone; tried once."""
    inner = inner_model(model)
    if inner not in _known:
        _known[inner] = input_device(model).type != "meta" and _tried(model)
    return _known[inner]


_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


@torch.no_grad()
def _tried(model: Any) -> bool:
    cache = state_cache(model)
    if cache.even or cache.carried.any:
        return False
    rows = model.get_input_embeddings().weight.shape[0]
    texts = torch.tensor([[(7 * place + first) % rows for place in range(_READ + _MORE)] for first in (3, 5)])
    try:
        _read(model, cache, texts[:, :_READ])
        before = cache.state()
        with hearing(Ears(model), cache) as heard:
            _read(model, cache, texts[:, _READ:], _READ)
        if not heard.covers(cache.layers):
            return False
        found, alone = behind(cache, before, heard, [_MORE, _KEPT]), state_cache(model)
        _read(model, alone, texts[1:, : _READ + _KEPT])
    except Exception:
        return False
    pairs = zip(*(tensors_of(one) for one in (found, cache.state(), alone.state())), strict=True)
    coarse = torch.finfo(model.dtype).eps ** 0.5
    return all(_close(f[0], whole[0], coarse) and _close(f[1], part[0], coarse) for f, whole, part in pairs)


def _read(model: Any, cache: StateCache, ids: torch.Tensor, past: int = 0) -> None:
    more: dict[str, Any] = {cache_argument(model) or "": cache}
    if "position_ids" in forward_arguments(model):
        more["position_ids"] = torch.arange(past, past + ids.shape[1], device=input_device(model)).expand(len(ids), -1)
    model(input_ids=ids.to(input_device(model)), use_cache=True, return_dict=True, **more)


def _close(found: torch.Tensor, wanted: torch.Tensor, coarse: float) -> bool:
    """Whether two differ by rounding."""
    return bool((found.float() - wanted.float()).norm() <= coarse * wanted.float().norm())
