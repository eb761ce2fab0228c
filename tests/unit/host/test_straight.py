# SPDX-License-Identifier: Apache-2.0
"""Passes of a fused model without its own forward: the same numbers to the last bit, or none of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaModel, MistralForCausalLM, PreTrainedModel

from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.cpu.packing import pack
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.proposal import TreeProposal
from hf_polyspec.host.generation import CHOOSES_HIDDEN_STATES
from hf_polyspec.host.moments import one_moment
from hf_polyspec.host.ragged import RaggedRunner
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.host.straight import Straight
from hf_polyspec.telemetry.counters import LevelStats

if not compiles():
    pytest.skip("blocks are not fused here", allow_module_level=True)

Tiny = Callable[..., PreTrainedModel]
TEXT = [1 + 5 * place % 50 for place in range(24)]
TREE = TreeProposal([[3, 4, 5]], [[-1, -1, 0]], [[1, 1, 1]])


def packed(tiny: Tiny, family: str = "llama", **settings: Any) -> Any:
    """A model with blocks that are fused, in float32."""
    return pack(copy.deepcopy(tiny(family, num_hidden_layers=3, **settings)).eval())


@torch.no_grad()
def passes(model: Any, **record: Any) -> list[Any]:
    """A prompt, single columns, a draft of which half is rolled back, and a tree; twice, for what is tried first."""
    runner, stats = ModelRunner(model, "the target", record=record), LevelStats("the target", 0)
    found, ids = [], TEXT[:9]

    def context() -> Context:
        return Context([ids], Prompt(9, None, torch.arange(9)[None]))

    def run(draft: list[int]) -> None:
        passed = runner.run(context(), [draft], stats)
        found.append(passed.logits)
        found.extend(states for states in passed.output.hidden_states or () if states is not None)

    run([])
    for end in (10, 11, 12, 13):
        ids = TEXT[:end]
        run([])
    for end in (14, 16, 18):
        ids = TEXT[:end]
        run([7, 8, 9])
    for end in (20, 22):
        ids = TEXT[:end]
        passed = runner.run_tree(context(), TREE, stats)
        found.append(passed.logits)
        runner.keep_paths(passed, context(), TREE, [[0, 2]])
    return found


@torch.no_grad()
def passes_of_rows(model: Any) -> list[Any]:
    """Two rows, each with a region of its own: prompts, then drafts of unequal length."""
    runner, stats, found = RaggedRunner(model, "the target", rows=2), LevelStats("the target", 0), []
    prompt = Prompt(0, None, torch.full((2, 1), -1), rows=(0, 1), starts=(9, 6))
    for more in range(6):
        context = Context([TEXT[: 9 + more], TEXT[5 : 11 + more]], prompt)
        runner.asked = [True, True]
        passed = runner.run(context, [[7, 8], [9]] if more % 2 else [[], []], stats)
        found.extend(passed.logits[row, 0] for row in range(2))
    for more in (6, 7):
        context = Context([TEXT[: 9 + more], TEXT[5 : 11 + more]], prompt)
        tree = TreeProposal([[3, 4, 5], [6]], [[-1, -1, 0], [-1]], [[1, 1, 1], [1]])
        passed = runner.run_tree(context, tree, stats)
        found += [*passed.logits[0], *passed.logits[1, :2]]
        runner.keep_paths(passed, context, tree, [[0, 2], [0]])
    return found


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, kind: type = LlamaForCausalLM) -> Iterator[list[int]]:
    """Counts calls of a class's models, whose forward stays transformers' own."""
    calls: list[int] = []

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return torch.nn.Module.__call__(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "__call__", counting)
        yield calls


def same(found: list[Any], wanted: list[Any]) -> None:
    assert len(found) == len(wanted)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


RECORDS: list[Any] = [{}, {"output_hidden_states": True}]
if CHOOSES_HIDDEN_STATES:
    RECORDS.append({"output_hidden_states": [1, -1]})


WITHIN = pytest.mark.parametrize("within", [nullcontext, one_moment])


@WITHIN
@pytest.mark.parametrize("record", RECORDS)
def test_the_numbers_are_those_of_the_models_own_forward(
    tiny: Tiny, record: dict[str, Any], within: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed(tiny)
    with monkeypatch.context() as patched:
        patched.setattr(Straight, "__call__", lambda *_: None)
        wanted = passes(model, **record)
    with counted(monkeypatch) as calls, within():
        same(passes(model, **record), wanted)
        tried = len(calls)
        same(passes(model, **record), wanted)
        assert len(calls) == tried, "not even the prompt goes through the model's own forward"
    assert tried == 4, "each kind of pass is tried once"


@pytest.mark.parametrize("length", [1, 9, 65, 128, 512])
@torch.no_grad()
def test_a_prompt_is_one_task(tiny: Tiny, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds nothing and has no buffers yet; columns that follow find what they would after a slow pass."""
    from hf_polyspec.cpu.compiled import whole_stack

    model, sizes, run_blocks = packed(tiny), [], whole_stack.run_blocks
    ids = [1 + 7 * place % 40 for place in range(length + 3)]
    prompt = Prompt(length, None, torch.arange(length)[None])

    def read() -> list[Any]:
        runner, stats, found = ModelRunner(model, "the target"), LevelStats("the target", 0), []
        for end in (length, length + 1, length + 3):
            found.append(runner.run(Context([ids[:end]], prompt), [[]], stats).logits)
        return [*found, *(states for layer in runner.cache.layers for states in (layer.keys, layer.values))]

    with monkeypatch.context() as patched:
        patched.setattr(Straight, "__call__", lambda *_: None)
        wanted = read()
    same(read(), wanted)  # tried
    monkeypatch.setattr(whole_stack, "run_blocks", lambda *given: (sizes.append(given[2]), run_blocks(*given)))
    with counted(monkeypatch) as calls:
        same(read(), wanted)
    assert not calls
    assert sizes == [3, 3, 3], "all layers at once, in the first pass too"


