# SPDX-License-Identifier: Apache-2.0
"""Layers that read column by column within a pass: what plain generation computes, and nothing stays behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import tiny

from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.host import stepwise
from hf_polyspec.host.manners import Manner, manner_of
from hf_polyspec.host.modeling import AutoModelForCausalLM, DynamicCache
from hf_polyspec.host.release import with_cache
from hf_polyspec.host.stepwise import Stepwise

KINDS = ["mamba", "zamba", "nemotron_h"]
READ, TEXT = 4, [5, 9, 3, 7, 11, 4, 8, 30]


def _made(kind: str) -> Any:
    return tiny_model(kind, AutoModelForCausalLM)


@torch.no_grad()
def _logits(model: Any, pieces: list[int], first: int | None = None) -> tuple[torch.Tensor, Any]:
    """Logits of the text read in pieces, the last of which stepwise where `first` is given; and the cache."""
    cache, found, start = DynamicCache(config=model.config), [], 0
    for place, end in enumerate(pieces):
        call = {"input_ids": torch.tensor([TEXT[start:end]]), "use_cache": True, **with_cache(model, cache)}
        if first is not None and place == len(pieces) - 1:
            with Stepwise(model).reading(first):
                found.append(model(**call).logits[0])
        else:
            found.append(model(**call).logits[0])
        start = end
    return torch.cat(found), cache


def _plain(model: Any) -> tuple[torch.Tensor, Any]:
    return _logits(model, [READ, *range(READ + 1, len(TEXT) + 1)])


@pytest.mark.parametrize("known", [True, False], ids=["scan", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_states_are_plain_generations(kind: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a state and from the beginning; where the scan is known and where every column is read alone."""
    if not known:
        monkeypatch.setattr(stepwise, "_SCANS", {})
    model = _made(kind)
    wanted, plain = _plain(model)
    assert float((_logits(model, [READ, len(TEXT)])[0] - wanted).abs().max()) > 1e-3, "else there is nothing to do"
    for pieces, first in (([READ, len(TEXT)], 1), ([len(TEXT)], READ)):
        found, cache = _logits(model, pieces, first)
        assert float((found - wanted).abs().max()) < 1e-4
        for layer, other in zip(cache.layers, plain.layers, strict=True):
            for name, state in getattr(layer, "recurrent_states", {}).items():
                assert torch.allclose(state, other.recurrent_states[name], atol=1e-5)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@torch.no_grad()
def test_another_threads_pass_is_left_alone() -> None:
    model = _made("mamba")
    ids = torch.tensor([TEXT])
    alone, found = model(input_ids=ids).logits, []
    with Stepwise(model).reading(1):
        thread = threading.Thread(target=lambda: found.append(torch.no_grad()(model)(input_ids=ids).logits))
        thread.start()
        thread.join()
    assert torch.equal(found[0], alone)


def test_the_trial_shows_what_reads_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without stepping these are fed one column a pass; with it they are not."""
    assert manner_of(_made("jamba")) is Manner.COLUMNS

    @contextmanager
    def nothing(self: Stepwise, first: int) -> Iterator[None]:
        yield

    monkeypatch.setattr(Stepwise, "reading", nothing)
    assert manner_of(_made("jamba")) is Manner.STEPS


def test_limits_of_the_time_step_are_asked_for() -> None:
    """They may show in no text that is tried."""
    settings = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4}
    assert manner_of(tiny("mamba2", attention="eager", **settings)) is Manner.BLOCKS
    limited = tiny("mamba2", attention="eager", time_step_limit=(1e-9, float("inf")), **settings)
    assert manner_of(limited) is Manner.COLUMNS
