# SPDX-License-Identifier: Apache-2.0
"""What a chain cannot do: refused in one sentence before any forward pass; and what a failure midway leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, noisy, prompts, tiny
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_polyspec
from hf_polyspec.host.release import GENERATION_CACHE
from hf_polyspec.levels.suffix import SuffixDrafter

NEW = 8
SHORT = {"max_new_tokens": NEW, "do_sample": False}


def t5() -> T5ForConditionalGeneration:
    size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **size)).eval()


class Passes:
    """Counts forward passes of models."""

    def __init__(self, *models: torch.nn.Module) -> None:
        self.count = 0
        self.handles = [model.register_forward_pre_hook(self._add) for model in models]

    def _add(self, *_: Any) -> None:
        self.count += 1

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.fixture
def passes(target: PreTrainedModel, middle: PreTrainedModel, drafter: PreTrainedModel) -> Iterator[Passes]:
    counter = Passes(target, middle, drafter)
    yield counter
    counter.remove()


REFUSED_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 3}, "num_beams"),
    ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "beam"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
    ({"num_beams": 2, "force_words_ids": [[5]]}, "beam|force_words"),
    ({"dola_layers": "high"}, "dola"),
    ({"dola_layers": np.array([1, 2])}, "dola"),
    ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
    ({"cache_implementation": "paged"}, "paged"),
    ({"synced_gpus": True}, "synced_gpus"),
    ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
    ({"num_assistant_tokens": 0}, "num_assistant_tokens"),
    ({"num_assistant_tokens": -2}, "num_assistant_tokens"),
    ({"num_assistant_tokens": 2.5}, "num_assistant_tokens"),
    ({"assistant_confidence_threshold": 1.5}, "assistant_confidence_threshold"),
    ({"num_assistant_tokens_schedule": "sometimes"}, "num_assistant_tokens_schedule"),
    ({"polyspec_block_size": 0}, "polyspec_block_size"),
    ({"polyspec_block_size": True}, "polyspec_block_size"),
    ({"polyspec_verification": "lenient"}, "polyspec_verification"),
    ({"generation_config": GenerationConfig(polyspec_blocksize=3)}, "polyspec_blocksize"),
    ({"stop_strings": ["x"]}, "tokenizer"),
    ({"custom_generate": print}, "custom_generate"),
]


@pytest.mark.parametrize(("options", "named"), REFUSED_OPTIONS, ids=[str(options) for options, _ in REFUSED_OPTIONS])
@pytest.mark.filterwarnings("ignore")
def test_options_that_are_refused(target, generate, passes, options, named):
    before = snapshot(target)
    with pytest.raises(ValueError, match=named) as caught:
        generate(target, **{**prompts(1), "max_new_tokens": NEW, "do_sample": False, **options})
    one_sentence(caught.value)
    assert passes.count == 0
    assert snapshot(target) == before


def one_sentence(error: BaseException) -> None:
    """A line with an end, and nothing of a library's internals in it."""
    message = str(error)
    assert "\n" not in message
    assert message.endswith("."), message
    assert len(message) < 300
    assert "Traceback" not in message


def _shown(given: object) -> str:
    """A name that is the same in every process: an object's own would hold its address."""
    return "object" if type(given) is object else str(given)


@pytest.mark.parametrize(
    "assistants", [5, object(), {"a": 1}, [None], [[]], [b"int8"], "module", "class", "drafter class"], ids=_shown
)
def test_assistants_of_a_wrong_type(target, generate, passes, assistants):
    given = {"module": [torch.nn.Linear(2, 2)], "class": [PreTrainedModel], "drafter class": [SuffixDrafter]}
    chosen = given.get(assistants, assistants) if isinstance(assistants, str) else assistants
    with pytest.raises(TypeError, match="assistant_models") as caught:
        generate(target, **prompts(1), **SHORT, assistant_models=chosen)
    one_sentence(caught.value)
    assert passes.count == 0


@pytest.mark.parametrize("assistants", ["gpt2", ["gpt2"]], ids=_shown)
def test_a_name_of_which_there_is_nothing_here(target, generate, passes, assistants):
    """A string is a level, and a string alone a list of one; nothing is downloaded."""
    with pytest.raises(ValueError, match=r"assistant_models.*'gpt2'") as caught:
        generate(target, **prompts(1), **SHORT, assistant_models=assistants)
    assert "\n" not in str(caught.value)
    assert passes.count == 0


