# SPDX-License-Identifier: Apache-2.0
"""A stamp holds until something changes that a copy of the model would have to follow, and keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_polyspec import attach
from hf_polyspec.auto.source import PACKED, identity_of, layout_of
from hf_polyspec.models import changes
from hf_polyspec.models.changes import Stamp

Tiny = Callable[..., PreTrainedModel]


def step(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1


def behind(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data.mul_(-1)


def other(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.detach().clone())


def moved(model: Any) -> None:
    model.model.norm.weight.data = model.model.norm.weight.detach().clone()


def replaced(model: Any) -> None:
    model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)


def added(model: Any) -> None:
    model.model.layers[1].mlp.register_buffer("scale", torch.ones(1))


def transposed(model: Any) -> None:
    weight = model.model.layers[0].self_attn.o_proj.weight
    assert weight.shape[0] == weight.shape[1], "as large as before, and at the same place"
    weight.data = weight.data.t()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a number": step,
    "behind torch's back": behind,
    "another parameter": other,
    "numbers elsewhere": moved,
    "numbers in another order": transposed,
    "a norm's addend": lambda model: setattr(model.model.norm, "variance_epsilon", 1.0),
    "attention's factor": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 1.0),
    "a class": lambda model: setattr(model.model.norm, "__class__", type("Other", (type(model.model.norm),), {})),
    "the config": lambda model: setattr(model.config, "rms_norm_eps", 1.0),
    "another module": replaced,
    "one more buffer": added,
    "type": lambda model: model.to(torch.bfloat16),
    "place": lambda model: model.to("meta"),
    "training": lambda model: model.model.layers[0].train(),
    "a forward": lambda model: setattr(model.model.norm, "forward", lambda x: x),
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("what", CHANGES)
def test_what_is_seen(tiny: Tiny, what: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled:
        pytest.importorskip("numba")
        from hf_polyspec.cpu.compiled.samples import Samples

        assert Samples([]).same(), "loaded from now on"
    else:
        monkeypatch.setattr(changes, "_COMPILED", "nowhere")
    model = tiny("llama")
    found = Stamp(model)
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert found.holds(model)
    assert type(found._samples).__name__ == ("Samples" if compiled else "_Read")
    assert found.holds(model)
    CHANGES[what](model)
    assert not found.holds(model)
    assert Stamp(model).holds(model)


def test_a_module_inside_that_was_compiled(tiny: Tiny) -> None:
    """`torch.compile` puts a module around one, which asks that for what others keep; no pass is run here."""
    model: Any = tiny("llama")
    model.model = torch.compile(model.model)
    found = Stamp(model)
    assert found.holds(model)
    model.model.train()
    assert not found.holds(model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # which peft asks for
def test_an_adapter_that_counts_otherwise(tiny: Tiny) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    found = Stamp(adapted, unsaved=False)
    assert found.holds(adapted)
    adapted.model.model.layers[1].self_attn.q_proj.scale_layer(2.0)
    assert not found.holds(adapted)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("traced", [True, False])
def test_a_module_inside_that_is_a_script(tiny: Tiny, traced: bool) -> None:
    """What it holds lies elsewhere than other modules keep theirs; every look at modules meets it."""
    model: Any = tiny("llama")
    mlp, ids = model.model.layers[0].mlp, torch.tensor([[1, 2, 3, 1, 2]])
    inside = nn.Sequential(nn.SiLU(), nn.Dropout(0.0)).eval()
    mlp.act_fn = torch.jit.trace(mlp.act_fn, torch.zeros(1, 1, 2)) if traced else torch.jit.script(inside)
    assert Stamp(model).holds(model)
    assert layout_of(model) != PACKED
    wanted = model.generate(ids, max_new_tokens=6, do_sample=False)
    attach(model)
    assert torch.equal(
        model.generate(ids, max_new_tokens=6, do_sample=False, assistant_models=["early-exit:1"]), wanted
    )


def test_memory_that_was_given_back(tiny: Tiny) -> None:
    model: Any = tiny("llama")
    model.model.norm.weight.untyped_storage().resize_(0)
    assert Stamp(model).holds(model)


def test_buffers_that_no_checkpoint_holds(tiny: Tiny) -> None:
    model: Any = tiny("llama")
    whole, saved = Stamp(model), Stamp(model, unsaved=False)
    model.model.rotary_emb.inv_freq.mul_(2)
    assert saved.holds(model)
    assert not whole.holds(model)
    whole = Stamp(model)
    model.model.rotary_emb.attention_scaling = 2.0
    assert saved.holds(model)
    assert not whole.holds(model)


def test_nothing_is_kept_alive(tiny: Tiny) -> None:
    model: Any = tiny("llama")
    found, gone = Stamp(model), [weakref.ref(one) for one in (model, model.lm_head, model.lm_head.weight)]
    del model
    gc.collect()
    assert [one() for one in gone] == [None, None, None]
    assert not found.holds(tiny("llama"))


def test_a_look_at_weights_leaves_them_to_whoever_gathers_them(tiny: Tiny) -> None:
    """Memory that numpy was shown can never be resized again."""
    model = copy.deepcopy(tiny()).to(torch.bfloat16)
    identity_of(model)
    for weight in model.parameters():
        size = weight.untyped_storage().nbytes()
        weight.untyped_storage().resize_(0)
        weight.untyped_storage().resize_(size)
