# SPDX-License-Identifier: Apache-2.0
"""`polyspec measure architectures`: in pieces, its file of findings, and the page made of it."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import pytest

from hf_polyspec.bench.measurements import architectures
from hf_polyspec.bench.measurements.architectures import EQUAL, Finding, classes, main, page, read
from hf_polyspec.bench.measurements.tiny_models import prompts, tiny_config, tiny_model
from hf_polyspec.bench.measurements.tiny_settings import OWN
from hf_polyspec.host.modeling import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText


def test_parts_are_all_classes_once() -> None:
    everything = classes()
    assert len(everything) > 200
    assert sorted(one for part in range(3) for one in everything[part::3]) == sorted(everything)


def test_findings_are_added_to_a_file_and_the_page_is_made_of_it(tmp_path: Path) -> None:
    """The last word on a class counts."""
    file, made = tmp_path / "found.jsonl", tmp_path / "page.md"
    for _ in range(2):
        main(["--only", "llama", "--findings", str(file), "--page", str(made)])
    assert len(file.read_text().splitlines()) == 2
    (found,) = read(file)
    assert found.verdict == EQUAL
    assert found.sampled is True
    assert found.passes is not None
    assert max(found.passes) <= architectures.WORTH
    assert made.read_text() == page([found])
    assert "| LlamaForCausalLM | `llama` | equal |" in made.read_text()


def test_a_part_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--part", "3/2"])
    assert "'3/2' is no part" in capsys.readouterr().err


def test_a_refusal_stands_in_the_page() -> None:
    made = page([Finding("causal", "some", "SomeForCausalLM", "refused", note="why")])
    assert "| SomeForCausalLM | `some` | refused |  |  | why |" in made


def test_pictures_have_a_column_where_there_are_any() -> None:
    found = [Finding("image-text", "some", "SomeModel", EQUAL, (0.2, 0.2), pictures="same", sampled=True)]
    made = page([*found, Finding("image-text", "other", "OtherModel", "refused", note="why")])
    assert "| SomeModel | `some` | equal | 0.20, 0.20 | same | same |  |" in made
    assert "| OtherModel | `other` | refused |  |  |  | why |" in made
    assert "With pictures: 1 same." in made


@pytest.mark.parametrize("kind", ["gemma3n", "dots3_note", "granite4_vision"])
def test_wholes_around_other_packages_or_of_odd_parts_are_built(kind: str) -> None:
    """Without timm; layers of sizes of their own; a part that takes its sizes from another."""
    model = tiny_model(kind, AutoModelForImageTextToText)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert model.generate(**prompts(1), max_new_tokens=2, do_sample=False).shape == (1, 11)


def test_a_class_that_generates_by_itself_is_served_without_gain() -> None:
    plain = tiny_model("llama", AutoModelForCausalLM)

    class Own(type(plain)):  # type: ignore[misc]
        def generate(self, **given: object) -> object:
            return given["input_ids"]

    with pytest.warns(UserWarning, match="Own is the class's own"):
        found = architectures._compared(Own(plain.config), "causal", "llama")
    assert found.verdict == "served without gain"
    assert found.note.startswith(r"generate() of Own is the class's own")
    assert found.passes is None


def test_a_part_of_a_whole_is_built_alone() -> None:
    """The mapping names a decoder's class for the whole's type."""
    assert type(tiny_model("musicgen_melody", AutoModelForCausalLM)).__name__ == "MusicgenMelodyForCausalLM"


def test_settings_are_given_to_one_class_as_to_another() -> None:
    """Some classes write into the dictionaries that they are given."""
    before = copy.deepcopy(OWN)
    for kind in [kind for kind in OWN if kind in CONFIG_MAPPING]:
        with contextlib.suppress(Exception):  # of some the rest has yet to be asked of their parts
            tiny_config(kind)
    assert before == OWN
