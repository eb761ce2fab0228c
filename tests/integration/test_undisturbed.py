# SPDX-License-Identifier: Apache-2.0
"""What is packed is looked through in every pass wherever somebody else's code may have run since the last one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import prompts, tiny
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer, TextIteratorStreamer, TextStreamer

import hf_polyspec
from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.cpu.packing import pack
from hf_polyspec.engine.crew import ROUNDS
from hf_polyspec.host.moments import one_moment
from hf_polyspec.host.straight import Straight

if not compiles():
    pytest.skip("nothing is packed in this way here", allow_module_level=True)

from hf_polyspec.cpu.watch import Watch

TOKENS = 12
GREEDY: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": False}


@pytest.fixture
def model() -> PreTrainedModel:
    return pack(copy.deepcopy(tiny("llama", num_hidden_layers=3, initializer_range=0.3)))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every look at what is packed."""
    found: list[int] = []
    original = Watch._same_modules
    monkeypatch.setattr(Watch, "_same_modules", lambda self: found.append(1) or original(self))
    return found


class Changing:
    """Changes some weights when it is called for the sixth time."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0

    def change(self) -> None:
        self.calls += 1
        if self.calls == 6:
            with torch.no_grad():
                self.model.model.layers[1].mlp.down_proj.weight.mul_(-2)


class Streamer(Changing, BaseStreamer):
    def put(self, value: torch.Tensor) -> None:
        self.change()

    def end(self) -> None: ...


class Criterion(Changing, StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.change()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Processor(Changing, LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.change()
        return scores


def _by_streamer(model: Any) -> dict[str, Any]:
    return {"streamer": Streamer(model)}


def _by_criterion(model: Any) -> dict[str, Any]:
    return {"stopping_criteria": StoppingCriteriaList([Criterion(model)])}


def _by_processor(model: Any) -> dict[str, Any]:
    return {"logits_processor": LogitsProcessorList([Processor(model)])}


def _by_hook(model: Any) -> dict[str, Any]:
    changing = Changing(model)
    model.model.norm.register_forward_hook(lambda *_: changing.change())
    return {}


def _by_function(model: Any) -> dict[str, Any]:
    changing = Changing(model)

    def allowed(_row: int, _ids: torch.Tensor) -> list[int]:
        changing.change()
        return list(range(model.config.vocab_size))

    return {"prefix_allowed_tokens_fn": allowed}


@pytest.mark.parametrize("by", [_by_streamer, _by_criterion, _by_processor, _by_hook, _by_function])
def test_what_the_callers_code_changes_counts_from_the_next_pass(
    enabled: None, model: PreTrainedModel, by: Callable[[Any], dict[str, Any]]
) -> None:
    plain, unchanged = copy.deepcopy(model), copy.deepcopy(model)
    wanted = plain.generate(**prompts(1), **GREEDY, **by(plain)).tolist()
    assert wanted != unchanged.generate(**prompts(1), **GREEDY).tolist()
    assert model.generate(**prompts(1), **GREEDY, **by(model), assistant_models=[]).tolist() == wanted


def test_what_nobody_can_have_changed_is_looked_at_once(
    enabled: None, model: PreTrainedModel, looks: list[int]
) -> None:
    model.generate(**prompts(1), **GREEDY, assistant_models=[])  # what is packed and tried the first time
    looks.clear()
    model.generate(**prompts(1), **GREEDY, assistant_models=[])
    few = len(looks)
    looks.clear()
    model.generate(**prompts(1), **GREEDY, assistant_models=[], streamer=Streamer(copy.deepcopy(model)))
    assert len(looks) >= TOKENS - 1 > 3 >= few


class EndsLate(StoppingCriteria):
    """Says of itself that it changes nothing."""

    asks_nobody = True

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Words:
    """Stands for a tokenizer."""

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids)) + " "


class Inherited(TextStreamer):
    """A caller's own, though nothing in it is."""


