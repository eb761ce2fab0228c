# SPDX-License-Identifier: Apache-2.0
"""Two tokenizers: which of their ids are the same words, and how a text in the one's ids reads in the other's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch

NOWHERE = 1e4
"""How far below the likeliest known id those lie that an assistant has no word for: softmax makes nothing of it, and a
processor that leaves only such ids still leaves something to draw from."""

_LOOKBACK = 64
"""Ids at the end of a text that are encoded anew whenever it grows; what comes before may be frozen."""
_FREEZE = 256
"""Ids behind the frozen ones from which on more of them are frozen."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no character yet


def _byte_alphabet() -> dict[str, int]:
    """Characters that byte-level tokenizers write bytes with: visible ones for themselves, the rest from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


class Words:
    """A tokenizer's ids by what they stand for.

    Args:
        tokenizer: a transformers tokenizer, slow or fast.
        rows: ids that its model has scores for; further ones are left out.

    Attributes:
        special: ids of special tokens, by their string.
        bytes: ids of all others, by the bytes that they add to a text.
    """

    def __init__(self, tokenizer: Any, rows: int) -> None:
        vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if i < rows}
        added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        marked = {i for i, token in tokenizer.added_tokens_decoder.items() if getattr(token, "special", False)}
        marked |= set(tokenizer.all_special_ids)
        self.special = {token: i for token, i in vocabulary.items() if i in marked}
        words = [(i, token) for token, i in vocabulary.items() if i not in marked and i not in added]
        by_bytes = all(set(token) <= _ALPHABET.keys() for _, token in words)
        self.bytes: dict[bytes, int] = {}
        for i, token in sorted(words):
            self.bytes.setdefault(_as_bytes(token, by_bytes), i)
        for i, text in added.items():
            if i not in marked and i < rows:
                self.bytes.setdefault(text.encode(), i)
        self.roles = {
            role: i
            for role in ("eos", "bos")
            if (i := getattr(tokenizer, f"{role}_token_id", None)) is not None and i < rows
        }


def _as_bytes(token: str, by_bytes: bool) -> bytes:
    if by_bytes:
        return bytes(_ALPHABET[character] for character in token)
    one = _BYTE.fullmatch(token)
    return bytes([int(one[1], 16)]) if one else token.replace("\u2581", " ").encode()


class Vocabularies:
    """The target's tokenizer and an assistant's.

    Args:
        tokenizer, rows: the target's, and how many ids it has scores for.
        assistant_tokenizer, assistant_rows: likewise.

    Attributes:
        mine, theirs: `[N]` each, the target's and the assistant's id of every word that both have.

    Raises:
        TypeError: one is no tokenizer.
    """

    def __init__(self, tokenizer: Any, rows: int, assistant_tokenizer: Any, assistant_rows: int) -> None:
        for name, given in (("tokenizer", tokenizer), ("assistant_tokenizer", assistant_tokenizer)):
            if not (hasattr(given, "get_vocab") and hasattr(given, "decode") and hasattr(given, "encode")):
                raise TypeError(f"{name} must be a tokenizer, got {type(given).__name__}.")
        self.tokenizer, self.assistant_tokenizer = tokenizer, assistant_tokenizer
        self.rows = rows
        own, other = Words(tokenizer, rows), Words(assistant_tokenizer, assistant_rows)
        pairs = {i: other.bytes[word] for word, i in own.bytes.items() if word in other.bytes}
        self._special = {i: other.special[word] for word, i in own.special.items() if word in other.special}
        for role, i in own.roles.items():
            if role in other.roles:
                self._special.setdefault(i, other.roles[role])
        self._marked = set(own.special.values())
        self.pairs = self._one_to_one({**pairs, **self._special})
        self.mine = torch.tensor(sorted(self.pairs), dtype=torch.long)
        self.theirs = torch.tensor([self.pairs[i] for i in sorted(self.pairs)], dtype=torch.long)
        self._pieces: dict[int, list[int]] = {}

    @staticmethod
    def _one_to_one(pairs: dict[int, int]) -> dict[int, int]:
        """Of ids that would share one of the assistant's the first: its probability is to be counted once."""
        taken: set[int] = set()
        found = {}
        for i, other in sorted(pairs.items()):
            if other not in taken:
                found[i] = other
                taken.add(other)
        return found

    @property
    def same(self) -> bool:
        """Whether every word of either has the same id in both: there is nothing to translate."""
        both = (self.tokenizer.get_vocab(), self.assistant_tokenizer.get_vocab())
        return bool(both[0] == both[1])

    @cached_property
    def beginning(self) -> list[int]:
        """The id that the assistant's tokenizer puts before every text, if it does."""
        begin = self.assistant_tokenizer.bos_token_id
        made = list(self.assistant_tokenizer("")["input_ids"])
        return [begin] if begin is not None and made[:1] == [begin] else []

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """`[..., V]` scores of the target's ids from the assistant's `[..., V']`: those of the words that both have;
        softmax gives all others nothing."""
        if self.mine.device != logits.device:
            self.mine, self.theirs = self.mine.to(logits.device), self.theirs.to(logits.device)
        known = logits.index_select(-1, self.theirs)
        lowest = known.amax(-1, keepdim=True) - NOWHERE
        found = lowest.expand(*logits.shape[:-1], self.rows).clone()
        return found.index_copy_(-1, self.mine, known)

    def piece(self, token: int) -> list[int]:
        """One of the target's ids in the assistant's, by itself."""
        if token not in self._pieces:
            both = self.pairs.get(token)
            self._pieces[token] = self.encode([token]) if both is None else [both]
        return self._pieces[token]

    def encode(self, ids: Sequence[int]) -> list[int]:
        """A text in the assistant's ids, through its characters; special tokens by their string or their part."""
        found: list[int] = []
        run: list[int] = []
        for token in ids:
            if token not in self._marked:
                run.append(token)
                continue
            found += self._words(run)
            run = []
            if token in self._special:
                found.append(self._special[token])
        return found + self._words(run)

    def _words(self, ids: list[int]) -> list[int]:
        if not ids:
            return []
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = text.rstrip(_INCOMPLETE)
        return list(self.assistant_tokenizer.encode(text, add_special_tokens=False, verbose=False)) if text else []


