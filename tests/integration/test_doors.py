# SPDX-License-Identifier: Apache-2.0
"""Every way of getting `assistant_models` into generate(): all give the same tokens, none changes plain generation."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, noisy, prompts, tiny
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextGenerationPipeline,
)

import hf_polyspec

RECIPE = Path(__file__).parents[2] / "recipes" / "custom_generate"
OPTIONS = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}
CHAIN = {"polyspec_block_size": 4, "num_assistant_tokens": 3}


@pytest.fixture(autouse=True)
def _leave_no_door_open() -> Iterator[None]:
    before = GenerationMixin.generate
    yield
    hf_polyspec.disable()
    assert GenerationMixin.generate is before


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture
def chain(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [noisy(model, 0.03, seed=1), noisy(model, 0.05, seed=2)]


class WithMixin(hf_polyspec.PolySpecGenerationMixin, LlamaForCausalLM):
    """A model class of a user's own."""


def enabled(model: PreTrainedModel, **options: Any) -> Any:
    hf_polyspec.enable()
    return model.generate(**options)


def attached(model: PreTrainedModel, **options: Any) -> Any:
    assert hf_polyspec.attach(model) is model
    return model.generate(**options)


def mixed_in(model: PreTrainedModel, **options: Any) -> Any:
    other = WithMixin(model.config).eval()
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    return other.generate(**options)


def callable_given(model: PreTrainedModel, **options: Any) -> Any:
    return model.generate(**options, custom_generate=hf_polyspec.decode)


def recipe(model: PreTrainedModel, **options: Any) -> Any:
    return model.generate(**options, custom_generate=str(RECIPE), trust_remote_code=True)


def function(model: PreTrainedModel, **options: Any) -> Any:
    return hf_polyspec.generation.doors.generate(model, **options)


