# SPDX-License-Identifier: Apache-2.0
"""States after a part of a pass, made from what its scans were given: those of a pass over that part alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_turns import walk
from tiny_models import tiny

from hf_polyspec.bench.measurements.tiny_models import tiny_model
from hf_polyspec.exactness.context import Context, Prompt
from hf_polyspec.host import recurrent, replay
from hf_polyspec.host.manners import Manner, manner_of
from hf_polyspec.host.modeling import AutoModelForCausalLM
from hf_polyspec.host.recurrent import RecurrentRunner
from hf_polyspec.host.replay import can_replay
from hf_polyspec.host.scans import Heard, Scan
from hf_polyspec.telemetry.counters import LevelStats

KINDS = ["mamba2", "qwen3_next", "kimi_linear", "falcon_h1"]
"""Mamba 2's scan, once beside attention in a layer; the gated delta rule, and its form with a decay a channel."""


def _made(kind: str) -> Any:
    if kind == "mamba2":
        return tiny(kind, attention="eager", state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=16)
    return tiny_model(kind, AutoModelForCausalLM)


@pytest.mark.parametrize("kept", [1, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_text(kind: str, kept: int) -> None:
    """Over uneven rows, and contexts that are taken back further than a draft."""
    model = _made(kind)
    assert can_replay(model)
    runner = RecurrentRunner(model, "walked", kept=kept)
    assert runner.replays
    assert walk(model, runner, 24) < 1e-3


def _counted(model: Any, replays: bool) -> tuple[list[int], LevelStats]:
    """Columns of every pass of rounds over drafts of four, of three uneven rows; and the statistics."""
    runner, stats, fed = RecurrentRunner(model, "counted", kept=1), LevelStats("counted", 0), list[int]()
    runner.replays &= replays
    handle = model.register_forward_pre_hook(
        lambda _, __, given: fed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    texts = [[3 + row, *range(4, 23)] for row in range(3)]
    prompt = Prompt(20, None, torch.arange(20).expand(3, -1))
    for turn in range(20):
        drafts = [[7 + turn, 8, 9, 10] for _ in texts]
        with torch.no_grad():
            runner.run(Context([list(ids) for ids in texts], prompt), drafts, stats)
        for row, ids in enumerate(texts):
            ids += [*drafts[row][: (turn + row) % 4], 11 + row]
    handle.remove()
    return fed, stats


def test_no_column_is_fed_twice_and_no_pass_only_catches_up() -> None:
    model = _made("qwen3_next")
    fed, stats = _counted(model, True)
    lagging, _ = _counted(model, False)
    assert fed == [19, *[5] * 20]
    assert sum(lagging[1:]) > 2 * sum(fed[1:])
    assert len(lagging) > len(fed)
    assert any("what passes from there scanned" in note for note in stats.notes)


def test_the_memory_of_what_is_kept_in_mind_counts() -> None:
    model = _made("mamba2")
    runner, stats = RecurrentRunner(model, "counted", kept=1), LevelStats("counted", 0)
    prompt = Prompt(4, None, torch.arange(4)[None])
    with torch.no_grad():
        runner.run(Context([[3, 4, 5, 6]], prompt), [[]], stats)
        runner.run(Context([[3, 4, 5, 6, 7]], prompt), [[8, 9, 10]], stats)
    (picture,) = runner._pictures
    states = sum(
        t.nbytes
        for layer in picture.state
        for part in ("conv_states", "recurrent_states")
        for t in layer[part].values()
    )
    assert picture.heard is not None
    given = [t for scan in picture.heard.scans for t in scan.given.values() if isinstance(t, torch.Tensor)]
    assert picture.heard.bytes >= max(t.nbytes for t in given) + sum(t.nbytes for *_, t in picture.heard.windows[:1])
    assert any(f"{states + picture.heard.bytes:,} bytes" in note for note in stats.notes)


def _all_columns(right: Callable[..., Any]) -> Callable[..., Any]:
    def window(before: torch.Tensor, columns: torch.Tensor, counts: list[int]) -> Any:
        return right(before, columns, [columns.shape[-1]] * len(counts))

    return window


def _one_too_far(right: Callable[..., Any]) -> Callable[..., Any]:
    def kept(scan: Scan, counts: list[int]) -> Any:
        return right(scan, [min(count + 1, scan.columns) for count in counts])

    return kept


def _nobody(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *_: {}


WRONG = {"window": ("_window", _all_columns), "further": ("_kept", _one_too_far), "rejected": ("_idle", _nobody)}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["mamba2", "qwen3_next"])
def test_what_is_made_wrongly_shows(kind: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that moved over rejected columns, a scan over one column more, columns of a row that are not idle:
    the trial says so, and such a model is served from pictures alone. Unheeded it would show in the logits."""
    name, breaks = WRONG[wrong]
    monkeypatch.setattr(replay, name, breaks(getattr(replay, name)))
    model = _made(kind)
    assert not can_replay(model)
    assert manner_of(model) is Manner.BLOCKS
    runner = RecurrentRunner(model, "walked")
    assert walk(model, runner, 12) < 1e-3
    monkeypatch.setattr(recurrent, "can_replay", lambda _: True)
    assert walk(model, RecurrentRunner(model, "walked"), 12) > 0.02


def test_a_scan_that_nobody_knows_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something of a state came about unheard, a pass is not kept in mind."""
    monkeypatch.setattr(Heard, "wrote", lambda *_: None)
    model = _made("qwen3_next")
    assert not can_replay(model)
    monkeypatch.setattr(recurrent, "can_replay", lambda _: True)
    runner = RecurrentRunner(model, "walked")
    assert walk(model, runner, 12) < 1e-3
    assert all(one.heard is None for one in runner._pictures)


@pytest.mark.parametrize("kind", ["zaya", "minimax", "jamba"])
def test_others_are_served_as_they_were(kind: str) -> None:
    """States of which no scan is known, in a cache of a class of its own, and read column by column."""
    assert not can_replay(_made(kind))
