# SPDX-License-Identifier: Apache-2.0
"""Token trees in one forward pass: who is whose ancestor, masks, and whether a model obeys them."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..exactness.context import Context
from ..exactness.tree_geometry import ROOT, depths
from .attention import attention_name
from .columns import mask_of

_measured: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def ancestors(parents: list[int]) -> torch.Tensor:
    """`[T, T]` boolean: whether node j is node i or one of its ancestors."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent != ROOT:
            seen[node] |= seen[parent]
    return seen


def tree_mask(real: torch.Tensor, fed: int, parents: list[list[int]]) -> torch.Tensor:
    """What each fed column may see.

    Args:
        real: `[B, S]` boolean, columns that hold a token, the fed ones included.
        fed: columns F at the right edge that are fed; the last of row b are its nodes.
        parents: per row, the parent of each node.

    Returns:
        `[B, F, S]` boolean.
    """
    width = real.shape[1]
    order = torch.arange(width)
    causal = order[None, :] <= order[width - fed :, None]  # [F, S]
    seen = causal[None] & real[:, None, :]
    for row, of_row in enumerate(parents):
        count = len(of_row)
        if count:
            seen[row, fed - count :, width - count :] = ancestors(of_row)
    # A column without a token sees itself, so that its (unused) output stays finite.
    return seen | (order[None, :] == order[width - fed :, None])[None]


def additive(seen: torch.Tensor, places: torch.Tensor, model: Any) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask in the form the model's attention adds: `[B, 1, F, S]`, or one for each kind of its layers.

    Args:
        seen: `[B, F, S]` from `tree_mask`.
        places: `[B, S]`, each column's position in its text; siblings share one. Windows are measured in these.
        model: whose config tells the window and the kinds of layers.
    """
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    whole = _as_float(seen, model)
    if not isinstance(window, int) or window <= 0 or kinds == {"full_attention"}:
        return whole
    fed = seen.shape[1]
    near = places[:, None, :] > places[:, -fed:, None] - window  # [B, F, S]
    itself = torch.eye(fed, dtype=torch.bool).expand(len(seen), -1, -1)
    narrow = seen & near
    narrow[:, :, -fed:] |= itself
    windowed = _as_float(narrow, model)
    if len(kinds) > 1:
        return {kind: whole if kind == "full_attention" else windowed for kind in kinds}
    return windowed


def _as_float(seen: torch.Tensor, model: Any) -> torch.Tensor:
    dtype = model.dtype
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return mask[:, None]


def hindrance(model: Any) -> str | None:
    """Why a model cannot check a tree, or None if it can: said by its config, or measured once a model."""
    config = model.config.get_text_config(decoder=True)
    attention = attention_name(config)
    if attention not in ("sdpa", "eager"):
        return f"its attention is {attention}; trees need sdpa or eager"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return f"it has {', '.join(sorted(kinds))} layers"
    if model not in _measured:
        obeys = _obeys(model)
        if obeys is None:  # perhaps only for now: hooks may want the rows of a certain batch
            return "it could not be tried on one"
        _measured[model] = obeys
    return None if _measured[model] else "it does not see a tree as its paths"


@torch.no_grad()
def _obeys(model: Any) -> bool | None:
    """Whether two continuations of a token, fed as a tree, get the logits they get as two texts; None if it raises."""
    rows = int(model.config.get_text_config(decoder=True).vocab_size)
    a, b, c, d, e = (int(rows * part / 7) for part in range(1, 6))
    device = model.get_input_embeddings().weight.device
    parents = [ROOT, ROOT, 0, 1]
    places = torch.tensor([[0, 1, 1, 2, 2]])
    seen = tree_mask(torch.ones(1, 5, dtype=torch.bool), 5, [parents])
    mask = additive(seen, places, model)
    on_device = {k: m.to(device) for k, m in mask.items()} if isinstance(mask, dict) else mask.to(device)
    try:
        paths = model(input_ids=torch.tensor([[a, b, d], [a, c, e]], device=device), use_cache=False).logits
        tree = model(
            input_ids=torch.tensor([[a, b, c, d, e]], device=device),
            attention_mask=on_device,
            position_ids=places.to(device),
            use_cache=False,
        ).logits
    except Exception:
        return None
    straight = torch.stack([paths[0, 1], paths[1, 1], paths[0, 2], paths[1, 2]]).float()
    error = (tree[0, 1:].float() - straight).abs().max()
    coarse = 1e-3 if model.dtype == torch.float32 else 5e-2
    return bool(error <= coarse * straight.abs().max())


def plant(
    inputs: dict[str, Any],
    context: Context,
    sequences: list[list[int]],
    parents: list[list[int]],
    width: int,
    model: Any,
) -> None:
    """Give the forward arguments of a chain the mask and positions of trees instead.

    Args:
        inputs: the arguments, `position_ids` among them.
        context: rows that the trees continue; sequences: what is in the columns, trees and filling included.
        parents: of the nodes that end every row; width: columns S + F in all.
        model: whose arguments they are.
    """
    unused = [width - len(ids) for ids in sequences]
    mask = mask_of(context, unused, width)
    real = torch.ones(len(unused), width, dtype=torch.bool) if mask is None else mask.bool()
    places = torch.arange(width)[None, :] - torch.tensor(unused)[:, None]  # [B, S]
    positions = inputs["position_ids"].clone()  # [B, F], or [N, B, F]
    fed = positions.shape[-1]
    for b, of_row in enumerate(parents):
        if of_row:
            depth, count = torch.tensor(depths(of_row)), len(of_row)
            places[b, -count:] = len(context.ids[b]) - 1 + depth
            positions[..., b, -count:] = positions[..., b, -count - 1, None] + depth.to(positions.device)
    added = additive(tree_mask(real, fed, parents), places, model)
    device = positions.device
    inputs["attention_mask"] = (
        {kind: one.to(device) for kind, one in added.items()} if isinstance(added, dict) else added.to(device)
    )
    inputs["position_ids"] = positions
