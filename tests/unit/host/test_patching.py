# SPDX-License-Identifier: Apache-2.0
"""Standing in for generate() beside others who do so too: before us, after us, with and without functools.wraps."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tiny_models import noisy, prompts, tiny
from transformers import GenerationMixin, PreTrainedModel

import hf_polyspec
from hf_polyspec.host.patching import POSITIONAL, positional_names

SHORT = {"max_new_tokens": 6, "do_sample": False}
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    original = GenerationMixin.generate
    yield
    hf_polyspec.disable()
    GenerationMixin.generate = original


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture
def chain(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [noisy(model)]


def wrapping(below: Callable[..., Any]) -> Callable[..., Any]:
    """Somebody's patch, as functools.wraps makes it: attributes and `__wrapped__` of what is below it are copied."""

    @functools.wraps(below)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        generate.calls += 1  # type: ignore[attr-defined]
        return below(self, *args, **kwargs)

    generate.calls = 0  # type: ignore[attr-defined]
    return generate


def bare(below: Callable[..., Any]) -> Callable[..., Any]:
    """The same without a word of what it wraps."""

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        generate.calls += 1  # type: ignore[attr-defined]
        return below(self, *args, **kwargs)

    generate.calls = 0  # type: ignore[attr-defined]
    return generate


WRAPS = pytest.mark.parametrize("wrap", [wrapping, bare], ids=lambda wrap: wrap.__name__)


def takes_assistants(model: Any, chain: list[Any]) -> bool:
    """Whether the model's generate() runs a chain; what it says of plain text must not depend on that."""
    plain = model.generate(**prompts(1), **SHORT).tolist()
    try:
        found = model.generate(**prompts(1), **SHORT, assistant_models=chain).tolist()
    except ValueError as error:
        if "assistant_models" not in str(error):
            raise
        return False
    assert found == plain
    return True


@WRAPS
def test_a_later_patch_stays_when_ours_is_taken_back(model, chain, wrap: Wrap):
    original = GenerationMixin.generate
    hf_polyspec.enable()
    GenerationMixin.generate = later = wrap(GenerationMixin.generate)
    assert takes_assistants(model, chain)
    assert later.calls == 2
    hf_polyspec.disable()
    assert GenerationMixin.generate is later
    assert not takes_assistants(model, chain)
    assert later.calls == 4
    GenerationMixin.generate = original  # what its owner remembers
    assert not takes_assistants(model, chain)


@WRAPS
def test_an_earlier_patch_is_there_again(model, chain, wrap: Wrap):
    GenerationMixin.generate = earlier = wrap(GenerationMixin.generate)
    hf_polyspec.enable()
    assert takes_assistants(model, chain)
    assert earlier.calls == 2, "it is under ours"
    hf_polyspec.disable()
    assert GenerationMixin.generate is earlier


@WRAPS
def test_enabled_again_above_a_later_patch(model, chain, wrap: Wrap):
    """Our buried patch is off for good, so that a call goes through one door."""
    hf_polyspec.enable()
    GenerationMixin.generate = later = wrap(GenerationMixin.generate)
    hf_polyspec.enable()
    assert GenerationMixin.generate is not later
    assert takes_assistants(model, chain)
    hf_polyspec.disable()
    assert GenerationMixin.generate is later
    assert not takes_assistants(model, chain)


def test_enabled_again_after_somebody_restored_the_original(model, chain):
    original = GenerationMixin.generate
    hf_polyspec.enable()
    GenerationMixin.generate = original
    hf_polyspec.enable()
    assert takes_assistants(model, chain)
    hf_polyspec.disable()
    assert GenerationMixin.generate is original


@WRAPS
def test_an_attachment_under_somebodys_attribute_is_turned_off_not_torn_out(model, chain, wrap: Wrap):
    hf_polyspec.attach(model)
    later = wrap(lambda self, *args, below=model.generate, **kwargs: below(*args, **kwargs))
    model.generate = types.MethodType(later, model)
    assert takes_assistants(model, chain)
    hf_polyspec.detach(model)
    assert vars(model)["generate"].__func__ is later
    assert not takes_assistants(model, chain)
    assert later.calls == 4
    hf_polyspec.attach(model)
    assert takes_assistants(model, chain)
    hf_polyspec.detach(model)
    assert vars(model)["generate"].__func__ is later


def test_attached_above_enable_and_left_behind_by_it(model, chain):
    hf_polyspec.enable()
    hf_polyspec.attach(model)
    hf_polyspec.disable()
    assert takes_assistants(model, chain)
    assert not takes_assistants(chain[0], [model])
    hf_polyspec.detach(model)
    assert not takes_assistants(model, chain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_attached_models(model, chain, copied):
    """A copy's generate is its own, and what is done to one is not done to the other."""
    hf_polyspec.attach(model)
    try:
        twin = copied(model)
    except (AttributeError, pickle.PicklingError):
        pytest.fail("an attached model is pickled as any other")
    assert getattr(twin.generate, "__self__", twin) is twin
    assert twin.generate(**prompts(1), **SHORT).tolist() == model.generate(**prompts(1), **SHORT).tolist()
    hf_polyspec.detach(twin)
    assert takes_assistants(model, chain), "the twin was detached, not the model"
    assert not takes_assistants(twin, chain)
    hf_polyspec.attach(twin)
    hf_polyspec.detach(model)
    assert takes_assistants(twin, chain)
    assert not takes_assistants(model, chain)


@pytest.mark.parametrize("detached", [False, True])
def test_a_model_with_its_own_generate_is_let_go(detached: bool):
    model = tiny("llama")
    model.generate = types.MethodType(bare(type(model).generate), model)
    hf_polyspec.attach(model)
    if detached:
        hf_polyspec.detach(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_signature_shows_what_is_new_and_keeps_the_rest():
    before = inspect.signature(GenerationMixin.generate)
    hf_polyspec.enable()
    after = inspect.signature(GenerationMixin.generate)
    added = after.parameters["assistant_models"]
    assert (added.kind, added.default) == (inspect.Parameter.KEYWORD_ONLY, None)
    assert [p for p in after.parameters.values() if p is not added] == list(before.parameters.values())


def test_positional_arguments_have_their_names_behind_any_patch():
    names = positional_names()
    assert names[:2] == ["inputs", "generation_config"]
    GenerationMixin.generate = bare(GenerationMixin.generate)
    assert positional_names() == list(POSITIONAL)
    assert set(names) <= {*POSITIONAL, *names}


@WRAPS
def test_positional_arguments_come_through(model, chain, wrap: Wrap):
    GenerationMixin.generate = wrap(GenerationMixin.generate)
    hf_polyspec.enable()
    ids = prompts(1)["input_ids"]
    plain = model.generate(ids, **SHORT)
    assert model.generate(ids, **SHORT, assistant_models=chain).tolist() == plain.tolist()