@WITHIN
def test_rows_with_regions_of_their_own(tiny: Tiny, within: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(tiny)
    with monkeypatch.context() as patched:
        patched.setattr(Straight, "__call__", lambda *_: None)
        wanted = passes_of_rows(model)
    with counted(monkeypatch) as calls, within():
        same(passes_of_rows(model), wanted)
        tried = len(calls)
        same(passes_of_rows(model), wanted)
        assert len(calls) - tried < tried, "what was tried is not called again"


def test_a_hook_around_the_layers_is_called_once_a_pass(tiny: Tiny) -> None:
    model, calls = packed(tiny), []
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    passes(model)
    assert [calls.count(module) for module in (model.model.embed_tokens, model.model.norm, model.lm_head)] == [10] * 3


def test_a_forward_that_does_more_is_called(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(tiny)
    forward = LlamaModel.forward

    @functools.wraps(forward)  # looks like transformers' own
    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    plain = passes(model)
    monkeypatch.setattr(LlamaModel, "forward", scaled)
    for _ in range(2):
        for one, other in zip(passes(model), plain, strict=True):
            torch.testing.assert_close(one, 2 * other)


@pytest.mark.parametrize("kind", ["instance", "class", "hook", "training"])
def test_what_is_somebodys_own_is_called(tiny: Tiny, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(tiny)
    passes(model), passes(model)
    hooked: list[int] = []
    if kind == "hook":
        model.model.register_forward_hook(lambda *_: hooked.append(1))
    elif kind == "training":
        model.train()
    with counted(monkeypatch) as calls:
        if kind == "instance":
            model.forward = model.forward
        elif kind == "class":
            own = type(model)

            @functools.wraps(own.forward)
            def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
                return own.forward(self, *args, **kwargs)

            model.__class__ = type("Own", (own,), {"forward": forward})
        assert len(passes(model)) == len(calls)
    assert len(hooked) == (len(calls) if kind == "hook" else 0)


class _Mine(torch.nn.Module):
    """Somebody's, with a state."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x


@WITHIN
def test_a_module_of_somebodys_around_the_layers_is_called_once_a_pass(tiny: Tiny, within: Callable[[], Any]) -> None:
    model, mine = packed(tiny), _Mine()
    model.model.embed_tokens = torch.nn.Sequential(model.model.embed_tokens, mine)
    with within():
        passes(model)
    assert mine.calls == 10


def test_a_window_is_the_models_own_matter(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(tiny, "mistral", sliding_window=6)
    with counted(monkeypatch, MistralForCausalLM) as calls:
        passes(model)
        assert len(passes(model)) * 2 <= len(calls)
