# SPDX-License-Identifier: Apache-2.0
"""Passes that say nothing but the likeliest ids: those that all of a pass would have shown, or none."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable
from contextlib import nullcontext
from threading import Event, Thread
from typing import Any
from weakref import ref

import pytest
import torch
from packed_models import MODELS, Tiny, packed

from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.passes import Picks
from hf_polyspec.host.cache import RollbackCache
from hf_polyspec.host.moments import no_moment, one_moment, this_moment
from hf_polyspec.host.picking import picks
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.host.straight import MOST
from hf_polyspec.telemetry.counters import LevelStats

if not compiles():
    pytest.skip("blocks are not fused here", allow_module_level=True)

from hf_polyspec.cpu.angles import TABLE, Angles
from hf_polyspec.cpu.compiled.ends import SLACK
from hf_polyspec.cpu.whole_pass import WholePass

KNOWN, WIDTH = 48, 7


class Both:
    """One text read in two ways: by all of a pass, and by its likeliest ids where those can be had.

    Args:
        model: packed; first: position of the prompt's first id.
    """

    def __init__(self, model: Any, first: int = 0, known: int = KNOWN) -> None:
        self.dice, self.known, self.stats = random.Random(0), known, LevelStats("the target", 0)
        self.fast, self.slow = ModelRunner(model, "the target"), ModelRunner(model, "the target")
        self.prompt = Prompt(WIDTH, None, (first + torch.arange(WIDTH))[None])
        self.ids = [self.dice.randrange(KNOWN) for _ in range(WIDTH)]
        self.picked: list[bool] = []

    def whole(self, runner: ModelRunner, ids: list[int], draft: list[int]) -> torch.Tensor:
        logits = runner.run(Context([ids], self.prompt), [draft], self.stats).logits[0]
        return logits[:, : self.known]

    def draft(self, right: int, wrong: int) -> list[int]:
        """So many tokens that are right, and then some that are made up."""
        draft: list[int] = []
        for _ in range(right):
            draft.append(int(self.whole(self.slow, self.ids + draft, [])[-1].argmax()))
        return draft + [self.dice.randrange(KNOWN) for _ in range(wrong)]

    def go_on(self, right: int = 0, wrong: int = 0) -> Picks | None:
        """One check, which must come to the same both ways; the text goes on as far as the draft was right."""
        draft = self.draft(right, wrong)
        wanted = self.whole(self.slow, self.ids, draft)
        found = picks(self.fast, Context([self.ids], self.prompt), [draft], self.stats, self.known)
        said = wanted.argmax(-1).tolist()
        if found is None:
            assert self.whole(self.fast, self.ids, draft).argmax(-1).tolist() == said
        else:
            assert found.tokens == [said]
            best, second = wanted.topk(2).values.float().unbind(-1)
            torch.testing.assert_close(torch.tensor(found.leads[0]), best - second, rtol=0, atol=self._rounding(best))
            assert found.read == [self.ids + draft] == self.fast.memo
            assert self.fast.cache.length == len(found.read[0])
        self.picked.append(found is not None)
        self.ids = self.ids + said[: right + 1]
        return found

    def _rounding(self, best: torch.Tensor) -> float:
        return SLACK[self.fast.model.dtype] * float(best.abs().max())

    def settle(self) -> None:
        """Each kind of pass is tried, and the likeliest ids can be had."""
        for right, wrong in ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1), (0, 0)):
            self.go_on(right, wrong)
        assert self.picked[-1]


DRAFTS = [(0, 0), (2, 0), (0, 3), (1, 2), (0, 0), (5, 0), (0, 6), (3, 4), (0, 0), (0, 1)]


@torch.no_grad()
@pytest.mark.parametrize("within", [nullcontext, one_moment])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_drafts_right_and_wrong(tiny: Tiny, make: Callable[[Tiny], Any], within: Callable[[], Any]) -> None:
    text = Both(make(tiny))
    with within():
        text.settle()
        for right, wrong in DRAFTS * 3:
            text.go_on(right, wrong)
    assert sum(text.picked) >= 30


@torch.no_grad()
def test_a_cache_that_is_widened_goes_on(tiny: Tiny) -> None:
    text = Both(packed(tiny, max_position_embeddings=1024))
    with one_moment():
        text.settle()
        room = text.fast.cache.layers[0]._key_buffer.shape[2]
        while len(text.ids) < room + 20:
            text.go_on(20)
    assert text.picked.count(False) < 10
    assert text.picked[-1]
    assert text.fast.cache.layers[0]._key_buffer.shape[2] > room


@torch.no_grad()
@pytest.mark.parametrize("known", [KNOWN - 5, KNOWN, KNOWN + 5])
def test_vocabularies_of_other_sizes(tiny: Tiny, known: int) -> None:
    text = Both(packed(tiny), known=known)
    text.settle()
    for right, wrong in DRAFTS:
        text.go_on(right, wrong)
    assert all(text.picked[-10:])


@torch.no_grad()
@pytest.mark.parametrize("first", [-3000, -8, 1020, 100_000, 2**31])
def test_positions_that_a_caller_gives(tiny: Tiny, first: int) -> None:
    text = Both(packed(tiny), first)
    text.settle()
    for right, wrong in DRAFTS:
        text.go_on(right, wrong)
    assert all(text.picked[-10:])


@torch.no_grad()
@pytest.mark.parametrize("fresh", [False, True])
def test_a_default_device_is_for_what_a_caller_makes(tiny: Tiny, fresh: bool) -> None:
    text = Both(packed(tiny))
    text.settle()
    wanted = text.whole(text.slow, text.ids, [3, 4, 5, 6]).argmax(-1).tolist()
    if fresh:
        text.fast._forwarding.straight._whole = None
    with torch.device("meta"):
        found = picks(text.fast, Context([text.ids], text.prompt), [[3, 4, 5, 6]], text.stats, KNOWN)
    assert found is not None
    assert found.tokens == [wanted]


@torch.no_grad()
def test_what_another_model_took_in_is_followed(tiny: Tiny) -> None:
    """A cache that was adopted, rolled back and read on from elsewhere."""
    model = packed(tiny)
    text, other = Both(model), Both(model)
    text.settle()
    other.whole(other.slow, [*text.ids, 5, 6, 7], [])
    with one_moment():
        text.go_on()
        text.fast.adopt(other.slow.cache, [list(other.slow.memo[0])])
        text.go_on(1, 1)
        assert text.picked[-1]
        text.fast.cache.shrink(len(text.ids) - 3)
        text.fast.memo = [text.ids[:-3]]
        text.go_on(0, 2)
    assert text.picked[-1]


def _times(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(-1.5)


def _unseen(tensor: torch.Tensor) -> None:
    tensor.data.mul_(-1.5)


def _other(module: Any) -> None:
    module.weight = torch.nn.Parameter(module.weight.detach() * -1.5)


def _of_rotary(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.model.rotary_emb.inv_freq
    return found


CHANGES: dict[str, Callable[[Any], object]] = {
    "embedding in place": lambda model: _times(model.model.embed_tokens.weight),
    "embedding unseen": lambda model: _unseen(model.model.embed_tokens.weight),
    "embedding replaced": lambda model: _other(model.model.embed_tokens),
    "norm unseen": lambda model: _unseen(model.model.norm.weight[:4]),
    "norm replaced": lambda model: _other(model.model.norm),
    "norm's epsilon": lambda model: setattr(model.model.norm, "variance_epsilon", 3.0),
    "head in place": lambda model: _times(model.lm_head.weight[7:]),
    "head unseen": lambda model: _unseen(model.lm_head.weight),
    "head replaced": lambda model: _other(model.lm_head),
    "angles in place": lambda model: _times(_of_rotary(model)),
    "angles unseen": lambda model: _unseen(_of_rotary(model)),
    "angles scaled": lambda model: setattr(model.model.rotary_emb, "attention_scaling", 0.5),
    "a block": lambda model: _unseen(model.model.layers[1].mlp.down_proj.weight),
    "a block's norm": lambda model: _unseen(model.model.layers[2].input_layernorm.weight),
    "threads": lambda _: torch.set_num_threads(torch.get_num_threads() + 1),
    "no more packed": lambda model: [layer.__dict__.pop("forward") for layer in model.model.layers],
    "ids that count": lambda model: setattr(model.config, "tie_word_embeddings", True),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_between_two_passes_is_seen(tiny: Tiny, change: Callable[[Any], object]) -> None:
    model, threads = packed(tiny), torch.get_num_threads()
    text = Both(model)
    text.settle()
    try:
        change(model)
        for right, wrong in ((0, 0), (1, 1), (0, 2), (2, 0)):
            # What is in the caches was computed before: both hold the same.
            text.slow.adopt(copy.deepcopy(text.fast.cache), [list(text.fast.memo[0])])
            text.go_on(0, right + wrong)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_between_two_texts_is_seen(tiny: Tiny, change: Callable[[Any], object]) -> None:
    model, threads = packed(tiny), torch.get_num_threads()
    Both(model).settle()
    try:
        change(model)
        text = Both(model)
        for right, wrong in ((0, 0), (0, 0), (1, 1), (0, 2), (2, 0), (0, 0)):
            text.go_on(right, wrong)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
@pytest.mark.parametrize("moment", ["before the blocks", "behind the blocks"])
def test_a_text_inside_of_a_pass_of_another(tiny: Tiny, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal's handler or a finaliser may begin one, in the same thread."""
    from hf_polyspec.cpu.compiled.ends import EndTask
    from hf_polyspec.cpu.compiled.whole_stack import StackTask

    model = packed(tiny)
    outer, inner = Both(model), Both(model)
    inner.ids = inner.ids[::-1]
    for text in (outer, inner, inner, inner):  # of other lengths
        text.settle()
    kind: Any = StackTask if moment == "before the blocks" else EndTask
    name, nested = ("go_on" if kind is StackTask else "run"), []
    whole = getattr(kind, name)

    def interrupted(self: Any, *given: Any) -> None:
        if not nested:
            nested.append(1)
            with no_moment():
                inner.go_on(0, len(outer.picked) % 2)
        whole(self, *given)

    for draft in (0, 1, 0, 1):
        nested.clear()
        with monkeypatch.context() as patched:
            patched.setattr(kind, name, interrupted)
            outer.go_on(0, draft)
        assert nested
        assert outer.picked[-1]


