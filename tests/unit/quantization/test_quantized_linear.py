# SPDX-License-Identifier: Apache-2.0
"""Quantised layers compute the product with the matrix they say they hold."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_polyspec.cpu.kernels import (
    INT8_FEW_ROWS,
    Dequantized,
    FbgemmProduct,
    IntegerDot,
    OneDnnProduct,
    PackedInt4,
    WeightOnlyInt8,
    int4_run_group,
)
from hf_polyspec.cpu.shared_input import SharedInput
from hf_polyspec.integers.linear import float_weight
from hf_polyspec.integers.weights import group_index, search_scales
from hf_polyspec.quantization import Int4Linear, Int8Linear, QuantizedLinear, QuantizedWeight, round_to_nearest
from hf_polyspec.quantization.gptq import round_with_feedback
from hf_polyspec.quantization.linear import quantized_linear

BF16 = torch.finfo(torch.bfloat16).eps
X86 = torch.backends.quantized.engine in ("x86", "fbgemm")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.double() - reference.double()).norm() / reference.double().norm())


def _reference(layer: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), layer.weight.double(), bias)


@pytest.mark.parametrize("rows", [1, 3, INT8_FEW_ROWS, INT8_FEW_ROWS + 1, 40])
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_product_with_its_weight(rows: int, kind: type[QuantizedLinear], bias: bool) -> None:
    layer = kind.from_linear(nn.Linear(192, 40, bias=bias))
    x = torch.randn(2, rows, 192)
    y = layer(x)
    assert y.shape == (2, rows, 40)
    assert y.dtype == torch.float32
    assert _error(y, _reference(layer, x)) < BF16  # inputs and outputs of the kernels for few rows are bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("rows", [2, 40])
def test_other_dtypes_go_in_and_out(dtype: torch.dtype, kind: type[QuantizedLinear], rows: int) -> None:
    layer = kind.from_linear(nn.Linear(128, 48).to(dtype))
    x = torch.randn(rows, 128).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert _error(y, _reference(layer, x)) < 2 * BF16  # the float16 or bfloat16 weight, and the output, are rounded


@pytest.mark.parametrize(
    ("features", "group_size", "run"), [(576, 128, 64), (576, 64, 64), (96, 128, 32), (256, -1, 256)]
)
def test_widths_that_groups_do_not_divide(features: int, group_size: int, run: int) -> None:
    weight = round_to_nearest(torch.randn(32, features), 4, group_size)
    assert int4_run_group(weight) == (run, None)
    x = torch.randn(5, features)
    exact = F.linear(x.double(), weight.dequantize().double())
    assert _error(PackedInt4(weight, None)(x), exact) < BF16


def test_a_width_no_group_divides_still_runs() -> None:
    layer = Int4Linear.from_linear(nn.Linear(40, 24), group_size=24)
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x), _reference(layer, x).float())


def test_act_order_runs_permuted() -> None:
    features, order = 128, torch.randperm(128)
    weight = round_to_nearest(torch.randn(32, features), 4, 32)
    shuffled = QuantizedWeight(weight.codes[:, order], weight.scales, weight.zeros, weight.g_idx[order], 4, 32)
    x = torch.randn(4, features)
    exact = F.linear(x.double(), shuffled.dequantize().double())
    assert torch.equal(shuffled.dequantize(), weight.dequantize()[:, order])
    assert _error(PackedInt4(shuffled, None)(x), exact) < BF16


@pytest.mark.parametrize("bits", [2, 3])
def test_narrow_codes_run_on_the_four_bit_kernel(bits: int) -> None:
    weight = round_to_nearest(torch.randn(32, 64), bits, 32)
    layer = quantized_linear(weight)
    x = torch.randn(2, 64)
    assert _error(layer(x), _reference(layer, x)) < BF16


@pytest.mark.skipif(not X86, reason="int8 dot products through fbgemm are an x86 kernel")
class TestIntegerDot:
    def test_two_digits_are_as_good_as_float(self) -> None:
        weight = round_to_nearest(torch.randn(64, 96), 8, -1, True)
        x = torch.randn(10, 96) * torch.logspace(-3, 3, 10)[:, None]
        exact = F.linear(x.double(), weight.dequantize().double())
        two, one = IntegerDot(weight, None)(x), IntegerDot(weight, None, digits=1)(x)
        assert _error(two, exact) < 1e-4
        assert 1e-3 < _error(one, exact) < 2e-2

    def test_a_token_does_not_see_the_others(self) -> None:
        # A verifier's p must not depend on the proposals after it; one scale for the whole pass breaks that.
        kernel = IntegerDot(round_to_nearest(torch.randn(64, 96), 8, -1, True), None)
        x = torch.randn(1, 96)
        alone = kernel(x)
        for scale in (1e-2, 1.0, 1e3):
            assert torch.equal(kernel(torch.cat([x, scale * torch.randn(7, 96)]))[:1], alone)

    def test_one_scale_for_the_pass_would_fail_the_test_above(self) -> None:
        weight = round_to_nearest(torch.randn(64, 96), 8, -1, True)
        x, loud = torch.randn(1, 96), 1e3 * torch.randn(7, 96)
        kernel = IntegerDot(weight, None, digits=1)

        def one_scale(rows: torch.Tensor) -> torch.Tensor:
            scale = rows.abs().max() / 127
            return kernel._matmul((rows / scale).round()) * scale

        assert not torch.equal(one_scale(torch.cat([x, loud]))[:1], one_scale(x))

    @pytest.mark.parametrize("shape", [(1, 32, 64), (2, 33, 96), (17, 40, 576)])
    def test_both_products_are_exact(self, shape: tuple[int, int, int]) -> None:
        rows, outputs, inputs = shape
        signed = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
        signed[0], signed[1, ::2] = 127, -128
        zeros = torch.randint(-4, 5, (outputs,))
        for build in (OneDnnProduct, FbgemmProduct):
            product = build(signed, torch.ones(outputs), zeros)
            digits = torch.randint(-int(product.reach), int(product.reach) + 1, (rows, inputs)).float()
            digits[0] = product.reach
            exact = digits.double() @ (signed.double() - zeros[:, None]).t()
            if build is FbgemmProduct or OneDnnProduct.exact_here():
                assert torch.equal(product(digits).double(), exact)

    def test_silent_tokens_give_the_bias(self) -> None:
        bias = torch.randn(32)
        kernel = IntegerDot(round_to_nearest(torch.randn(32, 64), 8, -1, True), bias)
        assert torch.equal(kernel(torch.zeros(3, 64)), bias.expand(3, 32))

    def test_zeros_off_the_middle(self) -> None:
        weight = round_to_nearest(torch.rand(32, 64), 8, -1, symmetric=False)
        assert not weight.symmetric
        x = torch.randn(3, 64)
        assert _error(quantized_linear(weight)(x), F.linear(x.double(), weight.dequantize().double())) < 1e-4


def test_eight_bits_in_groups_are_expanded() -> None:
    weight = round_to_nearest(torch.randn(32, 64), 8, 32)
    layer = quantized_linear(weight)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), _reference(layer, x).float())


def test_expanded_matrix_is_the_same_whether_kept_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = round_to_nearest(torch.randn(32, 64), 4, 32)
    x, bias = torch.randn(20, 64), torch.randn(32)
    exact = F.linear(x, weight.dequantize(), bias)
    kept = Dequantized(lambda: weight, bias)
    first = kept(x)
    torch.testing.assert_close(first, exact)
    assert torch.equal(kept(x), first)
    monkeypatch.setattr("hf_polyspec.cpu.kernels.room_for", lambda _: False)
    fleeting = Dequantized(lambda: weight, bias)
    assert torch.equal(fleeting(x), fleeting(x))
    assert not fleeting._kept


def test_state_dict_is_a_gptq_checkpoint_and_loads_back() -> None:
    layer = Int4Linear.from_linear(nn.Linear(64, 32), group_size=32)
    state = layer.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "qweight": (8, 32), "qzeros": (2, 4), "scales": (2, 32), "g_idx": (64,), "bias": (32,),
    }  # fmt: skip
    other = Int4Linear.from_linear(nn.Linear(64, 32), group_size=32)
    x = torch.randn(2, 64)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    del state["scales"]
    with pytest.raises(RuntimeError, match="scales"):
        other.load_state_dict(state)


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_copies_and_casts_keep_the_numbers(kind: type[QuantizedLinear]) -> None:
    layer = kind.from_linear(nn.Linear(64, 32))
    x = torch.randn(2, 64)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    matrix = layer.weight
    layer.to(torch.bfloat16)
    assert torch.equal(layer.weight, matrix)


def test_sizes_that_fill_no_words_are_refused() -> None:
    with pytest.raises(ValueError, match="whole 32-bit words"):
        Int4Linear.from_linear(nn.Linear(36, 32))
    with pytest.raises(ValueError, match="NaN"):
        round_to_nearest(torch.full((4, 8), torch.nan))
    with pytest.raises(TypeError, match="LayerNorm"):
        float_weight(nn.LayerNorm(4))


def test_positive_groups_keep_clear_of_a_zero_code() -> None:
    weight = torch.rand(4, 64) + 1.0
    found = round_to_nearest(weight, 4, 32)
    assert found.zeros.min() >= 1
    assert (found.dequantize() - weight).abs().max() < 0.51 * found.scales.max()


def test_search_is_never_worse_in_what_it_minimises() -> None:
    weight, importance = torch.randn(16, 128) ** 3, torch.rand(128)
    plain = round_to_nearest(weight, 4, 32)
    searched = search_scales(weight, 4, 32, False, importance)
    losses = [((found.dequantize() - weight).square() * importance).sum() for found in (plain, searched)]
    assert losses[1] < 0.95 * losses[0]


def test_feedback_keeps_the_output_better_than_rounding() -> None:
    inputs = torch.randn(400, 96) @ torch.randn(96, 96)  # correlated
    weight = torch.randn(32, 96)
    moments = inputs.T @ inputs / 400
    target = inputs @ weight.T
    plain = round_to_nearest(weight, 4, 64)
    better = round_with_feedback(weight, moments, 4, 64, False)
    errors = [((inputs @ found.dequantize().T) - target).square().mean() for found in (plain, better)]
    assert errors[1] < 0.6 * errors[0]
    assert torch.equal(better.g_idx, group_index(96, 64))
    with pytest.raises(ValueError, match="do not fit"):
        round_with_feedback(weight, moments[:5, :5], 4, 64, False)


class TestSharedInput:
    def _layers(self) -> list[QuantizedLinear]:
        layers = [Int8Linear.from_linear(nn.Linear(64, size, bias=size == 32)) for size in (32, 16, 16)]
        self.alone = copy.deepcopy(layers)
        group = SharedInput(layers)
        for member, layer in enumerate(layers):
            layer.join(group, member)
        return layers

    @pytest.mark.parametrize("rows", [2, 40])
    def test_parts_are_the_layers_own_outputs(self, rows: int) -> None:
        layers = self._layers()
        x = torch.randn(1, rows, 64)
        for _ in range(3):
            x = x + 1
            for layer, alone in zip(layers, self.alone, strict=True):
                y = layer(x)
                assert y.is_contiguous()
                torch.testing.assert_close(y, alone(x), rtol=BF16, atol=BF16)

    def test_a_changed_input_is_computed_anew(self) -> None:
        layers = self._layers()
        x = torch.randn(2, 64)
        layers[0](x)
        x.mul_(2)
        torch.testing.assert_close(layers[1](x), self.alone[1](x), rtol=BF16, atol=BF16)

    def test_asking_twice_is_computed_anew(self) -> None:
        layers = self._layers()
        x = torch.randn(2, 64)
        assert torch.equal(layers[0](x), layers[0](x))

    def test_layers_with_inputs_of_their_own_part_ways(self) -> None:
        layers = self._layers()
        for _ in range(4):
            for layer, alone in zip(layers, self.alone, strict=True):
                x = torch.randn(2, 64)
                torch.testing.assert_close(layer(x), alone(x), rtol=BF16, atol=BF16)
        assert all(layer._group is None for layer in layers)


def test_weight_only_kernel_alone() -> None:
    weight, bias = round_to_nearest(torch.randn(32, 64), 8, -1, True), torch.randn(32)
    x = torch.randn(4, 64)
    exact = F.linear(x.double(), weight.dequantize().double(), bias.double())
    assert _error(WeightOnlyInt8(weight, bias)(x), exact) < BF16
