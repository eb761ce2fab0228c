# SPDX-License-Identifier: Apache-2.0
"""What a model hands out of its layers: maps of the columns that were read, or something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..errors import TARGET, UncheckableError
from .release import inner_model, input_device

_COLUMNS = 11
_known: WeakKeyDictionary[Any, tuple[int, ...] | None] = WeakKeyDictionary()


def check_maps(model: Any) -> None:
    """Refuse to cut a target's attention maps for single tokens where they are no maps of tokens.

    Linear attention hands out the states that a pass leaves behind, and some sparse attention has columns besides those
    of the tokens, as many as were read by then.

    Raises:
        UncheckableError: names the class and the shape.
    """
    inner = inner_model(model)
    if inner not in _known:
        _known[inner] = None if input_device(model).type == "meta" else _odd(inner, input_device(model))
    shape = _known[inner]
    if shape is not None:
        raise UncheckableError(
            f"output_attentions: {TARGET} ({type(inner).__name__}) hands out maps of shape {list(shape)} of a row with "
            f"{_COLUMNS} columns, which cannot be cut for single tokens; leave it out to use assistant_models.",
            TARGET,
        )


@torch.no_grad()
def _odd(inner: Any, device: torch.device) -> tuple[int, ...] | None:
    rows = inner.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[(7 * place + 3) % rows for place in range(_COLUMNS)]], device=device)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            maps: Sequence[Any] = inner(input_ids=ids, output_attentions=True, return_dict=True).attentions or ()
    except Exception:
        return None  # it wants more than ids, or says so itself
    shapes = (tuple(one.shape) for one in maps if isinstance(one, torch.Tensor))
    return next((shape for shape in shapes if shape[-2:] != (_COLUMNS, _COLUMNS)), None)
