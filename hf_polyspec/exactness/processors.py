# SPDX-License-Identifier: Apache-2.0
"""Our own logits processors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from transformers import LogitsProcessor


class DraftVocabularyProcessor(LogitsProcessor):
    """Lets a drafter propose only the ids of a small vocabulary: every other score becomes -inf.

    The level above has all ids, so the text keeps its law and only the acceptance changes. An EAGLE head with
    `polyspec_draft_vocabulary` drafts exactly as if this ran on its scores, but computes no others (FR-Spec,
    arXiv 2502.14856). Give it to a small drafting model (`CausalLMDrafter(..., restriction=...)`), not to
    `generate(logits_processor=...)`, where it would restrict the target as well.

    Args:
        ids: ids that stay possible; repeated ones count once.

    Raises:
        TypeError: an id is not a whole number.
        ValueError: there are no ids, or one is negative.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        chosen = list(ids.tolist() if isinstance(ids, torch.Tensor) else ids)
        for token in chosen:
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"a draft vocabulary holds token ids (int), got {type(token).__name__}.")
        if not chosen or min(chosen) < 0:
            raise ValueError("a draft vocabulary needs at least one token id, and none below 0.")
        self.ids = sorted(set(chosen))
        self._columns = torch.tensor(self.ids)

    @classmethod
    def from_texts(
        cls, texts: Iterable[Sequence[int]], size: int, always: Iterable[int] = ()
    ) -> DraftVocabularyProcessor:
        """The vocabulary of the `size` ids that texts use most, counted best on text the target has generated.

        Args:
            texts: lists of token ids.
            size: how many ids, 1 or more; fewer where the texts use fewer.
            always: ids that are always among them, such as those that end a text.
        """
        kept = list(dict.fromkeys(always))
        return cls(list(dict.fromkeys([*kept, *rank_tokens(texts)]))[: max(size, len(kept))])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Restrict scores.

        Args:
            input_ids: not looked at; scores: `[..., V]`.
        """
        if self._columns.device != scores.device:
            self._columns = self._columns.to(scores.device)
        columns = self._columns[self._columns < scores.shape[-1]]
        restricted = torch.full_like(scores, float("-inf"))
        return restricted.index_copy_(-1, columns, scores.index_select(-1, columns))


def rank_tokens(texts: Iterable[Sequence[int]]) -> list[int]:
    """Ids that occur in texts, the most frequent first, ties by id.

    Stored as `head.config.frequent_tokens`, the ranking of a target's own texts decides which rows a head drafts from
    where `polyspec_draft_vocabulary` asks for some of them.

    Args:
        texts: lists of token ids, best those a target has generated.
    """
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text.tolist() if isinstance(text, torch.Tensor) else text)
    return sorted(counts, key=lambda token: (-counts[token], token))
