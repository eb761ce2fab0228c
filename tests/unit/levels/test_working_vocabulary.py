# SPDX-License-Identifier: Apache-2.0
"""A head that scores some of its ids: which they are, what it drafts, and that the text stays the target's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from tiny_models import VOCABULARY, head_for, noisy, prompts, tiny
from transformers import LogitsProcessorList, PreTrainedModel

from hf_polyspec import DraftVocabularyProcessor, rank_tokens
from hf_polyspec.eagle import EagleHead
from hf_polyspec.eagle.vocabulary import RowCache
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.levels import draft_vocabulary as module
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.draft_vocabulary import WorkingVocabulary
from hf_polyspec.levels.guessing import Guesser
from hf_polyspec.quantization import quantize_model

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("enabled")


def test_ends_specials_and_frequent_ids_come_first() -> None:
    head = head_for(tiny())
    head.config.frequent_tokens = [40, 7, 41, 9, 30]
    working = WorkingVocabulary(head, VOCABULARY, CPU, 6, always=[33])
    # 33 ends the text, 1 and 0 begin and pad it; then the most frequent.
    assert sorted(working.target_ids.tolist()) == sorted([33, 1, 0, 40, 7, 41])
    head.config.frequent_tokens = None
    assert sorted(WorkingVocabulary(head, VOCABULARY, CPU, 6, always=[33]).target_ids.tolist()) == [0, 1, 2, 3, 4, 33]


@pytest.mark.parametrize(
    ("size", "scored"), [(None, VOCABULARY), ("auto", VOCABULARY), (VOCABULARY, VOCABULARY), (5, 5)]
)
def test_sizes(size: Any, scored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_for(tiny())
    assert WorkingVocabulary(head, VOCABULARY, CPU, size).size == scored
    monkeypatch.setattr(module, "AUTO_ROWS", VOCABULARY // 2)
    assert WorkingVocabulary(head, VOCABULARY, CPU, "auto").size == VOCABULARY // 2
    # where nobody asked, a ranking of the ids has to say which ones can be left out
    assert WorkingVocabulary(head, VOCABULARY, CPU).size == VOCABULARY
    head.config.frequent_tokens = list(range(VOCABULARY))
    assert WorkingVocabulary(head, VOCABULARY, CPU).size == VOCABULARY // 2
    assert WorkingVocabulary(head, VOCABULARY, CPU, VOCABULARY).size == VOCABULARY
    monkeypatch.setattr(module, "AUTO_ROWS", VOCABULARY // 2 + 1)
    assert WorkingVocabulary(head, VOCABULARY, CPU, "auto").size == VOCABULARY


@torch.no_grad()
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
def test_scores_are_those_of_the_whole_head_restricted(
    own: bool, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has joined and gone again, scores equal the full ones under the public processor."""
    monkeypatch.setattr(module, "RECENT", 4)
    target = tiny()
    head = head_for(target, own_lm_head=own, draft_vocab=list(range(0, VOCABULARY, 2)) if mapped else None)
    chain = VOCABULARY - 5  # a chain with fewer columns than the head knows ids
    full, working = WorkingVocabulary(head, chain, CPU), WorkingVocabulary(head, chain, CPU, 8)
    hidden = torch.randn(2, 3, head.config.hidden_size)
    ids = torch.empty(2, 0, dtype=torch.long)
    for joining in ([], [20, 21, 22], [30], [32, 34], [36, 38, 40], [24, 46], [44, 1000, -1]):
        working.see(joining)
        if joining == [30]:
            working.pin([26, 28])
        expected = working.restriction()(ids, full.spread(full.score(hidden)))
        scored = working.score(hidden)
        torch.testing.assert_close(working.spread(scored), expected, rtol=1e-4, atol=1e-4)
        log_p, best = working.best(scored, 5)
        reference = expected.log_softmax(-1).topk(5)
        torch.testing.assert_close(log_p, reference.values, rtol=1e-4, atol=1e-4)
        assert torch.equal(best, reference.indices)
    held = set(working.target_ids.tolist())
    assert {26, 28} <= held, "what was pinned stays"
    assert {40, 24} <= held, "what came last is there"
    assert not held & {20, 30, 32}, "what came first has gone"
    assert max(held) < chain
    assert not mapped or not any(token % 2 for token in held)
    assert len(held) == working.size == 8 + 2 + 4


