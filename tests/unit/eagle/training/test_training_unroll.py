# SPDX-License-Identifier: Apache-2.0
"""Training-time test computes, for every row at once, what drafting from that row would compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_polyspec.eagle.fresh import init_for
from hf_polyspec.eagle.modeling import EagleHead
from hf_polyspec.eagle.training.unroll import UnrolledAttention, shifted, unroll

VARIANTS: dict[str, dict[str, Any]] = {
    "eagle3": {"algorithm": "eagle3"},
    "eagle3-sliced": {"algorithm": "eagle3", "draft_vocab": list(range(0, 45, 2))},
    "eagle3-norms": {"algorithm": "eagle3", "fc_norm": True, "norm_output": True, "norm_before_residual": True},
    "eagle3-two-layers": {"algorithm": "eagle3", "num_hidden_layers": 2},
    "eagle1": {"algorithm": "eagle1"},
    "eagle1-norms": {"algorithm": "eagle1", "embed_norm": True, "fused_norm": True, "final_norm": True},
}


def fresh(target: PreTrainedModel, **settings: Any) -> EagleHead:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        # weights large enough that a wrong mask or position shows
        return init_for(target, **settings, initializer_range=0.15).eval()


def features(head: EagleHead, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, length, head.config.feature_size, generator=generator)


@torch.no_grad()
def drafted_from(
    head: EagleHead, tokens: torch.Tensor, states: torch.Tensor, row: int, steps: int
) -> list[torch.Tensor]:
    """A chain drafted from one row with the head's own cache, as at inference."""
    cache = head.new_cache()
    prefix = head.fuse(states[:, : row + 1])
    hidden = head.step(tokens[:, 1 : row + 2], prefix, cache=cache)[:, -1:]
    found = [hidden[:, 0]]
    for step in range(1, steps):
        place = torch.full((len(tokens), 1), row + step)
        hidden = head.step(tokens[:, row + 1 + step, None], hidden, place, cache=cache)
        found.append(hidden[:, 0])
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_row_equals_a_chain_drafted_from_it(chat_target: PreTrainedModel, variant: str) -> None:
    head = fresh(chat_target, **VARIANTS[variant])
    tokens = torch.randint(5, 45, (2, 9), generator=torch.Generator().manual_seed(2))
    states = features(head, 2, 9)
    with torch.no_grad():
        steps = list(unroll(head, tokens, states, 4))
    assert len(steps) == 4
    for row in range(8):
        possible = min(4, 8 - row)
        for step, expected in enumerate(drafted_from(head, tokens, states, row, possible)):
            torch.testing.assert_close(steps[step][:, row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_draft_on_do_not_need_the_others(chat_target: PreTrainedModel, variant: str) -> None:
    head = fresh(chat_target, **VARIANTS[variant])
    tokens = torch.randint(5, 45, (2, 9), generator=torch.Generator().manual_seed(2))
    states, keep = features(head, 2, 9), torch.tensor([1, 4, 5])
    with torch.no_grad():
        every = list(unroll(head, tokens, states, 4))
        some = list(unroll(head, tokens, states, 4, keep))
    torch.testing.assert_close(some[0], every[0])
    for step in range(1, 4):
        torch.testing.assert_close(some[step], every[step][:, keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kept", [None, [3, 6, 7]])
def test_rows_that_are_only_attended_to_change_nothing(
    chat_target: PreTrainedModel, variant: str, kept: list[int] | None
) -> None:
    head = fresh(chat_target, **VARIANTS[variant])
    tokens = torch.randint(5, 45, (2, 9), generator=torch.Generator().manual_seed(2))
    states, keep = features(head, 2, 9), None if kept is None else torch.tensor(kept)
    with torch.no_grad():
        every = list(unroll(head, tokens, states, 4))
        late = list(unroll(head, tokens, states, 4, keep, first=3))
    torch.testing.assert_close(late[0], every[0][:, 3:], rtol=1e-4, atol=1e-5)
    for step in range(1, 4):
        expected = every[step][:, 3:] if keep is None else every[step][:, keep]
        torch.testing.assert_close(late[step], expected, rtol=1e-4, atol=1e-5)


def test_forgetting_the_own_ancestors_would_be_seen(
    chat_target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong variant, attention to the first step's keys and the newest own key alone, differs."""
    head = fresh(chat_target, algorithm="eagle3")
    tokens = torch.randint(5, 45, (1, 9), generator=torch.Generator().manual_seed(2))
    states = features(head, 1, 9)
    with torch.no_grad():
        right = list(unroll(head, tokens, states, 3))
    whole = UnrolledAttention.__call__

    def forgetful(self: UnrolledAttention, *parts: torch.Tensor) -> torch.Tensor:
        self.keys, self.values = self.keys[:1], self.values[:1]
        return whole(self, *parts)

    monkeypatch.setattr(UnrolledAttention, "__call__", forgetful)
    with torch.no_grad():
        wrong = list(unroll(head, tokens, states, 3))
    torch.testing.assert_close(wrong[1], right[1])
    assert (wrong[2] - right[2]).abs().max() > 1e-3


def test_padding_on_the_right_changes_no_real_row(chat_target: PreTrainedModel) -> None:
    head = fresh(chat_target, algorithm="eagle3")
    tokens = torch.randint(5, 45, (1, 7), generator=torch.Generator().manual_seed(2))
    states = features(head, 1, 7)
    padded = torch.cat([tokens, torch.zeros(1, 5, dtype=torch.long)], dim=1)
    junk = torch.cat([states, 100 * torch.ones(1, 5, states.shape[-1])], dim=1)
    with torch.no_grad():
        for step, (short, long) in enumerate(
            zip(unroll(head, tokens, states, 3), unroll(head, padded, junk, 3), strict=True)
        ):
            torch.testing.assert_close(long[:, : 6 - step], short[:, : 6 - step], rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_weight(chat_target: PreTrainedModel) -> None:
    head = fresh(chat_target, algorithm="eagle3").train()
    tokens = torch.randint(5, 45, (1, 7), generator=torch.Generator().manual_seed(2))
    chat_target.requires_grad_(False)
    sum(head.logits(step).sum() for step in unroll(head, tokens, features(head, 1, 7), 3)).backward()  # type: ignore[union-attr]
    assert all(weight.grad is not None for weight in head.parameters())


def test_shifted() -> None:
    values = torch.arange(1, 6)[None]  # positions 0..4 hold 1..5, rows are 0..3
    assert shifted(values, 1).tolist() == [[2, 3, 4, 5]]
    assert shifted(values, 2).tolist() == [[3, 4, 5, 0]]
    assert shifted(values, 4, fill=-1).tolist() == [[5, -1, -1, -1]]
    assert shifted(values, 9).tolist() == [[0, 0, 0, 0]]
    assert shifted(values[..., None], 3).tolist() == [[[4], [5], [0], [0]]]
