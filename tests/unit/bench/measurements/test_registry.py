# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure`: every measurement by its name, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

import hf_polyspec
from hf_polyspec.bench.measurements.registry import MEASUREMENTS, load_measurement
from hf_polyspec.cli import app


def test_every_module_of_the_room_that_measures_has_a_name() -> None:
    room = Path(hf_polyspec.__file__).parent / "bench" / "measurements"
    measuring = {path.stem for path in room.glob("*.py") if "\ndef main(" in path.read_text()}
    assert measuring == {one.module.rsplit(".", 1)[1] for one in MEASUREMENTS.values()} - {"paper_tables"}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_each_loads_and_takes_no_nonsense(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_measurement(name) is load_measurement(name.replace("-", "_"))
    with pytest.raises(SystemExit) as ended:
        app(["measure", name, "--no-such-option"])
    assert ended.value.code == 2
    assert name in capsys.readouterr().err, "the sentence comes from the measurement itself"


@pytest.mark.parametrize("name", ["planner-accuracy", "head-acceptance", "same-seed", "checks"])
def test_where_levels_are_named_auto_is_none(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["measure", name, "--assistant", "auto"])
    assert ended.value.code == 2
    assert "--assistant: the assistant 'auto' chooses levels by itself" in capsys.readouterr().err


def test_an_unknown_name_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["measure", "worst"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "'worst'" in said
    assert all(name in said for name in MEASUREMENTS)


def test_without_a_name_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["measure"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(f"{name} " in said and one.help in said for name, one in MEASUREMENTS.items())
