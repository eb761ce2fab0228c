# SPDX-License-Identifier: Apache-2.0
"""GPTQ's rounding: each column's rounding error is made good by the columns still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv
2210.17323), algorithm 1, written from the paper's equations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_polyspec.integers.weights import QuantizedWeight, check_bits, group_index, search_scales

_BLOCK = 128


def _inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor `U` of the inverse, `inv(H + lambda I) = U.T @ U`."""
    hessian = moments.to(torch.float32).clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0  # inputs that are never active: any value is as good as another
    diagonal += damping * float(diagonal.mean())
    lower = torch.linalg.cholesky(hessian)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor


@torch.no_grad()
def round_with_feedback(
    weight: Tensor, moments: Tensor, bits: int, group_size: int, symmetric: bool, damping: float = 0.01
) -> QuantizedWeight:
    """Quantise a matrix so that the layer's output, not its weight, is kept.

    Minimises `trace((W - Q) H (W - Q).T)` greedily: column k is rounded, its error divided by `U[k, k]` and taken
    from the columns after it along `U[k, k:]` (equations 2 and 3 of the paper, in Cholesky form).

    Args:
        weight: `[N, K]`.
        moments: `H = E[x x.T]`, `[K, K]`, the layer's inputs on calibration text.
        bits: Bits a weight.
        group_size: Inputs that share a scale, -1 for a whole row.
        symmetric: Store no zeros.
        damping: Added to the diagonal of `H`, as a share of its mean.

    Returns:
        The integers; groups lie in order.

    Raises:
        ValueError: `moments` does not fit the matrix.
    """
    check_bits(bits, group_size)
    rows, features = weight.shape
    if moments.shape != (features, features):
        raise ValueError(f"moments of shape {tuple(moments.shape)} do not fit a layer of {features} inputs.")
    left = weight.to(torch.float32).clone()
    factor = _inverse_factor(moments.to(left.device), damping)
    size = features if group_size == -1 else group_size
    importance = moments.diagonal().to(left.device)
    base = search_scales(left, bits, group_size, symmetric, importance)
    scales, zeros = base.scales.clone(), base.zeros.to(torch.float32)
    codes = torch.empty(rows, features, device=left.device, dtype=torch.uint8)
    top = (1 << bits) - 1
    for start in range(0, features, _BLOCK):
        stop = min(start + _BLOCK, features)
        errors = torch.zeros(rows, stop - start, device=left.device)
        for column in range(start, stop):
            group = column // size
            if column % size == 0 and group_size != -1:
                # The group's weights have absorbed earlier errors: fit its range to what they are now.
                end = min(column + size, features)
                fresh = search_scales(left[:, column:end], bits, -1, symmetric, importance[column:end])
                scales[:, group], zeros[:, group] = fresh.scales[:, 0], fresh.zeros[:, 0].float()
            current = left[:, column]
            code = ((current / scales[:, group]).round() + zeros[:, group]).clamp_(0, top)
            codes[:, column] = code.to(torch.uint8)
            error = (current - (code - zeros[:, group]) * scales[:, group]) / factor[column, column]
            left[:, column:stop] -= error[:, None] * factor[None, column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    g_idx = group_index(features, group_size).to(left.device)
    return QuantizedWeight(codes, scales, zeros.to(torch.uint8), g_idx, bits, group_size)