class Translation:
    """One row's text in an assistant's ids, as it grows and is taken back.

    All of it is encoded anew but for a beginning that was found to encode to the same by itself.
    """

    def __init__(self, pair: Vocabularies) -> None:
        self.pair = pair
        self._ids: list[int] = []
        self._found: list[int] = []
        self._frozen: tuple[list[int], list[int]] = ([], [])
        self._next = _FREEZE  # ids behind the frozen ones at which freezing is tried

    def of(self, ids: list[int]) -> list[int]:
        """The assistant's ids of the target's `ids`."""
        if ids == self._ids and self._found:
            return self._found
        first, made = self._frozen
        if ids[: len(first)] != first:
            self._frozen, self._next = ([], []), _FREEZE
            first, made = self._frozen
        found = made + self.pair.encode(ids[len(first) :])
        begin = self.pair.beginning
        if begin and found[:1] != begin:
            found = begin + found
        self._ids, self._found = ids, found
        if len(ids) - len(first) >= self._next:
            self._freeze(ids, found)
        return found

    def _freeze(self, ids: list[int], found: list[int]) -> None:
        for place in range(len(ids) - _LOOKBACK, len(ids) - 2 * _LOOKBACK, -_LOOKBACK // 5):
            rest = self.pair.encode(ids[place:])
            cut = len(found) - len(rest)
            if cut > 0 and found[cut:] == rest and self.pair.encode(ids[:place]) in (found[:cut], found[1:cut]):
                self._frozen, self._next = (ids[:place], found[:cut]), _FREEZE
                return
        self._next *= 2


def translations(pair: Vocabularies, rows: Iterable[object]) -> list[Translation]:
    """One for each row."""
    return [Translation(pair) for _ in rows]
