# SPDX-License-Identifier: Apache-2.0
"""How much of what one level offers another would keep, recorded on text the target wrote.

Everything is a ratio q(y) / p(y) along the recorded text: q of the level that offers, p of the level that checks, both
after the tokens before y. Given that a verifier's stream runs along y, the chance that it *accepted* the first i of
those tokens rather than drew them itself is

    token verification:  product of min(1, q_j / p_j), j <= i
    block verification:  min(1, r_1, r_1 r_2, ..., r_1 ... r_i),  r_j = q_j / p_j

The first is Leviathan's rule read backwards: min(p, q)(y) = p(y) min(1, q(y) / p(y)). The second follows from
P(accepted >= i | x_1..x_i) = P_i, the capped running ratio of Sun et al. 2024 (arXiv 2403.10444), times q(x_1..x_i).
Neither needs a coin, and one text serves every draft length and block size. In the greedy limit, and for proposals
that nobody drew, a ratio is 1 where the token is the same and 0 elsewhere.

A middle's own stream is coupled to the text: its token is y with probability min(1, p_m(y) / p_0(y)), else a draw from
the residual max(p_m - p_0, 0). After the first token that differs, its rounds are taken to go on as along the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..exactness.distributions import fit_vocabulary
from ..levels.verifier import Verifier
from ..telemetry.counters import LevelStats
from .rig import Offer, rig
from .texts import Law, Text, context_of

Array = np.ndarray[Any, np.dtype[np.float64]]
NEVER = -math.inf


@dataclass(frozen=True)
class Reading:
    """One model along one text.

    Attributes:
        laws: `[N, V]` its law at each of the N new positions; one-hot in the greedy limit.
        stream: `[N]` its own token there, coupled to the text.
    """

    laws: torch.Tensor
    stream: torch.Tensor

    def own(self) -> torch.Tensor:
        """`[N]`: the probability of its own token."""
        return self.laws.gather(1, self.stream[:, None]).squeeze(1)


def survival(ratios: Array, block: bool) -> Array:
    """P(at least i + 1 tokens accepted) given the text, `[N, K]`, from log ratios `[N, K]`.

    Args:
        ratios: log of q / p by start and depth.
        block: block verification, else token by token; the same where every ratio is 0 or -inf.
    """
    if ratios.shape[1] == 0:
        return np.zeros(ratios.shape)
    if block:
        logs = np.minimum(0.0, np.minimum.accumulate(np.cumsum(ratios, axis=1), axis=1))
    else:
        logs = np.cumsum(np.minimum(0.0, ratios), axis=1)
    return np.asarray(np.exp(logs), dtype=np.float64)


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
        target: the target's own reading, None if this is it; generator: of the coupling.
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
        return Reading(torch.nn.functional.one_hot(best, scores.shape[1]).float(), new if target is None else best)
    laws = scores.softmax(-1)
    if target is None:
        return Reading(laws, new)
    reference = fit_vocabulary(target.laws, laws.shape[1])
    known = new < laws.shape[1]  # an assistant's vocabulary may have fewer rows than the target's
    keep = laws.gather(1, new.clamp(max=laws.shape[1] - 1)[:, None]).squeeze(1) * known / target.own()
    stays = torch.rand(len(new), generator=generator) < keep
    residual = (laws - reference.clamp(min=0)).clamp(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, laws)
    drawn = torch.multinomial(residual, 1, generator=generator).squeeze(1)
    return Reading(laws, torch.where(stays, new, drawn))


def edge(above: Reading, below: Reading) -> Array:
    """`[N]` log of q / p along the stream of the level above, q of the level below."""
    size = below.laws.shape[1]
    known = above.stream < size
    q = below.laws.gather(1, above.stream.clamp(max=size - 1)[:, None]).squeeze(1) * known
    own = above.own()
    # In the greedy limit the target's text is its own argmax but for ties between kernels: count it as its choice.
    ratio = q.double().log() - torch.where(own > 0, own, 1.0).double().log()
    return np.asarray(ratio.numpy(), dtype=np.float64)


def agreement_rate(ratios: Sequence[Array]) -> float:
    """Mean probability that a token is accepted: sum of min(p, q), estimated along the text."""
    joined = np.concatenate(list(ratios))
    return float(np.exp(np.minimum(0.0, joined)).mean())


def logits_along(chain: Verifier, text: Text) -> torch.Tensor:
    """`[1, N + 1, V]` of the top level of a chain, from one pass that the level below is shown."""
    passed = chain.runner.run(text.context(0), [text.new], LevelStats("reading", 0))
    chain.below.watch(passed)
    return fit_vocabulary(passed.logits, chain.vocabulary)
