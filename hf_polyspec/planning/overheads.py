# SPDX-License-Identifier: Apache-2.0
"""Wall time that no level counts: of a call, of a model in the chain, of the rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..host.configs import generation_config
from .rig import Offer
from .turns import Turn, over_turns

SHORT, LONG = 1, 17
"""New tokens of the generations that are compared: a long one has many rounds, a short one a single round."""
LENGTHS = (SHORT, LONG)
_BLOCK = 4


@dataclass(frozen=True)
class Overheads:
    """Wall time that no level counts.

    Attributes:
        call: of one generate() call; per_round: of a target round; per_block_round: of a middle's round.
        per_model: of a call, for every model below the target: it is packed, compared with the target, set up.
    """

    call: float = 0.0
    per_round: float = 0.0
    per_block_round: float = 0.0
    per_model: float = 0.0


@dataclass
class OverheadProbe:
    """Short generations whose drafts are wrong, with and without a middle; what their levels do not account for.

    They go through the same door as a user's call, so whatever a call does once is in them. They must not run where
    the assistants are packed already: packing is a part of the call.

    Attributes:
        target: the model; middle: an assistant that can check, or None.
        rest: wall seconds outside the levels, by (with a middle, new tokens) and turn.
        rounds: (rounds of the target, rounds of the middle) of the long ones, by turn.
    """

    target: Any
    middle: Any | None
    rest: dict[tuple[bool, int], dict[Turn, float]] = field(default_factory=dict)
    rounds: dict[bool, dict[Turn, tuple[int, int]]] = field(default_factory=dict)

    def probes(self, turn: Turn, prompt: Sequence[int]) -> list[Callable[[], None]]:
        """The generations of one turn, each to be called once."""
        kinds = [(inside, tokens) for inside in (False, True)[: 1 + (self.middle is not None)] for tokens in LENGTHS]
        return [partial(self._run, turn, prompt, *kind) for kind in kinds]

    def _run(self, turn: Turn, prompt: Sequence[int], inside: bool, tokens: int) -> None:
        members = [self.middle, Offer()] if inside else [Offer()]
        rest, rounds, inner = _unaccounted(self.target, members, prompt, tokens)
        self.rest.setdefault((inside, tokens), {})[turn] = rest
        if tokens == LONG:
            self.rounds.setdefault(inside, {})[turn] = rounds, inner

    def found(self) -> Overheads:
        """What the turns so far say."""
        rest = {kind: over_turns(of_turn) for kind, of_turn in self.rest.items()}
        rounds, _ = self._mean(False)
        per_round = max(0.0, (rest[False, LONG] - rest[False, SHORT]) / max(1.0, rounds - 1))
        call = max(0.0, rest[False, SHORT] - per_round)
        if self.middle is None:
            return Overheads(call, per_round)
        # Over one token the middle is not asked, and what is left is what having it costs a call.
        per_model = max(0.0, rest[True, SHORT] - rest[False, SHORT])
        rounds, inner = self._mean(True)
        left = rest[True, LONG] - rest[True, SHORT] - (rounds - 1) * per_round
        return Overheads(call, per_round, max(0.0, left / max(1.0, inner)), per_model)

    def _mean(self, inside: bool) -> tuple[float, float]:
        of_turn: Mapping[Turn, tuple[int, int]] = self.rounds[inside]
        return (
            sum(outer for outer, _ in of_turn.values()) / len(of_turn),
            sum(inner for _, inner in of_turn.values()) / len(of_turn),
        )


def measure_overheads(target: Any, middle: Any | None, prompt: Sequence[int], repeats: int = 3) -> Overheads:
    """Run short generations whose drafts are wrong, and see what the levels do not account for.

    Args:
        target: the model; middle: an assistant that can check, or None.
        prompt: ids; repeats: generations of each kind, after one that is thrown away.
    """
    for counts in (False, True):
        found = OverheadProbe(target, middle)
        for repeat in range(repeats if counts else 1):
            for probe in found.probes((repeat, 0), prompt):
                probe()
    return found.found()


def _unaccounted(target: Any, members: list[Any], prompt: Sequence[int], tokens: int) -> tuple[float, int, int]:
    """Wall seconds outside the levels, target rounds and middle rounds of one generation."""
    from ..generation.doors import generate

    ids = torch.tensor([list(prompt)], device=target.device)
    started = time.perf_counter()
    output = generate(
        target,
        ids,
        attention_mask=torch.ones_like(ids),
        assistant_models=members,
        generation_config=generation_config(target, tokens, 0.0),
        polyspec_block_size=_BLOCK,
        polyspec_direct_tokens=0,
    )
    wall = time.perf_counter() - started
    levels = output.polyspec.levels
    inner = levels[1].rounds if len(levels) > 2 else 0
    return wall - sum(level.seconds for level in levels), levels[0].rounds, inner
