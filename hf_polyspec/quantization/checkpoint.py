# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints on disk: written for `from_pretrained`, read in every GPTQ dialect."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

from hf_polyspec.quantization.autogptq import SETTINGS, named_for_transformers
from hf_polyspec.quantization.config import METHOD, PolySpecQuantizationConfig, read_config
from hf_polyspec.quantization.modules import output_head, quantized_layers
from hf_polyspec.quantization.tied_head import SETTING, tied_head
from hf_polyspec.storage.checkpoints import loading
from hf_polyspec.storage.folders import filling
from hf_polyspec.storage.reading import read_json


def _described(model: nn.Module, tied: tuple[str, dict[str, Any]] | None) -> dict[str, Any]:
    """The `quantization_config` that describes a quantised model, whose head need not be stored if `tied`."""
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantised layer: use quantize_model first.")
    head = output_head(model)
    body = [layer for layer in layers.values() if layer is not head] or list(layers.values())
    common = min((layer.bits for layer in body), key=lambda bits: -sum(layer.bits == bits for layer in body))
    widths = [layer for layer in body if layer.bits == common]
    group_size = widths[0].group_size
    stored = {name: layer for name, layer in layers.items() if tied is None or layer is not head}
    alike = {name for name, layer in stored.items() if (layer.bits, layer.group_size) == (common, group_size)}
    overrides = {
        f"+:^{name}$".replace(".", r"\."): {"bits": layer.bits, "group_size": layer.group_size, "sym": layer.symmetric}
        for name, layer in stored.items()
        if name not in alike
    }
    return {
        "quant_method": METHOD,
        "bits": common,
        "group_size": group_size,
        "sym": all(layers[name].symmetric for name in alike),
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": tied is None and any(layer is head for layer in layers.values()),
        "dynamic": overrides,
        **({} if tied is None else {SETTING: tied[1]}),
    }


def checkpoint_parts(model: nn.Module) -> tuple[dict[str, Any], bool | None, dict[str, Tensor]]:
    """What a checkpoint of a quantised model consists of, besides its config.

    Returns:
        The `quantization_config`; whether the config is to call head and embeddings tied, None for what it says
        already; and the tensors by name.

    Raises:
        ValueError: The model has no quantised layer.
    """
    tied = tied_head(model)
    stored = _described(model, tied)
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if tied is None or not name.startswith(f"{tied[0]}.")
    }
    return stored, tied is not None if stored["lm_head"] or tied is not None else None, tensors


def save_quantized(model: nn.Module, folder: str | Path, quant_method: str = METHOD) -> Path:
    """Write a quantised model as a checkpoint in GPTQ's layout.

    `AutoModelForCausalLM.from_pretrained(folder)` loads it once `hf_polyspec.quantization` is imported, and so does
    `load_quantized`. The tensors are those of any GPTQ checkpoint; with `quant_method="gptq"` other loaders
    (gptqmodel, vLLM) recognise it too, and transformers then asks for gptqmodel. A head that was rounded from tied
    embeddings is not stored a second time (see `tied_head`).

    The files appear together, config.json last; until then the folder holds what it held, and no config.json once
    files have begun to move.

    Args:
        model: From `quantize_model` or loaded from a quantised checkpoint.
        folder: Made if need be.
        quant_method: "hf_polyspec" or "gptq", the name written into config.json.

    Returns:
        The folder.

    Raises:
        ValueError: The model has no quantised layer, or `quant_method` is unknown.
        OSError: The folder cannot be written, a full disk included.
    """
    if quant_method not in (METHOD, "gptq"):
        raise ValueError(f"quant_method={quant_method!r} must be {METHOD!r} or 'gptq'.")
    stored, ties, tensors = checkpoint_parts(model)
    target = Path(folder)
    config: Any = copy.deepcopy(model.config)
    if ties is not None:
        config.tie_word_embeddings = ties
    config.quantization_config = {**stored, "quant_method": quant_method}
    config.architectures = [type(model).__name__]
    # Without it transformers would take the first float tensor's dtype: that of the scales.
    config.dtype = next(parameter.dtype for parameter in model.parameters())
    with filling(target, replaces=("model*.safetensors", "model.safetensors.index.json")) as place:
        config.save_pretrained(place)
        generation_config = getattr(model, "generation_config", None)
        if generation_config is not None:
            generation_config.save_pretrained(place)
        save_torch_state_dict(tensors, place, metadata={"format": "pt"})
    return target


def load_quantized(
    folder: str | Path,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    **options: Any,
) -> nn.Module:
    """Load a GPTQ checkpoint by AutoGPTQ, gptqmodel, AutoRound or this package, without those packages.

    Args:
        folder: A folder or a Hub id.
        dtype: Of everything that is not quantised; "auto" takes the checkpoint's.
        device: Where to, the CPU by default.
        options: For `from_pretrained`.

    Returns:
        The model on this package's layers, in eval mode.

    Raises:
        ValueError: No GPTQ checkpoint, a layout of one kernel, or a file of it is damaged; the sentence names it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if device is not None:
        options["device_map"] = {"": device}
    with loading(folder), named_for_transformers(Path(folder)) as source:
        config = AutoConfig.from_pretrained(folder)
        config.quantization_config = _stored_config(folder, config).to_dict()
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **options)
    assert isinstance(model, nn.Module)
    return model.eval()


def _stored_config(folder: str | Path, config: Any) -> PolySpecQuantizationConfig:
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        path = Path(folder) / SETTINGS  # AutoGPTQ's own file, before transformers knew GPTQ
        if not path.is_file():
            raise ValueError(f"{folder} has no quantization_config: it is no quantised checkpoint.")
        stored = read_json(path)
    return read_config(stored if isinstance(stored, dict) else stored.to_dict())
