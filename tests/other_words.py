# SPDX-License-Identifier: Apache-2.0
"""Tokenizers made of word lists, and models that say the same in other words' ids."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<end>"


def word_tokenizer(words: Sequence[str], *, begin: str | None = None) -> Any:
    """A word per id, in this order; `END`, if it is among them, and the one that begins texts are special."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END if END in words else None, bos_token=begin)


def in_other_ids(model: Any, words: Sequence[str], others: Sequence[str]) -> Any:
    """A copy of a model whose ids stand for `others`: what both have it says as likely; of other words, hardly ever."""
    found = copy.deepcopy(model)
    places = {word: i for i, word in enumerate(words)}
    known = [(i, places[word]) for i, word in enumerate(others) if word in places]
    theirs, mine = (torch.tensor(column) for column in zip(*known, strict=True))
    found.resize_token_embeddings(len(others))
    with torch.no_grad():
        for layer, like in (
            (found.get_input_embeddings(), model.get_input_embeddings()),
            (found.get_output_embeddings(), model.get_output_embeddings()),
        ):
            layer.weight.zero_()
            layer.weight[theirs] = like.weight[mine]
    found.generation_config = copy.deepcopy(model.generation_config)
    return found
