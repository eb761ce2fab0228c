# SPDX-License-Identifier: Apache-2.0
"""How few layers need the high width for a copy to be believed as often as asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from hf_polyspec.integers.linear import float_weight, matrix_shape
from hf_polyspec.quantization.linear import quantized_linear
from hf_polyspec.quantization.measure import agreement
from hf_polyspec.quantization.model import Progress, round_layer
from hf_polyspec.quantization.modules import output_head, replace_module, sharing_copy


@dataclass(frozen=True)
class MixedBits:
    """Bits by layer, and what they reach.

    Attributes:
        layer_bits: For `quantize_model`; every layer of the body is named.
        agreement: With the original, on the text it was chosen on.
        share: Share of the body's weights at the high width.
        reached: Whether the agreement asked for was reached; if not, all layers have the high width.
    """

    layer_bits: dict[str, int]
    agreement: float
    share: float
    reached: bool


@torch.no_grad()
def bits_for_agreement(
    model: nn.Module,
    tokens: Tensor | Iterable[Tensor],
    losses: Mapping[str, float],
    wanted: float,
    *,
    low: int = 4,
    high: int = 8,
    group_size: int = 128,
    symmetric: bool = False,
    method: str = "rtn",
    calibration: Mapping[str, Tensor] | None = None,
    head_bits: int | None = 8,
    progress: Progress | None = None,
) -> MixedBits:
    """Give the layers that lose most per weight the high width, as few as reach an agreement.

    The layers are ranked by `losses`; how many of them are needed is found by bisection, each step a measurement of
    the whole mixed copy (losses of single layers do not add up).

    Args:
        model: The float model (folded already, where the method is awq).
        tokens: Texts as ids to measure on.
        losses: Loss of each layer at the low width, from `sensitivity`.
        wanted: Mean of `sum(min(p, q))` to reach, 0 to 1.
        low: Bits of most layers.
        high: Bits of the others.
        group_size: Inputs that share a scale below 8 bits.
        symmetric: Store no zeros below 8 bits.
        method: How layers of the low width are rounded: "rtn", "search" or "gptq".
        calibration: Second moments of every layer's input.
        head_bits: Bits of the layer that makes the logits, None for float.
        progress: Called with a line after each measurement.

    Returns:
        The choice.

    Raises:
        ValueError: `wanted` is not between 0 and 1, or there is no layer.
    """
    _check_wish(losses, wanted)
    texts = list(tokens)
    sizes = {name: prod(matrix_shape(model.get_submodule(name))) for name in losses}
    ranked = sorted(losses, key=lambda name: losses[name] / sizes[name], reverse=True)
    probe = sharing_copy(model).eval()
    _round_head(model, probe, head_bits)
    put = _places(model, probe, group_size, symmetric, method, calibration)

    def measure(count: int) -> float:
        for place, name in enumerate(ranked):
            put(name, high if place < count else low)
        found = agreement(model, probe, texts)
        if progress is not None:
            progress(f"{count} of {len(ranked)} layers at {high} bits: agreement {found:.3f}")
        return found

    count, found = _fewest(measure, len(ranked), wanted)
    chosen = {name: high if place < count else low for place, name in enumerate(ranked)}
    share = sum(sizes[name] for name in ranked[:count]) / sum(sizes.values())
    return MixedBits(chosen, found, share, found >= wanted)


def _check_wish(losses: Mapping[str, float], wanted: float) -> None:
    if not 0.0 < wanted < 1.0:
        raise ValueError(f"The agreement to reach must lie between 0 and 1, got {wanted}.")
    if not losses:
        raise ValueError("There is no layer to choose bits for.")


def _fewest(measure: Callable[[int], float], most: int, wanted: float) -> tuple[int, float]:
    """The smallest count that reaches `wanted`, and what it reaches; `most` where none does."""
    found = measure(0)
    if found >= wanted:
        return 0, found
    best = measure(most)
    if best < wanted:
        return most, best
    below, above = 0, most
    while above - below > 1:
        middle = (below + above) // 2
        found = measure(middle)
        if found >= wanted:
            above, best = middle, found
        else:
            below = middle
    return above, best


def _places(
    model: nn.Module,
    probe: nn.Module,
    group_size: int,
    symmetric: bool,
    method: str,
    calibration: Mapping[str, Tensor] | None,
) -> Callable[[str, int], None]:
    """A function that gives one layer of the probe a width; each rounding is made once."""
    made: dict[tuple[str, int], nn.Module] = {}
    now: dict[str, int] = {}

    def put(name: str, bits: int) -> None:
        if now.get(name) == bits:
            return
        if (name, bits) not in made:
            weight, bias = float_weight(model.get_submodule(name))
            moments = None if calibration is None else calibration.get(name)
            rounded = round_layer(weight, bits, group_size, symmetric, method, moments)
            made[name, bits] = quantized_linear(rounded, bias).to(weight.device).eval()
        replace_module(probe, name, made[name, bits])
        now[name] = bits

    return put


def _round_head(model: nn.Module, probe: nn.Module, bits: int | None) -> None:
    head = output_head(model)
    name = next((name for name, module in model.named_modules() if module is head), None)
    if bits is None or head is None or name is None:
        return
    weight, bias = float_weight(head)
    replace_module(probe, name, quantized_linear(round_layer(weight, bits, 128, False, "rtn", None), bias))
