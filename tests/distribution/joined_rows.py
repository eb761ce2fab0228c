# SPDX-License-Identifier: Apache-2.0
"""Three rows that join and leave one loop, as an engine lets them in and out, and how far their texts are from the law.

The second is greedy, the third joins after the first round; all outcomes of all coins are followed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from enumeration import CPU, Replay, TableModel
from transformers import StoppingCriteriaList

from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.passes import Pass
from hf_polyspec.exactness.row_laws import RowLaws
from hf_polyspec.generation.course import Course, Stopping
from hf_polyspec.generation.loop import DecodingLoop
from hf_polyspec.generation.outputs import Recorder, Wanted

PROMPTS = {0: (0,), 1: (1, 0), 2: (1,)}
"""By name of a row."""
LENGTHS = {0: 3, 1: 3, 2: 2}
Texts = tuple[tuple[int, ...], ...]


class Table(TableModel):
    """One whose rows come and go; it remembers nothing of them."""

    def run(self, context: Context, drafts: list[list[int]], stats: Any) -> Pass:
        return replace(super().run(context, drafts, stats), read=context.extended(drafts).ids)

    def keep_rows(self, rows: list[int]) -> None:
        pass

    def add_rows(self, count: int) -> None:
        pass


def drawing(place: int, replay: Replay | None = None) -> LawMaker:
    return LawMaker([], place != 1, CPU, replay)


def _course(place: int) -> Course:
    prompt = PROMPTS[place]
    stopping = Stopping(len(prompt) + LENGTHS[place], frozenset(), False, [], StoppingCriteriaList())
    recorder = Recorder(Wanted(), 1, len(prompt), None)
    return Course([prompt], drawing(place), stopping, pad=0, device=CPU, recorder=recorder)


def written(loop: DecodingLoop, begin: Callable[[], None], law: Callable[[int], LawMaker] = drawing) -> Texts:
    """What the rows come to.

    Args:
        loop: over the target; begin: called where the levels are to begin anew.
        law: of a row, every round anew.
    """
    begin()
    courses = {place: _course(place) for place in PROMPTS}
    waiting, running = [0, 1, 2], list[int]()
    while waiting or running:
        while waiting and len(running) < 2 + (len(waiting) < 2):
            place = waiting.pop(0)
            running.append(place)
            prompt = PROMPTS[place]
            loop.admit(courses[place], Context([list(prompt)], Prompt.apart([len(prompt)], [place])))
        loop.law = RowLaws([law(place) for place in running], running, CPU)
        loop.round()
        left = [place for place in running if not courses[place].finished]
        if left:
            loop.keep([at for at, place in enumerate(running) if place in left])
        elif waiting:
            loop.seats, loop.context = [], None
            begin()
        running = left
    return tuple(tuple(courses[place].rows[0].committed[len(PROMPTS[place]) :]) for place in PROMPTS)


def off_the_law(found: Mapping[Texts, float], target: TableModel) -> float:
    """Total variation between a law of the three texts and what it should be: independent, the second certain."""
    wanted = dict.fromkeys(found, 1.0)
    for key in found:
        for place, text in enumerate(key):
            assert len(text) == LENGTHS[place]
            for i, token in enumerate(text):
                law = target.law(PROMPTS[place] + text[:i])
                wanted[key] *= float(law.argmax() == token) if place == 1 else float(law[token])
    missing = 1 - sum(wanted.values())
    return (sum(abs(found[key] - wanted[key]) for key in found) + missing) / 2
