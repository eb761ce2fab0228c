# SPDX-License-Identifier: Apache-2.0
"""Forward arguments besides ids, mask, positions and cache, handed on in every pass as plain generation hands them on.

Plain generation calls `prepare_inputs_for_generation` before each of its passes: it gives images and encoder outputs to
the first one only, cuts arguments with a value a token to the columns that are fed, and some classes change positions
or drop arguments there. Classes that have such a method of their own are asked through it in every pass; the others
are treated as the common method treats them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation import utils as generation_utils
from transformers.utils import ModelOutput

from .pictures import Sights
from .release import GENERATION_CACHE, cache_argument, forward_arguments, inner_model, parameters_of
from .straight import Straight

_BY_TOKEN = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Arguments with a value for each token of the prompt."""

_FIRST_ONLY = frozenset(getattr(generation_utils, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", ())) | {
    "pixel_values",
    "mm_encoder_outputs",
}
_NEVER = frozenset({"labels"})
"""Taken by generate() and handed to no pass."""


@dataclass(frozen=True)
class Extras:
    """What a caller gave the target besides a prompt.

    Attributes:
        by_token: `[B, P]` each, values for the prompt's columns.
        first: for the pass that reads the prompt: images, encoder outputs.
        always: for every pass.
        positions: `[N, B, P]`, position ids of several dimensions, or None.
        sights: for levels with an encoder of their own, what it is to read, or None.
    """

    by_token: dict[str, torch.Tensor] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)
    always: dict[str, Any] = field(default_factory=dict)
    positions: torch.Tensor | None = None
    sights: Sights | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], positions: Any = None) -> Extras:
        """Sort the arguments that generate() hands on."""
        found = cls(positions=positions if isinstance(positions, torch.Tensor) and positions.ndim == 3 else None)
        for name, value in given.items():
            if name in _NEVER or value is None:
                continue
            if name in _BY_TOKEN and isinstance(value, torch.Tensor) and value.ndim == 2:
                found.by_token[name] = value
            elif name in _FIRST_ONLY:
                found.first[name] = value
            else:
                found.always[name] = value
        return found

    @property
    def marks_prompt(self) -> bool:
        """Whether the prompt's columns are more than their ids, so that they must be read at once and only once."""
        return any(_holds(value) for value in self.first.values()) or "mm_token_type_ids" in self.by_token

    @property
    def any(self) -> bool:
        return bool(self.names)

    @property
    def names(self) -> list[str]:
        """Of the arguments that there are."""
        planes = [] if self.positions is None else ["position_ids"]
        return [*self.by_token, *self.first, *self.always, *planes]

    def for_level(self, model: Any, target: Any) -> Extras:
        """What a level below the target is shown: all of it if it is of the target's class, else what its forward
        takes of the values by token. A level of another size reads pictures with an encoder of its own."""
        one, other = inner_model(model), inner_model(target)
        if type(one) is type(other) and one.config.get_text_config().hidden_size == _width(other):
            return self
        if type(one) is type(other) and self.sights is not None:
            seen = self.sights.by(model, self.first)
            if seen is not None:
                return replace(self, first=seen)
        taken = forward_arguments(model)
        return Extras({name: value for name, value in self.by_token.items() if name in taken and not self.first})


def _width(model: Any) -> Any:
    return getattr(model.config.get_text_config(), "hidden_size", None)


def _holds(value: Any) -> bool:
    return bool(value) if isinstance(value, (Mapping, list, tuple)) else value is not None


