# SPDX-License-Identifier: Apache-2.0
"""Whether answers that differ in an evaluation part at a tie: the same weights in float32 are asked about both ids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...quantization.modules import sharing_copy
from ..ties import compare
from .evaluation_harnesses import Answers


@dataclass(frozen=True)
class Parting:
    """Where an answer leaves the other.

    Attributes:
        form, chain, batch: the way; sample: its place in the task; step: of the first id that differs.
        ids: the other's and its own, None where a text has ended.
        gap: of their float32 logits; places: that in units in the last place of the larger one, in the dtype that both
            were written in; tolerance: what counts as a tie in it.
        tie: whether both are within it, of each other and of the best logit.
    """

    form: str
    chain: str
    batch: int
    sample: int
    step: int
    ids: tuple[int | None, int | None]
    gap: float | None
    places: float | None
    tolerance: float | None
    tie: bool

    def __str__(self) -> str:
        asked = "an end"
        if self.gap is not None:
            told = f"{self.places:.1f} units in the last place (a tie is {self.tolerance:.3f})"
            asked = f"{self.gap:.3f} apart in float32, {told}"
        where = f"{self.form}, {self.chain}, {self.batch} at a time, sample {self.sample}, id {self.step}"
        return f"{where}: {'a tie' if self.tie else 'no tie'}, {asked}"


class Judge:
    """Looks at answers that differ.

    Args:
        target: as it was loaded; tokenizer: of it.
    """

    def __init__(self, target: Any, tokenizer: Any) -> None:
        self._target, self._tokenizer = target, tokenizer
        self._wide: Any = None

    def partings(self, way: tuple[str, str], batch: int, own: Answers, wanted: Answers) -> list[Parting]:
        """Of every sample whose text differs; none where the harness told no ids."""
        found = []
        pairs = zip(own.texts, wanted.texts, own.ids, wanted.ids, strict=False)
        for place, (one, other, (prompt, new), (_, reference)) in enumerate(pairs):
            if one == other:
                continue
            seen = compare(self._model(), self._tokenizer, prompt, reference, new, dtype=self._target.dtype)
            assert seen is not None, "texts differ and ids do not"
            ids, gap = seen["tokens"], seen["gap"]
            found.append(
                Parting(
                    *way, batch, place, seen["position"], (ids[0], ids[1]), gap,
                    None if gap is None else gap / _last_place(self._target.dtype, max(map(abs, seen["logits"]))),
                    seen["tolerance"], seen["tie"],
                )
            )  # fmt: skip
        return found

    def _model(self) -> Any:
        if self._wide is None:
            wide = self._target.dtype == torch.float32
            self._wide = self._target if wide else sharing_copy(self._target).to(torch.float32)
        return self._wide


def _last_place(dtype: torch.dtype, size: float) -> float:
    """The distance of neighbouring numbers of about `size`."""
    return float(torch.finfo(dtype).eps * 2.0 ** (math.frexp(size)[1] - 1))
