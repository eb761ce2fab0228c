# SPDX-License-Identifier: Apache-2.0
"""Whatever ends a chain, and whenever: its assistants are as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.cpu import packing
from hf_polyspec.quantization import is_packed

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(3, 48, (1, 12), generator=torch.Generator().manual_seed(5))
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


class _Interrupt:
    """Calls a function, and raises once before its call number `at`."""

    def __init__(self, function: Callable[..., Any], at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self._function, self._left, self._error = function, at, error

    def __call__(self, *given: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise self._error
        return self._function(*given)


def _plain(model: PreTrainedModel) -> bool:
    return not is_packed(model) and all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("at", [1, 2, 5, 9])
@pytest.mark.parametrize("step", ["_install", "_keep"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_while_layers_are_replaced_or_put_back(
    target: PreTrainedModel,
    middle: PreTrainedModel,
    step: str,
    at: int,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assistant = copy.deepcopy(middle)
    wanted = target.generate(IDS, attention_mask=torch.ones_like(IDS), **OPTIONS)
    with monkeypatch.context() as patched:
        patched.setattr(packing, step, _Interrupt(getattr(packing, step), at, error))
        with pytest.raises(error):
            hf_polyspec.generate(target, IDS, **OPTIONS, assistant_models=[assistant])
    assert _plain(assistant)
    assert _plain(target)
    assert torch.equal(hf_polyspec.generate(target, IDS, **OPTIONS, assistant_models=[assistant]), wanted)
    assert _plain(assistant)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_while_the_chain_runs(target: PreTrainedModel, middle: PreTrainedModel, error: type[BaseException]) -> None:
    assistant, seen = copy.deepcopy(middle), []

    def stop(*_: Any) -> None:
        seen.append(is_packed(assistant))
        if len(seen) == 3:
            raise error

    hook = assistant.register_forward_pre_hook(stop)
    with pytest.raises(error if error is not ValueError else hf_polyspec.LevelError):
        hf_polyspec.generate(target, IDS, **OPTIONS, assistant_models=[assistant])
    hook.remove()
    assert seen == [True] * 3
    assert _plain(assistant)


def test_an_interrupt_before_anything_is_computed(target: PreTrainedModel, middle: PreTrainedModel) -> None:
    """A context that was entered and is dropped, as between `__enter__` and the first line of a block."""
    assistant = copy.deepcopy(middle)
    context = packing.packed_assistants([assistant], target)
    context.__enter__()
    assert is_packed(assistant)
    del context
    assert _plain(assistant)
