# SPDX-License-Identifier: Apache-2.0
"""200 calls drawn at random, each without and with levels after one seed; and the mistakes that the comparison sees."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from same_seed import CHANCES, check, sampled
from tiny_models import head_for, noisy, prompts, tiny
from transformers import PreTrainedModel

from hf_polyspec.exactness.callers_generator import CallersGenerator
from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.noise import SharedNoise
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.generation import chances
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.suffix import SuffixDrafter

NEW = 20
_models: dict[str, PreTrainedModel] = {}


def model(kind: str) -> PreTrainedModel:
    if kind not in _models:
        _models[kind] = tiny(kind)
    return _models[kind]


def levels(target: PreTrainedModel, kind: str) -> list[Any]:
    if kind == "copy":
        return [noisy(target, 0.0)]
    if kind == "head":
        return [head_for(target)]
    if kind == "middle and head":
        middle = noisy(target, 0.03)
        return [middle, head_for(middle)]
    if kind == "suffix":
        return [SuffixDrafter(min_probability=0.0)]
    if kind == "middle and suffix":
        return [noisy(target, 0.03), SuffixDrafter()]
    return [noisy(target, 0.04 + 0.02 * place, seed=place) for place in range(int(kind))]


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.3, 0.7, 1.3]),
        "top_k": st.sampled_from([0, 3, 12]),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.just(0.05),
        "typical_p": st.just(0.8),
        "repetition_penalty": st.sampled_from([0.9, 1.3]),
        "no_repeat_ngram_size": st.just(3),
        "min_new_tokens": st.just(4),
        "num_return_sequences": st.integers(1, 3),
        "eos_token_id": st.sampled_from([[5, 6, 7, 8, 9, 10], 11]),
        "renormalize_logits": st.booleans(),
    },
)
OWN = st.fixed_dictionaries(
    {},
    optional={
        "polyspec_block_size": st.integers(1, 9),
        "polyspec_tree_tokens": st.sampled_from([0, 6, 16]),
        "polyspec_tree_top_k": st.integers(1, 4),
        "assistant_confidence_threshold": st.just(0.3),
        "num_assistant_tokens_schedule": st.just("heuristic"),
        "polyspec_control": st.just("online"),
        "polyspec_draft_vocabulary": st.just(16),
    },
)
CHAINS = st.sampled_from(["copy", "head", "middle and head", "suffix", "middle and suffix", "1", "2", "3"])
took_part = [0, 0]


@settings(
    max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
@given(
    kind=st.sampled_from(["llama", "gpt2", "qwen3"]),
    chain=CHAINS,
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    options=OPTIONS,
    own=OWN,
)
def run_pairs(kind: str, chain: str, batch: int, seed: int, options: dict[str, Any], own: dict[str, Any]) -> None:
    target, options = model(kind), {"pad_token_id": 0, **options}
    own = {"num_assistant_tokens": 5, **own}
    if chain == "copy":
        own = {"num_assistant_tokens": 5}
    found = check(target, levels(target, chain), seed, own, max_new_tokens=NEW, **prompts(batch), **options)
    took_part[0] += found.levels[0].accepted > 0
    took_part[1] += 1
    if chain == "copy" and "eos_token_id" not in options:
        assert found.levels[0].forward_passes <= 0.4 * NEW


def test_pairs(enabled: None) -> None:
    run_pairs()
    assert took_part[1] == 200
    assert took_part[0] > 100, "where nothing is accepted nothing is shown"


# The mistakes: each changes one thing, and the comparison must see it.


Noises = list[list[torch.Tensor]]


class Mistake(SharedNoise):
    def at(self, rows: Sequence[int], steps: Sequence[Sequence[int]]) -> Noises:
        width = self.streams[0].width
        empty = torch.empty(len(rows), len(steps[0]), width)
        return self.wrong(rows, steps, empty)

    def wrong(self, rows: Sequence[int], steps: Sequence[Sequence[int]], empty: torch.Tensor) -> Noises:
        raise NotImplementedError


class InTheOrderOfDrawing(Mistake):
    """Whoever asks next gets the next noise."""

    asked = 0

    def wrong(self, rows: Sequence[int], steps: Sequence[Sequence[int]], empty: torch.Tensor) -> Noises:
        first, self.asked = self.asked, self.asked + empty.shape[1]
        return super(Mistake, self).at(rows, [[first + i for i in range(empty.shape[1])] for _ in rows])


class InTheShapeOfTheDraft(Mistake):
    """All positions of a round at once."""

    def wrong(self, rows: Sequence[int], steps: Sequence[Sequence[int]], empty: torch.Tensor) -> Noises:
        return list(map(list, empty.exponential_(1, generator=self.streams[0].generator)))


class OfAnotherRow(Mistake):
    """Row b reads the noise of the row after it."""

    def wrong(self, rows: Sequence[int], steps: Sequence[Sequence[int]], empty: torch.Tensor) -> Noises:
        return super(Mistake, self).at([(row + 1) % len(self._places) for row in rows], steps)


class OfTheStepBefore(Mistake):
    """A step late."""

    def wrong(self, rows: Sequence[int], steps: Sequence[Sequence[int]], empty: torch.Tensor) -> Noises:
        return super(Mistake, self).at(rows, [[max(self.step, step - 1) for step in wanted] for wanted in steps])


def texts(target: PreTrainedModel, **options: Any) -> tuple[bool, bool]:
    """Whether the texts are equal and whether the generators are."""
    plain, before = sampled(target, 3, **prompts(2), **options)
    ours, after = sampled(target, 3, assistant_models=[noisy(target, 0.03)], **prompts(2), **options)
    return torch.equal(plain.sequences, ours.sequences), torch.equal(before, after)


@pytest.mark.parametrize("wrong", [InTheOrderOfDrawing, InTheShapeOfTheDraft, OfAnotherRow, OfTheStepBefore])
def test_wrong_noise_is_caught(
    enabled: None, target: PreTrainedModel, wrong: type[SharedNoise], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert texts(target) == (True, True)
    monkeypatch.setattr(chances, "SharedNoise", wrong)
    assert texts(target)[0] is False


def test_one_draw_too_many_is_caught(enabled: None, target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = CallersGenerator.finish

    def further(self: CallersGenerator, state: torch.Tensor, values: int) -> None:
        generator = torch.Generator()
        generator.set_state(state)
        torch.empty(2, target.config.vocab_size).exponential_(1, generator=generator)
        genuine(self, generator.get_state(), values)

    monkeypatch.setattr(CallersGenerator, "finish", further)
    assert texts(target) == (True, False)


def test_two_threads_on_one_state_are_caught(
    enabled: None, target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the state for everybody: two calls that start together write one text."""

    def copied(self: CallersGenerator, device: torch.device) -> None:
        self.device, self.lost, self._key = device, None, ""
        self._expected = torch.get_rng_state()
        self.private = torch.Generator()
        self.private.set_state(self._expected)

    monkeypatch.setattr(CallersGenerator, "__init__", copied)
    torch.manual_seed(4)
    found: list[torch.Tensor] = []

    def call() -> None:
        request = {**CHANCES, **prompts(1), "assistant_models": [SuffixDrafter()]}
        found.append(target.generate(**request).sequences)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(*found), "the mistake is none any more, and test_two_threads_write_two_texts shows nothing"


def test_a_drafter_with_noise_of_its_own_is_seen_in_acceptance(
    enabled: None, target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text is right; but an exact copy is then accepted as often as two draws from one law are equal."""
    options = {"top_k": 0, "max_new_tokens": 40, **prompts(1)}
    copy = [noisy(target, 0.0)]
    shared = check(target, copy, 5, **options).levels[0]
    genuine = CausalLMDrafter.propose

    def alone(self: CausalLMDrafter, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        apart = SharedNoise([torch.Generator().manual_seed(len(context.ids[0]))], 1, self.vocabulary)
        return genuine(self, context, limits, LawMaker(law.processors, True, law.device, noise=apart))

    monkeypatch.setattr(CausalLMDrafter, "propose", alone)
    own = check(target, copy, 5, **options).levels[0]
    assert shared.acceptance_rate == 1
    assert own.acceptance_rate is not None
    assert own.acceptance_rate < 0.8
