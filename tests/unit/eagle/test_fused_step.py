# SPDX-License-Identifier: Apache-2.0
"""A packed head's step as one compiled task gives the numbers of its own operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.cpu.packing import packed_assistants
from hf_polyspec.eagle import modeling
from hf_polyspec.eagle.configuration import EagleHeadConfig
from hf_polyspec.eagle.fused_step import fused_step
from hf_polyspec.eagle.modeling import EagleHead

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

WIDTH, IDS = 64, 96


def head_of(dtype: torch.dtype, **settings: Any) -> EagleHead:
    """A head of one layer with random weights, bound to a random embedding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "target_hidden_size": WIDTH, "intermediate_size": 160, "vocab_size": IDS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "draft_vocab_size": IDS}
    config = EagleHeadConfig(
        algorithm="eagle3", num_features=3, feature_layer_ids=[0, 1, 2], **sizes, **heads, **settings
    )
    head = EagleHead(config).to(dtype).eval()
    for name, weight in head.named_parameters():
        nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.1)
    return head.bind(nn.Embedding(IDS, WIDTH, dtype=dtype), nn.Linear(WIDTH, IDS, bias=False, dtype=dtype))


def steps(head: EagleHead) -> list[torch.Tensor]:
    """A prompt, a token, a level of a tree of which each node sees itself, and a token after it was dropped."""
    generator = torch.Generator().manual_seed(1)

    def states(count: int) -> torch.Tensor:
        return torch.randn(1, count, WIDTH, generator=generator).to(head.dtype)

    cache = head.new_cache()
    tokens = torch.randint(0, IDS, (1, 9), generator=generator)
    found = [head.step(tokens, states(9), torch.arange(9)[None], None, cache)]
    found.append(head.step(tokens[:, :1], states(1), torch.tensor([[9]]), None, cache))
    sees = torch.cat([torch.ones(3, 10, dtype=torch.bool), torch.eye(3, dtype=torch.bool)], dim=1)[None, None]
    found.append(head.step(tokens[:, :3], states(3), torch.full((1, 3), 10), sees, cache))
    cache.crop(10)
    found.append(head.step(tokens[:, 4:5], states(1), torch.tensor([[10]]), None, cache))
    return found


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
def test_the_numbers_are_those_of_the_head(dtype: torch.dtype, normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of(dtype, norm_output=normed)
    wanted = steps(copy.deepcopy(head).double())
    given: list[bool] = []

    def watched(*arguments: Any) -> torch.Tensor | None:
        out = fused_step(*arguments)
        given.append(out is not None)
        return out

    monkeypatch.setattr(modeling, "fused_step", watched)
    with packed_assistants([head]):
        found = steps(head)
    assert given == [True] * 4
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= 4 * torch.finfo(dtype).eps ** 0.9 * other.norm()


@torch.no_grad()
def test_a_weight_that_changes_counts_from_the_next_step_on() -> None:
    head = head_of(torch.float32)
    with packed_assistants([head]):
        before = steps(head)
        head.layers[0].mlp.down_proj.weight.mul_(2)
        head.layers[0].hidden_norm.weight.mul_(0.5)
        found = steps(head)
    wanted = steps(copy.deepcopy(head))
    assert not torch.allclose(found[1], before[1], atol=1e-3)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["not packed", "hooked", "another residual", "gradients"])
def test_others_are_left_to_their_own_operations(kind: str) -> None:
    head = head_of(torch.float32, norm_before_residual=kind == "another residual")
    calls: list[int] = []
    if kind == "hooked":
        head.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    x = torch.zeros(1, 1, WIDTH)
    turns = torch.ones(1, 1, 16), torch.zeros(1, 1, 16)
    with packed_assistants([head] if kind != "not packed" else []), torch.set_grad_enabled(kind == "gradients"):
        cache = head.new_cache()
        assert fused_step(head, x, x, turns, None, False, cache) is None
    assert cache.length == 0