class Told(BaseStreamer):
    """One that says of itself that it changes nothing."""

    asks_nobody = True

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


class Untold(Told):
    """Which another one does not inherit."""


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of a method."""


class Called:
    """Likewise."""

    __call__ = _nothing


def _replaced(by: Any = _nothing) -> TextStreamer:
    streamer = TextStreamer(Words())  # type: ignore[arg-type]
    streamer.on_finalized_text = by  # type: ignore[method-assign]
    return streamer


@pytest.mark.parametrize(
    ("make", "quiet"),
    [
        (lambda: TextStreamer(Words()), True),  # type: ignore[arg-type]
        (lambda: TextIteratorStreamer(Words()), True),  # type: ignore[arg-type]
        (Told, True),
        (lambda: Inherited(Words()), False),  # type: ignore[arg-type]
        (Untold, False),
        (_replaced, False),
        (lambda: _replaced(partial(_nothing)), False),
        (lambda: _replaced(Called()), False),
    ],
)
def test_streamers_of_transformers_run_no_code_of_the_callers(
    enabled: None, model: PreTrainedModel, looks: list[int], make: Callable[[], Any], quiet: bool
) -> None:
    model.generate(**prompts(1), **GREEDY, assistant_models=[])
    looks.clear()
    model.generate(**prompts(1), **GREEDY, assistant_models=[], streamer=make())
    assert (len(looks) <= 3) if quiet else (len(looks) >= TOKENS - 1)


def test_a_method_of_transformers_that_was_replaced_is_the_callers(
    enabled: None, model: PreTrainedModel, looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.generate(**prompts(1), **GREEDY, assistant_models=[])
    monkeypatch.setattr(TextStreamer, "on_finalized_text", _nothing)
    looks.clear()
    model.generate(**prompts(1), **GREEDY, assistant_models=[], streamer=TextStreamer(Words()))  # type: ignore[arg-type]
    assert len(looks) >= TOKENS - 1


def test_a_list_of_criteria_is_as_quiet_as_what_it_holds(
    enabled: None, model: PreTrainedModel, looks: list[int]
) -> None:
    model.generate(**prompts(1), **GREEDY, assistant_models=[])
    for inner, quiet in ([], True), ([Criterion(copy.deepcopy(model))], False):
        looks.clear()
        criteria = StoppingCriteriaList([StoppingCriteriaList([EndsLate(), *inner])])
        model.generate(**prompts(1), **GREEDY, assistant_models=[], stopping_criteria=criteria)
        assert (len(looks) <= 3) == quiet


class Listening:
    """A caller's own."""

    def began(self) -> None: ...

    def came(self, tokens: list[int]) -> None: ...


@pytest.mark.parametrize("watched", [None, "listener", "streamer"])
def test_an_engine_looks_once_in_so_many_rounds_unless_code_of_the_callers_runs(
    model: PreTrainedModel, looks: list[int], watched: str | None
) -> None:
    told: dict[str, Any] = {"listener": Listening(), "streamer": Streamer(copy.deepcopy(model))}
    ids, tokens = prompts(1)["input_ids"], 4 * TOKENS
    wanted = hf_polyspec.generate(model, ids, assistant_models=[], max_new_tokens=tokens, do_sample=False)
    with hf_polyspec.Engine(model, assistant_models=[], slots=2) as engine:
        engine.submit(ids, max_new_tokens=tokens, do_sample=False).result(60)
        looks.clear()
        more = {watched: told[watched]} if watched else {}
        both = [engine.submit(ids, max_new_tokens=tokens, do_sample=False, **more) for _ in range(2)]
        assert all(handle.result(60).tolist() == wanted.tolist() for handle in both)
    rounds = sum(handle.polyspec.levels[0].rounds for handle in both) / 2
    assert rounds >= tokens - 1
    assert len(looks) >= rounds - 1 if watched else len(looks) <= 4 * (2 + rounds / ROUNDS)


