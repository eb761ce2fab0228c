# SPDX-License-Identifier: Apache-2.0
"""An engine's texts are plain generate()'s for each prompt alone, in whatever company they run."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny_models import head_for, noisy, tiny

from hf_polyspec import Engine, LevelError, SuffixDrafter
from hf_polyspec.exactness.row_laws import RowNoise
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.eagle import EagleDrafter

EOS = 5


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny(eos_token_id=EOS)


@pytest.fixture(scope="module")
def chains(target: Any) -> dict[str, list[Any]]:
    middle, drafter = noisy(target), noisy(target, 0.2, seed=2)
    return {
        "none": [],
        "a model": [drafter],
        "a middle and a model": [middle, drafter],
        "a middle and suffixes": [middle, SuffixDrafter()],
        "a head": [head_for(target)],
        "a middle and a head beside suffixes": [middle, head_for(target), SuffixDrafter()],
    }


def requests(count: int) -> list[tuple[list[int], int, dict[str, Any]]]:
    """Prompts of unequal lengths, seeds and options: greedy and sampled, with and without processors that see ids."""
    dice = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        ids = torch.randint(3, 48, (int(torch.randint(2, 30, (1,), generator=dice)),), generator=dice).tolist()
        options: dict[str, Any] = {"max_new_tokens": 4 + 5 * i % 17}
        if i % 3 == 1:
            options |= {"do_sample": True, "temperature": 0.7 + 0.2 * (i % 4), "top_k": 0}
        if i % 3 == 2:
            options |= {"do_sample": True, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.2}
        if i % 5 == 4:
            options |= {"no_repeat_ngram_size": 2, "min_new_tokens": 3}
        if i % 7 == 6:
            options |= {"eos_token_id": [EOS, 9, 11]}
        found.append((ids, 100 + i, options))
    return found


def plain(target: Any, ids: list[int], seed: int, options: dict[str, Any]) -> torch.Tensor:
    whole = torch.tensor([ids])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text: torch.Tensor = target.generate(whole, attention_mask=torch.ones_like(whole), **options)
    return text


@pytest.fixture(scope="module")
def texts(target: Any) -> list[torch.Tensor]:
    return [plain(target, *request) for request in requests(20)]


def written(engine: Engine, wanted: list[tuple[list[int], int, dict[str, Any]]]) -> list[torch.Tensor]:
    handles = [engine.submit(ids, seed=seed, **options) for ids, seed, options in wanted]
    return [handle.result(240) for handle in handles]


NAMES = ["none", "a model", "a middle and a model", "a middle and suffixes", "a head"]


STEERED: dict[str, dict[str, Any]] = {
    "shared": {},  # columns go where they pay, which the clock says
    "fixed": {"polyspec_control": "fixed"},
    "online": {"polyspec_control": "online"},
}


@pytest.mark.parametrize(
    ("name", "control"),
    [
        *((name, control) for name in NAMES for control in ("shared", "fixed")),
        ("a middle and a model", "online"),
        ("a middle and a head beside suffixes", "shared"),
    ],
)
def test_mixed_requests_over_three_slots(
    target: Any, chains: Any, texts: list[torch.Tensor], name: str, control: str
) -> None:
    with Engine(target, chains[name], slots=3, **STEERED[control]) as engine:
        for found, text in zip(written(engine, requests(20)), texts, strict=True):
            assert torch.equal(found, text)


def test_trees(target: Any, chains: Any, texts: list[torch.Tensor]) -> None:
    with Engine(target, chains["a head"], slots=3, polyspec_tree_tokens=8, **STEERED["fixed"]) as engine:
        handle = engine.submit([3, 4], max_new_tokens=20, do_sample=False, eos_token_id=None)
        for found, text in zip(written(engine, requests(12)), texts, strict=False):
            assert torch.equal(found, text)
        assert handle.polyspec is not None
        assert handle.polyspec.levels[0].drafted > 0


@pytest.mark.parametrize("slots", [1, 7, 32])
def test_order_and_company_change_nothing(target: Any, chains: Any, texts: list[torch.Tensor], slots: int) -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(slots)).tolist()
    wanted = requests(20)
    with Engine(target, chains["a middle and a model"], slots=slots) as engine:
        found = written(engine, [wanted[i] for i in order])
    assert all(torch.equal(text, texts[i]) for i, text in zip(order, found, strict=True))


DRAFTS = {
    "a head": (EagleDrafter, "propose_tree", {"polyspec_tree_tokens": 8, "polyspec_draft_copies": True}),
    "a model": (
        CausalLMDrafter,
        "propose",
        {"polyspec_draft_temperature": 0.25, "assistant_confidence_threshold": 0.15, "num_assistant_tokens": 6},
    ),
}


class Waits:
    """A streamer that lets nothing be written until it is told."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def put(self, _: torch.Tensor) -> None:
        assert self.told.wait(240)

    def end(self) -> None:
        pass


