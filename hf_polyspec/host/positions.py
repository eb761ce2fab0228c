# SPDX-License-Identifier: Apache-2.0
"""Where the positions of a model end: a table of embeddings, angles or masks, beyond which a forward pass fails.

Most models compute positions and have no end. GPT-2, OPT, BERT's family, GPT-J and others look them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..exactness.context import Context
from .release import forward_arguments, inner_model


@dataclass(frozen=True)
class PositionTable:
    """How far a model can be fed.

    Attributes:
        rows: positions it has, from 0 on.
        by_columns: whether every column counts, padding too: the model numbers columns itself, or has a mask of fixed
            size.
    """

    rows: int
    by_columns: bool

    def within(self, context: Context, limits: list[int]) -> list[int]:
        """Limits of what a model is to say after a context that it can read, cut where its positions end."""
        columns = max(len(ids) for ids in context.ids)
        following, width = context.prompt.following, context.prompt.width
        taken = [
            columns if self.by_columns else following[row] + len(ids) - width for row, ids in enumerate(context.ids)
        ]
        if context.prompt.hidden:  # shorter drafts are filled up to the longest
            taken = [max(taken)] * len(taken)
        return [max(0, min(limit, self.rows - used + 1)) for limit, used in zip(limits, taken, strict=True)]


_tables: WeakKeyDictionary[Any, PositionTable | None] = WeakKeyDictionary()


def position_table(model: Any) -> PositionTable | None:
    """The table of a model's positions, None where they have no end."""
    inner = inner_model(model)
    if inner not in _tables:
        _tables[inner] = _find(inner)
    return _tables[inner]


def positions_told(model: Any) -> int | None:
    """The positions that a model's config, or its decoder's, says it was made for; None where it says nothing."""
    text = model.config.get_text_config(decoder=True)
    told = (getattr(text, name, None) for name in ("max_target_positions", "max_position_embeddings"))
    return next((found for found in told if isinstance(found, int) and found > 0), None)


def _find(model: Any) -> PositionTable | None:
    text = model.config.get_text_config(decoder=True)
    longest = positions_told(model)
    # MPT's only: its slopes are laid out for so many columns, and it has no table of positions.
    columns = getattr(text, "max_seq_len", None)
    if isinstance(columns, int):
        return PositionTable(columns, True)
    if longest is None or not _has_table(model, longest):
        return None
    masks = any(tuple(buffer.shape[-2:]) == (longest, longest) for _, buffer in model.named_buffers())
    return PositionTable(longest, masks or "position_ids" not in forward_arguments(model))


def _has_table(model: nn.Module, longest: int) -> bool:
    """Whether positions are looked up in a table of the length that the config names.

    That of a vision tower beside the text model has another length, and does not count.
    """
    tables = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and _of_positions(name)]
    if any(table.num_embeddings - int(getattr(table, "offset", 0) or 0) == longest for table in tables):
        return True
    return any(_of_positions(name) and _is_table(buffer, longest) for name, buffer in model.named_buffers())


def _is_table(buffer: Tensor, longest: int) -> bool:
    return buffer.is_floating_point() and buffer.dim() == 2 and buffer.shape[0] == longest


def _of_positions(name: str) -> bool:
    """Whether a module or buffer is named as tables of positions are: wpe, embed_positions, pos_encoding ..."""
    last = name.rsplit(".", 1)[-1]
    return last == "wpe" or "pos" in last
