# SPDX-License-Identifier: Apache-2.0
"""Targets with which drafts cannot be checked generate alone: plain generation's text and outputs, and a warning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import noisy, prompts, tiny
from transformers import GenerationConfig

import hf_polyspec
from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.errors import UncheckableError
from hf_polyspec.generation.alone import alone
from hf_polyspec.host.modeling import AutoModelForCausalLM
from hf_polyspec.host.release import GENERATION_CACHE

NEW = 7
DRAWN = {"do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": NEW}
BOTH_SIDES = r"the target \(BertLMHeadModel\) attends to both sides; .* This call runs without assistants\."


@pytest.fixture(scope="module")
def bert() -> Any:
    return tiny("bert", attention="eager")


def drawn(model: Any, seed: int = 5, **given: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(**given)


def test_all_that_is_handed_out_is_plain_generations(enabled: None, bert: Any) -> None:
    names = [f"output_{name}" for name in ("scores", "logits", "hidden_states", "attentions")]
    more = {**dict.fromkeys(names, True), "return_dict_in_generate": True}
    call = {**prompts(2), **DRAWN, **more, "num_return_sequences": 2}
    plain, state = drawn(bert, **call), torch.get_rng_state()
    with pytest.warns(UserWarning, match=BOTH_SIDES) as caught:
        got = drawn(bert, **call, assistant_models=[noisy(bert, 0.05)])
    assert len(caught) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert type(got) is type(plain)
    assert got.keys() - {"polyspec"} == plain.keys()
    assert torch.equal(got.sequences, plain.sequences)
    for name in ("scores", "logits"):
        assert all(torch.equal(a, b) for a, b in zip(got[name], plain[name], strict=True))
    for name in ("hidden_states", "attentions"):
        for mine, theirs in zip(got[name], plain[name], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert type(got[GENERATION_CACHE]) is type(plain[GENERATION_CACHE])


def test_statistics_say_so(enabled: None, bert: Any) -> None:
    """A pass a token, and each row as long as its text."""
    call = {**prompts(2), "max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    end = int(bert.generate(**call).sequences[0, -NEW + 2])
    call |= {"eos_token_id": end, "pad_token_id": 0}
    passes: list[int] = []
    watch = bert.register_forward_pre_hook(lambda *_: passes.append(1))
    with pytest.warns(UserWarning, match=BOTH_SIDES):
        stats = bert.generate(**call, assistant_models=["suffix"]).polyspec
    watch.remove()
    (level,) = stats.levels
    assert level.forward_passes == len(passes)
    assert len(level.notes) == 1
    assert "attends to both sides" in level.notes[0]
    new = bert.generate(**call).sequences[:, -len(passes) :].tolist()
    lengths = [row.index(end) + 1 if end in row else len(row) for row in new]
    assert [len(row) for row in stats.token_levels] == lengths
    assert stats.new_tokens == sum(lengths)
    assert stats.seed_holds is None
    assert stats.table().row_count == 1


def test_a_streamer_gets_what_plain_generation_puts(enabled: None, bert: Any) -> None:
    class Heard:
        def __init__(self) -> None:
            self.words: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.words.append(value.tolist())

        def end(self) -> None:
            self.words.append("end")

    call = {**prompts(1), "max_new_tokens": NEW, "do_sample": False}
    plain, ours = Heard(), Heard()
    bert.generate(**call, streamer=plain)
    with pytest.warns(UserWarning, match=BOTH_SIDES):
        bert.generate(**call, streamer=ours, assistant_models=["suffix"])
    assert ours.words == plain.words
    assert len(plain.words) == NEW + 2


def test_seeds_of_the_calls_own_are_not_plain_generations(enabled: None, bert: Any) -> None:
    """What plain generation does not know of is refused for the same reason, wherever it stands."""
    call = {**prompts(1), **DRAWN, "assistant_models": ["suffix"]}
    for said in ({"polyspec_seed": 3}, {"generation_config": GenerationConfig(polyspec_seed=3)}):
        with pytest.raises(ValueError, match="attends to both sides") as caught:
            bert.generate(**call, **said)
        assert type(caught.value) is ValueError
    with pytest.raises(ValueError, match="num_beams"):
        bert.generate(**prompts(1), num_beams=2, max_new_tokens=2, assistant_models=["suffix"])


@pytest.mark.parametrize(
    "asked", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"prompt_lookup_num_tokens": 3}]
)
@pytest.mark.parametrize("stored", [False, True])
def test_auto_chooses_nobody_under_another_strategy(enabled: None, asked: dict[str, Any], stored: bool) -> None:
    model = tiny("llama")
    call = {**prompts(1), "max_new_tokens": NEW, "return_dict_in_generate": True, **asked}
    plain = drawn(model, **call)
    auto: dict[str, Any] = {"assistant_models": "auto"}
    if stored:
        auto = {"generation_config": GenerationConfig(assistant_models="auto", pad_token_id=0)}
    (option, value), *_ = asked.items()
    with pytest.warns(UserWarning, match=rf"{option}={value} asks for .*\. This call runs without assistants\."):
        got = drawn(model, **call, **auto)
    assert type(got) is type(plain)
    assert torch.equal(got.sequences, plain.sequences)


def test_a_strategy_that_is_the_models_own_default(enabled: None) -> None:
    """Who names assistants has not asked for the beams; who asks for both is refused."""
    model = tiny("llama")
    model.generation_config.num_beams = 3
    call = {**prompts(2), "max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True}
    plain, chain = model.generate(**call), {"assistant_models": ["suffix"]}
    with pytest.warns(UserWarning, match=r"num_beams=3 asks for beam search.* This call runs without assistants\."):
        got = model.generate(**call, **chain)
    assert torch.equal(got.sequences, plain.sequences)
    assert torch.equal(got.sequences_scores, plain.sequences_scores)
    one = model.generate(**call, num_beams=1, **chain)
    assert one.polyspec.levels[0].forward_passes
    for said in ({"num_beams": 3}, {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=2)}):
        with pytest.raises(ValueError, match="num_beams"):
            model.generate(**{**call, **said}, **chain)
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(**call, polyspec_seed=3, **chain)


def test_where_the_release_has_no_such_loop(bert: Any) -> None:
    class Other(type(bert)):  # type: ignore[misc]
        _sample = None

    given: dict[str, Any] = dict.fromkeys(("input_ids", "generation_config", "polyspec_seed"))
    reason = UncheckableError("so.", "the target")
    with pytest.raises(ValueError, match=r"so\.") as caught:
        alone(reason, {**given, "model": Other(bert.config), "synced_gpus": False})
    assert type(caught.value) is ValueError


def test_maps_that_are_no_maps_of_tokens(enabled: None) -> None:
    """MiniMax's linear layers hand out states; everything else of it is served by the chain."""
    model = tiny_model("minimax", AutoModelForCausalLM)
    call = {**prompts(2), "max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(**call, output_attentions=True)
    with pytest.warns(UserWarning, match=r"output_attentions: the target \(MiniMaxForCausalLM\) hands out maps"):
        got = model.generate(**call, output_attentions=True, assistant_models=["suffix"])
    for mine, theirs in zip(got.attentions, plain.attentions, strict=True):
        assert [layer.shape for layer in mine] == [layer.shape for layer in theirs]
    states = model.generate(**call, output_hidden_states=True, assistant_models=[noisy(model, 0.0)])
    assert not states.polyspec.levels[0].notes


def test_without_a_door(bert: Any) -> None:
    call = {**prompts(1), "max_new_tokens": NEW, "do_sample": False}
    with pytest.warns(UserWarning, match=BOTH_SIDES):
        got = bert.generate(**call, custom_generate=hf_polyspec.decode, assistant_models=["suffix"])
    assert got.tolist() == bert.generate(**call).tolist()


def test_a_class_with_a_generate_of_its_own(enabled: None, bert: Any) -> None:
    """It is called with all that is not ours, and what it returns is returned."""

    class Own(type(tiny("llama"))):  # type: ignore[misc]
        def generate(self, inputs: Any = None, **given: Any) -> Any:
            return inputs, sorted(given)

    model = Own(tiny("llama").config)
    hf_polyspec.attach(model)
    words = r"generate\(\) of Own is the class's own .* This call runs without assistants\."
    options = {"num_assistant_tokens": 3, "polyspec_verification": "token", "max_new_tokens": 4}
    with pytest.warns(UserWarning, match=words):
        assert model.generate(5, **options, assistant_models=["suffix"]) == (5, ["max_new_tokens"])
    with pytest.raises(ValueError, match=r"generate\(\) of Own") as caught:
        model.generate(5, polyspec_seed=1, assistant_models=["suffix"])
    assert type(caught.value) is ValueError


def test_as_an_assistant_it_is_refused_like_any_other(bert: Any) -> None:
    """At every door, with nothing but a ValueError."""
    target = tiny("bert", is_decoder=True, attention="eager")
    for door in (
        lambda: hf_polyspec.generate(target, **prompts(1), max_new_tokens=2, assistant_models=[bert]),
        lambda: hf_polyspec.Engine(target, [bert]),
        lambda: hf_polyspec.Engine(bert, ["suffix"]),
        lambda: hf_polyspec.generate_batch(target, [[3, 4]], assistant_models=[bert], max_new_tokens=2),
    ):
        with pytest.raises(ValueError, match="attends to both sides") as caught:
            door()
        assert type(caught.value) is ValueError
