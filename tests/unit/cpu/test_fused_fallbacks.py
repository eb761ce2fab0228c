# SPDX-License-Identifier: Apache-2.0
"""Where a fused block steps aside: other conditions, other families, other modules inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from hf_polyspec.bench.breakdown import kind_of
from hf_polyspec.cpu.compiled import compiles, computes
from hf_polyspec.host.cache import RollbackCache
from hf_polyspec.host.release import GENERATION_CACHE
from hf_polyspec.host.straight import Straight

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from tiny_models import head_for, tiny

from hf_polyspec.cpu import fusable
from hf_polyspec.cpu.block_parts import looks_like_llama
from hf_polyspec.cpu.fused_block import FusedBlock
from hf_polyspec.generation.doors import generate
from hf_polyspec.quantization import pack, quantize_model

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(3, 48, (1, 12), generator=torch.Generator().manual_seed(5))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "granite": {"residual_multiplier": 0.22, "attention_multiplier": 0.1},
    "smollm3": {"num_hidden_layers": 4},
    "cohere": {},
    "qwen3": {},
    "gemma": {},
    "gemma3_text": {"head_dim": 8},
    "olmo": {},
    "olmo2": {},
    "ministral3": {},
    "ernie4_5": {},
    "cwm": {},
    "seed_oss": {},
    "stablelm": {},
    "qwen2_moe": EXPERTS,
    "phi3": {},
    "glm4_moe": {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
}
SPECIAL = {
    "partial rotation": ("glm4_moe", {"first_k_dense_replace": 2, "partial_rotary_factor": 0.5}),
    "another activation": ("llama", {"hidden_act": "gelu"}),
    "a window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[FusedBlock]:
    """Blocks that are computed by the compiled steps."""
    found: list[FusedBlock] = []
    compute = FusedBlock.compute

    def counted(self: FusedBlock, *given: Any) -> Tensor:
        found.append(self)
        return compute(self, *given)

    monkeypatch.setattr(FusedBlock, "compute", counted)
    return found


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor = IDS, **options: Any) -> Tensor:
    logits: Tensor = model(ids, **options).logits
    return logits


def _packed(tiny: Tiny, computed: list[FusedBlock], **settings: Any) -> PreTrainedModel:
    """A packed model whose blocks have been seen to be fused."""
    model = pack(copy.deepcopy(tiny("llama", initializer_range=0.1, **settings)))
    computed.clear()
    _logits(model)
    assert len(computed) == 2
    computed.clear()
    return model


def _same_with_cache(packed: nn.Module, plain: PreTrainedModel, room: dict[str, float]) -> None:
    caches = DynamicCache(config=plain.config), DynamicCache(config=plain.config)
    for part in IDS.split([6, 1, 4, 1], 1):
        found = _logits(packed, part, **{GENERATION_CACHE: caches[0]})
        torch.testing.assert_close(found, _logits(plain, part, **{GENERATION_CACHE: caches[1]}), **room)


@pytest.mark.parametrize("family", [*FAMILIES, *SPECIAL])
def test_blocks_that_look_alike_give_the_same_numbers(tiny: Tiny, family: str) -> None:
    name, settings = SPECIAL.get(family, (family, FAMILIES.get(family, {})))
    plain = tiny(name, initializer_range=0.1, **settings)
    _same_with_cache(pack(copy.deepcopy(plain)), plain, {"rtol": 1e-4, "atol": 1e-4})


def test_layers_without_positions_are_left_alone(tiny: Tiny) -> None:
    model = pack(copy.deepcopy(tiny("smollm3", num_hidden_layers=4)))
    fused = [isinstance(layer.__dict__.get("forward"), FusedBlock) for layer in model.model.layers]
    assert fused == [bool(layer.self_attn.use_rope) for layer in model.model.layers]
    assert set(fused) == {True, False}


def test_gradients(tiny: Tiny, computed: list[FusedBlock]) -> None:
    model = _packed(tiny, computed)
    model(IDS).logits.sum().backward()
    assert not computed
    assert model.model.layers[0].self_attn.q_proj.weight.grad.any()


@pytest.mark.parametrize("inside", ["self_attn", "mlp", "input_layernorm", "self_attn.q_proj", "mlp.act_fn"])
@pytest.mark.parametrize("before", [False, True])
def test_hooks_are_called(tiny: Tiny, computed: list[FusedBlock], inside: str, before: bool) -> None:
    model = _packed(tiny, computed)
    wanted, seen = _logits(model), []
    computed.clear()
    part = model.model.layers[1].get_submodule(inside)
    add = part.register_forward_pre_hook if before else part.register_forward_hook
    handle = add(lambda *_: seen.append(1))
    torch.testing.assert_close(_logits(model), wanted, **CLOSE)
    assert seen == [1]
    assert [block.layer for block in computed] == [model.model.layers[0]]
    handle.remove()
    _logits(model)
    assert len(computed) == 3


def test_hooks_on_every_module_are_called(tiny: Tiny, computed: list[FusedBlock]) -> None:
    model, seen = _packed(tiny, computed), []
    attention = model.model.layers[0].self_attn
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        _logits(model)
    finally:
        handle.remove()
    assert any(module is attention for module in seen)


def test_a_hook_on_the_block_itself_is_called(tiny: Tiny, computed: list[FusedBlock]) -> None:
    model, seen = _packed(tiny, computed), []
    model.model.layers[0].register_forward_hook(lambda _, __, output: seen.append(output))
    _logits(model)
    assert len(computed) == 2
    assert len(seen) == 1


@torch.no_grad()
def test_hidden_states_are_those_of_the_plain_model(tiny: Tiny) -> None:
    plain = tiny("llama", initializer_range=0.1)
    packed = pack(copy.deepcopy(plain))
    states = (model(IDS, output_hidden_states=True).hidden_states for model in (packed, plain))
    for found, wanted in zip(*states, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)


@torch.no_grad()
def test_attentions_are_given(tiny: Tiny, computed: list[FusedBlock]) -> None:
    model = _packed(tiny, computed)
    model.set_attn_implementation("eager")
    attentions = model(IDS, output_attentions=True).attentions
    assert not computed
    assert attentions[1].shape == (1, 4, 12, 12)


def test_an_argument_that_asks_for_attentions(tiny: Tiny, computed: list[FusedBlock]) -> None:
    parts = _packed(tiny, computed).model.layers[0].forward.parts
    x = torch.zeros(1, 2, 32)
    assert parts.ready(x, {"output_attentions": False, "position_bias": None, "use_cache": True})
    assert not parts.ready(x, {"output_attentions": True})
    assert not parts.ready(x, {"position_bias": torch.zeros(1)})
    assert not parts.ready(x, {"is_causal": False})
    assert not parts.ready(x.double(), {})


def test_rows_that_are_read() -> None:
    x = torch.zeros(1, 2, 32)
    assert not computes(x)  # gradients are on
    with torch.no_grad():
        assert computes(x)
        for other in (x.double(), x.to("meta"), x[0], x[:0]):
            assert not computes(other)


@torch.no_grad()
def test_attention_that_is_not_causal_on_request(tiny: Tiny) -> None:
    """transformers' attention takes `is_causal` from its caller."""
    plain = tiny("llama", initializer_range=0.1)
    packed = pack(copy.deepcopy(plain))
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    turns = plain.model.rotary_emb(x, torch.arange(5)[None])
    outputs = [model.model.layers[0](x, position_embeddings=turns, is_causal=False) for model in (packed, plain)]
    torch.testing.assert_close(*outputs, **CLOSE)


