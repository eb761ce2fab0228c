# SPDX-License-Identifier: Apache-2.0
"""`assistant_models="auto"`: the user's things stay as they are, copies go with them, nothing is timed twice."""

from __future__ import annotations

import copy
import gc
import json
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from every_door import DOORS
from same_seed import ENDS, check
from tiny_models import noisy, prompts, tiny
from transformers import PreTrainedModel

import hf_polyspec
from hf_polyspec.auto import choosing, measuring, profile
from hf_polyspec.auto.worth import why_nobody
from hf_polyspec.control.steady import SteadyControl
from hf_polyspec.cpu.packing import is_packed
from hf_polyspec.models.changes import Stamp

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}


def run(model: Any, batch: int = 1, **options: Any) -> Any:
    return model.generate(**{**prompts(batch), **GREEDY, "assistant_models": "auto", **options})


def plain(model: Any, batch: int = 1, **options: Any) -> list[list[int]]:
    return run(model, batch, assistant_models=None, **options).sequences.tolist()


def side_of(model: Any) -> Any:
    return choosing._sides[model]


def as_another_process() -> None:
    choosing._sides.clear()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_every_door(model: PreTrainedModel, timed: list[Any], door: Callable[..., Any], batch: int) -> None:
    wanted = plain(model, batch)
    for said in ("auto", ["auto"]):
        ours = door(model, **prompts(batch), **GREEDY, assistant_models=said)
        assert ours.sequences.tolist() == wanted
    assert [level.name.split()[-1] for level in ours.polyspec.levels[1:]] == ["int8", "suffix"]
    assert ours.polyspec.chosen.startswith("packed (a pass over one token takes 2.0 ms packed and 4.1 ms as it is)")
    assert ours.polyspec.chosen.endswith("+ int8 (its pass takes 0.5 ms, it agrees in 90%) + suffix")
    assert ours.polyspec.to_dict()["chosen"] == ours.polyspec.chosen


