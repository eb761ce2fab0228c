# SPDX-License-Identifier: Apache-2.0
"""Whether many decoder layers still are what they were found to be, asked of all of them at once.

A fused block looks through its layer in every pass. For a stack of them that is most of what Python has to do, so
what was found when the blocks were last looked through is written down here in flat lists, and a pass compares.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import attrgetter, is_, itemgetter, methodcaller
from typing import Any

import torch
from torch import Tensor

from hf_polyspec.cpu.block_parts import BlockParts, global_hooks, has_hooks
from hf_polyspec.cpu.block_products import joint_kernel, product_of
from hf_polyspec.cpu.compiled.samples import Samples
from hf_polyspec.cpu.joint_product import JointProduct, change_count, sampled
from hf_polyspec.host.attention import attention_name

_SETTINGS = ("is_causal", "head_dim", "scaling", "num_key_value_groups", "layer_idx", "config")
_FORWARD, _WEIGHT, _PRODUCT = itertools.repeat("forward"), itertools.repeat("weight"), itertools.repeat("product")
_NONE = itertools.repeat(None)
_hooks, _hooks_before = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")
_product, _dissolved, _kernel = attrgetter("product"), attrgetter("dissolved"), methodcaller("kernel")
_shape, _dtype = attrgetter("shape"), attrgetter("dtype")


class Watch:
    """What the numbers of blocks depend on, as it is now.

    Lists are compared as wholes, by functions of the interpreter's own: a line of Python for each of a thousand things
    takes longer, whenever the weights of a pass have pushed all of them out of the processor's caches.

    Args:
        blocks: The parts of layers that are ready, with matrices that compiled products multiply.
        dtype: Of the activations.
    """

    def __init__(self, blocks: Sequence[BlockParts], dtype: torch.dtype) -> None:
        self._dtype = dtype
        places: list[tuple[dict[str, Any], str, Any]] = [place for parts in blocks for place in parts.places]
        self._siblings = [siblings for siblings, _, _ in places]
        self._names = [name for _, name, _ in places]
        self._modules: list[Any] = [module for _, _, module in places]
        self._own: list[dict[str, Any]] = [module.__dict__ for module in self._modules]
        self._forwards = [own.get("forward") for own in self._own]
        self._harmless: list[tuple[int, ...]] = []
        settings = [
            (owner, name)
            for parts in blocks
            for owner, names in (
                (parts.layer, ("training",)),
                (parts.attention, _SETTINGS),
                (parts.joint[1], ("out_features",)),
                *((norm, ("variance_epsilon",)) for norm in parts.norms),
            )
            for name in names
        ]
        self._owners, self._settings = [owner for owner, _ in settings], [name for _, name in settings]
        self._values = list(map(getattr, self._owners, self._settings))
        self._configs = list({id(parts.attention.config): parts.attention.config for parts in blocks}.values())
        norms = [norm for parts in blocks for norm in parts.norms]
        self._norms = [norm._parameters for norm in norms]
        self._norm_weights: list[Tensor] = [norm.weight for norm in norms]
        self._norm_places = _places(self._norm_weights)
        # A task reads these where they lie: what another thread puts in their place during a pass frees none of them.
        self._kept = list(map(Tensor.untyped_storage, self._norm_weights))
        groups = [group for parts in blocks for group in (parts.joint, parts.output, parts.gates, parts.down)]
        self._watch_weights(groups)
        # Last, so that what changes while the lists are written is seen in the next pass.
        self._watch_kernels([group for group in groups if not _is_watched(product_of(group[0]))], dtype)

    def _watch_weights(self, groups: Sequence[Sequence[Any]]) -> None:
        """Write down the weights from which products were made that would not notice a change by themselves."""
        self._products: list[Any] = []
        self._member_forwards: list[Any] = []
        self._member_products: list[Any] = []
        self._holders: list[dict[str, Any]] = []
        self._tensor_names: list[str] = []
        self._tensors: list[Tensor | None] = []
        samples: list[tuple[int, int]] = []
        for group in groups:
            product: Any = product_of(group[0])
            if not _is_watched(product):
                continue
            self._products.append(product)
            for layer in group:
                self._member_forwards.append(layer.__dict__.get("forward"))
                self._member_products.append(product)
                for name, whole in (("weight", True), ("bias", False)):
                    tensor = layer._parameters.get(name)
                    self._holders.append(layer._parameters)
                    self._tensor_names.append(name)
                    self._tensors.append(tensor)
                    samples += [] if tensor is None else sampled(tensor, whole)
        self._weights = [tensor for tensor in self._tensors if tensor is not None]
        self._weight_places, self._changes = _places(self._weights), list(map(change_count, self._weights))
        self._samples = Samples(samples)
        self._addressed = [*self._norm_weights, *self._weights]
        self._addresses = [*self._norm_places[0], *self._weight_places[0]]

    def _watch_kernels(self, groups: Sequence[Sequence[Any]], dtype: torch.dtype) -> None:
        """Write down products that notice by themselves when their weights change: those of quantised layers."""
        of_groups: list[Any] = [product_of(group[0]) for group in groups]
        self._joined: list[Any] = [layer for group in groups for layer in group]
        self._joints = [product for group, product in zip(groups, of_groups, strict=True) for _ in group]
        self._kernel_holders: list[Any] = [
            group[0] if product is None else product for group, product in zip(groups, of_groups, strict=True)
        ]
        self._shared = [product for product in of_groups if product is not None]
        self._kernels = [joint_kernel(group, dtype) for group in groups]

    def same(self, x: Tensor) -> bool:
        """Whether nothing has changed that a block would look at, for inputs like `x`."""
        return (
            x.dtype is self._dtype
            and not global_hooks()
            and self._same_modules()
            and self._same_settings()
            and self._same_norms()
            and self._same_products()
            and self._same_kernels()
            and self._samples.same()  # last: the others make sure that the addresses still are the weights'
        )

    def in_place(self) -> bool:
        """Whether weights still lie where they lay: all that is asked in each pass, whoever runs."""
        return list(map(Tensor.data_ptr, self._addressed)) == self._addresses

    def _same_modules(self) -> bool:
        return (
            all(map(is_, map(dict.get, self._siblings, self._names), self._modules))
            and all(map(is_, map(dict.get, self._own, _FORWARD), self._forwards))
            and not self._hooked()
        )

    def _hooked(self) -> bool:
        """Whether there are hooks of somebody's. The host's own stay where they are once hidden states were asked for:
        they are known by their numbers, no two of which are alike."""
        found = [*map(tuple, filter(None, map(_hooks, self._own)))]
        found += map(tuple, filter(None, map(_hooks_before, self._own)))
        if found != self._harmless:
            if any(map(has_hooks, self._modules)):
                return True
            self._harmless = found
        return False

    def _same_settings(self) -> bool:
        return all(map(is_, map(getattr, self._owners, self._settings), self._values)) and all(
            attention_name(config) == "sdpa" for config in self._configs
        )

    def _same_norms(self) -> bool:
        return (
            all(map(is_, map(dict.get, self._norms, _WEIGHT), self._norm_weights))
            and _places(self._norm_weights) == self._norm_places
        )

    def _same_products(self) -> bool:
        return (
            not any(map(_dissolved, self._products))
            # taken away by another thread, perhaps
            and all(map(is_, map(getattr, self._member_forwards, _PRODUCT, _NONE), self._member_products))
            and all(map(is_, map(dict.get, self._holders, self._tensor_names), self._tensors))
            and _places(self._weights) == self._weight_places
            and list(map(change_count, self._weights)) == self._changes
        )

    def _same_kernels(self) -> bool:
        return (
            all(map(is_, map(_product, self._joined), self._joints))
            and all(map(is_, map(_kernel, self._kernel_holders), self._kernels))
            and not any(map(_dissolved, self._shared))
        )


def _is_watched(product: object) -> bool:
    return isinstance(product, JointProduct) and product.looks_at_weights


def _places(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """What says that tensors' numbers still lie where they lay; less memory behind them than there was does not."""
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(_shape, tensors)),
        list(map(_dtype, tensors)),
        [tensor.untyped_storage().nbytes() for tensor in tensors],
        list(map(Tensor.is_contiguous, tensors)),
    )
