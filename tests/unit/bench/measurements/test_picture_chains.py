# SPDX-License-Identifier: Apache-2.0
"""Prompts with pictures, made for any class: the column says "same" only where pictures went where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_polyspec.bench.measurements.picture_chains import CRASHED, OTHER, SAME, see
from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.bench.measurements.tiny_pictures import NoPictures, pictured
from hf_polyspec.host.forwarding import Forwarding
from hf_polyspec.host.modeling import AutoModelForCausalLM, AutoModelForImageTextToText


@pytest.mark.parametrize("kind", ["gemma3", "idefics3", "internvl", "qwen2_5_vl"])
def test_chains_see_pictures(kind: str) -> None:
    assert see(kind, AutoModelForImageTextToText) == (SAME, "")


def test_a_first_pass_that_reads_no_picture_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    complete = Forwarding.complete

    def blind(self: Forwarding, *arguments: Any) -> dict[str, Any]:
        made = complete(self, *arguments)
        return {name: value for name, value in made.items() if name not in ("mm_encoder_outputs", "pixel_values")}

    monkeypatch.setattr(Forwarding, "complete", blind)
    assert see("internvl", AutoModelForImageTextToText)[0] in (OTHER, CRASHED)


def test_positions_that_go_on_as_if_pictures_were_text_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    planes = Forwarding._planes

    def flat(self: Forwarding, unused: list[int], width: int, fed: int, rows: Any) -> torch.Tensor:
        made = planes(self, unused, width, fed, rows)
        return made if fed == width else made + 1  # a picture's positions are fewer than its tokens

    monkeypatch.setattr(Forwarding, "_planes", flat)
    assert see("qwen2_5_vl", AutoModelForImageTextToText)[0] == OTHER


def test_what_takes_no_pictures_gets_none() -> None:
    with pytest.raises(NoPictures, match="it takes no pictures"):
        pictured(tiny_model("llama", AutoModelForCausalLM), 1)
    assert see("llama", AutoModelForCausalLM) == (None, "it takes no pictures")
