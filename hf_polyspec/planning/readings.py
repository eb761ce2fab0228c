# SPDX-License-Identifier: Apache-2.0
"""How much of what one level offers another would keep, recorded on text the target wrote.

Everything is the log of a chance along the recorded text: that what one level says at a position is what the level
above it says there, both after the tokens before it. In the greedy limit, and for proposals that nobody drew, the
chance is 1 where they say the same and 0 elsewhere. Where text is sampled, all levels read one noise: given that the
level above has picked y from p, a level with the law q picks y too with probability 1 / sum_x max(p_x, q_x p_y / q_y)
(`theory.coupling`). Noise is drawn anew at every position, so the chance that the first i tokens of a draft are kept
is the product of theirs; one text serves every draft length and block size.

A middle's own stream is what it picks with the noise that may have been behind the text. After the first token that
differs, its rounds are taken to go on as along the text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ..exactness.row_tensors import fit_vocabulary
from ..levels.verifier import Verifier
from ..telemetry.counters import LevelStats
from .rig import Offer, rig
from .texts import Law, Text, context_of
from .theory.coupling import coupled_agreement, noise_behind

Array = np.ndarray[Any, np.dtype[np.float64]]
NEVER = -math.inf
_CHUNK = 32
"""Positions whose laws are compared at once."""


@dataclass(frozen=True)
class Reading:
    """One model along one text.

    Attributes:
        laws: `[N, V]` its law at each of the N new positions; one-hot in the greedy limit.
        stream: `[N]` its own token there, with the noise of the text.
        noise: `[N, V]`, which may have been behind the text; None in the greedy limit.
    """

    laws: torch.Tensor
    stream: torch.Tensor
    noise: torch.Tensor | None = None


def survival(logs: Array) -> Array:
    """P(at least i + 1 tokens accepted) given the text, `[N, K]`, from logs of chances `[N, K]` by start and depth."""
    return np.asarray(np.exp(np.cumsum(logs, axis=1)), dtype=np.float64)


def windows(along: Array, width: int) -> Array:
    """`[N, K]` from `[N]`: entry (t, j) is that of position t + j.

    The last position of a text is never proposed: it is the verifier's own token.
    """
    padded = np.concatenate([along[:-1], np.full(width + 1, NEVER)])
    return np.array(np.lib.stride_tricks.sliding_window_view(padded, width)[: len(along)], dtype=np.float64)


@torch.no_grad()
def read_model(
    model: Any, text: Text, law: Law, target: Reading | None, generator: torch.Generator, lender: Any = None
) -> Reading:
    """A model's laws along a text, and its stream coupled to the target's.

    Args:
        model: causal LM; text: of the target; law: what its logits become.
        target: the target's own reading, None if this is it; generator: of the noise behind its text.
        lender: the model that lends this one its reading of the prompt in a chain (see `lending`), or None.
    """
    chain = rig(model, [Offer()])
    if lender is not None:
        lends = rig(lender, [Offer()]).runner
        lends.run(context_of([text.prompt], len(text.prompt)), [[]], LevelStats("reading", 0))
        chain.runner.lender = lends
    return reading_of(logits_along(chain, text), text, law, target, generator)


def reading_of(
    logits: torch.Tensor, text: Text, law: Law, target: Reading | None, generator: torch.Generator
) -> Reading:
    """Logits `[1, N + 1, V]` along a text as a `Reading`."""
    maker = law.maker()
    scores = maker.scores(text.context(0), [text.new], logits)[0, :-1].float().cpu()  # [N, V]
    new = torch.tensor(text.new)
    if not law.do_sample:
        best = scores.argmax(-1)
        return Reading(functional.one_hot(best, scores.shape[1]).float(), new if target is None else best)
    laws = scores.softmax(-1)
    if target is None:
        return Reading(laws, new, noise_behind(laws, new, generator))
    assert target.noise is not None, "a target that samples has noise"
    noise = with_columns(target.noise, laws.shape[1])
    return Reading(laws, (laws / noise).argmax(-1), noise)


def with_columns(noise: torch.Tensor, size: int) -> torch.Tensor:
    """Noise `[N, V]` for a law of another size: ids beyond those of the target arrive when they like."""
    return functional.pad(noise[:, :size], (0, max(0, size - noise.shape[1])), value=1.0)


def edge(above: Reading, below: Reading) -> Array:
    """`[N]`, the log of how likely a level says what the level above says, see `agreed`."""
    return agreed(above, 0, below.laws)


def agreed(above: Reading, start: int, laws: torch.Tensor) -> Array:
    """`[n]`, the log of how likely a draft is the token that the level above has picked.

    In the greedy limit the target's text is its own argmax but for ties between kernels: it counts as its choice.

    Args:
        above: that level; start: a position of it; laws: `[n, V]` that drafts come from there and after it.
    """
    size = above.laws.shape[1]
    found = []
    for first in range(0, len(laws), _CHUNK):
        q = laws[first : first + _CHUNK, :size].cpu()
        places = slice(start + first, start + first + len(q))
        q = functional.pad(q, (0, size - q.shape[1]))
        found.append(coupled_agreement(above.laws[places], q, above.stream[places]).log())
    return np.asarray(torch.cat(found).numpy(), dtype=np.float64) if found else np.zeros(0)


def agreement_rate(logs: Sequence[Array]) -> float:
    """Mean probability that a token is accepted, estimated along the text."""
    return float(np.exp(np.concatenate(list(logs))).mean())


def logits_along(chain: Verifier, text: Text) -> torch.Tensor:
    """`[1, N + 1, V]` of the top level of a chain, from one pass that the level below is shown."""
    passed = chain.runner.run(text.context(0), [text.new], LevelStats("reading", 0))
    chain.below.watch(passed)
    return fit_vocabulary(passed.logits, chain.vocabulary)


def noise_seconds(laws: torch.Tensor, repeats: int = 5) -> float:
    """What drawing the noise of a step takes, by the fastest of some draws for one row of laws `[N, V]`."""
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        torch.empty_like(laws[:1]).exponential_(1, generator=torch.Generator())
        found.append(time.perf_counter() - began)
    return min(found)
