# SPDX-License-Identifier: Apache-2.0
"""Ends of texts: a chain stops at the same token as plain generation, inside a block or not."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, prompts
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import (
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_polyspec.generation import course

NEW = 16
LENGTH = 9


def both(generate: Any, target: Any, options: dict[str, Any], **criteria: Any) -> list[list[int]]:
    """The sequences, after making sure that both ways give them."""
    plain = target.generate(**options, **{name: make() for name, make in criteria.items()})
    ours = generate(target, **options, **{name: make() for name, make in criteria.items()})
    assert ours.tolist() == plain.tolist()
    return plain.tolist()


@pytest.mark.parametrize("place", range(NEW))
def test_end_of_text_at_every_place(target, generate, place):
    """Every place of a block, and after the last token."""
    options = {**prompts(1), "max_new_tokens": NEW, "do_sample": False}
    text = target.generate(**options)[0, LENGTH:].tolist()
    sequences = both(generate, target, {**options, "eos_token_id": text[place], "pad_token_id": 2})
    assert len(sequences[0]) == LENGTH + text.index(text[place]) + 1


@pytest.mark.parametrize("levels", [2, 3])
def test_rows_of_a_batch_end_apart_and_are_padded(target, middle, drafter, generate, levels):
    options = {**prompts(4), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2}
    texts = target.generate(**options)[:, LENGTH:].tolist()
    ends = [texts[0][3], texts[1][9], texts[2][12]]
    chain = [middle, drafter][3 - levels :]
    sequences = both(
        lambda model, **more: generate(model, **more, assistant_models=chain), target, {**options, "eos_token_id": ends}
    )
    lengths = [next((i for i, token in enumerate(row[LENGTH:]) if token in ends), NEW) for row in sequences]
    assert len(set(lengths)) > 2, "rows should end at different places for this test to show something"
    assert any(row[-1] == 2 for row in sequences)


@pytest.mark.parametrize(
    "limits", [{"max_new_tokens": 1}, {"max_new_tokens": 2}, {"max_length": 12}, {"max_length": 9 + 7}]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_length_limits(target, generate, limits, batch):
    sequences = both(generate, target, {**prompts(batch), "do_sample": False, **limits})
    assert len(sequences[0]) == limits.get("max_length", LENGTH + limits.get("max_new_tokens", 0))


@pytest.mark.filterwarnings("ignore:Input length of input_ids")
def test_a_prompt_that_is_already_too_long(target, generate):
    """Plain generation refuses it, or gives it one token; whichever it does, the chain does it too."""
    options = {**prompts(1), "do_sample": False, "max_length": 5}
    outcomes = []
    for call in (target.generate, lambda **more: generate(target, **more)):
        try:
            outcomes.append(call(**options).tolist())
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


class StopAt(StoppingCriteria):
    """Stops every row at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("length", range(LENGTH + 1, LENGTH + NEW))
def test_a_criterion_stops_inside_a_block(target, generate, length):
    sequences = both(
        generate,
        target,
        {**prompts(1), "max_new_tokens": NEW, "do_sample": False},
        stopping_criteria=lambda: StoppingCriteriaList([StopAt(length)]),
    )
    assert len(sequences[0]) == length


class Witness(StoppingCriteria):
    """Keeps state: adds up what it sees, stops a row when its sum is right, and remembers every call."""

    def __init__(self, modulus: int) -> None:
        self.modulus = modulus
        self.calls: list[list[list[int]]] = []
        self.sums: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        rows = input_ids.tolist()
        self.calls.append(rows)
        self.sums = [s + row[-1] for s, row in zip(self.sums or [0] * len(rows), rows, strict=True)]
        return torch.tensor([s % self.modulus == 0 for s in self.sums])


@pytest.mark.parametrize("eos", [None, 45])
@pytest.mark.parametrize("modulus", [5, 7, 11])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_stateful_criterion_is_asked_once_a_token(target, generate, batch, modulus, eos):
    """Row by row; without an end-of-text token the rows it stopped go on until all have stopped, as in plain
    generation."""
    witnesses = [Witness(modulus), Witness(modulus)]
    left = iter(witnesses)
    both(
        generate,
        target,
        {**prompts(batch), "max_new_tokens": NEW, "do_sample": False, "eos_token_id": eos, "pad_token_id": 2},
        stopping_criteria=lambda: StoppingCriteriaList([next(left)]),
    )
    assert witnesses[1].calls == witnesses[0].calls
    assert witnesses[1].sums == witnesses[0].sums