@torch.no_grad()
def test_another_thread_that_asks_changes_nothing(tiny: Tiny) -> None:
    model = packed(tiny)
    text = Both(model)
    text.settle()
    whole = text.fast._forwarding.straight._whole
    found: list[bool] = []

    def ask() -> None:
        with one_moment():
            moment = this_moment()
            assert moment is not None
            found.append(whole.same(whole._around, KNOWN, moment))

    thread = Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [False]
    assert whole.alike
    text.go_on()
    assert text.picked[-1]


@torch.no_grad()
def test_what_was_replaced_is_not_kept_by_a_thread_that_rests(tiny: Tiny) -> None:
    model, begun, over = packed(tiny), Event(), Event()

    def read() -> None:
        with torch.no_grad():
            Both(model).settle()
        begun.set()
        over.wait(60)

    thread = Thread(target=read)
    thread.start()
    try:
        assert begun.wait(60)
        plan = next(iter(model.model.layers[0].forward.plans.values()))
        old = ref(plan._whole[thread]._found[0])
        _other(model.lm_head)
        Both(model).settle()
        gc.collect()
        assert old() is None
    finally:
        over.set()
        thread.join()


@torch.no_grad()
def test_what_one_text_has_made_the_next_one_takes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made, build = [], WholePass.__init__

    def counted(self: WholePass, *given: Any) -> None:
        made.append(self)
        build(self, *given)

    monkeypatch.setattr(WholePass, "__init__", counted)
    model = packed(tiny)
    first, second = Both(model), Both(model)
    first.settle()
    for text in (second, first, second, Both(model)):  # one goes on while another does, too
        text.settle()
    assert len(made) == 1
    Both(model, known=KNOWN - 5).settle()
    assert len(made) == 2
    _other(model.model.norm)
    for _ in range(2):
        Both(model).settle()
    assert len(made) == 3


