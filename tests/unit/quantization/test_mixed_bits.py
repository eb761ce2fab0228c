# SPDX-License-Identifier: Apache-2.0
"""As few layers at 8 bits as an agreement takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from hf_polyspec.quantization import agreement, bits_for_agreement, quantize_model, sensitivity

Tiny = Callable[..., PreTrainedModel]
IDS = torch.randint(48, (4, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> PreTrainedModel:
    return tiny("llama", initializer_range=0.15)


@pytest.fixture(scope="module")
def losses(model: PreTrainedModel) -> dict[str, float]:
    return sensitivity(model, IDS[:1], bits=2, group_size=32, modules=lambda name, _: name != "lm_head")


def test_the_fewest_layers_that_reach_it(model, losses) -> None:
    measured: list[str] = []
    found = bits_for_agreement(model, IDS, losses, 0.93, low=2, group_size=32, progress=measured.append)
    assert found.reached
    assert 0 < found.share < 1
    assert len(measured) <= 2 + 4
    copy = quantize_model(model, 2, 32, layer_bits=found.layer_bits)
    assert agreement(model, copy, IDS) == pytest.approx(found.agreement, abs=1e-5)
    assert found.agreement >= 0.93
    # One layer less is not enough: the last one raised goes back.
    sizes = {name: model.get_submodule(name).weight.numel() for name in losses}
    ranked = sorted(losses, key=lambda name: losses[name] / sizes[name], reverse=True)
    high = [name for name in ranked if found.layer_bits[name] == 8]
    assert high == ranked[: len(high)]
    assert agreement(model, quantize_model(model, 2, 32, layer_bits={**found.layer_bits, high[-1]: 2}), IDS) < 0.93


def test_out_of_reach_and_already_there(model, losses) -> None:
    high = bits_for_agreement(model, IDS, losses, 0.9999, low=2, group_size=32)
    assert not high.reached
    assert set(high.layer_bits.values()) == {8}
    assert high.share == 1.0
    low = bits_for_agreement(model, IDS, losses, 0.01, low=2, group_size=32)
    assert low.reached
    assert low.share == 0.0


def test_refusals(model, losses) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        bits_for_agreement(model, IDS, losses, 90)
    with pytest.raises(ValueError, match="no layer"):
        bits_for_agreement(model, IDS, {}, 0.9)
