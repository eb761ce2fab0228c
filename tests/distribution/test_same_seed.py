# SPDX-License-Identifier: Apache-2.0
"""`torch.manual_seed(s); model.generate(do_sample=True)` gives the same text with and without levels, each axis alone.

Texts and the generator's state afterwards are compared with `torch.equal`; nothing here is left to chance.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from coin_flips import CoinFlips
from same_seed import CHANCES, ENDS, check, sampled
from tiny_models import head_for, noisy, prompts, tiny
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from hf_polyspec.control import known
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.early_exit import early_exit
from hf_polyspec.levels.suffix import SuffixDrafter

pytestmark = pytest.mark.usefixtures("enabled")
TREE = {"polyspec_tree_tokens": 12, "polyspec_tree_depth": 4, "polyspec_tree_top_k": 3}
SLICE = {"polyspec_draft_vocabulary": 20}


def below(target: PreTrainedModel, *distances: float) -> list[Any]:
    return [noisy(target, distance, seed=i) for i, distance in enumerate(distances)]


@pytest.mark.parametrize("case", ARCHITECTURES, ids=[case.title for case in ARCHITECTURES])
def test_architectures(case: Architecture) -> None:
    target = tiny(case.model_type, attention=case.attention[0], **case.settings)
    levels = below(target, case.noise, 1.5 * case.noise)
    one = check(target, levels[1:], 1, **prompts(1))
    three = check(target, levels, 2, **prompts(3), **ENDS)
    assert one.levels[0].accepted + three.levels[0].accepted > 0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("distances", [(0.05,), (0.03, 0.05), (0.02, 0.04, 0.06)], ids=len)
def test_chains_of_two_three_and_four(target: PreTrainedModel, distances: tuple[float, ...], batch: int) -> None:
    levels, sizes = below(target, *distances), {"polyspec_block_size": 4, "num_assistant_tokens": 3}
    tops = []
    for seed in range(4):
        tops.append(check(target, levels, seed, sizes, **prompts(batch)).levels[0])
        check(target, levels, seed, sizes, **prompts(batch), **ENDS)
    assert 0 < sum(top.accepted for top in tops) < sum(top.drafted for top in tops)


@pytest.mark.parametrize("rule", ["auto", "coupled"])
def test_an_exact_copy_is_never_rejected(target: PreTrainedModel, rule: str) -> None:
    """Drafting takes part: five tokens of a copy and the target's own are six a pass."""
    for batch in (1, 3):
        found = check(
            target, below(target, 0.0), 3, {"polyspec_verification": rule}, max_new_tokens=30, **prompts(batch)
        )
        assert found.levels[0].accepted == found.levels[0].drafted
        assert found.levels[0].forward_passes <= 0.4 * 30


def test_num_return_sequences(target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "HOPE", 100.0)  # else drafts are not worth their columns in so short texts of 8 rows
    for options in ({}, ENDS):
        found = check(target, below(target, 0.03, 0.05), 4, num_return_sequences=4, **prompts(2), **options)
        assert found.levels[0].accepted > 0


OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "flatter": {"temperature": 1.7},
    "top-k": {"top_k": 5},
    "no top-k": {"top_k": 0},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "typical": {"typical_p": 0.7},
    "epsilon": {"epsilon_cutoff": 0.02},
    "eta": {"eta_cutoff": 0.02},
    "repetition": {"repetition_penalty": 1.4},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[3], [4, 5]]},
    "suppressed": {"suppress_tokens": [7, 8, 9]},
    "suppressed at first": {"begin_suppress_tokens": [7, 8, 9, 10]},
    "bias": {"sequence_bias": [[[12], 4.0]]},
    "forced end": {"forced_eos_token_id": 2},
    "least length": {"min_new_tokens": 8, "eos_token_id": [5, 6, 7, 8, 9, 10], "pad_token_id": 0},
    "length penalty": {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 5, "pad_token_id": 0},
    "normalised": {"renormalize_logits": True, "top_k": 9},
    "repair": {"remove_invalid_values": True},
    "no cache": {"use_cache": False},
    "all at once": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, **ENDS},
    "in pieces": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(target: PreTrainedModel, name: str) -> None:
    levels = below(target, 0.03, 0.05)
    accepted = sum(check(target, levels, 5, **prompts(batch), **OPTIONS[name]).levels[0].accepted for batch in (1, 3))
    assert accepted > 0


