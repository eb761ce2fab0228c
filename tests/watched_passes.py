# SPDX-License-Identifier: Apache-2.0
"""Passes of every level's model, looked at while a chain runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from hf_polyspec.exactness.context import Context
from hf_polyspec.exactness.passes import Pass
from hf_polyspec.host.ragged import RaggedRunner
from hf_polyspec.host.runner import ModelRunner


@contextmanager
def watched_passes(
    look: Callable[[ModelRunner, Context, list[list[int]]], None],
    before: Callable[[ModelRunner], None] = lambda runner: None,
) -> Iterator[None]:
    """Calls `before(runner)` and `look(runner, context, drafts)` around every forward pass over chains."""

    def watched(original: Callable[..., Pass]) -> Callable[..., Pass]:
        def run(self: ModelRunner, context: Context, drafts: list[list[int]], *args: Any, **kwargs: Any) -> Pass:
            before(self)
            result = original(self, context, drafts, *args, **kwargs)
            look(self, context, drafts)
            return result

        return run

    with (
        mock.patch.object(ModelRunner, "run", watched(ModelRunner.run)),
        mock.patch.object(RaggedRunner, "run", watched(RaggedRunner.run)),
    ):
        yield


@contextmanager
def watched_caches() -> Iterator[list[int]]:
    """After every pass the cache is as long as its longest row, which is what was asked for (law 4).

    Rows with columns of their own of which nothing is asked are left as they were, by levels that may leave rows out.

    Yields:
        The cache's length after each pass, as the passes happen.
    """
    lengths: list[int] = []
    first: dict[str, Any] = {}

    def before(runner: ModelRunner) -> None:
        if isinstance(runner, RaggedRunner):
            first.update(asked=runner.asked, held=list(runner.memo))

    def look(runner: ModelRunner, context: Context, drafts: list[list[int]]) -> None:
        if not runner.use_cache:
            return
        held = runner.memo
        if isinstance(runner, RaggedRunner):
            rows = zip(first["asked"] or [True] * len(held), runner.own(context), drafts, first["held"], strict=True)
            assert held == [ids + draft if asked else had for asked, ids, draft, had in rows]
            for layer in runner.plain_cache().layers:
                assert layer.get_seq_length() == max(len(ids) for ids in held)
            lengths.append(max(len(ids) for ids in held))
            return
        asked = [ids + draft for ids, draft in zip(runner._own_view(context).ids, drafts, strict=True)]
        if runner.cache.floor:  # a row may have been filled up behind its own columns
            held = [row[: len(ids)] for row, ids in zip(held, asked, strict=True)]
        assert held == asked
        for layer in runner.cache.layers:
            assert layer.get_seq_length() == max(len(ids) for ids in asked)
            assert layer.keys.shape[0] == len(asked)
        lengths.append(runner.cache.length)

    with watched_passes(look, before):
        yield lengths
