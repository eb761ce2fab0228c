# SPDX-License-Identifier: Apache-2.0
"""How transformers' `from_pretrained` builds our layers: a quantizer, registered on import by its public decorator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hf_polyspec.cpu.shared_input import share_inputs
from hf_polyspec.host.quantizers import HfQuantizer, claim, register_quantizer
from hf_polyspec.host.tying import untie
from hf_polyspec.integers.gptq_format import GPTQ_TENSORS, from_gptq, stored_version
from hf_polyspec.integers.linear import matrix_shape
from hf_polyspec.quantization.checkpoint import checkpoint_parts
from hf_polyspec.quantization.config import METHOD, PolySpecQuantizationConfig
from hf_polyspec.quantization.linear import quantized_linear
from hf_polyspec.quantization.modules import is_linear, replace_module
from hf_polyspec.quantization.tied_head import SETTING, restore_head

# Of a checkpoint's tensors; a bias is of the model's own, which is torch's default while transformers builds it.
_TYPES = {"qweight": torch.int32, "qzeros": torch.int32, "g_idx": torch.int32, "scales": torch.float16}


class StoredLinear(nn.Module):
    """Holds a checkpoint's tensors for one layer while transformers fills them in.

    Args:
        shapes: Shape of every tensor of the layer in the checkpoint, by name.
        size: `(N, K)` of the matrix they stand for.
    """

    def __init__(self, shapes: dict[str, Sequence[int]], size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(tuple(shape), dtype=_TYPES.get(name)))

    @property
    def weight(self) -> Tensor:
        """Nothing: some models' weight initialisation writes into the weights of layers it knows by name."""
        return torch.empty(0)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in the format."""
        return dict(self.named_buffers())


def stored_shapes(files: Iterable[str]) -> dict[str, dict[str, Sequence[int]]]:
    """Shapes of the GPTQ tensors in some checkpoint files, by layer name, without reading them."""
    shapes: dict[str, Sequence[int]] = {}
    for path in files:
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as handle:
                shapes.update({key: handle.get_slice(key).get_shape() for key in handle.keys()})  # noqa: SIM118
        else:
            state = torch.load(path, map_location="meta", weights_only=True)
            shapes.update({key: tuple(tensor.shape) for key, tensor in state.items()})
    layers = [key.removesuffix(".qweight") for key in shapes if key.endswith(".qweight")]
    return {
        layer: {name: shapes[f"{layer}.{name}"] for name in (*GPTQ_TENSORS, "bias") if f"{layer}.{name}" in shapes}
        for layer in layers
    }


def _place(model: nn.Module, stored: str) -> str:
    """The model's name for a layer of the checkpoint; checkpoints of bare models lack (or add) the prefix."""
    names = {name for name, _ in model.named_modules()}
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}.")):
        if candidate in names:
            return candidate
    raise ValueError(f"The checkpoint has a quantised layer {stored!r}, which {type(model).__name__} has not.")


@register_quantizer(METHOD)
class PolySpecQuantizer(HfQuantizer):
    """Loads and saves checkpoints in GPTQ's layout on this package's layers."""

    requires_calibration = True
    quantization_config: PolySpecQuantizationConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **others: Any
    ) -> nn.Module:
        if not checkpoint_files:
            raise ValueError("A quantised model is loaded from a checkpoint's files, not from a state_dict.")
        names = []
        self._files = [str(path) for path in checkpoint_files]
        for stored, shapes in stored_shapes(checkpoint_files).items():
            name = _place(model, stored)
            linear = model.get_submodule(name)
            if not is_linear(linear):
                raise ValueError(f"{name} is a {type(linear).__name__}, the checkpoint has quantised weights for it.")
            outputs, features = matrix_shape(linear)
            with torch.device("meta"):
                layer = StoredLinear(shapes, (outputs, features))
            replace_module(model, name, layer)
            names.append(name)
        # the config may be that of the model the checkpoint was made from, whose head was tied
        untie(model, names)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **others: Any) -> nn.Module:
        dtype = getattr(model, "dtype", torch.float32)
        holders = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, StoredLinear)]
        for name, layer in holders:
            replace_module(model, name, self._runnable(name, layer, dtype))
        tied = getattr(self.quantization_config, SETTING, None)
        if tied is not None:
            restore_head(model, tied, self._files)
            # From here on the model is one with a quantised head; how it is kept is found anew when it is saved.
            delattr(self.quantization_config, SETTING)
            self.quantization_config.lm_head = True
        share_inputs(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> Any:
        # Called by `save_pretrained` before it writes the config: layers may have been replaced since this was made,
        # and our layers write zeros less one, however they were read.
        config: Any = model.config
        stored, ties, tensors = checkpoint_parts(model)
        config.quantization_config = PolySpecQuantizationConfig(**stored)
        if ties is not None:
            config.tie_word_embeddings = ties
        return tensors, {}

    def _runnable(self, name: str, layer: StoredLinear, dtype: torch.dtype) -> nn.Module:
        tensors = layer.tensors()
        bias = tensors.pop("bias", None)
        outputs, features = layer.size
        bits = tensors["qweight"].shape[0] * 32 // features
        groups = tensors["scales"].shape[0]
        group_size = -1 if groups == 1 else self._group_size(features, groups)
        weight = from_gptq(tensors, bits, group_size, self._version(name, tensors["qzeros"], bits))
        if weight.shape != (outputs, features):
            raise ValueError(f"{name} holds a matrix of {weight.shape}, the model wants {(outputs, features)}.")
        return quantized_linear(weight, None if bias is None else bias.to(dtype))

    def _version(self, name: str, qzeros: Tensor, bits: int) -> int:
        """How a layer's zeros are stored: as the numbers tell where they can, else as the checkpoint says."""
        if not self.quantization_config.symmetric(name):
            return self.quantization_config.version
        try:
            return stored_version(qzeros, bits)
        except ValueError as error:
            raise ValueError(
                f"The checkpoint says that {name} is symmetric (sym), but {error}: what its weights are cannot be "
                "told; set sym to false in its config if its checkpoint_format is right."
            ) from None

    def _group_size(self, features: int, groups: int) -> int:
        size = self.quantization_config.group_size
        if size > 0 and -(-features // size) == groups:
            return size
        return -(-features // groups)  # a layer with a group size of its own

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        # Scales are float16 in the format and stay it, whatever dtype the model is asked for.
        return torch.float16 if dtype is torch.float16 else super().get_new_dtype(converter, param, dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def saved_by_transformers(model: nn.Module) -> None:
    """Make `save_pretrained` of a model with quantised layers write what `from_pretrained` reads."""
    claim(model, PolySpecQuantizer(PolySpecQuantizationConfig()))  # described when it is saved
