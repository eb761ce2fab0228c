# SPDX-License-Identifier: Apache-2.0
"""The training losses of EAGLE-1/2 and EAGLE-3 heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from hf_polyspec.eagle.features import TargetParts
from hf_polyspec.eagle.modeling import EagleHead
from hf_polyspec.eagle.training.unroll import shifted, unroll
from hf_polyspec.eagle.vocabulary import readable_rows


@dataclass(frozen=True)
class TargetView:
    """What the frozen target says about a batch of texts.

    Args:
        features: `[B, T, F]`, what the head reads.
        final: `[B, T, H_t]`, what the target's lm_head reads.
        best: `[B, T]`, the target's most likely next token at each position.
        temperatures: `[B]`, each text's, which the target's law is learned at; None for 1.
    """

    features: torch.Tensor
    final: torch.Tensor
    best: torch.Tensor
    temperatures: torch.Tensor | None = None

    def temperatures_at(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Of the rows that a mask `[B, R]` picks, `[N]`."""
        return None if self.temperatures is None else self.temperatures[:, None].expand(rows.shape)[rows]


@dataclass(frozen=True)
class LossSums:
    """A batch's loss before division, so that batches of any size add up.

    Args:
        loss: weighted sum over steps and rows, what is minimised once divided by `rows`.
        rows: rows counted at step 0.
        per_step: `[S]`, unweighted sums of each step's objective, detached.
        counted: `[S]`, rows counted at each step.
    """

    loss: torch.Tensor
    rows: torch.Tensor
    per_step: torch.Tensor
    counted: torch.Tensor


