# SPDX-License-Identifier: Apache-2.0
"""How a model's cache follows a context that is taken back: found by trying it on a few tokens, once a model."""

from __future__ import annotations

from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import DynamicCache

from ..exactness.context import Context, Prompt
from ..telemetry.counters import LevelStats
from .carried import carried_by, standing
from .forwarding import Forwarding
from .own_rows import rows_apart
from .ragged import RaggedRunner
from .ragged_cache import outgrows
from .recurrent import RecurrentRunner
from .release import cache_argument, forward_arguments, inner_model, input_device
from .rereading import RereadingRunner, rereads
from .runner import ModelRunner
from .seq_to_seq import runner_over
from .states import keeps_states, unknown_layer
from .stepwise import Stepwise


class Manner(Enum):
    """How a runner has to treat a model."""

    ATTENTION = "keys and values, which can be cut"
    BLOCKS = "a state that goes on from one pass of several columns to the next"
    COLUMNS = "a state that goes on exactly only one column at a time, which its layers can be made to read"
    STEPS = "a state that goes on exactly only one column a pass"
    NONE = "a state that cannot be put back"


_WAYS = (Manner.BLOCKS, Manner.COLUMNS, Manner.STEPS)
_READ, _MORE = 5, 4
_manners: WeakKeyDictionary[Any, Manner] = WeakKeyDictionary()


def manner_of(model: Any) -> Manner:
    """How a model's cache can be made to follow a context; models without a state are not run for it."""
    inner = inner_model(model)
    if inner not in _manners:
        if keeps_states(model) and input_device(model).type == "meta":
            return Manner.BLOCKS  # nothing to try it on; most of them are so
        _manners[inner] = _tried(model) if keeps_states(model) else Manner.ATTENTION
    return _manners[inner]


def runner_for(model: Any, name: str, device: torch.device | None = None, **options: Any) -> ModelRunner:
    """The runner that fits a model.

    Args:
        model, name, device, options: see `ModelRunner`.
        options: may hold `kept`, see `RecurrentRunner`, and `rows`, the number of rows that may each have their own
            columns (with plain prompts, a cache, and nothing recorded), 0 for none, and `columns`, the most that a
            row may come to have.
    """
    kept, rows, columns = options.pop("kept", None), options.pop("rows", 0), options.pop("columns", 0)
    if options.get("encoded") is not None:  # see `SeqToSeqRunner`
        return runner_over(model, name, device, **options)
    options.pop("encoded", None)
    if rereads(model):
        return RereadingRunner(model, name, device, **options)
    manner = manner_of(model)
    # One row, too, holds no more than its windows where its text may come to be much longer.
    if manner is Manner.ATTENTION and (rows > 1 or (rows == 1 and outgrows(model, columns))) and rows_apart(model):
        return RaggedRunner(model, name, device, rows=rows, **options)
    if manner is Manner.ATTENTION:
        return ModelRunner(model, name, device, **options)
    if kept is not None:
        options["kept"] = kept
    return RecurrentRunner(model, name, device, **_ways(manner), **options)


def _ways(manner: Manner) -> dict[str, Any]:
    return {"steps": manner is Manner.STEPS, "columns": manner is Manner.COLUMNS}


def feeds_otherwise(model: Any) -> bool:
    """Whether a class that carries its state in an argument feeds other ids than those of the text (XLNet does)."""
    if carried_by(model).argument is None:
        return False
    text = _text(model)
    ids = torch.tensor([text], device=input_device(model))
    made = Forwarding(model).complete({"input_ids": ids, "attention_mask": None, "use_cache": True}, [text], 0, None)
    return not torch.equal(made["input_ids"], ids)


@torch.no_grad()
def _tried(model: Any) -> Manner:
    """What plain generation's logits say of a runner's, after a draft that was taken back."""
    if unknown_layer(model) is not None or feeds_otherwise(model):
        return Manner.NONE
    text = _text(model)
    try:
        wanted = _plain(model, text)
    except Exception:
        return Manner.NONE
    ways = _WAYS[1:] if Stepwise(model).limited else _WAYS
    return next((manner for manner in ways if _holds(model, text, wanted, manner)), Manner.NONE)


def _holds(model: Any, text: list[int], wanted: torch.Tensor, manner: Manner) -> bool:
    try:
        return _alike(_run(model, text, manner), wanted, model)
    except Exception:
        return False


def _text(model: Any) -> list[int]:
    rows = model.get_input_embeddings().weight.shape[0]
    return [(7 * place + 3) % rows for place in range(_READ + _MORE)]


def _plain(model: Any, text: list[int]) -> torch.Tensor:
    """Logits `[1 + M, V]` after the first R tokens and each of M more, fed one by one."""
    device, carried = input_device(model), carried_by(model)
    name = carried.argument or cache_argument(model) or ""
    own = carried.argument is not None or carried.cache_class is not None
    cache: Any = None if own else DynamicCache(config=inner_model(model).config)
    takes_positions = "position_ids" in forward_arguments(model)
    found = []
    with standing(carried.places, [None for _ in carried.places]):
        for start, end in [(0, _READ), *((n, n + 1) for n in range(_READ, len(text)))]:
            inputs = {"input_ids": torch.tensor([text[start:end]], device=device)}
            if takes_positions:
                inputs["position_ids"] = torch.arange(start, end, device=device)[None]
            output = model(**inputs, use_cache=True, return_dict=True, **{name: cache})
            cache = output[name] if own else cache
            found.append(output.logits[0, -1])
    return torch.stack(found)


def _run(model: Any, text: list[int], manner: Manner) -> torch.Tensor:
    """The same from a runner that was given another draft before, and some tokens of this one before that."""
    stats = LevelStats("probe", 0)
    prompt = Prompt(_READ, None, torch.arange(_READ)[None])
    runner = RecurrentRunner(model, "probe", **_ways(manner))
    first = runner.run(Context([text[:_READ]], prompt), [[]], stats).logits[0]
    context = Context([text[: _READ + 1]], prompt)
    draft = text[_READ + 1 :]
    runner.run(context, [draft[::-1]], stats)
    runner.run(context, [draft[:1]], stats)
    return torch.cat([first, runner.run(context, [draft], stats).logits[0]])


def _alike(found: torch.Tensor, wanted: torch.Tensor, model: Any) -> bool:
    """Whether logits differ by no more than rounding, which grows with the square root of a type's precision."""
    dtype = wanted.dtype if wanted.dtype != torch.float32 else next(iter(model.parameters())).dtype
    precision = torch.finfo(dtype if dtype.is_floating_point else torch.float32).eps
    wanted = wanted.float()
    bound = 3 * precision**0.5 * float(wanted.std())
    return found.shape == wanted.shape and float((found.float() - wanted).abs().max()) <= bound
