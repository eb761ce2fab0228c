# SPDX-License-Identifier: Apache-2.0
"""How trees of drawn nodes grow: what they are drawn from, sizes, ends of text, what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, head_for, noisy, prompts, tiny

from hf_polyspec.eagle import EagleHead
from hf_polyspec.eagle.configuration import EagleHeadConfig
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import TreeProposal
from hf_polyspec.exactness.tree_geometry import ROOT, depths
from hf_polyspec.exactness.tree_judgement import judge_tree, record_tree
from hf_polyspec.levels.drawn_tree import DrawnNodes, grow_drawn
from hf_polyspec.levels.eagle import EagleDrafter
from hf_polyspec.levels.eagle_tree import Grown
from hf_polyspec.telemetry.counters import LevelStats

CPU = torch.device("cpu")
LAW = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
IDS = torch.arange(10, 17)
TREES = {"polyspec_tree_tokens": 12, "polyspec_tree_depth": 4, "polyspec_tree_top_k": 3}

pytestmark = pytest.mark.usefixtures("enabled")


def grown(
    room: list[int], total: list[int], law: torch.Tensor = LAW, top_k: int = 3, **settings: Any
) -> tuple[Grown, DrawnNodes, list[int]]:
    """The tree of a head that always guesses one law, and the levels it was run on."""
    levels: list[int] = []

    def guess(states: torch.Tensor) -> torch.Tensor:
        return law.expand(*states.shape[:2], len(law))

    def step(tokens: torch.Tensor, features: torch.Tensor, level: int, sees: torch.Tensor) -> torch.Tensor:
        assert sees.shape[:2] == tokens.shape
        levels.append(level)
        return features

    torch.manual_seed(3)
    ids = IDS[: len(law)]
    draw = LawMaker([], True, CPU).draw_distinct
    tree, drawn = grow_drawn(torch.zeros(len(room), 1, 4), room, total, guess, ids, step, draw, top_k=top_k, **settings)
    return tree, drawn, levels


def test_children_are_drawn_from_what_those_before_them_leave() -> None:
    tree, drawn, levels = grown([3, 2], [14, 9])
    assert [len(tokens) for tokens in tree.tokens] == [14, 9]
    assert [max(depths(parents)) for parents in tree.parents] == [3, 2]
    assert levels == [1, 2]
    for b, (tokens, parents, nodes) in enumerate(zip(tree.tokens, tree.parents, drawn.nodes, strict=True)):
        assert all(parent < node for node, parent in enumerate(parents))
        assert nodes == list(range(len(tokens)))
        families = [[node for node in nodes if parents[node] == parent] for parent in sorted(set(parents))]
        assert max(map(len, families)) > 1
        for family in families:
            rest = LAW.clone()
            for node in family:
                torch.testing.assert_close(drawn.laws[b, node], rest / rest.sum())
                assert rest[tokens[node] - 10] > 0
                rest[tokens[node] - 10] = 0


def test_children_are_as_many_as_a_law_has_ids() -> None:
    tree, _, _ = grown([2], [6], torch.tensor([1.0, 0.0, 0.0]))
    assert (tree.tokens, tree.parents) == ([[10, 10]], [[ROOT, 0]])
    two, _, _ = grown([1], [6], torch.tensor([1.0, 1e-9, 0.0]))
    assert two.tokens == [[10, 11]]


def test_nodes_are_spread_over_the_levels() -> None:
    """Sure heads go deep, unsure ones go wide."""
    sure, _, _ = grown([5], [8], torch.tensor([0.9, 0.05, 0.05]))
    unsure, _, _ = grown([5], [8], torch.full((7,), 1 / 7))
    assert max(depths(sure.parents[0])) == 5
    assert max(depths(unsure.parents[0])) < 5
    assert len(sure.tokens[0]) == len(unsure.tokens[0]) == 8


def test_rows_without_room_get_nothing_and_others_their_own_number() -> None:
    tree, drawn, levels = grown([2, 0, 1], [5, 5, 3])
    assert [len(tokens) for tokens in tree.tokens] == [5, 0, 3]
    assert drawn.nodes[1] == []
    assert levels == [1]
    assert drawn.laws.shape == (3, max(map(len, drawn.nodes)), 7)


def test_nothing_grows_below_an_end_of_text() -> None:
    tree, _, _ = grown([3], [14], ends=frozenset({10}))
    ends = {node for node, token in enumerate(tree.tokens[0]) if token == 10}
    assert ends
    assert not ends & set(tree.parents[0])
    everything, _, levels = grown([3], [14], ends=frozenset(IDS.tolist()))
    assert max(depths(everything.parents[0])) == 1
    assert levels == [1], "seen to be over before the next level is run"


@pytest.mark.parametrize(("threshold", "depth"), [(0.0, 4), (0.3, 2), (0.6, 1)])
def test_a_level_is_grown_while_the_likeliest_path_is_likely_enough(threshold: float, depth: int) -> None:
    tree, _, _ = grown([4], [30], threshold=threshold)
    assert max(depths(tree.parents[0])) == depth


def expected_rates(tree: TreeProposal, weights: dict[int, float]) -> set[float]:
    """What is expected of a tree of one level under one law, over forty seeds."""
    context = Context([[1]], Prompt(1, None, torch.zeros(1, 1, dtype=torch.long)))
    logits = torch.full((1, len(tree.tokens[0]) + 1, 8), -30.0)
    for token, weight in weights.items():
        logits[0, :, token] = torch.tensor(weight).log()
    found = set()
    for seed in range(40):
        torch.manual_seed(seed)
        judgement = judge_tree(LawMaker([], True, CPU), context, tree, logits, [True])
        counted = LevelStats("target", 0)
        record_tree(counted, tree, judgement, [True])
        found.add(round(float(counted._summed_overlap()[0]), 5))
    return found


def test_the_expected_acceptance_counts_a_drawn_child() -> None:
    """Node 0 is chosen and weighs 0.6; node 1 was drawn from the rest, which agrees with the target's to 0.75."""
    q = torch.zeros(1, 1, 8)
    q[0, 0, [5, 6]] = 0.5
    tree = TreeProposal([[4, 5]], [[ROOT, ROOT]], [[1, 1]], [[1]], q)
    assert expected_rates(tree, {4: 0.6, 5: 0.3, 6: 0.1}) == {round(0.6 + 0.4 * 0.75, 5)}


