# SPDX-License-Identifier: Apache-2.0
"""The planner's choice as one of the methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_polyspec.bench.cast import Ask, CastRequest, load_cast
from hf_polyspec.bench.methods import PLAIN, PLANNED, Method
from hf_polyspec.generation.plan import Plan, mark_of


@pytest.mark.parametrize(("chosen", "levels"), [((0,), ["target", "small"]), ((0, 1), ["target", "small", "suffix"])])
def test_planned_runs_what_the_plan_chose(
    bench_models: dict[str, str], tmp_path: Path, chosen: tuple[int, ...], levels: list[str]
) -> None:
    assistants = (("small", bench_models["small"]), ("suffix", "suffix"))
    bare = load_cast(CastRequest(bench_models["target"], assistants))
    marks = tuple(mark_of(one, name) for name, one in bare.assistants.items())
    plan = Plan("test", "test", mark_of(bare.target, "target"), marks, 0.0, 8, chosen, {}, 2.0, 1.0)
    plan.save(tmp_path / "plan.json")
    request = CastRequest(bench_models["target"], assistants, plan=str(tmp_path / "plan.json"))
    prompts, ask = [[5, 6, 7, 8]], Ask(8, 0.0, 0)
    for dtype in (None, "float32"):
        cast = load_cast(request, dtype)
        outcome = cast.answer(Method(PLANNED), prompts, ask)
        assert [level["name"] for level in outcome.levels] == levels
        assert outcome.rows == cast.answer(Method(PLAIN), prompts, ask).rows
