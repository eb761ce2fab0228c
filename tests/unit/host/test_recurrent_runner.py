# SPDX-License-Identifier: Apache-2.0
"""A runner's logits after any history of drafts, extensions and rollbacks are those of the text read at once."""

from __future__ import annotations

import pytest
import torch
from random_turns import PROMPT, walk
from states_in_modules import refused
from tiny_models import tiny

from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.host import recurrent
from hf_polyspec.host.manners import Manner, manner_of, runner_for
from hf_polyspec.host.modeling import AutoModelForCausalLM
from hf_polyspec.host.recurrent import RecurrentRunner
from hf_polyspec.host.states import StateCache
from hf_polyspec.telemetry.counters import LevelStats

SETTINGS = {
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "mamba": {"state_size": 8},
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("replays", [True, False], ids=["replayed", "lagging"])
def test_logits_are_those_of_the_text(kind: str, replays: bool) -> None:
    model = tiny(kind, attention="eager", **SETTINGS[kind])
    runner = runner_for(model, "walked")
    assert isinstance(runner, RecurrentRunner)
    runner.replays &= replays
    assert not runner.steps
    assert (runner.stepwise is not None) == (kind == "mamba")
    assert walk(model, runner, 24) < 1e-3


@pytest.mark.parametrize("kind", ["minimax", "recurrent_gemma", "rwkv", "xlstm"])
def test_a_state_elsewhere_than_in_cache_layers_is_carried_on(kind: str) -> None:
    """In a cache of the model's own class, in its modules, in an argument that is a list, and in one that is not."""
    model = tiny_model(kind, AutoModelForCausalLM)
    if refused(model):
        return
    runner = runner_for(model, "walked")
    assert isinstance(runner, RecurrentRunner)
    assert (runner.stepwise is not None) == (kind == "recurrent_gemma")
    # Of rows beside each other RWKV makes something else than of each alone, which is asked before a runner is used.
    assert walk(model, runner, 24, rows=1 if kind == "rwkv" else 3) < 1e-3


@pytest.mark.parametrize("what", ["nothing", "convolution"])
def test_a_state_that_is_not_put_back_shows(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the logits, and in the trial that decides how a model is served."""
    right = StateCache.put

    def wrong(self: StateCache, state: list[dict[str, object]]) -> None:
        kept = self.state(copied=False)
        if what == "nothing" and any(any(flags["has_previous_state"].values()) for flags in kept):  # type: ignore[attr-defined]
            return
        if what == "convolution" and any(any(flags["has_previous_state"].values()) for flags in kept):  # type: ignore[attr-defined]
            state = [{**new, "recurrent_states": old["recurrent_states"]} for new, old in zip(state, kept, strict=True)]
        right(self, state)

    monkeypatch.setattr(StateCache, "put", wrong)
    model = tiny("mamba2", attention="eager", **SETTINGS["mamba2"])
    assert walk(model, RecurrentRunner(model, "walked"), 8) > 0.1
    assert manner_of(model) is Manner.NONE


@torch.no_grad()
def test_what_lags_behind_is_absorbed_before_it_grows() -> None:
    """Drafts that are always rejected: no pass feeds more than the lag and its draft, and few passes are extra."""
    model = tiny("mamba2", attention="eager", **SETTINGS["mamba2"])
    fed: list[int] = []
    runner, stats = RecurrentRunner(model, "lagging", kept=1), LevelStats("lagging", 0)
    runner.replays = False
    model.register_forward_pre_hook(lambda _, __, given: fed.append(given["input_ids"].shape[1]), with_kwargs=True)
    prompt = Prompt(30, None, torch.arange(30)[None])
    text = list(range(3, 33))
    for step in range(40):
        runner.run(Context([list(text)], prompt), [[1, 2, 1, 2]], stats)
        text.append(3 + step)
    assert fed[0] == 29  # the prompt is absorbed alone, so that no round reads it again
    assert max(fed[1:]) == recurrent.LAG + 5
    assert len(fed) == 1 + 40 + 40 // (recurrent.LAG + 1)
    assert len(runner._pictures) == 1


@torch.no_grad()
def test_pictures_stand_at_distances_that_about_double() -> None:
    """One token a pass, as a drafter reads: few pictures are kept, and one is near for every place to go back to."""
    model = tiny("mamba2", attention="eager", **SETTINGS["mamba2"])
    runner, stats = RecurrentRunner(model, "drafting"), LevelStats("drafting", 0)
    prompt = Prompt(PROMPT, None, torch.arange(PROMPT)[None])
    text = list(range(3, 3 + PROMPT))
    for step in range(60):
        runner.run(Context([list(text)], prompt), [[]], stats)
        text.append(3 + step % 40)
    lengths = [one.lengths[0] for one in runner._pictures]
    assert len(lengths) == recurrent.KEPT
    for back in range(1, 9):
        nearest = max(n for n in lengths if n < len(text) - back)
        assert len(text) - back - nearest <= 2 * back + 2
    size = sum(
        t.numel() * 4
        for layer in runner.cache.stateful
        for t in (*layer.conv_states.values(), *layer.recurrent_states.values())
    )
    assert any(f"{recurrent.KEPT * size:,} bytes" in note for note in stats.notes)
    assert len(stats.notes) == 1