def test_the_expected_acceptance_counts_a_second_drawn_child_after_a_rejection() -> None:
    """The first one is kept in three of four draws; the second one would then always be, so both are worth 1."""
    q = torch.zeros(1, 2, 8)
    q[0, 0, [5, 6]], q[0, 1, 5] = 0.5, 1.0
    tree = TreeProposal([[6, 5]], [[ROOT, ROOT]], [[1, 1]], [[0, 1]], q)
    assert expected_rates(tree, {5: 0.75, 6: 0.25}) == {0.75, 1.75}


class Kept(EagleDrafter):
    """Keeps its trees."""

    trees: list[TreeProposal]

    def propose_tree(self, context: Any, limits: list[int], law: Any) -> Any:
        tree = super().propose_tree(context, limits, law)
        if tree is not None:
            self.trees.append(tree)
        return tree


def sampled(target: Any, levels: list[Any], batch: int = 1, **options: Any) -> Any:
    torch.manual_seed(5)
    settings = {"max_new_tokens": 16, "do_sample": True, "top_k": 0, "polyspec_block_size": 4, **TREES, **options}
    settings["polyspec_verification"] = "token"
    return target.generate(**prompts(batch), assistant_models=levels, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize(("batch", "middles", "slice_"), [(1, 0, None), (3, 1, 6), (3, 0, 6)])
def test_a_head_draws_over_its_targets_vocabulary(
    batch: int, middles: int, slice_: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_polyspec.generation.chain.EagleDrafter", Kept)
    monkeypatch.setattr(Kept, "trees", [], raising=False)
    target = tiny()
    levels = [noisy(target)] * middles
    output = sampled(target, [*levels, head_for([target, *levels][-1])], batch, polyspec_draft_vocabulary=slice_)
    assert sum(len(row) for tree in Kept.trees for row in tree.drawn) > 10
    for tree in Kept.trees:
        assert tree.q is not None
        assert tree.q.shape[2] == VOCABULARY
        for b, nodes in enumerate(tree.drawn):
            for place, node in enumerate(nodes):
                assert tree.q[b, place].sum() == pytest.approx(1, abs=1e-5)
                assert tree.q[b, place, tree.tokens[b][node]] > 0
    assert output.polyspec.levels[-1].accepted > 0


def test_laws_are_those_of_the_temperature_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With top_k=2 two ids have all the weight, and almost all of it is one id's when the text is nearly greedy."""
    monkeypatch.setattr("hf_polyspec.generation.chain.EagleDrafter", Kept)
    target = tiny()
    head = head_for(target)
    counts: dict[str, int] = {}
    best: dict[str, float] = {}
    for name, options in {"wide": {}, "two": {"top_k": 2}, "cold": {"temperature": 1e-3}}.items():
        monkeypatch.setattr(Kept, "trees", [], raising=False)
        sampled(target, [head], **options)
        laws = [law for tree in Kept.trees if tree.q is not None for law in tree.q[0]]
        counts[name] = max(int((law > 0).sum()) for law in laws)
        best[name] = min(float(law.max()) for law in laws)
    assert counts["wide"] == VOCABULARY
    assert counts["two"] == 2
    assert best["wide"] < 0.5
    assert best["cold"] > 0.9


def test_a_head_says_how_sharply_it_draws(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []

    class Noted(EagleDrafter):
        def __init__(self, *parts: Any, **named: Any) -> None:
            super().__init__(*parts, **named)
            found.append(self.draft_temperature)

    monkeypatch.setattr("hf_polyspec.generation.chain.EagleDrafter", Noted)
    target = tiny()
    head = head_for(target)
    sampled(target, [head])
    head.config.draft_temperature = 0.7
    head.save_pretrained(tmp_path)
    again = EagleHead.from_pretrained(tmp_path)
    sampled(target, [again])
    sampled(target, [again], polyspec_draft_temperature=0.5)
    assert found == [1.0, 0.7, 0.5]


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), "cold", True])
def test_draft_temperatures_that_cannot_be_are_refused(value: Any) -> None:
    target = tiny()
    with pytest.raises(ValueError, match="polyspec_draft_temperature must be a number above 0"):
        sampled(target, [head_for(target)], polyspec_draft_temperature=value)
    with pytest.raises(ValueError, match="draft_temperature must be a number above 0"):
        EagleHeadConfig(draft_temperature=value)
