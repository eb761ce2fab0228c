# SPDX-License-Identifier: Apache-2.0
"""What speculative decoding gains and keeps: `evaluate` modules, and quality scores of bench outputs.

`acceptance_length`, `speedup` and `losslessness` are `evaluate` modules, each in a folder of its own that
can be loaded without network or pushed to the Hub as it is. `scoring` compares answer quality.
"""

from __future__ import annotations

from pathlib import Path

MODULES = ("acceptance_length", "losslessness", "speedup")


def module_path(name: str) -> str:
    """Folder of one of the package's `evaluate` modules, to pass to `evaluate.load`.

    Args:
        name: `"acceptance_length"`, `"losslessness"` or `"speedup"`.

    Returns:
        The folder's path as a string, which is what `evaluate.load` takes.

    Raises:
        ValueError: for any other name.
    """
    if name not in MODULES:
        raise ValueError(f"No metric is called {name!r}; there are {', '.join(MODULES)}.")
    return str(Path(__file__).parent / name)
