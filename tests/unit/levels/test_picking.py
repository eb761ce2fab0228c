# SPDX-License-Identifier: Apache-2.0
"""Which checks are made of likeliest ids alone: those of which nobody reads more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.cpu.packing import pack
from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.distributions import LawMaker
from hf_polyspec.exactness.passes import Pass
from hf_polyspec.exactness.proposal import Proposal
from hf_polyspec.levels import causal_lm, picking
from hf_polyspec.levels.base import Drafter
from hf_polyspec.levels.joined import JoinedDrafter
from hf_polyspec.levels.suffix import SuffixDrafter

if not compiles():
    pytest.skip("blocks are not fused here", allow_module_level=True)

Model = Any
NEW = 40


@pytest.fixture
def model(tiny: Callable[..., PreTrainedModel]) -> Model:
    return hf_polyspec.attach(pack(copy.deepcopy(tiny(num_hidden_layers=3))))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 48, (1, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Passes of each model that said the likeliest ids, by its name."""
    found: dict[str, int] = {}
    real = picking.picks

    def counting(runner: Any, *args: Any, **kwargs: Any) -> Any:
        said = real(runner, *args, **kwargs)
        if said is not None:
            found[runner.name] = found.get(runner.name, 0) + 1
        return said

    for module in (picking, causal_lm):
        monkeypatch.setattr(module, "picks", counting)
    return found


class Same(Drafter):
    """Offers one token, and keeps what it is shown."""

    asks_nobody = True

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        tokens = [row[-1:] if limit else [] for row, limit in zip(context.ids, limits, strict=True)]
        return Proposal(tokens, None, [[self.index] * len(row) for row in tokens])


class Watching(Same):
    """Reads the logits of the level above."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[int, ...]] = []

    def watch(self, passed: Pass) -> None:
        self.shown.append(tuple(passed.logits.shape))


def greedy(model: Model, ids: torch.Tensor, members: list[Any], **more: Any) -> Any:
    return model.generate(ids, assistant_models=members, do_sample=False, max_new_tokens=NEW, **more)


def test_greedy_text_of_one_row(
    model: Model, ids: torch.Tensor, counted: dict[str, int], noisy: Callable[..., Model]
) -> None:
    wanted = model.generate(ids, do_sample=False, max_new_tokens=NEW)
    middle = pack(noisy(model, 0.01))
    for members in ([Same()], [middle, SuffixDrafter()]):
        counted.clear()
        assert torch.equal(greedy(model, ids, members), wanted)
        assert len(counted) == len(members), "the target, and a middle"
        assert all(count >= 3 for count in counted.values())


def test_models_that_every_call_packs_anew(
    tiny: Callable[..., Model], ids: torch.Tensor, counted: dict[str, int], noisy: Callable[..., Model]
) -> None:
    target = tiny()
    members, sizes = [noisy(target, 0.02), noisy(target, 0.05, seed=2)], {"polyspec_block_size": 4}
    for _ in range(3):
        counted.clear()
        hf_polyspec.generate(target, ids, assistant_models=members, do_sample=False, max_new_tokens=NEW, **sizes)
    assert len(counted) == 2
    assert all(count > 4 for count in counted.values())


def test_a_model_that_drafts(
    model: Model, ids: torch.Tensor, counted: dict[str, int], noisy: Callable[..., Model]
) -> None:
    wanted = model.generate(ids, do_sample=False, max_new_tokens=NEW)
    drafter = pack(noisy(model, 0.01))
    assert torch.equal(greedy(model, ids, [drafter]), wanted)
    (of_drafter,) = (count for name, count in counted.items() if name != "the target")
    assert of_drafter > counted["the target"] > 2
    counted.clear()
    assert torch.equal(greedy(model, ids, [drafter], assistant_confidence_threshold=0.1), wanted)
    assert counted.keys() == {"the target"}, "of a drafter's probabilities more is read"


@pytest.mark.parametrize("name", ["output_scores", "output_logits", "output_hidden_states"])
def test_what_is_asked_besides_ids_is_given(
    model: Model, ids: torch.Tensor, counted: dict[str, int], name: str
) -> None:
    asked = {"return_dict_in_generate": True, name: True}
    wanted = model.generate(ids, do_sample=False, max_new_tokens=NEW, **asked)
    found = greedy(model, ids, [Same()], **asked)
    assert not counted
    assert torch.equal(found.sequences, wanted.sequences)
    shown = name.removeprefix("output_")
    assert len(found[shown]) == len(wanted[shown]) == NEW
    if name != "output_hidden_states":
        for one, other in zip(found[shown], wanted[shown], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more",
    [{"repetition_penalty": 1.3}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["processor", "sampled", "rows"],
)
def test_laws_of_which_more_is_read(
    model: Model, ids: torch.Tensor, counted: dict[str, int], more: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model.generate(ids, assistant_models=[Same()], max_new_tokens=NEW, **{"do_sample": False, **more})
    assert not counted


def test_a_drafter_that_watches_is_shown_all_of_a_pass(
    model: Model, ids: torch.Tensor, counted: dict[str, int]
) -> None:
    wanted = model.generate(ids, do_sample=False, max_new_tokens=NEW)
    drafter = Watching()
    assert torch.equal(greedy(model, ids, [drafter]), wanted)
    assert not counted
    assert len(drafter.shown) > 2
    assert all(shape[0] == 1 and shape[2] == 48 for shape in drafter.shown)


def test_who_watches() -> None:
    assert not Same().watches
    assert Watching().watches
    assert not SuffixDrafter().watches
    assert JoinedDrafter(Watching(), SuffixDrafter()).watches
    assert JoinedDrafter(Same(), Watching()).watches
    assert not JoinedDrafter(Same(), SuffixDrafter()).watches
    own: Any = Same()
    own.watch = lambda passed: None
    assert own.watches
