# SPDX-License-Identifier: Apache-2.0
"""What the level above foresaw of a prompt while it read it, mixed into a head's guesses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, accepted_greedily, head_for, in_circles, noisy, prompts, tiny
from transformers import PreTrainedModel

from hf_polyspec.eagle import EagleHead
from hf_polyspec.levels.draft_memory import DraftMemory
from hf_polyspec.levels.draft_vocabulary import WorkingVocabulary
from hf_polyspec.levels.foreseen import WEIGHTS, ForeseenPointer

CPU = torch.device("cpu")
SIZE = 20


def borrowing(model: PreTrainedModel, algorithm: str = "eagle3") -> EagleHead:
    """A head that scores all of the model's ids by its lm_head."""
    return head_for(model, algorithm, draft_vocab_size=None, own_lm_head=False)


def test_only_what_was_foreseen_is_suggested_and_the_longest_match_counts() -> None:
    pointer = ForeseenPointer()
    #              after 1  2  3  4  1  7  3
    pointer.learn([1, 2, 3, 4, 1, 7, 3, 10], [2, 9, 4, 9, 7, 9, 9, 9])
    assert pointer.suggestion((1,)) == (WEIGHTS[0], (7,), (1.0,))  # the later one
    assert pointer.suggestion((5, 2, 3)) == (WEIGHTS[1], (4,), (1.0,))
    assert pointer.suggestion((1, 2, 3)) == (WEIGHTS[2], (4,), (1.0,))
    assert pointer.suggestion((7, 3)) == (WEIGHTS[0], (4,), (1.0,))
    assert pointer.suggestion((3, 4)) is None
    pointer.follow([8, 1, 2, 3])
    assert pointer.root() == (1, 2, 3)
    assert pointer.step(pointer.root(), 4) == (2, 3, 4)
    assert 0 < WEIGHTS[0] < WEIGHTS[1] < WEIGHTS[2] < 1


def test_rows_go_on_with_what_they_know() -> None:
    memory = DraftMemory()
    memory.begin(2)
    memory.foreseen[1].learn([4, 5], [5, 0])
    memory.keep_rows([1, 1])
    memory.foreseen[0].learn([6, 7], [7, 0])
    assert [pointer.suggestion((6,)) is None for pointer in memory.foreseen] == [False, True]
    assert all(pointer.suggestion((4,)) is not None for pointer in memory.foreseen)
    memory.begin(1)
    assert memory.foreseen[0].suggestion((4,)) is None


def test_the_likeliest_id_is_the_lm_heads_among_those_scored() -> None:
    target = tiny()
    head = borrowing(target).bind(target.get_input_embeddings(), target.get_output_embeddings())
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(7))
    working = WorkingVocabulary(head, VOCABULARY, CPU, SIZE)
    ids = working.target_ids
    expected = ids[target.get_output_embeddings()(states)[..., ids].argmax(-1)]
    assert torch.equal(working.likeliest(states), expected)  # type: ignore[arg-type]
    assert WorkingVocabulary(head, VOCABULARY, CPU, VOCABULARY).likeliest(states) is None
    own = head_for(target, own_lm_head=True)
    own.bind(target.get_input_embeddings(), target.get_output_embeddings())
    assert WorkingVocabulary(own, VOCABULARY, CPU, SIZE).likeliest(states) is None


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("trees", [0, 8])
@pytest.mark.parametrize("algorithm", ["eagle1", "eagle3"])
@pytest.mark.parametrize(("batch", "middles", "chunk"), [(1, 0, None), (3, 1, None), (3, 0, 4)])
def test_what_is_learned_is_what_the_level_above_held_likeliest(
    trees: int, algorithm: str, batch: int, middles: int, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[int, tuple[list[int], list[int]]] = {}
    scored: list[torch.Tensor] = []
    learn, likeliest = ForeseenPointer.learn, WorkingVocabulary.likeliest

    def learning(self: ForeseenPointer, ids: Sequence[int], best: Sequence[int]) -> None:
        told[id(self)] = list(ids), list(best)
        learn(self, ids, best)

    def looking(self: WorkingVocabulary, final: torch.Tensor) -> torch.Tensor | None:
        scored[:] = [self.target_ids]
        return likeliest(self, final)

    monkeypatch.setattr(ForeseenPointer, "learn", learning)
    monkeypatch.setattr(WorkingVocabulary, "likeliest", looking)
    target = tiny(num_hidden_layers=7)
    levels: list[Any] = [noisy(target)] * middles
    above = [target, *levels][-1]
    inputs = prompts(batch)
    target.generate(
        **inputs, max_new_tokens=6, do_sample=False, assistant_models=[*levels, borrowing(above, algorithm)],
        polyspec_tree_tokens=trees, polyspec_draft_vocabulary=SIZE, prefill_chunk_size=chunk,
    )  # fmt: skip
    assert len(told) == batch
    for row, mask, (ids, best) in zip(inputs["input_ids"], inputs["attention_mask"], told.values(), strict=True):
        text = row[mask.bool()].tolist()
        # a prompt in parts is drafted from before its last id is read
        assert ids == (text if chunk is None else text[:-1])
        laws = above(torch.tensor([ids])).logits[0][:, scored[0]]
        assert best == scored[0][laws.argmax(-1)].tolist()


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("trees", [0, 8])
def test_what_was_foreseen_is_guessed(trees: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("copying.CopyPointer", "recycling.RecyclePointer"):
        monkeypatch.setattr(f"hf_polyspec.levels.{other}.suggestion", lambda *_: None)
    target = in_circles(tiny())
    written = target.generate(**prompts(1), max_new_tokens=40, do_sample=False)
    inputs = {"input_ids": written, "attention_mask": torch.ones_like(written)}
    options = {"polyspec_tree_tokens": trees, "polyspec_draft_vocabulary": SIZE}
    helped, alone = (
        accepted_greedily(target, [borrowing(target)], inputs, polyspec_draft_copies=copies, **options)
        for copies in (True, False)
    )
    assert helped > alone + 10
