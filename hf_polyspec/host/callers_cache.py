# SPDX-License-Identifier: Apache-2.0
"""Caches that the caller brings: looked at before any work, copied, and extended once, in one step, at the end."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..errors import TARGET, UncheckableError
from .cache import RollbackCache, RollbackLayer
from .cache_forms import check_form, length_of
from .carried import check_continued
from .indexed import CROPPED_LAYERS, INDEXED_LAYERS, copied, extend_beside
from .offloaded import OffloadedCache, at_home, check_offloaded, new_columns, rests_elsewhere
from .release import GENERATION_CACHE, input_device, with_cache
from .states import (
    STATE_LAYERS,
    StateCache,
    copy_of,
    empty_cache,
    is_closed,
    keeps_states,
    layer_plan,
    state_cache,
    state_of,
    tensors_of,
)


def check_cache(cache: Any, model: Any, rows: int) -> None:
    """Refuse a cache whose contents a chain could not read or extend, or that the target did not write as it is.

    Args:
        cache: the caller's, or the one that generate() prepared; None for none.
        model: the target.
        rows: of the batch.

    Raises:
        UncheckableError, ValueError: names the class, the layer and the numbers that do not fit.
    """
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise ValueError(f"{GENERATION_CACHE} must be a transformers Cache, got {type(cache).__name__}.")
    check_offloaded(cache, model)
    at_home(cache)
    lengths = [length_of(layer) for layer in cache.layers]
    check_continued(model, filled=any(lengths))
    if any(lengths) or type(cache) not in (DynamicCache, StaticCache):
        known = (layer for layer in cache.layers if not isinstance(layer, STATE_LAYERS))
        odd = next((layer for layer in known if type(layer) not in CROPPED_LAYERS), None)
        if odd is not None:
            raise UncheckableError(
                f"{GENERATION_CACHE} of type {type(cache).__name__} has {type(odd).__name__} layers, which cannot be "
                f"rolled back after a rejected draft; pass a DynamicCache, or leave {GENERATION_CACHE} out.",
                TARGET,
            )
    planned = layer_plan(model) or None
    _check_windows(cache, planned)
    if any(lengths):
        _check_whole(cache, lengths)
        _check_rows(cache, rows)
        check_form(cache, model, planned)


def check_prompt(cache: Cache, ids: int, width: int | None) -> bool:
    """Compare what a cache holds with the prompt.

    Args:
        cache: that `check_cache` has passed; ids: columns of the given ids.
        width: columns of the caller's attention mask, None where there was none.

    Returns:
        Whether the ids are only what comes after the cache, so that those of its tokens are not known.

    Raises:
        ValueError: the cache holds more than the prompt, or nothing is left to be read.
    """
    held = tokens_held(cache)
    if not held:
        return False
    if counts_nothing(cache):
        return True
    if width is not None and width != ids:
        if width != held + ids:
            raise ValueError(
                f"attention_mask has {width} columns, but the {held} tokens in {GENERATION_CACHE} and the {ids} ids "
                f"of the prompt are {held + ids}; pass one column for each."
            )
        return True
    if held > ids:
        raise ValueError(
            f"{GENERATION_CACHE} holds {held} tokens, more than the {ids} ids of the prompt; crop it to what it shares "
            "with the prompt (or, where the ids are only the new ones, pass an attention_mask for all tokens)."
        )
    if held == ids and floor(cache) == held:
        raise ValueError(
            f"{GENERATION_CACHE} holds all {ids} tokens of the prompt, and its windows no longer hold what the last of "
            "them sees; pass at least one id more than it holds."
        )
    return False


def tokens_held(cache: Cache) -> int:
    """Tokens that a cache holds; 1 for one that has read some and keeps no count of them."""
    if counts_nothing(cache):
        return int(bool(tensors_of([vars(layer) for layer in cache.layers])))
    return int(cache.get_seq_length())


def counts_nothing(cache: Cache) -> bool:
    """Whether a cache is of states alone: plain generation then reads all ids as what comes after them."""
    return bool(cache.layers) and not any(hasattr(layer, "get_seq_length") for layer in cache.layers)


def floor(cache: Cache) -> int:
    """Tokens of each row that cannot be read again: what a window before their end would see is not all held."""
    held = tokens_held(cache)
    found = 0
    for layer in cache.layers:
        columns = layer.keys.shape[2] if length_of(layer) else held
        if columns < held:
            window = getattr(layer, "sliding_window", held)
            found = max(found, min(held, held - columns + window - 1))
    return found


def read_cache(cache: Cache, model: Any = None) -> tuple[RollbackCache, int]:
    """A private copy of a caller's cache that `check_cache` has passed.

    Sliding layers that have already dropped old columns get zeros in their place. The copy's `floor` says which tokens
    must stay so that no window ever comes to see them.

    Returns:
        The copy and the number of tokens in it.
    """
    if rests_elsewhere(cache):
        made: RollbackCache = OffloadedCache()
    else:
        made = state_cache(model) if keeps_states(model) else empty_cache(model)
    total = tokens_held(cache)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, STATE_LAYERS):
            vars(made.layers[index]).update(copy_of([state_of(layer)])[0])
        if length_of(layer):
            made.update(_full_width(layer.keys, total), _full_width(layer.values, total), index)
        if type(layer) in INDEXED_LAYERS:
            vars(made.layers[index]).update(copied(layer))
    if isinstance(made, StateCache):
        made.width = total
    made.floor = floor(cache)
    return made, total


def added_layers(model: Any, cache: Cache, count: int) -> list[Any]:
    """Empty layers as the model itself adds them to those that its config plans, so that a cache has `count`.

    Args:
        model: the target; cache: like the caller's, empty.
    """
    planned = list(cache.layers)
    if len(planned) >= count or getattr(cache, "layer_class_to_replicate", None) is not None or tokens_held(cache):
        return []
    tried = copy.deepcopy(cache)
    ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, **with_cache(model, tried))
    except Exception:
        return []

    def alike(layer: Any) -> Any:
        kind = type(layer), getattr(layer, "sliding_window", None)
        found = (one for one in planned if (type(one), getattr(one, "sliding_window", None)) == kind)
        return copy.deepcopy(next(found, None)) or DynamicLayer()

    return [alike(layer) for layer in tried.layers[len(planned) :]]


def write_cache(source: RollbackCache, target: Cache, start: int, more: Sequence[Any] = ()) -> None:
    """Append columns `start` onwards of `source` to the caller's cache, as a forward pass would have done.

    Everything is computed beside it; then all layers change in one step. Whatever is raised, Ctrl-C at any place among
    it, the caller's cache is as it was or complete. `source` is used up: its columns are let go as they are copied.

    Args:
        source, target, start: as above; more: layers to come behind those that `target` has, see `added_layers`.

    Raises:
        ValueError: a cache of fixed size has no room for so many tokens.
    """
    made, more = _beside(target), list(more)
    for index in range(len(source.layers)):
        layer, source.layers[index] = source.layers[index], RollbackLayer()
        closed = is_closed(layer)
        if not closed and hasattr(layer, "get_seq_length") and layer.is_initialized and layer.get_seq_length() > start:
            while getattr(made, "layer_class_to_replicate", None) is None and len(made.layers) <= index:
                made.layers.append(more.pop(0) if more else DynamicLayer())
            _check_room(made, index, layer.get_seq_length())
            made.update(*new_columns(made, index, layer, start), index)
            _let_go(made.layers[index])
        if closed or isinstance(layer, STATE_LAYERS):
            vars(made.layers[index]).update(state_of(layer))
        elif index < len(made.layers):
            extend_beside(made.layers[index], layer, start)
    steps, back = _exchange(target, made)
    try:
        _at_once(steps)
    except BaseException:
        _at_once(back)
        raise


def _at_once(steps: list[partial[Any]]) -> None:
    # One call into the interpreter's own C code, which runs nothing but C code: no signal is looked at on the way.
    deque(map(partial.__call__, steps), maxlen=0)


def _beside(cache: Cache) -> Cache:
    """A cache like the caller's that can be extended without the caller's changing."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in made.layers:
        if getattr(layer, "is_compileable", False):  # written in place
            for name, value in list(vars(layer).items()):
                if isinstance(value, torch.Tensor):
                    setattr(layer, name, value.clone())
    return made


