# SPDX-License-Identifier: Apache-2.0
"""Steps of a head for which what they need is looked up once are the steps of the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.cpu.packing import packed_assistants
from hf_polyspec.eagle import modeling
from hf_polyspec.eagle.configuration import EagleHeadConfig
from hf_polyspec.eagle.head_steps import HeadSteps
from hf_polyspec.eagle.modeling import EagleHead

WIDTH, IDS = 64, 96


class Scaled(nn.Embedding):
    """As of models that multiply what they look up."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 3


def head_of(dtype: torch.dtype, embedding: type[nn.Embedding] = nn.Embedding, **settings: Any) -> EagleHead:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "target_hidden_size": WIDTH, "intermediate_size": 160, "vocab_size": IDS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "draft_vocab_size": IDS}
    settings = {"algorithm": "eagle3", "num_features": 3, "feature_layer_ids": [0, 1, 2]} | settings
    head = EagleHead(EagleHeadConfig(**sizes, **heads, **settings)).to(dtype).eval()
    for name, weight in head.named_parameters():
        nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.1)
    return head.bind(embedding(IDS, WIDTH, dtype=dtype), nn.Linear(WIDTH, IDS, bias=False, dtype=dtype))


def run(head: EagleHead, rows: int, once: bool) -> list[torch.Tensor]:
    """A prompt, two columns at once, one, and a level of a tree; of two rows the second is padded."""
    generator = torch.Generator().manual_seed(1)
    cache = head.new_cache()
    found: list[torch.Tensor] = []

    def step(count: int, first: int, mask: torch.Tensor | None) -> None:
        tokens = torch.randint(0, IDS, (rows, count), generator=generator)
        states = torch.randn(rows, count, WIDTH, generator=generator).to(head.dtype)
        places = torch.arange(first, first + count).expand(rows, -1)
        steps = HeadSteps(head, cache) if once else lambda *given: head.step(*given, cache)
        found.append(steps(tokens, states, places, mask))

    def padded(width: int) -> torch.Tensor | None:
        return None if rows == 1 else torch.tensor([[1] * width, [0] * 4 + [1] * (width - 4)])

    step(40, 0, padded(40))  # more columns than one task takes
    step(2, 40, padded(42))
    step(1, 42, padded(43))
    seen = torch.ones(rows, 1, 3, 46, dtype=torch.bool)
    seen[..., 43:] = torch.eye(3, dtype=torch.bool)
    step(3, 43, seen)
    cache.crop(43)
    step(1, 43, padded(44))
    return found


KINDS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "normed output": {"norm_output": True},
    "own embedding": {"own_embedding": True},
    "window": {"sliding_window": 8},
    "two layers": {"num_hidden_layers": 2},
    "eagle1": {"algorithm": "eagle1", "num_features": 1, "feature_layer_ids": [-1]},
}


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", [*KINDS, "scaled", "not packed"])
def test_numbers(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of(torch.float32, Scaled if kind == "scaled" else nn.Embedding, **KINDS.get(kind, {}))
    wanted = run(head, rows, once=False)
    slow: list[int] = []
    step = modeling.EagleHead.step

    def counted(self: EagleHead, tokens: torch.Tensor, *given: Any) -> torch.Tensor:
        slow.append(tokens.shape[1])
        return step(self, tokens, *given)

    monkeypatch.setattr(modeling.EagleHead, "step", counted)
    with packed_assistants([] if kind == "not packed" else [head]):
        found = run(head, rows, once=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one[-1], other[-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
    fused = compiles() and kind not in ("window", "two layers", "eagle1", "not packed")
    assert slow == ([40] if fused else [40, 2, 1, 3, 1])


@torch.no_grad()
def test_an_embedding_with_a_hook_of_somebodys_is_called() -> None:
    head = head_of(torch.float32)
    calls: list[int] = []
    head.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    with packed_assistants([head]):
        run(head, 1, once=True)
    assert len(calls) == 5


@torch.no_grad()
def test_what_changes_between_two_drafts_counts() -> None:
    """A head is bound, packed, trained and cast between drafts, and steps are made anew for each."""
    head = head_of(torch.float32)
    with packed_assistants([head]):
        before = run(head, 1, once=True)
        head.layers[0].mlp.down_proj.weight.mul_(2)
        head.get_input_embeddings().weight.mul_(0.5)
        found = run(head, 1, once=True)
    wanted = run(head, 1, once=False)
    assert not torch.allclose(found[2], before[2], atol=1e-3)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_bound_yet_is_not_looked_at() -> None:
    head = head_of(torch.float32)
    head._borrowed = type(head._borrowed)()
    HeadSteps(head, head.new_cache())