class Forwarding:
    """Makes forward arguments of one model complete.

    Args:
        model: the level's.
        extras: what it is given.
        asks: whether a method of the class's own is asked.

    Attributes:
        begun: whether a pass of this model has read the prompt.
    """

    def __init__(self, model: Any, extras: Extras | None = None, *, asks: bool = True) -> None:
        self.extras = extras or Extras()
        self._model = model
        self._straight: Straight | None = None
        inner = inner_model(model)
        self.begun, self._inner = False, inner
        modalities = getattr(inner, "input_modalities", None) or "text"
        self._modalities = {modalities} if isinstance(modalities, str) else set(modalities)
        self._cache_name = cache_argument(model)
        method = getattr(type(inner), "prepare_inputs_for_generation", None)
        common = getattr(GenerationMixin, "prepare_inputs_for_generation", None)
        # Of the class: PEFT puts one of its own over the model's, which leads back here.
        self._prepare: Any = None if not asks or method in (None, common) else method.__get__(inner)
        named = parameters_of(self._prepare) if self._prepare is not None else {}
        everything = any(p.kind is p.VAR_KEYWORD for p in named.values())
        # What the method has no name for and no room for, it is not told.
        self._told = None if everything else set(named)
        self._inherited = GENERATION_CACHE if everything and self._cache_name not in named else self._cache_name

    @property
    def marks_prompt(self) -> bool:
        """Whether the pass that reads the prompt may be of another kind than later ones.

        Images go with it alone, and some classes let all columns of a first pass see each other.
        """
        sees = self._prepare is not None and self._modalities != {"text"}
        return sees or bool(self.extras.first) or self.extras.marks_prompt

    @property
    def plain(self) -> bool:
        """Whether there is nothing to be done."""
        return self._prepare is None and not self.extras.any

    def run(self, inputs: Mapping[str, Any], record: Mapping[str, Any]) -> Any:
        """The model's output.

        Args:
            inputs: forward arguments; record: those that say what is to be shown besides.
        """
        found = self.straight(inputs, record)
        return self._model(**inputs, **record, return_dict=True) if found is None else found

    @property
    def straight(self) -> Straight:
        """Passes without the detour through the model's own forward."""
        if self._straight is None:
            self._straight = Straight(self._model)
        return self._straight

    def keeps_positions(self) -> bool:
        """Whether the model is called with the position ids that it is given."""
        if self._prepare is None:
            return True
        ids = torch.zeros(1, 1, dtype=torch.long)
        first = {"attention_mask": None, "use_cache": False, "is_first_iteration": True}
        given = self._asked({"position_ids": ids, **first})
        try:
            return self._prepare(ids, **given).get("position_ids") is not None
        except Exception:
            return False

    def complete(
        self, inputs: dict[str, Any], sequences: list[list[int]], past: int, rows: list[int] | None
    ) -> dict[str, Any]:
        """The arguments of a pass as plain generation would give them.

        Args:
            inputs: mask, positions, cache, and ids or embeddings `[B, F]` of the fed columns.
            sequences: ids of every row, the fed ones at their end.
            past: columns S in the cache.
            rows: of the batch at the beginning, which these are; None for all.
        """
        given = inputs.get("input_ids", inputs.get("inputs_embeds"))
        assert given is not None
        fed, device = given.shape[1], given.device
        # A caller's cache may hold what came before; what belongs to the prompt's rest goes with the first pass then.
        width, first = past + fed, past == 0 or not self.begun
        self.begun = True
        unused = [width - len(ids) for ids in sequences]
        more: dict[str, Any] = {
            name: _picked(value, rows, len(sequences)) for name, value in self.extras.always.items()
        }
        if first:
            more |= self.extras.first
        for name, value in self.extras.by_token.items():
            more[name] = _stretched(value, _goes_on(self._inner, name), unused, width, rows).to(device)
        if self.extras.positions is not None:
            inputs["position_ids"] = self._planes(unused, width, fed, rows).to(device)
        if self._prepare is None:
            for name in self.extras.by_token:
                more[name] = more[name][:, -fed:]
            return {**inputs, **more}
        return self._prepared({**inputs, **more}, sequences, fed, first)

    def _prepared(self, inputs: dict[str, Any], sequences: list[list[int]], fed: int, first: bool) -> dict[str, Any]:
        assert self._prepare is not None
        embeds = inputs.get("inputs_embeds")
        given = dict(inputs)
        ids = given.pop("input_ids", None)
        if ids is None:
            assert embeds is not None
            ids = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        elif not first:
            # Some methods look at all of the text, as plain generation hands it to them.
            width = fed + max(0, max(map(len, sequences)) - fed)
            rows = [[0] * (width - len(row)) + [max(0, i) for i in row] for row in sequences]
            whole = torch.tensor(rows, dtype=torch.long, device=ids.device)
            whole[:, -fed:] = ids
            ids = whole
        if self._cache_name is not None and self._cache_name in given:
            given[self._inherited or self._cache_name] = given.pop(self._cache_name)
        given["is_first_iteration"] = first or embeds is not None
        given["next_sequence_length"] = None if first else fed
        made: dict[str, Any] = self._prepare(ids, **self._asked(given))
        for name in ("is_first_iteration", "next_sequence_length"):
            made.pop(name, None)
        if made.get("input_ids") is not None and embeds is None:
            made["input_ids"] = made["input_ids"][:, -fed:]
        if self._inherited in made and self._inherited != self._cache_name and self._cache_name is not None:
            made[self._cache_name] = made.pop(self._inherited)
        if self._cache_name in inputs:
            made[self._cache_name] = inputs[self._cache_name]  # when it is to be thrown away is the runner's to say
        return {name: value for name, value in made.items() if value is not None or name in inputs}

    def _asked(self, given: dict[str, Any]) -> dict[str, Any]:
        return given if self._told is None else {name: value for name, value in given.items() if name in self._told}

    def _planes(self, unused: list[int], width: int, fed: int, rows: Iterable[int] | None) -> torch.Tensor:
        """Position ids `[N, B, F]`: the prompt's own, then counting on in every dimension."""
        known = self.extras.positions
        assert known is not None
        if rows is not None:
            known = known[:, list(rows)]
        made = known.new_zeros(known.shape[0], len(unused), width)
        for row, left in enumerate(unused):
            seen = min(known.shape[2], width - left)
            made[:, row, left : left + seen] = known[:, row, :seen]
            if left + seen < width:
                counted = torch.arange(1, width - left - seen + 1, device=known.device)
                made[:, row, left + seen :] = known[:, row, -1:] + counted
        return made[:, :, -fed:]


