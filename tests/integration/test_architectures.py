# SPDX-License-Identifier: Apache-2.0
"""Greedy equality, token for token in float32, for every architecture of the table; the others generate alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import ARCHITECTURES, UNCHECKED, Architecture, Unchecked
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


@pytest.mark.parametrize("case", UNCHECKED, ids=[case.title for case in UNCHECKED])
def test_no_assistants_and_alone_as_targets(enabled: None, target, case: Unchecked) -> None:
    """Refused as an assistant, before any forward pass; as a target, plain generation's text and a warning."""
    model = tiny(case.model_type, attention="eager", **case.settings)
    call = {**prompts(2), "max_new_tokens": 6, "do_sample": False}
    passes: list[int] = []
    watched = [each.register_forward_pre_hook(lambda *_: passes.append(1)) for each in (model, target)]
    with pytest.raises(ValueError, match=type(model).__name__) as caught:
        target.generate(**call, assistant_models=[model])
    assert case.words in str(caught.value)
    assert not passes
    for each in watched:
        each.remove()
    with pytest.warns(UserWarning, match=case.words):
        got = model.generate(**call, assistant_models=[target])
    assert got.tolist() == model.generate(**call).tolist()


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
