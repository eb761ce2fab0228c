# SPDX-License-Identifier: Apache-2.0
"""A decoder's pass over a few tokens without the detour through its own `forward`.

Where all layers of a model are computed as one task, most of a pass's Python is what its forward does around them:
wrappers, a mask that is made and not needed, layers that are called to hand on what is there already. Here its parts
are called one after the other: embedding, angles, layers, norm, lm_head. Whether a model is no more than that is found
by trying: passes of each kind are first run both ways, and only a model for which every number is the same to the last
bit is run this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from .attention import ROWS_APART
from .cache import RollbackCache
from .fed import Fed
from .hooks import is_hooked
from .moments import Moment, is_known, is_under_modes, packages_of, this_moment
from .ragged_cache import RaggedCache
from .release import cache_argument
from .rope import turns_stay
from .walking import modules_of

MOST = 64
"""Positions of a pass. Where there are more, what is done around the layers is a small part of it."""
FIRST = 512
"""Positions of a pass over a text of which the cache holds nothing yet: layers called one by one find no buffers there,
and each is a task of its own."""

Past = RollbackCache | RaggedCache
Around = tuple[Any, Any, Any, Any]
_HOST = PreTrainedModel.__module__.partition(".")[0]
_HIDDEN = "output_hidden_states"
_PATIENCE = 16
"""Passes after which layers that were never all computed together are not asked any more."""
_KINDS = 24
_tried: WeakKeyDictionary[Any, dict[object, bool]] = WeakKeyDictionary()
"""By model: whether passes of a kind, of the model as it was, give the same numbers both ways."""


@dataclass(slots=True)
class Said:
    """What a pass gave, by the names of the model's own output."""

    logits: torch.Tensor
    hidden_states: tuple[Any, ...] | None


