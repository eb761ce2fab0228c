# SPDX-License-Identifier: Apache-2.0
"""Machine code that numba keeps on disk, cut short by a kill or a full disk: it is made anew, once."""

from __future__ import annotations

import os
from pathlib import Path

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
