# SPDX-License-Identifier: Apache-2.0
"""Acceptance by position, against drafting from every row of every text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from hf_polyspec.eagle.features import target_parts
from hf_polyspec.eagle.fresh import init_for
from hf_polyspec.eagle.training.dataset import TargetReader, collate, load_corpus
from hf_polyspec.eagle.training.shards import GREEDY, SAMPLED
from hf_polyspec.eagle.training.validation import Acceptance, count_acceptance, passes_over

STEPS, RANKS = 3, (1, 2, 5)


@pytest.mark.parametrize("sliced", [False, True])
@torch.no_grad()
def test_counts_equal_drafting_from_every_row(chat_target: PreTrainedModel, texts_folder: Path, sliced: bool) -> None:
    torch.manual_seed(0)
    head = init_for(chat_target, "eagle3", list(range(0, 45, 2)) if sliced else None).eval()
    corpus = load_corpus([texts_folder], 64, 0.2, seed=0)
    batch = collate(corpus.train)
    view = TargetReader(chat_target, head.config, target_parts(chat_target)).read(batch)
    found = count_acceptance(head, batch, view, STEPS, RANKS)
    expected = {kind: Acceptance(STEPS, RANKS) for kind in (GREEDY, SAMPLED)}
    for place, text in enumerate(batch.texts):
        tally = expected[text.kind]
        ids = torch.from_numpy(text.tokens)[None]
        known = text.prompt_length + 1
        for row in range(text.prompt_length - 1, len(text) - 2):
            cache = head.new_cache()
            fused = head.fuse(view.features[place : place + 1, : row + 1])
            hidden = head.step(ids[:, 1 : row + 2], fused, cache=cache)[:, -1:]
            alive = True
            # the target has just given the last known token: decoding drafts from here
            tally.passes += (drafting := row + 2 == known)
            known += drafting
            for step in range(min(STEPS, len(text) - 2 - row)):
                if step:
                    position = torch.tensor([[row + step]])
                    hidden = head.step(ids[:, row + 1 + step, None], hidden, position, cache=cache)
                guesses = head.draft_to_target(head.logits(hidden)[0, 0].topk(5).indices).tolist()
                truth = int(text.tokens[row + 2 + step])
                hit = truth == guesses[0]
                tally.rows[step] += 1
                tally.alive[step] += alive
                tally.survived[step] += alive and hit
                for index, rank in enumerate(RANKS):
                    tally.hits[step][index] += truth in guesses[:rank]
                alive = alive and hit
                known += drafting and alive
    assert found == expected
    assert all(tally.rows[0] > 10 for tally in expected.values())
    assert sum(tally.survived[0] for tally in expected.values()) > 0
    # some pass emits more than one token, or the walk would be as long as the answers
    assert any(tally.passes < tally.rows[0] for tally in expected.values())


def test_rates() -> None:
    tally = Acceptance(2, (1, 2), 4, rows=[10, 8], hits=[[5, 7], [2, 6]], alive=[10, 4], survived=[5, 1])
    assert tally.chain == [0.5, 0.25]
    assert tally.mean_length == 2.5
    assert tally.top(1) == [0.7, 0.75]
    assert Acceptance.from_counts(tally.counts(), (1, 2)) == tally
    tally.add(Acceptance.from_counts(tally.counts(), (1, 2)))
    assert (tally.rows, tally.hits) == ([20, 16], [[10, 14], [4, 12]])
    assert (tally.passes, tally.mean_length) == (8, 2.5)
    assert Acceptance(2).chain == [0.0, 0.0]
    assert Acceptance(2).mean_length == 1.0


def test_passes_that_decode_an_answer() -> None:
    # the prompt is one token; the pass after it emits 1 + 2, the next 1, the last 1 + 1
    assert passes_over([2, 5, 5, 0, 1, 0, 0], 1, 7) == 3
    # an easy stretch is passed over once, however many places it has: 7 tokens in 4 passes, 1.75 each, while the mean
    # over all places is 1 + 6 / 7
    assert passes_over([3, 2, 1, 0, 0, 0, 0], 1, 8) == 4
    assert passes_over([], 1, 1) == 0