class Straight:
    """Passes of one model.

    Args:
        model: the level's.
    """

    def __init__(self, model: Any) -> None:
        self._cache = cache_argument(model)
        self._parts = _parts(model)
        self._model = model
        self._misses = 0
        self._looked: tuple[Moment, object, Around] | None = None
        self._whole: Any = None  # passes without torch, False where there are none

    @property
    def may_pick(self) -> bool:
        """Whether `picks` is worth asking: something is fused, and was not found to disagree."""
        return self._whole is not False and self._parts is not None and "forward" in self._parts[1][0].__dict__

    def picks(self, fed: Fed, known: int, exact: bool = True) -> tuple[list[int], list[float]]:
        """The likeliest of the first `known` ids behind each of some, and how many logits it is ahead, from a pass that
        makes nothing else. The thread is in a moment.

        Args:
            fed: the ids and where they go.
            exact: whether of ids within rounding of each other it is the one that a pass as others are would show.

        Returns:
            Nothing, and nothing has changed, where the pass has to be run as others are.
        """
        moment = this_moment()
        if moment is None or not self.may_pick:
            return [], []
        mark, _, around = self._marked()
        kind = mark, len(fed.ids) > 1, True, False, type(fed.cache), False
        if mark is None or not _tried.get(self._model, {}).get(kind):
            return [], []
        if self._whole is None:
            self._whole = self._made(around, known)
        if self._whole and not self._whole.same(around, known, moment):
            self._whole = None
        if not self._whole:
            return [], []
        found: tuple[list[int], list[float]] = self._whole.run(fed, moment, exact)
        if self._whole.alike is False:
            self._whole = False
        return found

    def _made(self, around: Around, known: int) -> Any:
        assert self._parts is not None
        layers = self._parts[1]
        make = getattr(layers[0].__dict__.get("forward"), "whole_pass", None)
        return (make is not None and turns_stay(self._model) and make(layers, around, known)) or False

    def __call__(self, inputs: Mapping[str, Any], record: Mapping[str, Any]) -> Any:
        """One pass.

        Args:
            inputs: forward arguments; record: those that say what is to be shown besides.

        Returns:
            What the model returns, its cache left out; None, and nothing has changed, where it has to be called itself.
        """
        if self._parts is None or "forward" not in self._parts[1][0].__dict__ or self._misses > _PATIENCE:
            return None  # nothing is fused, or not all of it together
        past: Any = inputs.get(self._cache or "")
        if not self._takes(inputs, record, past):
            return None
        mark, moment, around = self._marked()
        if mark is None:
            return None
        known = _tried.setdefault(self._model, {})
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        shown = record.get(_HIDDEN)
        shown = tuple(shown) if isinstance(shown, (list, tuple)) else bool(shown)
        kind = mark, ids.shape[1] > 1, mask is None, shown, type(past), _holds_nothing(past)
        same = known.get(kind)
        if same:
            return self._run(inputs, record, past, around, moment)
        return self._try(inputs, record, past, known, kind, around) if same is None else None

    def _marked(self) -> tuple[object, Moment | None, Around]:
        """What the way of computing depends on, None where the model has to be called itself, as where somebody else's
        code is called around the layers; the moment for which one look is enough; and what is called there."""
        assert self._parts is not None
        moment = this_moment()
        if moment is not None and self._looked is not None and self._looked[0] is moment:
            return self._looked[1], moment, self._looked[2]
        around = _around(self._model, self._parts[0])
        # Somebody's code is to be called once a pass, also where a pass is tried both ways.
        known = not is_under_modes() and all(is_known(module) for part in around for module in modules_of(part))
        mark = _mark(self._model, self._parts) if known else None
        if moment is None or mark is None:
            return mark, None, around
        self._looked = moment, mark, around
        return mark, moment, around

    def _try(
        self,
        inputs: Mapping[str, Any],
        record: Mapping[str, Any],
        past: Past,
        known: dict[Any, bool],
        kind: Any,
        around: Around,
    ) -> Any:
        """A pass both ways, of which the model's own counts."""
        if len(known) >= _KINDS:
            known.clear()
        length = past.length if isinstance(past, RollbackCache) else 0
        try:
            found = self._run(inputs, record, past, around)
        except Exception:  # of a model that only looks as if it were one of these
            found, known[kind] = None, False
        if isinstance(past, RollbackCache):  # in a cache of rows apart the same columns are written once more
            past.shrink(length)
        if found is None:
            self._misses += 1
            return None
        own = self._model(**inputs, **record, return_dict=True)
        known[kind] = _equal(found, own)
        return own

    def _takes(self, inputs: Mapping[str, Any], record: Mapping[str, Any], past: Any) -> bool:
        """Whether the pass is of a kind that could be run this way: some columns behind others, of one row or of rows
        that each have a region."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        wanted = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", self._cache}
        return (
            inputs.keys() == wanted
            and isinstance(ids, torch.Tensor)
            and ids.shape[0] == 1
            and (ids.shape[1] <= MOST or (ids.shape[1] <= FIRST and _holds_nothing(past)))
            and (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 4))
            and bool(inputs["use_cache"])
            and (type(past) is RaggedCache or (type(past) is RollbackCache and not past.apart))
            and record.keys() <= {_HIDDEN}
            and not torch.is_grad_enabled()
        )

    def _run(
        self,
        inputs: Mapping[str, Any],
        record: Mapping[str, Any],
        past: Past,
        around: Around,
        moment: Moment | None = None,
    ) -> Any:
        assert self._parts is not None
        layers = self._parts[1]
        embedding, rotary, norm, head = around
        run = getattr(layers[0].__dict__.get("forward"), "outputs_of", None)
        if run is None:
            return None
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        x = embedding(ids)
        turns = rotary(x, position_ids=inputs["position_ids"])
        fed = ids.shape[1]
        # Over no other columns the layers take none for causal.
        if mask is None and fed > 1 and isinstance(past, RollbackCache) and (held := past.length):
            mask = torch.ones(fed, held + fed, dtype=torch.bool).tril(held)[None, None]
        last = _holds_nothing(past) and not record.get(_HIDDEN)
        outputs = run(layers, x, mask, past, turns, moment, last)
        if outputs is None:
            return None
        states = norm(outputs[-1])
        kept = inputs["logits_to_keep"]
        logits = head(states[:, slice(-kept, None) if isinstance(kept, int) else kept])
        return Said(logits, _shown(record, x, outputs, states))


def _holds_nothing(past: Any) -> bool:
    """Whether this is a cache of ours for one row, or rows in step, that has not been read into."""
    return type(past) is RollbackCache and not past.length


def _parts(model: Any) -> tuple[Any, Sequence[Any]] | None:
    """The decoder inside a model, and its layers; None for a model that is built otherwise."""
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        return None
    inner = getattr(model, model.base_model_prefix or "", None)
    layers = getattr(inner, "layers", None)
    if inner is model or not isinstance(layers, torch.nn.ModuleList) or not len(layers):
        return None
    if any(not callable(getattr(inner, name, None)) for name in ("norm", "rotary_emb", "get_input_embeddings")):
        return None
    return inner, list(layers)


def _around(model: Any, inner: Any) -> Around:
    """What is called around the layers: embedding, angles, norm and lm_head."""
    return inner.get_input_embeddings(), inner.rotary_emb, inner.norm, model.get_output_embeddings()


def _mark(model: Any, parts: tuple[Any, Sequence[Any]]) -> object:
    """What its way of computing depends on besides the modules that are called here; None where it is somebody's own,
    or depends on how long a text is."""
    inner, layers = parts
    config = model.config
    if model.training or not all(map(_is_hosts, (model, inner))):
        return None
    if len(inner.layers) != len(layers) or any(a is not b for a, b in zip(inner.layers, layers, strict=True)):
        return None
    if not all(map(_is_fused, layers)):
        return None
    own = vars(config)
    kinds = own.get("layer_types") or ()
    if own.get("sliding_window") is not None or any(kind != "full_attention" for kind in kinds):
        return None
    return (
        type(model).forward,
        type(inner).forward,
        *(tuple(_plain(vars(one))) for one in (model, inner)),
        tuple(_plain(own)),
    )


def _is_hosts(module: Any) -> bool:
    """Whether a module's forward is transformers' own: somebody else's may do now one thing and now another."""
    written = packages_of(getattr(type(module), "forward", None)) <= {_HOST, torch.__name__}
    return written and "forward" not in module.__dict__ and not is_hooked(module)