@pytest.mark.filterwarnings("ignore:You are calling .generate")  # older releases warn of the device first
def test_a_model_without_weights_is_named(target, generate, passes):
    with torch.device("meta"):
        empty = type(target)(copy.deepcopy(target.config)).eval()
    with pytest.raises(ValueError, match=r"assistant_models\[1\] .* is on the meta device") as caught:
        generate(target, **prompts(1), **SHORT, assistant_models=[target, empty])
    one_sentence(caught.value)
    with pytest.raises(ValueError, match=r"the target .* is on the meta device"):
        generate(empty, **prompts(1), **SHORT, assistant_models=["suffix"])
    assert passes.count == 0


def test_batches_and_masks_that_do_not_fit(target, generate, passes):
    inputs = prompts(2)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for changed, words in (
        ({"input_ids": ids[:0], "attention_mask": mask[:0]}, "input_ids has 0 rows"),
        ({"attention_mask": mask[:, :7]}, "attention_mask has 7 columns and the prompt has 9"),
        ({"attention_mask": torch.ones(2, 7, dtype=torch.long)}, "attention_mask has 7 columns and the prompt has 9"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            generate(target, **{**inputs, **changed}, **SHORT)
        one_sentence(caught.value)
    assert passes.count == 0


@pytest.mark.parametrize("given", [None, "x", 5, PreTrainedModel], ids=_shown)
@pytest.mark.parametrize("function", ["attach", "detach", "pack", "unpack", "quantize_model"])
def test_functions_that_take_a_model_say_so(function, given):
    with pytest.raises(TypeError, match=rf"^{function}\(\) takes a model, got ") as caught:
        getattr(hf_polyspec, function)(given)
    one_sentence(caught.value)
    assert (given.__name__ if isinstance(given, type) else repr(given)) in str(caught.value)


def test_attach_takes_a_model_that_generates():
    with pytest.raises(TypeError, match=r"attach\(\) takes a model that has a generate\(\), got Linear"):
        hf_polyspec.attach(torch.nn.Linear(2, 2))


def test_a_corpus_that_is_no_list_of_texts():
    with pytest.raises(TypeError, match="corpus must be texts as lists of token ids, got 5"):
        SuffixDrafter(5)


def test_a_single_model_instead_of_a_list(target, middle, generate, passes):
    with pytest.raises(TypeError, match="list"):
        generate(target, **prompts(1), **SHORT, assistant_models=middle)
    assert passes.count == 0


def test_both_assistant_model_and_assistant_models(target, middle, generate, passes):
    with pytest.raises(ValueError, match="assistant_model and assistant_models"):
        generate(target, **prompts(1), **SHORT, assistant_model=middle)
    assert passes.count == 0


def test_a_drafter_below_a_drafter(target, middle, generate, passes):
    with pytest.raises(ValueError, match="last") as caught:
        generate(target, **prompts(1), **SHORT, assistant_models=[SuffixDrafter(), middle])
    one_sentence(caught.value)
    assert passes.count == 0


def test_another_tokenizer(target, generate, passes):
    other = tiny("llama", vocab_size=96)
    with pytest.raises(ValueError, match="tokenizer") as caught:
        generate(target, **prompts(1), **SHORT, assistant_models=[other])
    one_sentence(caught.value)
    assert passes.count == 0


def test_an_encoder_under_a_target_that_has_none(target, generate, passes):
    with pytest.raises(ValueError, match="has an encoder, and the target has none") as caught:
        generate(target, **prompts(1), **SHORT, assistant_models=[t5()])
    one_sentence(caught.value)
    assert passes.count == 0


@pytest.mark.filterwarnings("ignore")
def test_prompt_learning_adapters(target, generate, passes):
    from peft import PromptTuningConfig, get_peft_model

    tuned = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"prompt-learning|virtual tokens") as caught:
        generate(target, **prompts(1), **SHORT, assistant_models=[tuned])
    one_sentence(caught.value)
    assert passes.count == 0


def test_forward_arguments_that_mean_nothing_to_a_chain(target, generate, passes):
    with pytest.raises(ValueError, match=r"token_type_ids|not used by the model"):
        generate(target, **prompts(1), **SHORT, token_type_ids=torch.zeros(1, 9, dtype=torch.long))
    assert passes.count == 0


def test_an_empty_prompt(target, generate, passes):
    with pytest.raises(ValueError, match=r"empty|at least one"):
        generate(target, input_ids=torch.zeros(1, 0, dtype=torch.long), max_new_tokens=4)
    assert passes.count == 0


class Keeping(LogitsProcessor):
    """A processor with state that must not change unless the target emitted something."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.shape[1])
        return scores


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """All of a model that a caller could see: weights, configs, attributes, hooks, mode."""
    return {
        "weights": {name: tensor.sum().item() for name, tensor in model.state_dict().items()},
        "config": model.config.to_dict(),
        "generation_config": {k: copy.deepcopy(v) for k, v in vars(model.generation_config).items()},
        "attributes": sorted(vars(model)),
        "modules": [(name, sorted(vars(module)), module.training) for name, module in model.named_modules()],
        "attention": model.config._attn_implementation,
    }


def states(cache: DynamicCache) -> list[list[Any]]:
    return [[layer.keys.clone(), layer.values.clone()] for layer in cache.layers]


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_objects_stay_as_they_were(target, middle, drafter, generate, fails):
    """After success, and after a refusal, models, configs and arguments are what they were (law 5)."""
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, repetition_penalty=1.2, num_assistant_tokens=2)
    config_before = copy.deepcopy(vars(config))
    models = [target, middle, drafter]
    before = [snapshot(model) for model in models]
    processors, chain = LogitsProcessorList([Keeping()]), [middle, drafter]
    prompt = prompts(2)
    arguments = {name: tensor.clone() for name, tensor in prompt.items()}
    options = {**prompt, "generation_config": config, "logits_processor": processors, "assistant_models": chain}
    if fails:
        with pytest.raises(ValueError, match="num_beams"):
            generate(target, **options, num_beams=2)
        assert processors[0].seen == []
    else:
        generate(target, **options)
        assert processors[0].seen == list(range(9, 9 + NEW))
    assert [snapshot(model) for model in models] == before
    assert vars(config) == config_before
    assert len(processors) == 1
    assert chain == [middle, drafter]
    for name, tensor in prompt.items():
        assert torch.equal(tensor, arguments[name])


class Broken(RuntimeError):
    """What a failing forward pass raises in these tests."""


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("inside", [False, True], ids=["at-entry", "in-layer-2"])
def test_a_forward_pass_that_fails_midway(enabled, target, which, call, inside):
    """The error names the level; the caller's cache still continues as if nothing had happened; so do the models."""
    models = [noisy(target, 0.0), noisy(target, 0.03, seed=1), noisy(target, 0.05, seed=2)]
    prompt = prompts(1)
    cache = DynamicCache()
    target.generate(**prompt, max_new_tokens=4, do_sample=False, **{GENERATION_CACHE: cache})
    text = target.generate(**prompt, max_new_tokens=4, do_sample=False)
    kept = states(cache)
    calls = {"count": 0}

    def fail(*_: Any) -> None:
        calls["count"] += 1
        if calls["count"] == call:
            raise Broken("out of luck")

    module = models[which].model.layers[1] if inside else models[which]
    handle = module.register_forward_pre_hook(fail)
    before = [snapshot(model) for model in models]
    options = {"input_ids": text, "max_new_tokens": 16, "do_sample": False}
    with pytest.raises(hf_polyspec.LevelError) as caught:
        models[0].generate(
            **options,
            **{GENERATION_CACHE: cache},
            assistant_models=models[1:],
            num_assistant_tokens=2,
            polyspec_block_size=2,
        )
    assert ("target" if which == 0 else f"assistant_models[{which - 1}]") in str(caught.value)
    assert "out of luck" in str(caught.value)
    assert isinstance(caught.value.__cause__, Broken)
    assert [snapshot(model) for model in models] == before
    handle.remove()
    for old, new in zip(kept, states(cache), strict=True):
        assert torch.equal(old[0], new[0])
        assert torch.equal(old[1], new[1])
    again = models[0].generate(**options, **{GENERATION_CACHE: cache}, assistant_models=models[1:])
    assert again.tolist() == target.generate(**options).tolist()


@pytest.mark.parametrize("static", [False, True])
def test_an_option_that_a_chain_does_not_use_is_named(generate, target, static):
    from transformers import CompileConfig

    options = {**prompts(1), **SHORT, "compile_config": CompileConfig(mode="default")}
    if static:
        options["cache_implementation"] = "static"
    with pytest.warns(UserWarning, match="compile_config is not used"):
        ours = generate(target, **options)
    del options["compile_config"]
    assert ours.tolist() == target.generate(**options).tolist()
