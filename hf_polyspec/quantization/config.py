# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's `quantization_config` says, in whichever dialect it was written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hf_polyspec.host.quantizers import QuantizationConfigMixin, register_quantization_config
from hf_polyspec.integers.weights import check_bits

METHOD = "hf_polyspec"
GPTQ_METHODS = ("gptq", "auto-round", "auto_round", "intel/auto-round", METHOD)


@register_quantization_config(METHOD)
class PolySpecQuantizationConfig(QuantizationConfigMixin):
    """Quantised weights in GPTQ's layout, run by this package's layers.

    Args:
        bits: Bits of layers that do not say otherwise (each layer's own width is read off its tensors).
        group_size: Inputs that share a scale, -1 for a whole row.
        sym: Whether zeros carry no information.
        desc_act: Whether groups are out of order (act-order).
        checkpoint_format: "gptq" (zeros stored less one) or "gptq_v2".
        version: 1 or 2, the same as a number; derived from `checkpoint_format`.
        others: Kept and written back.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        sym: bool = False,
        desc_act: bool = False,
        checkpoint_format: str = "gptq",
        **others: Any,
    ) -> None:
        check_bits(bits, group_size)
        if checkpoint_format not in ("gptq", "gptq_v2"):
            raise ValueError(
                f"checkpoint_format={checkpoint_format!r} cannot be read: only gptq and gptq_v2 hold GPTQ tensors "
                "(Marlin and BitBLAS checkpoints are laid out for one kernel; convert them with gptqmodel)."
            )
        self.quant_method = METHOD
        self.bits, self.group_size, self.sym, self.desc_act = bits, group_size, sym, desc_act
        self.checkpoint_format = checkpoint_format
        self.lm_head = False
        for name, value in others.items():
            if name not in ("quant_method", "version"):
                setattr(self, name, value)

    @property
    def version(self) -> int:
        """1 if zeros are stored less one, 2 if as they are."""
        return 2 if self.checkpoint_format == "gptq_v2" else 1

    def symmetric(self, layer: str) -> bool:
        """Whether the zeros of a layer carry no information, by its name; layers may have settings of their own."""
        for pattern, settings in (getattr(self, "dynamic", None) or {}).items():
            if "sym" in (settings or {}) and re.match(pattern.removeprefix("+:"), layer):
                return bool(settings["sym"])
        own = (getattr(self, "extra_config", None) or {}).get(layer, {})  # AutoRound's
        return bool(own.get("sym", self.sym))


def read_config(stored: Mapping[str, Any]) -> PolySpecQuantizationConfig:
    """Understand the config of a GPTQ checkpoint by AutoGPTQ, gptqmodel, AutoRound or this package.

    Args:
        stored: `quantization_config` of config.json, or the content of quantize_config.json.

    Returns:
        The same as this package's config.

    Raises:
        ValueError: Another method, or a layout of one kernel.
    """
    method = str(stored.get("quant_method", "gptq")).lower()
    if method not in GPTQ_METHODS:
        raise ValueError(
            f"The checkpoint's quant_method is {method!r}: load it with transformers' from_pretrained; "
            "only GPTQ layouts are read here."
        )
    layout = str(stored.get("checkpoint_format") or _packing_layout(stored) or "gptq")
    fields = {key: value for key, value in stored.items() if key != "checkpoint_format"}
    fields["desc_act"] = bool(fields.get("desc_act") or False)
    # AutoRound writes -1 or 0 for one group a row, and so do older writers with null.
    fields["group_size"] = int(fields.get("group_size") or -1)
    return PolySpecQuantizationConfig(checkpoint_format=layout, **fields)


def _packing_layout(stored: Mapping[str, Any]) -> str | None:
    """AutoRound names the layout `auto_round:auto_gptq` and the like."""
    packing = stored.get("packing_format")
    if packing is None:
        return None
    packing = str(packing)
    if "gptq" not in packing and packing != "auto_round":
        return packing
    return "gptq_v2" if "v2" in packing or packing == "auto_round:gptqmodel" else "gptq"
