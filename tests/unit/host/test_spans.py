# SPDX-License-Identifier: Apache-2.0
"""Passes over rows of their own: what they change of a model's config is changed for their time alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from tiny_models import tiny

from hf_polyspec.host import spans
from hf_polyspec.host.attention import ROWS_APART
from hf_polyspec.host.span import Span

GROUPS: Any = {None: [Span(0, 1, 0, 0)]}


class Interrupt:
    """Calls a function, and raises once, before or after its call number `at`."""

    def __init__(self, function: Callable[..., Any], at: int, after: bool) -> None:
        self.function, self.left, self.after = function, at, after

    def __call__(self, *given: Any) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        self.function(*given)
        if self.left == 0 and self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside-another-pass"])
@pytest.mark.parametrize("step", ["_rename", "enter", "leave"])
def test_ctrl_c_on_the_way_into_a_pass_or_out_of_it(
    monkeypatch: pytest.MonkeyPatch, step: str, beside: bool, at: int, after: bool
) -> None:
    model = tiny("llama")
    with spans.spanned(model, GROUPS) if beside else nullcontext() as outer:
        with monkeypatch.context() as patched:
            owner = spans if step == "_rename" else spans._Renamed
            stopped = Interrupt(getattr(owner, step), at, after)
            patched.setattr(owner, step, lambda *given: stopped(*given))
            with suppress(KeyboardInterrupt), spans.spanned(model, GROUPS):
                pass
        assert model.config._attn_implementation == (ROWS_APART if beside else "sdpa")
        assert spans.pass_under_way() is outer
        with spans.spanned(model, GROUPS):
            assert model.config._attn_implementation == ROWS_APART
    assert model.config._attn_implementation == "sdpa"
    assert spans.pass_under_way() is None
