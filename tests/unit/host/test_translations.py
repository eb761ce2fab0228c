# SPDX-License-Identifier: Apache-2.0
"""Which ids of two tokenizers are the same words, and how a text in the one's reads in the other's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from other_words import END, word_tokenizer
from tiny_models import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.host.translated import TranslatedRunner
from hf_polyspec.host.vocabularies import Translation, Vocabularies
from hf_polyspec.telemetry.counters import LevelStats

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(merges: list[tuple[str, str]], begin: str | None = None) -> Any:
    """A byte-level BPE tokenizer with these merges."""
    words = [*ALPHABET, *(a + b for a, b in merges)]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"eos_token": "</s>", **({"bos_token": begin} if begin else {})})
    if begin:
        template = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def metaspace(words: list[str]) -> Any:
    """A tokenizer that writes a space as a low line and unknown bytes as <0xAB>."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *words]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<unk>")


def pair(one: Any, other: Any, rows: int = 400) -> Vocabularies:
    return Vocabularies(one, rows, other, rows)


def test_words_are_matched_by_the_bytes_they_stand_for() -> None:
    bytewise, spaced = byte_level([("Ġ", "a"), ("Ã", "©")]), metaspace(["\u2581a", "é", "b"])
    found = pair(bytewise, spaced)
    ids, others = bytewise.get_vocab(), spaced.get_vocab()
    for mine, theirs in (("Ġa", "\u2581a"), ("Ã©", "é"), ("b", "<0x62>"), ("Ġ", "<0x20>"), ("Ã", "<0xC3>")):
        assert found.pairs[ids[mine]] == others[theirs], mine
    assert found.pairs[ids["</s>"]] == others["<unk>"], "both end a text"
    assert len(set(found.pairs.values())) == len(found.pairs)


def test_ids_without_scores_are_not_matched() -> None:
    one, other = word_tokenizer(["a", "b", "c", END]), word_tokenizer(["c", "b", "a", END])
    assert Vocabularies(one, 4, other, 4).pairs == {0: 2, 1: 1, 2: 0, 3: 3}
    assert Vocabularies(one, 3, other, 2).pairs == {1: 1, 2: 0}


def test_scores_of_other_words_are_nothing_after_softmax() -> None:
    found = Vocabularies(word_tokenizer(["a", "b", "c"]), 5, word_tokenizer(["c", "x", "a", "y"]), 4)
    logits = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    law = found.scores(logits).softmax(-1)
    assert torch.allclose(law[..., [2, 0]], logits[..., [0, 2]].softmax(-1))
    assert not law[..., [1, 3, 4]].any()
    assert torch.isfinite(found.scores(logits)).all()


TEXT = "abcab bcab cabc é abc 中文 ab " * 60


@pytest.mark.parametrize("begin", [None, "<s>"])
def test_a_text_that_grows_and_is_taken_back_reads_as_a_whole(begin: str | None) -> None:
    one, other = byte_level([("a", "b"), ("Ġ", "c")]), byte_level([("b", "c"), ("a", "bc"), ("Ġ", "a")], begin)
    found = pair(one, other)
    growing = Translation(found)
    ids = one.encode(TEXT)
    for end in [*range(1, 40), *range(40, len(ids), 37), len(ids) - 20, len(ids), 300, 310, 500]:
        whole = found.encode(ids[:end])
        assert growing.of(ids[:end]) == ([other.bos_token_id] if begin else []) + whole
    assert growing._frozen[0], "its beginning is not encoded again and again"
    assert other.decode(found.encode(ids)) == one.decode(ids)
    assert not begin or growing.of([other.bos_token_id, *ids]).count(other.bos_token_id) == 1


def test_half_a_character_waits() -> None:
    one, other = byte_level([]), byte_level([("Ã", "©")])
    first, second = one.encode("é")
    found = pair(one, other)
    assert found.encode([*one.encode("a"), first]) == other.encode("a")
    assert found.encode([first, second]) == other.encode("é")


def test_special_tokens_keep_their_name_or_their_part() -> None:
    one, other = byte_level([], "<s>"), byte_level([], "<begin>")
    for tokenizer in (one, other):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", f"<{id(tokenizer)}>"]})
    found = pair(one, other)
    letter = [encoded[1] for encoded in (one.encode("a"), other.encode("a"))]
    text = [one.bos_token_id, letter[0], *one.convert_tokens_to_ids(["<user>", f"<{id(one)}>", "</s>"])]
    named = other.convert_tokens_to_ids(["<user>", "</s>"])
    assert found.encode(text) == [other.bos_token_id, letter[1], *named]


@torch.no_grad()
def test_scores_stand_after_tokens_where_a_token_is_several_of_the_models() -> None:
    """Rows of several lengths, padded, and drafts of words that the model knows, lacks, or writes in two."""
    one, other = byte_level([("a", "b"), ("b", "b")]), byte_level([("Ġ", "a")])
    found, model = pair(one, other), tiny("llama", vocab_size=300)
    runner = TranslatedRunner(ModelRunner(model, "the level", replace_unknown_ids=True), found)
    assert [len(found.piece(token)) for token in one.encode("abcbb")] == [2, 1, 2]
    texts, drafts = ["ab ab", "c a", " abc cabb"], ["abcbb", "bbab", "cc"]
    rows, offered = [one.encode(text) for text in texts], [one.encode(text) for text in drafts]
    width = max(map(len, rows))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    padded = [[7] * (width - len(row)) + row for row in rows]
    context = Context(padded, Prompt(width, mask, (mask.cumsum(-1) - 1).clamp(min=0)))
    for drafted in ([[] for _ in rows], offered):
        logits = runner.run(context, drafted, LevelStats("test", 0)).logits
        for row, (text, draft) in enumerate(zip(rows, drafted, strict=True)):
            read = list(other.encode(one.decode(text)))
            for place in range(len(draft) + 1):
                if place:
                    read += other.encode(one.decode(draft[place - 1 : place]))
                wanted = found.scores(model(torch.tensor([read])).logits[0, -1])
                assert torch.allclose(logits[row, place].softmax(-1), wanted.softmax(-1), atol=1e-5)
