# SPDX-License-Identifier: Apache-2.0
"""A drafter that is right as often as it is told to be, for timing a schedule before a drafter has been trained.

It looks the answer up: the target's own greedy text, written before by plain `generate()`, is proposed token by token,
each replaced by a wrong one as often as the rate says. Nothing about verification is touched, so the text stays the
target's own. Only in the greedy limit is there a text to look up; sampled generation is refused.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..exactness.context import Context
from ..exactness.distributions import LawMaker
from ..exactness.proposal import Proposal
from ..host.configs import generation_config
from .base import Drafter

_SLEEPS = 2e-3
AHEAD = 512


class SyntheticLevel(Drafter):
    """Proposes the target's greedy text with a set rate of right tokens. Its speed says nothing about a real drafter.

    The rate is that of the target. A middle in between accepts what agrees with its own choice, which is the target's
    nearly always for a good middle.

    Args:
        acceptance: 0 to 1, the probability that a token is the target's, independent of all others.
        seconds_per_pass: time a drafted token is made to take, 0 or more.
        draft_tokens: most tokens a round; `num_assistant_tokens` may ask for fewer.
        texts: greedy texts of the target, prompt included, as lists of ids.
        target: writes the texts that are missing, when they are first needed; the time is that call's, so a run that
            is to be timed must be the second one with the same prompt. None: without a text nothing is proposed.
        ahead: how many tokens of a text it writes; further on nothing is proposed.
        seed: of the coins.

    Raises:
        ValueError: a number is out of range.
    """

    synthetic = True
    """Marks every output that this level took part in."""

    shares_noise = True

    def __init__(
        self,
        acceptance: float,
        seconds_per_pass: float = 0.0,
        *,
        draft_tokens: int = 24,
        texts: Iterable[Sequence[int]] = (),
        target: Any = None,
        ahead: int = AHEAD,
        seed: int = 0,
    ) -> None:
        if isinstance(acceptance, bool) or not isinstance(acceptance, (int, float)) or not 0 <= acceptance <= 1:
            raise ValueError(f"acceptance of a synthetic level must be a number from 0 to 1, got {acceptance!r}.")
        if isinstance(seconds_per_pass, bool) or not 0 <= seconds_per_pass < float("inf"):
            raise ValueError(f"seconds_per_pass must be a number of at least 0, got {seconds_per_pass!r}.")
        if isinstance(draft_tokens, bool) or not isinstance(draft_tokens, int) or draft_tokens < 1:
            raise ValueError(f"draft_tokens must be a whole number of at least 1, got {draft_tokens!r}.")
        self.name = f"synthetic {acceptance:g}"
        super().__init__()
        self.acceptance = float(acceptance)
        self.seconds_per_pass = float(seconds_per_pass)
        self.draft_tokens = draft_tokens
        self.seed = seed
        self.ahead = ahead
        self.vocabulary = 0
        self.target = target
        self.texts: list[list[int]] = [list(text) for text in texts]
        self._coins = random.Random(seed)
        self._fresh: list[bool] = []

    def learn(self, texts: Iterable[Sequence[int]]) -> None:
        """Add greedy texts of the target, prompt included."""
        self.texts += [list(text) for text in texts]

    @property
    def most_tokens(self) -> int:
        return self.draft_tokens

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self.vocabulary = vocabulary
        self._coins = random.Random(self.seed)
        self._fresh = [True] * batch
        self.stats.notes.append(
            f"{self.name} is synthetic: it looks the target's text up and is made to be right at a set rate and speed"
        )

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        if law.do_sample:
            raise ValueError(
                "a synthetic level looks up the target's greedy text, and a sampled text is not known before it is "
                "drawn; use temperature 0 (do_sample=False)."
            )
        texts = [self._text(context, b) if limits[b] > 0 else None for b in range(context.batch)]
        with self.stats.timed():
            started = time.perf_counter()
            tokens = [
                [] if text is None else self._continue(text, len(context.visible(b)), min(limits[b], self.draft_tokens))
                for b, text in enumerate(texts)
            ]
            passes = max(len(row) for row in tokens)
            _wait_until(started + self.seconds_per_pass * passes)
        self.stats.forward_passes += passes
        self.stats.drafted += sum(len(row) for row in tokens)
        return Proposal(tokens, None, [[self.index] * len(row) for row in tokens])

    def observe(self, drafted: list[int], accepted: list[int]) -> None:
        self.stats.accepted += sum(accepted)

    def keep_rows(self, rows: list[int]) -> None:
        self._fresh = [self._fresh[row] for row in rows]

    def add_rows(self, count: int) -> None:
        self._fresh = [*self._fresh, *[True] * count]

    def _continue(self, text: list[int], start: int, count: int) -> list[int]:
        right = text[start : start + count]
        return [t if self._coins.random() < self.acceptance else (t + 1) % self.vocabulary for t in right]

    def _text(self, context: Context, row: int) -> list[int] | None:
        """A known text that begins with the row's ids; a prompt that is new is continued if somebody can do it."""
        ids = context.visible(row)
        first, self._fresh[row] = self._fresh[row], False
        for text in reversed(self.texts):
            if len(text) > len(ids) and text[: len(ids)] == ids:
                return text
        # Later than in the first round, a row has left its text because a middle went its own way.
        return self._write_ahead(ids) if first and self.target is not None else None

    def _write_ahead(self, ids: list[int]) -> list[int] | None:
        started = time.perf_counter()
        prompt = torch.tensor([ids], device=self.target.device)
        config = generation_config(self.target, self.ahead, 0.0)
        config.return_dict_in_generate = False
        plain = type(self.target).generate
        output = plain(self.target, prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        self.texts.append(output[0].tolist())
        self.stats.notes.append(
            f"{self.name}: the target wrote {len(self.texts[-1]) - len(ids)} tokens ahead in "
            f"{time.perf_counter() - started:.1f} s of this call; time the next one"
        )
        return self.texts[-1] if len(self.texts[-1]) > len(ids) else None


def parse_synthetic(name: str, target: Any = None) -> SyntheticLevel | None:
    """The level that `synthetic:RATE` or `synthetic:RATE:SECONDS` names; None for any other name.

    Args:
        name: what stands after `--assistant`; target: writes the texts.

    Raises:
        ValueError: a name that starts so and goes on otherwise.
    """
    head, _, rest = name.partition(":")
    if head != "synthetic":
        return None
    try:
        numbers = [float(part) for part in rest.split(":")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 2:
        raise ValueError(
            f"{name!r} is no synthetic level; write synthetic:RATE or synthetic:RATE:SECONDS, as synthetic:0.8:0.002."
        )
    return SyntheticLevel(numbers[0], *numbers[1:], target=target)


def _wait_until(moment: float) -> None:
    """Sleep, then spin: a sleep alone is late by more than a drafted token takes."""
    rest = moment - time.perf_counter()
    if rest > _SLEEPS:
        time.sleep(rest - _SLEEPS)
    while time.perf_counter() < moment:
        pass