class Teacher(nn.Module):
    """The target's distribution over the ids a head scores.

    Args:
        head: the head.
        parts: the target's modules.
    """

    member: torch.Tensor
    rows: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, head: EagleHead, parts: TargetParts) -> None:
        super().__init__()
        ids = head.target_ids()
        member = torch.zeros(parts.vocab_size, dtype=torch.bool, device=ids.device)
        member[ids] = True
        self.register_buffer("member", member, persistent=False)
        # without a vocabulary of its own the head scores what the target's lm_head scores: no copy is needed
        weight, bias = readable_rows(parts.lm_head, ids) if head.config.maps_vocabulary else (None, None)
        self.register_buffer("rows", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.whole = (parts.lm_head,)  # in a tuple, so that it stays the target's and not this module's
        self.scale, self.softcap = parts.logit_scale, parts.logit_softcap

    @torch.no_grad()
    def probabilities(
        self, final: torch.Tensor, among: torch.Tensor | None = None, temperatures: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The target's distribution restricted to the head's ids and renormalised.

        Args:
            final: `[N, H_t]`, what the target's lm_head reads.
            among: `[M]`, the target ids to restrict it to instead.
            temperatures: `[N]`, each row's; None for 1.

        Returns:
            `[N, Vd]` (`[N, M]`) in float32.

        Raises:
            ValueError: the target's lm_head keeps its rows in a packed form, and only some of them are wanted.
        """
        weight, bias = (self.rows, self.bias) if among is None else readable_rows(self.whole[0], among)
        if weight is None:
            logits = self.whole[0](final)[..., : len(self.member)].float()
        else:
            logits = functional.linear(final.to(weight.dtype), weight, bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if temperatures is not None:
            logits = logits / temperatures[:, None]
        probabilities: torch.Tensor = logits.softmax(dim=-1)
        return probabilities

    def knows(self, ids: torch.Tensor) -> torch.Tensor:
        """Whether the head can say each of some target ids, same shape."""
        found: torch.Tensor = self.member[ids]
        return found


Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(log of the head's law, the target's law), both `[N, Vd]` in float32 -> what is minimised, `[N]`."""


def cross_entropy(log_guess: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """`-sum_x p(x) log q(x)`, p being the target's law and q the head's: the loss of EAGLE's papers."""
    return -(truth * log_guess).sum(dim=-1)


def negative_log_acceptance(log_guess: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """`-log sum_x min(p(x), q(x))`: the sum is the chance that a token drawn from q is accepted.

    A head too small for its target's law cannot have both a small cross-entropy and a large overlap, and drafting
    needs the latter (LK losses, arXiv 2602.23881).
    """
    overlap = torch.minimum(truth, log_guess.exp()).sum(dim=-1)
    return -overlap.clamp(min=torch.finfo(overlap.dtype).tiny).log()


OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": cross_entropy,
    "negative_log_acceptance": negative_log_acceptance,
}
"""What the laws of head and target are compared by, by its name in a config."""


def learned_positions(teacher: Teacher, answer: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """Positions whose next token counts: it belongs to an answer, and the head can say the target's favourite.

    Args:
        teacher: knows which ids the head can say.
        answer: `[B, T]`, whether the token at a position is to be learned.
        best: `[B, T]`, the target's most likely next token at each position.

    Returns:
        `[B, T]` booleans; the first and the last position never count, nothing being left to guess from or to.
    """
    counts = torch.zeros_like(answer, dtype=torch.bool)
    counts[:, 1:-1] = answer[:, 2:].bool()
    return counts & teacher.knows(best)


def eagle3_loss(
    head: EagleHead,
    teacher: Teacher,
    tokens: torch.Tensor,
    answer: torch.Tensor,
    view: TargetView,
    steps: int,
    decay: float,
    among: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    first: int = 0,
    objective: Objective = cross_entropy,
) -> LossSums:
    """Training-time test: `sum_s decay^s * loss_s` over the steps a head drafts (EAGLE-3, arXiv 2503.01840).

    A row counts at step s where the token it guesses belongs to an answer and the target's favourite there is one
    of the ids the head can say.

    Args:
        head: the head, in training mode.
        teacher: the target's distribution over the head's ids.
        tokens: `[B, T]` ids, padded on the right.
        answer: `[B, T]`, whether the token at a position is to be learned.
        view: what the target says about the batch.
        steps: S, 3 to 7 in the literature.
        decay: weight of each step against the one before, 0.8 in the paper's code.
        among: `[M]`, the ids that head and target are compared on, see `SoftmaxIds`; None for all of the head's.
        keep: `[R]`, the rows that draft on after the first step, ascending; they stand for the others in the loss.
            None for all.
        first: the first row that counts, of any of the texts; none of `keep` is before it.
        objective: the loss of a row; the paper's is `cross_entropy`.
    """
    picked = None if among is None else head.vocabulary_slice(among)
    learned = learned_positions(teacher, answer, view.best)  # [B, T]
    truth = teacher.probabilities(view.final[learned], among, view.temperatures_at(learned))  # [N, Vd]
    # [B, T], where each learned position's distribution stands in `truth`
    place = torch.cumsum(learned.flatten(), dim=0).view_as(learned) - 1
    loss = view.final.new_zeros((), dtype=torch.float32)
    sums, counts = [], []
    for step, hidden in enumerate(unroll(head, tokens, view.features, steps, keep, first)):
        rows, where = shifted(learned, 1 + step), shifted(place, 1 + step)  # [B, T-1]
        every = rows.sum()
        drafting = slice(first, None) if step == 0 or keep is None else keep
        rows, where = rows[:, drafting], where[:, drafting]
        counted = rows.sum()
        errors = objective(head.logits(hidden[rows], picked).float().log_softmax(dim=-1), truth[where[rows]])
        loss = loss + decay**step * errors.sum() * (every / counted.clamp(min=1))
        sums.append(errors.detach().sum())
        counts.append(counted)
    return LossSums(loss, answer_rows(answer), torch.stack(sums), torch.stack(counts))


def eagle1_loss(
    head: EagleHead,
    teacher: Teacher,
    tokens: torch.Tensor,
    answer: torch.Tensor,
    view: TargetView,
    *,
    feature_weight: float = 1.0,
    token_weight: float = 0.1,
    among: torch.Tensor | None = None,
    objective: Objective = cross_entropy,
) -> LossSums:
    """`feature_weight * SmoothL1(f', f) + token_weight * loss` (EAGLE, arXiv 2401.15077).

    Args:
        head: the head, in training mode.
        teacher: the target's distribution over the head's ids.
        tokens: `[B, T]` ids, padded on the right.
        answer: `[B, T]`, whether the token at a position is to be learned.
        view: what the target says about the batch; its features may carry noise, its final states do not.
        feature_weight: of the feature regression.
        token_weight: of the objective.
        among, objective: as for `eagle3_loss`.
    """
    picked = None if among is None else head.vocabulary_slice(among)
    hidden = next(unroll(head, tokens, view.features, 1))  # [B, T-1, H]
    rows = shifted(answer, 2).bool()
    guess, truth = hidden[rows], shifted(view.final, 1)[rows]
    regression = functional.smooth_l1_loss(guess.float(), truth.float(), reduction="none").mean(dim=-1)
    log_guess = head.logits(guess, picked).float().log_softmax(dim=-1)
    errors = objective(log_guess, teacher.probabilities(truth, among, view.temperatures_at(rows)))
    loss = (feature_weight * regression + token_weight * errors).sum()
    return LossSums(loss, answer_rows(answer), errors.detach().sum()[None], rows.sum()[None])


def answer_rows(answer: torch.Tensor) -> torch.Tensor:
    """How many rows have an answer's token to guess at step 0, a scalar tensor; the loss is divided by it.

    Args:
        answer: `[B, T]`.
    """
    return answer[:, 2:].sum()


def noisy(features: torch.Tensor, amount: float, generator: torch.Generator) -> torch.Tensor:
    """Adds EAGLE-1's uniform noise, `(u - 0.5) * amount * 512 / T`, to a target's features.

    Args:
        features: `[B, T, F]`.
        amount: 0.2 in the published recipe; 0 for none.
        generator: draws u, so that a resumed run sees the same noise.
    """
    if amount == 0.0:
        return features
    uniform = torch.rand(features.shape, generator=generator).to(features.device, features.dtype)
    return features + (uniform - 0.5) * (amount * 512 / features.shape[1])
