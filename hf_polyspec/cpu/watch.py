# SPDX-License-Identifier: Apache-2.0
"""Whether many decoder layers still are what they were found to be, asked of all of them at once.

A fused block looks through its layer in every pass. For a stack of them that is most of what Python has to do, so
what was found when the blocks were last looked through is written down here in flat lists, and a pass compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_polyspec.cpu.block_parts import BlockParts, global_hooks, has_hooks
from hf_polyspec.cpu.block_products import joint_kernel, product_of
from hf_polyspec.cpu.compiled.samples import Samples
from hf_polyspec.cpu.joint_product import JointProduct, change_count, sampled
from hf_polyspec.host.attention import attention_name

Place = tuple[int, torch.Size, torch.dtype, int, bool]
Marks = tuple[int, torch.Size, torch.dtype, int, bool, int]
_SETTINGS = ("is_causal", "head_dim", "scaling", "num_key_value_groups", "layer_idx", "config")


class Watch:
    """What the numbers of blocks depend on, as it is now.

    Args:
        blocks: The parts of layers that are ready, with matrices that compiled products multiply.
        dtype: Of the activations.
    """

    def __init__(self, blocks: Sequence[BlockParts], dtype: torch.dtype) -> None:
        self._dtype = dtype
        places: list[tuple[dict[str, Any], str, Any]] = [place for parts in blocks for place in parts.places]
        self._modules: list[tuple[dict[str, Any], str, Any, dict[str, Any], Any]] = [
            (siblings, name, module, module.__dict__, module.__dict__.get("forward"))
            for siblings, name, module in places
        ]
        self._settings = [
            (owner, name, getattr(owner, name))
            for parts in blocks
            for owner, names in (
                (parts.layer, ("training",)),
                (parts.attention, _SETTINGS),
                (parts.joint[1], ("out_features",)),
                *((norm, ("variance_epsilon",)) for norm in parts.norms),
            )
            for name in names
        ]
        self._configs = list({id(parts.attention.config): parts.attention.config for parts in blocks}.values())
        self._norms = [
            (norm._parameters, norm.weight, *_place(norm.weight)) for parts in blocks for norm in parts.norms
        ]
        groups = [group for parts in blocks for group in (parts.joint, parts.output, parts.gates, parts.down)]
        self._watch_weights(groups)
        # Last, so that what changes while the lists are written is seen in the next pass.
        self._kernels: list[tuple[Sequence[Any], Any, Any]] = [
            (group, product_of(group[0]), joint_kernel(group, dtype))
            for group in groups
            if not _is_watched(product_of(group[0]))
        ]

    def _watch_weights(self, groups: Sequence[Sequence[Any]]) -> None:
        """Write down the weights from which products were made that would not notice a change by themselves."""
        self._products: list[JointProduct] = []
        self._members: list[tuple[Any, JointProduct]] = []
        self._tensors: list[tuple[dict[str, Any], str, Tensor | None, Marks | None]] = []
        samples: list[tuple[int, int]] = []
        for group in groups:
            product: Any = product_of(group[0])
            if not _is_watched(product):
                continue
            self._products.append(product)
            for layer in group:
                self._members.append((layer.__dict__.get("forward"), product))
                for name, whole in (("weight", True), ("bias", False)):
                    tensor = layer._parameters.get(name)
                    self._tensors.append((layer._parameters, name, tensor, _marks(tensor)))
                    samples += [] if tensor is None else sampled(tensor, whole)
        self._samples = Samples(samples)

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

    def _same_modules(self) -> bool:
        for siblings, name, module, own, forward in self._modules:
            if siblings.get(name, self) is not module or own.get("forward") is not forward:
                return False
            if (own["_forward_hooks"] or own["_forward_pre_hooks"]) and has_hooks(module):
                return False
        return True

    def _same_settings(self) -> bool:
        for owner, name, value in self._settings:
            if getattr(owner, name) is not value:
                return False
        return all(attention_name(config) == "sdpa" for config in self._configs)

    def _same_norms(self) -> bool:
        for parameters, weight, *place in self._norms:
            if parameters.get("weight") is not weight or _place(weight) != (*place,):
                return False
        return True

    def _same_products(self) -> bool:
        for product in self._products:
            if product.dissolved:
                return False
        for forward, product in self._members:
            if getattr(forward, "product", None) is not product:  # taken away by another thread, perhaps
                return False
        for parameters, name, tensor, marks in self._tensors:
            if parameters.get(name) is not tensor or (tensor is not None and _marks(tensor) != marks):
                return False
        return True

    def _same_kernels(self) -> bool:
        """Of layers whose products notice by themselves when their weights change: quantised ones."""
        for group, product, kernel in self._kernels:
            for layer in group:
                if layer.product is not product:
                    return False
            if (group[0] if product is None else product).kernel() is not kernel:
                return False
            if product is not None and product.dissolved:
                return False
        return True


def _is_watched(product: object) -> bool:
    return isinstance(product, JointProduct) and product.looks_at_weights


def _place(tensor: Tensor) -> Place:
    """What says that a tensor's numbers still lie where they lay; less memory behind them than there was does not."""
    return (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.untyped_storage().nbytes(), tensor.is_contiguous())


def _marks(tensor: Tensor | None) -> Marks | None:
    return None if tensor is None else (*_place(tensor), change_count(tensor))
