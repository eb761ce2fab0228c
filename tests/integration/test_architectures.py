# SPDX-License-Identifier: Apache-2.0
"""Greedy equality, token for token in float32, for every architecture of the table; refusals for the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import ARCHITECTURES, REFUSED, Architecture, Refused
from tiny_models import noisy, prompts, tiny

from hf_polyspec.bench.measurements.architectures import CRASHED, DIFFERENT, EQUAL, VERDICTS

NEW = 14
CASES = [(case, attention) for case in ARCHITECTURES for attention in case.attention]


@pytest.mark.parametrize(("case", "attention"), CASES, ids=[f"{case.title}-{name}" for case, name in CASES])
def test_greedy_equality(enabled: None, case: Architecture, attention: str) -> None:
    """Batch 1 and a left-padded batch of 3, chains of two and three models."""
    target = tiny(case.model_type, attention=attention, **case.settings)
    middle, drafter = noisy(target, case.noise, seed=1), noisy(target, 1.5 * case.noise, seed=2)
    accepted = drafted = 0
    for batch in (1, 3):
        options = {**prompts(batch), "max_new_tokens": NEW, "do_sample": False}
        plain = target.generate(**options)
        for chain in ([drafter], [middle, drafter]):
            output = target.generate(
                **options,
                assistant_models=chain,
                polyspec_block_size=4,
                num_assistant_tokens=3,
                return_dict_in_generate=True,
            )
            assert output.sequences.tolist() == plain.tolist(), f"batch {batch}, {1 + len(chain)} models"
            accepted += output.polyspec.levels[0].accepted
            drafted += output.polyspec.levels[0].drafted
    assert 0 < accepted < drafted, "with nothing accepted or nothing rejected this test shows nothing"


@pytest.mark.parametrize("case", REFUSED, ids=[case.title for case in REFUSED])
def test_refused_by_name(enabled: None, target, case: Refused) -> None:
    """As target and as assistant, before any forward pass."""
    model = tiny(case.model_type, attention="eager", **case.settings)
    passes: list[int] = []
    for each in (model, target):
        each.register_forward_pre_hook(lambda *_: passes.append(1))
    for main, assistant in ((model, target), (target, model)):
        with pytest.raises(ValueError, match=type(model).__name__) as caught:
            main.generate(**prompts(1), max_new_tokens=4, do_sample=False, assistant_models=[assistant])
        assert case.words in str(caught.value)
    assert not passes
    target._forward_pre_hooks.clear()


def test_the_page_says_of_every_class_what_the_command_found() -> None:
    """Of docs/architectures.md: all classes, none different; what every change is tested with stands in it as equal."""
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    rows = [[cell.strip() for cell in line.split(" | ")] for line in page.splitlines() if line.startswith("| ")]
    verdicts = {row[1].strip("`"): row[2] for row in rows if len(row) >= 5 and row[1].startswith("`")}
    counts = {row[0].strip("| "): int(row[1]) + int(row[2]) for row in rows if row[0].strip("| ") in VERDICTS}
    assert set(counts) == set(VERDICTS)
    assert sum(counts.values()) >= len(verdicts) > 200
    assert not counts[DIFFERENT]
    assert not counts[CRASHED]
    found = [verdicts[case.model_type] for case in ARCHITECTURES if case.model_type in verdicts]  # one type of a class
    assert len(found) > 40
    assert set(found) == {EQUAL}
    assert len({case.model_type for case in ARCHITECTURES}) >= 24
