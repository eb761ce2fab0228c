# SPDX-License-Identifier: Apache-2.0
"""Assistants that make no keys and values of their own (Gemma 4's): they read those of the model they draft for.

Such a model is fed the embedding of the last token beside the hidden state before it, all of one position, and says
the next token and what the hidden state there might be.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .ranks import is_split
from .release import inner_model, input_device, parameters_of, with_cache
from .shared_keys import Shared
from .whole import whole_part

_READS = {"shared_kv_states", "inputs_embeds"}
_WIDTH = "backbone_hidden_size"
_layers: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()
_tried: WeakKeyDictionary[Any, WeakKeyDictionary[Any, bool]] = WeakKeyDictionary()


def is_keyless(model: Any) -> bool:
    """Whether a model reads the keys and values of another one, and has a place for its hidden states."""
    if not isinstance(model, nn.Module) or getattr(getattr(model, "config", None), _WIDTH, None) is None:
        return False
    return parameters_of(type(model).forward).keys() >= _READS


class Keyless:
    """Such an assistant under a model.

    Args:
        model: the assistant; above: the model it reads, whose embedding it is fed with.

    Attributes:
        layers: by kind, the layer of the cache of the level above that is read.
        width: of the hidden states it reads.

    Raises:
        ValueError: in one sentence, why the two do not fit.
    """

    def __init__(self, model: Any, above: Any) -> None:
        self.model, other = model, inner_model(above)
        self.width = int(getattr(model.config, _WIDTH))
        wide = int(other.config.get_text_config(decoder=True).hidden_size)
        if self.width != wide:
            raise ValueError(
                f"it reads hidden states of width {self.width}, and those of the level above it are {wide} wide"
            )
        if is_split(other):
            raise ValueError("the keys and values of that are spread over processes")
        self.layers = layers_that_share(other)
        self.embedding = whole_part(other.get_input_embeddings())
        self._home = input_device(other)
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        self._window = 0 if window is None else int(window) + 1
        self._check(other)

    def taken(self, shared: Shared) -> Shared:
        """Keys and values where the assistant is, and of its type; of windows, no more than a token there sees."""
        kind = next(self.model.parameters())
        taken = {}
        for name, pair in shared.items():
            first = -self._window if self._window and name.startswith("sliding") else 0
            keys, values = (states[:, :, first:].to(kind) for states in pair)
            taken[name] = keys, values
        return taken

    @torch.no_grad()
    def step(
        self, token: int, hidden: torch.Tensor, shared: Shared, position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a token.

        Args:
            token: its id; hidden: `[H]`, the hidden state before it.
            shared: keys and values of what came before the draft, as `taken`.
            position: of the first token behind those, whichever of the draft's is read.

        Returns:
            `[V]`, logits of the next token, and `[H]`, the hidden state at this one as the assistant sees it.
        """
        kind = next(self.model.parameters())
        embedded = self.embedding(torch.tensor([[token]], device=self._home)).to(kind)
        output = self.model(
            inputs_embeds=torch.cat([embedded, hidden[None, None].to(kind)], dim=-1),
            attention_mask=None,
            position_ids=torch.tensor([[position]], device=kind.device),
            shared_kv_states=shared,
            use_cache=False,
            return_dict=True,
        )
        logits: torch.Tensor = output.logits[0, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), output.last_hidden_state[0, -1]

    def _check(self, above: Any) -> None:
        """Try it once on keys and values as the level above makes them."""
        known = _tried.setdefault(self.model, WeakKeyDictionary())
        if above in known:
            return
        hidden = torch.zeros(self.width, device=input_device(above))
        try:
            self.step(0, hidden, self.taken(_first_token(above)[1]), 1)
        except Exception as error:
            raise ValueError(
                f"it cannot read the keys and values of that ({type(above).__name__}): {' '.join(str(error).split())}"
            ) from error
        known[above] = True


def layers_that_share(model: Any) -> dict[str, int]:
    """By kind, the layers of a model's cache whose keys and values it hands out; asked on one token, once a model.

    Raises:
        ValueError: it hands out none.
    """
    if model not in _layers:
        cache, shared = _first_token(model)
        found = {
            kind: place
            for kind, (keys, _) in shared.items()
            for place, layer in enumerate(cache.layers)
            if getattr(layer, "keys", None) is keys
        }
        if not shared or found.keys() != shared.keys():
            raise ValueError(f"that ({type(model).__name__}) does not hand out its keys and values")
        _layers[model] = found
    return _layers[model]


@torch.no_grad()
def _first_token(model: Any) -> tuple[Any, Shared]:
    """A cache with one token, and what the model hands out of it; nothing where it does not know what is asked."""
    cache = DynamicCache()
    ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    try:
        output = model(
            input_ids=ids, use_cache=True, return_dict=True, return_shared_kv_states=True, **with_cache(model, cache)
        )
    except Exception:
        return cache, {}
    return cache, dict(getattr(output, "shared_kv_states", None) or {})
