# SPDX-License-Identifier: Apache-2.0
"""A release that nobody tested is tried before it is used: it passes with one warning, or is refused by name."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from tiny_models import noisy, prompts, tiny
from transformers import GenerationMixin, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import hf_polyspec
from hf_polyspec.errors import ReleaseError
from hf_polyspec.host import contract, release

SHORT = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def _no_verdict() -> Iterator[None]:
    contract._verdicts.clear()
    yield
    hf_polyspec.disable()
    contract._verdicts.clear()


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> str:
    """The installed release is taken for one that comes after all that were tested."""
    monkeypatch.setattr(release, "NEWEST_TESTED", "5.3")
    monkeypatch.setattr(release, "installed", lambda: "5.4.1")
    return "5.4.1"


def test_the_installed_release_keeps_its_promises():
    assert contract.broken_promise() is None


@pytest.mark.parametrize("door", ["enable", "attach", "generate"])
def test_a_newer_release_passes_with_one_warning_that_names_both(newer, door):
    model = tiny("llama")
    plain = model.generate(**prompts(1), **SHORT).tolist()
    doors: dict[str, Any] = {
        "enable": hf_polyspec.enable,
        "attach": lambda: hf_polyspec.attach(model),
        "generate": lambda: hf_polyspec.generate(model, **prompts(1), **SHORT, assistant_models=[noisy(model)]),
    }
    with pytest.warns(UserWarning, match=r"transformers 5\.4\.1 is newer than 5\.3, .* was tried and holds") as caught:
        doors[door]()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hf_polyspec.generate(model, **prompts(1), **SHORT, assistant_models=["suffix"]).tolist() == plain
        hf_polyspec.enable()


def test_a_tested_release_is_not_tried(monkeypatch):
    monkeypatch.setattr(contract, "broken_promise", lambda: pytest.fail("nothing is to be tried"))
    hf_polyspec.enable()


def _without_position_ids(self: Any, input_ids=None, attention_mask=None, use_cache=None, logits_to_keep=0, **kw: Any):
    return LlamaForCausalLM.forward(self, input_ids, attention_mask)


class Shifted(LlamaForCausalLM):
    """Logits one column off, as if `logits_to_keep` meant something else now."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        return CausalLMOutputWithPast(logits=out.logits.roll(1, 1), hidden_states=out.hidden_states)


class Failing(LlamaForCausalLM):
    """Raises wherever a cache is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(release.GENERATION_CACHE) is not None:
            raise RuntimeError("this cache is of another kind")
        return super().forward(*args, **kwargs)


class MoreStates(LlamaForCausalLM):
    """A hidden state too many."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.hidden_states is not None:
            out.hidden_states = (*out.hidden_states, out.hidden_states[-1])
        return out


class OtherGenerate(LlamaForCausalLM):
    """Its generate() does not know a custom_generate."""

    def generate(self, inputs: Any = None, **kwargs: Any) -> Any:
        return inputs


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Shifted, "rolled back"),
        (Failing, r"fails now \(LevelError: .*this cache is of another kind"),
        (MoreStates, "4 hidden states instead of 3"),
        (OtherGenerate, "no longer calls a custom_generate"),
    ],
)
def test_what_changed_is_named(newer, monkeypatch, kind, words):
    reason = contract.broken_promise(kind)
    assert reason is not None
    monkeypatch.setattr(contract, "broken_promise", lambda: reason)
    original = GenerationMixin.generate
    with pytest.raises(ReleaseError, match=words) as caught:
        hf_polyspec.enable()
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, ValueError)
    assert "5.4.1" in str(caught.value)
    assert 'install "transformers<5.4"' in str(caught.value)
    assert GenerationMixin.generate is original, "nothing was patched"
    with pytest.raises(ReleaseError, match=words):
        hf_polyspec.enable()


def test_an_argument_that_is_gone_is_named():
    kind = type("Gone", (LlamaForCausalLM,), {"forward": _without_position_ids})
    reason = contract.broken_promise(kind)
    assert reason is not None
    assert "Gone.forward has no argument 'position_ids' any more" in reason


def test_a_model_that_cannot_be_made_is_named():
    class Closed(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            raise TypeError("config must be frozen")

    reason = contract.broken_promise(Closed)
    assert reason is not None
    assert "config must be frozen" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_trial_leaves_everything_as_it_is(dtype):
    """Whoever seeded a generator, chose a dtype or filters warnings does not notice that a release was tried."""
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(3)
        random.seed(3)
        numpy.random.seed(3)
        filters = list(warnings.filters)
        before = (torch.get_rng_state(), random.getstate(), numpy.random.get_state())
        with torch.device("meta"):
            assert contract.broken_promise() is None
            assert torch.empty(0).device.type == "meta"
        after = (torch.get_rng_state(), random.getstate(), numpy.random.get_state())
        assert torch.equal(before[0], after[0])
        assert before[1] == after[1]
        assert all(numpy.array_equal(a, b) for a, b in zip(before[2], after[2], strict=True))
        assert torch.get_default_dtype() is dtype
        assert list(warnings.filters) == filters
        assert torch.get_default_device().type == "cpu"
    finally:
        torch.set_default_dtype(torch.float32)
