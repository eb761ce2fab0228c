# SPDX-License-Identifier: Apache-2.0
"""Assistants with a vocabulary of their own, as drafters and as middles: plain generation's text, drafts at work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from companion_models import dflash
from other_words import END, in_other_ids, word_tokenizer
from same_seed import check
from tiny_models import VOCABULARY, head_for, noisy, prompts, tiny
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec import SuffixDrafter

WORDS = [*(f"w{i}" for i in range(VOCABULARY - 1)), END]
SHUFFLED = ["first", *reversed(WORDS), "more", "words"]
HALF = ["first", *(word for i, word in enumerate(reversed(WORDS)) if i % 2), *(f"other{i}" for i in range(50))]


@pytest.fixture(scope="module")
def target() -> Any:
    return hf_polyspec.attach(tiny("llama"))


@pytest.fixture(scope="module")
def own() -> Any:
    return word_tokenizer(WORDS)


def other(target: Any, words: list[str]) -> tuple[PreTrainedModel, Any]:
    """An assistant that would be the target's copy but for its ids, and its tokenizer."""
    return in_other_ids(target, WORDS, words), word_tokenizer(words, begin="first")


def greedy(target: Any, batch: int, **options: Any) -> Any:
    return target.generate(**prompts(batch), max_new_tokens=24, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("middle", [False, True], ids=["drafter", "middle"])
def test_a_copy_in_other_ids_drafts_as_a_copy_does(target: Any, own: Any, batch: int, middle: bool) -> None:
    """It knows all of the target's words: at most 0.4 passes of the target a token, drafts of five."""
    copy, tokenizer = other(target, SHUFFLED)
    levels: list[Any] = [copy, SuffixDrafter()] if middle else [copy]
    given: dict[str, Any] = {"tokenizer": own, "assistant_tokenizer": [tokenizer, None] if middle else tokenizer}
    found = greedy(target, batch, assistant_models=levels, **given)
    assert found.sequences.tolist() == greedy(target, batch).sequences.tolist()
    assert found.polyspec.levels[0].forward_passes <= 0.4 * 24
    assert "knows 48 of the target's 48 ids as words" in " ".join(found.polyspec.levels[1].notes)


@pytest.mark.parametrize("words", [SHUFFLED, HALF], ids=["all words", "half of them"])
@pytest.mark.parametrize("batch", [1, 3])
def test_three_levels_with_such_a_middle(target: Any, own: Any, batch: int, words: list[str]) -> None:
    middle, tokenizer = other(target, words)
    levels = [middle, noisy(target, 0.05)]
    given: dict[str, Any] = {"tokenizer": own, "assistant_tokenizer": [tokenizer, None]}
    found = greedy(target, batch, assistant_models=levels, **given)
    assert found.sequences.tolist() == greedy(target, batch).sequences.tolist()
    statistics = check(target, levels, 7, given, **prompts(batch))
    assert statistics.levels[0].accepted


@pytest.mark.parametrize("batch", [1, 3])
def test_the_text_of_a_seed_is_plain_generations(target: Any, own: Any, batch: int) -> None:
    """Two assistants with two further tokenizers, with processors that look at the target's ids."""
    (one, first), (two, second) = other(target, SHUFFLED), other(noisy(target, 0.02), HALF)
    given: dict[str, Any] = {"tokenizer": own, "assistant_tokenizer": [first, second]}
    for seed in (1, 2):
        check(target, [one, two], seed, given, **prompts(batch), repetition_penalty=1.3, top_k=20, temperature=0.9)


def test_an_end_is_an_end_in_both(target: Any, own: Any) -> None:
    """The assistant's end-of-text id is another one: its guess of an end is a guess of the target's."""
    copy, _ = other(target, SHUFFLED)
    text = greedy(target, 1).sequences[0].tolist()
    end = text[-6]  # make a word that the text has the one that ends it
    words = list(WORDS)
    words[end], words[-1] = words[-1], words[end]
    others = [{WORDS[end]: END, END: WORDS[end]}.get(word, word) for word in SHUFFLED]
    given: dict[str, Any] = {
        "tokenizer": word_tokenizer(words),
        "assistant_tokenizer": word_tokenizer(others, begin="first"),
        "assistant_models": [copy],
    }
    plain = greedy(target, 1, eos_token_id=end)
    found = greedy(target, 1, eos_token_id=end, **given)
    assert found.sequences.tolist() == plain.sequences.tolist()
    assert found.polyspec.levels[0].forward_passes <= 0.4 * (plain.sequences.shape[1] - 9) + 1


def test_words_that_an_assistant_lacks_may_be_forced(target: Any, own: Any) -> None:
    """Where a processor leaves only ids that a middle has no word for, it still proposes something."""
    middle, tokenizer = other(target, HALF)
    lacking = [i for i, word in enumerate(WORDS) if word not in HALF]
    allowed: dict[str, Any] = {"prefix_allowed_tokens_fn": lambda row, ids: lacking[: 1 + len(ids) % 3]}
    given: dict[str, Any] = {"tokenizer": own, "assistant_tokenizer": [tokenizer, None]}
    found = greedy(target, 1, assistant_models=[middle, SuffixDrafter()], **given, **allowed)
    assert found.sequences.tolist() == greedy(target, 1, **allowed).sequences.tolist()


def test_a_long_prompt_is_read_in_pieces(target: Any, own: Any) -> None:
    copy, tokenizer = other(target, SHUFFLED)
    given: dict[str, Any] = {"tokenizer": own, "assistant_tokenizer": [tokenizer, None]}
    asked: dict[str, Any] = {**prompts(3, length=40), "prefill_chunk_size": 7, "max_new_tokens": 8}
    plain = target.generate(**asked)
    assert torch.equal(target.generate(**asked, assistant_models=[copy, SuffixDrafter()], **given), plain)


def test_one_tokenizer_is_of_the_only_other_vocabulary(target: Any, own: Any) -> None:
    copy, tokenizer = other(target, HALF)
    found = greedy(target, 1, assistant_models=[noisy(target), copy], tokenizer=own, assistant_tokenizer=tokenizer)
    assert not found.polyspec.levels[1].notes
    assert "as words" in found.polyspec.levels[2].notes[0]


def test_the_same_tokenizer_twice_is_nothing_to_translate(target: Any, own: Any) -> None:
    given: dict[str, Any] = {"tokenizer": own, "assistant_tokenizer": word_tokenizer(WORDS)}
    found = greedy(target, 1, assistant_models=[noisy(target)], **given)
    assert not found.polyspec.levels[1].notes


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, r"has another tokenizer than .*; pass both tokenizers \(tokenizer=, assistant_tokenizer=\)"),
        ({"tokenizer": None}, "assistant_tokenizer needs the target's tokenizer too"),
        ({"assistant_tokenizer": "words"}, "assistant_tokenizer must be a tokenizer, got str"),
        ({"assistant_tokenizer": [None, None]}, "assistant_tokenizer has 2 entries and assistant_models 1"),
        ({"words": ["first", "alien"]}, "their tokenizers have no word in common"),
        ({"head": True}, r"assistant_models\[1\] is an EAGLE head under a model with another tokenizer"),
        (
            {"shown": True},
            r"assistant_models\[1\] is Muse.*, which reads hidden states, under a model with another tok",
        ),
        ({"twice": True}, "assistant_tokenizer is one tokenizer, and 2 of the 2 models"),
    ],
)
def test_refusals(target: Any, own: Any, given: dict[str, Any], sentence: str) -> None:
    copy, tokenizer = other(target, HALF)
    tokenizer = word_tokenizer(given["words"], begin="first") if "words" in given else tokenizer
    said: dict[str, Any] = {"tokenizer": own, "assistant_tokenizer": tokenizer, **given} if given else {}
    said = {name: value for name, value in said.items() if name not in ("words", "head", "shown", "twice")}
    levels: list[Any] = [copy]
    if "head" in given:
        levels, said["assistant_tokenizer"] = [copy, head_for(copy)], [tokenizer, None]
    if "shown" in given:
        levels, said["assistant_tokenizer"] = [copy, dflash(1)], [tokenizer, None]
    if "twice" in given:
        levels = [copy, copy]
    with pytest.raises((TypeError, ValueError), match=sentence):
        greedy(target, 1, assistant_models=levels, **said)
