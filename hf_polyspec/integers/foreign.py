# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weight another library keeps in a form of its own, and the float matrix that they stand for.

bitsandbytes, torchao, gptqmodel, HQQ and others each store it differently, and from release to release. All of them
multiply, so the layer itself is asked: what it makes of the identity is its matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 512
_OFF = 0.1
"""Relative error up to which a layer counts as linear; activations rounded to 8 bits make about 0.01."""


def stored_elsewhere(module: nn.Module) -> bool:
    """Whether a module is a linear layer by its sizes, and its weight no plain float matrix."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not all(isinstance(size, int) for size in sizes):
        return False
    weight = module._parameters.get("weight")
    if weight is not None and _is_float(weight):
        return False
    return any(not _is_float(tensor) for tensor in _own(module))


def _own(module: nn.Module) -> list[Tensor]:
    """A module's own parameters and buffers."""
    return [tensor for of in (module._parameters, module._buffers) for tensor in of.values() if tensor is not None]


def _is_float(tensor: Tensor) -> bool:
    """Whether a tensor holds plain numbers: of 16 bits or more, not packed by a subclass that can undo it."""
    kind: Any = type(tensor)
    packed = getattr(kind, "dequantize", None) is not Tensor.dequantize
    return tensor.is_floating_point() and tensor.element_size() > 1 and not packed


@torch.no_grad()
def dequantized(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight `[N, K]` and bias `[N]` of a layer that `stored_elsewhere` knows, computed by the layer.

    Raises:
        ValueError: The layer fails, or what it computes is not linear.
    """
    layer: Any = module
    bias = getattr(layer, "bias", None)
    bias = bias.detach() if isinstance(bias, Tensor) else None
    device = next(
        tensor.device for of in (module._parameters, module._buffers) for tensor in of.values() if tensor is not None
    )
    problem: Exception | None = None
    for dtype in _dtypes(layer):
        try:
            weight = _matrix(module, bias, dtype, device)
            dice = torch.Generator().manual_seed(0)
            x = torch.randn(4, layer.in_features, generator=dice, device="cpu").to(device, dtype)
            wanted = nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
            off = float((module(x).float() - wanted).norm() / wanted.norm().clamp_min(1e-30))
        except Exception as error:  # another library's: whatever it raises, the next dtype may do
            problem = error
            continue
        if not off < _OFF:
            raise ValueError(f"what {type(module).__name__} computes is no product with a matrix")
        return weight, bias
    raise ValueError(f"{type(module).__name__} does not multiply here ({str(problem).strip().splitlines()[:1]})")


def _dtypes(layer: Any) -> list[torch.dtype]:
    """Types of activations to try, the layer's own first."""
    found = [getattr(layer, "compute_dtype", None)]
    found += [getattr(getattr(layer, name, None), "dtype", None) for name in ("weight", "bias")]
    usual = (torch.float32, torch.bfloat16, torch.float16)
    return list(dict.fromkeys([dtype for dtype in found if dtype in usual] + list(usual)))


def _matrix(module: nn.Module, bias: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The transpose of what the layer makes of the identity, some rows at a time."""
    layer: Any = module
    width, parts = int(layer.in_features), []
    for start in range(0, width, _ROWS):
        rows = min(_ROWS, width - start)
        unit = torch.zeros(rows, width, dtype=dtype, device=device)
        unit[torch.arange(rows), start + torch.arange(rows)] = 1
        made = module(unit)
        parts.append(made if bias is None else (made.float() - bias.float()).to(made.dtype))
    return torch.cat(parts).t().contiguous()
