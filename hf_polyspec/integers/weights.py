# SPDX-License-Identifier: Apache-2.0
"""Rounding float weights to integers: the one description of a quantised matrix that everything here shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SUPPORTED_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear layer's weight as integers: `w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g])`, `g = g_idx[k]`.

    Attributes:
        codes: `[N, K]` uint8, unsigned integers below `2 ** bits` (N output features, K input features).
        scales: `[N, G]` float32, one scale an output feature and group of input features.
        zeros: `[N, G]` uint8, the code that stands for zero.
        g_idx: `[K]` int32, the group each input feature belongs to (not sorted under GPTQ's act-order).
        bits: Bits a code, 2, 3, 4 or 8.
        group_size: Input features a group; the last group may be smaller. -1: one group.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`: output and input features."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def symmetric(self) -> bool:
        """Whether every group's zero is the middle code, so that only scales carry information."""
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float matrix `[N, K]` these integers stand for."""
        scales, zeros = self.scales.to(torch.float32), self.zeros.to(torch.float32)
        if scales.shape[1] > 1:
            index = self.g_idx.long()
            scales, zeros = scales[:, index], zeros[:, index]
        return self.codes.to(torch.float32).sub_(zeros).mul_(scales).to(dtype)  # [N, K]


def check_bits(bits: int, group_size: int) -> None:
    """Refuse a format that cannot be stored, in one sentence.

    Raises:
        ValueError: `bits` is not 2, 3, 4 or 8, or `group_size` is neither -1 nor a positive number.
    """
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"bits={bits!r} is not supported: use one of {SUPPORTED_BITS}.")
    if group_size != -1 and group_size <= 0:
        raise ValueError(f"group_size={group_size} must be -1 (one group a row) or positive.")


def group_index(features: int, group_size: int) -> Tensor:
    """The group of each input feature, `[K]` int32, groups in order and the last one ragged where need be."""
    size = features if group_size == -1 else group_size
    return torch.arange(features, dtype=torch.int32) // size


def store_scales(scales: Tensor) -> Tensor:
    """Round scales to numbers that float16 (checkpoints) and bfloat16 (kernels) both hold exactly.

    With these, a checkpoint on disk, the packed kernel and `dequantize` all mean the same matrix. The 8 bits of
    mantissa cost at most 0.4 % of a scale, far below the rounding of the weights themselves. Scales are kept at or
    above 2 ** -17, the smallest magnitude at which a float16 still holds eight bits.
    """
    return scales.clamp(min=2.0**-17, max=6.5e4).to(torch.bfloat16).to(torch.float32)


def _grouped(weight: Tensor, group_size: int) -> Tensor:
    """`[N, G, S]` view of `weight`, the ragged end filled by repeating the last column (it changes no extreme)."""
    rows, features = weight.shape
    size = features if group_size == -1 else group_size
    missing = -features % size
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(rows, missing)], dim=1)
    return weight.reshape(rows, -1, size)


def group_parameters(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, shrink: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Scale and zero of every group, from its extremes.

    Args:
        weight: `[N, K]` float32.
        bits: Bits a code.
        group_size: Features a group, -1 for one group a row.
        symmetric: Whether the middle code is zero for every group.
        shrink: Factor on the range; below 1 clips outliers for a finer grid.

    Returns:
        `scales` `[N, G]` float32 and `zeros` `[N, G]` uint8.
    """
    grouped = _grouped(weight.to(torch.float32), group_size)  # [N, G, S]
    top = (1 << bits) - 1
    if symmetric:
        # One code is lost for the symmetry at 8 bits (-127..127); below, the full range is worth more.
        reach = top // 2 if bits == 8 else top / 2
        scales = store_scales(grouped.abs().amax(-1) * shrink / reach)
        return scales, torch.full_like(scales, 1 << (bits - 1), dtype=torch.uint8)
    low = grouped.amin(-1).clamp(max=0.0) * shrink
    high = grouped.amax(-1).clamp(min=0.0) * shrink
    # A zero code of 0 wraps round in AutoGPTQ's layout and some readers let it carry into its neighbour: all-positive
    # groups give up one code instead.
    low = torch.minimum(low, -high / (top - 1))
    scales = store_scales((high - low) / top)
    return scales, (-low / scales).round().clamp(1, top).to(torch.uint8)


