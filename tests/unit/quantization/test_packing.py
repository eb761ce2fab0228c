# SPDX-License-Identifier: Apache-2.0
"""Packing changes where numbers lie, not what they are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_polyspec.quantization import is_packed, pack, quantize_model, unpack
from hf_polyspec.quantization.kernels import packs
from hf_polyspec.quantization.packing import PackedForward

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
    assert model.model.layers[0].mlp.up_proj.forward._packed is None
    torch.testing.assert_close(_logits(model), before, rtol=1e-4, atol=1e-4)
    assert model.model.layers[0].mlp.up_proj.forward._packed is not None
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


def test_dtypes_the_machine_does_not_multiply_stay(model: PreTrainedModel) -> None:
    half = model.to(torch.float16)
    assert not packs(half.lm_head.weight)
    assert not is_packed(pack(half))
