# SPDX-License-Identifier: Apache-2.0
"""Whatever a stack of blocks depends on, one look at all of them sees when it has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_polyspec.cpu.compiled import compiles

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from stacked_blocks import Tiny, packed_model

from hf_polyspec.cpu.block_parts import has_hooks
from hf_polyspec.cpu.watch import Watch


def watched(model: Any) -> Watch:
    blocks = [layer.forward.parts for layer in model.model.layers]
    return Watch(blocks, model.dtype)


def part(model: Any, name: str) -> Any:
    return model.model.layers[2].get_submodule(name)


def _attribute(name: str, attribute: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(part(model, name), attribute, value)


def _shorter(model: Any) -> None:
    part(model, "mlp.down_proj").weight.untyped_storage().resize_(0)


def _less_of_a_norm(model: Any) -> None:
    part(model, "input_layernorm").weight.untyped_storage().resize_(0)


ANY_FORM: dict[str, Callable[[Any], object]] = {
    "a hook": lambda model: part(model, "mlp.act_fn").register_forward_hook(lambda *_: None),
    "a hook before": lambda model: part(model, "self_attn.q_proj").register_forward_pre_hook(lambda *_: None),
    "another module": lambda model: part(model, "mlp")._modules.update(act_fn=nn.SiLU()),
    "a module less": lambda model: part(model, "mlp")._modules.pop("act_fn"),
    "another forward": _attribute("mlp", "forward", lambda x: x),
    "training": _attribute("", "training", True),
    "scaling": _attribute("self_attn", "scaling", 0.3),
    "epsilon": _attribute("post_attention_layernorm", "variance_epsilon", 0.3),
    "another norm": _attribute("input_layernorm", "weight", nn.Parameter(torch.ones(32))),
    "a norm elsewhere": lambda model: setattr(part(model, "input_layernorm").weight, "data", torch.ones(32)),
    "a norm without memory": _less_of_a_norm,
}
FLOATS: dict[str, Callable[[Any], object]] = {
    "a weight written to": lambda model: part(model, "mlp.up_proj").weight.data.view(-1)[:1].add_(1),
    "a weight that counts": lambda model: part(model, "mlp.up_proj").weight.detach()[1, 9:11].add_(1),
    "another weight": _attribute("self_attn.o_proj", "weight", nn.Parameter(torch.ones(32, 32))),
    "a bias": lambda model: part(model, "self_attn.k_proj")._parameters.update(bias=nn.Parameter(torch.ones(16))),
    "a weight without memory": _shorter,
    "forward of its own": lambda model: part(model, "mlp.down_proj").__dict__.pop("forward"),
    "its product": lambda model: setattr(part(model, "self_attn.q_proj").forward.product, "dissolved", True),
}
CODES: dict[str, Callable[[Any], object]] = {
    "on its own": lambda model: part(model, "self_attn.v_proj").join(None, 0),
    "its product": lambda model: part(model, "self_attn.q_proj").product.dissolve(),
    "its kernel": lambda model: part(model, "mlp.gate_proj").product.reset(),
    "its own kernel": lambda model: part(model, "mlp.down_proj")._apply(lambda tensor: tensor.clone()),
}


@pytest.mark.parametrize("change", (ANY_FORM | FLOATS).values(), ids=ANY_FORM | FLOATS)
@torch.no_grad()
def test_a_change_of_a_float_model_is_seen(tiny: Tiny, change: Callable[[Any], object]) -> None:
    model = packed_model(tiny)
    watch, x = watched(model), torch.zeros(1, 1, 32)
    assert watch.same(x)
    assert not watch.same(x.double())
    change(model)
    assert not watch.same(x)


@pytest.mark.parametrize("change", (ANY_FORM | CODES).values(), ids=ANY_FORM | CODES)
@torch.no_grad()
def test_a_change_of_a_quantised_model_is_seen(tiny: Tiny, change: Callable[[Any], object]) -> None:
    model = packed_model(tiny, "int8")
    watch, x = watched(model), torch.zeros(1, 1, 32)
    assert watch.same(x)
    change(model)
    assert not watch.same(x)


@torch.no_grad()
def test_the_hosts_own_hooks_are_looked_at_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model(tiny)
    model(torch.tensor([[3, 4]]), output_hidden_states=True)
    looked: list[object] = []
    monkeypatch.setattr("hf_polyspec.cpu.watch.has_hooks", lambda module: looked.append(module) or has_hooks(module))
    watch, x = watched(model), torch.zeros(1, 1, 32)
    for _ in range(3):
        assert watch.same(x)
    assert len(looked) == len(set(looked)), "a module was looked through twice"
    added = part(model, "mlp").register_forward_hook(lambda *_: None)
    assert not watch.same(x)
    added.remove()
    assert watch.same(x)