def test_what_is_the_users_stays_as_it_was(model: PreTrainedModel) -> None:
    """Really measured: weights, their storage, modules and generators are those of before."""
    before = {name: (p.data_ptr(), p._version, p.detach().clone()) for name, p in model.named_parameters()}
    modules = {name: (type(m), dict(m.__dict__)) for name, m in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.generation_config.to_dict())
    torch.manual_seed(11)
    state = torch.get_rng_state()
    run(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == config
    assert not is_packed(model)
    for name, parameter in model.named_parameters():
        place, count, numbers = before[name]
        assert (parameter.data_ptr(), parameter._version) == (place, count)
        assert torch.equal(parameter, numbers)
    for name, module in model.named_modules():
        assert type(module) is modules[name][0]
        assert module.__dict__.keys() == modules[name][1].keys()


def test_a_library_that_draws_while_copies_are_made_moves_no_generator(
    model: PreTrainedModel, timed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = choosing.quantized_copy

    def drawing(*arguments: Any) -> Any:
        torch.rand(3)
        return made(*arguments)

    monkeypatch.setattr(choosing, "quantized_copy", drawing)
    state = torch.get_rng_state()
    run(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_second_call_and_the_second_process_measure_nothing(model: PreTrainedModel, timed: list[Any]) -> None:
    first = run(model).polyspec.chosen
    assert timed == [["target", "unpacked"], ["int8"]]
    assert run(model).polyspec.chosen == first
    as_another_process()
    assert run(tiny("llama")).polyspec.chosen == first
    assert len(timed) == 2
    run(tiny("llama", seed=1))
    assert len(timed) == 4, "other weights"


def test_threads_are_part_of_the_key(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(dtype: torch.dtype = torch.float32, pack: bool = True) -> profile.Key:
        return profile.Key.here(choosing.identity_of(model), dtype, torch.device("cpu"), pack, "may be packed")

    found = {key().name, key(torch.bfloat16).name, key(pack=False).name}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert len({*found, key().name}) == 4
    monkeypatch.setattr(profile, "installed", lambda: "5.99.0")
    assert len({*found, key().name}) == 4
    assert key().threads == 7


def test_a_checkpoint_in_another_type_is_the_same_weights(model: PreTrainedModel) -> None:
    other, trained = tiny("llama").bfloat16(), noisy(model, 0.1)
    identities = [choosing.identity_of(one) for one in (model, other, trained)]
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', "other", "times"])
def test_a_damaged_profile_is_measured_anew(model: PreTrainedModel, timed: list[Any], cache: Path, damage: str) -> None:
    run(model)
    (path,) = cache.glob("*.json")
    values = json.loads(path.read_text())
    if damage == "other":
        damage = json.dumps(values | {"key": values["key"] | {"threads": 99}})
    elif damage == "times":
        damage = json.dumps(values | {"passes": {"target": [[1, -1.0]]}})
    path.write_text(damage)
    as_another_process()
    count = len(timed)
    run(model)
    assert len(timed) == 2 * count
    assert json.loads(path.read_text())["passes"] == values["passes"]


def test_a_cache_folder_that_cannot_be_written_is_said_once(
    model: PreTrainedModel, timed: list[Any], cache: Path
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the folder's place")
    with pytest.warns(UserWarning, match="could not be kept in"):
        run(model)
    run(model)
    assert len(timed) == 2


def test_copies_go_when_the_model_goes(timed: list[Any]) -> None:
    model = tiny("llama")
    run(model)
    side = side_of(model)
    made = [weakref.ref(side.twin), *(weakref.ref(one) for one in side.copies.values())]
    assert len(made) == 2
    gone = weakref.ref(model)
    del side, model
    gc.collect()
    assert gone() is None
    assert [one() for one in made] == [None, None]


def test_a_training_step_drops_the_copies_and_measures_nothing(model: PreTrainedModel, timed: list[Any]) -> None:
    run(model)
    count, old = len(timed), weakref.ref(side_of(model).copies["int8"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        model(**prompts(1), labels=prompts(1)["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ours = run(model)
        assert ours.sequences.tolist() == plain(model)
        assert old() is None or "int8" not in side_of(model).copies
        assert [level.name for level in ours.polyspec.levels[1:]] == ["suffix"]
        assert "without int8, since the weights have just changed" in ours.polyspec.chosen
    assert run(model).sequences.tolist() == plain(model)
    assert "int8" in side_of(model).copies, "the weights stood still for two calls"
    assert len(timed) == count


def test_numbers_written_behind_torchs_back_are_seen(model: PreTrainedModel, timed: list[Any]) -> None:
    run(model)
    with torch.no_grad():
        model.lm_head.weight.data.mul_(-1)
    assert run(model).sequences.tolist() == plain(model)


def test_another_type_is_another_profile(model: PreTrainedModel, timed: list[Any]) -> None:
    run(model)
    count = len(timed)
    model.to(torch.bfloat16)
    hf_polyspec.pack(model)  # the same sums as the copy's, or the last bit of bfloat16 decides
    assert run(model).sequences.tolist() == plain(model)
    assert len(timed) > count


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters(timed: list[Any]) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapted = peft.get_peft_model(model, lora).eval()
        adapted.add_adapter("other", lora)
    texts = []
    for change in (lambda: None, lambda: adapted.set_adapter("other"), lambda: adapted.merge_adapter()):
        change()
        texts.append(run(adapted).sequences.tolist())
        assert texts[-1] == plain(adapted)
        assert run(adapted).sequences.tolist() == texts[-1]
    with adapted.disable_adapter():
        texts.append(run(adapted).sequences.tolist())
        assert texts[-1] == plain(adapted)
    assert len({str(text) for text in texts}) == 3
    assert len(timed) == 2


def test_a_packed_models_profile_is_not_that_of_the_model(model: PreTrainedModel, timed: list[Any]) -> None:
    """Neither of the same weights before packing nor after: one would never be packed, the other be timed packed."""
    first = run(hf_polyspec.pack(tiny("llama"))).polyspec.chosen
    assert not first.startswith("packed (")
    count = len(timed)
    assert run(model).polyspec.chosen.startswith("packed (")
    assert len(timed) > count
    hf_polyspec.unpack(model)
    assert run(model).polyspec.chosen.startswith("packed (")
    assert len(list(profile.kept())) == 2


def test_the_copy_is_packed_once_where_packing_is_allowed(model: PreTrainedModel, timed: list[Any]) -> None:
    for _ in range(2):
        for option, wanted in ({}, True), ({"polyspec_pack": False}, False):
            assert run(model, **option).sequences.tolist() == plain(model)
            assert is_packed(side_of(model).copies["int8"]) is wanted, option
        assert not is_packed(model)


def test_what_the_host_leaves_on_a_model_is_nobodys_hook(model: PreTrainedModel, timed: list[Any]) -> None:
    """Once a model was asked for hidden states, as a chain with a head asks, transformers' hooks stay on it."""
    model(**prompts(1), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    ours = run(model)
    assert ours.polyspec.chosen.startswith("packed (")
    assert ours.sequences.tolist() == plain(model)


@pytest.mark.parametrize("kind", ["hook", "training", "packed", "option"])
def test_what_must_not_be_copied_is_run_itself(model: PreTrainedModel, timed: list[Any], kind: str) -> None:
    seen: list[int] = []
    if kind == "hook":
        model.model.layers[0].register_forward_hook(lambda *arguments: seen.append(1))
    elif kind == "training":
        model.train()
    elif kind == "packed":
        hf_polyspec.pack(model)
    found = run(model, **({"polyspec_pack": False} if kind == "option" else {}))
    assert side_of(model).twin is None
    assert "packed (" not in found.polyspec.chosen
    assert bool(seen) == (kind == "hook")
    left = next(iter(profile.kept()))[1]
    assert left is not None
    assert any(sentence.startswith("packing: ") for sentence in left.left_out)


def test_what_does_not_pay_is_left_out_and_said(
    model: PreTrainedModel, timed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "worth", lambda *arguments: 0.9)
    found = run(model)
    assert [level.name for level in found.polyspec.levels[1:]] == ["suffix"]
    assert not side_of(model).copies
    ((_, kept),) = profile.kept()
    assert kept is not None
    assert kept.left_out == ("int8: its pass takes 0.5 ms, it agrees in 90%, which would not pay",)
    assert found.polyspec.chosen.endswith(f" + suffix; no {kept.left_out[0]}")


def test_where_no_copy_was_refused_the_line_says_why_nothing_is_packed() -> None:
    names = ("int8", "int4", "packing")
    assert why_nobody(names, ["packing: polyspec_pack=False"]) == "; no packing: polyspec_pack=False"
    assert why_nobody(names, ["packing: a", "int4: b"]) == "; no int4: b"
    assert why_nobody(names, ["some/head, which would not pay"]) == ""


def test_weights_are_looked_over_only_for_what_is_made_of_them(
    model: PreTrainedModel, timed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed model whose copy does not pay runs itself over a suffix drafter: nothing of it can be out of date."""
    looked: list[Any] = []
    own = Stamp.holds
    monkeypatch.setattr(Stamp, "holds", lambda self, one: looked.append(one) or own(self, one))
    for _ in range(2):
        run(model)
    assert looked, "a packed copy and an int8 one are made of these"
    other = hf_polyspec.pack(tiny("llama"))
    monkeypatch.setattr(choosing, "worth", lambda *arguments: 0.9)
    assert [level.name for level in run(other).polyspec.levels[1:]] == ["suffix"]
    looked.clear()
    assert run(other).sequences.tolist() == plain(other)
    assert not looked


def test_no_copy_where_memory_is_short(
    model: PreTrainedModel, timed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_polyspec.auto.copying._free", lambda device: 100)
    assert [level.name for level in run(model).polyspec.levels[1:]] == ["suffix"]
    monkeypatch.setattr("hf_polyspec.auto.copying._free", lambda device: 10**9)
    monkeypatch.setattr("hf_polyspec.auto.copying.MOST_SECONDS", 0.0)
    assert [level.name for level in run(tiny("llama", seed=2)).polyspec.levels[1:]] == ["suffix"]
    sentences = [sentence for _, one in profile.kept() if one is not None for sentence in one.left_out]
    assert any("memory are not free" in sentence for sentence in sentences)
    assert any("name it to have it" in sentence for sentence in sentences)


def test_a_line_of_progress_after_two_seconds(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "_PATIENCE", float("inf"))  # on a busy machine anything may take two seconds
    run(model)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(measuring, "_PATIENCE", 0.0)
    run(tiny("llama", seed=1))
    assert capfd.readouterr().err.count("measuring what pays for") == 1


def test_the_callers_word_comes_first(model: PreTrainedModel, timed: list[Any]) -> None:
    fixed = run(model, polyspec_control="fixed", polyspec_block_size=2, num_assistant_tokens=1)
    assert fixed.polyspec.decisions == []
    assert len(fixed.polyspec.levels[0].drafted_at) <= 3
    online = run(model, polyspec_control="online")
    assert online.polyspec.decisions[0].reason.startswith("start: the target alone")
    steady = run(model)
    assert steady.polyspec.decisions[0].levels == (0, 1, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"assistant_models": ["auto", "suffix"]}, "give it alone"),
        ({"polyspec_plan": "plan.json"}, "chooses by itself"),
    ],
)
def test_refusals(model: PreTrainedModel, timed: list[Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(model, **options)
    assert not timed


def test_a_config_may_say_auto(model: PreTrainedModel, timed: list[Any]) -> None:
    wanted = plain(model)
    model.generation_config.assistant_models = "auto"
    found = model.generate(**prompts(1), **GREEDY)
    assert found.sequences.tolist() == wanted
    assert found.polyspec.chosen


SETTINGS = {
    "whole": {"max_new_tokens": 10},
    "cut": {"max_new_tokens": 10, "temperature": 0.8, "top_k": 12, "repetition_penalty": 1.2},
    "ends": {"max_new_tokens": 10, "temperature": 1.4, "top_p": 0.9, **ENDS},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_same_seed_same_text(
    model: PreTrainedModel, timed: list[Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty prompts: what was switched on when, by a clock that leaps, changes no token and no generator."""
    levels, switched = set(), 0
    dice, now = random.Random(name), [0.0]

    def leaping() -> float:
        now[0] += dice.choice([1e-4, 1e-2, 0.5])
        return now[0]

    assert SteadyControl.__init__.__kwdefaults__
    monkeypatch.setitem(SteadyControl.__init__.__kwdefaults__, "clock", leaping)
    for seed in range(50):
        batch = 1 + seed % 3
        found = check(model, "auto", seed, **prompts(batch, seed=seed), **SETTINGS[name])  # type: ignore[arg-type]
        levels |= {len(found.levels)}
        switched += len({decision.levels for decision in found.decisions}) > 1
    assert levels == {3}
    assert switched, "the control has had something to decide"
