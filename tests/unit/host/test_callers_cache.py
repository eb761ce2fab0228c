# SPDX-License-Identifier: Apache-2.0
"""Caches that the caller brings: refused whole where they do not fit, and never left half written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import CodeType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import noisy, prompts, tiny
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hf_polyspec.errors import LevelError, RollbackError
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.host.cache import RollbackCache, RollbackLayer
from hf_polyspec.host.callers_cache import floor, read_cache, write_cache
from hf_polyspec.host.lending import borrow
from hf_polyspec.host.release import GENERATION_CACHE
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.levels.suffix import SuffixDrafter
from hf_polyspec.telemetry.counters import LevelStats
from tests.faults import interrupts

HELD, WIDTH, WINDOW = 12, 16, 5


@pytest.fixture(scope="module")
def three() -> PreTrainedModel:
    """Three layers."""
    return tiny(num_hidden_layers=3)


@pytest.fixture(scope="module")
def mixed() -> PreTrainedModel:
    """Windows in the first and the last of three layers."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return tiny("gemma3_text", num_hidden_layers=3, sliding_window=WINDOW, layer_types=kinds, head_dim=8)


@torch.no_grad()
def filled(model: PreTrainedModel, rows: int = 1, held: int = HELD, config: Any = None) -> DynamicCache:
    """The cache of the first columns of a prompt."""
    cache = DynamicCache(config=config or model.config)
    model(input_ids=prompts(rows, WIDTH)["input_ids"][:, :held], **{GENERATION_CACHE: cache})
    return cache


def contents(cache: Any) -> list[Any]:
    """Everything that is in a cache, layer by layer; of our own buffers, what counts of them."""

    def of_layer(layer: Any) -> dict[str, Any]:
        found = dict(vars(layer))
        if isinstance(layer, RollbackLayer):
            found |= {"_key_buffer": layer.keys, "_value_buffer": layer.values}
        return {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in found.items()}

    return [sorted(of_layer(layer).items()) for layer in cache.layers]


