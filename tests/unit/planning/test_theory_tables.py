# SPDX-License-Identifier: Apache-2.0
"""The paper's Table 1 reproduced, and docs/theory.md held to what the package computes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_polyspec.planning import theory
from hf_polyspec.planning.theory import paper_tables as tables

PAGE = Path(__file__).parents[3] / "docs" / "theory.md"
VICUNA_1B, COMPLIANT, FLAN = tables.TABLE_1


@pytest.mark.parametrize(
    ("row", "left", "right", "holds"),
    [(VICUNA_1B, 0.800, -0.1157, False), (COMPLIANT, 0.318, 0.3300, True), (FLAN, 0.403, 0.4617, True)],
)
def test_c1_of_table_1(row: tables.PaperInsertion, left: float, right: float, holds: bool) -> None:
    c1 = theory.condition_c1(row.insertion)
    assert c1.left == pytest.approx(left, abs=5e-4)
    assert c1.right == pytest.approx(right, abs=5e-5)
    assert c1.holds is holds
    # The size agrees with what is printed; the sign of the first row does not.
    assert abs(c1.right) == pytest.approx(row.printed_right, abs=2e-3)
    assert (c1.right > 0) is holds


@pytest.mark.parametrize(("row", "after"), [(VICUNA_1B, 1.54), (COMPLIANT, 2.70)])
def test_lemma_31_on_table_1_misses_the_measured_speed_up(row: tables.PaperInsertion, after: float) -> None:
    beta = tables.beta_of(row)
    assert beta == pytest.approx(3.65, abs=0.005)
    predicted = tables.predicted_speed_ups(row, beta)
    assert predicted == pytest.approx((row.speed_up_before, after), abs=0.005)
    assert abs(predicted[1] / row.speed_up_after - 1) > 0.2


def test_cs_drafting_row_exceeds_its_own_length() -> None:
    assert tables.beta_of(FLAN) < 0
    assert FLAN.speed_up_before > FLAN.insertion.length_before
    assert FLAN.speed_up_after > FLAN.insertion.length_above
    assert tables.predicted_speed_ups(FLAN, 0.0) == pytest.approx((2.28, 2.39), abs=0.005)


def test_c2_of_table_1() -> None:
    assert theory.smallest_beta_for_c2(VICUNA_1B.insertion) == float("inf")
    assert theory.smallest_beta_for_c2(COMPLIANT.insertion) == pytest.approx(23.0, abs=0.05)
    assert not theory.condition_c2(COMPLIANT.insertion, tables.beta_of(COMPLIANT)).holds


def test_verdict_of_the_compliant_case_hangs_on_one_percent() -> None:
    edge = theory.critical_length_before(COMPLIANT.insertion)
    assert edge / COMPLIANT.insertion.length_before == pytest.approx(1.011, abs=5e-4)


def test_both_lengths_of_the_same_system() -> None:
    numbers, beta = COMPLIANT.insertion, tables.beta_of(COMPLIANT)
    times = (numbers.time_above, numbers.time_new, numbers.time_below)
    length = tables.TABLES_2_AND_3[0].chain_length
    assert 22 / theory.lemma_time_per_token(times, (length, 4.67), beta) == pytest.approx(3.21, abs=0.005)
    best_case = theory.exact_time_per_token(times, (length, 4.67), (length - 1,), beta)
    assert 22 / best_case == pytest.approx(3.45, abs=0.005)
    assert 22 / best_case < COMPLIANT.speed_up_after


def test_agreement_the_measured_length_needs() -> None:
    length = tables.TABLES_2_AND_3[0].chain_length
    needed = [theory.agreement_for_length(length, block) for block in (10, 12, 16)]
    assert needed == pytest.approx([0.978, 0.953, 0.926], abs=5e-4)


def test_page_holds_exactly_these_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    made = tables.paper_tables()
    places = [page.find(f"\n\n{text}") for text in made.values()]
    missing = [name for name, place in zip(made, places, strict=True) if place < 0]
    assert not missing, f"run polyspec measure paper-tables and paste {missing}"
    assert places == sorted(places)
    # Any other table on the page would be numbers nobody checks; the summary is words.
    rest = page
    for text in made.values():
        rest = rest.replace(text, "", 1)
    left_over = [line for line in rest.splitlines() if line.startswith("|")]
    assert not any(re.search(r"\d\.\d\d|\d %", line) for line in left_over)


def test_page_names_only_functions_that_exist() -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", page))
    assert len(names) > 15
    assert not {name for name in names if not hasattr(theory, name)}


def test_module_prints_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    tables.main()
    printed = capsys.readouterr().out
    assert printed == "".join(f"{name}\n\n{text}\n\n" for name, text in tables.paper_tables().items())
