# SPDX-License-Identifier: Apache-2.0
"""What the level above said after guesses that it rejected, mixed into the guesses to come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, accepted_greedily, head_for, in_circles, noisy, prompts, tiny

from hf_polyspec import SuffixDrafter
from hf_polyspec.exactness.tree_geometry import ROOT, path_to
from hf_polyspec.levels.draft_memory import DraftMemory
from hf_polyspec.levels.pointers import PointerMixture
from hf_polyspec.levels.recycling import HALVED, KEPT, LIKELIEST, WEIGHTS, RecyclePointer, said_after

IDS = torch.arange(VOCABULARY)


def knowing(rounds: list[dict[tuple[int, ...], int]], text: list[int]) -> RecyclePointer:
    pointer = RecyclePointer()
    pointer.follow(text)
    for said in rounds:
        pointer.learn({tail: ((token,), (1.0,)) for tail, token in said.items()})
    return pointer


def test_the_longest_match_counts_then_the_latest() -> None:
    pointer = knowing([{(1, 2, 3): 10, (7, 8, 3): 11, (4, 5): 12}, {(6, 2, 3): 13}], [9, 1, 2, 3])
    half = 0.5 ** (1 / HALVED)
    assert pointer.suggestion(pointer.root()) == (pytest.approx(WEIGHTS[2] * half), (10,), (1.0,))
    assert pointer.suggestion((0, 2, 3)) == (WEIGHTS[1], (13,), (1.0,))
    assert pointer.suggestion((0, 8, 3)) == (pytest.approx(WEIGHTS[1] * half), (11,), (1.0,))
    assert pointer.suggestion((0, 0, 3)) == (WEIGHTS[0], (13,), (1.0,))
    assert pointer.suggestion((5,)) == (pytest.approx(WEIGHTS[0] * half), (12,), (1.0,))
    assert pointer.suggestion((0, 0, 4)) is None
    # a step goes on from a place, and remembers no more than is compared
    assert pointer.step(pointer.step(pointer.root(), 5), 6) == (3, 5, 6)
    assert pointer.step((2,), 3) == (2, 3)


def test_weights_grow_with_the_match_and_rounds_are_forgotten() -> None:
    assert 0 < WEIGHTS[0] < WEIGHTS[1] < WEIGHTS[2] < 1
    rounds: list[dict[tuple[int, ...], int]] = [{(1,): 5}]
    for age in range(KEPT):
        found = knowing(rounds, [1]).suggestion((1,))
        assert found is not None
        assert found[0] == pytest.approx(WEIGHTS[0] * 0.5 ** (age / HALVED))
        rounds.append({})
    assert knowing(rounds, [1]).suggestion((1,)) is None


def test_a_greedy_law_is_its_likeliest_id_and_a_sampled_one_its_likeliest_few() -> None:
    laws = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1))
    assert said_after(laws, [False] * 3) == [([int(law.argmax())], [1.0]) for law in laws]
    for (ids, probabilities), law in zip(said_after(laws, [True] * 3), laws, strict=True):
        assert len(ids) == LIKELIEST
        kept = torch.zeros(VOCABULARY).index_fill(0, torch.tensor(ids), 1.0)
        expected = law.softmax(-1) * kept / (law.softmax(-1) * kept).sum()
        torch.testing.assert_close(torch.tensor(probabilities), expected[ids])
        assert float(law[ids].min()) >= float(law[kept == 0].max())
    mixed, greedy, drawn = (said_after(laws, list(each)) for each in ((False, True, False), [False] * 3, [True] * 3))
    assert mixed == [greedy[0], drawn[1], greedy[2]]
    few = torch.randn(2, 3, generator=torch.Generator().manual_seed(2))
    assert [len(ids) for ids, _ in said_after(few, [True] * 2)] == [3, 3]


def test_rejected_nodes_are_learned_by_the_ids_before_them() -> None:
    texts, memory = [[1, 2, 3], [4]], DraftMemory()
    memory.begin(2)
    memory.follow(texts)
    tokens, parents = [[5, 6, 7, 8], [9, 5]], [[ROOT, ROOT, 0, 2], [ROOT, 0]]
    logits = torch.randn(2, 5, VOCABULARY, generator=torch.Generator().manual_seed(4))
    memory.learn(tokens, parents, [[0, 2], []], logits, [False] * 2)
    best = logits.argmax(-1)
    pointers = memory._recycled
    # accepted nodes are not learned, nor what was said after the text itself
    assert [node for node in range(4) if pointers[0].suggestion(_tail(texts[0], tokens[0], parents[0], node))] == [1, 3]
    for b, node in ((0, 1), (0, 3), (1, 0), (1, 1)):
        assert pointers[b].suggestion(_tail(texts[b], tokens[b], parents[b], node)) == (
            WEIGHTS[min(2, len(_tail(texts[b], tokens[b], parents[b], node)) - 1)], [int(best[b, node + 1])], [1.0],
        )  # fmt: skip
    # rows go on with what they know, each with its own
    memory.keep_rows([1, 0, 1])
    memory.learn([[], [], [8]], [[], [], [ROOT]], [[], [], []], logits[[0, 1, 0]], [False] * 3)
    assert memory._recycled[0].suggestion((9,)) is not None
    assert memory._recycled[0].suggestion((8,)) is None
    assert memory._recycled[2].suggestion((8,)) is not None
    memory.begin(1)
    assert memory._recycled[0].suggestion((9,)) is None


def _tail(text: list[int], tokens: list[int], parents: list[int], node: int) -> tuple[int, ...]:
    return tuple((text + [tokens[n] for n in path_to(node, parents)])[-len(WEIGHTS) :])


class Fixed:
    """A pointer that always suggests the same."""

    def __init__(self, weight: float, law: dict[int, float]) -> None:
        self.found = (weight, list(law), list(law.values()))

    def root(self) -> tuple[int, ...]:
        return ()

    def step(self, place: tuple[int, ...], token: int) -> tuple[int, ...]:
        return place

    def suggestion(self, place: tuple[int, ...]) -> tuple[float, list[int], list[float]]:
        return self.found


def test_pointers_are_mixed_in_one_after_another() -> None:
    scores = torch.randn(1, 1, VOCABULARY, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    first, second = Fixed(0.3, {4: 0.5, 7: 0.5}), Fixed(0.6, {7: 0.9, 2: 0.1, 3: 0.0})
    q = scores[0, 0].softmax(-1)
    for weight, law in ((0.3, {4: 0.5, 7: 0.5}), (0.6, {7: 0.9, 2: 0.1})):
        m = torch.zeros_like(q)
        m[list(law)] = torch.tensor(list(law.values()), dtype=q.dtype)
        q = (1 - weight) * q + weight * m
    torch.testing.assert_close(PointerMixture([[first, second]]).mixed(scores, IDS)[0, 0].softmax(-1), q)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("trees", [0, 8])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("batch", "middles", "branch"), [(1, 0, False), (3, 1, False), (3, 0, True)])
def test_what_is_learned_was_said_after_the_very_ids(
    trees: int, sampled: bool, batch: int, middles: int, branch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[tuple[list[int], torch.Tensor, bool]] = []
    followed: list[list[int]] = []
    follow, learn = DraftMemory.follow, DraftMemory.learn

    def following(self: DraftMemory, texts: Any) -> PointerMixture:
        followed[:] = [list(text) for text in texts]
        return follow(self, texts)

    def learning(self: DraftMemory, tokens: Any, parents: Any, paths: Any, logits: torch.Tensor, kind: Any) -> None:
        learn(self, tokens, parents, paths, logits, kind)
        for b, (nodes, above) in enumerate(zip(tokens, parents, strict=True)):
            for node in range(len(nodes)):
                text = followed[b] + [nodes[n] for n in path_to(node, above)]
                learned.append((text, logits[b, node + 1], kind[b]))

    monkeypatch.setattr(DraftMemory, "follow", following)
    monkeypatch.setattr(DraftMemory, "learn", learning)
    target = tiny()
    levels: list[Any] = [noisy(target)] * middles
    above = [target, *levels][-1]
    drafters = [head_for(above), *([SuffixDrafter()] if branch else [])]
    torch.manual_seed(3)
    target.generate(
        **prompts(batch), max_new_tokens=12, do_sample=sampled, assistant_models=[*levels, *drafters],
        polyspec_tree_tokens=trees,
    )  # fmt: skip
    assert len(learned) > 20
    for text, said, kind in learned:
        assert kind is sampled
        torch.testing.assert_close(said, above(torch.tensor([text])).logits[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("trees", [0, 8])
def test_what_was_said_is_guessed_again(trees: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_polyspec.levels.copying.CopyPointer.suggestion", lambda *_: None)
    target, inputs = in_circles(tiny()), prompts(3)
    helped, alone = (
        accepted_greedily(
            target, [head_for(target)], inputs, polyspec_tree_tokens=trees, polyspec_draft_copies=recycled
        )
        for recycled in (True, False)
    )
    assert helped > alone + 10


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("trees", [0, 8])
def test_the_head_alone_learns_nothing(trees: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("nothing is to be remembered")

    monkeypatch.setattr(DraftMemory, "begin", never)
    target, ids = tiny(), prompts(1)["input_ids"]
    output = target.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
        assistant_models=[head_for(target)], polyspec_tree_tokens=trees, polyspec_draft_copies=False,
    )  # fmt: skip
    assert output.shape[1] == ids.shape[1] + 8