def _is_fused(layer: Any) -> bool:
    """Whether nobody has put a forward of his own in the place of a fused one since, or hooks on the layer itself:
    both run where the layer is called, which it is not here."""
    return hasattr(layer.__dict__.get("forward"), "outputs_of") and not is_hooked(layer)


def _plain(settings: Mapping[str, Any]) -> Any:
    # During a pass over rows apart, attention has a name of ours, and is what it was.
    seen = ((name, "sdpa" if value == ROWS_APART else value) for name, value in settings.items())
    return ((name, value) for name, value in seen if isinstance(value, (int, float, str)))


def _shown(record: Mapping[str, Any], x: Any, outputs: Sequence[Any], last: Any) -> tuple[Any, ...] | None:
    """The hidden states that were asked for, of all layers or of some of them; None where none were."""
    asked = record.get(_HIDDEN)
    if not asked:
        return None
    count = len(outputs) + 1
    wanted = range(count) if asked is True else {index % count for index in asked}
    # What the task has written to it will write to again.
    inside = [output.clone() if place in wanted else None for place, output in enumerate(outputs[:-1], start=1)]
    return (x if 0 in wanted else None, *inside, last if count - 1 in wanted else None)


def _equal(found: Any, own: Any) -> bool:
    """Whether two outputs of a pass are the same to the last bit."""
    pairs = [(found.logits, own.logits)]
    shown, told = found.hidden_states or (), own.hidden_states or ()
    if len(shown) != len(told):
        return False
    if any((one is None) is not (other is None) for one, other in zip(shown, told, strict=True)):
        return False
    pairs += [pair for pair in zip(shown, told, strict=True) if pair[0] is not None]
    return all(one.dtype is other.dtype and torch.equal(one, other) for one, other in pairs)
