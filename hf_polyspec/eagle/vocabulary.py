# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of a head: the target's modules it borrows, and slices of the rows it scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hf_polyspec.cpu.row_scores import RowScores
from hf_polyspec.eagle.configuration import EagleHeadConfig

# Embeddings are sometimes padded to a multiple of a power of two; a larger difference is another vocabulary.
_PADDING = 512


class Scorer(Protocol):
    """A head, as far as its vocabulary is concerned."""

    config: EagleHeadConfig
    lm_head: nn.Linear
    """Only there where the config says that it is the head's own."""

    @property
    def borrowed(self) -> Borrowed:
        """The target's modules."""
        ...

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        ...

    def target_ids(self) -> torch.Tensor:
        """`[Vd]`, the target id of each of its ids."""
        ...

    def borrowed_rows(self) -> VocabularySlice:
        """The target's rows for all of its ids."""
        ...

    def vocabulary_slice(self, target_ids: torch.Tensor) -> VocabularySlice:
        """The rows of target ids `[N]`."""
        ...


@dataclass(frozen=True)
class Borrowed:
    """The modules of a target that a head uses without owning them.

    Copying a head (`copy.deepcopy`) shares them: a copy of the head is not a copy of the target.

    Args:
        embed_tokens: Module from ids to embeddings.
        lm_head: Module from hidden states to logits.
        logit_scale: Factor on the lm_head's output.
        logit_softcap: Final soft cap, or `None`.
        name: What the target was loaded by; empty where nobody said.
        architectures: The target's class.
    """

    embed_tokens: nn.Module | None = None
    lm_head: nn.Module | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    name: str = ""
    architectures: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Borrowed:
        return self

    @classmethod
    def checked(
        cls,
        head: Scorer,
        embed_tokens: nn.Module,
        lm_head: nn.Module | None,
        logit_scale: float,
        logit_softcap: float | None,
    ) -> Borrowed:
        """Returns the modules after checking that they fit a head.

        Raises:
            ValueError: If the embedding's or the lm_head's width or rows differ from the head's.
        """
        rows, width = module_shape(embed_tokens)
        config = head.config
        if rows is not None and not 0 <= rows - config.vocab_size < _PADDING:
            raise ValueError(
                f"The head was made for a vocabulary of {config.vocab_size}; this embedding has {rows} rows."
            )
        if not config.own_embedding and width is not None and width != config.hidden_size:
            raise ValueError(
                f"The head is {config.hidden_size} wide and has no embedding of its own; this embedding is "
                f"{width} wide."
            )
        if not config.own_lm_head:
            cls._check_lm_head(head, lm_head)
        return cls(embed_tokens, lm_head, logit_scale, logit_softcap)

    @staticmethod
    def _check_lm_head(head: Scorer, lm_head: nn.Module | None) -> None:
        if lm_head is None:
            raise ValueError("This head scores tokens with the target's lm_head: bind needs one.")
        config = head.config
        rows, width = module_shape(lm_head)
        if width is not None and width != config.hidden_size:
            raise ValueError(f"The head is {config.hidden_size} wide; the target's lm_head reads {width} wide states.")
        if rows is not None and rows < config.vocab_size:
            raise ValueError(
                f"The head was made for a vocabulary of {config.vocab_size}; this lm_head scores {rows} ids."
            )

    @property
    def is_plain(self) -> bool:
        """Whether the lm_head's scores are the target's logits."""
        return self.logit_scale == 1.0 and self.logit_softcap is None

    def need_embedding(self) -> nn.Module:
        """Returns the embedding.

        Raises:
            ValueError: If none is bound.
        """
        if self.embed_tokens is None:
            raise ValueError("The head has no embedding: call bind(embed_tokens, lm_head) first.")
        return self.embed_tokens

    def need_lm_head(self) -> nn.Module:
        """Returns the lm_head.

        Raises:
            ValueError: If none is bound.
        """
        if self.lm_head is None:
            raise ValueError("The head has no lm_head: call bind(embed_tokens, lm_head) first.")
        return self.lm_head

    def same_embedding(self, own: nn.Embedding) -> bool:
        """Whether a head's own embedding equals this one, in the coarser of their two dtypes."""
        theirs = getattr(self.embed_tokens, "weight", None)
        scaled = type(self.embed_tokens) is not nn.Embedding
        if scaled or theirs is None or theirs.shape != own.weight.shape or theirs.device.type == "meta":
            return False
        mine = own.weight.detach().to(theirs.device)
        return torch.equal(mine.to(theirs.dtype), theirs) or torch.equal(mine, theirs.to(mine.dtype))