def test_an_engine_ends_and_lets_in_as_ever_in_such_a_stretch(model: PreTrainedModel) -> None:
    ids = prompts(1)["input_ids"]
    alone = hf_polyspec.generate(model, ids, assistant_models=[], max_new_tokens=30, do_sample=False).tolist()
    with hf_polyspec.Engine(model, assistant_models=[], slots=2) as engine:
        long = engine.submit(ids, max_new_tokens=400, do_sample=False)
        next(iter(long))
        short = engine.submit(ids, max_new_tokens=30, do_sample=False)
        assert short.result(60).tolist() == alone
        assert not long.done()
        assert long.cancel()
        again = engine.submit(ids, max_new_tokens=30, do_sample=False)
        assert again.result(60).tolist() == alone


def test_a_call_begun_inside_a_moment_looks_for_itself(enabled: None, model: PreTrainedModel) -> None:
    """As one of a signal handler's does, or of a callback of the garbage collector's."""
    given: dict[str, Any] = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    given |= {"max_new_tokens": 40, "do_sample": False}
    for _ in range(3):
        model.generate(**given, assistant_models=[])
    with one_moment():
        before = model.generate(**given, assistant_models=[]).tolist()
        model.model.layers[1].self_attn.scaling = 40.0
        after = model.generate(**given, assistant_models=[]).tolist()
    assert after == copy.deepcopy(model).generate(**given).tolist() != before


class Replacing(Changing):
    """Another thread, which puts a weight in another's place between two passes."""

    def change(self) -> None:
        self.calls += 1
        if self.calls == 6:
            weight = self.model.model.layers[1].input_layernorm.weight
            memory = StorageWeakRef(weight.untyped_storage())
            weight.data = weight.data * -1
            self.freed = memory.expired()


def test_weights_that_are_replaced_in_the_middle_count_from_the_next_pass(
    enabled: None, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, unchanged = copy.deepcopy(model), copy.deepcopy(model)
    replacing = Replacing(plain)
    plain.model.norm.register_forward_hook(lambda *_: replacing.change())
    wanted = plain.generate(**prompts(1), **GREEDY).tolist()
    assert wanted != unchanged.generate(**prompts(1), **GREEDY).tolist()
    for _ in range(2):
        model.generate(**prompts(1), **GREEDY, assistant_models=[])
    replacing = Replacing(model)

    def passing(original: Any) -> Any:
        def run(self: Straight, *given: Any) -> Any:
            found = original(self, *given)
            if found is not None and found != ([], []):  # there was a pass
                replacing.change()
            return found

        return run

    for name in ("__call__", "picks"):
        monkeypatch.setattr(Straight, name, passing(getattr(Straight, name)))
    assert model.generate(**prompts(1), **GREEDY, assistant_models=[]).tolist() == wanted
    assert not replacing.freed, "a pass that was under way would have gone on to read it"


class _Drafter(hf_polyspec.SuffixDrafter):
    """Somebody's."""


@pytest.mark.parametrize("mine", [False, True])
def test_a_middle_is_looked_at_once_a_block(
    enabled: None, model: PreTrainedModel, looks: list[int], mine: bool
) -> None:
    drafter = _Drafter() if mine else hf_polyspec.SuffixDrafter()
    middle = pack(copy.deepcopy(model))
    given = {**GREEDY, "assistant_models": [middle, drafter], "polyspec_block_size": 6}
    streamer = {"streamer": Streamer(copy.deepcopy(model))}  # so that only blocks are moments
    for _ in range(2):  # in which each kind of pass is tried both ways
        model.generate(**prompts(1), **given, **streamer)
    looks.clear()
    out = model.generate(**prompts(1), **given, **streamer, return_dict_in_generate=True)
    target, level = (level.forward_passes for level in out.polyspec.levels[:2])
    blocks = target - 1  # the first pass reads the prompt
    assert level > blocks + 2
    if mine:
        assert len(looks) >= level - 1
    else:
        assert len(looks) <= target + blocks + 2
