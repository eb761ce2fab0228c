# SPDX-License-Identifier: Apache-2.0
"""Where a text ends: processors with state hear nothing of what stands behind, and nothing of it is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, head_for, noisy, prompts, tiny
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import hf_polyspec

LENGTH = 9
NEW = 20


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama")


CHAINS: dict[str, Any] = {
    "exact": lambda model: [noisy(model, 0.0)],
    "two exact": lambda model: [noisy(model, 0.0), noisy(model, 0.0)],
    "noisy above suffix": lambda model: [noisy(model), hf_polyspec.SuffixDrafter()],
    "a head": lambda model: [noisy(model, 0.0), head_for(model)],
}


class Listening(LogitsProcessor):
    """Keeps every call, and forbids an id by what it has been told so far."""

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = input_ids.tolist()
        if self.calls:
            assert [row[:-1] for row in rows] == self.calls[-1], "a call was left out, repeated or undone"
        self.calls.append(rows)
        scores = scores.clone()
        for b, row in enumerate(rows):
            scores[b, (sum(row) + len(self.calls)) % VOCABULARY] = float("-inf")
        return scores


class StopsAfter(StoppingCriteria):
    """Ends row b at its own length, and counts how often it is asked."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths
        self.asked: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.asked.append(input_ids.shape[1])
        assert scores is None or len(scores) == input_ids.shape[1] - LENGTH
        return torch.tensor([input_ids.shape[1] - LENGTH >= n for n in self.lengths])