def encode(weight: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bits: int) -> Tensor:
    """Codes `[N, K]` uint8 nearest to `weight` on the grid that `scales` and `zeros` `[N, G]` span, groups in order."""
    steps = _grouped(weight.to(torch.float32), group_size) / scales[:, :, None]  # [N, G, S]
    codes = steps.round_().add_(zeros[:, :, None]).clamp_(0, (1 << bits) - 1).to(torch.uint8)
    return codes.reshape(weight.shape[0], -1)[:, : weight.shape[1]].contiguous()


def round_to_nearest(weight: Tensor, bits: int = 4, group_size: int = 128, symmetric: bool = False) -> QuantizedWeight:
    """Quantise a matrix by rounding each weight to the nearest code, without data.

    Args:
        weight: `[N, K]`, any float dtype.
        bits: Bits a weight.
        group_size: Input features that share a scale, -1 for a whole row.
        symmetric: Store no zeros; needs no subtraction but wastes range on lopsided groups.

    Returns:
        The integers with their scales; `dequantize()` gives the matrix back.

    Raises:
        ValueError: Unsupported `bits` or `group_size`, or `weight` holds NaN or infinity.
    """
    check_bits(bits, group_size)
    if not torch.isfinite(weight).all():
        raise ValueError("The weight holds NaN or infinity and cannot be quantised.")
    scales, zeros = group_parameters(weight, bits, group_size, symmetric)
    g_idx = group_index(weight.shape[1], group_size).to(weight.device)
    codes = encode(weight, scales, zeros, group_size, bits)
    return QuantizedWeight(codes, scales, zeros, g_idx, bits, group_size)


def search_scales(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, importance: Tensor | None = None
) -> QuantizedWeight:
    """Round to nearest on the best of several ranges a group, the one with the least weighted square error.

    Clipping a group's outliers makes the grid finer for the rest. With `importance[k] = E[x_k ** 2]` the error
    minimised is that of the layer's output under uncorrelated inputs.

    Args:
        weight: `[N, K]`.
        bits: Bits a weight.
        group_size: Inputs that share a scale, -1 for a whole row.
        symmetric: Store no zeros.
        importance: `[K]` mean square of each input, or None for equal weights.

    Returns:
        The integers with the chosen scales and zeros.
    """
    matrix = weight.to(torch.float32)
    features = matrix.shape[1]
    cost = torch.ones_like(matrix[:1]) if importance is None else importance.to(matrix)[None]
    grouped, costs = _grouped(matrix, group_size), _grouped(cost, group_size).clone()  # [N, G, S], [1, G, S]
    costs.reshape(-1)[features:] = 0.0  # columns that only fill up the last group
    top = (1 << bits) - 1
    scales, zeros = group_parameters(matrix, bits, group_size, symmetric)
    lowest = torch.full_like(scales, float("inf"))
    for step in range(12):
        trial, shift = group_parameters(matrix, bits, group_size, symmetric, shrink=1.0 - 0.04 * step)
        wide, offset = trial[:, :, None], shift[:, :, None].to(torch.float32)
        codes = (grouped / wide).round_().add_(offset).clamp_(0, top)
        errors = codes.sub_(offset).mul_(wide).sub_(grouped).square_().mul_(costs).sum(-1)  # [N, G]
        better = errors < lowest
        lowest = torch.where(better, errors, lowest)
        scales, zeros = torch.where(better, trial, scales), torch.where(better, shift, zeros)
    g_idx = group_index(features, group_size).to(matrix.device)
    codes = encode(matrix, scales, zeros, group_size, bits)
    return QuantizedWeight(codes, scales, zeros, g_idx, bits, group_size)
