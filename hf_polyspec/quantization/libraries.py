# SPDX-License-Identifier: Apache-2.0
"""Calibration by other packages: AutoRound and GPTQModel round, their GPTQ checkpoints run on this package's layers."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_polyspec.integers.gptq_format import storable
from hf_polyspec.integers.linear import matrix_shape
from hf_polyspec.quantization.checkpoint import load_quantized
from hf_polyspec.quantization.model import quantize_model
from hf_polyspec.quantization.modules import is_linear, output_head


@dataclass(frozen=True)
class Job:
    """One quantisation by a library.

    Attributes:
        model: The float model; it stays as it is.
        tokenizer: Its tokenizer.
        texts: Ids `[T]` to calibrate on.
        bits: Bits a weight.
        group_size: Inputs that share a scale, -1 for a whole row.
        symmetric: Whether no zeros are stored.
        folder: Where the library may write.
        iterations: Steps of a library that optimises.
    """

    model: Any
    tokenizer: Any
    texts: Sequence[Tensor]
    bits: int
    group_size: int
    symmetric: bool
    folder: Path
    iterations: int


def _autoround(job: Job) -> Path:
    from auto_round import AutoRound

    whole = torch.cat([text.reshape(-1).cpu() for text in job.texts])
    length = min(512, max(1, len(whole) // 8))
    # It takes texts of one length only.
    rows = list(whole[: len(whole) // length * length].view(-1, 1, length))
    rounding = AutoRound(
        copy.deepcopy(job.model),  # it writes into the model
        tokenizer=job.tokenizer,
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        dataset=rows,
        seqlen=length,
        nsamples=len(rows),
        batch_size=min(4, len(rows)),
        iters=job.iterations,
        # Compiling takes minutes a model, on a CPU longer than the rounding.
        enable_torch_compile=next(job.model.parameters()).is_cuda,
    )
    rounding.quantize_and_save(str(job.folder), format="auto_gptq")
    return _checkpoint(job.folder)


def _gptqmodel(job: Job) -> Path:
    from gptqmodel import GPTQModel, QuantizeConfig

    source = job.folder / "float"
    job.model.save_pretrained(source)
    job.tokenizer.save_pretrained(source)
    config = QuantizeConfig(bits=job.bits, group_size=job.group_size, sym=job.symmetric)
    loaded = GPTQModel.load(str(source), config)
    rows = [{"input_ids": text.tolist(), "attention_mask": [1] * len(text)} for text in job.texts]
    loaded.quantize(rows, batch_size=1)
    written = job.folder / "quantised"
    loaded.save(str(written))
    return _checkpoint(written)


@dataclass(frozen=True)
class Library:
    """A package that calibrates.

    Attributes:
        package: What to install.
        module: What is imported.
        extra: This package's extra that brings it.
        run: Quantises and returns the checkpoint's folder.
    """

    package: str
    module: str
    extra: str
    run: Callable[[Job], Path]


LIBRARIES = {
    "autoround": Library("auto-round", "auto_round", "autoround", _autoround),
    "gptqmodel": Library("gptqmodel", "gptqmodel", "gptq", _gptqmodel),
}


def check_library(method: str) -> Library:
    """The library behind a method.

    Raises:
        ImportError: It is not installed; the sentence says what to install.
        ValueError: No library has this name.
    """
    if method not in LIBRARIES:
        raise ValueError(f"method={method!r} is no library: use one of {tuple(LIBRARIES)}.")
    library = LIBRARIES[method]
    if importlib.util.find_spec(library.module) is None:
        raise ImportError(
            f"--method {method} needs the package {library.package}: "
            f'pip install "hf_polyspec[{library.extra}]"; gptq and awq are built in.'
        )
    return library


def quantize_with_library(
    method: str,
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Tensor],
    bits: int = 4,
    group_size: int = 128,
    *,
    symmetric: bool = True,
    head_bits: int | None = 8,
    iterations: int = 200,
) -> nn.Module:
    """A quantised copy made by another package's calibration, on this package's layers.

    Args:
        method: "autoround" or "gptqmodel".
        model: The float model; it stays as it is.
        tokenizer: Its tokenizer.
        texts: Ids `[T]` to calibrate on.
        bits: Bits a weight.
        group_size: Inputs that share a scale, -1 for a whole row.
        symmetric: Whether no zeros are stored.
        head_bits: Bits of the layer that makes the logits, which the libraries leave in float; None does too.
        iterations: Steps a block, of a library that optimises (AutoRound).

    Returns:
        The copy, as `load_quantized` would load it.

    Raises:
        ImportError: The package is not installed.
        ValueError: An unknown method, or no text.
    """
    library = check_library(method)
    if not texts:
        raise ValueError(f"--method {method} needs text to calibrate on.")
    dtype = next(model.parameters()).dtype
    with tempfile.TemporaryDirectory() as place:
        job = Job(model, tokenizer, texts, bits, group_size, symmetric, Path(place), iterations)
        made = load_quantized(library.run(job), dtype=dtype, device=next(model.parameters()).device)
    head = output_head(made)
    if head_bits is None or head is None or not is_linear(head):
        return made
    outputs, features = matrix_shape(head)
    if not storable((outputs, features), head_bits):
        return made
    return quantize_model(made, head_bits, head_bits=head_bits, modules=lambda _, module: module is head)


def _checkpoint(folder: Path) -> Path:
    """The folder, or the one folder below it, that holds the checkpoint a library wrote."""
    found = sorted(path.parent for path in folder.rglob("config.json"))
    if not found:
        raise ValueError(f"The library wrote no checkpoint into {folder}.")
    return found[0]
