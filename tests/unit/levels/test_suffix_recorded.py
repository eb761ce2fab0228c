# SPDX-License-Identifier: Apache-2.0
"""Against transformers' prompt lookup, on recorded greedy continuations of a real model.

data/greedy_continuations.json: token ids of twelve chat prompts (rewriting, code, summary, table, question
about a text, a story, JSON, spelling, explanations) and of what SmolLM2-135M-Instruct in float32 answers
greedily. Greedy verification of a draft is a comparison with those ids, so no model is needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.candidate_generator import CandidateGeneratorDrafter
from hf_polyspec.levels.suffix import SuffixDrafter

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "greedy_continuations.json").read_text())
EOS, VOCABULARY = 2, 49152
CPU, GPU = (LawMaker([], False, torch.device(name)) for name in ("cpu", "cuda"))  # nothing is computed there


@dataclass
class Count:
    accepted: int = 0
    drafted: int = 0
    passes: int = 0


def play(drafter: Drafter, prompt: list[int], output: list[int], count: Count, law: LawMaker = CPU) -> None:
    """Decode a recorded continuation greedily with a drafter below, for a target whose laws are on a device."""
    ids, done = prompt + output, len(prompt)
    asked = Prompt(done, None, torch.arange(done)[None])
    drafter.begin(1, 1, VOCABULARY)
    while done < len(ids):
        draft = drafter.propose(Context([ids[:done]], asked), [len(ids) - done - 1], law).tokens[0]
        kept = 0
        while kept < len(draft) and draft[kept] == ids[done + kept]:
            kept += 1
        drafter.observe([len(draft)], [kept])
        count.accepted += kept
        count.drafted += len(draft)
        count.passes += 1
        done += kept + 1


def prompt_lookup(length: int, tokens: int = 10, ngram: int = 2) -> Drafter:
    """As transformers sets it up; by default with its default settings."""
    return CandidateGeneratorDrafter(
        PromptLookupCandidateGenerator(
            eos_token_id=torch.tensor([EOS]),
            num_output_tokens=tokens,
            max_matching_ngram_size=ngram,
            max_length=length,
        )
    )


def suffixes(law: LawMaker) -> Count:
    count = Count()
    for one in RECORDED:
        play(SuffixDrafter(eos=[EOS]), one["prompt"], one["output"], count, law)
    return count


@pytest.fixture(scope="module")
def suffix() -> Count:
    """By default, where a pass over more tokens takes hardly longer: prompt lookup drafts as if it always were so."""
    return suffixes(GPU)


def looked_up(**settings: int) -> Count:
    count = Count()
    for one in RECORDED:
        play(
            prompt_lookup(len(one["prompt"]) + len(one["output"]), **settings),
            one["prompt"],
            one["output"],
            count,
        )
    return count


def test_accepts_more_in_fewer_passes_than_prompt_lookup_and_wastes_less(suffix: Count) -> None:
    other = looked_up()
    assert suffix.accepted > other.accepted
    assert suffix.passes < other.passes
    assert suffix.drafted < 0.85 * other.drafted


@pytest.mark.parametrize(("tokens", "ngram"), [(5, 2), (10, 1), (10, 3), (20, 2)])
def test_other_settings_do_not_save_prompt_lookup(suffix: Count, tokens: int, ngram: int) -> None:
    assert suffix.accepted > looked_up(tokens=tokens, ngram=ngram).accepted


def test_on_a_cpu_a_quarter_of_the_drafts_brings_nine_tenths_of_the_tokens() -> None:
    found, other = suffixes(CPU), looked_up()
    assert found.accepted > 0.9 * other.accepted
    assert found.drafted < 0.3 * other.drafted


def test_every_emitted_token_is_counted_once(suffix: Count) -> None:
    assert suffix.accepted + suffix.passes == sum(len(one["output"]) for one in RECORDED)
