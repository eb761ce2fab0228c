# SPDX-License-Identifier: Apache-2.0
"""A runner for models that carry a state on (Mamba, gated delta rules, short convolutions, hybrids with attention).

A state cannot be cut, so it is put back: the runner keeps pictures of the state, each with the number of ids that every
row of it has absorbed, and the memo of law 4 says which of them still begins the ids asked for. Where the scans of the
pass that followed a picture are known, the state after the ids of it that stayed is made from those (see `replay`). A
pass starts, row by row, from the longest of these and feeds the rest: what was accepted since, and the new draft. Rows
that need fewer columns than the neediest are filled up on the right, where nothing that counts comes after; columns
that are masked somewhere in the middle would still move a state. Keys and values of hybrids are rolled back to the same
ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..exactness.context import Context, common_prefix
from ..exactness.passes import Pass
from ..telemetry.counters import LevelStats
from .carried import standing
from .forwarding import Forwarding
from .replay import behind, can_replay, hearing
from .runner import ModelRunner
from .scans import Ears, Heard
from .states import State, StateCache, bytes_of, copy_of, rows_of, set_rows, state_cache
from .stepwise import Stepwise

LAG = 12
"""Accepted ids that are fed once more with every draft where nothing can be replayed, before a pass of its own absorbs
them: with few columns a pass costs about as much as a dozen do, on either side of which both ways cost the same."""
KEPT = 6
"""Pictures that a level keeps whose context may be taken back by levels above it; their distances about double."""
WIDEST = 64
"""Columns of the widest pass that is kept in mind to be replayed: one over a draft, and no prompt."""
_LIVE = None


@dataclass(eq=False)
class Picture:
    """A state of all rows.

    Attributes:
        lengths: how many ids each row of it has absorbed; -1 for a row that has no use for it.
        heard: what the pass from there did, None where that is not known.
        reach: up to how many ids further that pass, as far as the memo goes, can be replayed.
    """

    lengths: list[int]
    state: State
    heard: Heard | None = None
    reach: list[int] = field(default_factory=list)


class RecurrentRunner(ModelRunner):
    """A `ModelRunner` for a model some of whose layers keep a state.

    Args:
        model, name, device, options: see `ModelRunner`.
        steps: feed one column a pass, for models that begin passes of several columns from an empty state, or compute
            them in another way; the prompt is read in one pass, as plain generation reads it.
        columns: let the layers with a state read one column after another within a pass, see `Stepwise`; for models
            that would otherwise have to be fed so.
        kept: pictures to keep; 1 is enough where no level above takes a context back.
    """

    cuts = False
    shortens = True  # scans are asked for chunks no longer than a draft

    def __init__(
        self,
        model: Any,
        name: str,
        device: torch.device | None = None,
        *,
        steps: bool = False,
        columns: bool = False,
        kept: int = KEPT,
        **options: Any,
    ) -> None:
        super().__init__(model, name, device, **options)
        self.stepwise = Stepwise(model) if columns else None
        self._ears = Ears(model)
        self.kept = kept
        self.cache: StateCache = state_cache(model)
        self.replays = not steps and not columns and can_replay(model)
        self._heard: Heard | None = None
        self._pictures: list[Picture] = []
        self._sources: list[tuple[int, Picture | None]] = []  # where the next pass starts, row by row
        self._needed: list[int] = []  # columns that each row wants fed
        self._peak = 0
        self._note: str | None = None
        if steps:
            self.read_singly()

    @property
    def marks_prompt(self) -> bool:
        """Whether the pass that reads the prompt may be of another kind than later ones."""
        return self._forwarding.marks_prompt

    def read_singly(self) -> None:
        """Feed one column a pass from now on, before anything was read."""
        # Plain generation's way with models that are fed so is written down in `_call`.
        self._forwarding = Forwarding(self.model, self._forwarding.extras, asks=False)
        self.steps, self.stepwise = True, None

    def run(self, context: Context, drafts: list[list[int]], stats: LevelStats, *, columns: int = 0) -> Pass:
        """As `ModelRunner.run`; what a row lags behind by more than `LAG` ids is absorbed in a pass before it."""
        own = self._own_view(context)
        if self.stepwise is not None and self.use_cache:
            self._read_turn(own, stats)
        if self.use_cache and not self.steps and any(drafts):
            self._catch_up(own, stats)
        self._needed = [1 + len(draft) for draft in drafts]
        return self._fed(context, drafts, stats, columns)

    def settle(self, context: Context, stats: LevelStats) -> None:
        """Make the cache hold exactly these rows, all of one length."""
        while any(missing := self._missing(context.ids)):
            self._absorb(context, missing, min(count for count in missing if count), stats)
        self._sources = self._choose(context.ids, [0] * len(missing))
        self._roll_back([start for start, _ in self._sources])
        self.memo = context.ids

    def keep_rows(self, rows: list[int]) -> None:
        super().keep_rows(rows)
        self._pictures = [
            Picture(
                [one.lengths[row] for row in rows],
                rows_of(one.state, rows),
                one.heard.of_rows(rows) if one.heard else None,
                [one.reach[row] for row in rows] if one.heard else [],
            )
            for one in self._pictures
        ]

    def _fed(self, context: Context, drafts: list[list[int]], stats: LevelStats, columns: int = 0) -> Pass:
        self._heard = None
        passed = super().run(context, drafts, stats, columns=columns)
        if self._heard is not None and self._pictures:
            last = self._pictures[-1]
            last.heard, self._heard = self._heard, None
            last.reach = [len(ids) - n for ids, n in zip(self.memo, last.lengths, strict=True)]
        self._thin(stats)
        return passed

    def _catch_up(self, context: Context, stats: LevelStats) -> None:
        """Absorb all but the last id of rows that lag far behind."""
        behind = [ids[:-1] for ids in context.ids]
        furthest = min if self.cache.even else max
        while furthest(missing := self._missing(behind)) > LAG:
            # From the beginning no row may be filled up: there is no earlier state of it to come back to.
            anew = missing == [len(ids) for ids in behind]
            least = min(missing) if anew or self.cache.even else min(count for count in missing if count > LAG)
            self._absorb(Context(behind, context.prompt), missing, least, stats)

    def _read_turn(self, context: Context, stats: LevelStats) -> None:
        """Absorb the rest of a prompt whose beginning a caller's cache holds, before any row gets ahead of others.

        Plain generation reads it at once; columns behind it are read one by one, which is not the same here.
        """
        prompts = [ids[: max(0, context.prompt.width - 1)] for ids in context.ids]
        missing = self._missing(prompts)
        if 0 < max(missing, default=0) < len(prompts[0]):
            self._absorb(Context(prompts, context.prompt), missing, max(missing), stats)

    def _missing(self, sequences: list[list[int]]) -> list[int]:
        """Ids of each row that its best state has not absorbed."""
        starts = self._choose(sequences, [0] * len(sequences))
        return [len(ids) - start for ids, (start, _) in zip(sequences, starts, strict=True)]

    def _absorb(self, context: Context, missing: list[int], count: int, stats: LevelStats) -> None:
        """Feed each row the next `count` ids that it lacks, or as many as there are."""
        pieces = [ids[: len(ids) - max(0, lacks - count)] for ids, lacks in zip(context.ids, missing, strict=True)]
        self._needed = [0] * len(pieces)
        self._fed(Context(pieces, context.prompt), [[] for _ in pieces], stats)

    def _choose(self, sequences: list[list[int]], needed: list[int]) -> list[tuple[int, Picture | None]]:
        """Per row, the longest state that begins its ids and leaves as many to feed: its ids, and where it is."""
        nothing: list[tuple[int, Picture | None]] = [(0, _LIVE) for _ in sequences]
        if not self.memo or not self.use_cache:
            return nothing
        held = [len(ids) for ids in self.memo]
        lengths: list[tuple[Picture | None, list[int], list[int]]] = [(_LIVE, held, [0] * len(held))]
        lengths += [(one, one.lengths, one.reach or [0] * len(held)) for one in self._pictures]
        most = [
            min(common_prefix(have, ids), len(ids) - least)
            for have, ids, least in zip(self.memo, sequences, needed, strict=True)
        ]
        if self.cache.even:
            most = [min(most)] * len(most)
            lengths = [one for one in lengths if len(set(one[1])) == 1]
        found = []
        for row, limit in enumerate(most):
            # Of those that reach equally far, the one with the least to replay.
            starts = [(min(n[row] + more[row], limit), n[row], one) for one, n, more in lengths if n[row] <= limit]
            start, _, one = max(starts, key=lambda start: start[:2], default=(0, 0, _LIVE))
            found.append((start, one))
        # A row that has nothing to start from reads its padding again, and others may be fed none.
        return nothing if any(start <= 0 for start, _ in found) else found

    def _filling(self, sequences: list[list[int]], wanted: int) -> list[int]:
        self._sources = self._choose(sequences, self._needed)
        lacks = [len(ids) - start for ids, (start, _) in zip(sequences, self._sources, strict=True)]
        return [max(lacks) - count for count in lacks]

    def _plan(self, sequences: list[list[int]], wanted: int) -> tuple[list[int], int]:
        keep = [start for start, _ in self._sources]
        return keep, len(sequences[0]) - keep[0]

    def _roll_back(self, keep: list[int]) -> int:
        if not self.use_cache:
            return 0
        if not any(keep):
            self._pictures = []
            self.cache.forget()
            return self.cache.realign([len(ids) for ids in self.memo], keep) if self.memo else 0
        self._put_back(keep)
        return self.cache.realign([len(ids) for ids in self.memo], keep)

    def _put_back(self, keep: list[int]) -> None:
        """Make the cache's state what the sources say, and keep a picture of that."""
        sources = self._replayed(keep)
        first = sources[0]
        if any(picture is not first for picture in sources):
            state = self.cache.state() if first is _LIVE else copy_of(first.state)
            for other in {id(picture): picture for picture in sources if picture is not first}.values():
                rows = [row for row, picture in enumerate(sources) if picture is other]
                set_rows(state, self.cache.state(copied=False) if other is _LIVE else other.state, rows)
            self.cache.put(state)
        elif first is not _LIVE:
            self.cache.put(copy_of(first.state))
        if first is not _LIVE and all(picture is first for picture in sources):
            self._pictures = [one for one in self._pictures if one is not first]
            before = Picture(list(keep), first.state)
        else:
            before = Picture(list(keep), self.cache.state())
        # What is longer than where a row now starts is no longer what its ids begin with, or soon will not be.
        for one in self._pictures:
            reached = zip(one.lengths, one.reach, keep, strict=False)
            one.reach = [max(0, min(more, start - n)) for n, more, start in reached]
            one.lengths = [n if n < start else -1 for n, start in zip(one.lengths, keep, strict=True)]
        self._pictures = [one for one in self._pictures if max(one.lengths) > 0] + [before]

    def _replayed(self, keep: list[int]) -> list[Picture | None]:
        """Where each row's state comes from, with pictures of what passes were replayed to make."""
        made: dict[int, Picture] = {}
        for one in {id(picture): picture for _, picture in self._sources if picture is not _LIVE}.values():
            pairs = zip(self._sources, one.lengths, strict=True)
            counts = [start - n if picture is one else 0 for (start, picture), n in pairs]
            if one.heard is not None and any(counts):
                made[id(one)] = Picture(list(keep), behind(self.cache, one.state, one.heard, counts))
        return [made.get(id(picture), picture) for _, picture in self._sources]

    def _thin(self, stats: LevelStats) -> None:
        """Let pictures go that stand close to others, and say what those that are kept take."""
        while len(self._pictures) > self.kept:
            distances = [
                max(len(ids) - n for ids, n in zip(self.memo, one.lengths, strict=True) if n > 0)
                for one in self._pictures
            ]
            inner = range(1, len(distances) - 1) if self.kept > 1 else range(len(distances) - 1)
            self._pictures.pop(min(inner, key=lambda i: distances[i - 1] / max(1, distances[i + 1])))
        taken = sum(bytes_of(one.state) + (one.heard.bytes if one.heard else 0) for one in self._pictures)
        if taken > self._peak:
            self._peak = taken
            kept = f"keeps up to {self.kept} earlier states of its recurrent layers"
            more = " and what passes from there scanned" if self.replays else ""
            note = f"{kept}{more}, {taken:,} bytes at most so far"
            stats.notes[:] = [one for one in stats.notes if one != self._note] + [note]
            self._note = note

    def _call(self, inputs: dict[str, Any], logits: int, past: int, stats: LevelStats, grown: list[int]) -> Any:
        named = "inputs_embeds" if "inputs_embeds" in inputs else "input_ids"
        fed = inputs[named].shape[1]
        # Plain generation reads a prompt in one pass, and whatever follows column by column.
        first = max(1, fed - min(grown))
        if self.stepwise is not None and self.use_cache and fed > first:
            with self.stepwise.reading(first):
                return self._once(inputs, logits, past, stats, grown)
        if not self.steps or not self.use_cache or fed == 1:
            return self._once(inputs, logits, past, stats, grown)
        outputs = []
        for start, end in [(0, first), *((c, c + 1) for c in range(first, fed))]:
            piece = dict(inputs)
            for name in (named, "position_ids"):
                if name in piece:
                    piece[name] = inputs[name][:, start:end]
            if inputs["attention_mask"] is not None:
                seen = not start or self.cache.attends
                piece["attention_mask"] = inputs["attention_mask"][:, : past + end] if seen else None
            outputs.append(self._once(piece, min(logits, end - start), past, stats, grown))
        return _joined(outputs)

    def _once(self, inputs: dict[str, Any], logits: int, past: int, stats: LevelStats, grown: list[int]) -> Any:
        """One pass, to which what the model carries on outside of cache layers is given, and from which it is taken."""
        if not self.use_cache or not self.cache.carried.any:
            return self._scanned(inputs, logits, past, stats, grown)
        name = self.cache.carried.argument
        if name is not None:
            inputs[name] = self.cache.argument
        with standing(self.cache.carried.places, self.cache.places):
            output = super()._call(inputs, logits, past, stats, grown)
        if name is not None:
            self.cache.argument = output[name]
        return output

    def _scanned(self, inputs: dict[str, Any], logits: int, past: int, stats: LevelStats, grown: list[int]) -> Any:
        """One pass, whose scans are short and kept in mind; a prompt's stay what they are in plain generation."""
        fed = inputs["inputs_embeds" if "inputs_embeds" in inputs else "input_ids"].shape[1]
        if not past or fed == 1 or not (self.replays or self.shortens):
            return super()._call(inputs, logits, past, stats, grown)
        if not self.replays or fed > WIDEST:
            with self._ears.hearing(None):
                return super()._call(inputs, logits, past, stats, grown)
        with hearing(self._ears, self.cache) as heard:
            output = super()._call(inputs, logits, past, stats, grown)
        if heard.covers(self.cache.layers):
            self._heard = heard
        return output

    def _inputs(
        self, context: Context, sequences: list[list[int]], keep: list[int], past: int, fed: int
    ) -> dict[str, Any]:
        inputs = super()._inputs(context, sequences, keep, past, fed)
        mask = inputs["attention_mask"]
        if past and not self.cache.attends and mask is not None:
            # Nothing of a model without keys and values looks at columns that were read before; some of these models
            # take the whole mask for that of the new ones, and plain generation shows them one with a prompt only.
            inputs["attention_mask"] = mask[:, past:] if past < context.prompt.width else None
        return inputs

    def _align(self, logits: torch.Tensor, drafts: list[list[int]], wanted: int) -> torch.Tensor:
        lacking = wanted - logits.shape[1]
        if lacking > 0:  # a pass that only absorbs, whose logits nobody reads, may be narrower than its filling
            logits = torch.cat([logits[:, :1].expand(-1, lacking, -1), logits], dim=1)
        return super()._align(logits, drafts, wanted)

    def _remember(self, sequences: list[list[int]], expected: int) -> None:
        if not self.cache.measurable:
            self.cache.width = expected
        super()._remember(sequences, expected)

    def _recover(self, past: int) -> None:
        super()._recover(past)
        self._pictures = []
        self.cache = state_cache(self.model)


def _joined(outputs: list[Any]) -> Any:
    """What passes over one column after another said, as if it had been one pass."""
    joined = outputs[-1]
    joined.logits = torch.cat([one.logits for one in outputs], dim=1)
    if getattr(joined, "hidden_states", None) is not None:
        layers = zip(*(one.hidden_states for one in outputs), strict=True)
        joined.hidden_states = tuple(torch.cat(parts, dim=1) for parts in layers)
    return joined
