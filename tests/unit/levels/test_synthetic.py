# SPDX-License-Identifier: Apache-2.0
"""The synthetic level: its rate, its time, its marks, and that the text stays the target's."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from tiny_models import prompts
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.levels.synthetic import SyntheticLevel, parse_synthetic
from hf_polyspec.models.assistants import check_assistant_names

NEW = 60
# Two-sided normal quantile: a right level fails a test of its rate with probability 1e-4. The seeds are fixed.
Z = 3.891


def run(target: PreTrainedModel, levels: list[Any], **options: Any) -> Any:
    values = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, **options}
    return hf_polyspec.generate(target, **prompts(1), assistant_models=levels, **values)


@pytest.fixture(scope="module")
def text(target: PreTrainedModel) -> torch.Tensor:
    """`[1, L]`: what plain generation makes of the prompt."""
    return target.generate(**prompts(1), max_new_tokens=NEW, do_sample=False)


def rate(target: PreTrainedModel, text: torch.Tensor, asked: float) -> tuple[float, float]:
    """Accepted over judged tokens in a few texts' worth of rounds, and the half-width of the test."""
    judged = accepted = 0
    for seed in range(3):
        level = SyntheticLevel(asked, texts=text.tolist(), seed=seed)
        stats = run(target, [level], num_assistant_tokens=5).polyspec
        checked = stats.levels[0]
        accepted += checked.accepted
        # The first wrong token of a draft is judged, those after it are not; the text's end cuts drafts short.
        judged += checked.accepted + checked.recovered
    return accepted / judged, Z * math.sqrt(asked * (1 - asked) / judged)


@pytest.mark.parametrize("asked", [0.5, 0.8])
def test_the_rate_is_the_one_asked_for(target: PreTrainedModel, text: torch.Tensor, asked: float) -> None:
    found, margin = rate(target, text, asked)
    assert abs(found - asked) < margin
    # A level that is right thirty points more often is told apart.
    wrong, _ = rate(target, text, min(1.0, asked + 0.3))
    assert abs(wrong - asked) > margin


def test_the_extremes_are_exact_and_the_text_is_the_targets(target: PreTrainedModel, text: torch.Tensor) -> None:
    for asked in (0.0, 0.6, 1.0):
        found = run(target, [SyntheticLevel(asked, texts=text.tolist())], num_assistant_tokens=4)
        assert torch.equal(found.sequences, text)
        level = found.polyspec.levels[0]
        if asked in (0, 1):
            assert level.accepted == asked * level.drafted


def test_every_output_says_that_it_is_synthetic(target: PreTrainedModel) -> None:
    level = SyntheticLevel(0.7, target=target, ahead=30)
    first = run(target, [level], max_new_tokens=12).polyspec
    assert "synthetic 0.7" in str(first.to_dict())
    assert "synthetic" in first._repr_html_()
    assert any("is synthetic" in note for note in first.levels[1].notes)
    assert any("time the next one" in note for note in first.levels[1].notes)
    # The second call finds the text written.
    assert not any(
        "time the next one" in note for note in run(target, [level], max_new_tokens=12).polyspec.levels[1].notes
    )


def test_a_pass_takes_the_time_it_is_told_to(target: PreTrainedModel, text: torch.Tensor) -> None:
    level = SyntheticLevel(1.0, 0.004, texts=text.tolist())
    started = time.perf_counter()
    stats = run(target, [level], max_new_tokens=24, num_assistant_tokens=5).polyspec.levels[1]
    assert 0.004 * stats.forward_passes <= stats.seconds < time.perf_counter() - started
    assert stats.forward_passes == 20


def test_it_stands_below_a_middle_and_without_texts_proposes_nothing(
    target: PreTrainedModel, middle: PreTrainedModel, text: torch.Tensor
) -> None:
    found = run(target, [middle, SyntheticLevel(0.9, target=target, ahead=NEW)], polyspec_block_size=4)
    assert torch.equal(found.sequences, text)
    assert found.polyspec.levels[1].accepted > 0
    silent = run(target, [SyntheticLevel(0.9)], max_new_tokens=8)
    assert torch.equal(silent.sequences, text[:, : silent.sequences.shape[1]])
    assert silent.polyspec.levels[1].drafted == 0


def test_sampling_is_refused_in_one_sentence(target: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="use temperature 0"):
        run(target, [SyntheticLevel(0.9, target=target)], do_sample=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("synthetic:0.8", (0.8, 0.0)), ("synthetic:1:0.002", (1.0, 0.002)), ("suffix", None)],
)
def test_names(name: str, expected: tuple[float, float] | None) -> None:
    level = parse_synthetic(name)
    assert (None if level is None else (level.acceptance, level.seconds_per_pass)) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_synthetic("synthetic:"), "write synthetic:RATE"),
        (lambda: parse_synthetic("synthetic:0.8:1:2"), "write synthetic:RATE"),
        (lambda: parse_synthetic("synthetic:1.8"), "from 0 to 1"),
        (lambda: SyntheticLevel(0.5, -1.0), "seconds_per_pass"),
        (lambda: SyntheticLevel(0.5, draft_tokens=0), "draft_tokens"),
        (lambda: check_assistant_names(["synthetic:0.5", "suffix"]), "only drafts"),
    ],
)
def test_nonsense_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
