# SPDX-License-Identifier: Apache-2.0
"""Levels that are shown hidden states emit the target's law exactly: multi-token-prediction layers, block diffusion,
and assistants that read the keys of the level above. Every outcome of every coin, total variation below 1e-9.

The levels are the real ones; what stands in for their models says a law of its own behind every text it is led to, and
refuses to go on from anything but that text. A hidden state is the number of the text it was computed from.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from enumeration import EXACT, OneChoice, TableModel, approximations, emitted_law, sampling, total_variation, true_law

from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.passes import Pass
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels.dflash import DFlashDrafter
from hf_polyspec.levels.emission import Emission
from hf_polyspec.levels.keyless import KeylessDrafter
from hf_polyspec.levels.mtp import MtpDrafter
from hf_polyspec.levels.shown import ShownDrafter
from hf_polyspec.levels.verifier import Verifier

Text = tuple[int, ...]
START, LENGTH, VOCABULARY = (0, 1, 0), 5, 2
_texts: list[Text] = []


def _number(text: Text) -> float:
    if text not in _texts:
        _texts.append(text)
    return float(_texts.index(text))


def _text(state: torch.Tensor) -> Text:
    return _texts[int(state)]


def _shown(text: list[int], fed: int) -> Pass:
    """A pass that has read a text, its last `fed` ids anew."""
    states = torch.tensor([[[_number(tuple(text[: end + 1]))] for end in range(len(text) - fed, len(text))]])
    return Pass(states, SimpleNamespace(hidden_states=[states]), fed, [text])


class Showing(TableModel):
    """A model that shows its hidden states."""

    def run(self, context: Context, drafts: list[list[int]], stats: Any) -> Pass:
        passed = super().run(context, drafts, stats)
        text = context.ids[0] + drafts[0]
        shown = _shown(text, min(len(text), passed.fed + 1))  # as far back as it may lag behind
        return Pass(passed.logits, shown.output, shown.fed, shown.read)


class Target(Verifier):
    """Whatever else was tried before, it has read all but the last token when a round begins."""

    def round(self, context: Context, limits: list[int], law: LawMaker) -> Emission:
        self.below.watch(_shown(context.ids[0][:-1], len(context.ids[0]) - 1))
        return super().round(context, limits, law)


class Middle(Verifier):
    """Behind every other text it has not read the last token but one either when it is asked for a block."""

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        ids = context.ids[0]
        read = ids[: -1 - len(ids) % 2]
        self.below.watch(_shown(read, len(read)))
        return super().propose(context, limits, law)


class Layers:
    """Two layers; each says what follows the text that it was led to."""

    count, width = 2, 1

    def __init__(self, table: TableModel) -> None:
        self.table = table

    def new_cache(self) -> list[list[Text]]:
        return [[] for _ in range(self.count)]

    def held(self, cache: list[list[Text]], layer: int) -> int:
        return len(cache[layer])

    def shrink(self, cache: list[list[Text]], layer: int, length: int) -> None:
        del cache[layer][length:]

    def step(self, layer: int, hidden: torch.Tensor, tokens: list[int], first: int, cache: Any) -> torch.Tensor:
        said = []
        assert len(cache[layer]) == first - layer - 1
        for place, (state, token) in enumerate(zip(hidden[:, 0], tokens, strict=True)):
            text = _text(state)
            assert len(text) == first + place
            said.append((*text, token))
            cache[layer].append(said[-1])
        assert all(said[-1][: len(column)] == column for column in cache[layer])
        return torch.tensor([[_number(text)] for text in said])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.table.logits(_text(hidden[0]))


class Block:
    """A block of three places; what it says of one does not look at what is drawn before it."""

    model, block, mask, layers, width = None, 3, 9, (-1,), 1

    def __init__(self, table: TableModel) -> None:
        self.table = table

    def new_cache(self) -> list[Text]:
        return []

    def held(self, cache: list[Text]) -> int:
        return len(cache)

    def shrink(self, cache: list[Text], length: int) -> None:
        del cache[length:]

    def say(self, features: torch.Tensor, known: list[int], first: int, cache: list[Text]) -> torch.Tensor:
        assert len(cache) == first
        cache += [_text(state) for state in features[:, 0]]
        text = cache[-1]
        assert cache == [text[: end + 1] for end in range(len(text))]
        places = range(self.block - len(known))
        return torch.stack([self.table.logits((*text, *known, *[self.mask] * place)) for place in places])


class Reader:
    """An assistant that reads the keys of the level above, which are the ids they were made of."""

    model, width = None, 1

    def __init__(self, table: TableModel) -> None:
        self.table = table

    def read(self, row: int, context: Context, wanted: int) -> tuple[Any, int]:
        return {"ids": tuple(context.ids[row][:wanted])}, wanted

    def taken(self, shared: Any) -> Any:
        return shared

    def step(self, token: int, hidden: torch.Tensor, shared: Any, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        text = (*_text(hidden[0]), token)
        assert position == len(shared["ids"])
        assert text[:position] == shared["ids"]
        return self.table.logits(text), torch.tensor([_number(text)])


def mtp(table: TableModel, kind: Any = MtpDrafter) -> ShownDrafter:
    drafter: ShownDrafter = kind(Layers(table))
    return drafter


def dflash(table: TableModel, kind: Any = DFlashDrafter) -> ShownDrafter:
    drafter: ShownDrafter = kind(Block(table), "dflash")
    return drafter


def keyless(table: TableModel, kind: Any = KeylessDrafter) -> ShownDrafter:
    drafter = kind(Reader(table), "keyless")
    drafter.settle(
        draft_tokens=2, confidence_threshold=0.4, schedule="constant", eos=frozenset(), draft_temperature=0.8
    )
    drafter.keys = drafter.drafter
    found: ShownDrafter = drafter
    return found


DRAFTERS = {"mtp": (mtp, MtpDrafter), "dflash": (dflash, DFlashDrafter), "keyless": (keyless, KeylessDrafter)}


def distance(drafter: ShownDrafter, tables: list[TableModel], rule: str, middle: bool) -> float:
    """Total variation between what the target emits and its law."""
    below: Any = drafter
    if middle:
        below = OneChoice(Middle(tables[1], drafter, name="middle", block_size=3, rule=rule))
    top = Target(tables[0], below, name="target", rule=rule)
    top.begin(0, 1, VOCABULARY)
    emitted = emitted_law(top, sampling(), START, LENGTH)
    assert sum(emitted.values()) == pytest.approx(1, abs=1e-12)
    assert drafter.stats.drafted > 10
    return total_variation(emitted, true_law(tables[0], START, LENGTH))


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("middle", [False, True], ids=["drafter", "under a middle"])
def test_the_law_is_the_targets(name: str, rule: str, middle: bool) -> None:
    tables = approximations(3, VOCABULARY, 1, Showing)
    assert distance(DRAFTERS[name][0](tables[-1]), tables, rule, middle) < EXACT


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("middle", [False, True], ids=["drafter", "under a middle"])
def test_the_likeliest_with_a_law_as_if_drawn_is_caught(name: str, middle: bool) -> None:
    """What transformers does with Gemma 4's assistants."""
    make, kind = DRAFTERS[name]

    class Likeliest(kind):  # type: ignore[misc, valid-type]
        def draw(self, context: Any, tokens: Any, logits: Any, drawing: Any, going: Any, law: Any) -> torch.Tensor:
            kept = [list(row) for row in tokens]
            q: torch.Tensor = super().draw(context, kept, logits, drawing, going, law)
            for b, row in enumerate(tokens):
                if len(kept[b]) > len(row):
                    row.append(int(q[b].argmax()))
            return q

    tables = approximations(3, VOCABULARY, 1, Showing)
    assert distance(make(tables[-1], Likeliest), tables, "token", middle) > 0.01