@torch.no_grad()
@pytest.mark.parametrize(
    "place", ["model.embed_tokens", "model.layers.1", "model.layers.0.mlp", "model.norm", "lm_head"]
)
@pytest.mark.parametrize("before", [False, True])
def test_hooks_are_called(tiny: Tiny, place: str, before: bool) -> None:
    text, calls = Both(packed(tiny)), []
    text.settle()
    module = text.fast.model.get_submodule(place)
    add = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = add(lambda *_: calls.append(1))
    assert picks(text.fast, Context([text.ids], text.prompt), [[]], text.stats, KNOWN) is None
    text.fast.run(Context([text.ids], text.prompt), [[]], text.stats)
    assert calls == [1]
    handle.remove()
    text.go_on()
    text.go_on()
    assert text.picked[-1]


@torch.no_grad()
def test_a_forward_in_the_place_of_a_layers_is_called(tiny: Tiny) -> None:
    text, calls = Both(packed(tiny)), []
    text.settle()
    layer = text.fast.model.model.layers[1]
    fused = layer.forward

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return fused(*args, **kwargs)

    layer.forward = mine
    text.go_on()
    assert not text.picked[-1]
    assert calls


@torch.no_grad()
def test_where_more_is_asked_or_something_is_in_the_way(tiny: Tiny) -> None:
    text = Both(packed(tiny))
    text.settle()
    given, runner = Context([text.ids], text.prompt), text.fast
    held = runner.cache.length

    def none(context: Context = given, draft: list[int] | None = None) -> bool:
        found = picks(runner, context, [draft or []], text.stats, KNOWN)
        return found is None and runner.cache.length == held

    with torch.enable_grad():
        assert none()
    with runner.recording({"output_hidden_states": True}):
        assert none()
    mask = torch.ones(1, WIDTH, dtype=torch.long)
    assert none(Context([text.ids], Prompt(WIDTH, mask, text.prompt.positions)))
    assert none(Context([text.ids], Prompt(WIDTH, None, text.prompt.positions, hidden=2)))
    assert none(draft=[5, -1, 7])
    assert none(draft=[5, KNOWN, 7])
    assert none(Context([[9, *text.ids]], text.prompt)), "another prompt"
    runner.model.train()
    assert none()
    runner.model.eval()
    text.go_on()
    text.go_on()
    assert text.picked[-1]
    given, held = Context([text.ids], text.prompt), runner.cache.length
    with torch.autocast("cpu", torch.bfloat16):
        assert none(given)


