# SPDX-License-Identifier: Apache-2.0
"""A head and a suffix drafter as one level: merged trees, chains from one of the two, exactness, telemetry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from tiny_models import head_for, noisy, tiny
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from hf_polyspec import SuffixDrafter
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import Proposal, TreeProposal
from hf_polyspec.exactness.tree_geometry import ROOT, graft, path_to
from hf_polyspec.generation.chain import check_assistants
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.joined import JoinedDrafter

TREES = {"polyspec_tree_tokens": 8, "polyspec_tree_depth": 3, "polyspec_tree_top_k": 3}
# A text that repeats, so that suffixes are found.
REPEATING = torch.tensor([[5, 9, 17, 23, 31, 9, 17, 23, 5, 9, 17, 23, 31, 9]])


pytestmark = pytest.mark.usefixtures("enabled")


@pytest.mark.parametrize(
    ("branch", "more", "parents"),
    [
        ([4, 6, 8], [8], [2]),  # shares 4, 6
        ([4, 6], [], []),  # is there already
        ([4], [], []),
        ([7, 4], [7, 4], [ROOT, 4]),  # nothing in common
        ([5, 6, 6], [6, 6], [1, 4]),  # leaves where 5 has no such child
        ([], [], []),
    ],
)
def test_a_branch_shares_the_nodes_that_are_there(branch: list[int], more: list[int], parents: list[int]) -> None:
    tree = [4, 5, 6, 7], [ROOT, ROOT, 0, 1]
    assert graft(*tree, branch) == (more, parents)
    tokens, above = tree[0] + more, tree[1] + parents
    paths = [tuple(tokens[n] for n in path_to(node, above)) for node in range(len(tokens))]
    assert len(set(paths)) == len(paths), "no node is doubled"
    assert not branch or tuple(branch) in paths


class Fixed(Drafter):
    """Proposes the same chain or tree every time, and keeps what it is told."""

    def __init__(self, chain: list[int], tree: TreeProposal | None = None, q: torch.Tensor | None = None) -> None:
        super().__init__()
        self.chain, self.tree, self.q = chain, tree, q
        self.told: list[tuple[list[int], list[int]]] = []
        self.limits: list[list[int]] = []

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        self.limits.append(limits)
        tokens = [self.chain[:limit] for limit in limits]
        return Proposal(tokens, self.q, [[self.index] * len(row) for row in tokens])

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        return self.tree

    def observe(self, drafted: list[int], accepted: list[int]) -> None:
        self.told.append((drafted, accepted))


def joined(head: Fixed, branch: Fixed, **settings: Any) -> JoinedDrafter:
    level = JoinedDrafter(head, branch, **settings)
    level.begin(1, 1, 8)
    return level


CONTEXT = Context([[1, 2]], Prompt(2, None, torch.arange(2)[None]))


def law(sample: bool) -> LawMaker:
    return LawMaker([], sample, torch.device("cpu"))


def test_both_are_told_what_became_of_their_part() -> None:
    head = Fixed([], TreeProposal([[4, 5, 6]], [[ROOT, ROOT, 0]], [[1, 1, 1]]))
    branch = Fixed([4, 6, 7, 2, 3])
    level = joined(head, branch, eos=frozenset({2}))
    tree = level.propose_tree(CONTEXT, [9], law(False))
    assert tree is not None
    assert (tree.tokens, tree.parents) == ([[4, 5, 6, 7, 2]], [[ROOT, ROOT, 0, 2, 3]]), "nothing follows the end 2"
    assert tree.origins == [[1, 1, 1, 2, 2]]
    level.observe_tree(tree, [[0, 2, 3]])
    assert head.told == [([2], [2])]
    assert branch.told == [([4], [3])]
    level.observe_tree(tree, [[1]])
    assert head.told[-1] == ([2], [1])
    assert branch.told[-1] == ([4], [0])


def test_of_a_row_that_is_not_asked_again_the_last_draft_is_still_its_own() -> None:
    """A draft that went past a middle is judged after other rows were asked once more."""
    head, branch = Fixed([6, 6, 6]), Fixed([3, 3])
    level = JoinedDrafter(head, branch, chain_tokens=2)
    level.begin(1, 2, 8)
    both = Context([[1, 2], [1, 2]], Prompt(2, None, torch.arange(2).expand(2, -1)))
    level.propose(both, [5, 1], law(False))
    assert [level.is_sure(row) for row in (0, 1)] == [True, False]
    level.propose(both, [0, 5], law(False))
    assert [level.is_sure(row) for row in (0, 1)] == [True, True]
    level.propose(both, [1, 0], law(False))
    level.observe([2, 1], [1, 1])
    assert (branch.told[-1], head.told[-1]) == (([0, 1], [0, 1]), ([2, 0], [1, 0]))
    level.keep_rows([1])
    level.add_rows(1)
    assert [level.is_sure(row) for row in (0, 1)] == [True, False]


def test_a_head_that_rests_is_not_asked() -> None:
    head, branch = Fixed([6, 6, 6]), Fixed([3])
    level = joined(head, branch, chain_tokens=2)
    level.rests = True
    assert level.propose(CONTEXT, [5], law(False)).tokens == [[3]]
    level.observe([1], [1])
    assert not head.limits
    assert not head.told
    assert branch.told == [([1], [1])]
    level.rests = False
    assert level.propose(CONTEXT, [5], law(False)).tokens == [[6, 6, 6]]


@pytest.mark.parametrize(("length", "from_branch"), [(1, False), (2, False), (3, True)])
def test_a_chain_comes_from_the_branch_where_that_is_long(length: int, from_branch: bool) -> None:
    head, branch = Fixed([6, 6, 6], q=torch.full((1, 3, 8), 0.125)), Fixed([3] * length)
    level = joined(head, branch, chain_tokens=3)
    proposal = level.propose(CONTEXT, [5], law(True))
    assert proposal.tokens == [branch.chain if from_branch else [6, 6, 6]]
    assert proposal.origins == [[2 if from_branch else 1] * 3]
    assert head.limits[-1] == [0 if from_branch else 5]
    expected = torch.eye(8)[3].expand(1, 3, 8) if from_branch else head.q
    assert proposal.q is not None
    assert torch.equal(proposal.q, expected)
    level.observe([3], [2])
    assert (branch if from_branch else head).told == [([3], [2])]
    assert (head if from_branch else branch).told == [([0], [0])]


def test_a_drawn_branch_is_never_left_out_for_its_length() -> None:
    """Its length may follow from what was drawn, so leaving it out would be a choice by value (law 2)."""
    head, branch = Fixed([6, 6, 6]), Fixed([3], q=torch.full((1, 1, 8), 0.125))
    assert joined(head, branch, chain_tokens=3).propose(CONTEXT, [5], law(True)).tokens == [[3]]


def test_a_branch_is_no_longer_than_asked() -> None:
    head = Fixed([], TreeProposal([[4]], [[ROOT]], [[1]]))
    tree = joined(head, Fixed([7, 7, 7]), branch_limit=2).propose_tree(CONTEXT, [9], law(False))
    assert tree is not None
    assert tree.tokens == [[4, 7, 7]]


@pytest.mark.parametrize("trees", [TREES, {}])
@pytest.mark.parametrize("middles", [0, 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_greedy_text_is_the_targets_own(trees: dict[str, int], middles: int, batch: int) -> None:
    target = tiny(seed=2)
    levels: list[Any] = [noisy(target)] * middles
    inputs = {"input_ids": REPEATING.repeat(batch, 1), "attention_mask": torch.ones(batch, REPEATING.shape[1]).long()}
    inputs["attention_mask"][1:, :3] = 0
    expected = target.generate(**inputs, max_new_tokens=14, do_sample=False)
    # A corpus that knows the text, so that branches are accepted.
    suffix = SuffixDrafter(corpus=expected.tolist())
    output = target.generate(
        **inputs,
        assistant_models=[*levels, head_for([target, *levels][-1]), suffix],
        max_new_tokens=14,
        do_sample=False,
        num_assistant_tokens=3,
        polyspec_block_size=4,
        return_dict_in_generate=True,
        **trees,
    )
    assert torch.equal(output.sequences, expected)
    *_, head, branch = output.polyspec.levels
    assert (head.index, branch.index, branch.name) == (middles + 1, middles + 2, "suffix")
    assert branch.accepted > 0
    assert head.drafted > 0
    assert any(middles + 2 in row for row in output.polyspec.token_levels)


@pytest.mark.parametrize("middles", [0, 1])
def test_draws_follow_the_target(middles: int) -> None:
    """Chi-square of two tokens against the exact law; a correct chain fails with probability 1e-4 (seed fixed)."""
    settings = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
    target, prompt, draws = tiny(**settings), torch.tensor([[3, 7, 1, 7, 3, 7]]), 1000
    with torch.no_grad():
        first = target(prompt).logits[0, -1].softmax(-1)
        texts = torch.cat([prompt.expand(8, -1), torch.arange(8)[:, None]], dim=1)
        expected = (first[:, None] * target(texts).logits[:, -1].softmax(-1)).flatten().double() * draws
    levels: list[Any] = [noisy(target, 0.2)] * middles
    torch.manual_seed(7)
    output = target.generate(
        prompt,
        assistant_models=[*levels, head_for([target, *levels][-1]), SuffixDrafter(min_probability=0)],
        do_sample=True,
        top_k=0,
        max_new_tokens=3 + 2 * middles,
        num_return_sequences=draws,
        polyspec_control="fixed",
        polyspec_block_size=4,
        return_dict_in_generate=True,
        **{**TREES, "polyspec_tree_tokens": 4},
    )
    drawn = output.sequences[:, 6:8]
    observed = torch.bincount(drawn[:, 0] * 8 + drawn[:, 1], minlength=64).double()
    common = expected >= 5
    o = [*observed[common].tolist(), float(observed[~common].sum())]
    e = [*expected[common].tolist(), float(expected[~common].sum())]
    assert stats.chisquare(o, [value * sum(o) / sum(e) for value in e]).pvalue > 1e-4
    head, suffix = output.polyspec.levels[-2:]
    assert 0 < suffix.accepted < suffix.drafted
    assert 0 < head.accepted < head.drafted


def test_a_candidate_generator_of_transformers_joins_too() -> None:
    target = tiny(seed=2)
    lookup = PromptLookupCandidateGenerator(
        num_output_tokens=3, max_matching_ngram_size=2, max_length=200, eos_token_id=torch.tensor([1])
    )
    options = {"max_new_tokens": 14, "do_sample": False}
    output = target.generate(
        REPEATING, assistant_models=[head_for(target), lookup], return_dict_in_generate=True, **options, **TREES
    )
    assert torch.equal(output.sequences, target.generate(REPEATING, **options))
    assert output.polyspec.levels[-1].name == "PromptLookupCandidateGenerator"
    assert output.polyspec.levels[-1].drafted > 0


def test_what_may_follow_a_head() -> None:
    target = tiny()
    head = head_for(target)
    assert len(check_assistants(target, [head, SuffixDrafter()])) == 2
    with pytest.raises(ValueError, match="must come last, or before one drafter without a model"):
        check_assistants(target, [head, SuffixDrafter(), SuffixDrafter()])
    with pytest.raises(ValueError, match="a drafter must come last"):
        check_assistants(target, [SuffixDrafter(), head])