def equal(one: list[Any], other: list[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        return type(a) is type(b) and bool(a == b)

    return [[name for name, _ in layer] for layer in one] == [[name for name, _ in layer] for layer in other] and all(
        same(a, b) for left, right in zip(one, other, strict=True) for (_, a), (_, b) in zip(left, right, strict=True)
    )


def cut(layer: int, columns: int, *names: str) -> Callable[[DynamicCache], None]:
    def change(cache: DynamicCache) -> None:
        for name in names or ("keys", "values"):
            setattr(cache.layers[layer], name, getattr(cache.layers[layer], name)[:, :, :columns])

    return change


def of_all(change: Callable[[torch.Tensor], torch.Tensor], only: int | None = None) -> Callable[[DynamicCache], None]:
    def changed(cache: DynamicCache) -> None:
        for layer in cache.layers if only is None else [cache.layers[only]]:
            layer.keys, layer.values = change(layer.keys), change(layer.values)

    return changed


def refused(model: PreTrainedModel, cache: Any, words: list[str], passes: int = 0, **options: Any) -> None:
    """One sentence with these words, at most so many passes of the target before it, and the cache as it was."""
    before, list_before = contents(cache), list(cache.layers)
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(1))
    try:
        with pytest.raises(ValueError, match=words[0]) as raised:
            model.generate(
                **{**prompts(1, WIDTH), "max_new_tokens": 6, "do_sample": False, **options},
                **{GENERATION_CACHE: cache},
                assistant_models=[SuffixDrafter()],
            )
    finally:
        hook.remove()
    text = str(raised.value)
    assert "\n" not in text
    assert all(word in text for word in words), text
    assert len(seen) <= passes
    assert [id(layer) for layer in cache.layers] == [id(layer) for layer in list_before]
    assert equal(before, contents(cache))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_that_lost_columns(enabled, three, layer):
    cache = filled(three)
    cut(layer, 10)(cache)
    refused(three, cache, ["layer", "10", "12", "different numbers"])


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("layer", [0, 1])
def test_keys_and_values_that_are_not_as_many(enabled, three, name, layer):
    cache = filled(three)
    cut(layer, 9, name)(cache)
    refused(three, cache, [f"layer {layer}", "9", "12"] if name == "values" else ["layer", "9", "12"])


@pytest.mark.parametrize("columns", [0, 1, WINDOW - 2])
def test_a_window_that_is_not_full(enabled, mixed, columns):
    cache = filled(mixed)
    cut(2, columns)(cache)
    refused(mixed, cache, ["layer 2", str(columns), str(WINDOW - 1)])


@pytest.mark.parametrize("layer", [0, 2])
def test_a_layer_without_anything(enabled, three, layer):
    cache = filled(three)
    cache.layers[layer] = type(cache.layers[layer])()
    refused(three, cache, [f"layer {layer}", "no tokens"], passes=1)


def test_a_layer_too_few_and_one_too_many(enabled, three):
    cache = filled(three)
    cache.layers.pop()
    refused(three, cache, ["layer 2", "no tokens"], passes=1)
    cache = filled(three)
    cache.layers.append(copy.deepcopy(cache.layers[0]))
    refused(three, cache, ["layer 3", "target keeps no tokens"], passes=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_all(lambda states: states.repeat(3, 1, 1, 1)), ["3 rows", "1"]),
        (of_all(lambda states: states.repeat(2, 1, 1, 1), only=1), ["layer 1", "2 rows", "1"]),
        (of_all(lambda states: states.repeat(1, 2, 1, 1)), ["4 heads of 8", "2 heads of 8"]),
        # One head would be spread over all of them without a word.
        (of_all(lambda states: states[:, :1]), ["1 heads of 8", "2 heads of 8"]),
        (of_all(lambda states: states[..., :4], only=2), ["layer 2", "2 heads of 4", "2 heads of 8"]),
        (of_all(lambda states: states.bfloat16()), ["bfloat16", "float32"]),
        (of_all(lambda states: states.to("meta")), ["meta", "cpu"]),
    ],
    ids=["rows", "rows-of-a-layer", "heads", "one-head", "size", "dtype", "device"],
)
def test_what_another_model_or_batch_has_filled(enabled, three, change, words):
    cache = filled(three)
    change(cache)
    before = contents(cache)
    if "meta" in words:
        with pytest.raises(ValueError, match="meta"):
            three.generate(
                **prompts(1, WIDTH), max_new_tokens=2, **{GENERATION_CACHE: cache}, assistant_models=[SuffixDrafter()]
            )
        assert [name for layer in contents(cache) for name, _ in layer] == [n for layer in before for n, _ in layer]
        return
    refused(three, cache, words, passes=1)


def test_a_batch_that_is_repeated(enabled, three):
    refused(three, filled(three), ["1 rows", "prompt has 2"], num_return_sequences=2, do_sample=True)


@pytest.mark.parametrize("columns", [1, HELD - 4, HELD - 1])
def test_more_tokens_than_the_prompt(enabled, three, columns):
    short = {name: value[:, :columns] for name, value in prompts(1, WIDTH).items()}
    refused(three, filled(three), [str(HELD), str(columns), "more than"], **short)


def test_a_mask_for_other_columns(enabled, three):
    """A mask wider than the ids says that they are the new ones, and has to cover the cache too."""
    ids = prompts(1, WIDTH)["input_ids"][:, HELD:]
    mask = torch.ones(1, WIDTH + 3, dtype=torch.long)
    refused(three, filled(three), [str(WIDTH + 3), str(HELD), str(WIDTH)], input_ids=ids, attention_mask=mask)


def test_windows_narrower_than_the_models(enabled, mixed, three):
    narrow = copy.deepcopy(mixed.config)
    narrow.sliding_window = WINDOW - 2
    refused(mixed, filled(mixed, config=narrow), ["layer 0", "window of 3", f"window of {WINDOW}"])
    refused(mixed, DynamicCache(config=narrow), ["layer 0", "window of 3", f"window of {WINDOW}"])
    windows = tiny("mistral", num_hidden_layers=3, sliding_window=4).config
    refused(three, DynamicCache(config=windows), ["layer 0", "window of 4", "keeps all tokens"])


