# SPDX-License-Identifier: Apache-2.0
"""How wide plain generation's attention maps would be: its cache, played through with one number a token."""

from __future__ import annotations

import copy
from typing import Any

import torch

from .release import inner_model


class PlainCache:
    """What the cache that generate() prepared would show of itself at every step of plain generation.

    Args:
        cache: generate()'s or the caller's, as it is before the call; it stays so.
        model: the target.
        pieces: columns that are fed one after another to read the prompt; later steps feed one each.
        asked: whether `step` will be called.
    """

    def __init__(self, cache: Any, model: Any, pieces: list[int], asked: bool = True) -> None:
        if not asked:
            return
        layers = [] if cache is None else cache.layers
        # Without layers it makes them as the model asks, and those keep everything.
        self._layers = [_small(layer) for layer in layers]
        self._grows = not layers or getattr(cache, "layer_class_to_replicate", None) is not None
        config = inner_model(model).config.get_text_config(decoder=True)
        self._kinds = list(getattr(config, "layer_types", None) or [])
        self._pieces = pieces
        self._steps: list[list[tuple[int, int] | None]] = []

    def step(self, index: int, place: int, maps: int) -> tuple[int, int] | None:
        """Columns of a map at a step, and the place in the text of its first one.

        Columns may reach behind the end of the text, where they hold zeros. None where every token has one column.

        Args:
            index: the step's; place: the map's among those of a pass; maps: how many a pass hands out.
        """
        while len(self._steps) <= index:
            for fed in [1] if self._steps else self._pieces:
                sizes = [self._feed(small, fed) for small in self._layers]
            self._steps.append(sizes)
        sizes = self._steps[index]
        source = self._source(self._layer(place, maps))
        return None if source is None else sizes[source]

    def _layer(self, place: int, maps: int) -> int:
        """The layer that a map is of: layers without keys hand out none in models that mix both kinds."""
        if maps >= len(self._layers):
            return place
        attending = [index for index, layer in enumerate(self._layers) if layer is not None]
        return attending[place] if len(attending) == maps else place

    def _source(self, layer: int) -> int | None:
        """The layer whose keys and values a layer reads: its own, or those of the last one of its kind that has any."""
        if layer < len(self._layers) and self._layers[layer] is not None:
            return layer
        if self._grows:
            return None
        kinds = self._kinds
        for index in range(min(layer, len(self._layers)) - 1, -1, -1):
            same = layer >= len(kinds) or kinds[index] == kinds[layer]
            if self._layers[index] is not None and same:
                return index
        return None

    @staticmethod
    def _feed(layer: Any, fed: int) -> tuple[int, int] | None:
        if layer is None:
            return None
        width, offset = (int(number) for number in layer.get_mask_sizes(fed))
        like = torch.empty(0) if layer.keys is None else layer.keys
        states = like.new_zeros(1, 1, fed, 1)
        layer.update(states, states)
        return width, offset


def _small(layer: Any) -> Any:
    """A layer with the same lengths and one number a token; None for one that holds nothing of its own."""
    if not hasattr(layer, "get_mask_sizes"):
        return None
    made = copy.copy(layer)
    for name, value in list(vars(layer).items()):
        if isinstance(value, torch.Tensor):
            setattr(made, name, value.new_zeros(1, 1, value.shape[2], 1) if value.dim() == 4 else value.clone())
    return made
