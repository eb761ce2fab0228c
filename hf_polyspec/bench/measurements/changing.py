# SPDX-License-Identifier: Apache-2.0
"""A text whose nature changes while it is written: code, then words that nobody can foresee, then a copy."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

CODE = '''class Shelf:
    """Books by their title, in the order in which they were put there."""

    def __init__(self, room):
        self.room = room
        self.books = {}

    def put(self, title, author, pages):
        if len(self.books) >= self.room:
            raise ValueError(f"there is no room for {title}")
        if title in self.books:
            raise KeyError(f"{title} is there already")
        self.books[title] = {"author": author, "pages": pages}
        return len(self.books)

    def take(self, title):
        if title not in self.books:
            raise KeyError(f"{title} is not there")
        return self.books.pop(title)

    def by_author(self, author):
'''
PARTS = ("code", "random words", "a copy")
SURE, UNSURE = 20.0, 1 / 1.5
"""What logits are multiplied with in code and in random words."""


class Script(LogitsProcessor):
    """Makes a text what it is to be at each place: likeliest tokens, then tokens drawn at a temperature of 1.5, then
    the prompt again.

    Args:
        ids: of the prompt; part: tokens of each part.
    """

    def __init__(self, ids: Sequence[int], part: int) -> None:
        self.ids = list(ids)
        self.part = part

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `[B, V]` of what follows `input_ids`."""
        place = input_ids.shape[1] - len(self.ids)
        if place < 2 * self.part:
            return scores * (SURE if place < self.part else UNSURE)
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.ids[(place - 2 * self.part) % len(self.ids)]] = 0.0
        return forced


class Stopwatch:
    """When each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """The first call is the prompt's."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""


def seconds_of_parts(call: Callable[[dict[str, Any]], Any], ids: torch.Tensor, part: int, seed: int) -> list[float]:
    """Seconds of the parts of one text, that of a part from the last token before it to its own last.

    Args:
        call: generates with these arguments; ids: `[1, L]`, the prompt; part: tokens of each; seed: of the text.
    """
    watch, tokens = Stopwatch(), len(PARTS) * part
    torch.manual_seed(seed)
    call(
        {
            "inputs": ids,
            "attention_mask": torch.ones_like(ids),
            "logits_processor": [Script(ids[0].tolist(), part)],
            "streamer": watch,
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "max_new_tokens": tokens,
            "min_new_tokens": tokens,
        }
    )
    ends = [watch.times[1], *(watch.times[place * part] for place in range(1, len(PARTS) + 1))]
    return [after - before for before, after in itertools.pairwise(ends)]
