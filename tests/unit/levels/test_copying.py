# SPDX-License-Identifier: Apache-2.0
"""What followed the same tokens before, mixed into a head's guesses."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, accepted_greedily, head_for, in_circles, noisy, prompts, tiny

from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.tree_geometry import ROOT, path_to
from hf_polyspec.levels.copying import MOST, copy_weight
from hf_polyspec.levels.draft_memory import DraftMemory
from hf_polyspec.levels.eagle import EagleDrafter
from hf_polyspec.levels.guessing import Guesser

IDS = torch.arange(VOCABULARY)


def ends(text: list[int], part: list[int]) -> list[int]:
    """Where a part of a text ends, everywhere it occurs."""
    return [end for end in range(len(part), len(text) + 1) if text[end - len(part) : end] == part]


def suggested(text: list[int], path: list[int]) -> tuple[int, float] | None:
    """By looking everywhere: what most often followed the longest suffix of text and path that was followed at all."""
    whole = text + path
    repeated = next((e for n in range(len(text), 0, -1) if len(e := ends(text, text[-n:])) > 1), [])
    for length in range(len(whole), 0, -1):
        found = ends(text, whole[-length:])
        followers = [text[end] for end in found if end < len(text)]
        if followers:
            counts = Counter(followers)
            most = max(counts.values())
            token = [token for token in followers if counts[token] == most][-1]
            # the end of the text, where nothing follows yet, is left out for the longest repeated suffix alone
            return token, copy_weight(most, len(found) - (found == repeated), length)
    return None


def expected(scores: torch.Tensor, text: list[int], path: list[int]) -> torch.Tensor:
    """The mixture, from its formula."""
    q, found = scores.softmax(-1), suggested(text, path)
    if found is None:
        return q
    token, w = found
    return (1 - w) * q + w * torch.nn.functional.one_hot(torch.tensor(token), len(q))


def texts(count: int, ids: int = 4, length: int = 24) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(ids, (length + 3 * i,), generator=generator).tolist() for i in range(count)]


def remembering(rows: int) -> DraftMemory:
    memory = DraftMemory()
    memory.begin(rows)
    return memory


def test_long_and_unanimous_matches_weigh_most() -> None:
    assert 0 < copy_weight(1, 1, 1) < copy_weight(1, 1, 2) < copy_weight(1, 1, 5) < copy_weight(1, 1, 1000) < MOST
    assert copy_weight(2, 4, 3) == copy_weight(1, 2, 3) == copy_weight(1, 1, 3) / 2
    assert copy_weight(1, 1, 1000) == pytest.approx(MOST, rel=1e-3)


def test_chains_are_mixed_with_what_followed() -> None:
    rows, memory = texts(3), remembering(3)
    generator = torch.Generator().manual_seed(7)
    for cut in (10, 14, 13, 20, 20):  # on, back, and on again
        copied = memory.follow([row[:cut] for row in rows])
        chains: list[list[int]] = [[], [], []]
        for _ in range(4):
            copied.extend(chains)
            scores = torch.randn(3, 1, VOCABULARY, generator=generator, dtype=torch.float64)
            found = copied.mixed(scores, IDS).softmax(-1)
            for b, chain in enumerate(chains):
                torch.testing.assert_close(found[b, 0], expected(scores[b, 0], rows[b][:cut], chain))
                if b or len(chain) < 2:  # a row that has stopped is asked about as well
                    chain.append(int(torch.randint(4, (), generator=generator)))


def test_every_node_of_a_tree_has_its_own_path() -> None:
    rows, memory = texts(2), remembering(2)
    generator = torch.Generator().manual_seed(3)
    copied = memory.follow(rows)
    tokens: list[list[int]] = [[], []]
    parents: list[list[int]] = [[], []]
    for level in range(4):
        width = 1 if level == 0 else 3
        scores = torch.randn(2, width, VOCABULARY, generator=generator, dtype=torch.float64)
        found = copied.mixed(scores, IDS).softmax(-1)
        for b in range(2):
            front = [ROOT] if level == 0 else range(len(tokens[b]) - 3, len(tokens[b]))
            for i, node in enumerate(front):
                path = [tokens[b][at] for at in path_to(node, parents[b])] if node != ROOT else []
                torch.testing.assert_close(found[b, i], expected(scores[b, i], rows[b], path))
        before = len(tokens[0])
        sees = torch.zeros(2, 3, before + 3, dtype=torch.bool)
        for b in range(2):
            for i in range(3):
                parent = ROOT if level == 0 else before - 3 + int(torch.randint(3, (), generator=generator))
                parents[b].append(parent)
                tokens[b].append(int(torch.randint(4, (), generator=generator)))
                sees[b, i, path_to(before + i, parents[b])] = True
        copied.descend(torch.tensor([row[before:] for row in tokens]), sees)


def test_ids_that_are_not_scored_are_not_copied() -> None:
    text = [1, 2, 3, 9, 1, 2, 3]
    scores = torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(0))
    copied = remembering(1).follow([text])
    assert torch.equal(copied.mixed(scores, torch.tensor([4, 5, 6])), scores)
    raised = copied.mixed(scores, torch.tensor([4, 9, 6]))
    assert raised[0, 0, 1] > scores[0, 0, 1]
    assert torch.equal(raised[..., [0, 2]], scores[..., [0, 2]])
    # nothing occurred before, so there is nothing to copy
    assert torch.equal(remembering(1).follow([[1, 2, 3]]).mixed(scores, torch.tensor([1, 2, 3])), scores)


def test_rows_that_stay_are_not_indexed_anew() -> None:
    rows, memory = texts(3), remembering(3)
    memory.follow(rows)
    before = [row.text.automaton for row in memory._copies]
    memory.keep_rows([2, 0, 2])
    copied = memory.follow([rows[2], rows[0], rows[2]])
    after = [row.text.automaton for row in memory._copies]
    assert after[0] is before[2]
    assert after[1] is before[0]
    assert after[2] is not before[2]
    scores = torch.randn(3, 1, VOCABULARY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for b, text in enumerate((rows[2], rows[0], rows[2])):
        torch.testing.assert_close(copied.mixed(scores, IDS).softmax(-1)[b, 0], expected(scores[b, 0], text, []))


class Watched(EagleDrafter):
    """Keeps, of each proposal: the mixtures computed, the laws drawn from, and the laws handed up."""

    mixtures: list[torch.Tensor]
    draws: list[torch.Tensor]
    seen: list[tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]]

    def _watched(self, proposal: Any) -> Any:
        if proposal is not None and proposal.q is not None:
            self.seen.append((list(self.mixtures), list(self.draws), proposal.q))
        return proposal

    def propose(self, context: Any, limits: list[int], law: Any) -> Any:
        self.mixtures.clear()
        self.draws.clear()
        return self._watched(super().propose(context, limits, law))

    def propose_tree(self, context: Any, limits: list[int], law: Any) -> Any:
        self.mixtures.clear()
        self.draws.clear()
        return self._watched(super().propose_tree(context, limits, law))


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("trees", [0, 8])
def test_the_mixture_is_what_is_drawn_from_and_handed_up(trees: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mixtures", "draws", "seen"):
        monkeypatch.setattr(Watched, name, [], raising=False)
    changed: list[float] = []
    mix, draw = Guesser.scores, LawMaker.draw

    def mixed(self: Guesser, states: torch.Tensor) -> torch.Tensor:
        found, scores = mix(self, states), self.working.score(states)
        changed.append(float((found.softmax(-1) - scores.softmax(-1)).abs().max()))
        Watched.mixtures.append(found.softmax(-1))
        return found

    def drawn(self: LawMaker, weights: torch.Tensor, *active: Any) -> torch.Tensor:
        Watched.draws.append(weights.clone())
        return draw(self, weights, *active)

    monkeypatch.setattr(Guesser, "scores", mixed)
    monkeypatch.setattr(LawMaker, "draw", drawn)
    monkeypatch.setattr("hf_polyspec.generation.chain.EagleDrafter", Watched)
    target, ids = in_circles(tiny()), prompts(1)["input_ids"]
    with torch.no_grad():
        target.lm_head.weight.mul_(20)  # draws hardly ever leave the circle
    torch.manual_seed(2)
    target.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=True, top_k=0,
        assistant_models=[head_for(target)], polyspec_tree_tokens=trees, polyspec_verification="token",
    )  # fmt: skip
    assert max(changed) > 0.2, "the text repeats itself, so there was something to copy"
    assert len(Watched.seen) > 5
    for mixtures, draws, q in Watched.seen:
        torch.testing.assert_close(draws[0][0], mixtures[0][0, 0])  # the first draw, at the context's end
        for i in range(q.shape[1]):
            if trees:
                assert any(torch.equal(q[0, i], weights) for law in draws for weights in law)
            else:
                torch.testing.assert_close(q[0, i], mixtures[i][0, 0])
                assert torch.equal(q[0, i], draws[i][0])


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("trees", [0, 8])
@pytest.mark.parametrize(("batch", "middles"), [(1, 0), (3, 1)])
def test_repetitions_are_guessed(trees: int, batch: int, middles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_polyspec.levels.recycling.RecyclePointer.suggestion", lambda *_: None)
    target, inputs = in_circles(tiny()), prompts(batch)
    levels: list[Any] = [noisy(target)] * middles
    levels.append(head_for([target, *levels][-1]))
    helped, alone = (
        accepted_greedily(target, levels, inputs, polyspec_tree_tokens=trees, polyspec_draft_copies=copies)
        for copies in (True, False)
    )
    # a random head cannot know the circle
    assert helped > alone + 10


@pytest.mark.usefixtures("enabled")
def test_another_answer_than_yes_or_no_is_refused() -> None:
    target = tiny()
    with pytest.raises(ValueError, match="polyspec_draft_copies"):
        target.generate(
            **prompts(1), max_new_tokens=4, assistant_models=[head_for(target)], polyspec_draft_copies="some"
        )
