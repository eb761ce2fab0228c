# SPDX-License-Identifier: Apache-2.0
"""A slot's logits are those of its own text alone, whatever the other slots hold and whoever was there before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.eagle.training.slots import DrainedBatch, SlotBatch, compact_attention, open_batch, serves_slots


def alone(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0, -1]
    return logits


def play(batch: Any, texts: dict[int, list[int]], prompt: int, check: Any) -> None:
    """Fills slots with the first `prompt` ids of each text and feeds the rest."""
    batch.fill(list(texts), [ids[: prompt + row] for row, ids in texts.items()])
    for step in range(4):
        tokens = torch.zeros(batch.slots, dtype=torch.long)
        for row, ids in texts.items():
            tokens[row] = ids[prompt + row - 1 + step]
        logits = batch.step(tokens)
        for row, ids in texts.items():
            check(logits[row], ids[: prompt + row + step])


def test_ragged_rows_and_refills_match_single_texts(chat_target: PreTrainedModel) -> None:
    texts = torch.randint(5, 45, (6, 20), generator=torch.Generator().manual_seed(0)).tolist()
    batch = SlotBatch(chat_target, 3, 24)

    def check(logits: torch.Tensor, ids: list[int]) -> None:
        torch.testing.assert_close(logits, alone(chat_target, ids), rtol=1e-4, atol=1e-5)

    play(batch, {0: texts[0], 1: texts[1], 2: texts[2]}, 9, check)
    # a shorter text takes over a slot while the others run on; what its slot held before must not be seen
    batch.release(1)
    batch.fill([1], [texts[3][:2]])
    fed = [texts[0][12], texts[3][1], texts[2][14]]
    logits = batch.step(torch.tensor(fed))
    check(logits[0], texts[0][:13])
    check(logits[1], texts[3][:2])
    check(logits[2], texts[2][:15])


def test_one_token_prompts(chat_target: PreTrainedModel) -> None:
    batch = SlotBatch(chat_target, 2, 8)
    batch.fill([0, 1], [[7], [9]])
    logits = batch.step(torch.tensor([7, 9]))
    torch.testing.assert_close(logits[1], alone(chat_target, [9]), rtol=1e-4, atol=1e-5)


def test_idle_slots_never_overflow(chat_target: PreTrainedModel) -> None:
    batch = SlotBatch(chat_target, 2, 8)
    batch.fill([0, 1], [[7, 8], [9]])
    batch.step(torch.tensor([8, 9]))
    batch.release(1)
    for _ in range(5):
        batch.step(torch.tensor([8, 0]))
    assert batch.lengths.tolist() == [7, 0]


def test_drained_batch_matches_single_texts(chat_target: PreTrainedModel) -> None:
    texts = torch.randint(5, 45, (3, 20), generator=torch.Generator().manual_seed(1)).tolist()

    def check(logits: torch.Tensor, ids: list[int]) -> None:
        torch.testing.assert_close(logits, alone(chat_target, ids), rtol=1e-4, atol=1e-5)

    batch = DrainedBatch(chat_target, 3, 24)
    play(batch, {0: texts[0], 2: texts[2]}, 4, check)
    play(batch, {1: texts[1]}, 3, check)


def test_sliding_models_get_a_drained_batch(chat_target: PreTrainedModel) -> None:
    config = MistralConfig(
        vocab_size=45, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, max_position_embeddings=64,
    )  # fmt: skip
    sliding = MistralForCausalLM(config).eval()
    batch = open_batch(sliding, 2, 32)
    assert isinstance(batch, DrainedBatch)
    assert isinstance(open_batch(chat_target, 2, 32), SlotBatch)
    texts = torch.randint(5, 45, (2, 20), generator=torch.Generator().manual_seed(2)).tolist()
    play(
        batch,
        {0: texts[0], 1: texts[1]},
        7,
        lambda logits, ids: torch.testing.assert_close(logits, alone(sliding, ids), rtol=1e-4, atol=1e-5),
    )


def test_models_that_misread_slots_are_noticed(chat_target: PreTrainedModel) -> None:
    torch.manual_seed(0)
    # BLOOM takes no position ids: its distances come from a 2-D mask
    bloom = BloomForCausalLM(BloomConfig(vocab_size=45, hidden_size=32, n_layer=2, n_head=4)).eval()
    assert serves_slots(chat_target)
    assert not serves_slots(bloom)
    texts = torch.randint(5, 45, (2, 20), generator=torch.Generator().manual_seed(3)).tolist()
    play(
        open_batch(bloom, 2, 32),
        {0: texts[0], 1: texts[1]},
        5,
        lambda logits, ids: torch.testing.assert_close(logits, alone(bloom, ids), rtol=1e-4, atol=1e-5),
    )


@pytest.mark.parametrize("kind", [SlotBatch, DrainedBatch])
def test_prompts_that_do_not_fit_are_refused(chat_target: PreTrainedModel, kind: Any) -> None:
    batch = kind(chat_target, 2, 4)
    with pytest.raises(ValueError, match="4 tokens does not fit"):
        batch.fill([0], [[5, 6, 7, 8]])
    with pytest.raises(ValueError, match="no tokens"):
        batch.fill([0], [[]])


def test_a_compact_batch_rounds_only_what_it_keeps(chat_target: PreTrainedModel) -> None:
    copied = copy.deepcopy(chat_target)
    batch = open_batch(copied, 2, 24, compact=True)
    assert isinstance(batch, SlotBatch)
    assert batch.layers[0].stored == torch.bfloat16
    texts = torch.randint(5, 45, (2, 20), generator=torch.Generator().manual_seed(1)).tolist()
    apart = []

    def check(logits: torch.Tensor, ids: list[int]) -> None:
        apart.append(float((logits - alone(chat_target, ids)).norm() / logits.norm()))

    play(batch, {0: texts[0], 1: texts[1]}, 9, check)
    # not zero, or nothing was kept in bfloat16; far below what a misread key would do
    assert 0 < max(apart) < 4 * torch.finfo(torch.bfloat16).eps


def test_a_compact_batch_of_a_half_precision_model_changes_nothing(chat_target: PreTrainedModel) -> None:
    half = copy.deepcopy(chat_target).to(torch.bfloat16)
    before = half.config._attn_implementation
    batch = open_batch(half, 2, 24, compact=True)
    assert isinstance(batch, SlotBatch)
    assert batch.layers[0].stored is None
    assert half.config._attn_implementation == before


def test_compact_attention_is_attention() -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 6, 3, 8, generator=generator)
    key, value = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(2))
    mask = torch.rand(2, 1, 3, 5, generator=generator) < 0.6
    mask[..., 0] = True
    wide, _ = compact_attention(torch.nn.Module(), query, key.double(), value.double(), mask, scaling=0.3)
    scores = query @ key.repeat_interleave(3, 1).transpose(-1, -2) * 0.3
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    torch.testing.assert_close(wide, (weights @ value.repeat_interleave(3, 1)).transpose(1, 2))


@pytest.mark.skipif(not compiles(), reason="compiled functions do not run on this machine")
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("as_kept", [True, False])
def test_compact_attention_is_compiled_where_keys_lie_as_they_are_kept(
    as_kept: bool, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_polyspec.cpu.compiled import attention

    calls = []
    attend = attention.attend

    def counted(*given: Any) -> torch.Tensor:
        calls.append(given)
        return attend(*given)

    monkeypatch.setattr(attention, "attend", counted)
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(3, 6, steps, 16, generator=generator)
    # the visible columns of rows with room for more
    key, value = (torch.randn(3, 2, 12, 16, generator=generator).bfloat16()[:, :, :7] for _ in range(2))
    if not as_kept:
        key = key.transpose(1, 2).contiguous().transpose(1, 2)
    mask = torch.rand(3, 1, steps, 7, generator=generator) < 0.6
    mask[..., 0] = True
    with torch.no_grad():
        found, _ = compact_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
        assert len(calls) == as_kept
        # compiled functions know no double precision
        rounded = query.bfloat16().float()
        wide, _ = compact_attention(torch.nn.Module(), rounded, key.double(), value.double(), mask, 0.3)
    assert found.shape == (3, steps, 6, 16)
    torch.testing.assert_close(found, wide, rtol=0.02, atol=0.02)
