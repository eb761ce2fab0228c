# SPDX-License-Identifier: Apache-2.0
"""Packing changes where numbers lie, not what they are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from transformers import PreTrainedModel

from hf_polyspec.cpu import float_kernels, packing
from hf_polyspec.cpu.float_kernels import WidenedFloat, pack_float, packs
from hf_polyspec.cpu.packing import PackedForward
from hf_polyspec.quantization import is_packed, pack, quantize_model, unpack

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(48, (1, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model(tiny: Tiny) -> PreTrainedModel:
    return tiny("llama")


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def test_packed_outputs_agree_and_unpack_is_exact(model: PreTrainedModel) -> None:
    before = _logits(model)
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    assert pack(model) is model
    assert is_packed(model)
    assert model.model.layers[0].mlp.up_proj.forward.product.kept() is None
    torch.testing.assert_close(_logits(model), before, rtol=1e-4, atol=1e-4)
    assert model.model.layers[0].mlp.up_proj.forward.product.kept() is not None
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    assert [type(module) for module in model.modules()] == kinds
    unpack(model)
    assert not is_packed(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert torch.equal(_logits(model), before)


def test_packing_twice_changes_nothing(model: PreTrainedModel) -> None:
    forward = pack(model).lm_head.forward
    assert pack(model).lm_head.forward is forward


def test_a_changed_weight_is_packed_again(model: PreTrainedModel) -> None:
    pack(model)
    _logits(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    changed = _logits(model)
    torch.testing.assert_close(changed, _logits(unpack(model)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_change_that_torch_does_not_count_is_packed_again(kind: str) -> None:
    """As PEFT merges adapters: through `.data`, in place."""
    layer = nn.Sequential(nn.Linear(64, 48))
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        pack(layer)(x)
        parameter = getattr(layer[0], kind)
        version, place = parameter._version, parameter.data_ptr()
        parameter.data += 0.5
        assert (parameter._version, parameter.data_ptr()) == (version, place)
        changed = layer(x)
        torch.testing.assert_close(changed, unpack(layer)(x), rtol=1e-5, atol=1e-5)


def test_a_weight_that_changes_between_siblings_is_not_served_from_before(model: PreTrainedModel) -> None:
    mlp = pack(model).model.layers[0].mlp
    x = torch.randn(9, mlp.up_proj.in_features, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        mlp.gate_proj(x)
        mlp.up_proj.weight.mul_(2.0)
        changed = mlp.up_proj(x)
    torch.testing.assert_close(changed, nn.functional.linear(x, mlp.up_proj.weight), rtol=1e-4, atol=1e-4)


def test_under_autocast_the_plain_product_is_used(model: PreTrainedModel) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(IDS).logits
        packed = pack(model)(IDS).logits
    assert packed.dtype is plain.dtype
    assert torch.equal(packed, plain)


def test_weights_that_are_no_plain_parameters_are_left_alone() -> None:
    class Quantised(torch.Tensor):
        """Stands for the weights of libraries that quantise by subclassing."""

    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    layers[0].weight = nn.Parameter(torch.zeros(8, 8).as_subclass(Quantised), requires_grad=False)
    torch.nn.utils.prune.random_unstructured(layers[1], "weight", 0.5)  # a hook makes the weight anew in every pass
    pack(layers)
    assert ["forward" in layer.__dict__ for layer in layers] == [False, False, True]


def test_training_goes_through_the_plain_product(model: PreTrainedModel) -> None:
    pack(model)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert model.lm_head.weight.grad is not None


def test_copies_of_a_packed_model_stand_alone(model: PreTrainedModel) -> None:
    pack(model)
    _logits(model)
    other = copy.deepcopy(model)
    assert other.lm_head.forward.linear is other.lm_head
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert _logits(other).eq(0).all()
    assert not _logits(model).eq(0).all()
    quantized = quantize_model(model, head_bits=None)
    assert quantized.lm_head.forward.linear is quantized.lm_head
    assert isinstance(model.lm_head.forward, PackedForward)


def test_a_replaced_forward_is_left_alone(model: PreTrainedModel) -> None:
    mine = model.lm_head.forward
    model.lm_head.forward = mine
    pack(model)
    assert model.lm_head.forward is mine
    assert model.lm_head.__dict__["forward"] is mine
    unpack(model)
    assert model.lm_head.__dict__["forward"] is mine


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(1)
    linear = nn.Linear(300, 40).to(dtype)
    with torch.no_grad():  # drawn anew each time, one sum in some thousands cancels to less than float32 can tell
        for parameter in linear.parameters():
            parameter.uniform_(-(300**-0.5), 300**-0.5, generator=dice)
    x = torch.randn(7, 300, generator=dice).to(dtype)
    wanted = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    with torch.no_grad():
        given = pack_float(linear.weight, linear.bias)(x)
        nearest = wanted.to(dtype)
    assert given.dtype is dtype
    # Nearest to the exact sum, or its neighbour where the float32 sum fell on the other side of the middle.
    assert (given == nearest).float().mean() > 0.98
    torch.testing.assert_close(given, nearest, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiles", [True, False])
def test_few_rows_are_multiplied_plainly_unless_compiled(
    dtype: torch.dtype, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "multiplies", lambda asked: asked is torch.float32)
    monkeypatch.setattr(packing, "compiles", lambda: compiles)
    pair = nn.Sequential(nn.Linear(24, 8).to(dtype))
    pack(pair)
    packed_rows: list[int] = []
    part = pair[0].forward.product.part

    def watching(member: int, x: torch.Tensor) -> torch.Tensor | None:
        packed_rows.append(x.shape[0])
        return part(member, x)

    monkeypatch.setattr(pair[0].forward.product, "part", watching)
    with torch.no_grad():
        for rows in range(1, 7):
            pair(torch.ones(rows, 24, dtype=dtype))
    first = 1 if compiles else {torch.float32: 4, torch.bfloat16: 2, torch.float16: 3}[dtype]
    assert packed_rows == list(range(first, 7))


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """What this CPU multiplies is found out in a test, and once more behind it."""
    float_kernels.multiplies.cache_clear()
    yield
    float_kernels.multiplies.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_what_torch_refuses_to_multiply_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused:
        def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
            if weight.dtype is torch.bfloat16:
                raise RuntimeError("bf16 path needs the cpu support, of which oneDNN was told there is none")
            self._weight = weight

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self._weight)

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(float_kernels, "PackedFloat", Refused)
    monkeypatch.setattr(float_kernels, "compiles", lambda: False)
    kernel = pack_float(torch.eye(3, 5, dtype=torch.bfloat16), None)
    assert isinstance(kernel, WidenedFloat)
    assert kernel(torch.arange(5, dtype=torch.bfloat16)).tolist() == [0, 1, 2]


@pytest.mark.usefixtures("asked_anew")
def test_a_cpu_without_the_instructions_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(float_kernels, "PackedFloat", None)
    assert not float_kernels.multiplies(torch.bfloat16)
    assert float_kernels.multiplies(torch.float32)


def test_siblings_are_one_product(model: PreTrainedModel) -> None:
    block = pack(model).model.layers[0]
    assert block.self_attn.q_proj.forward.product is block.self_attn.v_proj.forward.product
    assert block.mlp.gate_proj.forward.product is block.mlp.up_proj.forward.product
    assert block.mlp.down_proj.forward.product.layers == [block.mlp.down_proj]
    _logits(model)
    widths = [layer.out_features for layer in block.self_attn.q_proj.forward.product.layers]
    assert len(widths) == 3
    assert block.self_attn.q_proj.forward.product.kept() is not None
    with torch.no_grad():  # any of them changed: all are packed again
        block.self_attn.v_proj.weight.mul_(-1.0)
    changed = _logits(model)
    torch.testing.assert_close(changed, _logits(unpack(model)), rtol=1e-4, atol=1e-4)


def test_siblings_with_inputs_of_their_own_part_ways() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(32, 8), nn.Linear(32, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.gate_proj(x), self.up_proj(2 * x)], -1)

    pair = Pair()
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = pair(x)
        pack(pair)
        joint = pair.gate_proj.forward.product
        assert joint is pair.up_proj.forward.product
        for _ in range(4):
            torch.testing.assert_close(pair(x), before, rtol=1e-5, atol=1e-5)
    assert joint.dissolved
    assert pair.gate_proj.forward.product is not pair.up_proj.forward.product


def test_siblings_that_parted_ways_are_packed_apart_from_then_on() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3 = nn.Linear(32, 8), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.w1(x), self.w3(2 * x)], -1)

    pair, kept = Pair(), []
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for _ in range(3):
            with packing.packed_assistants([pair]):
                for _ in range(3):
                    pair(x)
                assert pair.w1.forward.product is not pair.w3.forward.product
                kept.append([layer.forward.product.kept() for layer in (pair.w1, pair.w3)])
    assert all(one is not None for row in kept for one in row)
    assert [row[0][0] is row[1][0] for row in kept] == [False] * 3
    assert [one[0] for one in kept[0]] == [one[0] for one in kept[1]] == [one[0] for one in kept[2]], "packed anew"


def test_a_group_that_shares_a_layer_with_the_target_is_left_alone(model: PreTrainedModel) -> None:
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with packing.packed_assistants([other], model):
        assert not is_packed(model)
        assert is_packed(other)


@pytest.mark.parametrize("packs", [True, False])
def test_an_assistant_is_after_a_call_as_it_was_before(model: PreTrainedModel, packs: bool) -> None:
    pack(model)
    if not packs:
        unpack(model)
    for _ in range(2):
        with packing.packed_assistants([model]):
            assert is_packed(model)
        assert is_packed(model) is packs


def test_threads_share_a_packed_model(model: PreTrainedModel) -> None:
    """Parts wait for the thread that asked: others neither take them nor make siblings part ways."""
    mlp = pack(model).model.layers[0].mlp
    size, joint = mlp.up_proj.in_features, mlp.gate_proj.forward.product

    def ask(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return layer(x)

    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for _ in range(3):
            mine, theirs = torch.randn(9, size), torch.randn(9, size)
            for layer in (mlp.gate_proj, mlp.up_proj):
                first.submit(ask, layer, mine).result()
                second.submit(ask, layer, theirs).result()
    assert not joint.dissolved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_keep_siblings_together(model: PreTrainedModel, dtype: torch.dtype) -> None:
    pack(model.to(dtype))
    _logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        block = other.model.layers[0].mlp
        assert block.gate_proj.forward.product is block.up_proj.forward.product
        assert block.gate_proj.forward.product.kept() is None
        assert block.gate_proj.forward.product.layers[0] is block.gate_proj
        assert torch.equal(_logits(other), _logits(model))


def test_dtypes_that_cannot_be_packed_stay(model: PreTrainedModel) -> None:
    double = model.to(torch.float64)
    assert not packs(double.lm_head.weight)
    assert not is_packed(pack(double))
