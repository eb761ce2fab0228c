# SPDX-License-Identifier: Apache-2.0
"""What the installed release calls things is found by looking, also in classes that no release has."""

from __future__ import annotations

import functools
import inspect
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import noisy, prompts, tiny
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

import hf_polyspec
from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.host import release
from hf_polyspec.host.modeling import AutoModelForCausalLM, AutoModelForImageTextToText

PROJECT = Path(__file__).parents[3]
SHORT = {"max_new_tokens": 8, "do_sample": False}
HERE = release.GENERATION_CACHE
RANDOM = "".join(random.Random(5).choices("abcdefghijklmnopqrstuvwxyz", k=9))
"""A name for the cache that no release ever had."""


def of_kind(kind: type[Any]) -> PreTrainedModel:
    """The tiny Llama as an object of another class."""
    usual = tiny("llama")
    other = kind(usual.config).eval()
    other.load_state_dict(usual.state_dict())
    other.generation_config = usual.generation_config
    return other


def _forward(self: Any, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, logits_to_keep=0, **kw):
    cache = kw.pop(RANDOM, None)
    return LlamaForCausalLM.forward(
        self,
        input_ids,
        attention_mask,
        position_ids,
        **{HERE: cache},
        use_cache=use_cache,
        logits_to_keep=logits_to_keep,
        **kw,
    )


def _named(name: str, annotation: Any) -> type[Any]:
    """A class whose forward shows the cache under a name, with an annotation or without."""
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for known in ("input_ids", "attention_mask", "position_ids", name, "use_cache", "logits_to_keep", "return_dict"):
        given = annotation if known == name else inspect.Parameter.empty
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(inspect.Parameter(known, kind, default=None, annotation=given))

    def forward(self: Any, **given: Any) -> Any:
        return _forward(self, **{RANDOM if key == name else key: value for key, value in given.items()})

    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("Named", (LlamaForCausalLM,), {"forward": forward})


class Hidden(LlamaForCausalLM):
    """Hides everything, as decorators do."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Deprecated(LlamaForCausalLM):
    """Takes the cache under an old name that its signature does not show, with a warning."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, logits_to_keep=0, **kw):
        if "past_key_values" in kw:
            warnings.warn("`past_key_values` is deprecated", FutureWarning, stacklevel=2)
            kw[HERE] = kw.pop("past_key_values")
        return LlamaForCausalLM.forward(
            self, input_ids, attention_mask, position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep, **kw
        )


def test_a_cache_is_recognised_by_its_annotation_under_any_name():
    assert release.cache_argument(of_kind(_named(RANDOM, Cache | None))) == RANDOM
    assert release.cache_argument(of_kind(_named("memory", "DynamicCache"))) == "memory"
    assert release.named_cache({"cache": None, "past_key_values": None}) == "cache"
    assert release.named_cache({"labels": None}) is None


def test_what_says_nothing_is_refused_with_what_was_looked_for():
    model = of_kind(_named(RANDOM, inspect.Parameter.empty))
    assert release.cache_argument(model) is None
    target = tiny("llama")
    with pytest.raises(ValueError, match="has no argument") as caught:
        hf_polyspec.generate(target, **prompts(1), **SHORT, assistant_models=[model])
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in ("assistant_models[0]", "forward()", "'cache'", "'past_key_values'", RANDOM):
        assert word in sentence, sentence
    with pytest.raises(ValueError, match=f"'cache' or 'past_key_values' .* {RANDOM}"):
        release.with_cache(model, DynamicCache())


@pytest.mark.parametrize("role", ["target", "middle", "drafter"])
def test_what_hides_its_arguments_is_asked_for_those_of_the_class_below(role):
    usual = tiny("llama")
    hidden = of_kind(Hidden)
    assert release.cache_argument(hidden) == HERE
    assert "position_ids" in release.forward_arguments(hidden)
    plain = usual.generate(**prompts(2), **SHORT)
    chain = {"target": [noisy(usual)], "middle": [hidden, noisy(usual)], "drafter": [hidden]}[role]
    target = hidden if role == "target" else usual
    out = hf_polyspec.generate(target, **prompts(2), **SHORT, assistant_models=chain, return_dict_in_generate=True)
    assert out.sequences.tolist() == plain.tolist()
    assert out.polyspec.levels[0].accepted > 0


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_an_old_name_that_is_still_taken_is_used():
    model = of_kind(Deprecated)
    assert release.cache_argument(model) in ("cache", "past_key_values")
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4]]), use_cache=True, **release.with_cache(model, cache))
    assert cache.get_seq_length() == 2


