# SPDX-License-Identifier: Apache-2.0
"""What calibration text tells: the second moments of every layer's input, and which layers deserve more bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from hf_polyspec.integers.linear import float_weight
from hf_polyspec.quantization.linear import quantized_linear
from hf_polyspec.quantization.measure import agreement
from hf_polyspec.quantization.model import ModuleFilter, Progress, linear_layers, round_layer
from hf_polyspec.quantization.modules import replace_module, sharing_copy

Moments = dict[str, Tensor]


@torch.inference_mode()
def input_moments(
    model: nn.Module,
    tokens: Tensor | Iterable[Tensor],
    modules: ModuleFilter | None = None,
    diagonal: bool = False,
) -> Moments:
    """Second moments `E[x x.T]` of the input of every linear layer on calibration text.

    Holds a matrix of the layer's width a layer; for large models calibrate a part of the layers at a time.

    Args:
        model: The float model.
        tokens: Texts as ids, `[B, T]` or several `[T]`.
        modules: `(name, module) -> bool`, which layers; all by default.
        diagonal: Sum up only the diagonal, which is all that the method "search" reads.

    Returns:
        `[K, K]` float32 for each layer by name.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    layers = linear_layers(model, modules)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()  # [R, K]
            product = x.square().sum(0) if diagonal else x.T @ x
            sums[name] = product if name not in sums else sums[name].add_(product)
            counts[name] = counts.get(name, 0) + x.shape[0]

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        device = next(model.parameters()).device
        for text in tokens:
            model(text.reshape(1, -1).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (torch.diag(total) if diagonal else total) / counts[name] for name, total in sums.items()}


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    tokens: Tensor | Iterable[Tensor],
    bits: int = 4,
    group_size: int = 128,
    modules: ModuleFilter | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Agreement lost when one layer alone is rounded to few bits, for every layer.

    Args:
        model: The float model.
        tokens: Texts as ids; each layer costs one pass over them.
        bits: The low width.
        group_size: Its group size.
        modules: `(name, module) -> bool`, which layers; all by default.
        progress: Called with each name when it is done.

    Returns:
        `1 - agreement` for each layer by name.
    """
    texts = list(tokens)
    probe = sharing_copy(model)
    losses: dict[str, float] = {}
    for name, layer in linear_layers(model, modules).items():
        weight, bias = float_weight(layer)
        rounded = round_layer(weight, bits, group_size, False, "rtn", None)
        original = probe.get_submodule(name)
        replace_module(probe, name, quantized_linear(rounded, bias))
        losses[name] = 1.0 - agreement(model, probe, texts)
        replace_module(probe, name, original)
        if progress is not None:
            progress(name)
    return losses


def choose_layer_bits(
    losses: Mapping[str, float], sizes: Mapping[str, int], share: float, high: int = 8
) -> dict[str, int]:
    """Give the layers that lose most per weight the high width, up to a share of all weights.

    Args:
        losses: Loss of each layer at the low width, from `sensitivity`.
        sizes: Weights of each layer.
        share: Largest part of all weights that may get the high width, 0 to 1.
        high: The high width.

    Returns:
        `layer_bits` for `quantize_model`; layers that are not named keep the low width.

    Raises:
        ValueError: `share` outside 0 to 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share={share} must lie between 0 and 1.")
    budget = share * sum(sizes[name] for name in losses)
    chosen: dict[str, int] = {}
    for name in sorted(losses, key=lambda name: losses[name] / sizes[name], reverse=True):
        if sizes[name] <= budget:
            chosen[name] = high
            budget -= sizes[name]
    return chosen
