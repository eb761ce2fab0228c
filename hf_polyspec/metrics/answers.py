# SPDX-License-Identifier: Apache-2.0
"""Reading answers out of generated text: GSM8K's final number, short answers compared by SQuAD's rules."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+"
_MARKED = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonical_number(text: str) -> str:
    """One spelling for equal numbers: `"$1,000.50"` and `"1000.5"` become `"1000.5"`."""
    value = Decimal(text.replace(",", "").replace("$", ""))
    plain = f"{value:f}"
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain in ("-0", "") else plain


def marked_number(text: str) -> str | None:
    """The number after the first `####`, the answer format of GSM8K (Cobbe et al. 2021), or None."""
    found = _MARKED.search(text)
    return canonical_number(found[1]) if found else None


def final_number(text: str) -> str | None:
    """The number after `####` if it is marked so, else the last number in the text, or None."""
    marked = marked_number(text)
    if marked is not None:
        return marked
    found = _ANY.findall(text)
    return canonical_number(found[-1]) if found else None


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces: SQuAD's rules (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(output: str, references: Sequence[str]) -> float:
    """1.0 when the output equals one of the references after normalisation, else 0.0."""
    return float(any(normalized(output) == normalized(reference) for reference in references))


def token_f1(output: str, references: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall against the best reference, 0 to 1 (SQuAD's F1)."""
    return max((_f1(normalized(output).split(), normalized(text).split()) for text in references), default=0.0)


def contains_answer(output: str, references: Sequence[str]) -> float:
    """1.0 when a reference occurs in the output as whole words after normalisation, else 0.0.

    Chat models answer in sentences, which exact match never rewards and F1 hardly.
    """
    haystack = f" {normalized(output)} "
    needles = [normalized(reference) for reference in references]
    return float(any(needle and f" {needle} " in haystack for needle in needles))


def _f1(words: list[str], wanted: list[str]) -> float:
    shared = sum((Counter(words) & Counter(wanted)).values())
    return 2 * shared / (len(words) + len(wanted)) if shared else 0.0
