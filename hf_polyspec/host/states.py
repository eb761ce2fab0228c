# SPDX-License-Identifier: Apache-2.0
"""Caches with layers whose state is carried on instead of being kept token by token, and pictures of such states.

A recurrent state and the window of a convolution stand for all that was read, and nothing of it can be cut off again.
They can be copied, row by row, and put back. Which attributes of a layer make up its state is found by looking at a
layer that has read nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from .cache import RollbackCache, RollbackLayer
from .carried import carried_by, is_holder, tensors_in
from .indexed import CROPPED_LAYERS, INDEXED_LAYERS, RollbackIndexedLayer
from .release import inner_model
from .scans import Heard
from .walking import once_of

State = list[dict[str, Any]]
"""What the state layers of a cache hold, one after another: tensors whose first dimension is the row, and flags."""

# Releases before 5.17 had no such layers.
STATE_LAYERS: tuple[Any, ...] = tuple(
    kind for name in ("LinearAttentionCacheLayerMixin",) if (kind := getattr(cache_utils, name, None)) is not None
)
_StateLayer: Any = getattr(cache_utils, "LinearAttentionLayer", object)


class RollbackStateLayer(_StateLayer, RollbackLayer):
    """A layer that keeps keys and values beside its state."""

    is_compileable = False

    def __init__(self, number_of_states: int = 1) -> None:
        RollbackLayer.__init__(self)
        _StateLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # Keys and values come by place, states by name, in every release that has such layers.
        owner: Any = RollbackLayer if args else _StateLayer
        owner.lazy_initialization(self, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        RollbackLayer.crop(self, tokens_to_remove)


def planned_layers(model: Any) -> list[Any]:
    """The empty layers that transformers makes for a model; none where its config does not tell."""
    try:
        return list(DynamicCache(config=inner_model(model).config).layers)
    except Exception:
        return []


_plans: WeakKeyDictionary[Any, tuple[list[dict[str, Any]], list[Any]]] = WeakKeyDictionary()


def layer_plan(model: Any) -> list[Any]:
    """`planned_layers`, to look at only: made once for as long as the model's config says the same."""
    return once_of(model, "planned layers", _layer_plan, of_modules=False)


def _layer_plan(model: Any) -> list[Any]:
    inner, configs = inner_model(model), _configs(model)
    if not configs:
        return planned_layers(model)
    said = [
        {name: list(value) if isinstance(value, list) else value for name, value in vars(config).items()}
        for config in configs
    ]
    known = _plans.get(inner)
    if known is None or known[0] != said:
        known = _plans[inner] = said, planned_layers(model)
    return known[1]


def plain_settings(model: Any) -> list[dict[str, Any]]:
    """Numbers and words in a model's config, and in that of its text."""
    return [
        {name: value for name, value in vars(config).items() if isinstance(value, (bool, int, float, str))}
        for config in _configs(model)
    ]


def _configs(model: Any) -> list[Any]:
    config: Any = getattr(inner_model(model), "config", None)
    if not hasattr(config, "get_text_config"):
        return []
    text = config.get_text_config(decoder=True)
    return [config] if text is config else [config, text]


def keeps_states(model: Any) -> bool:
    """Whether a model carries a state on, in some layers of its cache or elsewhere.

    One in modules counts where the cache plans for it: else masks are laid out for layers that hold nothing.
    """
    if any(isinstance(layer, STATE_LAYERS) or is_closed(layer) for layer in layer_plan(model)):
        return True
    carried = carried_by(model)
    return carried.argument is not None or carried.cache_class is not None


def is_closed(layer: Any) -> bool:
    """Whether a layer is of a class of the model's own: all that it holds is taken for a state, of rows alike."""
    own = type(layer).__module__.startswith("transformers.models.")
    return own and isinstance(layer, CacheLayerMixin) and not isinstance(layer, STATE_LAYERS)


def unknown_layer(model: Any) -> str | None:
    """The class of a layer of the model's cache that is neither keys and values nor a state, None where there is none.

    Models that bring a cache class of their own are told apart by the attributes it has on top of the usual ones. An
    indexer's keys without their positions, as some releases keep them, are read otherwise by passes over several tokens
    where layers with a state stand beside them.
    """
    planned = layer_plan(model)
    states = any(isinstance(layer, STATE_LAYERS) for layer in planned)
    for layer in planned:
        unplaced = states and type(layer) in INDEXED_LAYERS and not hasattr(layer, "indexer_position_ids")
        known = isinstance(layer, STATE_LAYERS) or type(layer) in CROPPED_LAYERS or is_closed(layer)
        if unplaced or not known:
            return type(layer).__name__
    return None