DOORS: list[Callable[..., Any]] = [enabled, attached, mixed_in, callable_given, recipe, function]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_door_leads_to_the_same_tokens(model, chain, door, batch, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    plain = model.generate(**prompts(batch), **OPTIONS)
    ours = door(model, **prompts(batch), **OPTIONS, **CHAIN, assistant_models=chain)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    levels = ours.polyspec.levels
    assert len(levels) == 3
    assert 0 < levels[0].accepted < levels[0].drafted
    assert len(levels[1].drafted_at) == 3, "the options of the chain came through"


@pytest.mark.parametrize("door", [door for door in DOORS if door is not callable_given], ids=lambda door: door.__name__)
def test_every_door_but_the_bare_callable_streams(model, chain, door, tmp_path, monkeypatch):
    from transformers.generation.streamers import BaseStreamer

    class Recording(BaseStreamer):
        def __init__(self) -> None:
            self.ids: list[int] = []
            self.ends = 0

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ends += 1

    streamer = Recording()
    ours = door(model, **prompts(1), **OPTIONS, assistant_models=chain, streamer=streamer)
    assert streamer.ids == ours.sequences[0].tolist()
    assert streamer.ends == 1


def test_enable_and_disable(model, chain):
    original = GenerationMixin.generate
    hf_polyspec.enable()
    wrapped = GenerationMixin.generate
    hf_polyspec.enable()
    assert GenerationMixin.generate is wrapped
    assert "assistant_models" in inspect.signature(GenerationMixin.generate).parameters
    hf_polyspec.disable()
    assert GenerationMixin.generate is original
    hf_polyspec.disable()
    assert GenerationMixin.generate is original
    with pytest.raises(ValueError, match="assistant_models"):
        model.generate(**prompts(1), **OPTIONS, assistant_models=chain)


def test_attach_and_detach(model, chain):
    hf_polyspec.attach(hf_polyspec.attach(model))
    other = chain[0]
    with pytest.raises(ValueError, match="assistant_models"):
        other.generate(**prompts(1), **OPTIONS, assistant_models=chain[1:])
    twin = copy.deepcopy(model)
    assert twin.generate.__self__ is twin
    outputs = [each.generate(**prompts(1), **OPTIONS, assistant_models=chain).sequences for each in (model, twin)]
    assert outputs[0].tolist() == outputs[1].tolist()
    assert hf_polyspec.detach(model) is model
    assert "generate" not in vars(model)
    hf_polyspec.detach(model)
    with pytest.raises(ValueError, match="assistant_models"):
        model.generate(**prompts(1), **OPTIONS, assistant_models=chain)


def test_an_attachment_outlives_enable_and_disable(model, chain):
    hf_polyspec.enable()
    hf_polyspec.attach(model)
    inside = model.generate(**prompts(1), **OPTIONS, assistant_models=chain).sequences
    hf_polyspec.disable()
    outside = model.generate(**prompts(1), **OPTIONS, assistant_models=chain).sequences
    assert inside.tolist() == outside.tolist()


def test_an_instance_attribute_of_somebody_else_is_kept(model, chain):
    """Model repositories with a recipe put generate on the instance; attach goes around it, detach restores it."""
    called: list[dict[str, Any]] = []
    inner = model.generate

    def somebodys(*args: Any, **kwargs: Any) -> Any:
        called.append(kwargs)
        return inner(*args, **kwargs)

    model.generate = somebodys
    hf_polyspec.attach(model)
    model.generate(**prompts(1), **OPTIONS, assistant_models=chain)
    assert len(called) == 1
    hf_polyspec.detach(model)
    assert model.generate is somebodys


@pytest.mark.parametrize("door", ["enable", "attach", "mixin"])
def test_without_assistant_models_nothing_changes(model, monkeypatch, door):
    """The very same function gets the very same arguments."""
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def spy(self: Any, *args: Any, **kwargs: Any) -> str:
        seen.append((self, args, kwargs))
        return "result"

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    if door == "enable":
        hf_polyspec.enable()
    elif door == "attach":
        hf_polyspec.attach(model)
    else:
        mixed = WithMixin(model.config)
        model = mixed
    ids, config, extra = object(), object(), object()
    assert model.generate(ids, config, streamer=extra, max_new_tokens=3) == "result"
    ((self, args, kwargs),) = seen
    assert self is model
    assert args == (ids, config)
    assert kwargs == {"streamer": extra, "max_new_tokens": 3}
    hf_polyspec.disable()
    assert GenerationMixin.generate is spy


def lora(model: PreTrainedModel, seed: int) -> Any:
    """The model with an adapter that changes what it says."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(copy.deepcopy(model), config).eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("door", ["enable", "attach"])
@pytest.mark.parametrize("batch", [1, 3])
def test_lora_target_and_lora_assistants(model, chain, door, batch):
    target = lora(model, 1)
    plain = target.generate(**prompts(batch), **OPTIONS)
    assert plain.sequences.tolist() != model.generate(**prompts(batch), **OPTIONS).sequences.tolist()
    hf_polyspec.enable() if door == "enable" else hf_polyspec.attach(target)
    # A copy of the target as middle agrees with it, a LoRA of other weights drafts.
    assistants = [copy.deepcopy(target), lora(model, 2)]
    ours = target.generate(**prompts(batch), **OPTIONS, **CHAIN, assistant_models=assistants)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert ours.polyspec.levels[0].accepted > 0
    mixed = target.generate(**prompts(batch), **OPTIONS, **CHAIN, assistant_models=chain)
    assert mixed.sequences.tolist() == plain.sequences.tolist()
    hf_polyspec.detach(target)


def test_a_text_generation_pipeline(model, chain):
    words = {f"{chr(97 + i % 26)}{'' if i < 26 else chr(65 + i - 26)}": i for i in range(VOCABULARY)}
    raw = Tokenizer(BPE(words, [], unk_token="a"))
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="a", padding_side="left")
    hf_polyspec.enable()
    pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 10, "do_sample": False}
    for texts in ("thequickfox", ["thequick", "brownfox"]):
        plain = pipe(texts, **options)
        assert pipe(texts, **options, assistant_models=chain) == plain
    together = pipe(["thequick", "brownfoxes"], **options, batch_size=2)
    assert pipe(["thequick", "brownfoxes"], **options, batch_size=2, assistant_models=chain) == together