@torch.no_grad()
def test_logits_that_are_no_numbers(tiny: Tiny) -> None:
    text = Both(packed(tiny))
    text.settle()
    text.fast.model.lm_head.weight[5] = float("nan")
    before = [list(row) for row in text.fast.memo]
    assert picks(text.fast, Context([text.ids], text.prompt), [[3]], text.stats, KNOWN) is None
    assert text.fast.memo == before
    assert text.whole(text.fast, text.ids, [3])[:, 5].isnan().all()


@torch.no_grad()
def test_a_text_that_goes_on_in_another_thread(tiny: Tiny) -> None:
    """What is written to belongs to one thread, which reads another text meanwhile."""
    model = packed(tiny)
    text, other = Both(model), Both(model)
    text.settle()
    whole = text.fast._forwarding.straight._whole
    went_on = Thread(target=lambda: torch.no_grad()(text.go_on)())
    went_on.start()
    went_on.join()
    assert text.fast._forwarding.straight._whole is not whole
    other.settle()


@torch.no_grad()
def test_ids_within_rounding_of_each_other_are_told_apart_by_the_models_own_norm(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed(tiny, dtype=torch.bfloat16)
    text = Both(model)
    text.settle()
    weight = model.lm_head.weight
    weight[1:] = weight[:1]  # all alike
    text.go_on()
    text.go_on()
    assert text.picked[-1]
    asked: list[int] = []
    look, norm = WholePass._logits, WholePass._normed
    monkeypatch.setattr(WholePass, "_logits", lambda self, normed: (asked.append(len(normed)), look(self, normed))[1])
    text.go_on(0, 2)
    assert text.picked[-1]
    assert asked == [], "where no number is rounded otherwise, logits are the same"

    def otherwise(self: Any, states: torch.Tensor) -> torch.Tensor:
        normed = norm(self, states).clone()
        normed[1, 3] *= 1 + 2**-7
        return normed

    monkeypatch.setattr(WholePass, "_normed", otherwise)
    text.go_on(0, 2)
    assert text.picked[-1]
    assert asked == [1], "of the one position that was"
    monkeypatch.setattr(WholePass, "_normed", norm)
    found = picks(text.fast, Context([text.ids], text.prompt), [[]], text.stats, KNOWN, exact=False)
    assert found is not None
    assert found.tokens == [[0]]
    assert asked == [1]


@torch.no_grad()
def test_what_does_not_agree_is_not_asked_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's own modules around its blocks are asked once, whatever they look like."""
    text = Both(packed(tiny))
    tried: list[int] = []
    look = WholePass._logits

    def other(self: Any, states: torch.Tensor) -> torch.Tensor:
        tried.append(1)
        return 2 * look(self, states)

    monkeypatch.setattr(WholePass, "_logits", other)
    for right, wrong in DRAFTS:
        text.go_on(right, wrong)
    assert not any(text.picked)
    assert tried == [1]


def test_a_cache_of_another_depth_is_no_room() -> None:
    cache, moment = RollbackCache(), object()
    for index in range(3):
        cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), index)
    new, like = (1, 2, 1, 4), torch.zeros(1)
    assert cache.rooms_from(5, 2, new, like, moment) is None
    found = cache.rooms_from(4, 3, new, like, moment)
    assert found is not None
    assert found.start == 4
    assert cache.rooms_from(5, 3, new, like, moment) is found
    with no_moment():
        cache.layers[2].keys = torch.zeros(1, 2, 5, 4)
    assert cache.rooms_from(5, 3, new, like, object()) is None


