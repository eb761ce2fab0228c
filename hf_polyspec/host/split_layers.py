# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a model that processes split: what each process holds of one, and what makes its product whole.

A split layer is a part of its rows, whose outputs stay apart or are put side by side, or a part of its columns, whose
products are added up. Which it is, is read from where its numbers lie and tried with a few zeros; how the host does it
differs from release to release.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ranks import is_part, own_part, talking

APART, JOINED, ADDED = "apart", "joined", "added"


@dataclass(frozen=True)
class Part:
    """What a process holds of a linear layer.

    Attributes:
        weight: `[N', K']`; bias: `[N']`, of a layer whose products are added up `[N]`; None where there is none.
        way: `APART`, `JOINED` or `ADDED`.
        group: of the processes.
    """

    weight: Tensor
    bias: Tensor | None
    way: str
    group: Any


def parts_of(model: Any) -> dict[str, Part]:
    """The split linear layers of a model by name, as far as they can be computed with other numbers; collective.

    Raises:
        ValueError: a layer is split in a way that is not known, or a module around it is called in a way of its own.
    """
    found: dict[str, Part] = {}
    for name, module in model.named_modules():
        inside = [name for name, one in module.named_modules() if name and _is_split_linear(one)]
        if inside and "forward" in module.__dict__:
            raise ValueError(f"{type(module).__name__} is called in a way of its own around what is split")
        part = _part(module) if _is_split_linear(module) else None
        if part is not None:
            found[name] = part
    if not found:
        raise ValueError("none of its linear layers is split")
    return found


def can_be_parted(model: Any) -> bool:
    """Whether it looks as if `parts_of` found something; nothing is computed."""
    return any(_is_split_linear(module) for module in model.modules())


def _is_split_linear(module: Any) -> bool:
    return type(module) is nn.Linear and is_part(module.weight)


def _part(module: Any) -> Part | None:
    """None for one whose outputs are put side by side, and are not as many in all processes."""
    weight: Any = module.weight
    sharded = [getattr(place, "dim", None) for place in weight.placements]
    if len(sharded) != 1 or sharded[0] not in (0, 1):
        raise ValueError("a layer is split over more than its rows or its columns")
    own, group = own_part(weight.detach()), weight.device_mesh.get_group()
    rows = weight.shape[0]
    with torch.no_grad():
        tried = module(own.new_zeros(1, 1, own.shape[1]))
    width = own_part(tried).shape[-1]
    bias = None if module.bias is None else own_part(module.bias.detach())
    if sharded[0] == 1:
        if width != rows:
            raise ValueError("the products of a layer that is split by columns are not added up")
        return Part(own, bias, ADDED, group)
    if width == own.shape[0]:
        return Part(own, bias, APART, group)
    if width == rows:
        return None if rows % dist.get_world_size(group) else Part(own, bias, JOINED, group)
    raise ValueError("the outputs of a layer that is split by rows are neither apart nor side by side")


class SplitLinear(nn.Module):
    """A layer over a part of the rows or columns, that ends with what makes its outputs whole; collective.

    Args:
        product: of this process's part, `[..., K']` to `[..., N']`; without a bias where products are added up.
        part: of the layer.
    """

    needs_processes = True
    bias: Tensor | None

    def __init__(self, product: nn.Module, part: Part) -> None:
        super().__init__()
        self.product = product
        self.way, self.group = part.way, part.group
        self.register_buffer("bias", part.bias if part.way == ADDED else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K']` to `[..., N]`."""
        out: Tensor = self.product(x)
        if self.way == APART:
            return out
        with talking():
            if self.way == ADDED:
                out = out.contiguous()
                dist.all_reduce(out, group=self.group)
                return out if self.bias is None else out + self.bias
            parts = [torch.empty_like(out) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(parts, out.contiguous(), group=self.group)
        return torch.cat(parts, -1)


def shells(model: Any) -> Any:
    """A copy of a model's modules over the same parameters, in which single modules can be replaced."""
    made = copy.copy(model)
    made.__dict__["_modules"] = {name: None if one is None else shells(one) for name, one in model._modules.items()}
    return made
