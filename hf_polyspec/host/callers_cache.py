# SPDX-License-Identifier: Apache-2.0
"""Caches that the caller brings: looked at before any work, copied, and extended once, in one step, at the end."""

from __future__ import annotations

import copy
from collections import deque
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import StaticCache
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .cache import RollbackCache, RollbackLayer
from .carried import check_continued
from .indexed import CROPPED_LAYERS, INDEXED_LAYERS, copied
from .offloaded import OffloadedCache, at_home, check_offloaded, new_columns, rests_elsewhere
from .release import GENERATION_CACHE, inner_model, with_cache
from .states import (
    STATE_LAYERS,
    StateCache,
    copy_of,
    empty_cache,
    is_closed,
    keeps_states,
    state_cache,
    state_of,
    tensors_of,
)

Form = tuple[Any, ...]
"""Of a layer: heads and size of its keys, the same of its values, dtype and device."""


def check_cache(cache: Any, model: Any, rows: int) -> None:
    """Refuse a cache whose contents a chain could not read or extend, or that the target did not write as it is.

    Args:
        cache: the caller's, or the one that generate() prepared; None for none.
        model: the target.
        rows: of the batch.

    Raises:
        ValueError: names the class, the layer and the numbers that do not fit.
    """
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise ValueError(f"{GENERATION_CACHE} must be a transformers Cache, got {type(cache).__name__}.")
    check_offloaded(cache, model)
    at_home(cache)
    lengths = [_length(layer) for layer in cache.layers]
    check_continued(model, filled=any(lengths))
    if any(lengths) or type(cache) not in (DynamicCache, StaticCache):
        known = (layer for layer in cache.layers if not isinstance(layer, STATE_LAYERS))
        odd = next((layer for layer in known if type(layer) not in CROPPED_LAYERS), None)
        if odd is not None:
            raise ValueError(
                f"{GENERATION_CACHE} of type {type(cache).__name__} has {type(odd).__name__} layers, which cannot be "
                f"rolled back after a rejected draft; pass a DynamicCache, or leave {GENERATION_CACHE} out."
            )
    planned = _planned_layers(model)
    _check_windows(cache, planned)
    if any(lengths):
        _check_whole(cache, lengths)
        _check_rows(cache, rows)
        _check_form(cache, model, planned)


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
    if _counts_nothing(cache):
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
    if _counts_nothing(cache):
        return int(bool(tensors_of([vars(layer) for layer in cache.layers])))
    return int(cache.get_seq_length())


def _counts_nothing(cache: Cache) -> bool:
    """Whether a cache is of states alone: plain generation then reads all ids as what comes after them."""
    return bool(cache.layers) and not any(hasattr(layer, "get_seq_length") for layer in cache.layers)


def floor(cache: Cache) -> int:
    """Tokens of each row that cannot be read again: what a window before their end would see is not all held."""
    held = tokens_held(cache)
    found = 0
    for layer in cache.layers:
        columns = layer.keys.shape[2] if _length(layer) else held
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
        if _length(layer):
            made.update(_full_width(layer.keys, total), _full_width(layer.values, total), index)
        if type(layer) in INDEXED_LAYERS:
            vars(made.layers[index]).update(copied(layer))
    if isinstance(made, StateCache):
        made.width = total
    made.floor = floor(cache)
    return made, total


def write_cache(source: RollbackCache, target: Cache, start: int) -> None:
    """Append columns `start` onwards of `source` to the caller's cache, as a forward pass would have done.

    Everything is computed beside it; then all layers change in one step. Whatever is raised, Ctrl-C at any place among
    it, the caller's cache is as it was or complete. `source` is used up: its columns are let go as they are copied.

    Raises:
        ValueError: a cache of fixed size has no room for so many tokens.
    """
    made = _beside(target)
    for index in range(len(source.layers)):
        layer, source.layers[index] = source.layers[index], RollbackLayer()
        closed = is_closed(layer)
        if not closed and hasattr(layer, "get_seq_length") and layer.is_initialized and layer.get_seq_length() > start:
            while getattr(made, "layer_class_to_replicate", None) is None and len(made.layers) <= index:
                made.layers.append(DynamicLayer())  # the model itself adds layers to those that its config plans
            _check_room(made, index, layer.get_seq_length())
            made.update(*new_columns(made, index, layer, start), index)
            _let_go(made.layers[index])
        if closed or isinstance(layer, STATE_LAYERS):
            vars(made.layers[index]).update(state_of(layer))
        elif index < len(made.layers) and type(made.layers[index]) in INDEXED_LAYERS:
            vars(made.layers[index]).update(copied(layer))
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


