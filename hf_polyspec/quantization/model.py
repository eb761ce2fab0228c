# SPDX-License-Identifier: Apache-2.0
"""Quantised copies of whole models, made without changing the model they are made from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_polyspec.cpu.packing import unfuse
from hf_polyspec.cpu.shared_input import share_inputs
from hf_polyspec.defaults import require_model
from hf_polyspec.host.fetching import fetched, fetched_copy, is_offloaded
from hf_polyspec.host.ranks import is_split
from hf_polyspec.host.release import input_device, plain_name
from hf_polyspec.host.whole import whole_copy
from hf_polyspec.integers.foreign import stored_elsewhere
from hf_polyspec.integers.gptq_format import storable
from hf_polyspec.integers.linear import float_weight, matrix_shape
from hf_polyspec.integers.weights import QuantizedWeight, check_bits, round_to_nearest, search_scales
from hf_polyspec.quantization.awq import fold_for
from hf_polyspec.quantization.bridge import saved_by_transformers
from hf_polyspec.quantization.linear import Int8Linear, quantized_linear
from hf_polyspec.quantization.modules import is_linear, output_head, replace_module, sharing_copy
from hf_polyspec.quantization.store import LayerStore

ModuleFilter = Callable[[str, nn.Module], bool]
Progress = Callable[[str], None]
METHODS = ("rtn", "search", "gptq", "awq", "awq+gptq")
CALIBRATED = ("gptq", "awq", "awq+gptq")
"""Methods that cannot do without calibration."""


def linear_layers(model: nn.Module, modules: ModuleFilter | None = None) -> dict[str, nn.Module]:
    """The float linear layers of a model by name, those `modules` refuses left out."""
    found = {name: module for name, module in model.named_modules() if is_linear(module)}
    return {name: module for name, module in found.items() if modules is None or modules(name, module)}


def plan_bits(
    model: nn.Module,
    bits: int,
    head_bits: int | None,
    layer_bits: Mapping[str, int] | None = None,
    modules: ModuleFilter | None = None,
) -> dict[str, int]:
    """Which layer gets how many bits; layers the format cannot hold and a float head are left out.

    Raises:
        ValueError: Unsupported bits, `layer_bits` names a layer that is not there, or nothing is left to quantise.
    """
    for asked in (bits, *([] if head_bits is None else [head_bits]), *(layer_bits or {}).values()):
        check_bits(asked, -1)
    layers = linear_layers(model, modules)
    unknown = sorted(set(layer_bits or {}) - set(layers))
    if unknown:
        raise ValueError(f"layer_bits names {unknown[0]!r}, which is no linear layer of {type(model).__name__}.")
    head = output_head(model)
    plan: dict[str, int] = {}
    for name, module in layers.items():
        width: int | None = head_bits if module is head else bits
        if layer_bits is not None and name in layer_bits:
            width = layer_bits[name]
        if width is not None and storable(matrix_shape(module), width):
            plan[name] = width
    if not plan:
        raise ValueError(f"{type(model).__name__} has no linear layer that could be quantised to {bits} bits.")
    return plan


def merged_adapters(model: nn.Module) -> nn.Module:
    """A model with its active adapters merged into a copy, PEFT's wrapper removed; a model without any as it is."""
    if is_split(model):
        return _put_together(model)
    if callable(getattr(model, "merge_and_unload", None)):
        peft_model: Any = copy.deepcopy(model)
        merged: nn.Module = peft_model.merge_and_unload()
        return merged
    # generate() on a PEFT model hands on the model inside it; adapters that transformers loads itself have no wrapper.
    if not any(_is_adapter(module) for module in model.modules()):
        return model
    bare: Any = copy.deepcopy(model)
    for name, layer in list(bare.named_modules()):
        if _is_adapter(layer):
            waiting = set(layer.active_adapters) - set(getattr(layer, "merged_adapters", ()))
            if not layer.disable_adapters and waiting:  # merged already where the caller has merged them
                layer.merge()
            replace_module(bare, name, layer.get_base_layer())
    if getattr(bare, "_hf_peft_config_loaded", False):
        bare._hf_peft_config_loaded = False
    result: nn.Module = bare
    return result


def _put_together(model: Any) -> nn.Module:
    """A model that is sharded over processes, whole, on the CPU: its device might not hold it."""
    copy: nn.Module = whole_copy(model, device=torch.device("cpu"))
    return copy


def _is_adapter(module: Any) -> bool:
    return callable(getattr(module, "get_base_layer", None)) and callable(getattr(module, "unmerge", None))


def round_layer(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, method: str, moments: Tensor | None
) -> QuantizedWeight:
    """Quantise one matrix `[N, K]` with the method asked for; 8 bits always take one symmetric scale a row.

    Args:
        weight: `[N, K]`.
        bits: Bits a weight.
        group_size: Inputs that share a scale below 8 bits.
        symmetric: Store no zeros below 8 bits.
        method: One of `METHODS`.
        moments: `[K, K]` second moments of the layer's input, or None without calibration.
    """
    if bits == 8:
        group_size, symmetric = -1, True
    if method == "rtn" or bits == 8:  # at 8 bits rounding is too fine for anything else to show
        return round_to_nearest(weight, bits, group_size, symmetric)
    if method == "search" or moments is None:
        importance = None if moments is None else moments.diagonal()
        return search_scales(weight, bits, group_size, symmetric, importance)
    from hf_polyspec.quantization.gptq import round_with_feedback

    return round_with_feedback(weight, moments, bits, group_size, symmetric)


