# SPDX-License-Identifier: Apache-2.0
"""Learning to score a large vocabulary by some of its ids at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_polyspec.eagle.training.dataset import Text, draft_vocabulary
from hf_polyspec.eagle.training.prompts import sample_random

_OTHERS = 8
"""One in so many ids is any of the vocabulary, so that none is never told to be unlikely."""


class SoftmaxIds:
    """Chooses the ids that a batch's loss is computed over.

    They are those of the batch and the target's favourites there, as a draft vocabulary that follows the text will
    have them; the commonest ids of all texts; and some others, drawn anew for each batch. Head and target are compared
    on these ids alone, both renormalised: a head that agrees with its target on every such choice agrees on the whole
    vocabulary, at the cost of a small one.

    Args:
        texts: training texts.
        size: ids besides those of the batch.
        vocab_size: the target's ids, V.
        seed: the run's.

    Raises:
        ValueError: size is not below V.
    """

    def __init__(self, texts: Sequence[Text], size: int, vocab_size: int, seed: int) -> None:
        check_size(size, vocab_size)
        self.vocab_size, self.seed = vocab_size, seed
        self.others = size // _OTHERS
        self.common = torch.tensor(draft_vocabulary(texts, size - self.others, vocab_size, ()), dtype=torch.long)

    def choose(self, tokens: torch.Tensor, best: torch.Tensor, number: int) -> torch.Tensor:
        """The ids for one batch.

        Args:
            tokens: `[B, T]` ids of the batch.
            best: `[B, T]`, the target's favourites.
            number: of the batch in the run; decides the others.

        Returns:
            `[N]` distinct ids in ascending order, on the device of the tokens.
        """
        dice = torch.Generator().manual_seed(sample_random(self.seed, number, "softmax").getrandbits(63))
        others = torch.randint(self.vocab_size, (self.others,), generator=dice)
        fixed = torch.cat([self.common, others]).to(tokens.device)
        chosen: torch.Tensor = torch.unique(torch.cat([fixed, tokens.flatten(), best.flatten()]))
        return chosen


def check_size(size: int, vocab_size: int) -> None:
    """Refuses as many ids as the target has, or more: then all of them can be compared.

    Raises:
        ValueError: see above.
    """
    if size >= vocab_size:
        raise ValueError(f"softmax_ids must be below the target's {vocab_size} ids, not {size}")
