# SPDX-License-Identifier: Apache-2.0
"""A copy of the target in fewer bits need not read the prompt: it takes the target's keys and values.

They are what its own would be without its rounding, so it agrees with the target a little better and every prompt is
read once. That changes which law the copy has at a position, not that it hands up the law it drew from, so the chain
stays exact (law 1). Keys and values of many tokens are taken; a few are computed as quickly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..exactness.context import common_prefix
from .cache import RollbackCache
from .ranks import is_split
from .release import inner_model
from .walking import named_parameters_of

WORTH = 32
"""Fewer tokens than this are read rather than taken."""
FEW = 4
"""The same for a middle that drafts pass by, or that is asked now and then beside several rows: it lags behind the
target after each of them."""
_ROWS = 64
"""Rows at the beginning and at the end of the embeddings that are compared."""
# What may differ between a model and its copy in fewer bits.
_OWN = {"_name_or_path", "architectures", "dtype", "quantization_config", "torch_dtype", "transformers_version"}


class Holder(Protocol):
    """A model with a cache, and the memo of what it holds (law 4)."""

    cache: RollbackCache
    memo: list[list[int]]
    use_cache: bool
    borrows_from: int
    """Fewest tokens that are taken from another."""


def is_copy(model: Any, target: Any) -> bool:
    """Whether a model is the target with other numbers in its matrices: same architecture, embeddings and norms.

    Args:
        model: an assistant; target: the model it may be a copy of.
    """
    one, other = inner_model(model), inner_model(target)
    if not (isinstance(one, nn.Module) and isinstance(other, nn.Module)) or one is other or model is not one:
        return False
    if is_split(one) or is_split(other):
        return False  # each process holds the keys and values of some heads only
    if type(one).__name__ != type(other).__name__ or not _set_alike(one, other):
        return False
    known = _KNOWN.get(one)
    if known is None or not known.holds(other):
        mine, theirs = _vectors(one), _vectors(other)
        same = all(map(_is_same, _edges(one), _edges(other))) and mine.keys() == theirs.keys()
        same = same and all(_is_same(mine[name], theirs[name]) for name in mine)
        compared = [_embeddings(one), _embeddings(other), *mine.values(), *theirs.values()]
        known = _KNOWN[one] = _Known(ref(other), [ref(tensor) for tensor in compared], _marks(compared), same)
    return known.same


@dataclass(frozen=True)
class _Known:
    """Whether a model was found to be a copy of another.

    A wrong answer costs time and never a text, so it is not looked whether the tensors still are the model's.

    Attributes:
        other: the target; compared: tensors of both; marks: theirs, then; same: what was found.
    """

    other: ref[nn.Module]
    compared: Sequence[ref[Tensor]]
    marks: list[tuple[int, int]]
    same: bool

    def holds(self, other: nn.Module) -> bool:
        """Whether the same is asked again, and no tensor has been written to."""
        tensors = [one() for one in self.compared]
        return self.other() is other and _marks([one for one in tensors if one is not None]) == self.marks


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def _marks(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(one.data_ptr(), -1 if one.is_inference() else one._version) for one in tensors]


def _set_alike(one: Any, other: Any) -> bool:
    """Whether two configs say the same of what is computed."""
    configs = [model.config.get_text_config(decoder=True) for model in (one, other)]
    held, others = ({name: value for name, value in vars(config).items() if name not in _OWN} for config in configs)
    return held == others or _settings(configs[0]) == _settings(configs[1])


def _settings(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _OWN}


def _edges(model: Any) -> tuple[Tensor, Tensor]:
    weight = _embeddings(model)
    return weight[:_ROWS], weight[-_ROWS:]


def _embeddings(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def _vectors(model: nn.Module) -> dict[str, Tensor]:
    """Norms, and other parameters with one number a channel, but for biases, which layers with integers hold apart."""
    return {name: p for name, p in named_parameters_of(model) if p.dim() == 1 and not name.endswith("bias")}


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.dtype is not other.dtype or one.device != other.device or one.is_meta or one.shape != other.shape:
        return False
    shared = one.data_ptr() == other.data_ptr() != 0 and one.is_contiguous() and other.is_contiguous()
    return shared or torch.equal(one, other)  # what a copy shares with its model need not be read


def borrow(borrower: Holder, lender: Holder, sequences: list[list[int]]) -> int:
    """Fill a cache with what another model has read of these rows and this one has not.

    Args:
        borrower: whose cache is filled; lender: of the same shapes.
        sequences: the ids that are about to be read.

    Returns:
        Tokens taken, of every row alike.
    """
    if not (borrower.use_cache and lender.use_cache) or len(lender.memo) != len(sequences) or lender.cache.apart:
        return 0
    own = borrower.memo or [[] for _ in sequences]
    # Asked before every pass; ids are compared only where there is enough that could be taken.
    if min(len(theirs) - len(ours) for theirs, ours in zip(lender.memo, own, strict=True)) < borrower.borrows_from:
        return 0
    held = [common_prefix(ids, row) for ids, row in zip(own, sequences, strict=True)]
    lent = [common_prefix(ids, row) for ids, row in zip(lender.memo, sequences, strict=True)]
    count = min(there - here for here, there in zip(held, lent, strict=True))
    if count < borrower.borrows_from:
        return 0
    borrower.cache.realign([len(ids) for ids in own], held)
    if min(held) < lender.cache.floor:
        borrower.cache.floor = max(borrower.cache.floor, lender.cache.floor)
    width = lender.cache.length
    # Rows end at the right edge, so row b's token i stands in column width - len(memo[b]) + i.
    first = torch.tensor([width - len(ids) + here for ids, here in zip(lender.memo, held, strict=True)])
    columns = first[:, None] + torch.arange(count)  # [B, count]
    for index, layer in enumerate(lender.cache.layers):
        if layer.is_initialized:
            keys, values = (_at(states, columns) for states in (layer.keys, layer.values))
            borrower.cache.update(keys, values, index)
    borrower.memo = [row[: here + count] for row, here in zip(sequences, held, strict=True)]
    return count


def _at(states: Any, columns: Tensor) -> Tensor:
    """Columns of keys or values `[B, H, S, D]`, row by row."""
    if bool((columns[0] == columns).all()):
        start = int(columns[0, 0])
        found: Tensor = states[:, :, start : start + columns.shape[1]]
        return found
    index = columns.to(states.device)[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
    picked: Tensor = states.gather(2, index)
    return picked
