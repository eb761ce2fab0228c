# SPDX-License-Identifier: Apache-2.0
"""Law 4: a cache is a memo of ids. Whatever a runner is asked, in whatever order, it answers like a fresh pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from hf_polyspec.errors import LevelError, RollbackError
from hf_polyspec.exactness.context import EMBEDDED, Context, Prompt, common_prefix
from hf_polyspec.host.cache import RollbackCache
from hf_polyspec.host.callers_cache import read_cache, write_cache
from hf_polyspec.host.release import GENERATION_CACHE
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.telemetry.counters import LevelStats

VOCABULARY = 16


def tiny(window: int | None = None) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
    }
    if window:
        return MistralForCausalLM(MistralConfig(sliding_window=window, **sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


MODELS = {None: tiny(), 5: tiny(window=5)}


def prompt(mask: list[list[int]] | None, width: int, batch: int) -> Prompt:
    given_mask = None if mask is None else torch.tensor(mask)
    ones = torch.ones(batch, width, dtype=torch.long) if given_mask is None else given_mask
    return Prompt(width, given_mask, (ones.cumsum(-1) - 1).clamp(min=0))


@torch.no_grad()
def fresh(model: torch.nn.Module, ids: list[int], pads: int, positions: int) -> torch.Tensor:
    """Logits `[positions, V]` of the last positions of one unpadded row."""
    return model(torch.tensor([ids[pads:]])).logits[0, -positions:]


rows = st.lists(st.integers(0, VOCABULARY - 1), min_size=0, max_size=7)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    st.sampled_from([None, 5]),
    st.lists(st.tuples(rows, rows, rows, rows), min_size=1, max_size=6),
    st.integers(0, 2),
)
@torch.no_grad()
def test_any_order_of_questions_is_answered_like_a_fresh_pass(
    window: int | None, questions: list[tuple[list[int], list[int], list[int], list[int]]], pads: int
) -> None:
    """Two rows, one left-padded, continued, cut back and redrafted at random."""
    model = MODELS[window]
    start = [[0] * pads + [3, 1, 4, 1][pads:], [2, 7, 1, 8]]
    about = prompt([[0] * pads + [1] * (4 - pads), [1] * 4] if pads else None, 4, 2)
    runner, stats = ModelRunner(model, "the model"), LevelStats("the model", 0)
    for more_a, more_b, draft_a, draft_b in questions:
        context = Context([start[0] + more_a, start[1] + more_b], about)
        drafts = [draft_a[:3], draft_b[:3]]
        passed = runner.run(context, drafts, stats)
        held = [ids + draft for ids, draft in zip(context.ids, drafts, strict=True)]
        assert runner.memo == held
        assert runner.cache.length == max(map(len, held))
        for row, (ids, skip) in enumerate(zip(held, (pads, 0), strict=True)):
            count = len(drafts[row]) + 1
            torch.testing.assert_close(passed.logits[row, :count], fresh(model, ids, skip, count), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_only_what_is_missing_is_fed() -> None:
    runner, stats = ModelRunner(MODELS[None], "the model"), LevelStats("the model", 0)
    context = Context([[1, 2, 3, 4]], prompt(None, 4, 1))
    assert runner.run(context, [[5, 6]], stats).fed == 6
    assert runner.run(context.extended([[5, 9]]), [[1]], stats).fed == 2  # 6 was rejected: 9 and the draft
    assert runner.run(context.extended([[5, 9]]), [[]], stats).fed == 1  # only the last token's logits are wanted again
    assert stats.forward_passes == 3


@torch.no_grad()
def test_without_a_cache_everything_is_fed() -> None:
    runner, stats = ModelRunner(MODELS[None], "the model", use_cache=False), LevelStats("the model", 0)
    context = Context([[1, 2, 3, 4]], prompt(None, 4, 1))
    for _ in range(2):
        passed = runner.run(context, [[5]], stats)
        assert passed.fed == 5
        torch.testing.assert_close(passed.logits[0], fresh(MODELS[None], [1, 2, 3, 4, 5], 0, 2))


@torch.no_grad()
def test_a_failed_pass_names_the_level_and_leaves_a_working_runner() -> None:
    model = tiny()
    runner, stats = ModelRunner(model, "assistant_models[1] (small)"), LevelStats("the model", 0)
    context = Context([[1, 2, 3]], prompt(None, 3, 1))
    runner.run(context, [[]], stats)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(LevelError, match=r"assistant_models\[1\] \(small\) failed: division by zero"):
        runner.run(context, [[4]], stats)
    handle.remove()
    torch.testing.assert_close(runner.run(context, [[4]], stats).logits[0], fresh(model, [1, 2, 3, 4], 0, 2))


@torch.no_grad()
def test_a_cache_that_does_not_keep_its_promise_is_noticed() -> None:
    class Forgetful(RollbackCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            found = super().update(key_states, value_states, layer_idx)
            self.layers[layer_idx].shrink(1)
            return found

    runner, stats = ModelRunner(MODELS[None], "the target"), LevelStats("the target", 0)
    runner.cache = Forgetful()
    with pytest.raises(RollbackError, match="the target's cache holds 1 tokens after a pass that should have left 3"):
        runner.run(Context([[1, 2, 3]], prompt(None, 3, 1)), [[]], stats)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 5])
def test_a_callers_cache_is_read_and_extended_but_not_disturbed(window: int | None) -> None:
    model = MODELS[window]
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    mine, reference = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for cache in (mine, reference):
        model(torch.tensor([ids[:7]]), **{GENERATION_CACHE: cache})
    before = [layer.keys.clone() for layer in mine.layers]
    copy, length = read_cache(mine)
    runner, stats = ModelRunner(model, "the target"), LevelStats("the target", 0)
    runner.adopt(copy, [ids[:7]])
    passed = runner.run(Context([ids], prompt(None, 7, 1)), [[]], stats)
    assert (length, passed.fed) == (7, 3)
    torch.testing.assert_close(passed.logits[0], fresh(model, ids, 0, 1), atol=2e-5, rtol=1e-4)
    assert all(torch.equal(old, layer.keys) for old, layer in zip(before, mine.layers, strict=True))
    write_cache(runner.cache, mine, length)
    model(torch.tensor([ids[7:]]), **{GENERATION_CACHE: reference})
    for extended, plain in zip(mine.layers, reference.layers, strict=True):
        assert extended.get_seq_length() == plain.get_seq_length()
        torch.testing.assert_close(extended.keys, plain.keys, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(extended.values, plain.values, atol=2e-5, rtol=1e-4)


def test_rows_are_kept_in_the_order_asked_for() -> None:
    cache = RollbackCache()
    states = torch.arange(3.0).reshape(3, 1, 1, 1).expand(3, 1, 4, 2)
    cache.update(states, states, 0)
    cache.keep_rows([2, 0])
    assert cache.layers[0].keys[:, 0, 0, 0].tolist() == [2.0, 0.0]
    cache.update(states[:2], states[:2], 0)
    assert cache.length == 8


def test_realigning_moves_each_row_to_the_right_edge() -> None:
    cache = RollbackCache()
    states = torch.arange(10.0).reshape(2, 1, 5, 1)
    cache.update(states, states, 0)
    # Row 0 fills 5 columns and keeps 2; row 1 fills the last 4 and keeps all of them.
    assert cache.realign([5, 4], [2, 4]) == 4
    assert cache.layers[0].keys[0, 0, -2:, 0].tolist() == [0.0, 1.0]
    assert cache.layers[0].keys[1, 0, :, 0].tolist() == [6.0, 7.0, 8.0, 9.0]


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
@settings(deadline=None, derandomize=True)
def test_common_prefix(left: list[int], right: list[int]) -> None:
    expected = 0
    while expected < min(len(left), len(right)) and left[expected] == right[expected]:
        expected += 1
    assert common_prefix(left, right) == expected
    assert common_prefix(left + right, left) == len(left)


def test_positions_without_ids_are_not_shown() -> None:
    context = Context([[EMBEDDED, EMBEDDED, 5]], Prompt(2, None, torch.arange(2)[None], None, hidden=2))
    assert context.visible(0) == [5]
    assert context.extended([[6]]).visible(0) == [5, 6]
    assert context.ids == [[EMBEDDED, EMBEDDED, 5]]


def test_transformers_own_operations_on_a_layer() -> None:
    """They set keys and values from outside; what comes after goes on from there."""
    cache = RollbackCache()
    states = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    cache.update(states, -states, 0)
    layer = cache.layers[0]
    layer.crop(-2)
    assert torch.equal(layer.keys, states[:, :, :3])
    assert torch.equal(layer.values, -states[:, :, :3])
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    wanted = states[[1, 1, 0, 0], :, :3]
    assert torch.equal(layer.keys, wanted)
    layer.batch_select_indices(torch.tensor([0, 2]))
    keys, values = cache.update(states[:, :, 3:4], -states[:, :, 3:4], 0)
    assert torch.equal(keys, torch.cat([states[[1, 0], :, :3], states[:, :, 3:4]], 2))
    assert torch.equal(values, -keys)
    assert cache.length == 4
    layer.reset()
    assert cache.length == 0
    assert layer.keys is None


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_moved_by_as_much_as_each_needs(contiguous: bool, dtype: torch.dtype) -> None:
    """To the right, to the left, not at all, all of it and nothing; every other column stays as it was."""
    batch, heads, width, size = 5, 2, 9, 3
    cache = RollbackCache()
    states = torch.arange(2 * batch * heads * width * size).reshape(2, batch, heads, width, size).to(dtype)
    cache.update(states[0].clone(), states[1].clone(), 0)
    layer = cache.layers[0]
    if not contiguous:
        for name in ("_key_buffer", "_value_buffer"):
            setattr(layer, name, getattr(layer, name).transpose(1, 2).contiguous().transpose(1, 2))
    lengths, keep = [9, 7, 6, 8, 4], [6, 7, 4, 0, 4]
    assert cache.realign(lengths, keep) == 7 == cache.length
    for row, (have, left) in enumerate(zip(lengths, keep, strict=True)):
        for held, before in zip((layer.keys, layer.values), states[:, row], strict=True):
            assert torch.equal(held[row, :, 7 - left :], before[:, width - have : width - have + left])
            assert torch.equal(held[row, :, : 7 - left], before[:, : 7 - left])