def run(target: PreTrainedModel, levels: list[Any], inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    values = {"max_new_tokens": 14, "do_sample": False, "polyspec_block_size": 4, "return_dict_in_generate": True}
    return target.generate(**inputs, assistant_models=levels, **{**values, **options})


@pytest.mark.parametrize("trees", [0, 6])
@pytest.mark.parametrize(("batch", "middles"), [(1, 0), (3, 1)])
def test_greedy_text_is_the_targets_own(trees: int, batch: int, middles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECENT", 8)
    target, inputs = tiny(), prompts(batch)
    levels: list[Any] = [noisy(target)] * middles
    expected = target.generate(**inputs, max_new_tokens=14, do_sample=False)
    head = head_for([target, *levels][-1])
    output = run(target, [*levels, head], inputs, polyspec_draft_vocabulary=6, polyspec_tree_tokens=trees)
    assert torch.equal(output.sequences, expected)
    scored = output.polyspec.levels[-1].draft_vocabulary
    distinct = len(set(inputs["input_ids"].flatten().tolist()))
    assert 6 < scored <= 6 + distinct + 14 * batch + 8
    assert scored < VOCABULARY
    assert run(target, [*levels, head], inputs).polyspec.levels[-1].draft_vocabulary is None


def test_only_ids_of_the_slice_of_the_prompt_and_of_late_are_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECENT", 2)
    seen: list[tuple[list[int], list[int]]] = []
    genuine = Guesser.likeliest

    def spy(self: Guesser, states: torch.Tensor, count: int) -> Any:
        found = genuine(self, states, count)
        seen.append((self.ids.tolist(), found[1].flatten().tolist()))
        return found

    monkeypatch.setattr(Guesser, "likeliest", spy)
    target, inputs = tiny(), prompts(1)
    run(target, [head_for(target)], inputs, polyspec_draft_vocabulary=6, polyspec_tree_tokens=6)
    prompt = set(inputs["input_ids"][0].tolist())
    sets = {tuple(known) for known, _ in seen}
    assert len(sets) > 1, "the working set follows the text"
    for known, drafted in seen:
        assert set(drafted) <= set(known)
        assert prompt <= set(known)


def test_draws_follow_the_target() -> None:
    """Chi-square of one token after the first; a correct chain fails with probability 1e-4 (seed fixed)."""
    target, prompt, draws = tiny(vocab_size=12, hidden_size=16, num_hidden_layers=1), torch.tensor([[3, 7, 1]]), 2000
    with torch.no_grad():
        first = target(prompt).logits[0, -1].softmax(-1)
        texts = torch.cat([prompt.expand(12, -1), torch.arange(12)[:, None]], dim=1)
        expected = (first[:, None] * target(texts).logits[:, -1].softmax(-1)).sum(0).double() * draws
    torch.manual_seed(3)
    output = run(
        target,
        [head_for(target, "eagle1")],
        {"input_ids": prompt},
        do_sample=True,
        top_k=0,
        max_new_tokens=3,
        num_return_sequences=draws,
        polyspec_control="fixed",
        polyspec_draft_vocabulary=4,
    )
    observed = torch.bincount(output.sequences[:, 4], minlength=12).double()
    common = expected >= 5
    o = [*observed[common].tolist(), float(observed[~common].sum())]
    e = [*expected[common].tolist(), float(expected[~common].sum()) + 1e-9]
    assert stats.chisquare(o, [value * sum(o) / sum(e) for value in e]).pvalue > 1e-4
    assert 0 < output.polyspec.levels[-1].accepted < output.polyspec.levels[-1].drafted


@torch.no_grad()
def test_rows_of_a_packed_head_are_read_without_unpacking_it(monkeypatch: pytest.MonkeyPatch) -> None:
    middle: Any = quantize_model(tiny(), bits=8)
    kind = type(middle.lm_head)
    whole = middle.lm_head.weight
    head = head_for(middle, "eagle1")
    unpacked: list[None] = []
    genuine: Callable[..., Any] = kind.weight.fget
    monkeypatch.setattr(kind, "weight", property(lambda self: unpacked.append(None) or genuine(self)))
    working = WorkingVocabulary(head, VOCABULARY, CPU, 8)
    working.see([30, 31])
    hidden = torch.randn(1, 1, head.config.hidden_size)
    torch.testing.assert_close(working.score(hidden), hidden @ whole[working.target_ids].T, rtol=1e-4, atol=1e-4)
    head.logits(hidden)
    assert not unpacked


def test_a_head_that_cannot_be_sliced_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    target, inputs = tiny(), prompts(1)
    monkeypatch.setattr(EagleHead, "vocabulary_slice", _refuse)
    output = run(target, [head_for(target)], inputs, polyspec_draft_vocabulary=6)
    assert output.polyspec.levels[1].notes == [f"all {VOCABULARY} ids are drafted from: cannot be sliced"]
    assert output.polyspec.levels[1].draft_vocabulary is None


def _refuse(self: EagleHead, target_ids: torch.Tensor) -> Any:
    raise ValueError("cannot be sliced")


def test_slices_are_cut_once_and_anew_when_weights_change() -> None:
    head, rows = head_for(tiny()), RowCache()
    ids = torch.tensor([3, 5, 8])
    first = rows.slice(head, ids)
    assert rows.slice(copy.copy(head), ids) is first
    assert rows.slice(head, torch.tensor([3, 5, 9])) is not first
    second = rows.slice(head, ids)
    with torch.no_grad():
        head.lm_head.weight[5] += 1
    third = rows.slice(head, ids)
    torch.testing.assert_close(third.weight[1], second.weight[1] + 1)


def test_the_processor() -> None:
    scores = torch.arange(12.0).reshape(2, 6)
    restricted = DraftVocabularyProcessor([4, 1, 1, 99])(torch.empty(2, 0), scores)
    assert restricted.isfinite().nonzero().tolist() == [[0, 1], [0, 4], [1, 1], [1, 4]]
    assert restricted[1, 4] == scores[1, 4]
    assert DraftVocabularyProcessor.from_texts([[5, 5, 2], [2, 5, 9]], 3, always=[7]).ids == [2, 5, 7]
    assert rank_tokens([[5, 5, 2], torch.tensor([2, 5, 9, 1])]) == [5, 2, 1, 9]
    assert not LawMaker([DraftVocabularyProcessor([1])], True, CPU).in_order
    for bad, error in (([], ValueError), ([-1], ValueError), (["a"], TypeError), ([True], TypeError)):
        with pytest.raises(error, match="a draft vocabulary"):
            DraftVocabularyProcessor(bad)  # type: ignore[arg-type]


def test_the_processor_restricts_a_small_model_and_not_the_target() -> None:
    target, inputs = tiny(), prompts(1)
    expected = target.generate(**inputs, max_new_tokens=14, do_sample=False)
    allowed = set(expected[0].tolist()[::2])
    runner = ModelRunner(noisy(target, 0.01), "drafter")
    drafter = CausalLMDrafter(runner, name="drafter", restriction=DraftVocabularyProcessor(allowed))
    assert torch.equal(run(target, [drafter], inputs).sequences, expected)
    assert drafter.stats.accepted > 0
    drafter.begin(1, 1, VOCABULARY)
    ids = inputs["input_ids"][0].tolist()
    context = Context([ids], Prompt(len(ids), None, torch.arange(len(ids))[None]))
    drawn = drafter.propose(context, [5], LawMaker([], True, CPU))
    assert set(drawn.tokens[0]) <= allowed
    assert drawn.q is not None
    assert set(drawn.q[0].nonzero()[:, 1].tolist()) == allowed
    # The processor is for drafters: as a processor of generate() it holds for every level.
    everywhere = target.generate(
        **inputs,
        max_new_tokens=5,
        do_sample=False,
        logits_processor=LogitsProcessorList([DraftVocabularyProcessor(allowed)]),
    )
    assert set(everywhere[0, len(ids) :].tolist()) <= allowed


@pytest.mark.parametrize("value", [0, -3, "small", 2.5, True])
def test_sizes_are_checked(value: Any) -> None:
    target = tiny()
    with pytest.raises(ValueError, match='polyspec_draft_vocabulary must be a whole number of at least 1 or "auto"'):
        run(target, [head_for(target)], prompts(1), polyspec_draft_vocabulary=value)
