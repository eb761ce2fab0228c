# SPDX-License-Identifier: Apache-2.0
"""Models some of whose weights lie in the processor's memory or on disk until a pass comes to them.

accelerate leaves a parameter without numbers in their place, and a hook that fetches them (`device_map`, `cpu_offload`,
`disk_offload`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .release import input_device
from .whole import made_anew, take_weights


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights are fetched by hooks of accelerate's."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        return False
    from accelerate.utils import has_offloaded_params

    return any(has_offloaded_params(module) for module in model.modules())


@contextmanager
def fetched(module: nn.Module) -> Iterator[None]:
    """The module's own weights are there, whether they are offloaded or not."""
    if not any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


@torch.no_grad()
def fetched_copy(model: Any, but: Collection[str]) -> Any:
    """A model of the same class with its weights in memory, without hooks, in eval mode.

    Args:
        model: offloaded; but: names of modules whose own weights are not fetched, and have no numbers in the copy.

    Raises:
        ValueError: its class cannot be made again from its configuration.
    """
    made, device = made_anew(model), input_device(model)
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name in but:
            continue
        with fetched(module):
            weights |= {_path(name, leaf): p.detach().to(device) for leaf, p in module.named_parameters(recurse=False)}
            for leaf, buffer in module.named_buffers(recurse=False):
                made.get_submodule(name)._buffers[leaf] = buffer.to(device)
    take_weights(made, weights, left_out={_path(name, leaf) for name in but for leaf in ("weight", "bias")})
    return made


def _path(*names: str) -> str:
    return ".".join(name for name in names if name)
