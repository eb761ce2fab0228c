# SPDX-License-Identifier: Apache-2.0
"""A model's first layers as a level: weights shared, the model untouched, output the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from architectures import ARCHITECTURES
from tiny_models import prompts
from torch import nn
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.host.release import GENERATION_CACHE, cache_of
from hf_polyspec.levels.early_exit import early_exit, layer_list
from hf_polyspec.models.assistants import check_assistant_names, load_assistant

Tiny = Callable[..., PreTrainedModel]
FAMILIES = ("llama", "qwen2", "qwen3_moe", "gemma3_text", "gpt_neox", "opt", "gpt2", "bloom", "mpt", "falcon", "biogpt")
DEPTH_MATTERS = {"Gemma 3n (text)", "Gemma 4 (text)"}  # one embedding for all layers together
CASES = {case.title: case for case in ARCHITECTURES}
IDS = torch.tensor([[5, 9, 30, 7, 22, 14, 3, 40]])


@pytest.fixture(scope="module")
def deep(tiny: Tiny) -> PreTrainedModel:
    """Four layers of which the last ones change little, as in models that can be exited early."""
    model = tiny("llama", num_hidden_layers=4)
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.mlp.down_proj.weight.mul_(0.5)
            layer.self_attn.o_proj.weight.mul_(0.5)
    return model


def test_logits_are_those_of_the_first_layers(deep: PreTrainedModel) -> None:
    exit_two = early_exit(deep, 2)
    states = deep(IDS, output_hidden_states=True).hidden_states
    expected = deep.lm_head(deep.model.norm(states[2]))
    torch.testing.assert_close(exit_two(IDS).logits, expected)
    assert not torch.allclose(exit_two(IDS).logits, deep(IDS).logits, atol=1e-2)


def test_weights_are_shared_and_nothing_is_changed(deep: PreTrainedModel) -> None:
    config, generation_config = copy.deepcopy(deep.config), copy.deepcopy(deep.generation_config)
    modules = [(id(module), len(module._forward_hooks)) for module in deep.modules()]
    exit_three = early_exit(deep, 3)
    own = {name: parameter.data_ptr() for name, parameter in deep.named_parameters()}
    assert {own[name] for name, _ in exit_three.named_parameters()} == {
        parameter.data_ptr() for parameter in exit_three.parameters()
    }
    assert deep.config.to_dict() == config.to_dict()
    assert deep.generation_config.to_dict() == generation_config.to_dict()
    assert [(id(module), len(module._forward_hooks)) for module in deep.modules()] == modules
    assert exit_three.config.num_hidden_layers == 3
    assert exit_three.config is not deep.config


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_equality_with_an_early_exit_as_middle(enabled: None, deep: PreTrainedModel, batch: int) -> None:
    options = {**prompts(batch), "max_new_tokens": 16, "do_sample": False}
    plain = deep.generate(**options)
    output = deep.generate(
        **options,
        assistant_models=[early_exit(deep, 3), early_exit(deep, 2)],
        polyspec_block_size=4,
        num_assistant_tokens=3,
        return_dict_in_generate=True,
    )
    assert output.sequences.tolist() == plain.tolist()
    level = output.polyspec.levels[0]
    assert 0 < level.accepted < level.drafted
    assert deep.generate(**options).tolist() == plain.tolist()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families(enabled: None, tiny: Tiny, model_type: str) -> None:
    case = next(case for case in ARCHITECTURES if case.model_type == model_type)
    model = tiny(model_type, attention=case.attention[0], **case.settings)
    options = {**prompts(1), "max_new_tokens": 8, "do_sample": False}
    middle = early_exit(model, 1)
    assert len(middle.get_submodule(layer_list(middle))) == 1
    plain = model.generate(**options)
    assert model.generate(**options, assistant_models=[middle], num_assistant_tokens=3).tolist() == plain.tolist()


@pytest.mark.parametrize("title", sorted(CASES))
def test_every_architecture_is_cut_right_or_refused_by_name(tiny: Tiny, title: str) -> None:
    """Never a third thing: what an accepted one computes is compared with the model's own hidden states."""
    case = CASES[title]
    model = tiny(case.model_type, attention=case.attention[0], **case.settings)
    depth = model.config.get_text_config().num_hidden_layers
    if title in DEPTH_MATTERS:
        with pytest.raises(ValueError, match=type(model).__name__):
            early_exit(model, depth - 1)
        return
    middle = early_exit(model, depth - 1)
    full = model.config.get_text_config()
    assert full.num_hidden_layers == depth
    with torch.no_grad():
        logits = middle(IDS).logits
    assert logits.shape[-1] == model(IDS).logits.shape[-1]
    cached = cache_of(middle(IDS[:, :-1], use_cache=True))
    torch.testing.assert_close(middle(IDS[:, -1:], **{GENERATION_CACHE: cached}).logits[:, -1], logits[:, -1])


# transformers 5.23 warns about a name that PEFT still reads.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_peft_model_keeps_its_adapters(tiny: Tiny, deep: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(deep), lora).eval()
    states = adapted(IDS, output_hidden_states=True).hidden_states
    base = adapted.get_base_model()
    torch.testing.assert_close(early_exit(adapted, 2)(IDS).logits, base.lm_head(base.model.norm(states[2])))


def test_refusals(deep: PreTrainedModel, tiny: Tiny) -> None:
    for layers in (0, 4, -1):
        with pytest.raises(ValueError, match="LlamaForCausalLM keeps 1 to 3 of its 4 layers"):
            early_exit(deep, layers)
    with pytest.raises(TypeError, match="integer"):
        early_exit(deep, 1.5)  # type: ignore[arg-type]
    twins = tiny("llama")
    twins.model.more = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has 2 lists \(model.layers, model.more\)"):
        early_exit(twins, 1)
    del twins.model.layers, twins.model.more
    with pytest.raises(ValueError, match="LlamaForCausalLM has no list of 2 layers"):
        early_exit(twins, 1)


def test_by_name(deep: PreTrainedModel) -> None:
    middle = load_assistant("early-exit:3", deep, "float32", "cpu")
    assert middle.config.num_hidden_layers == 3
    assert middle.name_or_path.endswith("exit 3")
    check_assistant_names(["early-exit:3", "suffix"])
    for name in ("early-exit", "early-exit:", "early-exit:x", "early-exit:0", "early-exit:-2"):
        with pytest.raises(ValueError, match="number of layers"):
            check_assistant_names([name])
    assert hf_polyspec.early_exit is early_exit
