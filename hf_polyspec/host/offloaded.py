# SPDX-License-Identifier: Apache-2.0
"""A cache that rests in the host's memory, as transformers' offloaded ones do: layers visit the device.

transformers moves a layer there and back in every pass. Here the columns that are held go to the device, and only new
ones come back, so that a pass over a block moves no more than one over a token; all cutting is done where they rest.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import TARGET, UncheckableError
from .cache import RollbackCache, RollbackLayer
from .release import inner_model
from .states import empty_cache, keeps_states

_REST = torch.device("cpu")


class OffloadedLayer(RollbackLayer):
    """Keys and values in the host's memory; `visited` is the device of the pass that wrote them last."""

    visited: torch.device | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both `[B, H, F, D]`; returned are those of all columns, on the device of the new ones."""
        self.visited = key_states.device
        super().update(key_states.to(_REST), value_states.to(_REST))
        held = self.get_seq_length() - key_states.shape[-2]
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        # What has just come from there need not go back.
        return (
            torch.cat([keys[:, :, :held].to(self.visited), key_states], dim=2),
            torch.cat([values[:, :, :held].to(self.visited), value_states], dim=2),
        )


class OffloadedCache(RollbackCache):
    """A cache of `OffloadedLayer`s."""

    lends = False

    def __init__(self) -> None:
        super().__init__()
        self.layer_class_to_replicate = OffloadedLayer


def rests_elsewhere(cache: Any) -> bool:
    """Whether a caller's cache keeps its layers in the host's memory."""
    return bool(getattr(cache, "offloading", False))


def check_offloaded(cache: Any, model: Any) -> None:
    """Refuse an offloaded cache where the target keeps more than keys and values.

    Raises:
        UncheckableError: names the class.
    """
    encodes = getattr(inner_model(model).config, "is_encoder_decoder", False)
    if rests_elsewhere(cache) and (encodes or keeps_states(model) or empty_cache(model).layers):
        raise UncheckableError(
            f"{TARGET} ({type(inner_model(model)).__name__}) keeps more in its cache than keys and values of one "
            "text, and assistant_models move no more than those to the host's memory; pass a cache without offloading.",
            TARGET,
        )


def at_home(cache: Any) -> None:
    """Wait until what an offloaded cache has asked for ahead of time is there."""
    stream = getattr(cache, "prefetch_stream", None)
    if stream is not None:
        stream.synchronize()


def new_columns(made: Any, index: int, layer: Any, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[B, H, F, D]` from a column on, where the cache that they are for wants them."""
    keys, values = layer.keys[:, :, start:], layer.values[:, :, start:]
    visited = getattr(layer, "visited", None)
    if visited is None:
        return keys, values
    if index < len(made.layers):
        made.layers[index].prefetch()
    return keys.to(visited), values.to(visited)