def test_eager_attention(tiny: Tiny, computed: list[FusedBlock]) -> None:
    plain = tiny("llama", attention="eager", initializer_range=0.1)
    packed = pack(copy.deepcopy(plain))
    computed.clear()
    torch.testing.assert_close(_logits(packed), _logits(plain), **CLOSE)
    assert not computed


@pytest.mark.parametrize("shape", [(1, 1), (1, 65), (4, 64)])
def test_any_number_of_rows(tiny: Tiny, computed: list[FusedBlock], shape: tuple[int, int]) -> None:
    model = _packed(tiny, computed)
    ids = torch.randint(3, 48, shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_logits(model, ids), _logits(tiny("llama", initializer_range=0.1), ids), **CLOSE)
    assert len(computed) == 2


def test_training(tiny: Tiny, computed: list[FusedBlock]) -> None:
    model = _packed(tiny, computed)
    _logits(model.train())
    assert not computed
    _logits(model.eval())
    assert len(computed) == 2


def test_autocast(tiny: Tiny, computed: list[FusedBlock]) -> None:
    model = _packed(tiny, computed)
    with torch.autocast("cpu", torch.bfloat16):
        _logits(model)
    assert not computed


def test_a_block_that_is_cast_later(tiny: Tiny) -> None:
    plain = tiny("llama", initializer_range=0.1)
    packed = pack(copy.deepcopy(plain)).to(torch.bfloat16)
    wanted = _logits(copy.deepcopy(plain).to(torch.bfloat16))
    torch.testing.assert_close(_logits(packed), wanted, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_a_norm_of_another_type_than_the_states(tiny: Tiny, computed: list[FusedBlock], norm: str) -> None:
    """Its weight must not be read as numbers of the states' type; the plain model refuses."""
    plain = copy.deepcopy(tiny("llama", initializer_range=0.1))
    packed = pack(copy.deepcopy(plain))
    for model in (plain, packed):
        getattr(model.model.layers[0], norm).to(torch.float64)
    torch.testing.assert_close(_try(packed), _try(plain), **CLOSE)


def _try(model: nn.Module) -> Tensor:
    """Logits, or nothing where the model refuses."""
    try:
        return _logits(model)
    except RuntimeError:
        return torch.empty(0)


@pytest.mark.parametrize("inside", ["self_attn", "mlp", "input_layernorm", "self_attn.k_proj"])
def test_a_forward_replaced_after_packing_is_called(tiny: Tiny, computed: list[FusedBlock], inside: str) -> None:
    """As accelerate's offloading and many patches do."""
    part, seen = (model := _packed(tiny, computed)).model.layers[0].get_submodule(inside), []
    forward = part.forward
    part.forward = lambda *args, **kwargs: seen.append(1) or forward(*args, **kwargs)
    _logits(model)
    assert seen == [1]


def test_a_module_replaced_after_packing_is_called(tiny: Tiny, computed: list[FusedBlock]) -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    plain = copy.deepcopy(tiny("llama", initializer_range=0.1))
    packed = pack(copy.deepcopy(plain))
    for model in (plain, packed):
        model.model.layers[0].mlp = Nothing()
    torch.testing.assert_close(_logits(packed), _logits(plain), **CLOSE)


def test_what_was_tried_is_not_tried_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny("llama"))
    list(fusable.fusable(model))
    monkeypatch.setattr(FusedBlock, "compute", lambda *_: pytest.fail("tried twice"))
    assert len(list(fusable.fusable(model))) == 2