class StateCache(RollbackCache):
    """A `RollbackCache` some of whose layers keep a state.

    Attributes:
        width: columns that were fed, for a cache without keys and values, which cannot be measured.
        even: whether all rows must have been fed as many columns, because some layers count them once for all.
        carried: what the model carries on besides; argument, places: what that is now.
        heard: where what passes do to states is written down, None for nowhere.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.carried = carried_by(model)
        # A cache of the model's own class counts layers by what it holds.
        planned = planned_layers(model) if self.carried.cache_class is None else []
        self.layers = [_own(layer) for layer in planned]
        self.stateful: list[Any] = [one for one in self.layers if isinstance(one, STATE_LAYERS) or is_closed(one)]
        self.even = any(is_closed(layer) for layer in self.layers)
        self.argument: Any = None
        self.places: list[Any] = [None for _ in self.carried.places]
        self._nothing: State = self.state()
        self.width = 0
        self.heard: Heard | None = None

    @property
    def rollable(self) -> list[RollbackLayer]:
        # Some families plan keys and values for layers that never get any.
        return [layer for layer in self.layers if isinstance(layer, RollbackLayer) and layer.is_initialized]

    @property
    def measurable(self) -> bool:
        """Whether some layer knows how many columns it has read."""
        return bool(self.rollable)

    @property
    def attends(self) -> bool:
        """Whether some layer is looked at by columns that come later, and a mask says which."""
        return self.measurable or self.even

    @property
    def length(self) -> int:
        return super().length if self.measurable else self.width

    def realign(self, lengths: list[int], keep: list[int]) -> int:
        self.width = super().realign(lengths, keep) if self.measurable else max(keep)
        return self.width

    def keep_rows(self, rows: list[int]) -> None:
        super().keep_rows(rows)
        self.put(rows_of(self.state(copied=False), rows))

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **more: Any) -> Any:
        if self.heard is not None:
            self.heard.windows.append((layer_idx, state_idx, conv_states))
        return super().update_conv_state(conv_states, layer_idx, state_idx, **more)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **more: Any
    ) -> Any:
        if self.heard is not None:
            before = self.layers[layer_idx].recurrent_states[state_idx]
            self.heard.wrote(layer_idx, state_idx, before, recurrent_states)
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **more)

    def state(self, copied: bool = True) -> State:
        """What the state layers hold, as a copy or as it is."""
        found = [state_of(layer) for layer in self.stateful]
        if self.carried.any:
            names = ("argument", "places", *self.carried.attributes)
            found.append({name: vars(self)[name] for name in names})
        return copy_of(found) if copied else found

    def put(self, state: State) -> None:
        """Make the state layers hold this, which is then theirs: passes write into it."""
        owners = [*self.stateful, self] if self.carried.any else self.stateful
        for owner, values in zip(owners, state, strict=True):
            vars(owner).update(values)

    def forget(self) -> None:
        """Make the state layers hold what they do before the first pass."""
        self.put(copy_of(self._nothing))


def state_cache(model: Any) -> StateCache:
    """An empty cache for a model with a state; one of the model's own class, where it wants no other."""
    own = carried_by(model).cache_class
    return StateCache(model) if own is None else _mixed(own)(model)


def _mixed(own: type[Any]) -> type[StateCache]:
    if own not in _made:
        _made[own] = type(f"Rollback{own.__name__}", (StateCache, own), {})
    return _made[own]


_made: dict[type[Any], type[StateCache]] = {}


def _own(layer: Any) -> Any:
    if isinstance(layer, STATE_LAYERS):
        return RollbackStateLayer(layer.number_of_states) if hasattr(layer, "get_seq_length") else layer
    if type(layer) in INDEXED_LAYERS:
        return RollbackIndexedLayer()
    if is_closed(layer):
        return layer
    # A dummy stays what it is; windows get full layers, as everywhere (see `cache`).
    return RollbackLayer() if hasattr(layer, "get_seq_length") else layer


def empty_cache(model: Any) -> RollbackCache:
    """The cache that a model without a state begins with.

    Layers are added as the model asks for them, unless some are of another kind than keys and values alone.
    """
    cache = RollbackCache()
    if INDEXED_LAYERS and any(type(layer) in INDEXED_LAYERS for layer in layer_plan(model)):
        cache.layers = [_own(layer) for layer in planned_layers(model)]
    return cache


def state_of(layer: Any) -> dict[str, Any]:
    """A layer's attributes that it has because it keeps a state, as they are."""
    if is_closed(layer) or not hasattr(layer, "get_seq_length"):
        return dict(vars(layer))
    names = vars(_StateLayer(layer.number_of_states))
    return {name: value for name, value in vars(layer).items() if name in names and name not in ("device", "dtype")}


def _mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(one, function) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(one, function) for one in value)
    if is_holder(value):
        made = copy.copy(value)
        vars(made).update({name: _mapped(one, function) for name, one in vars(value).items()})
        return made
    return value


def copy_of(state: State) -> State:
    """The same in tensors of its own."""
    copied: State = _mapped(state, torch.clone)
    return copied


def rows_of(state: State, rows: Sequence[int]) -> State:
    """Some rows of a state, in tensors of their own."""
    picked: State = _mapped(state, lambda t: t[torch.tensor(rows, device=t.device)] if _by_row(t) else t)
    return picked


def set_rows(state: State, other: State, rows: Sequence[int]) -> None:
    """Put some rows of another state into a state."""
    for into, source in zip(tensors_of(state), tensors_of(other), strict=True):
        if _by_row(into):
            index = torch.tensor(rows, device=into.device)
            into[index] = source[index]


def _by_row(tensor: torch.Tensor) -> bool:
    """Whether a tensor has an entry a row; a single number counts columns."""
    return tensor.dim() > 1


def tensors_of(state: State) -> list[torch.Tensor]:
    """All tensors of a state, in an order that depends on the layers only."""
    return tensors_in(state)


def bytes_of(state: State) -> int:
    """Memory that a state takes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(state))
