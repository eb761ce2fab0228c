# SPDX-License-Identifier: Apache-2.0
"""The GPTQ layout, against packings written out word by word."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_polyspec.integers.gptq_format import from_gptq, pack_codes, storable, to_gptq, unpack_codes
from hf_polyspec.integers.weights import QuantizedWeight, group_index


def _word(value: int) -> int:
    """A 32-bit pattern as a signed number."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << bits, (rows, columns), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_are_shifted_sums(bits: int) -> None:
    codes = _random_codes(64, 3, bits)
    per_word = 32 // bits
    expected = [
        [_word(sum(int(codes[row + i, column]) << (bits * i) for i in range(per_word))) for column in range(3)]
        for row in range(0, 64, per_word)
    ]
    assert pack_codes(codes, bits).tolist() == expected


def test_three_bits_straddle_words() -> None:
    codes = _random_codes(32, 1, 3)
    v = [int(code) for code in codes[:, 0]]
    words = [
        sum(v[j] << 3 * j for j in range(10)) | v[10] << 30,
        v[10] >> 2 | sum(v[j] << (3 * (j - 11) + 1) for j in range(11, 21)) | v[21] << 31,
        v[21] >> 1 | sum(v[j] << (3 * (j - 22) + 2) for j in range(22, 32)),
    ]
    assert pack_codes(codes, 3)[:, 0].tolist() == [_word(word) for word in words]


@given(bits=st.sampled_from([2, 3, 4, 8]), words=st.integers(1, 4), columns=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_packing_round_trip(bits: int, words: int, columns: int, seed: int) -> None:
    codes = _random_codes(32 * words, columns, bits, seed)
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits), codes)


def _weight(bits: int, outputs: int = 32, features: int = 96, group_size: int = 64) -> QuantizedWeight:
    groups = -(-features // group_size)
    generator = torch.Generator().manual_seed(3)
    zeros = torch.randint(1, 1 << bits, (outputs, groups), generator=generator).to(torch.uint8)
    scales = torch.rand(outputs, groups, generator=generator).to(torch.float16).float()
    g_idx = group_index(features, group_size)
    return QuantizedWeight(_random_codes(outputs, features, bits), scales, zeros, g_idx, bits, group_size)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_layer_round_trip(bits: int, version: int) -> None:
    weight = _weight(bits)
    read = from_gptq(to_gptq(weight, version), bits, 64, version)
    assert torch.equal(read.codes, weight.codes)
    assert torch.equal(read.zeros, weight.zeros)
    assert torch.equal(read.dequantize(), weight.dequantize())


def test_stored_zeros_differ_by_one_between_versions() -> None:
    weight = _weight(4)
    first, second = to_gptq(weight, 1)["qzeros"], to_gptq(weight, 2)["qzeros"]
    difference = unpack_codes(second.t().contiguous(), 4).int() - unpack_codes(first.t().contiguous(), 4).int()
    assert difference.eq(1).all()
    wrong = from_gptq(to_gptq(weight, 1), 4, 64, version=2)
    assert not torch.equal(wrong.dequantize(), weight.dequantize())


def test_missing_g_idx_means_groups_in_order() -> None:
    weight = _weight(4)
    tensors = to_gptq(weight)
    del tensors["g_idx"]
    assert torch.equal(from_gptq(tensors, 4, 64).g_idx, weight.g_idx)


def test_contradictions_are_refused() -> None:
    tensors = to_gptq(_weight(4))
    with pytest.raises(ValueError, match="needs scales of shape"):
        from_gptq(tensors, 4, 32)
    tensors["qzeros"] = tensors["qzeros"][:1]
    with pytest.raises(ValueError, match="zeros for"):
        from_gptq(tensors, 4, 64)
    with pytest.raises(ValueError, match="whole 32-bit words"):
        pack_codes(torch.zeros(3, 2, dtype=torch.uint8), 4)


def test_storable() -> None:
    assert storable((192, 576), 4)
    assert storable((192, 576), 3)
    assert not storable((192, 36), 4)
    assert storable((36, 36), 8)
