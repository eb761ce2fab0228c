# SPDX-License-Identifier: Apache-2.0
"""Plans as files and as an argument of generate(): round trips, refusals, and that they do what they say."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import prompts, tiny
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.generation.plan import fingerprint, mark_of
from hf_polyspec.integers.linear import QuantizedLinear
from hf_polyspec.levels.suffix import SuffixDrafter
from hf_polyspec.planning import Plan
from hf_polyspec.quantization import quantize_model

MakePlan = Callable[..., Plan]


@pytest.fixture
def make(target: PreTrainedModel, middle: PreTrainedModel) -> MakePlan:
    """`make(chosen, **options)`: a plan for the tiny target with a middle and a suffix drafter."""

    def call(chosen: tuple[int, ...] = (0, 1), **options: int) -> Plan:
        return Plan(
            made_by="hf_polyspec",
            machine="here",
            target=mark_of(target, "target"),
            assistants=(mark_of(middle, "middle"), mark_of(SuffixDrafter(), "suffix")),
            temperature=0.0,
            new_tokens=16,
            chosen=chosen,
            options=options,
            tokens_per_second=20.0,
            plain_tokens_per_second=10.0,
        )

    return call


def run(target: PreTrainedModel, **options: Any) -> Any:
    return hf_polyspec.generate(
        target, **prompts(1), max_new_tokens=16, do_sample=False, return_dict_in_generate=True, **options
    )


def test_a_plan_survives_its_file(make: MakePlan, tmp_path: Path) -> None:
    plan = make(polyspec_block_size=3, num_assistant_tokens=4)
    file = tmp_path / "plan.json"
    plan.save(file)
    assert Plan.load(file) == plan
    assert Plan.read(str(file)) == Plan.read(plan.to_dict()) == Plan.read(plan) == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_of_a_packed_target_asks_for_one(
    make: MakePlan, target: PreTrainedModel, middle: PreTrainedModel
) -> None:
    levels = [middle, SuffixDrafter()]
    plan = replace(make(), packed=True)
    with pytest.warns(UserWarning, match=r"hf_polyspec.pack\(model\)"):
        plan.apply(target, levels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().apply(target, levels)
        hf_polyspec.pack(target)
        try:
            plan.apply(target, levels)
            make().apply(target, levels)
        finally:
            hf_polyspec.unpack(target)
    # Plans of before packing was recorded stay plans.
    values = make().to_dict()
    del values["packed"]
    assert Plan.from_dict(values) == make()


def test_generate_takes_a_path_a_dict_or_a_plan(
    make: MakePlan, tmp_path: Path, target: PreTrainedModel, middle: PreTrainedModel
) -> None:
    plan = make(polyspec_block_size=3, num_assistant_tokens=4)
    plan.save(tmp_path / "plan.json")
    levels = [middle, SuffixDrafter()]
    expected = run(target, assistant_models=levels, polyspec_block_size=3, num_assistant_tokens=4)
    for given in (tmp_path / "plan.json", plan.to_dict(), plan):
        found = run(target, assistant_models=levels, polyspec_plan=given)
        assert torch.equal(found.sequences, expected.sequences)
        assert [level.rounds for level in found.polyspec.levels] == [level.rounds for level in expected.polyspec.levels]
    # An option that is passed wins over the plan's.
    wider = run(target, assistant_models=levels, polyspec_plan=plan, polyspec_block_size=9)
    assert wider.polyspec.levels[0].rounds < expected.polyspec.levels[0].rounds


def test_a_plan_uses_only_what_it_chose(make: MakePlan, target: PreTrainedModel, middle: PreTrainedModel) -> None:
    levels = [middle, SuffixDrafter()]
    found = run(target, assistant_models=levels, polyspec_plan=make((1,), num_assistant_tokens=4))
    assert [level.name for level in found.polyspec.levels[1:]] == ["suffix"]
    plain = run(target, assistant_models=levels, polyspec_plan=make(()))
    assert not hasattr(plain, "polyspec")
    assert torch.equal(plain.sequences, found.sequences)
    inner = target.generate(
        **prompts(1),
        max_new_tokens=16,
        do_sample=False,
        custom_generate=hf_polyspec.decode,
        assistant_models=levels,
        polyspec_plan=make(()),
    )
    assert torch.equal(inner, found.sequences)


def test_foreign_models_are_refused_in_one_sentence(
    make: MakePlan, target: PreTrainedModel, middle: PreTrainedModel
) -> None:
    plan = make()
    other = tiny("llama", hidden_size=16, num_attention_heads=2)
    with pytest.raises(ValueError, match="made for another model: the target was target"):
        run(other, assistant_models=[middle, SuffixDrafter()], polyspec_plan=plan)
    with pytest.raises(ValueError, match=r"assistant_models\[0\] was middle"):
        run(target, assistant_models=[other, SuffixDrafter()], polyspec_plan=plan)
    with pytest.raises(ValueError, match=r"assistant_models\[1\] was suffix"):
        run(target, assistant_models=[middle, SuffixDrafter(min_match=3)], polyspec_plan=plan)
    with pytest.raises(ValueError, match="for 2 assistants"):
        run(target, assistant_models=[middle], polyspec_plan=plan)
    lower = tiny("llama").to(torch.bfloat16)
    with pytest.raises(ValueError, match="the target was target"):
        plan.apply(lower, [middle, SuffixDrafter()])


def test_a_quantised_member_is_recognised_without_writing_its_checkpoint(
    target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = [fingerprint(quantize_model(target, bits, group)) for bits, group in ((8, 128), (4, 32), (4, 16))]
    assert len(set(marks)) == 3
    again = quantize_model(target, 4, 32)
    # Packing all integers takes a second for a small model, and generate() asks every time.
    monkeypatch.setattr(QuantizedLinear, "state_tensors", None)
    assert fingerprint(again) == marks[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown field 'colour'"),
        ({"format": 2}, "format 2"),
        ({"chosen": [2]}, r"chooses assistants \[2\]"),
        ({"chosen": [1, 0]}, "rising"),
        ({"options": {"temperature": 2}}, "sets 'temperature'"),
        ({"options": {"polyspec_block_size": 0}}, "polyspec_block_size"),
        ({"temperature": "hot"}, "temperature of the plan"),
        ({"target": {"title": "x"}}, "form of one"),
        ({"assistants": 3}, "form of one"),
    ],
)
def test_what_is_no_plan_is_refused(make: MakePlan, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_dict({**json.loads(json.dumps(make().to_dict())), **change})


def test_files_that_hold_no_plan(make: MakePlan, tmp_path: Path, target: PreTrainedModel) -> None:
    values = make().to_dict()
    del values["machine"]
    with pytest.raises(ValueError, match="lacks the field 'machine'"):
        Plan.from_dict(values)
    with pytest.raises(ValueError, match="there is no plan at"):
        Plan.load(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(ValueError, match="holds no JSON"):
        Plan.load(tmp_path / "text.json")
    with pytest.raises(TypeError, match="a path, a dict or a Plan, got int"):
        run(target, assistant_models=[SuffixDrafter()], polyspec_plan=3)


def test_a_synthetic_level_marks_the_plan(make: MakePlan) -> None:
    plan = make()
    assert plan.to_dict()["synthetic"] is False
    fake = replace(plan, assistants=(plan.assistants[0], replace(plan.assistants[1], synthetic=True)))
    assert fake.to_dict()["synthetic"] is True
    assert Plan.from_dict(fake.to_dict()) == fake
