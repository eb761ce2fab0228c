# SPDX-License-Identifier: Apache-2.0
"""What lies in the hub's cache on this disk."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants


def cached_folders() -> list[str]:
    """Folders of cached repositories that have a configuration, one a repository, the newest first; nothing is asked
    of the hub."""
    newest: dict[Path, tuple[float, str]] = {}
    for config in Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/config.json"):
        try:
            time = config.stat().st_mtime
        except OSError:  # the file it points to is gone
            continue
        repository = config.parents[2]
        newest[repository] = max(newest.get(repository, (0.0, "")), (time, str(config.parent)))
    return [folder for _, folder in sorted(newest.values(), reverse=True)]