class Rows(Protocol):
    """Something that scores some of a head's ids."""

    @property
    def target_ids(self) -> torch.Tensor:
        """`[N]`, the target id of each column."""
        ...

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., H]` -> `[..., N]`."""
        ...


@dataclass(frozen=True)
class VocabularySlice:
    """Some rows of the lm_head, copied side by side so that scoring them is one small product.

    Args:
        target_ids: `[N]`, the target id of each column.
        weight: `[N, H]`.
        bias: `[N]` or `None`.
    """

    target_ids: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.target_ids)

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores `[..., H]` with these rows: `[..., N]`."""
        return self.rows.score(hidden)

    @cached_property
    def columns(self) -> dict[int, int]:
        """The column of each target id."""
        return {token: column for column, token in enumerate(self.target_ids.tolist())}

    @cached_property
    def rows(self) -> RowScores:
        """What scores by them."""
        return RowScores(self.weight, self.bias)

    @classmethod
    def of(cls, head: Scorer, target_ids: torch.Tensor) -> VocabularySlice:
        """Copies the rows of some target ids out of a head's lm_head; see `EagleHead.vocabulary_slice`."""
        config = head.config
        ids = target_ids.to(head.device).long()
        if ids.dim() != 1 or not len(ids):
            raise ValueError(f"A vocabulary slice needs a list of target ids, got shape {list(ids.shape)}.")
        inside = int(ids.min()) >= 0 and int(ids.max()) < config.vocab_size
        rows = ids
        if inside and config.maps_vocabulary:
            known = head.target_ids()
            # [V], row of each target id or -1
            row_of = torch.full((config.vocab_size,), -1, dtype=torch.long, device=known.device)
            row_of[known] = torch.arange(len(known), device=known.device)
            rows = row_of[ids]
            inside = bool((rows >= 0).all())
        if not inside:
            raise ValueError("A target id of the slice is outside the vocabulary that the head scores.")
        # the head's own lm_head has one row per draft id, a borrowed one a row per target id
        lm_head = head.lm_head if config.own_lm_head else head.borrowed.need_lm_head()
        weight, bias = readable_rows(lm_head, rows if config.own_lm_head else ids)
        weight = weight.to(head.device, head.dtype)
        return cls(ids.to(head.device), weight, None if bias is None else bias.to(head.device, head.dtype))


def readable_rows(lm_head: nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Copies rows `[N]` of an lm_head's weight, `[N, H]`, and bias, `[N]` or `None`.

    Raises:
        ValueError: If the module keeps its rows in a packed form.
    """
    weight, bias = _packed_rows(lm_head, rows)
    if weight is not None:
        return weight, bias
    weight, bias = getattr(lm_head, "weight", None), getattr(lm_head, "bias", None)
    if not torch.is_tensor(weight) or not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError("The lm_head's rows cannot be read (quantised?), so it cannot be sliced.")
    if weight.device.type == "meta":
        raise ValueError("The lm_head is offloaded, so it cannot be sliced.")
    picked = weight.detach().index_select(0, rows.to(weight.device))
    return picked, bias.detach().index_select(0, rows.to(bias.device)) if torch.is_tensor(bias) else None


def _packed_rows(lm_head: Any, rows: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The same of a layer whose codes lie row by row: unpacking all of it to read a few rows would take long."""
    if not hasattr(lm_head, "quantized_weight") or lm_head.bits != 8:
        return None, None
    whole: Any = lm_head.quantized_weight()
    rows = rows.to(whole.codes.device)
    picked = replace(whole, codes=whole.codes[rows], scales=whole.scales[rows], zeros=whole.zeros[rows])
    bias: torch.Tensor | None = lm_head.bias
    return picked.dequantize(), None if bias is None else bias[rows]


class RowCache:
    """The last slice cut out of each lm_head, as long as its weights stay what they were.

    A chain is built anew for every call of generate(); copying thousands of rows for each would cost more than a
    draft.
    """

    def __init__(self) -> None:
        self._held: WeakKeyDictionary[nn.Module, tuple[Any, VocabularySlice]] = WeakKeyDictionary()

    def slice(self, head: Scorer, target_ids: torch.Tensor) -> VocabularySlice:
        """`head.vocabulary_slice(target_ids)`, taken from memory if nothing has changed."""
        lm_head = head.lm_head if head.config.own_lm_head else head.borrowed.need_lm_head()
        state = self._state(lm_head), head.dtype, head.device
        held = self._held.get(lm_head)
        if held is not None and state[0] is not None and held[0] == state:
            known = held[1].target_ids
            if len(known) == len(target_ids) and torch.equal(known, target_ids.to(known.device)):
                return held[1]
        found = head.vocabulary_slice(target_ids)
        self._held[lm_head] = state, found
        return found

    @staticmethod
    def _state(lm_head: nn.Module) -> tuple[tuple[int, int], ...] | None:
        """Addresses and versions of everything the rows are made of; None where torch keeps no versions."""
        tensors = [*lm_head.parameters(), *lm_head.buffers()]
        if any(tensor.is_inference() for tensor in tensors):
            return None
        return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


SLICES = RowCache()


def lm_head_logits(head: Scorer, hidden: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    """Scores `[..., H]` with a slice, the head's own lm_head or the target's; see `EagleHead.logits`."""
    if rows is None and head.config.own_lm_head:
        own: torch.Tensor = head.lm_head(hidden)
        return own
    if rows is None and head.config.maps_vocabulary:
        rows = head.borrowed_rows()
    if rows is None:
        scores = _scores_by(head.borrowed.need_lm_head(), hidden)[..., : head.config.vocab_size]
        scores = scores.to(head.device)
    else:
        scores = rows.score(hidden)
    return scores if head.config.own_lm_head else _as_target(head.borrowed, scores)


def lm_head_pieces(
    head: Scorer, hidden: torch.Tensor, score: Callable[[torch.Tensor], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """The same by a slice that scores `[..., H]` in pieces, which belong side by side."""
    pieces = score(hidden)
    return pieces if head.config.own_lm_head else [_as_target(head.borrowed, piece) for piece in pieces]


def _scores_by(lm_head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Calls an lm_head where it lives, in its own dtype; packed and offloaded ones see to that themselves."""
    # A packed layer's weight is a property that builds the whole matrix: asking for it would cost more than the scores.
    weight = None if hasattr(lm_head, "quantized_weight") else getattr(lm_head, "weight", None)
    if torch.is_tensor(weight) and weight.is_floating_point() and weight.device.type != "meta":
        hidden = hidden.to(weight.device, weight.dtype)
    scores: torch.Tensor = lm_head(hidden)
    return scores


def _as_target(borrowed: Borrowed, scores: torch.Tensor) -> torch.Tensor:
    if borrowed.logit_scale != 1.0:
        scores = scores * borrowed.logit_scale
    if borrowed.logit_softcap is not None:
        scores = borrowed.logit_softcap * torch.tanh(scores / borrowed.logit_softcap)
    return scores


def module_shape(module: nn.Module) -> tuple[int | None, int | None]:
    """Returns (rows, width) of an embedding or lm_head, `None` where a module does not tell."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    rows, width = getattr(module, "out_features", None), getattr(module, "in_features", None)
    # A layer of integers builds its whole matrix when it is asked for its weight, and tells its shape without.
    weight = getattr(module, "weight", None) if rows is None else None
    if torch.is_tensor(weight) and weight.dim() == 2 and weight.is_floating_point():
        rows, width = weight.shape
    return rows, width
