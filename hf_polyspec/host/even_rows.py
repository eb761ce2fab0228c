# SPDX-License-Identifier: Apache-2.0
"""Whether a model whose cache layers are of its own class minds the padding of a batch: tried beyond its windows.

Such layers bring masks of their own, and padding in front of a window that moves is where those go wrong.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..exactness.context import Context, Prompt
from ..telemetry.counters import LevelStats
from .recurrent import RecurrentRunner
from .release import inner_model, input_device
from .states import is_closed, planned_layers

_READ, _PADDING, _MORE = 5, 2, 4
_LARGEST = 512
"""The largest window, or number of columns that become one, that is tried: as many tokens are read one by one."""
_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def minds_padding(runner: RecurrentRunner) -> bool:
    """Whether a padded row gets the same from passes over several tokens as from one token a pass; asked once."""
    inner = inner_model(runner.model)
    if inner not in _known:
        _known[inner] = _tried(runner) if input_device(inner).type != "meta" else True
    return _known[inner]


@torch.no_grad()
def _tried(runner: RecurrentRunner) -> bool:
    layers = [layer for layer in planned_layers(runner.model) if is_closed(layer)]
    sizes = (value for layer in layers for value in vars(layer).values() if type(value) is int)
    window = max(sizes, default=0)
    if window > _LARGEST:
        return False
    rows = runner.model.get_input_embeddings().weight.shape[0]
    texts = [[(7 * place + first) % rows for place in range(_READ + window + _MORE)] for first in (3, 5)]
    mask = torch.ones(2, _READ, dtype=torch.long)
    mask[1, :_PADDING] = 0
    texts[1][:_PADDING] = [0] * _PADDING
    prompt = Prompt(_READ, mask, (mask.cumsum(-1) - 1).clamp(min=0))
    try:
        found, wanted = (_read(runner, texts, prompt, steps=steps) for steps in (False, True))
    except Exception:
        return False
    precision = torch.finfo(runner.model.dtype).eps
    return bool((found - wanted).abs().max() <= 3 * precision**0.5 * wanted.std())


def _read(runner: RecurrentRunner, texts: list[list[int]], prompt: Prompt, *, steps: bool) -> torch.Tensor:
    """Logits `[2, M, V]` of the last M tokens, which are read as a draft."""
    one = RecurrentRunner(runner.model, "the probe", steps=steps, columns=not steps and runner.stepwise is not None)
    stats = LevelStats("probe", 0)
    one.run(Context([text[:_READ] for text in texts], prompt), [[], []], stats)
    context = Context([text[: 1 - _MORE] for text in texts], prompt)
    return one.run(context, [text[1 - _MORE :] for text in texts], stats).logits.float()
