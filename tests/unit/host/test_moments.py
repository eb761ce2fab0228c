# SPDX-License-Identifier: Apache-2.0
"""Moments: who opens one, and whose code ends it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from hf_polyspec.cpu.packing import pack
from hf_polyspec.host.moments import no_moment, one_moment, runs_known_code, this_moment
from hf_polyspec.levels.suffix import SuffixDrafter
from hf_polyspec.levels.undisturbed import asks_nobody
from hf_polyspec.levels.verifier import NoDraft
from hf_polyspec.quantization import quantize_model

Tiny = Callable[..., PreTrainedModel]


def test_a_moment_inside_another_is_part_of_it() -> None:
    assert this_moment() is None
    with one_moment():
        first = this_moment()
        with one_moment():
            assert this_moment() is first is not None
        assert this_moment() is first
    assert this_moment() is None
    with one_moment():
        assert this_moment() not in (None, first)


def test_a_moment_ends_with_what_is_raised_and_is_one_threads() -> None:
    seen: list[Any] = []

    def failing() -> None:
        with one_moment():
            thread = Thread(target=lambda: seen.append(this_moment()))
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert seen == [None]
    assert this_moment() is None


def test_a_call_begun_inside_a_moment_is_in_none_and_the_one_around_it_looks_again() -> None:
    with no_moment():
        assert this_moment() is None
    assert this_moment() is None
    with one_moment():
        first = this_moment()
        with no_moment():
            assert this_moment() is None
            with one_moment():
                assert this_moment() not in (None, first)
            assert this_moment() is None
        assert this_moment() not in (None, first)
    assert this_moment() is None


class _Functions(TorchFunctionMode):
    """Somebody's."""


class _Operations(TorchDispatchMode):
    """Somebody's."""


@pytest.mark.parametrize("mode", [_Functions, _Operations])
def test_there_is_no_moment_under_a_mode_of_somebodys(mode: Callable[[], Any]) -> None:
    with one_moment(), mode(), one_moment():
        assert this_moment() is None
    with one_moment():
        assert this_moment() is not None


@pytest.fixture
def default_device() -> Iterator[None]:
    torch.set_default_device("cpu")
    yield
    torch.set_default_device(None)


def test_torchs_own_mode_for_a_default_device_is_known(default_device: None) -> None:
    with one_moment():
        assert this_moment() is not None


class _Norm(nn.LayerNorm):
    """Somebody's."""


def _hooked(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda *_: None)


def _hooked_before(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda *_: None)


def _replaced(model: Any) -> None:
    model.lm_head.forward = lambda x: x


def _another(model: Any) -> None:
    model.model.norm = _Norm(32)


def _wrapped(model: Any) -> None:
    kind = type(model.model.norm)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any) -> Any:
        return kind.forward(self, *args)

    body = {"forward": forward, "__module__": kind.__module__}
    model.model.norm.__class__ = type(kind.__name__, (kind,), body)  # says in everything that it is the host's


@pytest.mark.parametrize("change", [_hooked, _hooked_before, _replaced, _another, _wrapped])
@pytest.mark.parametrize("packed", [False, True])
def test_whose_code_a_model_runs(tiny: Tiny, change: Callable[[Any], None], packed: bool) -> None:
    model = copy.deepcopy(tiny("llama"))
    model = pack(model) if packed else model
    assert runs_known_code(model)
    assert runs_known_code(quantize_model(model, 8))
    change(model)
    assert not runs_known_code(model)


class _Mine(SuffixDrafter):
    """Somebody's."""


def test_whose_code_drafts() -> None:
    assert asks_nobody(SuffixDrafter())
    assert asks_nobody(NoDraft())
    assert not asks_nobody(_Mine()), "what a subclass does is not known"
