# SPDX-License-Identifier: Apache-2.0
"""A quantised model that can be trained: float matrices rounded in every pass, with gradients as if they were not.

Adapters merged into a rounded matrix and rounded again are lost where they move a weight by less than half a step of
the grid. Here they are added before the rounding, so what is trained is the very matrix that will be stored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_polyspec.cpu.shared_input import share_inputs
from hf_polyspec.integers.linear import float_weight
from hf_polyspec.integers.weights import QuantizedWeight
from hf_polyspec.quantization.linear import Int8Linear, quantized_linear
from hf_polyspec.quantization.modules import is_linear, output_head, quantized_layers, replace_module, sharing_copy

ADAPTER = "default"
# A weight nearer than this to the edge of its cell starts a little inside it, so that rounding gives its code back.
_EDGE = 0.499
# Mean distance, in steps, beyond which the float matrix is not the one that was rounded (0.25 for plain rounding).
_FAR = 0.75


class Grid:
    """The steps one matrix is rounded to.

    Args:
        weight: The quantised matrix whose scales and zeros are kept.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = weight
        self.top = float((1 << weight.bits) - 1)
        self._index = weight.g_idx.long() if weight.scales.shape[1] > 1 else None

    def spread(self) -> tuple[Tensor, Tensor]:
        """Scales and zeros of every weight, `[N, K]` or `[N, 1]`."""
        scales, zeros = self.weight.scales.float(), self.weight.zeros.float()
        return (scales, zeros) if self._index is None else (scales[:, self._index], zeros[:, self._index])

    def encode(self, matrix: Tensor) -> QuantizedWeight:
        """The nearest integers to a float matrix `[N, K]`, under the same scales."""
        scales, zeros = self.spread()
        codes = (matrix / scales + zeros).round_().clamp_(0, self.top).to(torch.uint8)
        old = self.weight
        return QuantizedWeight(codes, old.scales, old.zeros, old.g_idx, old.bits, old.group_size)

    @torch.no_grad()
    def start(self, matrix: Tensor | None) -> Tensor:
        """Where training starts: the point nearest to the float matrix that still rounds to the stored integers.

        Args:
            matrix: `[N, K]`, what was rounded, or None if that is not known.

        Returns:
            `[N, K]` float32; the grid's own points where the float matrix is another one (its scales were folded).
        """
        own = self.weight.dequantize()
        if matrix is None or matrix.shape != own.shape:
            return own
        scales, _ = self.spread()
        offset = (matrix.float() - own) / scales
        if float(offset.abs().mean()) > _FAR:
            return own
        return offset.clamp_(-_EDGE, _EDGE).mul_(scales).add_(own)


class RoundingStep(torch.autograd.Function):
    """Rounds `start + change` to a grid; the gradient of the result is that of `change`."""

    @staticmethod
    def forward(context: Any, start: Tensor, change: Tensor, grid: Grid) -> Tensor:
        scales, zeros = grid.spread()
        codes = (start + change).div_(scales).add_(zeros).round_().clamp_(0, grid.top)
        return codes.sub_(zeros).mul_(scales)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        return None, gradients[0], None


class RoundedForward:
    """Takes the place of a LoRA layer's `forward`: base and adapter are added, then rounded, then multiplied.

    Args:
        layer: PEFT's LoRA layer around a float linear layer that holds the start.
        grid: What to round to.
    """

    def __init__(self, layer: Any, grid: Grid) -> None:
        self.layer, self.grid = layer, grid

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.layer.get_base_layer()
        matrix = RoundingStep.apply(base.weight, self.layer.get_delta_weight(ADAPTER), self.grid)  # type: ignore[no-untyped-call]
        return F.linear(x, matrix, base.bias)


class Student:
    """A trainable twin of a quantised model, with LoRA adapters on its quantised layers.

    Args:
        middle: The quantised model; it stays as it is.
        source: The float model it was made from, or None.
        rank: Of the adapters.

    Raises:
        ValueError: `middle` has no quantised layer below its head.
    """

    def __init__(self, middle: nn.Module, source: nn.Module | None, rank: int) -> None:
        import peft

        self.middle = middle
        head = output_head(middle)
        layers = quantized_layers(middle)
        # The head has as many weights as a small model's body, and is kept at 8 bits: nothing to win there.
        self.names = [name for name, layer in layers.items() if layer is not head]
        if not self.names:
            raise ValueError(f"{type(middle).__name__} has no quantised layer to recover: use quantize_model first.")
        floats = _float_matrices(source, self.names)
        twin: Any = sharing_copy(middle)
        self.grids: dict[str, Grid] = {}
        for name, layer in layers.items():
            weight = layer.quantized_weight()
            start = weight.dequantize()
            if layer is not head:
                self.grids[name] = Grid(weight)
                start = self.grids[name].start(floats.get(name))
            replace_module(twin, name, _linear(start, layer.bias))
        twin.float()
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=self.names, lora_dropout=0.0)
        with warnings.catch_warnings():
            # PEFT reads a name that transformers is about to give up; nobody who recovers a middle can do a thing.
            warnings.simplefilter("ignore", FutureWarning)
            self.model: Any = peft.get_peft_model(twin, config, adapter_name=ADAPTER).eval()
        for name, grid in self.grids.items():
            adapted = self._adapted(name)
            adapted.forward = RoundedForward(adapted, grid)

    def _adapted(self, name: str) -> Any:
        return self.model.get_base_model().get_submodule(name)

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' matrices, in the same order every time."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def state(self) -> dict[str, Tensor]:
        """The adapters, by PEFT's names."""
        import peft

        found: dict[str, Tensor] = peft.get_peft_model_state_dict(self.model, adapter_name=ADAPTER)
        return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up adapters saved by `state`."""
        import peft

        peft.set_peft_model_state_dict(self.model, state, adapter_name=ADAPTER)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The quantised model with the adapters merged and rounded; what is not quantised is shared with the middle."""
        result = sharing_copy(self.middle)
        layers = quantized_layers(result)
        for name, grid in self.grids.items():
            adapted = self._adapted(name)
            weight = grid.encode(adapted.get_base_layer().weight + adapted.get_delta_weight(ADAPTER))
            old = layers[name]
            fresh = quantized_linear(weight, old.bias).to(old.scales.device).eval()
            fresh.activation_bits = old.activation_bits if isinstance(fresh, Int8Linear) else None
            replace_module(result, name, fresh)
        share_inputs(result)
        return result


def _linear(matrix: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    return layer


def _float_matrices(source: nn.Module | None, names: Iterable[str]) -> dict[str, Tensor]:
    if source is None:
        return {}
    wanted = set(names)
    found = {name: module for name, module in source.named_modules() if name in wanted and is_linear(module)}
    return {name: float_weight(module)[0] for name, module in found.items()}
