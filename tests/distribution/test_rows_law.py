# SPDX-License-Identifier: Apache-2.0
"""Rows of unequal lengths in one call, and rows that join an `Engine` while others run, against the exact law.

The first two tokens of each prompt's texts are counted. Seeds are fixed, so a run either always passes or always fails;
a correct chain fails one chi-square test here with probability 1e-6, set beforehand.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from exact_laws import Law, exact_law, p_value
from tiny_models import noisy, tiny

import hf_polyspec
from hf_polyspec import Engine
from hf_polyspec.exactness import judgement
from hf_polyspec.exactness.noise import SharedNoise
from hf_polyspec.exactness.verification import Verdict
from hf_polyspec.generation.loop import DecodingLoop

FALSE_ALARM = 1e-6
VOCABULARY, LENGTH = 6, 2
PROMPTS = ([3, 5, 1, 5, 2], [4, 2])
IN_A_BATCH, IN_AN_ENGINE = 1000, 300
"""Texts of each prompt."""
SLOTS = 12


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, pad_token_id=None)


@pytest.fixture(scope="module")
def levels(target: Any) -> list[Any]:
    """A middle that is often right and a drafter that is often wrong."""
    return [noisy(target, 0.3, seed=1), noisy(target, 2.0, seed=2)]


@pytest.fixture(scope="module")
def laws(target: Any) -> list[Law]:
    return [exact_law(target, torch.tensor([ids]), LENGTH, VOCABULARY, lambda _, logits: logits) for ids in PROMPTS]


def in_a_batch(target: Any, levels: list[Any], rule: str) -> list[torch.Tensor]:
    """New tokens of each prompt's rows."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in PROMPTS])
    torch.manual_seed(17)
    found = hf_polyspec.generate(
        target,
        ids,
        attention_mask=mask,
        assistant_models=levels,
        polyspec_verification=rule,
        polyspec_control="fixed",  # how much is drafted is no clock's to say
        polyspec_block_size=2,
        num_assistant_tokens=2,
        do_sample=True,
        top_k=0,
        max_new_tokens=LENGTH + 1,
        num_return_sequences=IN_A_BATCH,
        pad_token_id=0,
    )
    return list(found[:, width : width + LENGTH].split(IN_A_BATCH))


def in_an_engine(target: Any, levels: list[Any], rule: str) -> list[torch.Tensor]:
    """The same of requests that join and leave: they ask for two, three or four tokens."""
    options: dict[str, Any] = {"polyspec_verification": rule, "polyspec_block_size": 2, "num_assistant_tokens": 2}
    texts: list[list[list[int]]] = [[] for _ in PROMPTS]
    count = len(PROMPTS) * IN_AN_ENGINE
    with Engine(target, levels, slots=SLOTS, queue=count, **options) as engine:
        handles = [
            engine.submit(
                PROMPTS[i % len(PROMPTS)], seed=i, do_sample=True, top_k=0, max_new_tokens=LENGTH + i // 2 % 3
            )
            for i in range(count)
        ]
        for i, handle in enumerate(handles):
            prompt = PROMPTS[i % len(PROMPTS)]
            texts[i % len(PROMPTS)].append(handle.result(240)[0, len(prompt) : len(prompt) + LENGTH].tolist())
    return [torch.tensor(own) for own in texts]


WAYS = {"a batch": in_a_batch, "an engine": in_an_engine}


def chances(texts: Sequence[torch.Tensor], laws: Sequence[Law]) -> list[float]:
    """Of each prompt, that draws of its law are as far from it as these; last, that first tokens of the two prompts'
    texts, drawn side by side, are as far from independent."""
    found = [p_value(own, torch.empty(1, 0), law) for own, law in zip(texts, laws, strict=True)]
    firsts = []
    for law in laws:
        firsts.append([sum(weight for key, weight in law.items() if key[0] == token) for token in range(VOCABULARY)])
    both = {(a, b): x * y for a, x in enumerate(firsts[0]) for b, y in enumerate(firsts[1])}
    pairs = torch.stack([own[:, 0] for own in texts], 1)
    return [*found, p_value(pairs, torch.empty(1, 0), both)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rule", "count"), [("token", 1), ("block", 2), ("coupled", 2)])
def test_rows_follow_the_target_each_for_itself(
    target: Any, levels: list[Any], laws: list[Law], way: str, rule: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, beside = DecodingLoop.admit, list[int]()

    def admit(self: DecodingLoop, *given: Any) -> None:
        beside.append(sum(course.started for course, _ in self.seats))
        genuine(self, *given)

    monkeypatch.setattr(DecodingLoop, "admit", admit)
    assert min(chances(WAYS[way](target, levels[-count:], rule), laws)) > FALSE_ALARM
    if way == "an engine":
        assert sum(map(bool, beside)) > len(beside) / 2, "most have joined rows that were under way"


# The mistakes.


@pytest.mark.parametrize("way", WAYS)
def test_a_residual_from_which_nothing_is_taken_is_caught(
    target: Any, levels: list[Any], laws: list[Law], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = judgement.verify_tokens

    def from_p(*args: Any) -> Verdict:
        verdict = genuine(*args)
        p = args[2]
        return Verdict(verdict.accepted, p[torch.arange(p.shape[0]), verdict.accepted])

    monkeypatch.setattr(judgement, "verify_tokens", from_p)
    monkeypatch.setattr(sys.modules[__name__], "IN_AN_ENGINE", 500)  # enough to be far from the threshold
    assert min(chances(WAYS[way](target, levels[-1:], "token"), laws)[:2]) < FALSE_ALARM


def test_rows_that_read_one_rows_noise_are_caught(
    target: Any, levels: list[Any], laws: list[Law], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every two rows that stand beside each other in the batch read what one of them should."""
    genuine = SharedNoise.at

    def beside(self: SharedNoise, rows: Any, steps: Any) -> Any:
        return genuine(self, [row % IN_A_BATCH for row in rows], steps)

    monkeypatch.setattr(SharedNoise, "at", beside)
    found = chances(in_a_batch(target, levels[-1:], "coupled"), laws)
    assert found[-1] < FALSE_ALARM < min(found[:2]), "each prompt's own texts are right, and they go together"


def test_rows_in_an_engine_that_read_the_noise_of_the_step_beside_are_caught(
    target: Any, levels: list[Any], laws: list[Law], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of a row read one noise: the first token says something of the second."""
    genuine = SharedNoise.at

    def beside(self: SharedNoise, rows: Any, steps: Any) -> Any:
        return genuine(self, rows, [[step | 1 for step in own] for own in steps])

    monkeypatch.setattr(SharedNoise, "at", beside)
    assert min(chances(in_an_engine(target, levels[-1:], "coupled"), laws)[:2]) < FALSE_ALARM