def _let_go(layer: Any) -> None:
    """Of a window, only the window: what is left of a cut holds on to all of what was cut."""
    if getattr(layer, "is_sliding", False) and not getattr(layer, "is_compileable", False):
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def _exchange(old: Cache, new: Cache) -> tuple[list[partial[Any]], list[partial[Any]]]:
    """Steps that give a cache the contents of another one, and steps that take them back, each one call of C code."""
    steps: list[partial[Any]] = []
    back: list[partial[Any]] = []
    count = len(old.layers)
    pairs: list[tuple[Any, dict[str, Any]]] = [
        (layer, dict(vars(other))) for layer, other in zip(old.layers, new.layers, strict=False)
    ]
    pairs.append((old, {name: value for name, value in vars(new).items() if name != "layers"}))
    for owner, contents in pairs:
        mine = vars(owner)
        if getattr(owner, "is_compileable", False) and getattr(owner, "is_initialized", False):
            # Compiled code knows these tensors by their addresses.
            for name, value in contents.items():
                kept = mine.get(name)
                if isinstance(kept, torch.Tensor) and isinstance(value, torch.Tensor) and kept.shape == value.shape:
                    steps.append(partial(kept.copy_, value))
                    back.append(partial(kept.copy_, kept.clone()))
                    contents[name] = kept
        steps.append(partial(dict.update, mine, contents))
        back += [partial(dict.clear, mine), partial(dict.update, mine, dict(mine))]
    steps.append(partial(old.layers.extend, new.layers[count:]))
    back.append(partial(old.layers.__delitem__, slice(count, None)))
    return steps, back


