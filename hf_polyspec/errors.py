# SPDX-License-Identifier: Apache-2.0
"""The exceptions this package raises on its own account; everything else is ValueError or TypeError."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

TARGET = "the target"
"""How a chain calls the model that generate() was called on."""


class LevelError(RuntimeError):
    """A forward pass failed in the middle of a generation; the message names the level."""


class RollbackError(RuntimeError):
    """A cache did not have the length it was rolled back to, so nothing computed with it could be trusted."""


class UncheckableError(ValueError):
    """Drafts cannot be checked with a model, or not in what it is asked for.

    Raised before any work. Where it is of the target, the call generates without assistants; elsewhere it is a refusal.

    Args:
        message: a sentence that says why and what to do.
        level: how the chain calls the model, "the target" for that.
    """

    def __init__(self, message: str, level: str) -> None:
        super().__init__(message)
        self.level = level


@contextmanager
def refusals() -> Iterator[None]:
    """Inside, what cannot be checked is a refusal like any other, a plain `ValueError`: nothing takes over."""
    try:
        yield
    except UncheckableError as reason:
        raise ValueError(str(reason)) from None


class ReleaseError(ImportError, ValueError):
    """The installed transformers is newer than any tested release, and changed something that chains rely on.

    Caught as a missing requirement (ImportError) or, like every other refusal before any work, as a ValueError.
    """


class DamagedFileError(ValueError):
    """A file ends early or holds something else than it should; the message names it and says what to do.

    Args:
        path: the file.
        what: is wrong with it, without a full stop.
        remedy: what the user can do, without a full stop.
    """

    def __init__(self, path: str | os.PathLike[str], what: str, remedy: str) -> None:
        super().__init__(path, what, remedy)
        self.path, self.what, self.remedy = os.fspath(path), what, remedy

    def __str__(self) -> str:
        return f"{self.path} is damaged ({self.what}): {self.remedy}."


class FolderInUseError(OSError):
    """Another process is writing into a folder that takes one writer."""


@contextmanager
def level_failures(what: str) -> Iterator[None]:
    """Let what a level's model raises say which level it was.

    Callers look for batch sizes by catching that memory ran out, so such an error stays what it is and has the level in
    its notes (PEP 678); any other becomes the cause of a LevelError.

    Args:
        what: "the forward pass of NAME failed".

    Raises:
        LevelError: Something else than the end of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        noted: Any = error
        noted.__notes__ = [*getattr(error, "__notes__", ()), f"hf_polyspec: {what}."]  # Python 3.10 has no `add_note`
        raise
    except Exception as error:
        raise LevelError(f"{what}: {error}") from error
