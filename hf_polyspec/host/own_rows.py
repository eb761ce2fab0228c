# SPDX-License-Identifier: Apache-2.0
"""Whether a model can read rows that each have their own columns: found by trying it, once a model."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..exactness.context import Context, Prompt
from ..telemetry.counters import LevelStats
from .attention import attention_name
from .forwarding import Forwarding
from .ragged import RaggedRunner
from .release import forward_arguments, inner_model, input_device, is_compiled
from .rope import gate
from .row_arguments import RowArguments
from .runner import ModelRunner
from .states import keeps_states

_LENGTHS = (7, 4, 9)
"""Ids of each row; the last is not asked at first, and joins."""
_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def rows_apart(model: Any) -> bool:
    """Whether rows read side by side in one pass get the logits that each gets alone.

    Asked are models in evaluation that take position ids and choose their attention (sdpa) by transformers' interface.
    """
    inner = inner_model(model)
    if inner.training or attention_name(inner.config.get_text_config(decoder=True)) != "sdpa":
        return False
    if "position_ids" not in forward_arguments(model) or not Forwarding(model).plain or keeps_states(model):
        return False
    # Where frequencies depend on the length of a text, the longest row of a pass would decide for all.
    if gate(model, 0) is not None or is_compiled(model) or RowArguments(inner).any:
        return False
    if inner not in _known:
        _known[inner] = input_device(model).type != "meta" and _alike(model)
    return _known[inner]


@torch.no_grad()
def _alike(model: Any) -> bool:
    rows = _texts(model)
    try:
        found, wanted = _side_by_side(model, rows), torch.stack([_alone(model, row) for row in rows])
    except Exception:
        return False
    coarse = 1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((found - wanted).abs().max() <= coarse * wanted.abs().max())


def _texts(model: Any) -> list[list[int]]:
    size = int(model.get_input_embeddings().weight.shape[0])
    return [
        [(11 * row + 5 * place * place + 3 * place + 1) % size for place in range(n)] for row, n in enumerate(_LENGTHS)
    ]


def _prompt(lengths: list[int]) -> Prompt:
    width = max(lengths)
    mask = torch.tensor([[int(column >= width - length) for column in range(width)] for length in lengths])
    return Prompt(width, mask, (mask.cumsum(-1) - 1).clamp(min=0))


def _side_by_side(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Logits `[B, 3, V]` at the last places of each row, read in two passes between which a draft is taken back."""
    stats, runner = LevelStats("probe", 0), RaggedRunner(model, "the probe", rows=len(rows))
    lengths = [len(row) - 2 for row in rows]
    prompt = _prompt(lengths)
    ids = [[0] * (prompt.width - n) + row[:n] for row, n in zip(rows, lengths, strict=True)]
    context = Context(ids, prompt)
    runner.asked = [True] * (len(rows) - 1) + [False]
    runner.run(context, [row[:3] for row in reversed(rows)], stats)
    return runner.run(context, [row[-2:] for row in rows], stats).logits


def _alone(model: Any, row: list[int]) -> torch.Tensor:
    runner = ModelRunner(model, "the probe")
    prompt = _prompt([len(row) - 2])
    return runner.run(Context([row[:-2]], prompt), [row[-2:]], LevelStats("probe", 0)).logits[0]


def plainly_padded(prompt: Prompt) -> bool:
    """Whether every column of a prompt has an id, and those that hold no token are at its left."""
    if prompt.embeds is not None or prompt.hidden:
        return False
    mask = None if prompt.mask is None else prompt.mask.long()  # differences of booleans have no sign
    return mask is None or bool((mask.diff(dim=-1) >= 0).all() and (mask[:, -1] == 1).all())
