# SPDX-License-Identifier: Apache-2.0
"""What multiplies the matrices of a decoder layer: one product for layers that read the same input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_polyspec.cpu.block_parts import BlockParts
from hf_polyspec.cpu.joint_product import JointProduct
from hf_polyspec.integers.linear import Kernel, QuantizedLinear

if TYPE_CHECKING:
    from hf_polyspec.cpu.compiled.product import Product
    from hf_polyspec.cpu.compiled.whole_block import BlockProducts, BlockShape


def block_products(parts: BlockParts, dtype: torch.dtype, rows: int = 1) -> BlockProducts | None:
    """The matrices of a layer, where compiled products are what computes all of them with so many rows of a dtype."""
    from hf_polyspec.cpu.compiled.whole_block import BlockProducts

    joint = compiled_product(parts.joint, dtype, rows)
    output = compiled_product(parts.output, dtype, rows)
    gates = compiled_product(parts.gates, dtype, rows)
    down = compiled_product(parts.down, dtype, rows)
    if joint is None or output is None or gates is None or down is None:
        return None
    products = BlockProducts(joint, output, gates, down)
    fit = products.stored in (torch.int8, torch.uint8, dtype) and _shapes(parts) == tuple(
        product.shape for product in (joint, output, gates, down)
    )
    return products if fit else None


def _shapes(parts: BlockParts) -> tuple[tuple[int, int], ...]:
    """Outputs and inputs of the four products of a layer as it was found."""
    (queries, width), (keys, _), (values, _), output, (gate, _), (up, _), down = (shape for _, shape in parts.shapes)
    return (queries + keys + values, width), output, (gate + up, width), down


def block_shape(parts: BlockParts) -> BlockShape:
    """What a layer is besides its matrices."""
    from hf_polyspec.cpu.compiled.whole_block import BlockShape

    attention, (first, second) = parts.attention, parts.norms
    norms = (first.weight, first.variance_epsilon), (second.weight, second.variance_epsilon)
    shared = parts.joint[1].out_features // attention.head_dim
    heads = shared * attention.num_key_value_groups
    return BlockShape(heads, shared, attention.head_dim, attention.scaling, norms)


def new_states(shape: BlockShape, x: Tensor) -> tuple[int, int, int, int]:
    """The shape of the keys, and of the values, that a layer adds to its cache for `x` `[B, F, H]`."""
    return (x.shape[0], shape.shared, x.shape[1], shape.size)


def joint_output(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """The outputs of layers that read `x`, side by side, from one product where they have one."""
    kernel = joint_kernel(layers, x.dtype, x.shape[0] * x.shape[1])
    return torch.cat([layer(x) for layer in layers], -1) if kernel is None else kernel(x)


def compiled_product(layers: Sequence[nn.Module], dtype: torch.dtype, rows: int) -> Product | None:
    """The compiled product that gives the outputs of layers, if it is the one that would be used."""
    from hf_polyspec.cpu.compiled.digits import DigitProduct
    from hf_polyspec.cpu.compiled.groups import GroupProduct
    from hf_polyspec.cpu.compiled.product import CompiledProduct

    kernel = joint_kernel(layers, dtype, rows)
    return kernel if isinstance(kernel, CompiledProduct | DigitProduct | GroupProduct) else None


def joint_kernel(layers: Sequence[nn.Module], dtype: torch.dtype, rows: int = 1) -> Kernel | None:
    """What computes layers together with so many rows of a dtype, None where each goes its own way."""
    product = product_of(layers[0])
    if product is None and len(layers) == 1 and type(layers[0]).__mro__[1:2] == (QuantizedLinear,):
        return layers[0].kernel()  # type: ignore[no-any-return, operator]
    if any(product_of(layer) is not product for layer in layers):
        return None
    if not isinstance(product, JointProduct) or not product.consists_of(layers) or not product.takes(dtype, rows):
        return None
    return product.kernel()


def product_of(layer: nn.Module) -> object:
    """What computes a layer together with its siblings, if anything does."""
    return getattr(layer.__dict__.get("forward", layer), "product", None)
