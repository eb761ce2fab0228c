# SPDX-License-Identifier: Apache-2.0
"""The exceptions this package raises on its own account; everything else is ValueError or TypeError."""


class LevelError(RuntimeError):
    """A forward pass failed in the middle of a generation; the message names the level."""


class RollbackError(RuntimeError):
    """A cache did not have the length it was rolled back to, so nothing computed with it could be trusted."""


class ReleaseError(ImportError, ValueError):
    """The installed transformers is newer than any tested release, and changed something that chains rely on.

    Caught as a missing requirement (ImportError) or, like every other refusal before any work, as a ValueError.
    """