def _length(layer: Any) -> int:
    """Tokens a layer has read; 0 for one that reads another layer's keys and values."""
    return int(layer.get_seq_length()) if getattr(layer, "is_initialized", False) and layer.keys is not None else 0


def _full_width(states: torch.Tensor, total: int) -> torch.Tensor:
    missing = total - states.shape[2]
    if missing <= 0:
        return states
    zeros = states.new_zeros(states.shape[0], states.shape[1], missing, states.shape[3])
    return torch.cat([zeros, states], dim=2)


def _planned_layers(model: Any) -> list[Any] | None:
    """The empty layers that transformers makes for a model, None where its config does not tell."""
    try:
        return list(DynamicCache(config=inner_model(model).config).layers)
    except Exception:
        return None


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
        found = {states.shape[0] for states in (layer.keys, layer.values)} if _length(layer) else {rows}
        if found != {rows}:
            raise ValueError(
                f"layer {index} of {GENERATION_CACHE} holds {' and '.join(map(str, sorted(found)))} rows, and the "
                f"prompt has {rows}; a cache needs a row for each (num_return_sequences counts)."
            )


def _form(layer: Any, away: bool = False) -> Form | None:
    if not _length(layer):
        return None
    keys, values = layer.keys, layer.values
    device = layer.device if away else keys.device  # of an offloaded layer, where it is fetched to
    return keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], keys.dtype, values.dtype, device


_forms: WeakKeyDictionary[Any, list[Form | None]] = WeakKeyDictionary()


def _check_form(cache: Cache, model: Any, planned: list[Any] | None) -> None:
    """Refuse keys and values of another model, dtype or device.

    What the config lets expect, or what was measured before, is believed where it fits. Otherwise the target is asked:
    it reads one token into an empty cache.
    """
    found = _trimmed([_form(layer, rests_elsewhere(cache)) for layer in cache.layers])
    if found in (_expected(model, planned), _forms.get(model)):
        return
    true = _measured(model)
    if true is None or found == true:
        return
    for index in range(max(len(found), len(true))):
        one, other = (forms[index] if index < len(forms) else None for forms in (found, true))
        if one != other:
            raise ValueError(
                f"layer {index} of {GENERATION_CACHE} holds {_told(one)}, and the target keeps {_told(other)} there; "
                "pass a cache that this model has filled."
            )


def _trimmed(forms: list[Form | None]) -> list[Form | None]:
    while forms and forms[-1] is None:
        forms.pop()
    return forms


def _told(form: Form | None) -> str:
    if form is None:
        return "no tokens"
    heads, size, value_heads, value_size, dtype, _, device = form
    values = "" if (heads, size) == (value_heads, value_size) else f" (values {value_heads} of {value_size})"
    return f"{heads} heads of {size}{values} in {dtype} on {device}"


def _expected(model: Any, planned: list[Any] | None) -> list[Form | None] | None:
    """Forms as most models have them, by their config; None where it does not tell."""
    weight = getattr(inner_model(model).get_input_embeddings(), "weight", None)
    if planned is None or weight is None:
        return None
    place = weight.dtype, weight.dtype, weight.device
    config = inner_model(model).config.get_text_config(decoder=True)
    try:
        layers = getattr(config, "per_layer_config", None) or [config] * len(planned)
        shapes = [_shape(layer) for layer in layers]
    except Exception:  # a config of another kind
        return None
    return _trimmed(
        [
            (*shape, *shape, *place) if hasattr(layer, "get_seq_length") else None
            for layer, shape in zip(planned, shapes, strict=False)
        ]
    )


def _shape(config: Any) -> tuple[int, int]:
    """Heads of a layer's keys, and their size."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads), int(size)


@torch.no_grad()
def _measured(model: Any) -> list[Form | None] | None:
    """Forms of what the model keeps of one token; None where it cannot be asked."""
    cache = empty_cache(model)
    weight = getattr(model.get_input_embeddings(), "weight", None)
    device = "cpu" if weight is None else weight.device
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=True, **with_cache(model, cache))
    except Exception:
        return None
    _forms[model] = _trimmed([_form(layer) for layer in cache.layers])
    return _forms[model]
