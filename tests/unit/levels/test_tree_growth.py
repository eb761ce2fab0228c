# SPDX-License-Identifier: Apache-2.0
"""How large trees are: the confidence threshold, sizes that follow what is accepted, ends of text, what is counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from tiny_models import head_for, noisy, prompts, tiny
from transformers import PreTrainedModel

from hf_polyspec.eagle import init_for
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import Proposal, TreeProposal
from hf_polyspec.exactness.tree_geometry import ROOT, depths, path_to
from hf_polyspec.exactness.tree_judgement import judge_tree, record_tree
from hf_polyspec.host.generation import CHOOSES_HIDDEN_STATES
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.eagle import EagleDrafter
from hf_polyspec.levels.eagle_tree import Grown, grow
from hf_polyspec.levels.tree_size import TreeSize
from hf_polyspec.telemetry.counters import LevelStats

TREES = {"polyspec_tree_tokens": 12, "polyspec_tree_depth": 4, "polyspec_tree_top_k": 3}
# After any token: 0 with probability 1/2, 1 with 1/4, 2 with 1/8.
HALVES = torch.tensor([0.5, 0.25, 0.125]).log()


pytestmark = pytest.mark.usefixtures("enabled")


def grown(room: list[int], total: list[int], **settings: Any) -> tuple[Grown, list[int]]:
    """The tree of a head that always guesses `HALVES`, and the levels it was run on."""
    levels: list[int] = []

    def best(states: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (*states.shape[:2], count)
        return HALVES[:count].expand(shape), torch.arange(count).expand(shape)

    def step(tokens: torch.Tensor, features: torch.Tensor, level: int, sees: torch.Tensor) -> torch.Tensor:
        levels.append(level)
        return features

    return grow(torch.zeros(len(room), 1, 4), room, total, best, step, top_k=3, **settings), levels


@pytest.mark.parametrize(
    ("threshold", "depth"), [(0.0, 4), (0.1, 4), (0.13, 3), (0.2, 3), (0.3, 2), (0.6, 1), (1.0, 1)]
)
def test_a_level_is_grown_while_the_likeliest_path_is_likely_enough(threshold: float, depth: int) -> None:
    """The likeliest path of l tokens has probability 2^-l; level l + 1 is grown if that is at least the threshold."""
    tree, levels = grown([4, 4], [40, 40], threshold=threshold)
    assert [max(depths(parents)) for parents in tree.parents] == [depth, depth]
    assert levels == list(range(1, depth))
    assert depth == 1 or threshold == 0 or 2.0 ** -(depth - 1) >= threshold
    assert all(tree.tokens), "at least one node is always drafted"


def test_rows_stop_apart() -> None:
    tree, levels = grown([1, 3], [40, 3], threshold=0.2)
    assert [max(depths(parents)) for parents in tree.parents] == [1, 2]
    assert [len(tokens) for tokens in tree.tokens] == [3, 3]
    assert levels == [1, 2]


def test_each_row_keeps_its_own_number_of_nodes() -> None:
    wide, _ = grown([3, 3, 3], [7, 7, 7])
    mixed, _ = grown([3, 3, 0], [2, 7, 7])
    assert mixed.tokens[0] == [0, 1], "shallower nodes first where all are equally likely"
    assert (mixed.tokens[1], mixed.parents[1]) == (wide.tokens[1], wide.parents[1])
    assert mixed.tokens[2] == []


def test_nothing_grows_below_an_end_of_text() -> None:
    tree, _ = grown([3], [40], ends=frozenset({0}))
    ends = {node for node, token in enumerate(tree.tokens[0]) if token == 0}
    assert ends, "the end itself is drafted"
    assert not ends & set(tree.parents[0])
    # The likeliest continuations that do not end are followed instead.
    paths = {tuple(tree.tokens[0][n] for n in path_to(node, tree.parents[0])) for node in range(len(tree.tokens[0]))}
    assert (1, 1, 1) in paths
    assert (1, 0) in paths
    everything, levels = grown([3], [40], ends=frozenset({0, 1, 2}))
    assert everything.tokens == [[0, 1, 2]]
    assert levels == [1, 2]


def test_sizes_follow_what_is_accepted() -> None:
    size = TreeSize(most_depth=5, most_nodes=20)
    assert (size.depth, size.nodes) == (5, 20)
    seen = []
    for accepted in (0, 0, 0, 0, 0, 0, 0):
        size.observe(size.depth, accepted)
        seen.append((size.depth, size.nodes))
    assert seen == [(4, 16), (3, 12), (2, 8), (1, 4), (1, 4), (1, 4), (1, 4)], "never below one level"
    size.observe(0, 0)
    assert size.depth == 1, "a round without a draft says nothing"
    size.observe(1, 1)
    assert size.depth == 3
    size.observe(3, 3)
    size.observe(5, 5)
    assert (size.depth, size.nodes) == (5, 20), "never above what is allowed"
    thin = TreeSize(most_depth=4, most_nodes=2)
    assert thin.nodes == 2
    thin.observe(4, 0)
    assert (thin.depth, thin.nodes) == (3, 2)


def run(target: PreTrainedModel, levels: list[Any], inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    values = {"max_new_tokens": 16, "do_sample": False, "polyspec_block_size": 4, "return_dict_in_generate": True}
    return target.generate(**inputs, assistant_models=levels, **{**values, **TREES, **options})


@pytest.mark.parametrize("schedule", ["heuristic", "heuristic_transient"])
@pytest.mark.parametrize(("batch", "middles"), [(1, 0), (3, 1)])
def test_trees_of_a_head_that_guesses_wrong_shrink(schedule: str, batch: int, middles: int) -> None:
    target, inputs = tiny(), prompts(batch)
    levels: list[Any] = [noisy(target)] * middles
    levels.append(head_for([target, *levels][-1]))
    expected = target.generate(**inputs, max_new_tokens=16, do_sample=False)
    # what it copied from the text would be right now and then
    fixed = run(target, levels, inputs, polyspec_draft_copies=False)
    adaptive = run(target, levels, inputs, polyspec_draft_copies=False, num_assistant_tokens_schedule=schedule)
    assert torch.equal(fixed.sequences, expected)
    assert torch.equal(adaptive.sequences, expected)
    before, after = fixed.polyspec.levels[-1], adaptive.polyspec.levels[-1]
    assert after.mean_tree_depth < 0.6 * before.mean_tree_depth
    assert after.mean_tree_nodes < 0.6 * before.mean_tree_nodes
    assert after.trees >= 10, "a small tree in every round: never starved"
    assert before.mean_tree_nodes <= TREES["polyspec_tree_tokens"]
    assert {"mean_tree_nodes", "mean_tree_depth"} <= after.to_dict().keys()


def test_a_threshold_makes_trees_of_one_level() -> None:
    target, inputs = tiny(), prompts(2)
    output = run(target, [head_for(target)], inputs, assistant_confidence_threshold=1.0)
    assert torch.equal(output.sequences, target.generate(**inputs, max_new_tokens=16, do_sample=False))
    assert output.polyspec.levels[1].mean_tree_depth == 1


class Told(EagleDrafter):
    """Keeps the depth of each tree and how far it was followed, per row of a batch that loses rows."""

    kept: list[list[tuple[int, int, int]]]

    def observe_tree(self, tree: TreeProposal, paths: list[list[int]]) -> None:
        before = [size.depth for size in self._sizes]
        super().observe_tree(tree, paths)
        now = [size.depth for size in self._sizes]
        for b, (parents, path) in enumerate(zip(tree.parents, paths, strict=True)):
            drafted = max(depths(parents), default=0)
            change = 0 if not drafted else 2 if len(path) == drafted else -1
            assert now[b] == min(self.tree_depth, max(1, before[b] + change))
        self.kept.append(list(zip(before, now, [len(path) for path in paths], strict=True)))


def test_each_row_has_a_size_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_polyspec.generation.chain.EagleDrafter", Told)
    monkeypatch.setattr(Told, "kept", [], raising=False)
    target = tiny(seed=3)
    inputs = prompts(4)
    free = target.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    ends = {"eos_token_id": [int(free[0, 3]), int(free[2, 6])]}
    expected = target.generate(**inputs, max_new_tokens=16, do_sample=False, **ends)
    # Extras would keep finished rows in the batch; without them the batch shrinks.
    found = target.generate(
        **inputs,
        assistant_models=[head_for(target)],
        max_new_tokens=16,
        do_sample=False,
        num_assistant_tokens_schedule="heuristic",
        **ends,
        **TREES,
    )
    assert torch.equal(found, expected)
    assert {len(rows) for rows in Told.kept} > {4}, "rows have left the batch"
    assert any(len({now for _, now, _ in rows}) > 1 for rows in Told.kept), "rows differ"


@pytest.mark.parametrize("sample", [False, True])
def test_the_expected_acceptance_of_a_tree_is_the_weight_of_the_children_reached(sample: bool) -> None:
    tree = TreeProposal([[4, 5, 6]], [[ROOT, ROOT, 0]], [[1, 1, 1]])
    context = Context([[1]], Prompt(1, None, torch.zeros(1, 1, dtype=torch.long)))
    logits = torch.full((1, 4, 8), -30.0)
    logits[0, 0, 4], logits[0, 0, 5], logits[0, 0, 7] = math.log(0.6), math.log(0.3), math.log(0.1)
    logits[0, 1, 6], logits[0, 1, 2] = math.log(0.25), math.log(0.75)
    law = LawMaker([], sample, torch.device("cpu"), _Always())
    judgement = judge_tree(law, context, tree, logits, [True])
    assert judgement.paths == [[0]]
    counted = LevelStats("target", 0)
    record_tree(counted, tree, judgement, [True])
    # The root's children weigh 0.9, node 0's child 0.25; greedily one of the two positions was accepted.
    assert counted.expected_acceptance_rate == pytest.approx((0.9 + 0.25) / 2 if sample else 0.5, abs=1e-6)
    assert (counted.drafted, counted.accepted, counted.recovered) == (2, 1, 1)


class _Always:
    """Draws the likeliest."""

    def categorical(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.argmax(-1)

    def bernoulli(self, probability: torch.Tensor) -> torch.Tensor:
        return probability >= 0.5


@pytest.mark.parametrize("middles", [0, 1])
def test_only_the_hidden_states_a_head_reads_are_kept(middles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[int]] = []
    genuine = EagleDrafter.watch

    def watch(self: EagleDrafter, passed: Any) -> None:
        found = [index for index, state in enumerate(passed.output.hidden_states) if state is not None]
        kept.append(found)
        # releases that cannot choose hand out all
        assert found == (sorted(index % 9 for index in self.reads_layers) if CHOOSES_HIDDEN_STATES else list(range(9)))
        genuine(self, passed)

    monkeypatch.setattr(EagleDrafter, "watch", watch)
    target = tiny(num_hidden_layers=8)
    levels: list[Any] = [noisy(target)] * middles
    head = head_for([target, *levels][-1])
    output = run(target, [*levels, head], prompts(1), polyspec_tree_tokens=0)
    assert len(kept) > 3
    monkeypatch.undo()
    everything = run(target, [*levels, head], prompts(1), output_hidden_states=True)
    assert torch.equal(everything.sequences, output.sequences)
    assert len(everything.hidden_states[0]) == 9
    assert all(state is not None for state in everything.hidden_states[0])


class Reads(Drafter):
    """A drafter of a user's own that wants to see hidden states."""

    reads_layers = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def watch(self, passed: Any) -> None:
        self.seen += passed.output.hidden_states[1] is not None

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        return Proposal([[] for _ in limits], None, [[] for _ in limits])