def ending(text: list[list[int]], way: str, place: int) -> dict[str, Any]:
    """What ends a text after `place` tokens, each time anew."""
    if way == "eos":
        return {"eos_token_id": [row[min(place + b, NEW - 1)] for b, row in enumerate(text)]}
    stops = StopsAfter(*(place + 1 + b for b in range(len(text))))
    more = {"eos_token_id": VOCABULARY - 1} if way == "criterion and eos" else {}
    return {"stopping_criteria": StoppingCriteriaList([stops]), **more}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("way", ["eos", "criterion", "criterion and eos"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scores", [False, True])
def test_a_processor_hears_what_it_hears_in_plain_generation(model, name, way, batch, scores):
    """At every place of a block; rows that have ended are continued as plain generation continues them."""
    options = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    options |= {"output_scores": scores, "return_dict_in_generate": True}

    def both(**more: Any) -> tuple[Any, Any]:
        heard = Listening(), Listening()
        stops = more.get("stopping_criteria")
        plain = model.generate(**options, **more, logits_processor=LogitsProcessorList([heard[0]]))
        asked = list(stops[0].asked) if stops else []
        if stops:
            stops[0].asked.clear()
        found = hf_polyspec.generate(
            model,
            **options,
            **more,
            logits_processor=LogitsProcessorList([heard[1]]),
            assistant_models=CHAINS[name](model),
        )
        assert found.sequences.tolist() == plain.sequences.tolist()
        assert heard[1].calls == heard[0].calls
        if stops:
            assert stops[0].asked == asked
        if scores:
            assert len(found.scores) == len(plain.scores)
        return plain, found

    text = both()[0].sequences[:, LENGTH:].tolist()
    for place in range(0, 9, 2 if batch == 1 else 4):
        plain, found = both(**ending(text, way, place))
        if batch == 1:
            top = found.polyspec.levels[0]
            assert top.emitted == plain.sequences.shape[1] - LENGTH


def test_a_grammar_that_has_ended_may_raise_when_it_is_asked_again(model):
    class Ends(Listening):
        """Lets a text end from its third token on, makes it end at the seventh, and cannot be asked afterwards."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            assert not self.calls or int(input_ids[0, -1]) != 5, "the grammar has come to its end"
            scores = super().__call__(input_ids, scores)
            if len(self.calls) >= 7:
                return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([5]), 0.0)
            scores[:, 5] = float("-inf") if len(self.calls) < 3 else scores.max()
            return scores

    options = {**prompts(1), "max_new_tokens": NEW, "eos_token_id": 5}
    for sampled in (False, True):
        torch.manual_seed(4)
        plain = model.generate(**options, do_sample=sampled, logits_processor=LogitsProcessorList([Ends()]))
        for make in CHAINS.values():
            for rule in ("auto", "token"):
                torch.manual_seed(4)
                found = hf_polyspec.generate(
                    model, **options, do_sample=sampled, assistant_models=make(model), polyspec_verification=rule,
                    logits_processor=LogitsProcessorList([Ends()]),
                )  # fmt: skip
                assert int(found[0, -1]) == 5
                assert sampled or found.tolist() == plain.tolist()


def test_levels_below_know_the_grammar_and_say_so_where_they_do_not(model):
    """An assistant that is always right is always accepted, as long as it may not say what is forbidden."""
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}

    def levels(batch: int, processor: LogitsProcessor | None = None, **more: Any) -> Any:
        given = {"logits_processor": LogitsProcessorList([processor])} if processor is not None else {}
        out = hf_polyspec.generate(
            model, **prompts(batch), **options, **given, **more, assistant_models=[noisy(model, 0.0)]
        )
        assert (
            out.sequences.tolist()
            == model.generate(
                **prompts(batch),
                **options,
                **({"logits_processor": LogitsProcessorList([Listening()])} if given else more),
            ).sequences.tolist()
        )
        return out.polyspec.levels

    def third(row: int, ids: torch.Tensor) -> list[int]:
        return [token for token in range(VOCABULARY) if token % 3 == (row + len(ids)) % 3]

    for batch in (1, 3):
        top = levels(batch, prefix_allowed_tokens_fn=third)[0]
        assert top.acceptance_rate == 1.0
        assert not top.notes
    assert levels(1, Listening())[0].acceptance_rate == 1.0
    (note,) = levels(3, Listening())[0].notes
    assert "draft without" in note
    assert "Listening" in note
    assert "rows of a batch run apart" in note


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("tree", [0, 6])
@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_behind_an_end_is_counted(model, name, tree, batch):
    """The target hands up the tokens of the text, wherever in a draft or tree it ends, and however."""
    inputs = prompts(batch)
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "polyspec_tree_tokens": tree}
    text = model.generate(**inputs, do_sample=False, max_new_tokens=NEW)[:, LENGTH:].tolist()
    for way in ("eos", "criterion and eos"):
        for place in range(0, 12, 3):
            ends = ending(text, way, place)
            if way == "eos":
                ids = ends["eos_token_id"]
                lengths = [next((i + 1 for i, t in enumerate(row) if t in ids), NEW) for row in text]
            else:
                lengths = [min(place + 1 + b, NEW) for b in range(batch)]
                cut = [row.index(VOCABULARY - 1) + 1 if VOCABULARY - 1 in row else NEW for row in text]
                lengths = [min(pair) for pair in zip(lengths, cut, strict=True)]
            out = hf_polyspec.generate(
                model, **inputs, **options, **ends, max_new_tokens=NEW, assistant_models=CHAINS[name](model)
            )
            for row, length in zip(out.sequences[:, LENGTH:].tolist(), lengths, strict=True):
                assert not any(row[length:])
            for level in out.polyspec.levels[:-1]:
                assert level.emitted == level.accepted + level.recovered + level.bonus
                assert sum(level.accepted_at) == level.accepted <= level.drafted
                assert sum(level.histogram) == level.rounds
                assert min((*level.accepted_at, *level.drafted_at, *level.histogram, level.bonus), default=0) >= 0
                assert all(a <= d for a, d in zip(level.accepted_at, level.drafted_at, strict=True))
            top = out.polyspec.levels[0]
            assert top.emitted == sum(lengths) == out.polyspec.new_tokens
            if name in ("exact", "two exact") and not tree:
                assert top.acceptance_rate == (1.0 if top.drafted else None)
                assert top.recovered == 0