def test_a_window_that_has_seen_the_whole_prompt(enabled, mixed):
    """The last token's logits would need a column that is gone; without windows it is read again."""
    refused(mixed, filled(mixed, held=WIDTH), [f"all {WIDTH} tokens", "windows"])
    options = {**prompts(1, WIDTH), "max_new_tokens": 6, "do_sample": False}
    cache = DynamicCache()
    with torch.no_grad():
        mixed(input_ids=options["input_ids"], **{GENERATION_CACHE: cache})
    ours = mixed.generate(**options, **{GENERATION_CACHE: cache}, assistant_models=[SuffixDrafter()])
    assert ours.tolist() == mixed.generate(**options).tolist()


def test_other_forms_are_believed_where_the_model_makes_them(enabled):
    """Latent attention keeps keys and values of other sizes than the config lets expect."""
    from architectures import ARCHITECTURES

    case = next(case for case in ARCHITECTURES if case.model_type == "deepseek_v3")
    model = tiny(case.model_type, **case.settings)
    options = {**prompts(1, WIDTH), "max_new_tokens": 6, "do_sample": False}
    ours = model.generate(**options, **{GENERATION_CACHE: filled(model)}, assistant_models=[SuffixDrafter()])
    assert ours.tolist() == model.generate(**options).tolist()


# ---- what was never computed is never seen


def test_no_row_is_rolled_back_behind_what_windows_hold(mixed):
    cache, total = read_cache(filled(mixed, rows=2))
    assert (total, cache.floor) == (HELD, HELD)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(RollbackError, match=f"first {HELD}"):
        cache.realign([HELD, HELD], [HELD, HELD - 1])
    assert all(torch.equal(old, layer.keys) for old, layer in zip(before, cache.layers, strict=True))


def test_what_is_held_may_be_read_again(mixed):
    """A window that its owner let grow (`activate_past_recording`) can be rolled back by as much as it holds more."""
    cache = filled(mixed, held=WINDOW - 1)
    assert floor(cache) == 0
    if not hasattr(cache, "activate_past_recording"):
        return
    cache.activate_past_recording()
    ids = prompts(1, WIDTH)["input_ids"][:, WINDOW - 1 :]
    with torch.no_grad():
        mixed(input_ids=ids, **{GENERATION_CACHE: cache})
    assert floor(cache) == 0
    for layer in (cache.layers[0], cache.layers[2]):
        layer.keys, layer.values = layer.keys[:, :, 3:], layer.values[:, :, 3:]
    assert floor(cache) == 3 + WINDOW - 1


more = st.lists(st.integers(3, 47), min_size=1, max_size=6)
drafts = st.lists(st.integers(3, 47), max_size=6)


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(st.sampled_from([2, 3, 4, 7, HELD]), st.lists(st.tuples(more, drafts, more, drafts), min_size=1, max_size=5))
@torch.no_grad()
def test_rows_of_any_lengths_are_answered_as_without_the_cache(window, questions):
    """Windows down to two columns, drafts longer than they are, rows that advance and go back unequally."""
    model = WINDOWED[window]
    ids = prompts(2, HELD, seed=5)["input_ids"].clamp(min=3)
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, **{GENERATION_CACHE: cache})
    copied, _ = read_cache(cache)
    runner, stats = ModelRunner(model, "the target"), LevelStats("the target", 0)
    runner.adopt(copied, ids.tolist())
    about = Prompt(HELD, None, torch.arange(HELD).expand(2, -1))
    for more_a, draft_a, more_b, draft_b in questions:
        context = Context([ids[0].tolist() + more_a, ids[1].tolist() + more_b], about)
        passed = runner.run(context, [draft_a, draft_b], stats)
        assert passed.logits.shape[1] == 1 + max(len(draft_a), len(draft_b))
        for b, draft in enumerate((draft_a, draft_b)):
            whole = context.ids[b] + draft
            wanted = model(torch.tensor([whole])).logits[0, -len(draft) - 1 :]
            torch.testing.assert_close(passed.logits[b, : len(draft) + 1], wanted, atol=1e-4, rtol=1e-4)
            assert passed.read[b][: len(whole)] == whole


WINDOWED = {window: tiny("mistral", sliding_window=window) for window in (2, 3, 4, 7, HELD)}


