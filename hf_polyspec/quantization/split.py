# SPDX-License-Identifier: Apache-2.0
"""A copy in fewer bits of a model that processes split, which stays split: each rounds what it holds.

Nothing is put together, so that no process needs memory for more than its part. Scales are of the parts: of a layer
that is split by columns every part has scales of its own, and is a little closer to the model than a whole copy.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from hf_polyspec.cpu.shared_input import share_inputs
from hf_polyspec.host.ranks import Ranks
from hf_polyspec.host.split_layers import ADDED, APART, Part, SplitLinear, parts_of, shells
from hf_polyspec.integers.gptq_format import storable
from hf_polyspec.integers.weights import round_to_nearest
from hf_polyspec.quantization.linear import quantized_linear
from hf_polyspec.quantization.modules import output_head, replace_module

_GROUP = 128
_PROBE = (1, 2, 3, 4, 5, 6, 7, 8)
_LEAST = 0.5
"""Correlation of the logits of a copy, at least, with those of its model."""


@torch.no_grad()
def split_copy(model: Any, bits: int, ranks: Ranks) -> Any:
    """A copy of a model with integers in its split linear layers; collective.

    Args:
        model: its weights are split; bits: of a weight; the layer that makes the logits stays as it is.
        ranks: the processes that hold it.

    Returns:
        The copy, in eval mode, split as the model is.

    Raises:
        ValueError: in all processes alike, why there is none.
    """
    failure, made = None, None
    try:
        made = _made(model, bits)
    except ValueError as error:
        failure = " ".join(str(error).split())
    reasons = [reason for reason in ranks.gathered(failure) if reason is not None]
    if made is None or reasons:
        raise ValueError(f"{type(model).__name__} has no int{bits} copy that is split as it is: {reasons[0]}.")
    ids = torch.tensor([_PROBE], device=next(model.parameters()).device)
    wanted, found = (one(input_ids=ids, use_cache=False).logits.float().flatten() for one in (model, made))
    alike = float(torch.corrcoef(torch.stack([wanted, found]))[0, 1])
    if not ranks.told(alike >= _LEAST):
        raise ValueError(f"{type(model).__name__} has no int{bits} copy that is split as it is: it computes otherwise.")
    return made


def _made(model: Any, bits: int) -> Any:
    parts = parts_of(model)
    made = shells(model)
    head = output_head(model)
    for name, part in parts.items():
        rows, columns = part.weight.shape
        # EAGLE heads below it put the layer that makes the logits together from its parts.
        if model.get_submodule(name) is not head and storable((rows, columns), bits):
            replace_module(made, name, _layer(part, bits))
    share_inputs(made)
    made.config = copy.deepcopy(model.config)
    return made.eval()


def _layer(part: Part, bits: int) -> torch.nn.Module:
    rounded = round_to_nearest(part.weight, bits, -1 if bits == 8 else _GROUP, bits == 8)
    layer = quantized_linear(rounded, None if part.way == ADDED else part.bias).to(part.weight.device).eval()
    return layer if part.way == APART else SplitLinear(layer, part)
