# SPDX-License-Identifier: Apache-2.0
"""Layers that another library has quantised give the float matrix that they multiply with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.integers.foreign import dequantized, stored_elsewhere
from hf_polyspec.integers.linear import float_weight, matrix_shape
from hf_polyspec.quantization import Int8Linear, agreement, quantize_model
from hf_polyspec.quantization.model import linear_layers
from hf_polyspec.quantization.modules import quantized_layers, replace_module

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(3, 48, (2, 24), generator=torch.Generator().manual_seed(5))


class _Bytes(nn.Parameter):
    """As bitsandbytes' Int8Params: a parameter of a class of its own that carries the scales."""

    scales: Tensor

    def __new__(cls, data: Tensor, scales: Tensor | None = None) -> _Bytes:
        made: Any = torch.Tensor._make_subclass(cls, data, False)
        made.scales = scales
        return made  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Bytes:
        return _Bytes(self.data.clone(), self.scales.clone())


class EightBits(nn.Linear):
    """As bitsandbytes' Linear8bitLt: a subclass of nn.Linear, codes `[N, K]`, activations rounded to 8 bits a row."""

    def __init__(self, linear: nn.Linear, activations: torch.dtype | None = None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        scales = linear.weight.detach().abs().amax(1) / 127
        self.weight: Any = _Bytes((linear.weight.detach() / scales[:, None]).round().to(torch.int8), scales)
        self.bias = linear.bias
        self.taken = activations

    def exact(self) -> Tensor:
        return self.weight.data.float() * self.weight.scales[:, None]

    def forward(self, x: Tensor) -> Tensor:
        if self.taken not in (None, x.dtype):
            raise RuntimeError(f"expected {self.taken}")
        steps = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        rounded = (x.float() / steps).round() * steps
        return F.linear(rounded, self.exact(), None if self.bias is None else self.bias.float()).to(x.dtype)


class FourBits(nn.Module):
    """As AutoAWQ's or gptqmodel's layers: no weight at all, words in a buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (linear.weight.detach() / scales).round().to(torch.int32))
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def exact(self) -> Tensor:
        return self.qweight.float() * self.scales

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.exact().to(x.dtype), self.bias)


class _Packed(torch.Tensor):
    """As torchao's tensors: inside a plain nn.Linear, float by its dtype, and able to undo what it is."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Packed:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=False)
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.inner

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, given: Any = (), named: Any = None) -> Any:
        if function is F.linear:
            return F.linear(given[0], given[1].inner, *given[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*given, **(named or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, given: Any = (), named: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return _Packed(given[0].inner)
        if function is torch.ops.aten.clone.default:
            return _Packed(given[0].inner.clone())
        raise NotImplementedError(function)


def _torchao(linear: nn.Linear) -> nn.Linear:
    made = copy.deepcopy(linear)
    made.weight = nn.Parameter(_Packed(linear.weight.detach().clone()), requires_grad=False)
    return made


MAKERS: dict[str, Callable[[nn.Linear], Any]] = {"8 bits": EightBits, "4 bits": FourBits, "torchao": _torchao}


def _exact(layer: Any) -> Tensor:
    found: Tensor = layer.exact() if hasattr(layer, "exact") else layer.weight.inner
    return found


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 32)


@pytest.mark.parametrize("maker", MAKERS)
def test_the_layer_is_asked(linear: nn.Linear, maker: str) -> None:
    layer = MAKERS[maker](linear)
    assert stored_elsewhere(layer)
    weight, bias = float_weight(layer)
    torch.testing.assert_close(weight, _exact(layer), rtol=1e-5, atol=1e-6)
    assert bias is not None
    assert torch.equal(bias, linear.bias)
    assert matrix_shape(layer) == (32, 48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_that_takes_one_type_only(linear: nn.Linear, dtype: torch.dtype) -> None:
    weight, _ = dequantized(EightBits(linear, dtype))
    assert weight.dtype is dtype
    torch.testing.assert_close(weight.float(), EightBits(linear).exact(), rtol=1e-2, atol=2e-3)


def test_wide_layers_are_asked_in_parts() -> None:
    layer = FourBits(nn.Linear(1300, 8))
    torch.testing.assert_close(dequantized(layer)[0], layer.exact(), rtol=1e-5, atol=1e-6)


def test_plain_layers_are_no_strangers(linear: nn.Linear) -> None:
    others = [
        linear,
        copy.deepcopy(linear).to(torch.bfloat16),
        nn.LayerNorm(4),
        nn.Embedding(4, 4),
        Int8Linear.from_linear(nn.Linear(32, 32)),
    ]
    assert [stored_elsewhere(layer) for layer in others[:4]] == [False] * 4
    model = nn.ModuleList(others)
    assert set(linear_layers(model)) == {"0", "1"}
    with pytest.raises(TypeError, match="LayerNorm"):
        float_weight(nn.LayerNorm(4))


def test_what_is_not_linear_or_fails_is_refused(linear: nn.Linear) -> None:
    class Bent(FourBits):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    class Broken(FourBits):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("needs a GPU\nand more")

    with pytest.raises(ValueError, match="what Bent computes is no product"):
        dequantized(Bent(linear))
    with pytest.raises(ValueError, match=r"Broken does not multiply here .*needs a GPU"):
        dequantized(Broken(linear))


def _foreign(model: PreTrainedModel, maker: Callable[[nn.Linear], Any]) -> Any:
    made: Any = copy.deepcopy(model)
    for name, layer in linear_layers(made, lambda name, _: name != "lm_head").items():
        replace_module(made, name, maker(layer))
    return made


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_middle_of_such_a_target(tiny: Tiny, maker: str, bits: int) -> None:
    target = _foreign(tiny("llama", hidden_size=64, intermediate_size=96, initializer_range=0.15), MAKERS[maker])
    middle = quantize_model(target, bits, 32)
    assert len(quantized_layers(middle)) == 15
    assert not linear_layers(middle)
    assert agreement(target, middle, IDS) > {8: 0.96, 4: 0.6}[bits]
    assert sum(stored_elsewhere(layer) for layer in target.modules()) == 14, "the target stays what it was"
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(IDS[:1])}
    plain = target.generate(IDS[:1], **options)
    assert torch.equal(hf_polyspec.generate(target, IDS[:1], **options, assistant_models=[f"int{bits}"]), plain)


def test_one_sentence_where_it_cannot_be(tiny: Tiny) -> None:
    class Broken(FourBits):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("needs a GPU")

    target = _foreign(tiny("llama"), Broken)
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj of LlamaForCausalLM was quantised by another"
    ):
        quantize_model(target, 8)
    with pytest.raises(ValueError, match='method="awq" folds scales into float weights'):
        quantize_model(target, 4, method="awq", calibration={})


@pytest.mark.parametrize("maker", MAKERS)
def test_some_layers_of_such_a_target_stay(tiny: Tiny, maker: str) -> None:
    """What is not quantised anew still computes in the copy, on parameters of its own."""
    target = _foreign(tiny("llama", hidden_size=64, intermediate_size=96), MAKERS[maker])
    middle = quantize_model(target, 8, modules=lambda name, _: "mlp" in name, head_bits=None)
    assert sum(stored_elsewhere(layer) and not isinstance(layer, Int8Linear) for layer in middle.modules()) == 8
    with torch.no_grad():
        assert middle(IDS).logits.isfinite().all()