@torch.no_grad()
def test_who_borrows_from_it_inherits_the_floor(mixed):
    lender, borrower = ModelRunner(mixed, "the target"), ModelRunner(noisy(mixed, 0.01), "a copy")
    copied, total = read_cache(filled(mixed, rows=2))
    ids = [row[:total] for row in prompts(2, WIDTH)["input_ids"].tolist()]
    lender.adopt(copied, ids)
    borrower.borrows_from = 1
    assert borrow(borrower, lender, ids) == HELD
    assert borrower.cache.floor == HELD
    late = ModelRunner(noisy(mixed, 0.01), "another copy")
    late.borrows_from = 1
    about = Prompt(HELD, None, torch.arange(HELD).expand(2, -1))
    stats = LevelStats("a copy", 0)
    late.run(Context(ids, about), [[], []], stats)
    lender.run(Context([[*row, 5, 6, 7] for row in ids], about), [[], []], stats)
    assert borrow(late, lender, [[*row, 5, 6, 7] for row in ids]) == 3
    assert late.cache.floor == 0, "it has read all that its windows may see"


# ---- written back whole or not at all


class Counting(DynamicCache):
    """A caller's own kind of cache, which counts what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.updates += 1
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def early(model: PreTrainedModel) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=20)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    return cache


KINDS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "empty": lambda model: DynamicCache(),
    "empty of a config": lambda model: DynamicCache(config=model.config),
    "filled": lambda model: filled(model, rows=2),
    "filled without windows": lambda model: filled(model, rows=2, config=tiny(num_hidden_layers=3).config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=20),
    "static with its tensors": early,
    "one of ours": lambda model: RollbackCache(),
    "the caller's own": lambda model: Counting(),
}


@torch.no_grad()
def computed(model: PreTrainedModel, cache: Any) -> tuple[RollbackCache, int]:
    """What a chain would have computed from a cache on."""
    start = int(cache.get_seq_length())
    made = read_cache(cache)[0] if start else RollbackCache()
    ids = prompts(2, WIDTH)["input_ids"][:, start:]
    model(input_ids=ids, **{GENERATION_CACHE: made})
    return made, start


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_extended_as_a_pass_would(mixed, kind):
    mine, theirs = KINDS[kind](mixed), KINDS[kind](mixed)
    source, start = computed(mixed, mine)
    if type(mine) is Counting:
        theirs.updates = 0
    kept = [vars(layer).get("keys") for layer in mine.layers if kind == "static with its tensors"]
    layers = list(mine.layers)
    write_cache(source, mine, start)
    mixed(input_ids=prompts(2, WIDTH)["input_ids"][:, start:], **{GENERATION_CACHE: theirs})
    for extended, plain in zip(mine.layers, theirs.layers, strict=True):
        assert int(extended.get_seq_length()) == int(plain.get_seq_length())
        torch.testing.assert_close(extended.keys, plain.keys, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(extended.values, plain.values, atol=2e-5, rtol=1e-4)
    assert all(new is old for new, old in zip(mine.layers, layers, strict=False)), "layers stay the objects they were"
    assert all(layer.keys is old for layer, old in zip(mine.layers, kept, strict=False)), "compiled code knows them"
    assert getattr(mine, "updates", 3) == 3
    more = torch.tensor([[7], [9]])
    next_ones = [mixed(input_ids=more, **{GENERATION_CACHE: cache}).logits for cache in (mine, theirs)]
    torch.testing.assert_close(next_ones[0], next_ones[1], atol=1e-4, rtol=1e-4)


def writes_back(code: CodeType) -> bool:
    return "callers_cache" in code.co_filename or "cache_utils" in code.co_filename


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ctrl_c_at_any_instruction_leaves_it_as_it_was_or_complete(mixed, kind):
    start = KINDS[kind](mixed)
    source, at = computed(mixed, start)
    before, whole = contents(start), copy.deepcopy(start)
    write_cache(copy.deepcopy(source), whole, at)
    after = contents(whole)
    assert not equal(before, after)
    state: dict[str, Any] = {}
    outcomes: list[bool] = []

    def prepare() -> None:
        state.update(cache=copy.deepcopy(start), source=copy.deepcopy(source))

    def check() -> None:
        found = contents(state["cache"])
        assert equal(found, before) or equal(found, after), "half written"
        outcomes.append(equal(found, after))

    interrupts.interrupt_each(
        lambda: write_cache(state["source"], state["cache"], at),
        check,
        prepare=prepare,
        where=writes_back,
        opcodes=True,
    )
    assert outcomes[0] is False
    assert outcomes[-1] is True
    assert outcomes == sorted(outcomes), "once complete it stays so"
    assert len(outcomes) > 200


def test_ctrl_c_anywhere_in_a_call(enabled, mixed):
    """At every 37th line that the package runs."""
    start, arguments = filled(mixed, rows=2), {**prompts(2, WIDTH), "max_new_tokens": 5, "do_sample": False}
    before, state = contents(start), {"cache": copy.deepcopy(start)}

    def call() -> None:
        mixed.generate(**arguments, **{GENERATION_CACHE: state["cache"]}, assistant_models=[SuffixDrafter(min_match=1)])

    call()
    after = contents(state["cache"])
    outcomes: list[bool] = []

    def check() -> None:
        found = contents(state["cache"])
        assert equal(found, before) or equal(found, after), "half written"
        outcomes.append(equal(found, after))

    interrupts.interrupt_each(call, check, 37, prepare=lambda: state.update(cache=copy.deepcopy(start)), first=11)
    assert outcomes == sorted(outcomes)
    assert outcomes[0] is False
    assert len(outcomes) > 100


@torch.no_grad()
@pytest.mark.parametrize("kind", ["filled", "static with its tensors", "empty"])
def test_what_fails_in_the_step_itself_is_taken_back(mixed, kind, monkeypatch):
    from hf_polyspec.host import callers_cache

    cache = KINDS[kind](mixed)
    source, at = computed(mixed, cache)
    before, exchange = contents(cache), callers_cache._exchange

    def failing(*caches: Any) -> Any:
        steps, back = exchange(*caches)
        return [*steps[:-1], callers_cache.partial(divmod, 1, 0), steps[-1]], back

    monkeypatch.setattr(callers_cache, "_exchange", failing)
    with pytest.raises(ZeroDivisionError):
        write_cache(source, cache, at)
    assert equal(before, contents(cache))


@torch.no_grad()
def test_a_cache_without_room(mixed):
    cache = StaticCache(config=mixed.config, max_cache_len=WIDTH - 1)
    before = contents(cache)
    with pytest.raises(ValueError, match=f"room for {WIDTH - 1} tokens, and the text has {WIDTH}"):
        write_cache(computed(mixed, DynamicCache())[0], cache, 0)
    assert equal(before, contents(cache))


# ---- what fails earlier in a call


class Stop(Exception):
    pass


def fail_late(calls: int, error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        nonlocal calls
        calls -= 1
        if calls <= 0:
            raise error
        return torch.zeros(2, dtype=torch.bool)

    return call


class Streamer:
    def __init__(self, calls: int, error: BaseException) -> None:
        self.put = fail_late(calls, error)

    def end(self) -> None: ...


@pytest.mark.parametrize("error", [Stop("no"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
@pytest.mark.parametrize("where", ["criterion", "streamer", "processor", "target", "assistant"])
def test_what_fails_in_between_leaves_the_cache_alone(enabled, mixed, where, error):
    cache = filled(mixed, rows=2)
    before = contents(cache)
    drafter = noisy(mixed, 0.03)
    options: dict[str, Any] = {}
    hook = None
    if where == "criterion":
        options["stopping_criteria"] = [fail_late(3, error)]
    elif where == "streamer":
        options["streamer"] = Streamer(3, error)
    elif where == "processor":
        options["logits_processor"] = [
            lambda ids, scores: fail_late(0, error)() if ids.shape[1] > WIDTH + 2 else scores
        ]
    else:
        model, call = mixed if where == "target" else drafter, fail_late(2, error)

        def late() -> None:
            call()

        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: late())
    try:
        with pytest.raises((Stop, KeyboardInterrupt, LevelError)):
            mixed.generate(
                **prompts(2, WIDTH),
                max_new_tokens=12,
                do_sample=False,
                **{GENERATION_CACHE: cache},
                assistant_models=[drafter],
                **options,
            )
    finally:
        if hook is not None:
            hook.remove()
    assert equal(before, contents(cache))