class Parity(LogitsProcessor):
    """A processor of the caller's that nobody knows: the next token's parity differs from the last one's."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(scores.shape[1])
        return scores.masked_fill((ids[None] + input_ids[:, -1:]) % 2 == 0, float("-inf"))


class Counting(LogitsProcessor):
    """One with a state: every third token is drawn from half of the vocabulary."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        half = torch.arange(scores.shape[1]) < scores.shape[1] // 2
        return scores.masked_fill(half[None], float("-inf")) if self.calls % 3 == 0 else scores


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", [Parity, Counting])
def test_processors_of_the_callers_own(target: PreTrainedModel, kind: type[LogitsProcessor], batch: int) -> None:
    texts = []
    for levels in ({}, {"assistant_models": below(target, 0.03, 0.05)}):
        processors = LogitsProcessorList([kind()])
        texts.append(sampled(target, 6, logits_processor=processors, **levels, **prompts(batch), **ENDS))
    assert torch.equal(texts[0][0].sequences, texts[1][0].sequences)
    assert torch.equal(texts[0][1], texts[1][1])
    assert texts[1][0].polyspec.seed_holds


class EndsWith(StoppingCriteria):
    """Rows end after an id that is no end of text; or all do, after so many calls."""

    def __init__(self, ids: set[int], calls: int = 1 << 30) -> None:
        self.ids, self.left = ids, calls

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.left -= 1
        return torch.tensor([row[-1] in self.ids or self.left <= 0 for row in input_ids.tolist()])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("padding", [{}, ENDS])
def test_criteria_end_a_call_where_plain_generation_ends(
    target: PreTrainedModel, batch: int, padding: dict[str, Any]
) -> None:
    for ids, calls in (({11, 12, 13, 14}, 1 << 30), (set(), 7)):
        found = []
        for levels in ({}, {"assistant_models": below(target, 0.0)}):
            criteria = StoppingCriteriaList([EndsWith(set(ids), calls)])
            request = {**prompts(batch), **padding, **levels, "max_new_tokens": 30}
            found.append(sampled(target, 8, stopping_criteria=criteria, **request))
        assert torch.equal(found[0][0].sequences, found[1][0].sequences)
        assert torch.equal(found[0][1], found[1][1])


def test_a_time_limit_cuts_the_same_text(target: PreTrainedModel) -> None:
    whole, _ = sampled(target, 9, max_new_tokens=80, **prompts(1))
    cut, state = sampled(
        target, 9, max_new_tokens=80, max_time=0.02, assistant_models=below(target, 0.05), **prompts(1)
    )
    length = cut.sequences.shape[1]
    assert torch.equal(whole.sequences[:, :length], cut.sequences)
    again, after = sampled(target, 9, max_new_tokens=length - prompts(1)["input_ids"].shape[1], **prompts(1))
    assert torch.equal(again.sequences, cut.sequences)
    assert torch.equal(after, state)