def test_trying_calls_no_hooks(tiny: Tiny) -> None:
    model, seen = copy.deepcopy(tiny("llama")), []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    pack(model)
    assert not seen


def test_the_hooks_that_transformers_leaves_do_not_switch_fusion_off(tiny: Tiny, computed: list[FusedBlock]) -> None:
    model = _packed(tiny, computed)
    _logits(model, output_hidden_states=True)
    assert len(computed) == 2
    _logits(model)
    assert len(computed) == 4


def test_nor_do_they_keep_blocks_from_being_fused_later(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama"))
    _logits(model, output_hidden_states=True)
    assert any(module._forward_hooks for module in model.model.layers.modules()), "transformers left none"
    assert len(list(fusable.fusable(model))) == 2


def test_a_middle_above_a_head_is_fused_in_every_generation(
    tiny: Tiny, computed: list[FusedBlock], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head asks its verifier for hidden states, and transformers leaves hooks on a model that was asked once."""
    monkeypatch.setattr(Straight, "__call__", lambda *_: None)  # every block is called, by the model's own forward
    target = copy.deepcopy(tiny("llama", initializer_range=0.1))
    middle = quantize_model(copy.deepcopy(target), 8)
    chain = [middle, head_for(target)]
    passes = []
    for _ in range(2):
        computed.clear()
        generate(target, IDS, assistant_models=chain, max_new_tokens=8, do_sample=False)
        passes.append(len(computed))
    assert passes[0] == passes[1] + 2, "its two layers are tried out the first time"
    assert passes[1] >= 4


def test_a_profile_shows_the_steps(tiny: Tiny, computed: list[FusedBlock]) -> None:
    model = _packed(tiny, computed)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        model(IDS, **{GENERATION_CACHE: RollbackCache()})
    names = {event.name for event in found.events()}
    steps = ("linear", "scaled_dot_product", "rms_norm", "rotate", "gate")
    assert {f"compiled::{step}" for step in steps} <= names
    kinds = {name: kind_of(name) for name in names if name.startswith("compiled::")}
    assert kinds.pop("compiled::linear") == "matrix products"
    assert kinds.pop("compiled::scaled_dot_product") == "attention"
    assert set(kinds.values()) == {"small operations"}


def test_attention_with_a_parameter_of_its_own_is_left_alone() -> None:
    """A learned sink, say, which a fused block would pass over; with one entry or several."""
    model = tiny("llama")
    block = model.model.layers[0]
    assert looks_like_llama(block)
    block.self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    assert not looks_like_llama(block)
