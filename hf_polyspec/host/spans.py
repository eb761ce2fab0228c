# SPDX-License-Identifier: Apache-2.0
"""Attention over rows that each have their own columns: one pass `[1, N]` holds the new columns of all of them.

A model chooses its attention and its masks by a name in its config. During a pass that name is ours: the function that
makes masks keeps the rule it was given (causal, a window, chunks) instead of laying out a mask over columns of
different rows, and the attention function calls the usual one for each row, on that row's slice of queries, keys and
values, with the mask that the rule makes of its own positions. What a row gets is then what it gets alone. In threads
that have no such pass under way, the same name means plain sdpa.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock, local
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .attention import ROWS_APART, attention_name, plain_sdpa
from .release import inner_model
from .span import Rule, Span
from .span_group import Masks, SpanGroup


@dataclass(eq=False)
class SpannedPass:
    """One pass over columns of several rows.

    Attributes:
        groups: by how many columns a layer sees (None: all), the rows' spans there.
        kept: whatever others make of the spans once a pass.
        rules: of the masks that the model has asked for; what it was given in their place says which.
        owners: by the address of the keys that a layer was given, its spans.
    """

    groups: Mapping[int | None, SpanGroup]
    kept: dict[Any, Any] = field(default_factory=dict)
    rules: list[tuple[torch.Tensor, Rule]] = field(default_factory=list)
    owners: dict[int, SpanGroup] = field(default_factory=dict)

    @property
    def spans(self) -> Sequence[Span]:
        """By row, where whole texts are held."""
        return self.groups[None].spans

    @cached_property
    def columns(self) -> int:
        """Columns N of the pass."""
        return sum(span.count for span in self.spans)

    @cached_property
    def plain(self) -> bool:
        """Whether every row only goes on: no trees."""
        return all(span.sees is None for span in self.spans)

    def keep(self, rule: Rule, device: Any) -> torch.Tensor | None:
        """Remember a rule; None for the plain causal one."""
        if rule is causal_mask_function:
            return None
        # Each rule its own object: the model hands it on to the layers it was made for.
        marker = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        self.rules.append((marker, rule))
        return marker

    def group(self, key: torch.Tensor) -> SpanGroup:
        """The spans in the layer whose buffer of keys this is.

        Raises:
            ValueError: layers hold different parts of the texts, and it is no layer's.
        """
        found = self.groups[None] if len(self.groups) == 1 else self.owners.get(key.data_ptr())
        if found is None:
            raise ValueError("a layer attends to other keys than those of a cache")
        return found

    def masks(self, group: SpanGroup, marker: torch.Tensor | None, device: torch.device) -> Masks:
        """Per span, its mask for layers that were given `marker`.

        Raises:
            ValueError: the model made a mask in another way.
        """
        if marker is None:
            return group.masks(-1, causal_mask_function, device)
        for place, (kept, rule) in enumerate(self.rules):
            if kept is marker:
                return group.masks(place, rule, device)
        raise ValueError("a layer was given a mask that nobody asked for by a rule")

    def rows(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, marker: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """`SpanGroup.rows` of a layer that was given `marker`."""
        group = self.group(key)
        return group.rows(query, key, value, self.masks(group, marker, query.device))


class _Own(local):
    """What one thread has under way."""

    under_way: SpannedPass | None = None


_own = _Own()


def pass_under_way() -> SpannedPass | None:
    """The pass over rows of their own that this thread is in, None outside of one."""
    return _own.under_way


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """As transformers' attention functions: `[1, heads, N, D]` to `[1, N, heads, D]`.

    `key` and `value` hold the regions of all rows, `[1, shared, capacity, D]`, see `RaggedCache`.
    """
    under_way = _own.under_way
    if under_way is None:
        found: tuple[torch.Tensor, None] = plain_sdpa()(module, query, key, value, mask, *args, **kwargs)
        return found
    if kwargs.get("position_bias") is not None or query.shape[2] != under_way.columns:
        raise ValueError("attention over other columns than those of the pass, or with a bias by position")
    group = under_way.group(key)
    masks = under_way.masks(group, mask, query.device)
    if group.goes_together(query.device):
        together = group.padded(query.device)
        given = together.rows(query, key, value, masks)
        return together.columns(plain_sdpa()(module, *given, *args, **kwargs)[0]), None
    rows = [plain_sdpa()(module, *part, *args, **kwargs)[0] for part in group.rows(query, key, value, masks)]
    return (rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)), None


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """As transformers' functions that make masks."""
    under_way = _own.under_way
    if under_way is None:
        made: torch.Tensor | None = sdpa_mask(*args, **kwargs)
        return made
    if args or kwargs.get("use_vmap") or kwargs.get("attention_mask") is not None:
        raise ValueError("a mask that does not follow from positions alone")
    rule = kwargs.get("mask_function", causal_mask_function)
    return under_way.keep(rule, kwargs.get("device"))


AttentionInterface.register(ROWS_APART, _attention)
AttentionMaskInterface.register(ROWS_APART, _mask)


class _Renamed:
    """The configs of one model whose attention has our name while at least one thread is in a pass."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside: set[SpannedPass] = set()
        self._configs: list[Any] = []

    def enter(self, model: Any, under_way: SpannedPass) -> None:
        """A pass begins."""
        with self._lock:
            if not self._inside:
                # Known before the first is renamed, and counted after the last: Ctrl-C may come in between.
                self._configs = self._configs or _configs(model)
                for config in self._configs:
                    _rename(config, ROWS_APART)
            self._inside.add(under_way)

    def leave(self, under_way: SpannedPass) -> None:
        """A pass ends, or did not come to begin; a second time changes nothing."""
        with self._lock:
            self._inside.discard(under_way)
            if not self._inside:
                for config in self._configs:
                    _rename(config, "sdpa")
                self._configs = []


_renamed: WeakKeyDictionary[Any, _Renamed] = WeakKeyDictionary()
_making = Lock()


def _configs(model: Any) -> list[Any]:
    """The configs that layers of a model's text part read their attention from, where that is sdpa."""
    outer = model.config
    return [
        config
        for config in {id(c): c for c in (outer, outer.get_text_config(decoder=True))}.values()
        if attention_name(config) == "sdpa"
    ]


def _rename(config: Any, name: str) -> None:
    config._attn_implementation = {"": name}  # of this config, not of those inside it


@contextmanager
def spanned(model: Any, groups: Mapping[int | None, Sequence[Span]]) -> Iterator[SpannedPass]:
    """Within, calls of this model in this thread are a pass over the columns of these spans, `[1, N]`.

    Args:
        model: its attention is sdpa; its config says otherwise meanwhile, and the same again afterwards.
        groups: by the window of the layers (None: whole texts), spans of the rows, in the order of their columns.
    """
    inner = inner_model(model)
    with _making:
        renamed = _renamed.setdefault(inner, _Renamed())
    under_way = SpannedPass({window: SpanGroup(spans) for window, spans in groups.items()})
    before = _own.under_way

    def end() -> None:
        renamed.leave(under_way)
        _own.under_way = before

    try:
        try:
            renamed.enter(inner, under_way)
            _own.under_way = under_way
            yield under_way
        finally:
            end()
    finally:
        end()  # again, should Ctrl-C have come while it was on its way
