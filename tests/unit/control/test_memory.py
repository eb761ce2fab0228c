# SPDX-License-Identifier: Apache-2.0
"""What is learnt of one chain is told to that chain only."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from tiny_models import head_for
from transformers import PreTrainedModel

from hf_polyspec.control import forget
from hf_polyspec.control.estimates import Knowledge
from hf_polyspec.control.memory import recall, remember, weight_bytes
from hf_polyspec.eagle import EagleHead
from hf_polyspec.host.runner import ModelRunner
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.causal_lm import CausalLMDrafter
from hf_polyspec.levels.eagle import EagleDrafter
from hf_polyspec.levels.early_exit import early_exit
from hf_polyspec.levels.joined import JoinedDrafter
from hf_polyspec.levels.suffix import SuffixDrafter
from hf_polyspec.levels.verifier import NoDraft
from hf_polyspec.quantization import quantize_model


@pytest.fixture(autouse=True)
def nothing_learnt() -> Iterator[None]:
    forget()
    yield
    forget()


def chain(target: PreTrainedModel, below: object) -> list[Drafter]:
    """Two levels with one name, as quantised copies of one model have it."""
    return [CausalLMDrafter(ModelRunner(model, "it"), name="it") for model in (target, below)]


def test_copies_of_one_model_at_other_widths_are_other_chains(target: PreTrainedModel) -> None:
    eight, four = quantize_model(target, 8), quantize_model(target, 4, 32)
    remember(chain(target, eight), "greedy", Knowledge(elapsed=8.0))
    assert recall(chain(target, eight), "greedy").elapsed == 8.0
    assert recall(chain(target, four), "greedy").elapsed == 0.0
    assert recall(chain(target, eight), "sampled").elapsed == 0.0
    assert recall(chain(copy.deepcopy(target), eight), "greedy").elapsed == 0.0


def test_a_fresh_view_of_the_same_weights_is_the_same_chain(target: PreTrainedModel) -> None:
    remember(chain(target, early_exit(target, 1)), "greedy", Knowledge(elapsed=3.0))
    assert recall(chain(target, early_exit(target, 1)), "greedy").elapsed == 3.0


def test_a_drafter_made_anew_for_every_call_is_remembered(target: PreTrainedModel) -> None:
    top = chain(target, target)[:1]
    first, second = SuffixDrafter(), SuffixDrafter()
    remember([*top, first], "greedy", Knowledge(elapsed=5.0))
    assert recall([*top, second], "greedy").elapsed == 5.0
    assert recall([*top, NoDraft()], "greedy").elapsed == 0.0


def test_a_head_joined_with_a_drafter_is_known_by_its_weights(target: PreTrainedModel) -> None:
    def joined(head: EagleHead) -> list[Drafter]:
        view = EagleDrafter(copy.copy(head), [1], name="head", device=torch.device("cpu"))
        return [*chain(target, target)[:1], JoinedDrafter(view, SuffixDrafter())]

    mine, other = head_for(target, "eagle1"), head_for(target, "eagle1")
    remember(joined(mine), "greedy", Knowledge(elapsed=2.0))
    assert recall(joined(mine), "greedy").elapsed == 2.0
    fresh = recall(joined(other), "greedy")
    assert fresh.elapsed == 0.0
    assert fresh.ratios[1] == pytest.approx(weight_bytes(other) / weight_bytes(target))
