# SPDX-License-Identifier: Apache-2.0
"""What lies in the hub's cache on this disk."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache


def cached_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of a repository in the cache, None where nothing of it is there; nothing is asked of the hub.

    Args:
        name: the hub id; revision: a commit or branch, by default the main one.
    """
    try:
        found = try_to_load_from_cache(name, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    except ValueError:  # it is no id
        return None
    return Path(found).parent if isinstance(found, str) else None


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
