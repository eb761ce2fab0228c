# SPDX-License-Identifier: Apache-2.0
"""Options that become logits processors: greedy through a chain equals plain greedy, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, prompts
from transformers import LogitsProcessor, LogitsProcessorList, WatermarkingConfig

NEW = 18

PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[33], [11, 19], [36, 35]]},
    "suppress_tokens": {"suppress_tokens": [33, 11]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [37, 24]},
    "forced_eos_token_id": {"forced_eos_token_id": 9, "eos_token_id": 9},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": [33, 17]},
    "min_length": {"min_length": 9 + 12, "eos_token_id": [33, 17]},
    "sequence_bias": {"sequence_bias": [[[33], -6.0], [[11, 19], -9.0], [[36, 35], 4.0], [[5], 2.0]]},
    "exponential_decay": {"exponential_decay_length_penalty": (3, 1.3), "eos_token_id": 5},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.2},
    "remove_invalid_values": {"remove_invalid_values": True},
    "watermarking": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash", context_width=2)},
    "guidance_scale": {"guidance_scale": 1.5},
    "together": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [33], "min_new_tokens": 5},
}
NEUTRAL = ("remove_invalid_values", "renormalize_logits")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_option_means_what_it_means_to_plain_generation(target, generate, name, batch):
    options = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False}
    plain = target.generate(**options, **PROCESSORS[name])
    ours = generate(target, **options, **PROCESSORS[name])
    assert ours.tolist() == plain.tolist()
    if name not in NEUTRAL:
        without = target.generate(**options)
        assert plain.tolist() != without.tolist(), "the option changed nothing, so this case shows nothing"


@pytest.mark.parametrize("batch", [1, 3])
def test_sampling_with_one_choice_left_is_greedy(target, generate, batch):
    """top_k=1 leaves nothing to chance: the sampled path must then give the greedy text, whatever the seed."""
    options = {**prompts(batch), "max_new_tokens": NEW}
    plain = target.generate(**options, do_sample=False, repetition_penalty=1.2)
    for rule in ("token", "block", "auto"):
        ours = generate(target, **options, do_sample=True, top_k=1, repetition_penalty=1.2, polyspec_verification=rule)
        assert ours.tolist() == plain.tolist()


class Parity(LogitsProcessor):
    """Looks at ids and scores, keeps nothing: the next token's parity differs from the last one's."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wrong = torch.arange(scores.shape[1])[None, :] % 2 == input_ids[:, -1:] % 2
        return scores.masked_fill(wrong, float("-inf"))


class Grammar(LogitsProcessor):
    """Keeps state, as grammar processors do, and insists on being called once a token, in order, with what was emitted.

    The state is a sum over all tokens seen, so that a call left out, doubled or made with a rejected token also
    changes the text.
    """

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []
        self.state: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = input_ids.tolist()
        if self.calls:
            before = self.calls[-1]
            assert [row[:-1] for row in rows] == before, "a call was skipped, repeated or undone"
            self.state = [(s * 7 + row[-1] + 1) % 1009 for s, row in zip(self.state, rows, strict=True)]
        else:
            self.state = [sum(row) % 1009 for row in rows]
        self.calls.append(rows)
        blocked = torch.tensor([[(s + 5 * i) % VOCABULARY for i in range(12)] for s in self.state])
        return scores.scatter(1, blocked, float("-inf"))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stateless_processor_of_the_callers_own(target, generate, batch):
    options = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False}
    plain = target.generate(**options, logits_processor=LogitsProcessorList([Parity()]))
    ours = generate(target, **options, logits_processor=LogitsProcessorList([Parity()]))
    assert ours.tolist() == plain.tolist()
    assert plain.tolist() != target.generate(**options).tolist()


@pytest.mark.parametrize("eos", [None, [4, 20, 26]])
@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_stateful_processor_is_called_once_a_token_in_order(target, middle, drafter, generate, batch, levels, eos):
    options = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False, "eos_token_id": eos}
    options["assistant_models"] = [middle, drafter][3 - levels :]
    grammars = Grammar(), Grammar()
    plain = target.generate(
        **{**options, "assistant_models": None}, logits_processor=LogitsProcessorList([grammars[0]])
    )
    ours = generate(target, **options, logits_processor=LogitsProcessorList([grammars[1]]))
    assert ours.tolist() == plain.tolist()
    assert grammars[1].calls == grammars[0].calls
    assert grammars[1].state == grammars[0].state
    assert len(grammars[0].calls) > 5


def test_a_stateful_processor_when_sampling_sees_exactly_the_emitted_stream(target, generate):
    torch.manual_seed(5)
    grammar = Grammar()
    ours = generate(
        target,
        **prompts(3),
        max_new_tokens=NEW,
        do_sample=True,
        temperature=0.8,
        logits_processor=LogitsProcessorList([grammar]),
    )
    assert grammar.calls == [ours[:, :length].tolist() for length in range(9, 9 + NEW)]


@pytest.mark.parametrize("batch", [1, 3])
def test_prefix_allowed_tokens_fn(target, generate, batch):
    """A function of the row and its ids, as its contract says; asked for every emitted token's prefix."""

    def automaton(asked: set[tuple[int, ...]]) -> Any:
        def allowed(row: int, ids: torch.Tensor) -> list[int]:
            asked.add((row, *ids.tolist()))
            return [t for t in range(3, VOCABULARY) if t % 3 == (row + len(ids) + int(ids[-1])) % 3]

        return allowed

    options = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False}
    asked: tuple[set[Any], set[Any]] = (set(), set())
    plain = target.generate(**options, prefix_allowed_tokens_fn=automaton(asked[0]))
    ours = generate(target, **options, prefix_allowed_tokens_fn=automaton(asked[1]))
    assert ours.tolist() == plain.tolist()
    assert asked[0] <= asked[1]
    assert plain.tolist() != target.generate(**options).tolist()


def test_forced_bos_token_after_a_prompt_of_one_token(target, generate):
    options = {"input_ids": torch.tensor([[5]]), "max_new_tokens": NEW, "do_sample": False, "forced_bos_token_id": 7}
    plain = target.generate(**options)
    assert generate(target, **options).tolist() == plain.tolist()
    assert plain[0, 1] == 7


def test_processors_set_on_the_models_own_generation_config(tiny, noisy, enabled):
    """Options may also come from the model; and an assistant's own must not leak into the target's law."""
    model = tiny("llama")
    model.generation_config.repetition_penalty = 1.5
    assistant = noisy(model, 0.03)
    assistant.generation_config.repetition_penalty = 5.0
    options = {**prompts(1), "max_new_tokens": NEW, "do_sample": False}
    assert model.generate(**options, assistant_models=[assistant]).tolist() == model.generate(**options).tolist()
