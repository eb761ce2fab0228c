# SPDX-License-Identifier: Apache-2.0
"""Multi-token-prediction layers, which some models bring along and transformers loads apart from them."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import cache_utils, modeling_layers

from .compatibility import ATTENTION_LAYERS
from .mtp_tensors import load_named, read_from, whole_checkpoint
from .release import CACHE_NAMES, inner_model
from .whole import whole_part

_MODEL: Any = getattr(modeling_layers, "MtpModel", None)
_CACHE = getattr(cache_utils, "MtpCache", None)
_LENT = ("embed_tokens", "shared_head")
"""The model's own, as `MtpModel` calls them."""
_loaded: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class MtpLayers:
    """The layers, run one at a time.

    Layer k reads, at each position, what the layer before it (the model itself before the first) said there and the
    token k + 1 places further on, and says which token comes after that one.

    Args:
        model: transformers' `MtpModel` of some model.

    Raises:
        ValueError: one keeps a state that cannot be taken back after a rejected draft.
    """

    def __init__(self, model: Any) -> None:
        odd = sorted(set(getattr(model.config, "layer_types", None) or ()) - ATTENTION_LAYERS)
        if odd:
            raise ValueError(
                f"these multi-token-prediction layers keep a state ({', '.join(odd)}) that cannot be taken back "
                "after a rejected draft."
            )
        self.model = model
        self.count = len(model.layers)
        self.width = int(model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return next(torch.device(parameter.device) for parameter in self.model.layers.parameters())

    def take_whole_parts(self, keeps: bool) -> None:
        """Compute with an embedding and an lm_head of this process's own, where processes share the model's.

        Args:
            keeps: as for `whole_part`, which is collective.
        """
        owned = self.model.__dict__.setdefault("_shared_parts", {n: getattr(self.model, n) for n in _LENT})
        for name, part in owned.items():
            setattr(self.model, name, whole_part(part, keeps=keeps))

    def new_cache(self) -> Any:
        """An empty cache for one row; without a config its layers keep everything and can be cut anywhere."""
        assert _CACHE is not None
        return _CACHE()

    def held(self, cache: Any, layer: int) -> int:
        """Columns that a layer has read."""
        return int(cache.layers[layer].get_seq_length()) if layer < len(cache.layers) else 0

    def shrink(self, cache: Any, layer: int, length: int) -> None:
        """Keep a layer's first columns."""
        held = self.held(cache, layer)
        if held > length:
            cache.layers[layer].crop(length - held)

    def step(self, layer: int, hidden: torch.Tensor, tokens: list[int], first: int, cache: Any) -> torch.Tensor:
        """Run one layer over the end of one row.

        Args:
            hidden: `[N, H]`, what the layer before it said; tokens: N ids; first: position of the first of them.

        Returns:
            `[N, H]`.
        """
        positions = torch.arange(first, first + len(tokens), device=self.device)[None]
        run = getattr(self.model, "forward_layer", None) or partial(_forward_layer, self.model)
        found: torch.Tensor = run(
            layer,
            hidden[None].to(self.device),
            positions,
            cache,
            input_ids=torch.tensor([tokens], device=self.model.embed_tokens.weight.device),
        )
        return found[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[V]` of the next token, from `[H]`."""
        found: torch.Tensor = self.model._project_to_logits(hidden[None, None])
        return found[0, 0].float()


def _forward_layer(
    model: Any, layer: int, hidden: torch.Tensor, positions: torch.Tensor, cache: Any, *, input_ids: torch.Tensor
) -> torch.Tensor:
    """The `forward_layer` of later releases, for those whose `MtpModel` only runs all of its layers at once."""
    tokens = model.embed_tokens(input_ids).to(hidden.device)
    rotary = model.rotary_emb
    block = model.layers[layer]
    handed = {name: cache for name in CACHE_NAMES if name in signature(block.forward).parameters}
    said: torch.Tensor = block(
        tokens,
        hidden,
        position_embeddings=None if rotary is None else rotary(tokens, position_ids=positions),
        position_ids=positions,
        **handed,
        **model.create_masks_for_mtp_layer(layer, tokens, cache, positions),
    )
    return model.shared_post_norm(said) if model.use_shared_post_norm else said


@torch.no_grad()
def mtp_layers(target: Any) -> MtpLayers:
    """The layers that lie in a target's own checkpoint; loaded once a model.

    transformers loads those of models whose config tells of them. Others, and those it does not find, are looked for
    among the tensors of a local checkpoint, see `mtp_tensors`.

    Raises:
        ValueError: it has none, or they cannot be loaded or used.
    """
    inner = inner_model(target)
    if inner not in _loaded:
        if _MODEL is None:
            raise ValueError("this release of transformers has no multi-token-prediction layers")
        made = _load(inner).eval()
        _try(made, type(inner).__name__)
        _loaded[inner] = made
    return MtpLayers(_loaded[inner])


def _try(made: Any, kind: str) -> None:
    """Run every layer once, so that what cannot run here is refused before a text is begun."""
    layers = MtpLayers(made)
    hidden, cache = torch.zeros(1, layers.width, device=layers.device, dtype=made.dtype), layers.new_cache()
    try:
        for layer in range(layers.count):
            hidden = layers.step(layer, hidden, [0], layer + 1, cache)
        layers.logits(hidden[-1])
    except Exception as error:
        raise ValueError(
            f"the multi-token-prediction layers of {kind} cannot be run one at a time: {' '.join(str(error).split())}"
        ) from error


def _load(model: Any) -> Any:
    kind, named = type(model).__name__, model.config.name_or_path
    told = bool(getattr(model.config.get_text_config(), "num_mtp_layers", None))
    device = next(torch.device(parameter.device) for parameter in model.get_decoder().layers[-1].parameters())
    reason: Exception | None = None
    if told:
        # From the folder in the hub's cache where all is there: transformers would ask the hub for news of an id.
        here = whole_checkpoint(model.config)
        try:
            source = model if here is None else read_from(model, str(here))
            return _MODEL.from_pretrained(source, device_map={"": device})
        except Exception as error:
            reason = error
    try:
        found = load_named(_MODEL, model, device)
    except Exception as error:
        found, reason = None, reason or error
    if found is not None:
        return found
    if reason is None:
        raise ValueError(
            f"{kind} has no multi-token-prediction layers (its config has no num_mtp_layers, and "
            f"{named!r} no tensors of such layers)"
        )
    raise ValueError(
        f"the multi-token-prediction layers of {kind} could not be loaded from {named!r}: "
        f"{' '.join(str(reason).split())}"
    ) from reason
