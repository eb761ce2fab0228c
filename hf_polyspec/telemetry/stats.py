# SPDX-License-Identifier: Apache-2.0
"""What happened in one `generate()` call: the counters of all its levels, and the ways to look at them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .counters import Decision, LevelStats


@dataclass(frozen=True)
class Placement:
    """Where the levels below a target ran that several processes share.

    Attributes:
        places: for each member of `assistant_models`, "one" (process 0), "replicated" (every process by itself) or
            "sharded" (split as the target is).
        seconds: what was measured before one was chosen: by arrangement (places, joined by commas), seconds of a draft
            for the target with all that it costs, in the process where it took longest; empty where there was nothing
            to choose or to measure.
    """

    places: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, JSON-serialisable."""
        return {"places": list(self.places), "seconds": dict(self.seconds)}


@dataclass
class PolySpecStats:
    """What happened in one `generate()` call.

    Attributes:
        levels: one `LevelStats` per member of the chain, the target first.
        token_levels: per row, the level that first proposed each emitted token (0: the target drew it itself).
        new_tokens: emitted tokens, all rows together.
        seconds: wall time of the whole call.
        decisions: what an online control changed, and when; empty without one.
        bias: per row, the expected number of biased tokens that `polyspec_bias_budget` introduced, an upper bound (in
            expectation) of the total variation between the law of the row and the target's; 0 when exact.
        seed_holds: whether the text is the one that plain generate() writes under the seed; where it is not, the
            target's notes say why. None where nobody promised it: greedy decoding, token and block verification.
        chosen: what `assistant_models="auto"` chose and why; None where it was not asked.
        placement: where levels ran, of a target that several processes share; None in one process.
    """

    levels: list[LevelStats]
    token_levels: list[list[int]]
    new_tokens: int
    seconds: float
    decisions: list[Decision] = field(default_factory=list)
    bias: list[float] = field(default_factory=list)
    seed_holds: bool | None = None
    chosen: str | None = None
    placement: Placement | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, JSON-serialisable."""
        return {
            "new_tokens": self.new_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "levels": [level.to_dict() for level in self.levels],
            "token_levels": [list(row) for row in self.token_levels],
            "decisions": [decision.to_dict() for decision in self.decisions],
            "bias": list(self.bias),
            "seed_holds": self.seed_holds,
            "chosen": self.chosen,
            "placement": None if self.placement is None else self.placement.to_dict(),
        }

    def table(self) -> Any:
        """A `rich.table.Table` with a line per level."""
        from .display import stats_table

        return stats_table(self)

    def _repr_html_(self) -> str:
        """The table, where a notebook shows this object."""
        from .display import stats_html

        return stats_html(self)

    def to_html(self, tokenizer: Any, sequences: Any, prompt_length: int = 0) -> str:
        """The generated text as HTML, each token coloured by the level that first proposed it.

        Args:
            tokenizer: turns ids into text.
            sequences: `[B, L]` ids as `generate()` returned them.
            prompt_length: columns of `sequences` that are prompt.
        """
        from .display import tokens_html

        return tokens_html(self, tokenizer, sequences, prompt_length)

    def to_svg(self, tokenizer: Any, sequences: Any, prompt_length: int = 0, *, lines: int = 12) -> str:
        """A picture of the first row: a line for each pass of the target, tokens coloured as in `to_html`.

        Args:
            tokenizer: turns ids into text.
            sequences: `[B, L]` ids as `generate()` returned them.
            prompt_length: columns of `sequences` that are prompt.
            lines: passes shown at most.
        """
        from .picture import picture

        return picture(self, tokenizer, sequences, prompt_length, lines=lines)
