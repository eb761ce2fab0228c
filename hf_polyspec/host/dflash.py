# SPDX-License-Identifier: Apache-2.0
"""Block-diffusion drafters (DFlash), as transformers has them: one pass says what every masked place of a block holds.

Such a model has no embedding and no lm_head; both are those of the model whose hidden states it reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import cache_utils
from transformers.cache_utils import DynamicCache

from .release import inner_model, input_device, named_cache, parameters_of
from .whole import whole_part

_CACHE = getattr(cache_utils, "DFlashCache", None)
_SETTINGS = ("block_size", "mask_token_id", "target_layer_ids")
_OWN = "dflash_config"
"""Where the configs of drafters that bring code of their own have settings."""


@dataclass(frozen=True)
class _Form:
    """How a drafter is called: what its forward calls the block's embeddings and the hidden states, and what else it
    is given."""

    embeds: str
    context: str
    more: Mapping[str, Any] = field(default_factory=dict)


_HOSTS = _Form("noise_embeds", "context_hidden_states")
_FORMS = (_HOSTS, _Form("noise_embedding", "target_hidden", {"use_cache": True, "is_causal": False}))
"""transformers' own classes, and the code that the drafters of the method's authors bring along."""


def _form_of(model: Any) -> _Form | None:
    if not isinstance(model, nn.Module):
        return None
    takes = parameters_of(type(model).forward).keys()
    return next((form for form in _FORMS if takes >= {form.embeds, form.context}), None)


def is_dflash(model: Any) -> bool:
    """Whether a model drafts by filling the masked places of a block, beside another model's hidden states."""
    return _form_of(model) is not None


def has_block_settings(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of such a drafter."""
    return _OWN in config or all(config.get(name) is not None for name in _SETTINGS)


def _setting(model: Any, name: str) -> Any:
    """From the config, what it has apart, or the model, which may work it out."""
    apart = getattr(model.config, _OWN, None) or {}
    return next(
        (v for v in (getattr(model.config, name, None), apart.get(name), getattr(model, name, None)) if v is not None),
        None,
    )


class DFlash:
    """A block-diffusion drafter under a model.

    Args:
        model: the drafter; above: the model it reads, whose embedding and lm_head it uses.

    Raises:
        ValueError: in one sentence, why the two do not fit.
    """

    def __init__(self, model: Any, above: Any) -> None:
        config, text = model.config, inner_model(above).config.get_text_config(decoder=True)
        form, settings = _form_of(model), {name: _setting(model, name) for name in _SETTINGS}
        missing = [name for name, value in settings.items() if value is None]
        if missing:
            raise ValueError(f"its config has no {' and no '.join(missing)}")
        if form is None or (form is _HOSTS and _CACHE is None):
            raise ValueError("this release of transformers cannot run it")
        self.model, self._form = model, form
        self.block = int(settings["block_size"])
        self.mask = int(settings["mask_token_id"])
        # The first of a model's hidden states is its embedding's.
        self.layers = [int(layer) + 1 for layer in settings["target_layer_ids"]]
        self.width = len(self.layers) * int(text.hidden_size)
        self._cache_name = named_cache(parameters_of(type(model).forward)) or "cache"
        embedding, head = inner_model(above).get_input_embeddings(), inner_model(above).get_output_embeddings()
        self._check(config, text, embedding)
        self.embedding, self.head = whole_part(embedding), whole_part(head)
        self._above_dtype = inner_model(above).dtype
        self._home = input_device(above)

    def _check(self, config: Any, text: Any, embedding: Any) -> None:
        if config.hidden_size != text.hidden_size:
            raise ValueError(
                f"it reads hidden states of width {config.hidden_size}, and those of the level above it are "
                f"{text.hidden_size} wide"
            )
        if self.block < 2:
            raise ValueError(f"its block_size is {self.block}, and a draft takes all but the first place of a block")
        if max(self.layers) > text.num_hidden_layers or min(self.layers) < 1:
            raise ValueError(
                f"it reads the layers {[layer - 1 for layer in self.layers]} of a model, and the level above it has "
                f"{text.num_hidden_layers}"
            )
        rows = int(embedding.weight.shape[0])
        if not 0 <= self.mask < rows:
            raise ValueError(f"its mask_token_id is {self.mask}, and the level above it embeds {rows} ids")

    @property
    def device(self) -> torch.device:
        """Where the drafter is."""
        return next(torch.device(parameter.device) for parameter in self.model.parameters())

    def new_cache(self) -> Any:
        """An empty cache for one row; without a config its layers keep everything and can be cut anywhere."""
        return DynamicCache() if self._form is not _HOSTS or _CACHE is None else _CACHE()

    def held(self, cache: Any) -> int:
        """Positions whose hidden states it holds keys and values of."""
        return int(cache.layers[0].get_seq_length()) if cache.layers else 0

    def shrink(self, cache: Any, length: int) -> None:
        """Keep the first positions."""
        for layer in cache.layers:
            held = int(layer.get_seq_length())
            if held > length:
                layer.crop(length - held)

    def say(self, features: torch.Tensor, known: list[int], first: int, cache: Any) -> torch.Tensor:
        """Read what the level above has read since, and fill a block behind it.

        Args:
            features: `[N, F]`, the hidden states of N positions from what `cache` holds on, N above 0.
            known: ids at the beginning of the block, at least one: the text's that the level above has not read.
            first: position of the first of `features`.
            cache: holds afterwards what it held, and these N positions.

        Returns:
            `[block - len(known), V]`, logits of the places behind those.
        """
        count = features.shape[0]
        kept = self.held(cache) + count
        ids = known + [self.mask] * (self.block - len(known))
        if self._form is _HOSTS:
            cache.set_previous_accepted_tokens(count)
        positions = torch.arange(first, first + count + self.block, device=self.device)[None]
        kind = next(self.model.parameters())
        given = {self._form.embeds: self._embedded(ids).to(kind), self._form.context: features[None].to(kind)}
        output = self.model(
            **given, position_ids=positions, attention_mask=None, **{self._cache_name: cache}, **self._form.more
        )
        states = getattr(output, "last_hidden_state", output)
        self.shrink(cache, kept)
        hidden = states[0, len(known) :]
        found: torch.Tensor = self.head(hidden.to(device=self._place(self.head), dtype=self._above_dtype))
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def _embedded(self, ids: list[int]) -> torch.Tensor:
        """`[1, block, H]`, without the norm that some embeddings end with, as the drafter was trained.

        As transformers does; the norm is skipped for this thread's call alone, since the embedding is the model's own.
        """
        module = self.embedding
        given = torch.tensor([ids], device=self._home)
        if isinstance(getattr(module, "embed_norm", None), nn.Module):
            module = _without(module, "embed_norm")
        found: torch.Tensor = module(given)
        return found

    def _place(self, module: nn.Module) -> torch.device:
        """Where a module of the level above takes what it is given; weights that are fetched come to that model's."""
        own = next(iter((*module.parameters(), *module.buffers())), None)
        return self._home if own is None or own.device.type == "meta" else torch.device(own.device)


def _without(module: Any, name: str) -> Any:
    """A view of a module, over the same weights, whose part of this name hands on what it is given."""
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    view.__dict__["_modules"] = {**module._modules, name: nn.Identity()}
    return view
