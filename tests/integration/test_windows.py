# SPDX-License-Identifier: Apache-2.0
"""A dialogue's second turn from the cache of the first, whose windows have let the beginning go.

Rows accept different numbers of tokens and end at different places, so slower ones would have to go back to where the
windows' columns are gone; every architecture with windows, and every way to draft.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from tiny_models import VOCABULARY, head_for, noisy, prompts, tiny
from transformers import PreTrainedModel
from watched_passes import watched_passes

from hf_polyspec.host.release import GENERATION_CACHE, cache_of
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.levels.suffix import SuffixDrafter

WINDOWS = [case for case in ARCHITECTURES if any(word in case.remark for word in ("sliding", "chunked", "local"))]
CHAINS: dict[str, Any] = {
    "suffix": lambda model: [SuffixDrafter(min_match=1)],
    "two models": lambda model: [noisy(model, 0.02), noisy(model, 0.05, seed=2)],
    "a copy in 8 bits": lambda model: ["int8", SuffixDrafter(min_match=1)],
}


@lru_cache(maxsize=2)
def built(title: str) -> PreTrainedModel:
    case = next(case for case in WINDOWS if case.title == title)
    return tiny(case.model_type, attention=case.attention[0], **case.settings)


def turn(model: PreTrainedModel, rows: int, seed: int, **options: Any) -> tuple[dict[str, Any], Any]:
    """Arguments of a second turn, and the cache of the first."""
    prompt = prompts(rows, 13, seed=seed)
    first = model.generate(**prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    more = torch.randint(3, VOCABULARY, (rows, 2), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([first.sequences, more], dim=1)
    mask = torch.cat([prompt["attention_mask"], torch.ones(rows, 8, dtype=torch.long)], dim=1)
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 20, "do_sample": False, **options}, first


def compared(model: PreTrainedModel, arguments: dict[str, Any], held: Any, chain: list[Any], **options: Any) -> Any:
    caches = [copy.deepcopy(held) for _ in range(3)]
    plain = model.generate(**arguments, **{GENERATION_CACHE: caches[0]})
    ours = model.generate(**arguments, **{GENERATION_CACHE: caches[1]}, assistant_models=chain, **options)
    assert ours.tolist() == plain.tolist()
    for mine, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        if mine.keys is not None:
            assert mine.get_seq_length() == theirs.get_seq_length()
            assert mine.keys.shape == theirs.keys.shape
    return plain


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: case.model_type)
def test_rows_that_advance_unequally(enabled, case, chain):
    model = built(case.title)
    if chain == "a copy in 8 bits" and case.model_type not in ("mistral", "gemma3_text", "phi3"):
        chain = "two models"
    levels = CHAINS[chain](model)
    for seed in range(3):
        arguments, first = turn(model, 3, seed)
        plain = compared(model, arguments, cache_of(first), levels, num_assistant_tokens=4, polyspec_block_size=6)
        ends = [int(plain[row, -20 + place]) for row, place in ((0, 3), (2, 11))]
        ending = {**arguments, "eos_token_id": ends, "pad_token_id": 0}
        compared(model, ending, cache_of(first), levels, num_assistant_tokens=4, polyspec_block_size=6)


@pytest.mark.parametrize("window", [2, 3, 4])
def test_windows_smaller_than_the_draft(enabled, window):
    model = tiny("mistral", sliding_window=window)
    for seed in range(4):
        arguments, first = turn(model, 3, seed)
        levels = [noisy(model, 0.03, seed=seed)]
        compared(model, arguments, cache_of(first), levels, num_assistant_tokens=9, polyspec_block_size=9)


@pytest.mark.parametrize("rows", [1, 3])
def test_trees(enabled, rows):
    """The nodes of rows with smaller trees stand behind the floor too."""
    model = tiny("mistral", sliding_window=6)
    head = head_for(model)
    grown = []

    def look(_runner: ModelRunner, tree: Any) -> None:
        grown.append([len(nodes) for nodes in tree])

    with watched_trees(look):
        for seed in range(4):
            arguments, first = turn(model, rows, seed)
            compared(model, arguments, cache_of(first), [head], polyspec_tree_tokens=6, polyspec_tree_depth=3)
            plain = compared(model, arguments, cache_of(first), [head, SuffixDrafter(min_match=1)])
            ending = {**arguments, "eos_token_id": int(plain[0, -15]), "pad_token_id": 0}
            compared(model, ending, cache_of(first), [head], polyspec_tree_tokens=6, polyspec_tree_depth=3)
    assert grown
    if rows > 1:
        assert any(len(set(sizes)) > 1 for sizes in grown), "rows without a tree beside others"


def watched_trees(look: Any) -> Any:
    from unittest import mock

    original = ModelRunner.run_tree

    def run_tree(self: ModelRunner, context: Any, tree: Any, stats: Any) -> Any:
        look(self, tree.tokens)
        return original(self, context, tree, stats)

    return mock.patch.object(ModelRunner, "run_tree", run_tree)


def test_columns_that_were_never_computed_are_never_in_sight(enabled):
    """Whatever the rows do, all keep what the windows' columns are behind of."""
    model = tiny("gemma3_text", num_hidden_layers=3, sliding_window=5, head_dim=8, layer_types=MIXED)
    seen = []

    def look(runner: ModelRunner, *_: Any) -> None:
        if runner.name == "the target":
            assert runner.cache.floor
            assert all(len(ids) >= runner.cache.floor for ids in runner.memo)
            seen.append({len(ids) for ids in runner.memo})

    with watched_passes(look):
        for seed in range(4):
            arguments, first = turn(model, 3, seed)
            compared(model, arguments, cache_of(first), [noisy(model, 0.05)], num_assistant_tokens=5)
    assert any(len(lengths) > 1 for lengths in seen)


MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