_LAST, _BEFORE = 7, 5


_onward: dict[tuple[type, str], int | None] = {}


def _goes_on(inner: Any, name: str) -> int | None:
    """What a model gives new tokens for such an argument, None for what the last token of the prompt has: plain
    generation's method is asked, which some classes have of their own."""
    key = type(inner), name
    if key not in _onward:
        try:
            given = {name: torch.tensor([[_BEFORE, _LAST]])}
            found = int(inner._update_model_kwargs_for_generation(ModelOutput(), given)[name][0, 2])
            _onward[key] = None if found == _LAST else found
        except Exception:
            _onward[key] = 0 if name == "mm_token_type_ids" else None
    return _onward[key]


def _stretched(
    value: torch.Tensor, onward: int | None, unused: list[int], width: int, rows: list[int] | None
) -> torch.Tensor:
    """Values `[B, S + F]` for all columns, from those `[B, P]` of the prompt."""
    if rows is not None:
        value = value[rows]
    made = value.new_zeros(len(unused), width)
    for row, left in enumerate(unused):
        seen = min(value.shape[1], width - left)
        made[row, left : left + seen] = value[row, :seen]
        made[row, left + seen :] = value[row, -1] if onward is None else onward
    return made


def _picked(value: Any, rows: list[int] | None, batch: int) -> Any:
    """The entries of the rows that are left, of an argument that has one for each row."""
    if rows is None or not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] <= max(rows):
        return value
    return value if value.shape[0] == 1 and batch > 1 else value[rows]
