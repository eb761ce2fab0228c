# SPDX-License-Identifier: Apache-2.0
"""What a verifier makes of a level below that errs: an error that names the level, never another text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, head_for, noisy, prompts, tiny
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec import Drafter, LevelError, Proposal
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.proposal import TreeProposal, proposal_fault, tree_fault
from hf_polyspec.levels.asking import ask

SHORT = {"max_new_tokens": 8, "do_sample": False}


class Made(Drafter):
    """Proposes what a function makes of the limits."""

    name = "made"

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make
        self.told: list[tuple[list[int], list[int]]] = []

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Any:
        return self.make(limits)

    def observe(self, drafted: list[int], accepted: list[int]) -> None:
        self.told.append((drafted, accepted))


class MadeTree(Made):
    grows_trees = True

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> Any:
        return self.make(limits)


def drafts(*rows: list[int], q: Any = None) -> Proposal:
    return Proposal(list(rows), q, [[1] * len(row) for row in rows])


def raises(limits: list[int]) -> Proposal:
    raise KeyError("nothing here")


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny("llama")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda limits: None, "proposed None, and propose() must return a Proposal"),
        (lambda limits: [[5]], "proposed a list, and propose() must return a Proposal"),
        (lambda limits: drafts([5]), "proposed tokens for 1 rows, and this batch has 2"),
        (lambda limits: drafts([5], [VOCABULARY]), "proposed the id 48, and ids go from 0 to 47"),
        (lambda limits: drafts([-1], []), "proposed the id -1, and ids go from 0 to 47"),
        (lambda limits: drafts([5] * 9, []), "proposed 9 tokens where at most "),
        (lambda limits: Proposal([[5], []], None, [[], []]), "origins of another form than its tokens"),
        (lambda limits: drafts([5], [], q=torch.ones(2, 1, 3)), r"a q of shape [2, 1, 3], and [2, 1, 48] is wanted"),
        (lambda limits: drafts([5], [], q="flat"), "a q that is no tensor [2, 1, 48]: a str"),
        (raises, "failed to propose: 'nothing here'"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_drafter_at_fault_is_named(target, make, says, place):
    chain = [noisy(target), Made(make)][1 - place :]
    with pytest.raises(LevelError) as caught:
        hf_polyspec.generate(target, **prompts(2), **SHORT, assistant_models=chain)
    sentence = str(caught.value)
    assert sentence.startswith(f"assistant_models[{place}] (made) ")
    assert says in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ([[5]], "proposed a list, and propose_tree() must return a TreeProposal or None"),
        (TreeProposal([[5]], [[-1]], [[1]]), "proposed trees for 1 rows, and this batch has 2"),
        (TreeProposal([[5, 6], []], [[1, -1], []], [[1, 1], []]), "a node stands before its parent"),
        (TreeProposal([[VOCABULARY], []], [[-1], []], [[1], []]), "proposed the id 48"),
    ],
)
def test_a_tree_at_fault_is_named(target, tree, says):
    with pytest.raises(LevelError, match=r"^assistant_models\[0\] \(made\) ") as caught:
        hf_polyspec.generate(target, **prompts(2), **SHORT, assistant_models=[MadeTree(lambda limits: tree)])
    assert says in str(caught.value)


def test_refusals_keep_their_kind_and_lack_of_memory_stays_what_it_is(target):
    def refuses(limits: list[int]) -> Proposal:
        raise ValueError("only on Sundays.")

    def starves(limits: list[int]) -> Proposal:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(ValueError, match=r"assistant_models\[0\] \(made\) failed to propose: only on Sundays"):
        hf_polyspec.generate(target, **prompts(1), **SHORT, assistant_models=[Made(refuses)])
    with pytest.raises(torch.OutOfMemoryError, match="no memory") as caught:
        hf_polyspec.generate(target, **prompts(1), **SHORT, assistant_models=[Made(starves)])
    assert caught.value.__notes__ == ["hf_polyspec: assistant_models[0] (made) failed to propose."]


def broken(model: PreTrainedModel, value: float) -> PreTrainedModel:
    other = noisy(model)
    with torch.no_grad():
        other.lm_head.weight[5] = value
    return other


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", ["auto", "token", "block"])
@pytest.mark.parametrize("place", ["drafter", "middle", "below a middle"])
def test_numbers_that_are_none_in_an_assistant(target, value, rule, place):
    """Greedy text stays plain's. Sampled, the text is one of valid ids or the level is named."""
    bad = broken(target, value)
    chain = {"drafter": [bad], "middle": [bad, hf_polyspec.SuffixDrafter()], "below a middle": [noisy(target), bad]}[
        place
    ]
    greedy = hf_polyspec.generate(target, **prompts(2), **SHORT, assistant_models=chain)
    assert greedy.tolist() == target.generate(**prompts(2), **SHORT).tolist()
    torch.manual_seed(0)
    options = {**SHORT, "do_sample": True, "polyspec_verification": rule}
    said = ""
    try:
        found = hf_polyspec.generate(target, **prompts(2), **options, assistant_models=chain)
        assert 0 <= int(found.min()) <= int(found.max()) < VOCABULARY
    except LevelError as error:
        said = str(error)
    assert not said or f"assistant_models[{int(place == 'below a middle')}]" in said


def test_a_proposal_is_cut_where_it_ends_the_text():
    q = torch.rand(2, 3, VOCABULARY)
    source = Made(lambda limits: drafts([5, 9, 6], [7], q=q))
    context = Context([[1, 2], [3, 4]], Prompt(2, None, torch.arange(2).expand(2, -1)))
    law = LawMaker([], True, torch.device("cpu"))
    found = ask(source, context, [4, 4], law, VOCABULARY, frozenset({9}))
    assert found.tokens == [[5, 9], [7]]
    assert found.origins == [[1, 1], [1]]
    assert torch.equal(found.q, q[:, :2])
    assert ask(source, context, [4, 4], law, VOCABULARY, frozenset({8})).tokens == [[5, 9, 6], [7]]
    whole = Made(lambda limits: drafts([9, 6], []))
    assert ask(whole, context, [4, 4], law, VOCABULARY, frozenset({9})).tokens == [[9], []]


def test_sound_proposals_have_no_fault():
    assert proposal_fault(drafts([5, 0], []), [2, 0], VOCABULARY) is None
    assert proposal_fault(drafts([], []), [0, 0], VOCABULARY) is None
    assert proposal_fault(drafts([5], [], q=torch.ones(2, 3, VOCABULARY)), [1, 1], VOCABULARY) is None
    tree = TreeProposal([[5, 6, 7], []], [[-1, 0, -1], []], [[1, 1, 1], []])
    assert tree_fault(tree, 2, VOCABULARY) is None


def test_trees_of_a_head_pass(target):
    """What the package's own drafters hand up is sound."""
    out = hf_polyspec.generate(
        target, **prompts(2), **SHORT, assistant_models=[head_for(target)], polyspec_tree_tokens=8
    )
    assert out.tolist() == target.generate(**prompts(2), **SHORT).tolist()