class Heard:
    """A streamer that keeps what it was given."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.steps.append(value.flatten().tolist())

    def end(self) -> None:
        self.steps.append([])


def test_streamers_hear_the_same_text(target: PreTrainedModel) -> None:
    heard = [Heard(), Heard()]
    for streamer, levels in zip(heard, ({}, {"assistant_models": below(target, 0.03, 0.05)}), strict=True):
        sampled(target, 10, streamer=streamer, **levels, **prompts(1))
    assert heard[1].steps == heard[0].steps


def test_scores_and_logits_are_those_of_the_text(target: PreTrainedModel) -> None:
    wanted = {"output_scores": True, "output_logits": True, "top_k": 10, **prompts(3), **ENDS}
    plain, ours = sampled(target, 11, **wanted), sampled(target, 11, assistant_models=below(target, 0.03), **wanted)
    assert torch.equal(plain[0].sequences, ours[0].sequences)
    assert torch.equal(plain[1], ours[1])
    alive = [row.index(0) if 0 in row else len(row) for row in plain[0].sequences[:, 9:].tolist()]
    for step, (left, right) in enumerate(zip(plain[0].scores, ours[0].scores, strict=True)):
        rows = [row for row, end in enumerate(alive) if step < end]
        torch.testing.assert_close(left[rows], right[rows], atol=1e-4, rtol=1e-4)


def test_a_filled_cache_is_continued(target: PreTrainedModel) -> None:
    ids = prompts(1)["input_ids"]
    found = []
    for levels in ({}, {"assistant_models": below(target, 0.03, 0.05)}):
        first, _ = sampled(target, 12, input_ids=ids, use_cache=True, **levels)
        more = torch.cat([first.sequences, torch.tensor([[7, 9]])], dim=1)
        cache = getattr(first, "cache", None) or getattr(first, "past_key_values", None)
        name = "cache" if getattr(first, "cache", None) is not None else "past_key_values"
        second, state = sampled(target, 13, input_ids=more, **{name: cache}, **levels)
        found.append((second.sequences, state))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def _levels(name: str, target: PreTrainedModel) -> tuple[list[Any], dict[str, Any]]:
    middle = noisy(target, 0.03, seed=1)
    kinds: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "head": ([head_for(target)], {}),
        "head as a tree": ([head_for(target)], TREE),
        "head of the first kind as a tree": ([head_for(target, "eagle1")], TREE),
        "head over a slice": ([head_for(target)], SLICE),
        "head over a slice as a tree": ([head_for(target)], SLICE | TREE),
        "head with its own vocabulary": ([head_for(target, draft_vocabulary=list(range(3, 40)))], TREE),
        "head below a middle": ([middle, head_for(middle)], {}),
        "tree below a middle": ([middle, head_for(middle)], TREE),
        "without copies": ([head_for(target)], {"polyspec_draft_copies": False}),
        "suffix": ([SuffixDrafter(min_probability=0.0)], {}),
        "suffix below a middle": ([middle, SuffixDrafter(min_probability=0.0)], {"polyspec_direct_tokens": 1}),
        "joined": ([head_for(target), SuffixDrafter(min_probability=0.0)], {}),
        "joined as a tree": ([middle, head_for(middle), SuffixDrafter(min_probability=0.0)], TREE),
        "early exit": ([early_exit(target, 1)], {}),
        "8 bits": (["int8", noisy(target, 0.05, seed=2)], {}),
        "4 bits": (["int4", SuffixDrafter()], {}),
        "early exit by name": (["early-exit:1"], {}),
        "unsure drafts": (below(target, 0.1), {"assistant_confidence_threshold": 0.5}),
        "sharper drafts": (below(target, 0.05), {"polyspec_draft_temperature": 0.7}),
        "sizes that change": (below(target, 0.05), {"num_assistant_tokens_schedule": "heuristic"}),
        "bfloat16 middle": ([noisy(target, 0.0).bfloat16(), noisy(target, 0.05)], {}),
    }
    return kinds[name]


KINDS = (
    "head", "head as a tree", "head of the first kind as a tree", "head over a slice", "head over a slice as a tree",
    "head with its own vocabulary", "head below a middle", "tree below a middle", "without copies", "suffix",
    "suffix below a middle", "joined", "joined as a tree", "early exit", "8 bits", "4 bits", "early exit by name",
    "unsure drafts", "sharper drafts", "sizes that change", "bfloat16 middle",
)  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_levels_of_every_kind(target: PreTrainedModel, name: str, batch: int) -> None:
    accepted = 0
    repeating = {"temperature": 0.05, "max_new_tokens": 60}  # something for levels that only look back
    for seed, options in ((14, repeating), (15, {"top_k": 8, **ENDS})):
        levels, own = _levels(name, target)
        found = check(target, levels, seed, own, **prompts(batch), **options)
        accepted += found.levels[0].accepted
    assert accepted > 0


@pytest.mark.parametrize("batch", [1, 3])
def test_a_level_with_fewer_ids_reads_the_noise_of_those(target: PreTrainedModel, batch: int) -> None:
    for size in (44, 52):
        other = tiny("llama", vocab_size=size)
        with torch.no_grad():
            for mine, its in zip(other.parameters(), target.parameters(), strict=True):
                rows = tuple(slice(0, min(a, b)) for a, b in zip(mine.shape, its.shape, strict=True))
                mine[rows] = its[rows]
        found = check(target, [other], 16, top_k=8, temperature=0.6, **prompts(batch, vocabulary=44))
        assert found.levels[0].accepted > 0


def test_targets_in_other_types(target: PreTrainedModel) -> None:
    """bfloat16 and float64: plain generation samples from float32 scores whatever the model's type."""
    for kind in (torch.float64, torch.bfloat16):
        model = noisy(target, 0.0).to(kind)
        for seed in range(3):
            found = check(model, [noisy(target, 0.03)], seed, use_cache=False, **prompts(1))
            assert found.levels[0].accepted > 0