class Unsure(StoppingCriteria):
    """Looks at the scores, which plain generation hands over when they are asked for."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return scores[-1].softmax(-1).amax(-1) < self.threshold


def test_a_criterion_that_looks_at_the_scores(target, generate):
    options = {**prompts(1), "max_new_tokens": NEW, "do_sample": False}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    sure = [float(scores.softmax(-1).amax()) for scores in target.generate(**options).scores]
    threshold = min(sure[2:12]) + 1e-4
    plain = target.generate(**options, stopping_criteria=StoppingCriteriaList([Unsure(threshold)]))
    ours = generate(target, **options, stopping_criteria=StoppingCriteriaList([Unsure(threshold)]))
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert plain.sequences.shape[1] < LENGTH + NEW


def test_no_time_left_means_one_token(target, generate):
    options = {**prompts(3), "max_new_tokens": NEW, "do_sample": False}
    sequences = both(generate, target, {**options, "max_time": 0.0})
    assert len(sequences[0]) == LENGTH + 1
    late = time.time() - 100
    sequences = both(
        generate, target, options, stopping_criteria=lambda: StoppingCriteriaList([MaxTimeCriteria(50, late)])
    )
    assert len(sequences[0]) == LENGTH + 1


def test_time_enough_changes_nothing(target, generate):
    options = {**prompts(3), "max_new_tokens": NEW, "do_sample": False}
    assert both(generate, target, {**options, "max_time": 1000.0}) == target.generate(**options).tolist()


def test_time_running_out_midway(target, generate, monkeypatch):
    """A clock that moves by 10 seconds whenever somebody looks: the chain looks once a token, as plain does."""

    def ticking() -> Any:
        clock, genuine = {"now": 1000.0}, time.time

        def now() -> float:
            if sys._getframe(1).f_globals["__name__"] not in (MaxTimeCriteria.__module__, course.__name__):
                return genuine()  # for logs, or for other tests' threads
            clock["now"] += 10.0
            return clock["now"]

        return now

    options = {**prompts(1), "max_new_tokens": NEW, "do_sample": False}
    outcomes = []
    for call in (target.generate, lambda **more: generate(target, **more)):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", ticking())
            outcomes.append(call(**options, stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(65.0, 1000.0)])))
    assert outcomes[0].tolist() == outcomes[1].tolist()
    assert LENGTH + 1 < outcomes[0].shape[1] < LENGTH + NEW


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Letters and pairs of letters, so that stop strings can begin and end in the middle of a token."""
    words = [chr(97 + i) for i in range(26)] + [f"{chr(65 + i)}{chr(90 - i)}" for i in range(VOCABULARY - 26)]
    raw = Tokenizer(BPE({word: i for i, word in enumerate(words)}, []))
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def strings_in(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    """Stop strings that occur in the text: a token, the end of one with the start of the next, three tokens."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [tokens[6], tokens[4][-1] + tokens[5][:1], "".join(tokens[7:10])]


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_stop_strings(target, generate, tokenizer, which, batch):
    options = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 2}
    text = target.generate(**options)
    stop = strings_in(tokenizer, text[0, LENGTH:].tolist())[which]
    plain = target.generate(**options, stop_strings=[stop], tokenizer=tokenizer)
    ours = generate(target, **options, stop_strings=[stop], tokenizer=tokenizer)
    assert ours.tolist() == plain.tolist()
    assert ours.shape[1] < text.shape[1] or batch > 1


def test_stop_strings_in_a_generation_config(target, tiny, noisy, enabled, tokenizer):
    """In the config passed to generate(), and in the model's own, which transformers merges into any other."""
    options = {**prompts(1), "max_new_tokens": NEW, "do_sample": False}
    model = tiny("llama")
    text = model.generate(**options)
    stop = strings_in(tokenizer, text[0, LENGTH:].tolist())[0]
    model.generation_config.stop_strings = [stop]
    before = model.generation_config.to_dict()
    plain = model.generate(**options, tokenizer=tokenizer)
    assert plain.shape[1] < text.shape[1]
    ours = model.generate(**options, tokenizer=tokenizer, assistant_models=[noisy(model)])
    assert ours.tolist() == plain.tolist()
    assert model.generation_config.to_dict() == before


def test_stop_strings_without_a_tokenizer_are_refused(target, generate):
    with pytest.raises(ValueError, match="tokenizer"):
        generate(target, **prompts(1), max_new_tokens=4, stop_strings=["x"])