def test_a_users_drafter_may_read_hidden_states() -> None:
    target, mine = tiny(), Reads()
    run(target, [mine], prompts(1))
    assert mine.seen == 16


def test_a_drafter_that_only_observes_hears_of_trees() -> None:
    told: list[Any] = []

    class Hears(Reads):
        def observe(self, drafted: list[int], accepted: list[int]) -> None:
            told.append((drafted, accepted))

    Hears().observe_tree(TreeProposal([[4, 5, 6], []], [[ROOT, ROOT, 0], []], [[1, 1, 1], []]), [[1], []])
    assert told == [([2, 0], [1, 0])]


def test_draws_follow_the_target_while_sizes_follow_the_draws() -> None:
    """Chi-square of two tokens against the exact law; a correct chain fails with probability 1e-4 (seed fixed)."""
    settings = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
    target, prompt, draws = tiny(**settings), torch.tensor([[3, 7, 1, 7]]), 1000
    with torch.no_grad():
        texts = torch.cat([prompt.expand(8, -1), torch.arange(8)[:, None]], dim=1)
        second = target(texts).logits[:, -1].softmax(-1)
        expected = (target(prompt).logits[0, -1].softmax(-1)[:, None] * second).flatten().double() * draws
    middle = noisy(target, 0.2)
    torch.manual_seed(11)
    output = run(
        target,
        [middle, init_for(middle, "eagle1").eval()],
        {"input_ids": prompt},
        do_sample=True,
        top_k=0,
        max_new_tokens=5,
        num_return_sequences=draws,
        polyspec_control="fixed",
        num_assistant_tokens_schedule="heuristic",
        assistant_confidence_threshold=0.2,
        polyspec_draft_vocabulary=4,
        polyspec_tree_tokens=4,
    )
    observed = torch.bincount(output.sequences[:, 4] * 8 + output.sequences[:, 5], minlength=64).double()
    common = expected >= 5
    o = [*observed[common].tolist(), float(observed[~common].sum())]
    e = [*expected[common].tolist(), float(expected[~common].sum())]
    assert stats.chisquare(o, [value * sum(o) / sum(e) for value in e]).pvalue > 1e-4
    head = output.polyspec.levels[-1]
    assert 0 < head.accepted < head.drafted
    assert 1 < head.mean_tree_depth < TREES["polyspec_tree_depth"], "sizes differ"