def _check_room(cache: Cache, index: int, length: int) -> None:
    layer: Any = cache.layers[index] if index < len(cache.layers) else None
    if getattr(layer, "is_compileable", False) and not layer.is_sliding and length > layer.get_max_length():
        raise ValueError(
            f"{GENERATION_CACHE} of type {type(cache).__name__} has room for {layer.get_max_length()} tokens, and the "
            f"text has {length} before its last one; make it larger or ask for fewer tokens."
        )


def _full_width(states: torch.Tensor, total: int) -> torch.Tensor:
    missing = total - states.shape[2]
    if missing <= 0:
        return states
    zeros = states.new_zeros(states.shape[0], states.shape[1], missing, states.shape[3])
    return torch.cat([zeros, states], dim=2)


def _check_windows(cache: Cache, planned: list[Any] | None) -> None:
    """Layers that forget earlier than the model's would: plain generation sees less with them than the chain does."""
    for index, (layer, plan) in enumerate(zip(cache.layers, planned or [], strict=False)):
        window, wanted = (getattr(one, "sliding_window", None) for one in (layer, plan))
        if window is not None and (wanted is None or window < wanted) and hasattr(plan, "get_seq_length"):
            what = "keeps all tokens" if wanted is None else f"has a window of {wanted}"
            raise ValueError(
                f"layer {index} of {GENERATION_CACHE} keeps a window of {window} tokens, and that of the target "
                f"{what}; make the cache from the target's own config."
            )


def _check_whole(cache: Cache, lengths: list[int]) -> None:
    """Every layer must hold the same tokens: all of them, or the last ones that its window can see."""
    first = next(index for index, length in enumerate(lengths) if length)
    for index, (layer, length) in enumerate(zip(cache.layers, lengths, strict=True)):
        if not length:
            continue
        if length != lengths[first]:
            raise ValueError(
                f"the layers of {GENERATION_CACHE} hold different numbers of tokens (layer {first} {lengths[first]}, "
                f"layer {index} {length}); nobody can say which of them are right, so start without it."
            )
        window = getattr(layer, "sliding_window", None)
        needed = length if window is None else min(length, window - 1)
        for what, states in (("keys", layer.keys), ("values", layer.values)):
            if not needed <= states.shape[2] <= length:
                raise ValueError(
                    f"layer {index} of {GENERATION_CACHE} has {what} of {states.shape[2]} tokens where it should have "
                    f"{needed}; start without it."
                )


def _check_rows(cache: Cache, rows: int) -> None:
    for index, layer in enumerate(cache.layers):
        found = {states.shape[0] for states in (layer.keys, layer.values)} if length_of(layer) else {rows}
        if found != {rows}:
            raise ValueError(
                f"layer {index} of {GENERATION_CACHE} holds {' and '.join(map(str, sorted(found)))} rows, and the "
                f"prompt has {rows}; a cache needs a row for each (num_return_sequences counts)."
            )
