# SPDX-License-Identifier: Apache-2.0
"""Blocks computed together give what they give one by one, to the last bit, in one task a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.host.cache import RollbackCache
from hf_polyspec.host.release import GENERATION_CACHE

if not compiles():
    pytest.skip("compiled functions do not run here", allow_module_level=True)

from stacked_blocks import DEPTH, IDS, Tiny, learned, packed_model, passes, run, same, together

from hf_polyspec.cpu import fused_stack, stack_plan
from hf_polyspec.cpu.compiled.samples import Samples

FORMS = ["float32", "bfloat16", "bfloat16, wide heads", "float16", "int8", "int8 bfloat16"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_same_numbers_to_the_last_bit(
    tiny: Tiny,
    form: str,
    rows: int,
    tasks: list[int],
    one_by_one: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = packed_model(tiny, form)
    wanted = one_by_one(lambda: passes(model, rows))
    assert set(tasks) == {1}
    tasks.clear()
    same(passes(model, rows), wanted)
    together(tasks)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks(tiny: Tiny, family: str, kind: torch.dtype, tasks: list[int], one_by_one: Callable[..., Any]) -> None:
    model = packed_model(tiny, family=family)
    seen = torch.rand(1, 1, 4, 44, generator=torch.Generator().manual_seed(2)) < 0.6
    seen[..., 0] = True
    mask = seen if kind is torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(kind).min)
    given = {"attention_mask": mask, "position_ids": torch.tensor([[40, 41, 41, 42]])}
    cache = learned(model)
    wanted = one_by_one(lambda: run(model, IDS[:1, 40:44], cache, **given))
    cache.shrink(40)
    plain = run(model, IDS[:1, 40:44], cache)
    cache.shrink(40)
    tasks.clear()
    assert torch.equal(run(model, IDS[:1, 40:44], cache, **given), wanted)
    assert tasks == [DEPTH]
    assert not torch.equal(plain, wanted)


def test_padded_rows(tiny: Tiny, tasks: list[int], one_by_one: Callable[..., Any]) -> None:
    model, mask = packed_model(tiny), torch.ones(3, 120, dtype=torch.long)
    mask[1, :7], mask[2, 3:22] = 0, 0
    wanted = one_by_one(lambda: passes(model, 3, mask))
    tasks.clear()
    same(passes(model, 3, mask), wanted)
    together(tasks)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_threads(tiny: Tiny, count: int, tasks: list[int]) -> None:
    model, before = packed_model(tiny), torch.get_num_threads()
    wanted = passes(model)
    tasks.clear()
    try:
        torch.set_num_threads(count)
        same(passes(model), wanted)
    finally:
        torch.set_num_threads(before)
    together(tasks)


def test_a_pass_is_one_task_from_the_second_on(tiny: Tiny, tasks: list[int]) -> None:
    model, cache = packed_model(tiny), RollbackCache()
    run(model, IDS[:1, :40], cache)
    assert tasks == [1] * DEPTH
    for end in range(41, 50):
        tasks.clear()
        run(model, IDS[:1, end - 1 : end], cache)
        assert tasks == [DEPTH]
    other = learned(model)
    tasks.clear()
    run(model, IDS[:1, 40:43], other)
    assert tasks == [DEPTH], "in another cache too"


def test_long_pieces_are_computed_block_by_block(tiny: Tiny, tasks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_stack, "_ROWS", 6)
    model = packed_model(tiny)
    cache = learned(model)
    for fed, wanted in ((6, [DEPTH]), (7, [1] * DEPTH)):
        tasks.clear()
        cache.shrink(40)
        run(model, IDS[:1, 40 : 40 + fed], cache)
        assert tasks == wanted


def test_memory_kept_for_shapes_is_limited(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_plan, "_ROWS_KEPT", 10)
    model = packed_model(tiny)
    cache, kept = learned(model), set()
    for fed in (1, 2, 3, 4, 5, 1):
        cache.shrink(40)
        run(model, IDS[:1, 40 : 40 + fed], cache)
        (plan,) = model.model.layers[0].forward.plans.values()
        kept.add(tuple(task.outputs[0].shape[1] for task in plan._own.__dict__.values()))
    assert max(map(sum, kept)) <= 10
    assert (1, 2, 3, 4) in kept


def test_what_is_kept_is_what_was_used_last(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of many lengths do not push out the few shapes of the passes between them."""
    monkeypatch.setattr(stack_plan, "_ROWS_KEPT", 24)
    model = packed_model(tiny)
    cache = learned(model)
    for fed in (2, 9, 2, 10, 2, 11, 2, 12):
        cache.shrink(40)
        run(model, IDS[:1, 40 : 40 + fed], cache)
        (plan,) = model.model.layers[0].forward.plans.values()
        kept = [task.outputs[0].shape[1] for task in plan._own.__dict__.values()]
        assert fed == 9 or 2 in kept
    assert kept == [2, 12]


@pytest.mark.parametrize("form", FORMS)
def test_another_shape_is_written_down_by_one_block(
    tiny: Tiny, form: str, one_by_one: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What differs between blocks is taken from the task of a shape that is known."""
    from hf_polyspec.cpu.compiled import whole_stack

    model = packed_model(tiny, form)
    cache, fed, stages = learned(model), [], whole_stack.block_stages

    def counted(*given: Any) -> Any:
        fed.append(given[0].shape[1])
        return stages(*given)

    monkeypatch.setattr(whole_stack, "block_stages", counted)

    def more(count: int) -> Tensor:
        cache.shrink(40)
        return run(model, IDS[:1, 40 : 40 + count], cache)

    wanted = [one_by_one(lambda count=count: more(count)) for count in (3, 7, 40)]
    for count, logits in zip((3, 7, 40), wanted, strict=True):
        assert torch.equal(more(count), logits)
    assert fed == [3, 7, 40], "that of one position was known"


@torch.no_grad()
def test_hidden_states_asked_for(tiny: Tiny, tasks: list[int], one_by_one: Callable[..., Any]) -> None:
    model = packed_model(tiny)
    cache = learned(model)

    def states() -> Any:
        cache.shrink(40)
        return model(IDS[:1, 40:43], **{GENERATION_CACHE: cache}, output_hidden_states=True).hidden_states

    wanted = one_by_one(states)
    tasks.clear()
    found = states()
    assert tasks == [DEPTH]
    kept = [state.clone() for state in found]
    states()  # what was given before stays as it is
    assert len(found) == DEPTH + 1
    for one, held, other in zip(found, kept, wanted, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(held, other)


def test_a_profile_shows_the_steps(tiny: Tiny, tasks: list[int]) -> None:
    model = packed_model(tiny)
    cache = learned(model)
    tasks.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        run(model, IDS[:1, 40:41], cache)
    assert not tasks
    run(model, IDS[:1, 41:42], cache)
    assert tasks == [DEPTH]


def test_samples() -> None:
    numbers = torch.arange(100)
    places = [(numbers.data_ptr(), 16), (numbers.data_ptr() + 400, 8), (numbers.data_ptr() + 792, 8)]
    samples = Samples(places)
    numbers[20] = -1
    assert samples.same()
    for place in (0, 1, 50, 99):
        before = int(numbers[place])
        numbers[place] = before + (1 << 60)
        assert not samples.same()
        numbers[place] = before
        assert samples.same()
    assert Samples([]).same()