def test_the_models_inside_wrappers():
    model = tiny("llama")
    assert release.inner_model(model) is model
    compiled = torch.compile(model, backend="eager")
    assert release.inner_model(compiled) is model
    assert release.forward_arguments(compiled) == release.forward_arguments(model)
    assert release.cache_argument(compiled) == HERE


def test_what_has_been_compiled_is_known_from_outside_in_place_and_inside():
    assert not release.is_compiled(tiny("llama"))
    outside, forward, whole, part, inner = (tiny("llama") for _ in range(5))
    forward.forward = torch.compile(forward.forward, backend="eager")
    whole.compile(backend="eager")
    part.model.layers[0].compile(backend="eager")
    inner.model = torch.compile(inner.model, backend="eager")
    for model in (torch.compile(outside, backend="eager"), forward, whole, part, inner):
        assert release.is_compiled(model)
    assert "forward" not in vars(release.without_compiled_forwards(forward))


def test_caches_are_found_under_any_name():
    cache = DynamicCache()
    assert release.cache_of({"labels": 1, RANDOM: cache}) is cache
    assert release.cache_of({HERE: None, "labels": 1}) is None
    assert release.cache_names({RANDOM: cache, HERE: None, "labels": 1}) == {RANDOM, HERE}


def test_the_newest_tested_release_is_what_the_project_says():
    """The range in pyproject.toml ends where the tests end."""
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'"transformers[^"]*<\s*(\d+)\.(\d+)', text)
    assert found is not None
    major, minor = (int(part) for part in release.NEWEST_TESTED.split("."))
    assert (int(found[1]), int(found[2])) in {(major, minor + 1), (major + 1, 0)}


def test_the_installed_release_is_transformers_own_word():
    assert release.installed() == transformers.__version__
    assert not release.is_newer_than_tested()


@pytest.mark.parametrize(
    ("version", "newer"),
    [("5.24.0", False), ("5.24.9", False), ("5.25.0", True), ("5.25.0.dev0", True), ("6.0.0", True), ("4.57.1", False)],
)
def test_only_a_later_minor_is_newer(monkeypatch, version, newer):
    monkeypatch.setattr(release, "NEWEST_TESTED", "5.24")
    monkeypatch.setattr(release, "installed", lambda: version)
    assert release.is_newer_than_tested() is newer


def test_a_cache_that_goes_on_to_the_model_inside_without_a_name_is_found():
    """Evolla's forward hands its further arguments on; the first GPT's does so too, to a model that takes no cache."""
    assert release.cache_argument(tiny_model("evolla", AutoModelForImageTextToText)) == HERE
    assert release.cache_argument(tiny_model("openai-gpt", AutoModelForCausalLM)) is None


def test_parameters_are_asked_anew_where_a_function_says_something_else() -> None:
    def plain(self: object, one: int, two: int = 2) -> None: ...

    @functools.wraps(plain)
    def wrapper(*args: object, **kwargs: object) -> None: ...

    class Owner:
        method, wrapped = plain, wrapper

    def names(function: object) -> list[str]:
        return list(release.parameters_of(function))

    assert names(plain) == names(wrapper) == ["self", "one", "two"]
    assert names(Owner().method) == names(Owner().wrapped) == ["one", "two"]
    assert release.parameters_of(Owner().method) is release.parameters_of(Owner().method)
    plain.__defaults__ = (1, 3)
    assert [release.parameters_of(one)["two"].default for one in (plain, wrapper, Owner().wrapped)] == [3, 3, 3]
    plain.__code__ = (lambda self, other: None).__code__
    assert names(Owner().method) == names(Owner().wrapped) == ["other"]
    wrapper.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
    assert names(wrapper) == []
    assert release.parameters_of(functools.partial(plain, 1)).keys() == {"other"}
    assert release.parameters_of(3) == {}
