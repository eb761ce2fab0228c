# SPDX-License-Identifier: Apache-2.0
"""The same tokenizer or another one: words decide, special tokens and later additions do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import noisy, tiny
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_polyspec.host.compatibility import check_vocabularies

WORDS = 40
SPECIAL = ["<end>", "<first>", "<second>"]


def member(
    place: Path, special: list[str], *, word: str = "w", added: list[str] | None = None, swap: bool = False
) -> Any:
    """A model that says it came from a folder in which its tokenizer lies."""
    names = [f"{word}{i}" for i in range(WORDS)]
    if swap:
        names[3], names[4] = names[4], names[3]
    vocabulary = {name: i for i, name in enumerate([*names, *special])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=names[0])),
        eos_token=special[0],
        additional_special_tokens=special[1:],
    )
    tokenizer.add_tokens([AddedToken(one, special=False) for one in added or []])
    tokenizer.save_pretrained(place)
    model: PreTrainedModel = tiny("llama")
    model.name_or_path = str(place)
    return model


@pytest.fixture
def target(tmp_path: Path) -> Any:
    return member(tmp_path / "target", SPECIAL)


@pytest.mark.parametrize(
    "changes",
    [
        {"special": SPECIAL},
        {"special": ["<|endoftext|>", *SPECIAL[1:]]},
        {"special": [SPECIAL[0], "<tool>", "<image>"]},
        {"special": [*SPECIAL, "<think>"]},
        {"special": SPECIAL[:2]},
        {"special": SPECIAL, "added": ["<think>", "</think>"]},
    ],
    ids=["equal", "the end renamed", "two renamed", "one more", "one fewer", "additions that are no special tokens"],
)
def test_special_tokens_do_not_make_another_tokenizer(target: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    check_vocabularies(target, member(tmp_path / "other", **changes), "assistant_models[0]")
    check_vocabularies(member(tmp_path / "other", **changes), target, "assistant_models[0]")


@pytest.mark.parametrize("changes", [{"word": "x"}, {"swap": True}], ids=["other words", "two words change places"])
def test_words_do(target: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    other = member(tmp_path / "other", SPECIAL, **changes)
    with pytest.raises(ValueError, match=r"assistant_models\[0\] \(.*other, 48 tokens\) has another tokenizer than"):
        check_vocabularies(target, other, "assistant_models[0]")


def test_tokenizers_of_added_tokens_alone_are_compared_whole(tmp_path: Path) -> None:
    """Where nothing but additions would be left out, they are all there is to go by."""

    def only_added(place: Path, words: list[str]) -> Any:
        core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
        tokenizer.add_tokens(words)
        tokenizer.save_pretrained(place)
        model: PreTrainedModel = tiny("llama")
        model.name_or_path = str(place)
        return model

    one, same, other = (
        only_added(tmp_path / n, w) for n, w in (("a", ["x", "y"]), ("b", ["x", "y"]), ("c", ["y", "x"]))
    )
    check_vocabularies(one, same, "assistant_models[0]")
    with pytest.raises(ValueError, match="another tokenizer"):
        check_vocabularies(one, other, "assistant_models[0]")


def test_without_tokenizers_the_sizes_decide(target: Any, tmp_path: Path) -> None:
    check_vocabularies(target, noisy(tiny("llama")), "assistant_models[0]")
    with pytest.raises(ValueError, match="another tokenizer"):
        check_vocabularies(tiny("llama"), tiny("llama", vocab_size=96), "assistant_models[0]")