def _check_request(
    model: nn.Module, bits: int, group_size: int, method: str, calibration: Mapping[str, Tensor] | None
) -> None:
    require_model("quantize_model", model)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: use one of {METHODS}.")
    if method in CALIBRATED and calibration is None:
        raise ValueError(f'method="{method}" needs calibration=input_moments(model, tokens).')
    check_bits(bits, group_size)
    if method.startswith("awq") and any(stored_elsewhere(layer) for layer in linear_layers(model).values()):
        raise ValueError(
            f'method="{method}" folds scales into float weights, and those of {type(model).__name__} were quantised by '
            'another library: use "rtn", "search" or "gptq".'
        )
    if not any(parameter.is_meta for parameter in model.parameters()):
        return
    kind = type(model).__name__
    if not is_offloaded(model):
        raise ValueError(f"{kind} has weights that are nowhere (on the meta device): load them to quantise it.")
    if method.startswith("awq"):
        raise ValueError(
            f'method="{method}" folds scales into float weights, and those of {kind} are offloaded: use "rtn", '
            '"search" or "gptq", or load it whole.'
        )
    if any(_is_adapter(module) for module in model.modules()):
        raise ValueError(f"{kind} has adapters and weights that are offloaded: merge them before, or load it whole.")


def _weight(model: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer, fetched where they are offloaded.

    Raises:
        ValueError: Another library keeps the weight, and it cannot be had; the sentence names the layer.
    """
    try:
        layer = model.get_submodule(name)
        with fetched(layer):
            return float_weight(layer)
    except ValueError as error:
        raise ValueError(
            f"{name} of {type(model).__name__} was quantised by another library and cannot be quantised anew: {error}; "
            "make the middle of the float model instead."
        ) from error


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    bits: int = 8,
    group_size: int = 128,
    *,
    method: str = "rtn",
    symmetric: bool = False,
    modules: ModuleFilter | None = None,
    head_bits: int | None = 8,
    layer_bits: Mapping[str, int] | None = None,
    activation_bits: int | None = None,
    calibration: Mapping[str, Tensor] | None = None,
    store: LayerStore | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of a model whose linear layers compute with integer weights: the middle of a chain.

    The model itself is left as it is. Everything that is not a quantised linear layer (embeddings, norms) shares its
    memory with the model, unless it is offloaded: the copy is in memory as a whole. A PEFT model is copied with its
    adapters merged.

    Args:
        model: Any model in float32, bfloat16 or float16; linear layers that bitsandbytes, torchao or another library
            has quantised are dequantised one by one, and offloaded ones (accelerate) are fetched one by one.
        bits: Bits a weight: 8 (one scale a row), or 4, 3 or 2 (a scale and a zero a group).
        group_size: Inputs that share a scale below 8 bits; widths it does not divide are handled.
        method: "rtn" rounds to the nearest code; "search" also tries narrower ranges; "gptq" spreads each
            rounding error over the weights still to come; "awq" folds activation-aware scales into the layers before
            and then searches, "awq+gptq" does both (all three need `calibration`).
        symmetric: Store no zeros below 8 bits.
        modules: `(name, module) -> bool`, which linear layers to quantise; all by default.
        head_bits: Bits of the layer that makes the logits, None to leave it in float.
        layer_bits: Bits for single layers by name: mixed precision.
        activation_bits: 8 rounds the activations of 8-bit layers too: faster on many rows, coarser.
        calibration: Second moments of every layer's input, from `calibrate.input_moments`.
        store: Where finished layers are kept, and taken from if they are already there.
        progress: Called with the name of each layer when it is done.

    Returns:
        The quantised copy, in eval mode, on the model's device.

    Raises:
        ValueError: Unsupported bits or method, "gptq" or "awq" without calibration, no layer that could be quantised,
            no place to fold scales into.
    """
    _check_request(model, bits, group_size, method, calibration)
    source, method, calibration = fold_for(method, merged_adapters(model), calibration, bits, group_size, symmetric)
    plan = plan_bits(source, bits, head_bits, layer_bits, modules)
    away = is_offloaded(source)
    quantized = fetched_copy(source, plan) if away else unfuse(sharing_copy(source).eval())  # fused blocks are float
    for name, width in plan.items():
        weight, bias = _weight(source, name)
        moments = None if calibration is None else calibration.get(name)
        make = partial(round_layer, weight, width, group_size, symmetric, method, moments)
        layer = quantized_linear(_kept_or_made(store, name, make), bias).to(weight.device).eval()
        layer.activation_bits = activation_bits if isinstance(layer, Int8Linear) else None
        replace_module(quantized, plain_name(name), layer)  # the copy's parts are not compiled
        if progress is not None:
            progress(name)
    share_inputs(quantized)
    if hasattr(quantized, "save_pretrained"):
        saved_by_transformers(quantized)
    return quantized.to(input_device(model)) if away or (source is not model and is_split(model)) else quantized


def _kept_or_made(store: LayerStore | None, name: str, make: Callable[[], QuantizedWeight]) -> QuantizedWeight:
    """A rounded layer from the store, else made and put there."""
    if store is None:
        return make()
    rounded = store.get(name)
    if rounded is None:
        rounded = make()
        store.put(name, rounded)
    return rounded