class Own(Drafter):
    """A drafter of a user's: draws from a model by other means than the chain's, or does not draw."""

    def __init__(self, model: PreTrainedModel, how: str) -> None:
        super().__init__()
        self.model, self.how = model, how

    @torch.no_grad()
    def propose(self, context: Any, limits: list[int], law: Any) -> Any:
        from hf_polyspec.exactness.proposal import Proposal

        rows, laws = [], []
        for ids, limit in zip(context.ids, limits, strict=True):
            row: list[int] = []
            while len(row) < min(limit, 3):
                scores = self.model(torch.tensor([ids + row])).logits[:, -1]
                weights = scores.softmax(-1)
                if self.how == "torch":
                    token = torch.multinomial(weights, 1)
                elif self.how == "law":
                    token = law.draw(weights)
                else:
                    token = weights.argmax(-1)
                row.append(int(token))
                laws.append(weights)
            rows.append(row)
        q = torch.stack(laws, dim=1) if self.how != "argmax" and len(rows) == 1 and laws else None
        return Proposal(rows, q, [[self.index] * len(row) for row in rows])


@pytest.mark.parametrize("how", ["torch", "law", "argmax"])
def test_drafters_of_the_users_own(target: PreTrainedModel, how: str) -> None:
    """Whatever they draw with, the text stays; and where they draw as plain generation does, with its own noise."""
    options = {"top_k": 0, "max_new_tokens": 30}
    found = check(target, [Own(noisy(target, 0.0), how)], 17, **options, **prompts(1))
    if how != "argmax":
        assert found.levels[0].accepted == found.levels[0].drafted
    middle = noisy(target, 0.03)
    assert check(target, [middle, Own(middle, how)], 18, **options, **prompts(1)).levels[0].accepted > 0
    check(target, [Own(noisy(target, 0.03), "argmax")], 19, **prompts(3), **ENDS)


def test_the_online_control_leaves_the_text_alone(target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels and sizes chosen by a coin each round: which clock ran changes nothing."""
    from hf_polyspec.control import led

    monkeypatch.setattr(led, "OnlineControl", CoinFlips)
    for levels in ([noisy(target, 0.03), noisy(target, 0.05)], [noisy(target, 0.03), SuffixDrafter()]):
        for batch in (1, 3):
            found = check(target, levels, 20, {"polyspec_control": "online"}, **prompts(batch), max_new_tokens=40)
            assert len({decision.levels for decision in found.decisions}) > 2


def test_the_default_is_this_rule(target: PreTrainedModel) -> None:
    """And the others stay what they were: another text, or the same generator read in another way."""
    plain, _ = sampled(target, 21, **prompts(1))
    for rule, same in (("auto", True), ("coupled", True), ("token", False), ("block", False)):
        levels = below(target, 0.03)
        ours, _ = sampled(target, 21, assistant_models=levels, polyspec_verification=rule, **prompts(1))
        assert torch.equal(plain.sequences, ours.sequences) is same
        assert ours.polyspec.seed_holds is (True if same else None)
    greedy, _ = sampled(
        target, 21, assistant_models=below(target, 0.03), **{**CHANCES, "do_sample": False}, **prompts(1)
    )
    assert greedy.polyspec.seed_holds is None
