# SPDX-License-Identifier: Apache-2.0
"""States outside of cache layers: where they are is found, they are given back, and nothing stays in the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from states_in_modules import refused
from tiny_models import noisy, prompts

from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.host import recurrent
from hf_polyspec.host.carried import carried_by, keeps_rows_apart
from hf_polyspec.host.manners import Manner, manner_of
from hf_polyspec.host.modeling import AutoModelForCausalLM
from hf_polyspec.host.release import cache_argument, cache_of

NEW = 14


def _made(kind: str) -> Any:
    return tiny_model(kind, AutoModelForCausalLM)


def _standing(model: Any) -> dict[Any, Any]:
    """Whatever tensor hangs at a module without being a parameter or a buffer."""
    return {
        (part, name): value
        for part in model.modules()
        for name, value in vars(part).items()
        if value is None or isinstance(value, torch.Tensor)
    }


def test_where_a_state_is_kept_is_found() -> None:
    assert carried_by(_made("rwkv")).argument == "state"
    model = _made("xlstm")
    assert carried_by(model).argument == cache_argument(model)
    found = carried_by(_made("recurrent_gemma"))
    assert sorted(name for _, name in found.places) == ["conv1d_state", "recurrent_states"]
    found = carried_by(_made("minimax"))
    assert found.cache_class is not None
    assert found.attributes == ("linear_cache",)
    for kind in ("llama", "mamba2"):
        assert not carried_by(_made(kind)).any


@pytest.mark.parametrize("kind", ["minimax", "recurrent_gemma", "xlstm"])
def test_text_is_plain_generations_and_drafting_takes_part(enabled: None, kind: str) -> None:
    model = _made(kind)
    if refused(model):
        return
    call = {**prompts(3), "max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(**call).sequences.tolist()
    before = _standing(model)
    got = model.generate(**call, assistant_models=[noisy(model, 0.0)], num_assistant_tokens=5)
    assert got.sequences.tolist() == plain
    assert got.polyspec.levels[0].forward_passes <= 0.4 * NEW
    after = _standing(model)
    assert before.keys() == after.keys()
    assert all(after[place] is value for place, value in before.items())
    chain = [noisy(model, 0.02), noisy(model, 0.05, seed=2)]
    assert model.generate(**call, assistant_models=chain).sequences.tolist() == plain


def test_a_model_that_mixes_rows_has_drafts_of_one_at_a_time(enabled: None) -> None:
    """RWKV's step adds the last column of every row to that of every other; xLSTM's does not."""
    model = _made("rwkv")
    call = {**prompts(1), "max_new_tokens": NEW, "do_sample": False}
    assert model.generate(**call, assistant_models=[noisy(model, 0.05)]).tolist() == model.generate(**call).tolist()
    both = {**prompts(2), "max_new_tokens": NEW, "do_sample": False}
    plain = model.generate(**both)
    with pytest.warns(UserWarning, match=r"RwkvForCausalLM\) mixes the rows of a batch.* without assistants"):
        got = model.generate(**both, assistant_models=[noisy(model, 0.05)])
    assert got.tolist() == plain.tolist()
    assert keeps_rows_apart(_made("xlstm"))
    assert keeps_rows_apart(_made("mamba2"))


@pytest.mark.parametrize("kind", ["minimax", "xlstm", "rwkv"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_cache_that_the_model_makes_is_handed_back(enabled: None, kind: str, rows: int) -> None:
    """Where plain generation's output has one; it goes on as plain generation's does."""
    model = _made(kind)
    if refused(model) or (rows > 1 and not keeps_rows_apart(model)):
        return
    call = {**prompts(rows), "do_sample": False, "return_dict_in_generate": True}
    end = int(model.generate(**call, max_new_tokens=NEW).sequences[0, -NEW + 3])
    call |= {"max_new_tokens": NEW, "eos_token_id": end, "pad_token_id": 2}
    plain = model.generate(**call)
    ours = model.generate(**call, assistant_models=[noisy(model, 0.05)], num_assistant_tokens=3)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    found, wanted = cache_of(ours), cache_of(plain)
    assert type(found) is type(wanted)
    assert wanted is not None
    last = {"input_ids": plain.sequences[:, -1:], "use_cache": True}
    if kind == "minimax":
        assert found.get_seq_length() == wanted.get_seq_length() == plain.sequences.shape[1] - 1
        behind = torch.ones_like(plain.sequences[:, call["input_ids"].shape[1] :])
        last["attention_mask"] = torch.cat([call["attention_mask"], behind], dim=1)
    with torch.no_grad():
        name = carried_by(model).argument or cache_argument(model)
        onward = [model(**last, **{str(name): cache}).logits for cache in (found, wanted)]
    torch.testing.assert_close(*onward, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("first", ["plain", "chain"])
def test_behind_a_cache_of_its_own_class_the_target_generates_alone(enabled: None, first: str) -> None:
    model = _made("minimax")
    if refused(model):
        return
    chain = {"assistant_models": [noisy(model, 0.05)]}

    def turns(*given: dict[str, Any]) -> list[list[int]]:
        call = {**prompts(1), "max_new_tokens": 6, "do_sample": False}
        turn = model.generate(**call, return_dict_in_generate=True, **given[0])
        held = {cache_argument(model): turn[cache_argument(model)], "input_ids": turn.sequences, "max_new_tokens": 6}
        found: list[list[int]] = model.generate(**held, do_sample=False, **given[1]).tolist()
        return found

    plain = turns({}, {})
    with pytest.warns(UserWarning, match="MiniMaxForCausalLM keeps a part of what it has read in a cache"):
        assert turns(chain if first == "chain" else {}, chain) == plain


def test_a_state_in_modules_is_not_continued(enabled: None) -> None:
    """They hold what they held before a chain's call, so what plain generation would make of it is no second turn."""
    model = _made("recurrent_gemma")
    if refused(model):
        return
    call = {**prompts(1), "max_new_tokens": 3, "do_sample": False}
    first = model.generate(**call, return_dict_in_generate=True)
    given = {cache_argument(model): first[cache_argument(model)], "input_ids": first.sequences, "max_new_tokens": 3}
    with pytest.raises(ValueError, match="RecurrentGemmaForCausalLM keeps a part of what it has read in its modules"):
        model.generate(**given, do_sample=False, assistant_models=[noisy(model, 0.05)])


def test_the_trial_shows_a_state_that_is_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    if refused(_made("recurrent_gemma")):
        return
    assert manner_of(_made("recurrent_gemma")) is Manner.COLUMNS

    @contextmanager
    def nothing(places: Any, values: list[Any]) -> Iterator[None]:
        yield

    monkeypatch.setattr(recurrent, "standing", nothing)
    assert manner_of(_made("recurrent_gemma")) is Manner.NONE