@torch.no_grad()
def test_the_memory_of_weights_can_be_taken_away_and_given_back_as_before(tiny: Tiny) -> None:
    """As those do that gather weights for a call and let them go."""
    text = Both(packed(tiny))
    text.settle()
    weight, rotary = text.fast.model.get_input_embeddings().weight, text.fast.model.model.rotary_emb.inv_freq
    for held in (weight, rotary):
        kept, storage = held.clone(), held.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        if held is weight:
            given = Context([text.ids], text.prompt)
            with one_moment():
                assert picks(text.fast, given, [[]], text.stats, KNOWN) is None
        storage.resize_(size)
        held.copy_(kept)
    text.go_on()
    text.go_on()
    text.go_on()
    assert text.picked[-1]


@torch.no_grad()
def test_angles_that_a_module_keeps_stay_its_own() -> None:
    kept = torch.randn(2, 1, TABLE + MOST, 4)
    angles = Angles(lambda like, position_ids: kept.unbind(), torch.zeros(1, 1, 4))
    cos, sin = angles.at(range(3, 7))
    assert cos.tolist() == kept[0, 0, 3:7].view(torch.int32).tolist()
    assert sin.tolist() == kept[1, 0, 3:7].view(torch.int32).tolist()
    before = cos.copy()
    kept.zero_()
    assert cos.tolist() == before.tolist()
    kept.untyped_storage().resize_(0)