@pytest.mark.parametrize("name", DRAFTS)
def test_a_greedy_row_is_drafted_for_as_alone(
    target: Any, chains: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A drafter's temperature, and what it knows of plain generation's noise, is for the sampled row beside it."""
    drafter, method, options = DRAFTS[name]
    ask, seen = getattr(drafter, method), dict[tuple[int, ...], Any]()

    def noted(self: Any, context: Any, limits: list[int], law: Any) -> Any:
        offered = ask(self, context, limits, law)
        for b, ids in enumerate(context.ids):
            if ids[:2] == [3, 4] and limits[b] and offered is not None:
                seen[tuple(ids)] = len(context.ids), offered.tokens[b], getattr(offered, "parents", [None] * (b + 1))[b]
        return offered

    monkeypatch.setattr(drafter, method, noted)
    with Engine(target, chains[name], slots=2, **options, **STEERED["fixed"]) as engine:
        request: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        engine.submit([3, 4], **request).result(240)
        alone, seen = seen.copy(), {}
        gate, sampled = Waits(), {"do_sample": True, "top_k": 0, "eos_token_id": None}
        beside = engine.submit([7, 8, 9], seed=1, max_new_tokens=90, streamer=gate, **sampled)
        handle = engine.submit([3, 4], **request)
        gate.told.set()
        handle.result(240)
        beside.cancel()
    assert {rows for rows, *_ in alone.values()} == {1}
    assert 2 in {rows for rows, *_ in seen.values()}
    assert {ids: said for ids, (_, *said) in seen.items()} == {ids: said for ids, (_, *said) in alone.items()}


@pytest.mark.parametrize("rule", ["token", "block"])
def test_draws_of_each_levels_own_are_a_rows_own_too(
    target: Any, chains: Any, texts: list[torch.Tensor], rule: str
) -> None:
    """Another text than plain generate()'s, by the same law; whoever runs beside it, and greedy rows are greedy."""
    found = []
    for slots in (1, 5):
        with Engine(target, chains["a middle and a model"], slots=slots, polyspec_verification=rule) as engine:
            found.append(written(engine, requests(12)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert all(torch.equal(found[0][i], texts[i]) for i in range(0, 12, 3))
    assert not all(torch.equal(found[0][i], texts[i]) for i in range(12))


def test_noise_in_the_order_of_the_batch_is_caught(
    target: Any, chains: Any, texts: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_place(self: RowNoise, rows: Any, steps: Any) -> Any:
        named = sorted(self.rows)
        return [self.rows[named[i % len(named)]].at([0], [own])[0] for i, own in enumerate(steps)]

    monkeypatch.setattr(RowNoise, "at", by_place)
    sampled = [(i, one) for i, one in enumerate(requests(20)) if i % 3 == 1]
    gate = Waits()  # until all have come, so that they meet
    with Engine(target, chains["a model"], slots=3) as engine:
        first = engine.submit([3, 4], max_new_tokens=2, do_sample=False, streamer=gate)
        handles = [engine.submit(ids, seed=seed, **options) for _, (ids, seed, options) in sampled]
        gate.told.set()
        try:
            first.result(240)
            found = [handle.result(240) for handle in handles]
        except (LevelError, IndexError):
            return  # it asked for noise that its row has passed
    assert not all(torch.equal(text, texts[i]) for (i, _), text in zip(sampled, found, strict=True))
