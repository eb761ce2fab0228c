# SPDX-License-Identifier: Apache-2.0
"""The question whether a model obeys position ids and masks."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from tiny_models import tiny

import hf_polyspec
from hf_polyspec.host import in_step
from hf_polyspec.host.in_step import rows_may_part


@pytest.mark.parametrize(
    ("kind", "may"), [("llama", True), ("opt", True), ("bloom", True), ("a Llama that counts columns", False)]
)
def test_asked_of_the_model_itself(kind: str, may: bool) -> None:
    model = _counting_columns(tiny("llama")) if " " in kind else tiny(kind, attention="eager")
    assert rows_may_part(model) is may


def _counting_columns(model: Any) -> Any:
    """A model whose positions are its cache's columns, whatever it is told."""

    def forget(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs["position_ids"] = None
        return args, kwargs

    model.register_forward_pre_hook(forget, with_kwargs=True)
    return model


def test_asked_once_and_nobodys_numbers_move() -> None:
    drawing = tiny("gpt2").train()  # for its dropout
    before = torch.random.get_rng_state()
    rows_may_part(drawing)
    assert torch.equal(before, torch.random.get_rng_state())
    model = tiny("gpt2")
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    rows_may_part(model)
    asked = len(passes)
    rows_may_part(model)
    assert asked == len(passes) > 0


@pytest.mark.parametrize("kind", ["llama", "roformer"])
def test_a_model_that_cannot_be_asked_is_believed_if_it_takes_positions(kind: str) -> None:
    own = {"is_decoder": True, "embedding_size": 32} if kind == "roformer" else {}
    model = tiny(kind, attention="eager", **own)

    def refuse(*_: Any) -> None:
        raise RuntimeError("not now")

    model.register_forward_pre_hook(refuse)
    assert rows_may_part(model) is (kind == "llama")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_rounding_to_integers_is_no_manner_of_reading(kind: str, bits: int) -> None:
    """Last bits move an 8-bit copy's logits by more than a float model's: what they move is gauged on the copy."""
    copied = hf_polyspec.quantize_model(copy.deepcopy(tiny(kind)), bits=bits)
    assert in_step.rows_may_part(copied)
    assert in_step.reads_on(copied, padded=True)


def test_only_passes_of_the_thread_that_asks_are_moved() -> None:
    model = tiny("llama")
    ids = torch.arange(1, 7)[None]
    right = model(ids).logits
    found: list[torch.Tensor] = []
    with in_step._last_bits(model, 0):
        assert not torch.equal(model(ids).logits, right)
        thread = threading.Thread(target=lambda: found.append(model(ids).logits))
        thread.start()
        thread.join()
    assert torch.equal(found[0], right)
    assert torch.equal(model(ids).logits, right)
