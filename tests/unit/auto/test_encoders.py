# SPDX-License-Identifier: Apache-2.0
"""`assistant_models="auto"` of targets with an encoder: passes are timed on what the call's encoder has read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoder_models import FAMILIES, inputs, seq_to_seq

from hf_polyspec.auto import choosing


@pytest.mark.parametrize("family", FAMILIES)
def test_really_measured(family: str) -> None:
    model = seq_to_seq(family)
    for batch in (1, 2):
        for sample in (False, True):
            options = {**inputs(family, batch), "max_new_tokens": 12, "do_sample": sample}
            torch.manual_seed(4)
            plain = model.generate(**options)
            torch.manual_seed(4)
            found = model.generate(**options, assistant_models="auto")
            assert torch.equal(found, plain)
    assert len(choosing.known(model).passes["target"]) > 3  # type: ignore[union-attr]


def test_a_copy_checks_with_the_targets_encoder(timed: list[Any]) -> None:
    model, options = seq_to_seq("bart"), {**inputs("bart", 2), "max_new_tokens": 12, "do_sample": False}
    ours = model.generate(**options, assistant_models="auto", return_dict_in_generate=True)
    assert ours.sequences.tolist() == model.generate(**options).tolist()
    assert [level.name.split()[-1] for level in ours.polyspec.levels[1:]] == ["int8", "suffix"]
