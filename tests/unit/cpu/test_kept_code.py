# SPDX-License-Identifier: Apache-2.0
"""Machine code that numba keeps on disk, cut short by a kill or a full disk: it is made anew, once."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_polyspec.cpu.compiled import compiles

pytestmark = pytest.mark.skipif(not compiles(), reason="nothing is compiled on this machine")


def ask() -> int:
    """A task's machine code, asked for as a new process would."""
    from hf_polyspec.cpu.compiled import samples
    from hf_polyspec.cpu.compiled.tasks import compiled

    return compiled(samples._task())


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every function that is compiled and written to this test's own folder."""
    from numba import config
    from numba.core.caching import FunctionCache

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    found: list[object] = []
    save = FunctionCache.save_overload

    def watched(self: FunctionCache, signature: object, data: object) -> None:
        found.append(signature)
        save(self, signature, data)

    monkeypatch.setattr(FunctionCache, "save_overload", watched)
    return found


def test_files_that_were_cut_short_are_written_anew(kept: list[object], tmp_path: Path) -> None:
    for ending, share in [("", 0.0), *((ending, share) for ending in (".nbi", ".nbc") for share in (0.0, 0.5, 0.99))]:
        for torn in tmp_path.rglob(f"*{ending}") if ending else ():
            os.truncate(torn, int(torn.stat().st_size * share))
        kept.clear()
        assert ask() > 0
        assert len(kept) == 1, (ending, share)
        assert ask() > 0
        assert len(kept) == 1, (ending, share)


def test_code_is_made_where_nothing_can_be_kept(kept: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import FunctionCache

    def refuse(self: FunctionCache, function: object) -> None:
        raise RuntimeError("no locator available")

    monkeypatch.setattr(FunctionCache, "__init__", refuse)
    assert ask() > 0
    assert not kept


def test_two_processes_that_keep_a_variant_each_keep_both(kept: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """However what they write falls, neither is given the other's machine code, now or later."""
    import numpy as np
    from numba import carray
    from numba.core.caching import IndexDataCacheFile

    from hf_polyspec.cpu.compiled.tasks import alone, compiled, pointer

    def writes(number: int) -> Callable[[Any], None]:
        def task(place: Any) -> None:
            carray(pointer(place, np.int64(0)), 1)[0] = number

        return task

    def found(number: int) -> int:
        task = array("q", (0,))
        alone(compiled(writes(number)))(task.buffer_info()[0])
        return task[0]

    save = IndexDataCacheFile._save_data

    def while_another_does(self: Any, name: str, data: Any) -> None:
        monkeypatch.setattr(IndexDataCacheFile, "_save_data", save)
        with monkeypatch.context() as other:  # which looked before this one had written anything
            other.setattr(IndexDataCacheFile, "_load_index", lambda self: {})
            assert found(2) == 2
        save(self, name, data)

    monkeypatch.setattr(IndexDataCacheFile, "_save_data", while_another_does)
    assert found(1) == 1
    assert len(kept) == 2
    assert [found(number) for number in (1, 2)] == [1, 2]
    assert len(kept) == 2, "both were kept"
